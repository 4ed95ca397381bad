"""Adapters by segment: the plain model's numbers with the adapter on for some tokens, each distinct token once."""

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import backprompt as bp
from adapted_models import NAMES, UNMARKED, activate, content_of, under, with_adapters
from backprompt import LM, AdapterError, Text, evaluate
from backprompt.store import DiskStore, MemoryStore
from comparing import assert_close, num_distinct_ids
from quick import up_to
from reference import masked_logits, masked_token_logprobs, plain_logits, token_logprobs_of

LAW_FAMILIES = ("gpt2", "llama", "gpt_neox", "mistral_sliding")
KINDS = ("peft", "mixin")


@pytest.fixture(scope="module")
def models():
    return {(family, kind): with_adapters(family, kind) for family in LAW_FAMILIES for kind in KINDS}


@pytest.fixture
def model(models):
    model = models["llama", "peft"]
    activate(model, ())
    return model


@pytest.fixture
def lm(model, tokenizer):
    return LM(model, tokenizer)


# The law

ids = st.lists(st.integers(1, 3), max_size=4).map(tuple)
marks = st.sampled_from([UNMARKED, UNMARKED, None, *NAMES])
runs = st.tuples(ids, marks)


def groups_of(inner):
    return st.tuples(
        st.lists(st.tuples(st.lists(inner, max_size=3), st.booleans()), max_size=3),
        st.sampled_from(["shared", "sequential"]),
        st.sampled_from([UNMARKED, UNMARKED, UNMARKED, "a"]),
    )


segments = st.recursive(runs, groups_of, max_leaves=6)
"""Token ids of a small alphabet, each run under an adapter or none; groups of such, some of them under one adapter."""


def build(lm, given_segments, *, are_marked=True):
    """The text of these segments; not `are_marked`: without any adapter."""
    text = Text("", lm)
    for segment in given_segments:
        if len(segment) == 3:
            branches, positions, mark = segment
            texts = [build(lm, inner, are_marked=are_marked) for inner, _ in branches]
            frozen = [of.frozen() if is_frozen else of for of, (_, is_frozen) in zip(texts, branches, strict=True)]
            part = bp.parallel(frozen, positions=positions)
        else:
            run, mark = segment
            part = Text.from_tokens(run, lm)
        text += part.with_adapter(mark) if are_marked and mark != UNMARKED else part
    return text


def written(given_segments, outer=UNMARKED):
    """The tokens of these segments in written order, each with its mark."""
    for segment in given_segments:
        if len(segment) == 3:
            for inner, _ in segment[0]:
                yield from written(inner, segment[2] if outer == UNMARKED else outer)
        else:
            yield from ((token_id, segment[1] if outer == UNMARKED else outer) for token_id in segment[0])


def assert_as_reference(model, text, plain_text, tokens):
    """A text is as the plain model under the declared mask, with each token's adapter on for the token alone."""
    assert text.tokens == plain_text.tokens == tuple(token_id for token_id, _ in tokens)
    (encoded,) = text.lm.session.encoder.encode([plain_text])
    parts = (encoded,) if isinstance(encoded, tuple) else encoded.parts
    with under(model, [mark for _, mark in tokens]) as plain:
        logprobs, logits = masked_token_logprobs(plain, parts), masked_logits(plain, parts)
    assert_close(text.token_logprobs, logprobs)
    assert_close(text().all_logits(), logits)
    if isinstance(parts[-1], tuple):
        assert_close(text.logits, logits[-1])
    return logprobs


@pytest.mark.parametrize("family", LAW_FAMILIES)
@settings(max_examples=up_to(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_segments_under_any_adapters_have_the_numbers_of_the_plain_model(
    family, data, models, tokenizer, monkeypatch
):
    """In any order, packed in any passes, within any budget, and from a store."""
    model, store = models[family, data.draw(st.sampled_from(KINDS))], MemoryStore()
    activate(model, data.draw(st.sampled_from([(), ("a",), ("b", "a")])))
    drawn = data.draw(st.lists(st.lists(segments, min_size=1, max_size=4), min_size=1, max_size=4))
    pass_tokens = data.draw(st.sampled_from([3, 16, 1024]))
    memory_bytes = data.draw(st.sampled_from([None, 0, 5_000, 20_000]))
    host_bytes = data.draw(st.sampled_from([0, 10_000]))
    tile_tokens = data.draw(st.sampled_from([1, 128]))
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
        tokens = [list(written(given_segments)) for given_segments in drawn]
        texts = [build(lm, given_segments) for given_segments in drawn]
        plain = [build(lm, given_segments, are_marked=False) for given_segments in drawn]
        whole = [triple for triple in zip(texts, plain, tokens, strict=True) if triple[2]]
        evaluate(data.draw(st.permutations([text for text, _, _ in whole])))
        expected = [assert_as_reference(model, *triple) for triple in whole]
        for scored, logprobs in zip(lm.token_logprobs([text for text, _, _ in whole]), expected, strict=True):
            assert_close(scored, logprobs)
        if data.draw(st.booleans()):
            for text, _, _ in whole:
                text.save()


@settings(max_examples=up_to(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(st.lists(runs, min_size=1, max_size=4), min_size=1, max_size=5),
    active=st.sampled_from([(), ("a",), ("twin",), ("b", "a")]),
    pass_tokens=st.sampled_from([3, 1024]),
)
def test_each_distinct_token_adapter_and_beginning_is_forwarded_once(drawn, active, pass_tokens, models, tokenizer):
    """Equal contents are one adapter, and an adapter that is active is that of tokens without one of their own."""
    model = models["llama", "peft"]
    activate(model, active)
    lm = LM(model, tokenizer, max_tokens_per_forward=pass_tokens)
    texts = [text for text in (build(lm, given_segments) for given_segments in drawn) if text.tokens]
    evaluate(texts)
    rows = [[(token_id, content_of(mark, active)) for token_id, mark in written(given)] for given in drawn]
    assert lm.stats.tokens_computed == num_distinct_ids(rows)
    passes = lm.stats.forward_passes
    evaluate(texts)
    assert lm.stats.forward_passes == passes
