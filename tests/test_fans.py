"""Completions that prompts share: the same numbers and the same work as of the texts that they stand for."""

from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backprompt import LM, NonFiniteError, Text, classify, explain, generate
from backprompt.evaluation.behind import Behind
from backprompt.forest.fan import Fan, Shape
from backprompt.forest.forest import Forest
from backprompt.session.text_scores import scores_behind
from backprompt.store import MemoryStore
from comparing import assert_close, num_distinct_ids
from operations import Operations
from spans import spelled
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

TOKENIZER = byte_level_bpe()
TOKEN_BYTES = 646  # of gpt2
ids = st.integers(0, 3)
completions = st.lists(st.lists(ids, min_size=1, max_size=5).map(tuple), min_size=1, max_size=8)


@cache
def model(name):
    return build(name)


def make_lm(name="gpt2", **options):
    return LM(model(name), TOKENIZER, **options)


@st.composite
def prompts_of_ids(draw):
    """Some begin with others, some are the same."""
    found = [draw(st.lists(ids, min_size=1, max_size=6))]
    for _ in range(draw(st.integers(1, 4))):
        found.append(draw(st.sampled_from(found)) + draw(st.lists(ids, max_size=3)))
    return found


def as_prompt(token_ids, lm, has_group):
    """A prompt; with a group of its own tokens before them, if it has one."""
    text = Text.from_tokens(token_ids, lm)
    if not has_group:
        return text
    return Text("The cat", lm) + (Text.from_tokens([5, 6], lm) | Text.from_tokens([7], lm)) + text


def scored(lm, prompts, shapes):
    """The log-probabilities of all completions behind each prompt, side by side."""
    behind = list(map(Behind, lm.session.prompt_ids(prompts), shapes))
    found = scores_behind(lm.session, behind)
    assert found.lengths == [sum(map(len, shape.completions)) for shape in shapes]
    return found.split()


def through_texts(lm, prompts, shapes):
    """The same of texts that are built one by one."""
    texts, starts = [], []
    for prompt, prompt_ids, shape in zip(prompts, lm.session.prompt_ids(prompts), shapes, strict=True):
        texts += [prompt + Text.from_tokens(ids, lm) for ids in shape.completions]
        starts += [len(prompt_ids)] * len(shape.completions)
    found = iter(lm.token_scores(texts, starts))
    return [[next(found) for _ in shape.completions] for shape in shapes]


def check(found, expected):
    for scores, rows in zip(found, expected, strict=True):
        assert_close(scores.logprobs, torch.cat([row.logprobs for row in rows]))
        assert scores.is_argmax.equal(torch.cat([row.is_argmax for row in rows]))


def fans(lm):
    return [span for span in lm.session.evaluator.forest.spans() if isinstance(span, Fan)]


def work(lm, before):
    after = lm.stats - before
    return after.tokens_computed, after.logit_rows


@settings(max_examples=100)
@given(
    name=st.sampled_from(["gpt2", "llama", "mistral_sliding"]),
    prompts=prompts_of_ids(),
    groups=st.lists(st.booleans(), min_size=5, max_size=5),
    sets=st.lists(completions, min_size=1, max_size=2),
    data=st.data(),
)
def test_scores_are_those_of_texts(name, prompts, groups, sets, data):
    """Under any budget and size of pass, with a store, whatever stood behind the prompts and whatever comes there."""
    choose = data.draw
    options = {
        "memory_bytes": choose(st.sampled_from([4_000, 40_000, 10_000_000])),
        "host_memory_bytes": choose(st.sampled_from([0, 20_000])),
        "max_tokens_per_forward": choose(st.sampled_from([1, 16, 64, 1000])),
        "store": choose(st.sampled_from([None, None, MemoryStore(), MemoryStore(persist="explicit")])),
    }
    lm, fresh = make_lm(name, **options), make_lm(name)
    lm.session.evaluator.computation.tile_tokens = choose(st.sampled_from([1, 4, 128]))
    shapes = list(map(Shape, sets))
    own = [choose(st.sampled_from(shapes)) for _ in prompts]
    ours = [as_prompt(prompt, lm, has_group) for prompt, has_group in zip(prompts, groups, strict=False)]
    plain = [as_prompt(prompt, fresh, has_group) for prompt, has_group in zip(prompts, groups, strict=False)]
    expected = through_texts(fresh, plain, own)
    for _ in range(choose(st.integers(1, 3))):
        for prompt in ours:
            behind = choose(st.none() | st.lists(ids, min_size=1, max_size=3))
            if behind is not None:
                choose(st.sampled_from([lm.evaluate, lm.token_logprobs, lm.look_up]))(
                    [prompt + Text.from_tokens(behind, lm)]
                )
        check(scored(lm, ours, own), expected)
        assert lm.stats.bytes_held <= options["memory_bytes"]
    check([torch_scores(rows) for rows in through_texts(lm, ours, own)], expected)


