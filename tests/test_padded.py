"""The head with a padded copy of its weight: the same numbers, made anew with the weights, and counted."""

from functools import partial

import pytest
import torch
from torch import nn

from backprompt import LM, Text, evaluate, generate
from backprompt.model import executor
from backprompt.model.linear import Linears
from backprompt.model.padded import PADDED, PaddedLinear, pad_head
from comparing import assert_close, assert_equals_plain
from devices import DEVICE
from reference import plain_greedy, plain_logits
from tiny_models import build

ODD = 323


@pytest.fixture
def padded(monkeypatch):
    """Heads are padded on the device of the tests, whatever their share of a tiny model is."""
    monkeypatch.setattr(executor, "pad_head", partial(pad_head, device_types={DEVICE.type}))
    monkeypatch.setattr("backprompt.model.padded.LARGEST_SHARE", 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (5,), (2, 3), (1, 0)], ids=str)
@torch.no_grad()
def test_a_layer_gives_the_same_numbers(shape, bias, dtype):
    layer = nn.Linear(48, 33, bias=bias).to(DEVICE, dtype)
    rows = torch.randn((*shape, 48)).to(DEVICE, dtype)
    ours = PaddedLinear(layer)
    assert ours.num_bytes == 64 * (48 + bias) * 2
    found, expected = ours(rows), layer(rows)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi", "cohere", "gemma2"])
def test_models_give_the_numbers_of_the_plain_call(family, padded, tokenizer):
    """Tied weights and others, biases, scaled and capped logits."""
    model = build(family, ODD).to(torch.bfloat16)
    classes = [type(module) for module in model.modules()]
    lm = LM(model, tokenizer)
    texts = [Text(string, lm) for string in ("The cat sat on the", "The cat")]
    assert_equals_plain(model, texts)
    assert lm.stats.linears.endswith(", padded head")
    assert [type(module) for module in model.modules()] == classes
    assert texts[0].logits.shape == (ODD,)


def test_tokens_of_a_generation(padded, tokenizer):
    model = build("gpt2", ODD).to(torch.bfloat16)
    texts = [Text(string, LM(model, tokenizer)) for string in ("The cat sat on the",)]
    for text, found in zip(texts, generate(texts, max_new_tokens=4), strict=True):
        assert found.completion_tokens == plain_greedy(model, text.tokens, 4)


def test_a_change_of_weights_is_copied_again(padded, tokenizer):
    model = build("gpt2", ODD).to(torch.bfloat16)
    assert model.lm_head.weight is model.transformer.wte.weight
    lm = LM(model, tokenizer)
    text = Text("The cat sat on the", lm)
    before = text.logits.clone()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert not torch.allclose(text.logits, before)
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])


def test_the_copy_is_counted(padded, tokenizer):
    model = build("gpt2", ODD).to(torch.bfloat16)
    lm = LM(model, tokenizer)
    evaluate([Text("The cat", lm)])
    num_rows = -(-ODD // PADDED) * PADDED
    assert lm.stats.packed_weight_bytes == num_rows * model.lm_head.weight.shape[1] * 2


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "num_layers", "is_padded"),
    [
        (torch.float16, 323, 3, True),
        (torch.bfloat16, 323, 3, True),
        (torch.bfloat16, 320, 3, False),
        (torch.bfloat16, 328, 3, False),
        (torch.float32, 323, 3, False),
        (torch.bfloat16, 323, 2, False),  # the head is half of the weights
    ],
)
def test_only_odd_heads_in_half_precision_that_are_small(dtype, num_tokens, num_layers, is_padded):
    head = nn.Sequential(nn.Linear(16, num_tokens, bias=False)).to(DEVICE, dtype)
    model = nn.Sequential(head, *[nn.Linear(16, 323, bias=False) for _ in range(num_layers - 1)]).to(DEVICE, dtype)
    model.get_output_embeddings = lambda: head[0]
    assert pad_head(head, model, Linears("torch", 5), {"nowhere"}) == Linears("torch", 5)
    linears = pad_head(head, model, Linears("torch", 5), {DEVICE.type})
    assert isinstance(head[0], PaddedLinear) is is_padded
    assert linears == (Linears("torch, padded head", 5 + 384 * 16 * 2) if is_padded else Linears("torch", 5))
