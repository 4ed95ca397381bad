"""Looking up what is held: pieces say where each token lies, as evaluating then confirms, and nothing changes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_groups import build, segments
from test_memory import TOKEN_BYTES, make_lm

import backprompt as bp
from backprompt import LM, Piece, Text, evaluate
from backprompt.forest.forest import Forest
from backprompt.forest.span import KINDS
from backprompt.store import DiskStore, MemoryStore
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe

CONTEXT = "Question: What is 12 + 34? Answer: 46. Question: What is 5 + 6? Answer: 11. "


def state_of(lm):
    """All that a look-up might change."""
    evaluator = lm.session.evaluator
    fields = [slot for slot in type(evaluator.forest.root).__slots__ if slot not in ("children", "parent")]
    return (
        lm.stats,
        [
            (id(span), id(span.parent), list(span.children), [getattr(span, name) for name in fields])
            for span in [evaluator.forest.root, *evaluator.forest.spans()]
        ],
        {name: value for name, value in vars(evaluator.memory).items() if isinstance(value, (int, float))},
    )


def only(texts, lm):
    """The places of one text each; every text lies in one place."""
    found = lm.look_up(texts)
    assert all(len(pieces) == 1 for pieces in found), found
    return [pieces[0].where for pieces in found]


def held_by_walking(lm, token_ids):
    """How many of the first tokens the forest holds states of; by itself, without `Sketch`."""
    span, num_held = lm.session.evaluator.forest.root, 0
    while num_held < len(token_ids):
        span = span.children.get(token_ids[num_held])
        if span is None or span.states is None:
            return num_held
        for own in span.token_ids:
            if num_held == len(token_ids) or token_ids[num_held] != own:
                return num_held
            num_held += 1
    return num_held


def test_what_is_held_and_what_is_not(model, tokenizer):
    """A new text is absent, an evaluated one in memory, and one that continues its beginning both."""
    lm = LM(model, tokenizer)
    context = Text("The cat sat", lm)
    short, longer = context + " on", context + " down there"
    assert lm.look_up([short]) == [[Piece(0, len(short.tokens), "absent")]]
    evaluate(short)
    num_context = len(context.tokens)
    assert lm.look_up([short, longer, context]) == [
        [Piece(0, len(short.tokens), "memory")],
        [Piece(0, num_context, "memory"), Piece(num_context, len(longer.tokens), "absent")],
        [Piece(0, num_context, "memory")],  # ends within a span
    ]
    assert lm.look_up([]) == []
    assert lm.look_up([Text("", lm)]) == [[]]


def test_texts_of_another_lm_are_refused(model, tokenizer):
    lm = LM(model, tokenizer)
    with pytest.raises(bp.UnboundTextError, match="texts\\[0\\]"):
        lm.look_up([Text("a", LM(model, tokenizer))])
    with pytest.raises(bp.TextTypeError):
        lm.look_up(["a"])


def test_what_was_dropped_is_evicted(model, tokenizer):
    lm = make_lm(model, tokenizer, num_tokens=20)
    texts = [Text(f"{n} cats sat on the mat, and {n + 1} did not.", lm) for n in range(100, 106)]
    evaluate(texts)
    found = [piece.where for pieces in lm.look_up(texts) for piece in pieces]
    assert set(found) == {"memory", "evicted"}
    held = sum(p.stop - p.start for pieces in lm.look_up(texts[-1:]) for p in pieces if p.where == "memory")
    assert held == held_by_walking(lm, texts[-1].tokens)
    lm.clear()
    assert only(texts, lm) == ["absent"] * len(texts)


def test_the_second_pool(model, tokenizer):
    lm = make_lm(model, tokenizer, num_tokens=20, host_tokens=500)
    texts = [Text(f"{n} cats sat on the mat, and {n + 1} did not.", lm) for n in range(100, 106)]
    evaluate(texts)
    places = {piece.where for pieces in lm.look_up(texts) for piece in pieces}
    assert places == {"memory", "host"}
    before = lm.stats
    in_host = sum(
        len(span.token_ids) for span in lm.session.evaluator.forest.spans() if span.states is None and span.host_states
    )
    distinct = {
        text.tokens[: idx + 1]
        for text, pieces in zip(texts, lm.look_up(texts), strict=True)
        for piece in pieces
        if piece.where == "host"
        for idx in range(piece.start, piece.stop)
    }
    assert len(distinct) == in_host
    assert lm.stats == before


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_the_store_in_a_new_process(model, tokenizer, kind, tmp_path):
    """A text that another LM stored is on disk; once loaded, it is in memory, and the text behind it is absent."""
    with MemoryStore() if kind == "memory" else DiskStore(tmp_path / "prompts.bp") as store:
        stored = Text(CONTEXT, LM(model, tokenizer, store=store))
        evaluate(stored)
        lm = LM(model, tokenizer, store=store)
        context = Text(CONTEXT, lm)
        question, part = context + "Question: What is 7 + 7?", Text(CONTEXT[:40], lm)
        num_context = len(context.tokens)
        expected = [Piece(0, num_context, "disk"), Piece(num_context, len(question.tokens), "absent")]
        before = state_of(lm)
        assert lm.look_up([context, question])[0] == [Piece(0, num_context, "disk")]
        assert lm.look_up([question]) == [expected]
        assert lm.look_up([part])[0][0].where == "disk"
        assert state_of(lm) == before
        evaluate(question)
        assert lm.stats.tokens_loaded == num_context
        assert lm.stats.tokens_computed == len(question.tokens) - num_context
        assert only([context, question], lm) == ["memory", "memory"]
        other = LM(FAMILIES["gpt2"](seed=1), tokenizer, store=store)
        assert only([Text(CONTEXT, other)], other) == ["absent"]


def test_dropped_and_stored_is_on_disk(model, tokenizer):
    with MemoryStore() as store:
        lm = LM(model, tokenizer, store=store, memory_bytes=10 * TOKEN_BYTES)
        text = Text(CONTEXT, lm)
        evaluate(text)
        places = [piece.where for piece in lm.look_up([text])[0]]
        assert places in (["memory", "disk"], ["disk"])
        for header in list(store.list()):
            store.delete(header.name)
        assert lm.look_up([text])[0][-1].where == "evicted"


def test_a_store_that_cannot_be_read_has_nothing(model, tokenizer, caplog, monkeypatch):
    store = MemoryStore()

    def fail(start, token_ids):
        raise OSError("gone")

    monkeypatch.setattr(store, "longest", fail)
    lm = LM(model, tokenizer, store=store)
    assert only([Text(CONTEXT, lm)], lm) == ["absent"]
    assert "cannot be read (gone)" in caplog.text


def test_behind_a_group(model, tokenizer):
    """Branches are held in any order; the text behind them is held behind these branches only."""
    lm = LM(model, tokenizer)
    context, shots = Text("Look:", lm), [Text(f" {n} and {n} make {2 * n}.", lm) for n in range(3)]
    text = context + (shots[0] | shots[1]) + " So 9 and 9"
    evaluate(text)
    swapped = context + (shots[1] | shots[0]) + " So 9 and 9"
    other = context + (shots[0] | shots[2]) + " So 9 and 9"
    assert only([text, swapped], lm) == ["memory", "memory"]
    num_question = len((Text("x", lm) + Text.from_tokens([1], lm) + " So 9 and 9").tokens) - 2
    (pieces,) = lm.look_up([other])
    assert [piece.where for piece in pieces] == ["memory", "absent"]
    held, missing = pieces
    assert missing.stop == len(other.tokens)
    assert missing.stop - missing.start > num_question  # the rest of the other shot, too
    assert held.start == 0


def test_a_branch_that_ends_within_what_is_held_is_another_group(model, tokenizer):
    """Tokens behind (1 2 3 | 4 5 6 7) differ from those behind (1 2 | 4 5 6 7), though at the same position."""
    lm = LM(model, tokenizer)
    whole, part, other = (Text.from_tokens(ids, lm) for ids in [(1, 2, 3), (1, 2), (4, 5, 6, 7)])
    context, question = Text.from_tokens([9], lm), Text.from_tokens([5], lm)
    evaluate(context + (whole | other) + question)
    assert lm.look_up([context + (part | other) + question]) == [[Piece(0, 7, "memory"), Piece(7, 8, "absent")]]


texts_of_segments = st.lists(st.lists(segments, min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=30)
@given(
    drawn=texts_of_segments,
    num_evaluated=st.integers(0, 4),
    budget=st.sampled_from([None, 0, 5_000, 20_000]),
    host=st.sampled_from([0, 10_000]),
    pass_tokens=st.sampled_from([3, 1024]),
)
def test_pieces_cover_every_text_and_nothing_changes(drawn, num_evaluated, budget, host, pass_tokens):
    """Any nested groups, within any budget, with a store."""
    store = MemoryStore()
    lm = LM(
        MODEL,
        TOKENIZER,
        memory_bytes=budget,
        host_memory_bytes=host,
        max_tokens_per_forward=pass_tokens,
        store=store,
    )
    texts = [text for text in (build(lm, one) for one in drawn) if text.tokens]
    evaluate(texts[:num_evaluated])
    before = state_of(lm)
    found = lm.look_up(texts)
    assert state_of(lm) == before
    for text, pieces in zip(texts, found, strict=True):
        edges = [0, *(piece.stop for piece in pieces)]
        assert [piece.start for piece in pieces] == edges[:-1]
        assert edges[-1] == len(text.tokens)
        assert all(one.where != other.where for one, other in itertools.pairwise(pieces))
    if budget is None and texts[:num_evaluated]:
        assert only(texts[:num_evaluated], lm) == ["memory"] * len(texts[:num_evaluated])


@settings(max_examples=30)
@given(drawn=texts_of_segments, num_evaluated=st.integers(0, 4))
def test_what_is_absent_is_what_is_computed(drawn, num_evaluated):
    """The sketch, as a forest of its own, has the passes that evaluating then takes."""
    lm = LM(MODEL, TOKENIZER, max_tokens_per_forward=7)
    texts = [text for text in (build(lm, one) for one in drawn) if text.tokens]
    evaluate(texts[:num_evaluated])
    with lm.session.exclusive():
        passes = lm.session.evaluator.sketch(lm.session.encoder.encode(texts)).passes(7)
    before = lm.stats
    evaluate(texts)
    done = lm.stats - before
    assert sum(len(span.token_ids) for spans in passes for span in spans) == done.tokens_computed
    assert len(passes) == done.forward_passes


MODEL = FAMILIES["gpt2"]()
TOKENIZER = byte_level_bpe()


def test_slots_of_a_sketch_are_marks():
    """A sketch has no rows of its own, so no tensors can be read off it."""
    held = Forest()
    end = held.insert((1, 2, 3))
    end.states = end.keys_values = object()
    sketch = bp.evaluation.lookup.Sketch(held, [(1, 2, 4)])
    marks = [
        span.rows_in(kind, "device") or span.rows_in(kind, "host") for span in sketch.forest.spans() for kind in KINDS
    ]
    assert all(mark is None or not isinstance(mark.block, torch.Tensor) for mark in marks)
    assert [bp.evaluation.lookup.where(span) for span in sketch.forest.spans()] == ["memory", "absent"]
    assert [span.token_ids for span in held.spans()] == [(1, 2, 3)]
