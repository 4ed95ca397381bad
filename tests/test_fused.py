"""Norms, gated layers and rotations in one launch each, against transformers' own; Triton's interpreter runs them."""

import copy
import gc
import weakref
from functools import partial
from types import MethodType

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="there is no wheel of triton for this platform")

from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from backprompt import LM, Text, evaluate
from backprompt.attention.launches import Launcher
from backprompt.model import executor
from backprompt.model.fused import fuse, rotated, silu_product
from comparing import assert_equals_plain
from tiny_models import FAMILIES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":
    DTYPES.append(torch.bfloat16)  # Triton's interpreter cuts numbers off instead of rounding them
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(found, expected, dtype):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def fused_copy(module):
    holder = nn.Sequential(copy.deepcopy(module))
    with torch.no_grad():
        return holder[0], fuse(holder, {DEVICE.type})


# The kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, GptOssRMSNorm])
@pytest.mark.parametrize("shape", [(1, 7, 32), (1, 3, 5, 12), (130, 20), (1, 1), (0, 24), (2, 1030)], ids=str)
@torch.no_grad()
def test_norms(kind, shape, dtype):
    norm = kind(shape[-1], eps=1e-3).to(DEVICE, dtype)
    norm.weight.copy_(draw(shape[-1], dtype=dtype, seed=1))
    ours, num_fused = fused_copy(norm)
    assert num_fused == 1
    check(ours(draw(*shape, dtype=dtype)), norm(draw(*shape, dtype=dtype)), dtype)
    small = draw(*shape, dtype=dtype) * 0.01
    check(ours(small), norm(small), dtype)


@torch.no_grad()
def test_rows_may_lie_anyhow():
    norm = LlamaRMSNorm(6).to(DEVICE)
    ours, _ = fused_copy(norm)
    for rows in (draw(5, 12)[:, ::2], draw(6, 5).t(), draw(3, 5, 6).transpose(0, 1)):
        check(ours(rows), norm(rows), torch.float32)
    gates, numbers = draw(5, 12)[:, ::2], draw(6, 5, seed=1).t()
    check(silu_product(gates, numbers), nn.functional.silu(gates) * numbers, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7, 33), (3, 5000), (0, 4), (1, 1)], ids=str)
def test_gates(shape, dtype):
    gates, numbers = draw(*shape, dtype=dtype) * 4, draw(*shape, dtype=dtype, seed=1)
    check(silu_product(gates, numbers), nn.functional.silu(gates) * numbers, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 2, 7, 16), (5, 1, 40, 6), (3, 3, 0, 8), (1, 1, 1, 80)], ids=str)
def test_rotations(shape, dtype):
    """Queries and keys as models make them: views of `(tokens, heads, size)`, in part of a larger tensor."""
    heads, kv_heads, tokens, size = shape
    query, key = (
        draw(1, tokens, num, size + 4, dtype=dtype, seed=num).transpose(1, 2)[..., :size] for num in (heads, kv_heads)
    )
    cos, sin = draw(1, tokens, size, dtype=dtype, seed=7), draw(1, tokens, size, dtype=dtype, seed=8)
    expected = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
    for found, one in zip(rotated(query, key, cos, sin), expected, strict=True):
        check(found, one, dtype)


# Which modules


def llama_mlp():
    return LlamaMLP(FAMILIES["llama"]().config).to(DEVICE)


@torch.no_grad()
def test_a_module_that_computes_something_else_is_left_alone():
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, rows):
            return super().forward(rows) * 1.001

    class OtherMLP(LlamaMLP):
        def forward(self, rows):
            return super().forward(rows) + 0.001

    for other in (OtherRMSNorm(8).to(DEVICE), OtherMLP(FAMILIES["llama"]().config).to(DEVICE)):
        ours, num_fused = fused_copy(other)
        assert num_fused == 0
        assert type(ours) is type(other)


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_a_module_that_somebody_changed_is_left_alone(change):
    mlp = llama_mlp()
    if change == "hook":
        mlp.register_forward_hook(lambda *_: None)
    else:
        mlp.forward = MethodType(lambda self, rows: rows, mlp)
    assert fused_copy(mlp)[1] == 0
    assert fused_copy(llama_mlp())[1] == 1


