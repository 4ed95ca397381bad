"""Where torch multiplies float32 in TF32, models stay packed, with the fast kernels; off CUDA products are rounded."""

from collections.abc import Iterator
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


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        with torch.no_grad():
            if DEVICE.type == "cuda":
                yield
            else:
                cuda = torch.device("cuda")
                monkeypatch.setattr(probe, "multiplies_in_tf32", lambda device, dtype: multiplies_in_tf32(cuda, dtype))
                with InTF32():
                    yield
    finally:
        products.fp32_precision = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_kernels_are_compared_with_exact_products(dtype: torch.dtype) -> None:
    name = {"cpu": "flash_cpu", "cuda": "efficient_cuda"}[DEVICE.type]
    assert choose_kernel.__wrapped__(DEVICE, dtype, 4, 2, 16).name == name
    assert choose_pair.__wrapped__(DEVICE, dtype, 4, 2, 16).name == name


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_one_launch_kernel_is_compared_with_exact_products(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="there is no wheel of triton for this platform")
    from backprompt.attention.shapes import Shape
    from backprompt.attention.tiles import Tile
    from backprompt.attention.triton import reason_against

    assert reason_against.__wrapped__(Shape(DEVICE, dtype, 4, 2, 16), Tile(16, 16, 4, 2), True, True, True) is None


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss"])
def test_models_stay_packed(name: str, tokenizer: Any) -> None:
    lm = LM(FAMILIES[name]().to(DEVICE), tokenizer)
    lm.evaluate([Text("The cat sat", lm)])
    assert lm.session.evaluator.executor.levels is None
