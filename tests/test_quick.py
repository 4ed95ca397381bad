"""The quick ways through processors of transformers give the scores of transformers, to the bit."""

import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as kinds

from backprompt.generation.choosing import is_quick_the_same
from backprompt.generation.quick import few, in_rising_order, quickly_processed
from backprompt.logprobs import first_of_largest

VOCAB = 3000
IDS = torch.zeros((1, 7), dtype=torch.long)
PROCESSORS = [
    *(kinds.TopKLogitsWarper(top_k=num) for num in (1, 5, 50, VOCAB - 1, VOCAB, VOCAB + 5)),
    kinds.TopKLogitsWarper(top_k=2, min_tokens_to_keep=9),
    *(kinds.TopPLogitsWarper(top_p=share) for share in (0.0, 0.05, 0.5, 0.9, 0.999, 1.0)),
    kinds.TopPLogitsWarper(top_p=0.2, min_tokens_to_keep=40),
    kinds.TopPLogitsWarper(top_p=0.2, min_tokens_to_keep=VOCAB + 1),
    kinds.TopKLogitsWarper(top_k=5, filter_value=-7.0),
    *(kinds.TopPLogitsWarper(0.5, filter_value=-7.0, min_tokens_to_keep=num) for num in (1, VOCAB)),
    *(kinds.MinLengthLogitsProcessor(num, [1, 2999, 5000]) for num in (7, 8)),
    *(kinds.MinNewTokensLengthLogitsProcessor(3, num, [1, 2999, 5000]) for num in (4, 5)),
]


def scores_of(kind, dtype):
    """Rows of scores: of any number, with equal ones, with few that are possible, with numbers that are none."""
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    scores = 3 * torch.randn(24, VOCAB, generator=generator, dtype=dtype)
    if kind == "ties":
        scores[1:] = scores[1:].round()
    if kind == "few":
        scores[torch.rand(scores.shape, generator=generator) < 0.99] = -math.inf
        scores[3], scores[3, 7] = -math.inf, 1
    if kind == "zeros":
        scores[:] = torch.where(scores > 0, 0.0, -0.0)
    if kind == "one token":
        scores[:, 11] = 200
    if kind == "not finite":
        scores[2, 17], scores[5, 3], scores[7], scores[9] = math.nan, math.inf, -math.inf, math.nan
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["any", "ties", "few", "zeros", "one token", "not finite"])
def test_scores_are_those_of_transformers(kind, dtype):
    scores = scores_of(kind, dtype)
    for processor in PROCESSORS:
        expected = processor(IDS, scores.clone())
        found = quickly_processed(processor, IDS, scores.clone())
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), (type(processor), vars(processor))
    assert torch.equal(first_of_largest(scores), scores.argmax(dim=-1))


@pytest.mark.parametrize("num_possible", [0, 1, 3, VOCAB // 8, VOCAB])
def test_possible_scores_alone_are_sorted(num_possible):
    scores = scores_of("any", torch.float32)
    scores[::2, num_possible:] = scores[1::2, num_possible // 2 :] = -math.inf
    if num_possible:
        scores[0, 0], scores[2, 0] = math.nan, math.inf
    numbers = scores.numpy()
    found = in_rising_order(numbers, few(numbers != -np.inf))
    np.testing.assert_array_equal(found, np.sort(numbers, axis=-1))


def test_one_processor_after_the_other():
    quick = plain = scores_of("any", torch.float32)
    for processor in (kinds.TopKLogitsWarper(50), kinds.TopPLogitsWarper(0.9), kinds.TopKLogitsWarper(3)):
        quick, plain = quickly_processed(processor, IDS, quick), processor(IDS, plain)
        assert torch.equal(quick, plain)


@pytest.mark.parametrize("processor", [kinds.TopKLogitsWarper(50), kinds.TopPLogitsWarper(0.9)])
def test_transformers_is_not_asked_where_no_scores_are_equal(processor, monkeypatch):
    calls = []
    plain = type(processor).__call__
    monkeypatch.setattr(type(processor), "__call__", lambda *given: calls.append(len(given[2])) or plain(*given))
    for kind in ("any", "few"):
        quickly_processed(processor, IDS, scores_of(kind, torch.float32))
        assert calls == []
    scores = scores_of("any", torch.float32)
    scores[4] = 0
    quickly_processed(processor, IDS, scores)
    assert calls == ([1] if isinstance(processor, kinds.TopPLogitsWarper) else [])  # only for the one row


def test_the_quick_division_is_taken():
    assert is_quick_the_same()  # where it is not, choosing takes the plain way: right, and slower
