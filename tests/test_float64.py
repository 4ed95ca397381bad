"""A device without float64, as MPS is one: `other_device.py` refuses it there."""

import pytest
import torch

from backprompt import LM, Text, evaluate, generate, independence_gap, verify
from backprompt.classify import predict_proba
from backprompt.cli.generate import result_of
from backprompt.store import MemoryStore
from comparing import assert_equals_plain
from devices import DEVICE, known_to_torch
from other_device import OtherDevice, OtherGenerator
from tiny_models import build

pytestmark = known_to_torch


@pytest.fixture
def device(monkeypatch):
    if DEVICE.type != "cpu":
        pytest.skip("the emulated device stands beside the CPU")
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 4 << 30)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 0)
    monkeypatch.setattr(torch, "Generator", OtherGenerator)
    with OtherDevice(has_float64=False) as made:
        yield made


@pytest.fixture(params=["gpt2", "mistral_sliding", "gpt_oss"])
def models(request, device):
    return build(request.param), device.moved(build(request.param))


@pytest.fixture
def lm(models, tokenizer):
    return LM(models[1], tokenizer, store=MemoryStore(dtype="int8"))


def texts_of(lm):
    base = Text("The cat sat on the mat. ", lm)
    return [base + "It slept", base + "It slept all day.", base + "The dog ran"]


def test_the_device_refuses_float64(device):
    with pytest.raises(TypeError, match="float64"):
        device.moved(torch.nn.Linear(1, 1)).weight.double()


def test_texts_equal_the_plain_call(models, tokenizer):
    texts = texts_of(LM(models[1], tokenizer))
    evaluate(texts)
    assert_equals_plain(models[0], texts)
    assert verify(texts).passed


def test_texts_that_grow(lm):
    found = generate(texts_of(lm), max_new_tokens=4, temperature=1.0, seed=1)
    assert [len(text.completion_tokens) for text in found] == [4, 4, 4]
    assert all(result_of(text, 0, None)["completion"] == text.completion for text in found)


def test_rows_are_stored_in_fewer_bits(lm):
    for text in texts_of(lm):
        text.save()
    assert len(list(lm.session.store.list(""))) > 0


def test_gaps_and_probabilities(lm):
    texts = texts_of(lm)
    assert independence_gap(texts).divergences == pytest.approx([0.0] * 3, abs=1e-6)
    assert predict_proba(texts, [" yes", " no"]).shape == (3, 2)
    assert len(lm.token_logprobs(texts)) == 3
