"""Steps of a generation in place: plan and attention of each step are those that a plan from nothing would give."""

import gc
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import backprompt
from backprompt import LM, Text, generate
from backprompt.attention.base import Scoring
from backprompt.attention.calls import CallsAttention
from backprompt.attention.device_tables import DeviceTables, Room
from backprompt.attention.tables import Cut, Segments, Work
from backprompt.forest import plan
from backprompt.forest.passes import missing_spans
from backprompt.forest.plan import plan_pass
from backprompt.forest.span import Span
from backprompt.forest.steps import StepPlan, later
from backprompt.generation.decoding import Decoding
from backprompt.generation.run import Run
from backprompt.generation.stops import StopStrings
from backprompt.memory.growth import ROWS_AT_A_TIME, Growth, NewRows, takes_tokens_in
from comparing import assert_close
from reference import plain_greedy, plain_token_logprobs
from tiny_blocks import assert_right, compute, inserted, keys_values_for, numbers_of, states_for

CALLS_A_TEXT = 15
"""The calls of functions of the package that one more text adds to a step."""

PROMPTS = ((1, 2, 3), (1, 2, 4, 5), (7,), (1, 2, 3, 9, 9))


class Texts:
    """Texts that grow, the first tokens by passes of their own, so that they have room for more in a buffer."""

    def __init__(self, prompts, num_tokens=2):
        self.forest, self.ends = inserted(*dict.fromkeys(prompts))
        compute(missing_spans(self.ends, with_keys_values=True))
        self.growth = Growth(self.forest)
        for step in range(num_tokens):
            self.ends = [self.forest.extend(end, end.stop, (20 + step,)) for end in self.ends]
            compute(self.ends)
            self.growth.note_pass(self.ends)
            self.growth.absorb(self.ends, held=set(self.ends))

    def to_come(self):
        return [Span((0,), end.stop, end) for end in self.ends]

    def take_in(self, ends, token_ids):
        new = [Span((token_id,), end.stop, end) for end, token_id in zip(ends, token_ids, strict=True)]
        rows = NewRows(range(len(ends)), keys_values_for(new), states_for(new))
        self.growth.extend(ends, token_ids, rows)


def rows_of(tokens, num_heads=4):
    """Queries, keys and values for the rows of a pass, told by their tokens."""
    generator = torch.Generator().manual_seed(int(numbers_of(tokens).sum()))
    query = torch.randn(num_heads, len(tokens), 3, generator=generator)
    keys_values = keys_values_for(tokens)
    return query, *keys_values.layer(0, slice(None))


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=9, unique=True)


def seen(columns, blocks, until):
    """For each row the keys of others that it sees: block, row of the block, position and count; from tables."""
    rows = [set() for _ in until]
    for start, stop, block, first, num_keys, position, times, is_own, _ in columns.T.tolist():
        for row in range(start, stop):
            if is_own:
                assert (first, num_keys, until[row]) == (start, stop - start, row + 1)
            else:
                rows[row] |= {(blocks[block], first + idx, position + idx, times) for idx in range(num_keys)}
    return rows