def torch_scores(rows):
    """Scores of several texts as those of one."""
    return type(rows[0])(torch.cat([row.logprobs for row in rows]), torch.cat([row.is_argmax for row in rows]))


@settings(max_examples=80)
@given(
    prompts=prompts_of_ids(),
    groups=st.lists(st.booleans(), min_size=5, max_size=5),
    listed=completions,
    data=st.data(),
)
def test_texts_that_are_built_with_the_same_ends_have_the_scores_of_each(prompts, groups, listed, data):
    """Whatever was computed before, wherever they are scored from, in any order, and under any budget."""
    choose = data.draw
    max_bytes = choose(st.sampled_from([4_000, 40_000, 10_000_000]))
    lm, fresh = make_lm(memory_bytes=max_bytes, max_tokens_per_forward=choose(st.sampled_from([16, 1000]))), make_lm()
    ends = [Text.from_tokens(ids, lm) for ids in listed]
    ours = [as_prompt(prompt, lm, has_group) for prompt, has_group in zip(prompts, groups, strict=False)]
    are_apart = choose(st.booleans())  # ends with the same ids, or the same ends
    texts = [
        prompt + (Text.from_tokens(ids, lm) if are_apart else end)
        for prompt in ours
        for ids, end in zip(listed, ends, strict=True)
    ]
    starts = [choose(beginnings(prompt)) for prompt in ours for _ in ends]
    for _ in range(choose(st.integers(0, 2))):
        choose(st.sampled_from(texts))()
    if choose(st.booleans()):
        texts = choose(st.permutations(texts))
        starts = [0] * len(texts)
    if choose(st.booleans()):
        starts[0] = choose(st.integers(0, len(texts[0].tokens)))
    plain = [as_prompt(prompt, fresh, has_group) for prompt, has_group in zip(prompts, groups, strict=False)]
    expected = {
        prompt.tokens + ids: fresh.token_scores([prompt + Text.from_tokens(ids, fresh)])[0]
        for prompt in plain
        for ids in listed
    }
    for _ in range(2):
        for text, start, scores in zip(texts, starts, lm.token_scores(texts, starts), strict=True):
            first = start if isinstance(start, int) else len(start.tokens)
            whole = expected[text.tokens]
            assert_close(scores.logprobs, whole.logprobs[first:])
            assert scores.is_argmax.equal(whole.is_argmax[first:])
        assert lm.stats.bytes_held <= max_bytes


def beginnings(prompt):
    """Starts within a prompt: numbers of tokens, and texts."""
    texts = [prompt]
    if len(prompt.segments) == 1:
        texts += [Text.from_tokens(prompt.tokens[:stop], prompt.lm) for stop in range(len(prompt.tokens))]
    return st.sampled_from(texts) | st.integers(0, len(prompt.tokens))


