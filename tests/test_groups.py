"""Segments that do not see each other: the plain model's numbers under the declared mask, each distinct token once."""

from functools import partial
from itertools import permutations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import backprompt as bp
from backprompt import LM, GroupError, Text, TextTooLongError, evaluate
from backprompt.store import DiskStore, MemoryStore
from comparing import assert_close
from quick import up_to
from reference import masked_logits, masked_token_logprobs, plain_logits
from tiny_models import FAMILIES

LAW_FAMILIES = ("gpt2", "llama", "gemma", "gpt_neox", "mistral_sliding")  # learned positions, rotary; a window


@pytest.fixture(scope="module")
def models():
    return {family: FAMILIES[family]() for family in {*LAW_FAMILIES, "mistral", "gpt_oss", "qwen2"}}


def parts_of(text):
    """A text as the reference takes it."""
    (token_ids,) = text.lm.session.encoder.encode([text])
    return (token_ids,) if isinstance(token_ids, tuple) else token_ids.parts


def assert_masked(model, text):
    parts = parts_of(text)
    expected = masked_token_logprobs(model, parts)
    assert_close(text.token_logprobs, expected)
    logits = masked_logits(model, parts)
    if isinstance(parts[-1], tuple):
        assert_close(text.logits, logits[-1])
    assert_close(text().all_logits(), logits)


# The law

ids = st.lists(st.integers(1, 4), max_size=4).map(tuple)


def groups_of(inner):
    return st.builds(
        lambda branches, positions: (branches, positions),
        st.lists(st.tuples(st.lists(inner, max_size=3), st.booleans()), max_size=3),
        st.sampled_from(["shared", "shared", "sequential"]),
    )


segments = st.recursive(ids, groups_of, max_leaves=8)
"""Token ids of a small alphabet, so that branches are equal or begin alike; groups of branches, some of them frozen."""


def build(lm, given_segments):
    text = Text("", lm)
    for segment in given_segments:
        if isinstance(segment, tuple) and segment and isinstance(segment[0], list):
            branches, positions = segment
            texts = [build(lm, inner) for inner, _ in branches]
            frozen = [
                text.frozen() if is_frozen else text for text, (_, is_frozen) in zip(texts, branches, strict=True)
            ]
            text += bp.parallel(frozen, positions=positions)
        else:
            text += Text.from_tokens(segment, lm)
    return text


