"""Entropies and most probable tokens of texts: the plain call's, of groups, too; flat, with offsets."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backprompt import LM, Text, parallel
from backprompt.store import MemoryStore
from comparing import assert_close
from quick import up_to
from reference import masked_logits, written
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

ids = st.lists(st.integers(1, 4), max_size=4).map(tuple)
segments = st.lists(ids | st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=4)
"""Token ids of a small alphabet, and groups of branches."""


@cache
def model_of(name: str, dtype=torch.float32):
    return build(name).to(dtype)


def composed(lm, given_segments) -> Text:
    text = Text("", lm)
    for segment in given_segments:
        if isinstance(segment, list):
            text += parallel([Text.from_tokens(branch, lm) for branch in segment])
        else:
            text += Text.from_tokens(segment, lm)
    return text


def parts_of(text):
    (token_ids,) = text.lm.session.encoder.encode([text])
    return (token_ids,) if isinstance(token_ids, tuple) else token_ids.parts


def expected_of(model, text, temperature: float) -> torch.Tensor:
    """The log-probabilities of the vocabulary in the place of each token, (tokens, vocab); nan without a prediction."""
    parts = parts_of(text)
    logits = masked_logits(model, parts)
    logprobs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(dim=-1)
    rows = [
        torch.full_like(logprobs[0], torch.nan) if row is None else logprobs[row] for row in written(parts).predictors
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral_sliding"])
@given(data=st.data(), temperature=st.sampled_from([1.0, 0.5]), k=st.integers(1, 4), max_tokens=st.integers(1, 12))
@settings(max_examples=up_to(20))
def test_distributions_of_texts_are_those_of_the_declared_mask(name, data, temperature, k, max_tokens):
    """From any start on, in any passes, within any budget, computed before or not, and from a store."""
    model, store = model_of(name), MemoryStore()
    memory_bytes = data.draw(st.sampled_from([2_000, 20_000, 10**9]))
    for options in ({"memory_bytes": memory_bytes, "host_memory_bytes": 0}, {"store": store}, {"store": store}):
        lm = LM(model, byte_level_bpe(), max_tokens_per_forward=max_tokens, **options)
        texts = [
            text for own in data.draw(st.lists(segments, min_size=1, max_size=4)) if (text := composed(lm, own)).tokens
        ]
        starts = [data.draw(st.integers(0, len(text.tokens))) for text in texts]
        if data.draw(st.booleans()):
            lm.evaluate(texts[:1])
        expected = [expected_of(model, text, temperature)[start:] for text, start in zip(texts, starts, strict=True)]
        entropies = lm.entropies(texts, starts, temperature=temperature)
        top = lm.top_logprobs(texts, k, starts, temperature=temperature)
        lengths = [len(text.tokens) - start for text, start in zip(texts, starts, strict=True)]
        assert (
            entropies.offsets.tolist() == top.offsets.tolist() == [sum(lengths[:idx]) for idx in range(len(texts) + 1)]
        )
        for found, (logprobs, token_ids), rows in zip(entropies.split(), top.split(), expected, strict=True):
            entropy = torch.special.entr(rows.exp()).sum(dim=-1)
            assert_close(found, entropy)
            largest = rows.topk(k).values
            largest[rows.isnan().any(dim=-1)] = torch.nan
            assert_close(logprobs, largest)
            assert_close(rows.gather(1, token_ids.cpu().clamp(min=0)), largest)
            assert ((token_ids.cpu() == -1).any(dim=-1) == largest.isnan().any(dim=-1)).all()


def test_each_row_goes_through_the_head_once(tokenizer):
    lm = LM(model_of("llama"), tokenizer)
    prompt = Text.from_tokens(range(1, 21), lm)
    texts = [prompt + Text.from_tokens((idx, 7, 8), lm) for idx in range(30, 34)] * 2
    found = lm.entropies(texts, [prompt] * len(texts))
    assert lm.stats.logit_rows == 1 + 4 * 2
    assert lm.stats.tokens_computed == 20 + 4 * 2
    assert found.entropies.shape == (8 * 3,)
    assert len({tensor.untyped_storage().data_ptr() for tensor in (found.entropies, *found.split())}) == 1


def test_no_texts_and_nothing_to_score(tokenizer):
    lm = LM(model_of("llama"), tokenizer)
    assert lm.entropies([]).split() == lm.top_logprobs([], 3).split() == []
    text = Text("The cat", lm)
    assert [part.shape for part in lm.entropies([text], [text]).split()] == [(0,)]
    assert [part.shape for pair in lm.top_logprobs([text], 3, [text]).split() for part in pair] == [(0, 3)] * 2


def test_a_text_asks_for_itself(tokenizer):
    lm = LM(model_of("llama"), tokenizer)
    text = Text("The cat sat", lm)
    of_many = lm.entropies([text, text + " on"], temperature=2.0).split()[0]
    alone = text.entropies(temperature=2.0)
    torch.testing.assert_close(alone, of_many, rtol=1e-6, atol=0, equal_nan=True)  # the head rounds by its rows
    top = lm.top_logprobs([text], 3)
    logprobs, token_ids = text.top_logprobs(3)
    assert torch.equal(logprobs[1:], top.logprobs[1:])
    assert torch.equal(token_ids, top.token_ids)


def test_distributions_are_as_precise_as_the_model(tokenizer):
    lm = LM(model_of("opt", torch.float64), tokenizer)
    text = Text("The cat sat", lm)
    expected = expected_of(lm.model, text, 2.0)
    found = lm.entropies([text], temperature=2.0).entropies[1:]
    assert found.dtype == torch.float64
    assert_close(found, torch.special.entr(expected.exp()).sum(dim=-1)[1:], atol=1e-12)
    assert_close(lm.top_logprobs([text], 2, temperature=2.0).logprobs[1:], expected.topk(2).values[1:], atol=1e-12)


def test_options_are_checked(tokenizer):
    lm = LM(model_of("llama"), tokenizer)
    text = Text("The cat", lm)
    for given_k in (0, 1.5, True, 321):
        with pytest.raises(ValueError, match="k "):
            lm.top_logprobs([text], given_k)
    for temperature in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="temperature must be"):
            lm.entropies([text], temperature=temperature)
    with pytest.raises(ValueError, match="starts has 2 elements for 1 texts"):
        lm.entropies([text], [0, 0])
    assert lm.stats.tokens_computed == 0