@pytest.mark.parametrize("are_apart", [False, True])
@pytest.mark.parametrize("num_own", [0, 1, 3])
def test_texts_that_are_built_with_the_same_ends_are_fans(are_apart, num_own):
    lm = make_lm()
    prompts, shapes = prompts_and_shapes(lm)
    listed = shapes[0].completions
    ends = [Text.from_tokens(ids, lm) for ids in listed]
    texts = [
        prompt + (Text.from_tokens(ids, lm) if are_apart else end)
        for prompt in prompts
        for ids, end in zip(listed, ends, strict=True)
    ]
    before = lm.stats
    lm.token_logprobs(texts, [3 - num_own] * len(texts))
    assert len(fans(lm)) == 4
    asked = lm.stats - before
    assert asked.tokens_requested == sum(len(text.tokens) for text in texts)
    num_first_rows = {0: 0, 1: 4, 3: 5}[num_own]  # of the last token of each prompt, and of the first, which they share
    assert asked.logit_rows == 4 * (1 + shapes[0].num_rows) + num_first_rows
    before = lm.stats
    lm.token_logprobs(texts)
    assert work(lm, before) == (0, 5 - num_first_rows)
    assert len(fans(lm)) == 4
    lm.token_logprobs(texts[:2], [4, 0])  # a start behind the prompt: one by one
    assert work(lm, before) == (0, 5 - num_first_rows)
    assert len(fans(lm)) == 3


def test_a_start_that_is_no_beginning_of_a_prompt_is_refused_as_of_texts():
    lm = make_lm()
    prompts, shapes = prompts_and_shapes(lm)
    texts = [prompt + Text.from_tokens(ids, lm) for prompt in prompts for ids in shapes[0].completions]
    for start, error in (
        (Text.from_tokens([9, 1, 7], lm), ValueError),
        (Text.from_tokens([9] * 20, lm), ValueError),
        (-1, ValueError),
        (9, ValueError),
        (True, TypeError),
        ("9", TypeError),
    ):
        with pytest.raises(error):
            lm.token_logprobs(texts, [start] * len(texts))
    assert lm.stats.tokens_computed == 0


@settings(max_examples=60)
@given(prompts=prompts_of_ids(), listed=completions, max_tokens=st.sampled_from([40, 1000]))
def test_the_work_is_that_of_texts(prompts, listed, max_tokens):
    """Each token is forwarded and each row of logits computed once, then and later; nothing is computed again."""
    lm, other = make_lm(max_tokens_per_forward=max_tokens), make_lm(max_tokens_per_forward=max_tokens)
    shapes = [Shape(listed)] * len(prompts)
    ours, plain = ([Text.from_tokens(prompt, of) for prompt in prompts] for of in (lm, other))
    before = lm.stats, other.stats
    scored(lm, ours, shapes)
    through_texts(other, plain, shapes)
    assert work(lm, before[0]) == work(other, before[1])
    forwarded = [(*prompt, *ids[:-1]) for prompt in prompts for ids in listed]
    assert work(lm, before[0])[0] == num_distinct_ids(forwarded)
    before = lm.stats
    again = scored(lm, ours, shapes)
    assert work(lm, before) == (0, 0)
    check(again, through_texts(lm, ours, shapes))
    lm.next_token_logprobs(ours, [[ids[0] for ids in listed]] * len(ours))
    assert work(lm, before) == (0, 0)
    assert not fans(lm)


@settings(max_examples=60)
@given(prompts=prompts_of_ids(), listed=completions, max_tokens=st.sampled_from([40, 1000]))
def test_the_work_of_whole_texts_is_a_row_for_each_beginning(prompts, listed, max_tokens):
    lm = make_lm(max_tokens_per_forward=max_tokens)
    ends = [Text.from_tokens(ids, lm) for ids in listed]
    texts = [prompt + end for prompt in (Text.from_tokens(prompt, lm) for prompt in prompts) for end in ends]
    before = lm.stats
    lm.token_logprobs(texts)
    num_rows = num_distinct_ids(text.tokens[:-1] for text in texts)
    assert work(lm, before) == (num_rows, num_rows)
    before = lm.stats
    lm.token_logprobs(texts)
    assert work(lm, before) == (0, 0)


@given(listed=completions, prompt=st.lists(ids, min_size=1, max_size=3).map(tuple))
def test_a_fan_unfolds_into_the_spans_of_its_texts(listed, prompt):
    shape = Shape(listed)
    if not shape.has_rows:
        return
    forest, plain = Forest(), Forest()
    end = forest.insert(prompt)
    fan = forest.fan(end, shape)
    assert forest.fan(end, Shape(listed)) is fan
    assert num_distinct_ids(ids[:-1] for ids in listed) == shape.num_rows == len(fan.positions)
    forest.unfold(end)
    ends = {plain.insert(prompt)} | {plain.insert(prompt + ids[:-1]) for ids in listed}
    found = {spelled(span): (span.position, span.is_end, len(span.token_ids)) for span in forest.spans()}
    expected = {spelled(span): (span.position, span in ends, len(span.token_ids)) for span in plain.spans()}
    assert found == expected
    assert forest.fan(end, shape) is None