@given(
    prompts=prompts,
    num_steps=st.integers(1, ROWS_AT_A_TIME),
    windows=st.lists(st.sampled_from([None, 1, 3, 9]), min_size=1, max_size=2),
    call_multiplications=st.sampled_from([0, 300, 1_500_000]),
    tile_tokens=st.sampled_from([1, 128]),
    data=st.data(),
)
def test_a_step_attends_as_if_it_were_planned_from_nothing(
    prompts, num_steps, windows, call_multiplications, tile_tokens, data
):
    """Some texts leave on the way."""
    texts = Texts(prompts)
    steps = StepPlan(texts.to_come(), tile_tokens)
    attention = CallsAttention()
    assert texts.growth.num_steps(texts.ends) == ROWS_AT_A_TIME
    prepared = attention.prepare(steps.pass_, ROWS_AT_A_TIME)
    tables = Segments.of(steps.pass_.segments, steps.pass_.positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "CALL_MULTIPLICATIONS", call_multiplications)
        for step in range(num_steps):
            rows = None
            if step and len(steps.ends) > 1 and data.draw(st.integers(0, 2)) == 0:
                gone = data.draw(st.sets(st.sampled_from(steps.ends), min_size=1, max_size=len(steps.ends) - 1))
                rows = steps.rows_of(set(steps.ends) - gone)
                steps.keep(rows)
            assert steps.is_current()
            token_ids = [30 + step + idx for idx in range(len(steps.ends))]
            steps.begin(token_ids)
            if step:
                prepared.advance(rows)
                tables = tables.next_step(rows)
            to_come = [Span((token_id,), end.stop, end) for end, token_id in zip(steps.ends, token_ids, strict=True)]
            anew = plan_pass(missing_spans(to_come), tile_tokens)
            assert (anew.token_ids, anew.positions) == (steps.pass_.token_ids, steps.pass_.positions)
            planned = later(steps.pass_, step)
            assert sum(segment.grows for segment in planned.segments) == len(steps.ends)
            found, again, expected = tables, *(Segments.of(p.segments, anew.positions) for p in (planned, anew))
            for other in (again, expected):
                assert np.array_equal(found.positions, other.positions)
                assert seen(found.columns, found.blocks, found.until) == seen(other.columns, other.blocks, other.until)
            rows = rows_of(steps.pass_.spans)
            for window in windows:
                expected = attention.prepare(anew).attend(0, *rows, Scoring(0.4, window))
                found = prepared.attend(0, *rows, Scoring(0.4, window))
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            texts.take_in(steps.ends, token_ids)
            steps.advance()
            assert_right(texts.forest.spans())


@given(
    prompts=prompts,
    num_steps=st.integers(1, ROWS_AT_A_TIME),
    cut=st.builds(Cut, st.sampled_from([1, 2, 16]), st.sampled_from([4, 64]), st.sampled_from([2, 100]), st.just(1)),
    window=st.sampled_from([None, None, 3]),
    num_rows=st.sampled_from([0, 16]),
    data=st.data(),
)
def test_tables_that_advance_are_those_of_each_step(prompts, num_steps, cut, window, num_rows, data):
    """Some steps are left out, and some texts leave on the way."""
    texts = Texts(prompts)
    steps = StepPlan(texts.to_come())
    segments = Segments.of(steps.pass_.segments, steps.pass_.positions)
    num_rows = max(num_rows, len(segments.positions))
    first = segments.padded(num_rows)
    work = Work.of(first, cut, window)
    tables = DeviceTables.of(first, work, torch.device("cpu"), Room.for_steps(first, work, cut))
    loaded = segments
    for _ in range(num_steps):
        rows, num_live = None, len(segments.positions)
        if num_live > 1 and data.draw(st.integers(0, 4)) == 0:
            rows = sorted(data.draw(st.sets(st.integers(0, num_live - 1), min_size=1, max_size=num_live - 1)))
        segments = segments.next_step(rows)
        if data.draw(st.booleans()):
            continue
        padded, num_between = segments.padded(num_rows), segments.steps_since(loaded)
        is_advanced = num_between is not None and tables.advance(padded, num_between)
        if num_between:
            in_last_piece = (segments.columns[4, segments.grows] - num_between - 1) % cut.piece_keys + 1
            assert is_advanced == (window is None and max(in_last_piece) + num_between < cut.piece_keys)
        assert is_advanced or tables.load(padded, Work.of(padded, cut, window))
        expected = DeviceTables.of(padded, Work.of(padded, cut, window), torch.device("cpu"), tables.room)
        assert np.array_equal(tables.loaded, expected.loaded)
        assert np.array_equal(tables.numbers[: len(tables.loaded)], tables.loaded)
        loaded = segments


@pytest.mark.parametrize("what", ["split", "moved", "grown"])
def test_a_plan_is_not_used_where_keys_lie_elsewhere(what):
    texts = Texts(PROMPTS)
    steps = StepPlan(texts.to_come())
    assert steps.is_current()
    end = texts.ends[1]
    if what == "split":
        texts.forest.insert((1, 2, 4, 8))
    elif what == "moved":
        end.parent.place(keys_values=end.parent.keys_values.alone())
    else:
        texts.take_in([end], [5])
    assert not steps.is_current()
    steps.keep(steps.rows_of({texts.ends[2]}))  # with which none of these have to do
    assert steps.is_current()