@pytest.mark.parametrize("family", LAW_FAMILIES)
@settings(max_examples=up_to(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_nested_groups_have_the_numbers_of_the_declared_mask(family, data, models, tokenizer, monkeypatch):
    """In any order, packed in any passes, within any budget, and from a store."""
    model, store = models[family], MemoryStore()
    drawn = data.draw(st.lists(st.lists(segments, min_size=1, max_size=4), min_size=1, max_size=4))
    pass_tokens = data.draw(st.sampled_from([3, 16, 1024]))
    memory_bytes = data.draw(st.sampled_from([None, 0, 5_000, 20_000]))
    host_bytes = data.draw(st.sampled_from([0, 10_000]))
    tile_tokens = data.draw(st.sampled_from([1, 4, 128]))
    monkeypatch.setattr("backprompt.evaluation.archive.MIN_TOKENS", data.draw(st.sampled_from([1, 16])))
    for _ in range(2):
        lm = LM(
            model,
            tokenizer,
            max_tokens_per_forward=pass_tokens,
            memory_bytes=memory_bytes,
            host_memory_bytes=host_bytes,
            store=store,
        )
        lm.session.evaluator.computation.tile_tokens = tile_tokens
        texts = [text for text in (build(lm, given_segments) for given_segments in drawn) if text.tokens]
        evaluate(data.draw(st.permutations(texts)))
        for text in texts:
            assert_masked(model, text)
        for text, logprobs in zip(texts, lm.token_logprobs(texts), strict=True):
            expected = masked_token_logprobs(model, parts_of(text))
            assert_close(logprobs, expected)
        if data.draw(st.booleans()):
            for text in texts:
                text.save()


def test_a_bag_is_not_a_set(models, tokenizer):
    """A repeated branch counts twice, and so does the common beginning of two branches."""
    lm = LM(models["gpt2"], tokenizer)
    context, a, b, q = (Text.from_tokens(run, lm) for run in [(1, 2, 3), (4, 5, 6), (4, 5, 7), (8, 9)])
    for group in (a | a, a | b, a | a | b, (a | a) + b | a):
        assert_masked(models["gpt2"], context + group + q)
    once, twice = (context + a + q).logits, (context + (a | a) + q).logits
    assert float((once - twice).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "qwen2"])
def test_sinks_go_together_with_groups(family, models, tokenizer):
    lm = LM(models[family], tokenizer)
    context, a, b, q = (Text.from_tokens(run, lm) for run in [(1, 2), (4, 5, 6), (7,), (8, 9)])
    text = context + (a | b) + q
    assert_close(text.logits, masked_logits(models[family], parts_of(text))[-1])


# Positions


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_positions_of_both_kinds(family, models, tokenizer):
    lm = LM(models[family], tokenizer)
    c, a, b, q = (Text.from_tokens(run, lm) for run in [(1, 2), (3, 4, 5), (6,), (7,)])
    shared, sequential = c + (a | b) + q, c + bp.parallel([a, b], positions="sequential") + q
    assert_masked(models[family], shared)
    assert_masked(models[family], sequential)
    assert shared.tokens == sequential.tokens
    assert float((shared.logits - sequential.logits).abs().max()) > 1e-4


def test_the_models_limit_is_that_of_the_positions_used(models, tokenizer):
    """GPT-2 here has 128 positions: five shots of 40 tokens side by side fit, one after the other they do not."""
    lm = LM(models["gpt2"], tokenizer)
    shots = [Text.from_tokens(range(10 * n, 10 * n + 40), lm) for n in range(5)]
    question = Text.from_tokens([1, 2], lm)
    limit = models["gpt2"].config.n_positions
    assert 40 + 2 <= limit < 5 * 40 + 2
    assert_masked(models["gpt2"], bp.parallel(shots) + question)
    for text in (sum(shots, Text("", lm)) + question, bp.parallel(shots, positions="sequential") + question):
        with pytest.raises(TextTooLongError, match=str(limit)):
            text.logits  # noqa: B018


# Frozen segments


def test_a_frozen_segment_is_computed_once_wherever_it_stands(models, tokenizer):
    lm = LM(models["llama"], tokenizer)
    document = Text.from_tokens(range(1, 31), lm)
    evaluate(document)
    before = lm.stats
    texts = [Text.from_tokens([n, n + 1], lm) + document.frozen() + Text.from_tokens([9, n], lm) for n in range(40, 45)]
    evaluate(texts)
    assert (lm.stats - before).tokens_computed == 5 * (2 + 2)
    for text in texts:
        assert_masked(models["llama"], text)


def test_a_frozen_text_that_continues_what_stands_before_it_by_chance(models, tokenizer):
    """The frozen branch sees nothing of the context, even where it begins with the context's tokens."""
    lm = LM(models["gpt2"], tokenizer)
    context, longer, rest = (Text.from_tokens(run, lm) for run in [(1, 2, 3), (1, 2, 3, 4), (4,)])
    question = Text.from_tokens([8, 9], lm)
    other = Text.from_tokens([7], lm)
    texts = [context + (longer.frozen() | other) + question, context + (rest | other) + question]
    for text in texts:
        assert_masked(models["gpt2"], text)
    assert texts[0]().key != texts[1]().key


def test_a_text_that_begins_frozen_is_a_hard_boundary(models, tokenizer):
    lm = LM(models["gpt2"], tokenizer)
    text = Text("The cat", lm).frozen() + " sat"
    assert_close(text.logits, plain_logits(models["gpt2"], text.tokens)[-1])
    assert text.token_logprobs[1:].isfinite().all()


# Counted


def test_shots_in_any_subset_and_order_are_computed_once(models, tokenizer):
    """k shots, all subsets of size 3 in all orders: context + distinct tokens of the shots + questions."""
    lm = LM(models["gpt2"], tokenizer)
    context = Text.from_tokens(range(50, 60), lm)
    shots = [Text.from_tokens([1, 2, *range(10 * n, 10 * n + 6)], lm) for n in range(2, 7)]
    question = Text.from_tokens([7, 8, 9], lm)
    texts = [context + bp.parallel(chosen) + question for chosen in permutations(shots, 3)]
    evaluate([Text.from_tokens([99], lm)])
    before = lm.stats
    evaluate(texts)
    done = lm.stats - before
    num_subsets = 10  # the order does not matter: the representation is one
    assert done.tokens_computed == 10 + (2 + 5 * 6) + num_subsets * 3
    assert len({text().key for text in texts}) == num_subsets
    for text in texts[::7]:
        assert_masked(models["gpt2"], text)
    assert lm.stats.tokens_computed == before.tokens_computed + done.tokens_computed


@pytest.mark.parametrize("kind", ["shared", "frozen", "at the root"])
def test_many_groups_within_a_small_budget_are_computed_once(kind, models, tokenizer):
    """The text behind a group is computed before other groups' branches: no branch is dropped before its use."""
    lm = LM(models["gpt2"], tokenizer, memory_bytes=200 * 646, max_tokens_per_forward=64)
    evaluate(Text.from_tokens([1], lm))
    context = Text.from_tokens([2, 3, 4], lm)
    texts = []
    for number in range(30):
        a, b, q = (Text.from_tokens((100 + number, 10 * kind_ + 1, *range(10, 24)), lm) for kind_ in range(3))
        if kind == "frozen":
            texts.append(context + a + b.frozen() + q)
        else:
            texts.append((a | b) + q if kind == "at the root" else context + (a | b) + q)
    before = lm.stats
    evaluate(texts)
    assert (lm.stats - before).tokens_recomputed == 0
    assert_masked(models["gpt2"], texts[17])


def test_both_written_orders_share_one_representation(models, tokenizer):
    lm = LM(models["gpt2"], tokenizer)
    c, a, b, q = (Text.from_tokens(run, lm) for run in [(1, 2), (3, 4, 5), (6,), (7,)])
    one, other = c + (a | b) + q, c + (b | a) + q
    assert one.tokens != other.tokens
    assert one().key == other().key
    assert torch.equal(one.logits, other.logits)
    assert one.token_logprobs[2:5].tolist() == other.token_logprobs[3:6].tolist()
    assert one().key != (c + bp.parallel([a, b], positions="sequential") + q)().key


def test_another_process_finds_groups_in_the_store(models, tokenizer):
    store = MemoryStore()
    runs = [range(50, 70), range(10, 30), range(30, 50), range(70, 90)]

    def texts_of(lm):
        c, a, b, q = (Text.from_tokens(run, lm) for run in runs)
        return [c + (a | b) + q, c + bp.parallel([a, b], positions="sequential") + q, c + b + q, c + a.frozen() + q]

    for text in texts_of(LM(models["gpt2"], tokenizer, store=store)):
        evaluate(text)
    lm = LM(models["gpt2"], tokenizer, store=store)
    for text in texts_of(lm):
        assert_masked(models["gpt2"], text)
    assert lm.stats.tokens_computed == 0


def test_short_parts_are_stored_with_what_stands_on_them(models, tokenizer):
    """A short branch is stored alone, because the text behind its group is of no use without it."""
    store = MemoryStore()

    def texts_of(lm):
        c, a, b, q = (
            Text.from_tokens(run, lm) for run in [range(50, 53), range(10, 14), range(30, 60), range(70, 110)]
        )
        return [c + (a | b) + q, c + b.frozen() + q, bp.parallel([c, a], positions="sequential") + q]

    for text in texts_of(LM(models["gpt2"], tokenizer, store=store)):
        evaluate(text)
    for idx in range(3):
        lm = LM(models["gpt2"], tokenizer, store=store)
        assert_masked(models["gpt2"], texts_of(lm)[idx])
        assert lm.stats.tokens_computed == 0


def test_a_budget_on_disk_deletes_what_stands_behind_a_group_first(models, tokenizer, tmp_path):
    runs = [range(50, 70), range(10, 30), range(30, 50), range(70, 90)]
    with DiskStore(tmp_path / "prompts.bp") as store:
        lm = LM(models["gpt2"], tokenizer, store=store)
        c, a, b, q = (Text.from_tokens(run, lm) for run in runs)
        evaluate(c + (a | b) + q)
        (last,) = [header for header in store.list() if header.token_ids == tuple(runs[3])]
        assert set(last.behind) == {header.name for header in store.list()} - {last.name}
        assert store.prune(store.stats().num_bytes - 1) == [last.name]


def test_repeats_are_held_and_counted_once(models, tokenizer):
    lm = LM(models["gpt2"], tokenizer)
    c, a, b, q = (Text.from_tokens(run, lm) for run in [(1, 2), (3, 4, 5), (6,), (7,)])
    text = c + (a | a | a | b) + q
    with text.pin() as pin:
        assert pin.num_bytes == text().num_bytes == 7 * 646 == lm.stats.bytes_held


def test_pins_hold_all_branches(models, tokenizer):
    lm = LM(models["gpt2"], tokenizer, memory_bytes=40 * 646)
    c, a, b, q = (Text.from_tokens(run, lm) for run in [(1, 2), (3, 4, 5), (6, 7), (8,)])
    text = c + (a | b) + q
    with text.pin() as pin:
        assert pin.num_bytes == 8 * 646
        evaluate([Text.from_tokens([n, n + 1, n + 2], lm) for n in range(20, 60)])
        before = lm.stats
        assert_masked(models["gpt2"], text)
        assert (lm.stats - before).tokens_computed == 0


# Questions without an answer


def test_a_text_that_ends_in_a_group_has_no_last_token(models, tokenizer):
    lm = LM(models["gpt2"], tokenizer)
    text = Text.from_tokens([1, 2], lm) + (Text.from_tokens([3], lm) | Text.from_tokens([4], lm))
    evaluate(text)
    with pytest.raises(GroupError, match="ends in a group"):
        text.logits  # noqa: B018
    assert_close(text.token_logprobs, masked_token_logprobs(models["gpt2"], parts_of(text)))
    assert (text + Text.from_tokens([5], lm)).logits.isfinite().all()


def test_a_group_has_no_cache_of_transformers(models, tokenizer):
    lm = LM(models["gpt2"], tokenizer)
    text = Text("See ", lm) + (Text("a") | "b") + "c"
    with pytest.raises(GroupError, match="past_key_values"):
        text().past_key_values()
    assert isinstance(GroupError("x"), ValueError)


# How far from full attention


def test_independence_gap(models, tokenizer):
    lm = LM(models["gpt2"], tokenizer)
    c, a, b, q = (Text.from_tokens(run, lm) for run in [(1, 2), (3, 4, 5), (6, 7), (8,)])
    texts = [c + (a | b) + q, c + a + b + q]
    gap = bp.independence_gap(texts)
    full = plain_logits(models["gpt2"], texts[0].tokens)[-1].double().log_softmax(-1)
    declared = masked_logits(models["gpt2"], parts_of(texts[0]))[-1].double().log_softmax(-1)
    expected = float((full.exp() * (full - declared)).sum())
    assert gap.divergences == pytest.approx((expected, 0.0), abs=1e-6)
    assert expected > 1e-5
    assert gap.argmax_changed == (bool(full.argmax() != declared.argmax()), False)
    assert gap.mean_divergence == pytest.approx(expected / 2, abs=1e-6)
    assert bp.independence_gap(texts[0]).divergences == pytest.approx((expected,), abs=1e-6)
    before = lm.stats
    with pytest.raises(GroupError, match=r"ends in a group"):
        bp.independence_gap([texts[0], c + (a | b)])
    with pytest.raises(TypeError, match=r"texts\[0\] is a str"):
        bp.independence_gap(["abc"])
    with pytest.raises(ValueError, match="at least one"):
        bp.independence_gap([])
    assert (lm.stats - before).tokens_computed == 0


def test_what_a_junction_draws_forward_stays_out_of_other_subtrees(model, tokenizer):
    """(0) (3) (0 2) (2 0)@1: the junction's part of the second branch comes between (0) and the children of (0)."""
    lm = LM(model, tokenizer)
    make = partial(Text.from_tokens, lm=lm)
    plain, frozen = make([0, 3, 2]), make([0, 3, 0, 2]).frozen() + make([0, 2, 0]).frozen()
    evaluate([plain, frozen])
    found = frozen.model_repr.hidden_states
    for ids, start in (([0, 3, 0, 2], 0), ([0, 2, 0], 4)):
        assert_close(found[start : start + len(ids)], make(ids).model_repr.hidden_states)
        expected = plain_logits(model, ids)
        assert_close(make(ids).logits, expected[-1])
