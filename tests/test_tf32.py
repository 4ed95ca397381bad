"""Where torch multiplies float32 in TF32, models stay packed, with the fast kernels; off CUDA products are rounded."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backprompt import LM, Text
from backprompt.attention.kernels import choose_kernel
from backprompt.model import probe
from backprompt.model.quantized import multiplies_in_tf32
from backprompt.training.kernels import choose_pair
from tiny_models import FAMILIES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_FACTORS = {
    Tensor.matmul: slice(0, 2),
    torch.matmul: slice(0, 2),
    torch.nn.functional.linear: slice(0, 2),
    torch.addmm: slice(1, 3),
}


class InTF32(TorchFunctionMode):
    """A context in which torch's matrix products have factors of 11 bits; its kernels of attention have not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORS:
            factors = _FACTORS[func]
            args = (*args[: factors.start], *map(_rounded, args[factors]), *args[factors.stop :])
        return func(*args, **(kwargs or {}))


def _rounded(factor: Tensor) -> Tensor:
    if factor.dtype != torch.float32:
        return factor
    bits = factor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextmanager
def tf32() -> Iterator[None]:
    """Products in TF32: torch's own on CUDA, else rounded ones, which the probe takes for CUDA's."""
    products, cuda = torch.backends.cuda.matmul, torch.device("cuda")
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.no_grad(),
            InTF32() if DEVICE.type == "cpu" else nullcontext(),
        ):
            patch.setattr(probe, "multiplies_in_tf32", lambda device, dtype: multiplies_in_tf32(cuda, dtype))
            yield
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choose", [choose_kernel, choose_pair])
def test_fast_kernels_are_compared_with_exact_products(choose: Any, dtype: torch.dtype) -> None:
    shape = DEVICE, dtype, 4, 2, 16
    expected = choose.__wrapped__(*shape).name
    with tf32():
        assert choose.__wrapped__(*shape).name == expected
    assert DEVICE.type == "cuda" or expected == "flash_cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_one_launch_kernel_is_compared_with_exact_products(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="there is no wheel of triton for this platform")
    from backprompt.attention.shapes import Shape
    from backprompt.attention.tiles import Tile
    from backprompt.attention.triton import reason_against

    with tf32():
        assert reason_against.__wrapped__(Shape(DEVICE, dtype, 4, 2, 16), Tile(16, 16, 4, 2), True, True, True) is None


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss"])
def test_models_stay_packed(name: str, tokenizer: Any) -> None:
    lm = LM(FAMILIES[name]().to(DEVICE), tokenizer)
    with tf32():
        lm.evaluate([Text("The cat sat", lm)])
    assert lm.session.evaluator.executor.levels is None