def test_a_text_that_grows_copies_no_ids():
    texts = Texts(PROMPTS)
    end = texts.ends[0]
    texts.take_in(texts.ends, [30] * 4)
    ids = end.token_ids
    texts.take_in(texts.ends, [31] * 4)
    assert end.token_ids is ids
    upper = texts.forest.split(end, 2)
    texts.take_in(texts.ends, [32] * 4)
    assert (upper.token_ids, end.token_ids) == ((20, 21), [30, 31, 32])
    texts.growth.finish(end)
    assert end.token_ids == (30, 31, 32)


@pytest.mark.parametrize("why", ["an end", "continued", "stored", "inexact", "dropped"])
def test_a_span_that_cannot_take_in_a_token(why):
    texts = Texts(PROMPTS)
    first = texts.ends[0]
    assert all(map(takes_tokens_in, texts.ends))
    if why == "an end":
        first.is_end = True
    elif why == "continued":
        texts.forest.extend(first, first.stop, (5,))
    elif why == "stored":
        first.is_stored = True
    elif why == "inexact":
        first.error = 0.1
    else:
        first.drop()
    assert list(map(takes_tokens_in, texts.ends)) == [False, True, True, True]


@pytest.mark.parametrize("why", ["full", "elsewhere", "smaller"])
def test_room_is_made_where_there_is_none(why):
    texts = Texts(PROMPTS)
    first, *others = texts.ends
    assert texts.growth.num_steps(texts.ends) == ROWS_AT_A_TIME
    assert texts.growth.make_room(texts.ends) == []
    if why == "full":
        for token_id in range(ROWS_AT_A_TIME):
            texts.take_in([first], [token_id])
    elif why == "elsewhere":
        first.place(states=first.states.alone())
    else:
        first.keys_values.block.append([first.keys_values.block.zeros(1)])
    assert texts.growth.num_steps([*others, first]) == 0
    assert texts.growth.num_steps(others) == (0 if why == "smaller" else ROWS_AT_A_TIME)
    assert len(texts.growth.make_room(texts.ends)) == 2
    assert texts.growth.num_steps(texts.ends) >= ROWS_AT_A_TIME
    texts.take_in(texts.ends, [7] * 4)
    assert_right(texts.forest.spans())


def test_spans_of_several_buffers_take_tokens_in_together():
    texts = Texts(PROMPTS[:2])
    for token_id in range(ROWS_AT_A_TIME):
        texts.take_in(texts.ends[:1], [token_id])
    texts.ends[0] = texts.forest.extend(texts.ends[0], texts.ends[0].stop, (50,))
    compute(texts.ends[:1])
    texts.growth.absorb(texts.ends[:1], held=set(texts.ends))
    assert texts.ends[0].keys_values.block is not texts.ends[1].keys_values.block
    texts.take_in(texts.ends, [60, 61])
    assert_right(texts.forest.spans())
    assert [end.token_ids[-1] for end in texts.ends] == [60, 61]


# Generations


def calls_of(work):
    """How often each function of the package is called, without the end of what other tests have left."""
    package, calls = str(Path(backprompt.__file__).parent), Counter()

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            calls[Path(code.co_filename).name, code.co_name] += 1

    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}], ids=str)
def test_a_step_walks_as_many_spans_however_long_the_texts_are(model, tokenizer, options):
    """After ten steps, or after fifty: nothing is inserted, absorbed or planned."""

    def of_a_step(num_steps):
        stream = Text("a", LM(model, tokenizer)).stream(max_new_tokens=90, seed=1, **options)
        for _ in range(num_steps):
            stream.run.step()
        calls = calls_of(stream.run.step)
        assert not calls["forest.py", "insert"] + calls["plan.py", "plan_pass"] + calls["growth.py", "absorb"]
        return calls

    assert of_a_step(10) == of_a_step(50)


