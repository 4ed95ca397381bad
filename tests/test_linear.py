"""Linear layers through oneDNN: the same numbers, packed or not, on private copies only, never where it is wrong."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from backprompt import LM, Text, UnsupportedModelError, generate
from backprompt.model import linear
from backprompt.model.linear import (
    Linears,
    OneDnnLinear,
    TrainedLinear,
    speed_up,
    speed_up_trained,
    training_failure,
)
from comparing import assert_close
from reference import plain_greedy, plain_logits
from tiny_models import FAMILIES


def conv1d(num_out, num_in):
    layer = Conv1D(num_out, num_in)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": lambda: nn.Linear(48, 33),
    "linear without bias": lambda: nn.Linear(48, 33, bias=False),
    "conv1d": lambda: conv1d(33, 48),
}


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("shape", [(1, 7), (5,), (2, 3), (1, 0), (1, 300), (1, 1)], ids=str)
@torch.no_grad()
def test_a_layer_gives_the_same_numbers(make, dtype, is_packed, shape):
    layer = make().to(dtype)
    rows = torch.randn((*shape, 48), dtype=dtype)
    found = OneDnnLinear(layer, is_packed=is_packed)(rows)
    assert found.dtype == dtype
    torch.testing.assert_close(found, layer(rows), rtol=4 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_rows_may_lie_anyhow():
    layer = nn.Linear(48, 33)
    for rows in (torch.randn(5, 96)[:, ::2], torch.randn(48, 5).t(), torch.randn(3, 5, 48).transpose(0, 1)):
        torch.testing.assert_close(OneDnnLinear(layer, is_packed=True)(rows), layer(rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["packed", "as they lie"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_give_the_numbers_of_the_plain_call(family, way, tokenizer, monkeypatch):
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    model = FAMILIES[family]()
    lm = LM(model, tokenizer, pack_weights=way == "packed")
    assert lm.stats.linears == ("onednn, packed" if way == "packed" else "onednn")
    texts = [Text(string, lm) for string in ("The cat sat on the", "The cat")]
    for text in texts:
        assert_close(text.logits, plain_logits(model, text.tokens)[-1])
    for text, found in zip(texts, generate(texts, max_new_tokens=4), strict=True):
        assert found.completion_tokens == plain_greedy(model, text.tokens, 4)


def test_packed_copies_are_counted_and_the_model_is_left_as_it_was(tokenizer):
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer, pack_weights=True)
    layers = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    assert len(layers) == 4 * 2 + 1
    assert lm.stats.packed_weight_bytes == sum(layer.weight.nbytes for layer in layers)
    assert LM(model, tokenizer).stats.packed_weight_bytes == 0


def test_a_change_of_weights_is_packed_again(tokenizer):
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer, pack_weights=True)
    text = Text("The cat sat on the", lm)
    before = text.logits
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
        model.lm_head.weight.mul_(0.5)
    assert not torch.allclose(text.logits, before)
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])


def test_what_was_read_before_a_change_keeps_no_packed_copy_alive(tokenizer):
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer, pack_weights=True)
    text = Text("The cat", lm)
    kept = []
    for _ in range(3):
        kept.append(text.model_repr)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
    kept.append(text.model_repr)
    gc.collect()
    linears = [module for module in gc.get_objects() if issubclass(type(module), OneDnnLinear)]
    own = [module for module in linears if len(module.weight) == 320]
    ours = [module for module in own if module.weight is model.lm_head.weight]
    assert len(ours) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_callers_default_dtype_does_not_matter(dtype, tokenizer):
    linear.failure_of.cache_clear()
    linear.is_faster.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        model = FAMILIES["gpt2"]().float()
        text = Text("The cat sat on the", LM(model, tokenizer))
        assert text.logits.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert Text("The cat", LM(model, tokenizer, pack_weights=True)).lm.stats.linears == "onednn, packed"


def test_what_surrounds_the_first_model_does_not_matter(tokenizer):
    linear.failure_of.cache_clear()
    linear.is_faster.cache_clear()
    model = FAMILIES["gpt2"]()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
        lm = LM(model, tokenizer, pack_weights=True)
    assert torch.equal(torch.rand(3), expected)
    text = Text("The cat sat on the", lm)
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])
    assert linear.failure_of(torch.float32) is None


class Quantized(torch.Tensor):
    """A tensor with a mind of its own."""


def test_weights_with_a_mind_of_their_own_are_left_alone(monkeypatch):
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    holder = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    holder[0].weight = nn.Parameter(torch.randn(3, 3).as_subclass(Quantized), requires_grad=False)
    speed_up([holder], pack=False)
    assert [type(layer) for layer in holder] == [nn.Linear, OneDnnLinear]


def test_a_layer_in_several_places_is_packed_once():
    layer = nn.Linear(3, 3)
    holders = [nn.Sequential(layer), nn.Sequential(layer, nn.ReLU())]
    assert speed_up(holders, pack=True).packed_bytes == layer.weight.nbytes
    assert holders[0][0] is holders[1][0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_what_cannot_be_packed_is_refused(dtype, tokenizer):
    with pytest.raises(UnsupportedModelError, match=rf"{dtype} cannot be packed.*Leave pack_weights out"):
        LM(FAMILIES["gpt2"]().to(dtype), tokenizer, pack_weights=True)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="this model has none"):
        speed_up([nn.LayerNorm(3)], pack=True)


def missing(*args):
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


def wrong(rows, weight, bias, *rest):
    return nn.functional.linear(rows, weight, bias) * 1.001


@pytest.mark.parametrize("product", [missing, wrong])
def test_an_operation_that_is_missing_or_wrong_is_not_used(product, monkeypatch):
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, num_rows: weight)
    linear.failure_of.cache_clear()
    try:
        holder = nn.Sequential(nn.Linear(3, 3))
        assert speed_up([holder], pack=False) == Linears("torch")
        assert type(holder[0]) is nn.Linear
        with pytest.raises(UnsupportedModelError, match=r"no attribute|off by"):
            speed_up([holder], pack=True)
    finally:
        linear.failure_of.cache_clear()


def test_slower_products_are_not_used_unpacked(monkeypatch):
    holder = nn.Sequential(nn.Linear(3, 3))
    monkeypatch.setattr(linear, "is_faster", lambda: False)
    assert speed_up([holder], pack=False) == Linears("torch")
    assert speed_up([copy.deepcopy(holder)], pack=True).name == "onednn, packed"


def test_layers_with_a_mind_of_their_own_are_left_alone(monkeypatch):
    class Doubled(nn.Linear):
        def forward(self, rows):
            return 2 * super().forward(rows)

    monkeypatch.setattr(linear, "is_faster", lambda: True)
    holder = nn.Sequential(Doubled(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    holder[1].forward = lambda rows: rows
    assert speed_up([holder], pack=False) == Linears("onednn")
    assert [type(layer) for layer in holder] == [Doubled, nn.Linear, OneDnnLinear]


@pytest.mark.parametrize(("seconds", "expected"), [([1.0, 0.5], True), ([1.0, 0.9], False)])
def test_the_faster_one_serves(seconds, expected, monkeypatch):
    """In turns: torch's product, then oneDNN's. The clock is read before and after each."""
    times = iter([0.0, seconds[0], 0.0, seconds[1]] * 1000)
    clock = SimpleNamespace(thread_time=lambda: next(times), perf_counter=lambda: next(times))
    monkeypatch.setattr("backprompt.model.linear.time", clock)
    num_threads = torch.get_num_threads()
    assert linear.is_faster.__wrapped__() is expected
    assert torch.get_num_threads() == num_threads


def test_the_comparison_is_of_one_thread(monkeypatch):
    """Two threads on a busy machine wait for each other, and the time of that says nothing."""
    used = []
    own = linear.nn.functional.linear
    monkeypatch.setattr(
        linear.nn.functional, "linear", lambda *given: (used.append(torch.get_num_threads()), own(*given))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        linear.is_faster.__wrapped__()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(used) == {1}


# Layers that are trained


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("frozen", ["none", "rows", "weight"])
@pytest.mark.parametrize("shape", [(1, 7), (5,), (2, 3), (1, 0), (1, 300)], ids=str)
def test_a_trained_layer_has_the_same_gradients(make, frozen, shape):
    layer = make()
    layer.weight.requires_grad_(frozen != "weight")
    rows = torch.randn((*shape, 48), requires_grad=frozen != "rows")
    leaves = [leaf for leaf in (rows, *layer.parameters()) if leaf.requires_grad]
    upstream = torch.randn((*shape, 33))
    expected, found = layer(rows), TrainedLinear(layer)(rows)
    before_view = found.grad_fn.next_functions[0][0]
    assert ("_TrainedProduct" in type(before_view).__name__) == (rows.numel() > 0)
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found, leaves, upstream)),
        (expected, *torch.autograd.grad(expected, leaves, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-5)


def test_a_trained_layer_heeds_autocast():
    layer, rows = nn.Linear(48, 33), torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert TrainedLinear(layer)(rows).dtype == torch.bfloat16
    assert TrainedLinear(layer.double())(rows.double()).dtype == torch.float64


def test_results_of_trained_layers_may_be_written_into():
    """As some adapters do, AdaLoRA for one."""
    torch.manual_seed(0)
    layer, rows = nn.Linear(48, 33), torch.randn(2, 5, 48, requires_grad=True)
    gradients = []
    for made in (layer, TrainedLinear(layer)):
        product = made(rows)
        product += 1
        product[:, 1:].mul_(2)
        (product**2).sum().backward()
        gradients.append((rows.grad.clone(), layer.weight.grad.clone()))
        rows.grad = layer.weight.grad = None
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "surroundings", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_settings_do_not_decide(surroundings, monkeypatch):
    training_failure.cache_clear()
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    model = nn.Sequential(nn.Linear(4, 4))
    with surroundings():
        speed_up_trained(model)
    assert isinstance(model[0], TrainedLinear)


@pytest.mark.parametrize("why_not", [None, "slower", "wrong"])
def test_trained_layers_are_replaced_where_that_is_right_and_faster(why_not, monkeypatch):
    training_failure.cache_clear()
    monkeypatch.setattr(linear, "is_faster", lambda: why_not != "slower")
    if why_not == "wrong":
        monkeypatch.setattr(linear, "training_failure", lambda: "it was off by 1")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    speed_up_trained(model)
    assert [type(layer) for layer in model] == [TrainedLinear if why_not is None else nn.Linear] * 2
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    speed_up_trained(mixed)
    assert not any(isinstance(layer, TrainedLinear) for layer in mixed)


def test_wrong_gradients_are_found(monkeypatch):
    assert training_failure() is None
    training_failure.cache_clear()
    product = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda rows, *args: product(rows.contiguous() * 1.001, *args)
    )
    assert "was off by" in training_failure()
    monkeypatch.undo()
    training_failure.cache_clear()