@given(listed=completions)
def test_a_shape_says_which_row_predicts_each_token(listed):
    shape = Shape(listed)
    assert Counter(shape.scores.index.tolist()).total() == sum(map(len, listed))
    places = iter(shape.scores.index.tolist())
    for token_ids in listed:
        for idx, (token_id, place) in enumerate(zip(token_ids, places, strict=False)):
            assert shape.scores.token_ids[place] == token_id
            assert shape.ids_before(int(shape.scores.parents[place])) == token_ids[:idx]
    for row, until in enumerate(shape.rows.until):
        below = [other for other in range(shape.num_rows) if row in way_to(shape, other)]
        assert below == list(range(row, until))
        assert shape.rows.depths[row] == len(way_to(shape, row)) - 1


def way_to(shape, row):
    way = []
    while row >= 0:
        way.append(row)
        row = shape.rows.parents[row]
    return way


def test_a_text_that_ends_where_a_fan_stands_takes_its_scores():
    """A completion of the short prompt runs into the long one, and its last token is a row of a fan there."""
    works = []
    for through in (scored, through_texts):
        lm = make_lm()
        one, two, short = (Text.from_tokens(ids, lm) for ids in ((1, 2), (3,), (1,)))
        shape = Shape([(2, 4), (4, 5, 6)])
        through(lm, [one, two], [shape] * 2)
        before = lm.stats
        through(lm, [short], [shape])
        works.append(work(lm, before))
    assert works[0] == works[1]


def prompts_and_shapes(lm, num_prompts=4, num_completions=40):
    prompts = [Text.from_tokens((9, idx, 8), lm) for idx in range(num_prompts)]
    listed = [(7, 1 + idx % 5, 10 + idx, 11 + idx, 3) for idx in range(num_completions)]
    return prompts, [Shape(listed)] * num_prompts


def test_shared_completions_are_one_span_a_prompt():
    """Also where a fan is larger than a tile."""
    lm = make_lm()
    prompts, shapes = prompts_and_shapes(lm)
    assert shapes[0].num_rows > lm.session.evaluator.computation.tile_tokens / 2
    scored(lm, prompts, shapes)
    assert len(fans(lm)) == 4
    assert len(list(lm.session.evaluator.forest.spans())) == 9


def test_a_completion_alone_and_a_large_fan_have_spans():
    for options, sizes in (
        ({}, (1, 1)),
        ({"max_tokens_per_forward": 100}, (4, 40)),
    ):
        lm = make_lm(**options)
        prompts, shapes = prompts_and_shapes(lm, *sizes)
        scored(lm, prompts, shapes)
        assert not fans(lm)
        assert len(list(lm.session.evaluator.forest.spans())) > sizes[1]


def test_completions_of_one_prompt_are_a_fan():
    """Those that several prompts have each for itself, too; a fan keeps no more than arrays and what was given."""
    lm = make_lm()
    prompts, _ = prompts_and_shapes(lm)
    shapes = [Shape([(idx, other, 5) for other in range(20)]) for idx in range(len(prompts))]
    scored(lm, prompts, shapes)
    assert len(fans(lm)) == 4
    texts = [
        prompt + Text.from_tokens(ids, lm)
        for prompt, own in zip(prompts, shapes, strict=True)
        for ids in own.completions
    ]
    before = lm.stats
    lm.token_logprobs(texts)
    assert work(lm, before)[0] == 0
    assert len(fans(lm)) == 4


def test_evicted_fans_are_computed_again():
    lm = make_lm(memory_bytes=100 * TOKEN_BYTES)
    prompts, shapes = prompts_and_shapes(lm, 8)
    first = [scores.logprobs.clone() for scores in scored(lm, prompts, shapes)]
    assert Counter(fan.is_held() for fan in fans(lm)).keys() == {True, False}
    before = lm.stats
    for scores, logprobs in zip(scored(lm, prompts, shapes), first, strict=True):
        assert_close(scores.logprobs, logprobs)
    assert (lm.stats - before).tokens_recomputed >= shapes[0].num_rows
    assert lm.stats.bytes_held <= 100 * TOKEN_BYTES