@torch.no_grad()
def test_a_forward_that_the_class_gets_later_is_noticed(monkeypatch):
    mlp = llama_mlp()
    ours, num_fused = fused_copy(mlp)
    assert num_fused == 1
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, rows: rows * 2)
    assert torch.equal(ours(torch.ones(3, device=DEVICE)), torch.full((3,), 2.0, device=DEVICE))


@torch.no_grad()
def test_rows_of_another_dtype_go_through_the_modules_own_code():
    norm = LlamaRMSNorm(8).to(DEVICE)
    ours, _ = fused_copy(norm)
    rows = draw(3, 8, dtype=torch.float16)
    assert ours(rows).dtype == norm(rows).dtype == torch.float32


# Whole models


@pytest.fixture
def launched(monkeypatch):
    """The names of kernels that were launched; bodies are fused on the device of this file."""
    names = []
    launch = Launcher.launch

    def count(launcher, *args):
        names.append(launcher.kernel.__name__)
        launch(launcher, *args)

    monkeypatch.setattr(Launcher, "launch", count)
    monkeypatch.setattr(executor, "fusion_for", lambda _: partial(fuse, device_types={DEVICE.type}))
    return names


NORM, GATE, ROTATE = "rms_norm_kernel", "gate_kernel", "rotate_kernel"
KERNELS = {
    "llama": {NORM: 5, GATE: 2, ROTATE: 2},
    "qwen3": {NORM: 9, GATE: 2, ROTATE: 2},
    "mistral_sliding": {NORM: 5, GATE: 2, ROTATE: 2},
    "gemma2": {NORM: 9, GATE: 0, ROTATE: 2},
    "gpt_oss": {NORM: 5, GATE: 0, ROTATE: 0},
    "olmo2": {NORM: 9, GATE: 2, ROTATE: 2},
    "granite": {NORM: 5, GATE: 2, ROTATE: 2},
    "gpt_neox": {NORM: 0, GATE: 0, ROTATE: 0},  # rotates a part of each head
    "phi3_longrope": {NORM: 5, GATE: 0, ROTATE: 2},
    "cohere": {NORM: 0, GATE: 2, ROTATE: 0},
    "gpt2": {NORM: 0, GATE: 0, ROTATE: 0},
}


@pytest.mark.parametrize("family", KERNELS)
def test_models_give_the_numbers_of_the_plain_call(family, launched, tokenizer):
    """The launches of one pass are those of two layers."""
    model = FAMILIES[family]().to(DEVICE)
    classes = [type(module) for module in model.modules()]
    lm = LM(model, tokenizer)
    text = Text("The cat sat on the mat", lm)
    evaluate([Text("A dog", lm)])  # compares the kernels, and probes
    launched.clear()
    evaluate([text])
    assert {name: launched.count(name) for name in KERNELS[family]} == KERNELS[family]
    assert_equals_plain(model, [text, Text("The cat", lm), Text("The cat sat there", lm)])
    assert [type(module) for module in model.modules()] == classes


def test_the_model_is_released_without_the_collector(launched, tokenizer):
    model = FAMILIES["llama"]().to(DEVICE)
    weight = weakref.ref(model.get_decoder().layers[0].mlp.gate_proj.weight)
    body = executor.skeleton.make_body(model, "eager")
    with torch.no_grad():
        assert fuse(body, {DEVICE.type}) == 9
    gc.collect()
    gc.disable()
    try:
        del model, body
        assert weight() is None
    finally:
        gc.enable()


def test_a_gate_with_another_activation_keeps_its_own_code():
    model = FAMILIES["llama"]().to(DEVICE)
    model.model.layers[1].mlp.act_fn = nn.GELU()
    rows = draw(1, 3, 32)
    with torch.no_grad():
        expected = [layer.mlp(rows) for layer in model.model.layers]
        assert fuse(model.model, device_types=(DEVICE.type,))
        for layer, before in zip(model.model.layers, expected, strict=True):
            check(layer.mlp(rows), before, torch.float32)