def test_a_text_without_adapters_takes_no_call_for_them_in_a_step(model, tokenizer):
    """Nor are the places of new rows made, which only captured graphs need."""

    def of_a_step(num_texts):
        lm = LM(model, tokenizer)
        texts = [Text.from_tokens([token_id], lm) for token_id in range(5, 5 + num_texts)]
        stops = StopStrings(None, tokenizer, include_stop=False)
        run = Run(lm, texts, Decoding(lm.model, tokenizer, max_new_tokens=20, stops=stops, seed=None, given={}))
        for _ in range(4):
            run.step()
        return calls_of(run.step)

    few, many = of_a_step(8), of_a_step(16)
    of_a_text = {name: (count - few[name]) / 8 for name, count in many.items()}
    assert not [name for name, count in of_a_text.items() if name[0] == "adapted.py" and count]
    assert not many["growth.py", "places"]
    assert many["plan.py", "token_ids"] == many["plan.py", "positions"] == 1
    assert sum(of_a_text.values()) <= CALLS_A_TEXT


def test_what_a_step_in_place_leaves_is_what_evaluating_leaves(model, tokenizer):
    lm = LM(model, tokenizer)
    texts = [Text(f"{number} cats sat on the mat and", lm) for number in range(5)]
    found = generate(texts, max_new_tokens=40)
    computed = lm.stats.tokens_computed
    for text in found:
        assert text.completion_tokens == plain_greedy(model, text.prompt.tokens, 40)
        assert_close(text.token_logprobs, plain_token_logprobs(model, text.tokens))
    assert lm.stats.tokens_computed - computed == len(found)  # the last token of each
    assert lm.stats.bytes_held == lm.session.evaluator.executor.token_bytes * sum(
        len(span.token_ids) for span in lm.session.evaluator.forest.spans()
    )


@pytest.mark.parametrize(("num_texts", "num_samples"), [(7, 1), (1, 4)], ids=["join", "part"])
def test_texts_that_join_and_samples_that_part_take_their_steps_in_place(
    model, tokenizer, monkeypatch, num_texts, num_samples
):
    """Nothing is inserted but the prompts."""
    monkeypatch.setattr("backprompt.generation.run.MAX_LIVE_TEXTS", 4)
    texts = [f"{number} cats sat on" for number in range(num_texts)]
    options = {"max_new_tokens": 12, "temperature": 0.3, "seed": 4, "eos_token_id": list(range(0, 320, 9))}
    options["n"] = num_samples
    together = LM(model, tokenizer)

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(together.session.evaluator.continuations, "grow", refuse)
    found = generate([Text(text, together) for text in texts], **options)
    assert len({len(sample.completion_tokens) for samples in found for sample in samples}) > 1
    forest, token_bytes = together.session.evaluator.forest, together.session.evaluator.executor.token_bytes
    assert together.stats.tokens_computed == sum(len(span.token_ids) for span in forest.spans())
    assert together.stats.bytes_held == together.stats.tokens_computed * token_bytes
    for text, samples in zip(texts, found, strict=True):
        alone = generate(Text(text, LM(model, tokenizer)), **options)
        for sample, expected in zip(samples, alone, strict=True):
            assert sample.completion_tokens == expected.completion_tokens
            assert_close(sample.completion_logprobs, expected.completion_logprobs)
            assert_close(sample.token_logprobs, plain_token_logprobs(model, sample.tokens))


@pytest.mark.parametrize("what", ["evaluated", "dropped", "pinned", "another generation"])
def test_what_happens_between_steps_is_noticed(model, tokenizer, what):
    """The step after it is made without what the step before has left, and right."""
    lm = LM(model, tokenizer)
    text = Text("The cat sat on", lm)
    stream = text.stream(max_new_tokens=12)
    for _ in range(5):
        stream.run.step()
    so_far = Text.from_tokens(stream.text.tokens[:-1], lm)
    if what == "evaluated":
        so_far.logits  # noqa: B018
    elif what == "dropped":
        lm.clear()
    elif what == "pinned":
        so_far.pin()
    else:
        other = text.stream(max_new_tokens=12)
        for _ in range(8):
            other.run.step()
    list(stream)
    assert stream.text.completion_tokens == plain_greedy(model, text.tokens, 12)
    assert_close(stream.text.token_logprobs, plain_token_logprobs(model, stream.text.tokens))
    if what in ("evaluated", "pinned"):
        before = lm.stats.tokens_computed
        assert so_far.logits.shape == (320,)
        assert lm.stats.tokens_computed == before