def test_spans_of_an_unfolded_fan_are_evicted_like_others():
    lm = make_lm(memory_bytes=100 * TOKEN_BYTES)
    prompts, shapes = prompts_and_shapes(lm, 8)
    scored(lm, prompts, shapes)
    lm.look_up([prompt + Text.from_tokens(shapes[0].completions[0], lm) for prompt in prompts])
    assert not fans(lm)
    lm.evaluate([Text.from_tokens(range(start, start + 90), lm) for start in (0, 100, 200)])
    assert lm.stats.bytes_held <= 100 * TOKEN_BYTES
    held = lm.session.evaluator.forest.held_spans()
    assert sum(len(span.token_ids) for span in held if span.is_held(with_keys_values=True)) <= 100


def test_a_look_unfolds_one_fan_and_computes_nothing():
    lm = make_lm()
    prompts, shapes = prompts_and_shapes(lm)
    scored(lm, prompts, shapes)
    before = lm.stats
    text = prompts[1] + Text.from_tokens(shapes[0].completions[3], lm)
    ((held, absent),) = lm.look_up([text])
    assert (held.where, absent.where, absent.stop - absent.start) == ("memory", "absent", 1)
    assert len(fans(lm)) == 3
    explain([text])
    assert work(lm, before) == (0, 0)
    assert lm.stats.bytes_held == before.bytes_held


def test_a_pinned_prompt_keeps_its_place_and_not_its_fan():
    lm = make_lm(memory_bytes=60 * TOKEN_BYTES)
    prompts, shapes = prompts_and_shapes(lm)
    with prompts[0].pin():
        scored(lm, prompts, shapes)
        lm.evaluate([Text.from_tokens(range(50), lm)])
        before = lm.stats
        lm.evaluate([prompts[0]])
        assert (lm.stats - before).tokens_computed == 0


def test_leaves_over_the_bound_are_scored_again():
    lm = make_lm()
    prompts, shapes = prompts_and_shapes(lm)
    first = [scores.logprobs.clone() for scores in scored(lm, prompts, shapes)]
    pool = lm.session.evaluator.pools.leaves
    assert pool.num_bytes == lm.stats.result_bytes_held == 4 * 9 * shapes[0].num_leaves
    pool.max_bytes = 9 * shapes[0].num_leaves
    before = lm.stats
    assert all(a.logprobs.equal(b) for a, b in zip(scored(lm, prompts, shapes), first, strict=True))
    assert (lm.stats - before).logit_rows == 0
    lm.clear()
    assert lm.stats.result_bytes_held == 0
    scored(lm, prompts, shapes)
    assert pool.num_bytes == pool.max_bytes
    before = lm.stats
    for scores, logprobs in zip(scored(lm, prompts, shapes), first, strict=True):
        assert_close(scores.logprobs, logprobs)
    assert 0 < (lm.stats - before).logit_rows <= 3 * shapes[0].num_leaves


def test_an_error_is_that_of_texts(monkeypatch):
    """Of hidden states: a NaN in an embedding may spoil other rows of a fan."""
    spoiled = build("llama")
    with torch.no_grad():
        spoiled.get_input_embeddings().weight[50] = torch.nan
    messages = []
    for fans_in_a_pass in (4, 1 << 40):  # the second time the completions are texts
        monkeypatch.setattr("backprompt.evaluation.behind.FANS_IN_A_PASS", fans_in_a_pass)
        lm = LM(spoiled, TOKENIZER)
        prompts = [Text("The dog", lm)] * 2
        with pytest.raises(NonFiniteError, match="NaN hidden states at the end of") as caught:
            scored(lm, prompts, [Shape([(1, 2, 3), (7, 8, 50, 10, 11), (7, 9)])] * 2)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    shapes = [Shape([(1, 2, 3), (7, 9)])] * 2
    check(scored(lm, prompts, shapes), through_texts(lm, prompts, shapes))


@pytest.mark.parametrize(("row", "before"), [(0, ()), (1, (1,)), (2, (1, 2)), (3, (7,))])
def test_an_error_of_logits_names_the_completion_up_to_the_row(row, before):
    lm = make_lm()
    prompts, shapes = [Text("The cat", lm), Text("The dog", lm)], [Shape([(1, 2, 3), (7, 8)])] * 2
    lm.evaluate([Text("A", lm)])  # the probe
    executor = lm.session.evaluator.executor
    plain, bad = executor.logits, []

    def spoiled(hidden):
        bad.append(hidden[row] if not bad else bad[0])
        return plain(hidden).masked_fill((hidden == bad[0]).all(dim=-1, keepdim=True), torch.nan)

    executor.logits = spoiled
    with pytest.raises(NonFiniteError, match="NaN logits at the end of") as caught:
        scored(lm, prompts, shapes)
    shown = str(caught.value).replace("The cat", "").replace("The dog", "")
    assert f"at the end of {TOKENIZER.decode(before)!r} (" in shown
    executor.logits = plain
    fresh = make_lm()
    check(scored(lm, prompts, shapes), through_texts(fresh, [Text(p.string, fresh) for p in prompts], shapes))


def test_operations_do_not_grow_with_prompts_or_completions():
    nums = []
    for num_prompts, num_completions in ((4, 10), (40, 10), (40, 40)):
        lm = make_lm(max_tokens_per_forward=10_000)
        lm.evaluate([Text("The cat", lm)])
        prompts, shapes = prompts_and_shapes(lm, num_prompts, num_completions)
        with Operations(lm.session.evaluator.executor) as operations:
            scored(lm, prompts, shapes)
        nums.append(operations.num)
    assert nums[1] <= nums[0] + 8, nums
    assert max(nums) < 120, nums  # some for each 4 MB of logits


def test_changed_weights_drop_fans():
    own = build("gpt2")
    lm = LM(own, TOKENIZER)
    prompts, shapes = prompts_and_shapes(lm)
    scored(lm, prompts, shapes)
    with torch.no_grad():
        own.transformer.wte.weight[0] += 1
    fresh = LM(own, TOKENIZER)
    check(scored(lm, prompts, shapes), through_texts(fresh, prompts_and_shapes(fresh)[0], shapes))


def test_classification_builds_no_text_of_a_completion(monkeypatch):
    lm = make_lm()
    prompts = [f"The cat {idx} sat on" for idx in range(5)]
    built = []
    plain = Text.__add__
    monkeypatch.setattr(Text, "__add__", lambda text, other: built.append(other) or plain(text, other))
    classify.predict_proba(prompts, ["a mat", "the mat", "a hat of his"], lm)
    assert len(built) <= 2 * len(prompts)


def test_texts_that_part_where_a_fan_stands_lose_nothing():
    """A generation that goes on behind a prompt with a fan unfolds it: what the fan holds is not computed again."""
    lm = make_lm()
    prompts = [Text.from_tokens(ids, lm) for ids in ((5, 6, 7), (8, 9))]
    greedy = [prompt.generate(max_new_tokens=4).completion_tokens for prompt in prompts]
    lm.clear()
    ends = [Text.from_tokens(ids, lm) for ids in ((greedy[0][0], 3, 4), (greedy[1][0], 7, 2))]
    texts = [prompt + end for prompt in prompts for end in ends]
    lm.token_logprobs(texts, [len(prompt.tokens) for prompt in prompts for _ in ends])
    assert len(fans(lm)) == 2
    before = lm.stats
    found = generate(prompts, max_new_tokens=4)
    assert [text.completion_tokens for text in found] == greedy
    assert not fans(lm)
    assert (lm.stats - before).tokens_computed == 4  # the second and third of each; the fans hold the first ones
    before = lm.stats
    lm.evaluate([prompt + Text.from_tokens(ids[:3], lm) for prompt, ids in zip(prompts, greedy, strict=True)])
    assert (lm.stats - before).tokens_computed == 0
    for span in lm.session.evaluator.computation.forest.spans():
        assert span.keys_values_below == sum(child.keys_values is not None for child in span.children.values())
