"""Linear layers on the CPU through oneDNN, where oneDNN is faster: the only file that knows how they are multiplied.

torch multiplies float32 matrices with MKL. On some processors oneDNN, a part of torch, is two to four times faster,
with unpacked weights or with *packed* weights: copied once into the order in which oneDNN's kernels read them. The
operations are those that torch's own compiler calls (`torch/_inductor/fx_passes/mkldnn_fusion.py`). They are private:
an operation is not used if it is missing, refuses its arguments or gives other numbers. The products differ only by
rounding.

The measurements are in `docs/design/model.md`, "Matrix products".
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from backprompt.errors import UnsupportedModelError

FASTER = 1.2
"""oneDNN multiplies unpacked weights if it is this many times faster in a quick comparison at the first use."""

_COMPARED_SIZE = 1024
_COMPARED_ROWS = (16, 128)
_ROWS_TO_PACK_FOR = 64
"""oneDNN chooses the packed order for a number of rows; the number made no difference."""


@dataclass(frozen=True)
class Linears:
    """The method that multiplies linear layers, and the extra bytes that packed or padded weights take."""

    name: str
    packed_bytes: int = 0


class OneDnnLinear(nn.Module):
    """Replaces a linear layer in a private copy of a model: same parameters, same result up to rounding.

    Args:
        like: the layer, `nn.Linear` or the `Conv1D` of GPT-2.
        is_packed: whether to multiply with a packed copy of its weights.

    """

    def __init__(self, like: nn.Module, *, is_packed: bool) -> None:
        super().__init__()
        self.weight = _weight(like)  # read by some models
        self.bias: Tensor | None = like.bias  # type: ignore[assignment]
        weight = _outputs_first(like)
        self.out_features, self.in_features = weight.shape  # read by some adapters
        self._multiplied = _packed(weight) if is_packed else weight

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., inputs)` -> `(..., outputs)`."""
        return product(rows, self._multiplied, self.bias)


def speed_up(models: Iterable[nn.Module], *, pack: bool) -> Linears:
    """Let oneDNN multiply the linear layers of private copies of a model, if packed or if oneDNN is faster.

    Raises:
        UnsupportedModelError: `pack` is set, but nothing can be packed.

    """
    layers = [found for model in models for found in _replaceable(model)]
    weights = [_weight(layer) for _, _, layer in layers]
    dtypes = {weight.dtype for weight in weights}
    if pack:
        reason = _why_not(dtypes)
        if reason is not None:
            raise UnsupportedModelError(f"pack_weights=True: {reason} Leave pack_weights out.")
    elif dtypes != {torch.float32} or _why_not(dtypes) is not None or not is_faster():
        return Linears("torch")
    made = {layer: OneDnnLinear(layer, is_packed=pack) for _, _, layer in layers}  # a layer may stand in several places
    for parent, name, layer in layers:
        setattr(parent, name, made[layer])
    packed_bytes = sum(_weight(layer).nbytes for layer in made) if pack else 0
    return Linears("onednn, packed" if pack else "onednn", packed_bytes)


class TrainedLinear(nn.Module):
    """Replaces a linear layer in a private copy of a model that is trained: gradients reach the same parameters."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.weight = _weight(like)  # read by some models
        self.bias: Tensor | None = like.bias  # type: ignore[assignment]
        self._is_transposed = isinstance(like, Conv1D)
        self.out_features, self.in_features = _outputs_first(like).shape  # read by some adapters

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., inputs)` -> `(..., outputs)`."""
        weight = self.weight.t() if self._is_transposed else self.weight
        if rows.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not rows.numel():
            return nn.functional.linear(rows, weight, self.bias)
        return _trained_product(rows, weight, self.bias)


def _trained_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `rows @ weight.T + bias`, with gradients.

    For more than two axes the operation returns a view. A view that a Function returns must not be written to, so the
    Function gets two axes.
    """
    product: Tensor = _TrainedProduct.apply(rows.reshape(-1, rows.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return product.view(*rows.shape[:-1], -1)


class _TrainedProduct(torch.autograd.Function):
    """`product` for `(rows, inputs)`, and the two products of its backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        of_rows = product(grad, weight.t(), None) if needs_rows else None
        of_weight = product(grad.t(), rows.t(), None) if needs_weight else None
        return of_rows, of_weight, grad.sum(dim=0) if needs_bias else None


def speed_up_trained(model: nn.Module) -> None:
    """Let oneDNN multiply the linear layers of a private copy that is trained, where oneDNN is faster."""
    layers = _replaceable(model)
    if {_weight(layer).dtype for _, _, layer in layers} == {torch.float32} and _serves_training():
        made = {layer: TrainedLinear(layer) for _, _, layer in layers}
        for parent, name, layer in layers:
            setattr(parent, name, made[layer])


def _serves_training() -> bool:
    """Return whether oneDNN is right and faster. The answer is kept, so the caller's torch settings must not matter."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return failure_of(torch.float32) is None and training_failure() is None and is_faster()


def _replaceable(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return the plain linear layers on the CPU, each with its parent module and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.Linear, Conv1D)
        and "forward" not in vars(child)  # the user has not replaced it
        and type(parent).__name__
        != "TrainableTokensLayer"  # this layer of peft checks the type, and multiplies by itself
        and is_plain(_weight(child), ("cpu",))
    ]


def is_plain(weight: Tensor, device_types: Collection[str]) -> bool:
    """Return whether a weight on a device holds plain numbers, unlike a special tensor such as a quantized one."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.layout == torch.strided
        and weight.device.type in device_types
        and weight.is_floating_point()
    )


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def _why_not(dtypes: set[torch.dtype]) -> str | None:
    """Return why oneDNN cannot multiply with packed weights of these types, or None."""
    if not dtypes:
        return "only linear layers on the CPU can be packed, and this model has none."
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16):
            return f"weights of {dtype} cannot be packed, only weights of torch.float32 and torch.bfloat16."
        if (failure := failure_of(dtype)) is not None:
            return f"oneDNN of this torch cannot serve {dtype} here ({failure})."
    return None


@lru_cache
def failure_of(dtype: torch.dtype) -> str | None:
    """Try a tiny case of oneDNN's products of this type; return why they are not used, or None."""
    rows, weight, bias = (_drawn(shape).to(dtype) for shape in ((1, 5, 48), (33, 48), (33,)))
    expected = nn.functional.linear(rows.double(), weight.double(), bias.double())
    try:
        found = [
            product(rows, given, bias).double() for given in (weight, weight.t().contiguous().t(), _packed(weight))
        ]
        found.append(product(rows, weight, None).double() + bias.double())
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    gap = max(float((one - expected).abs().max()) for one in found)
    allowed = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    return None if gap <= allowed else f"it was off by {gap:.1e}"


@lru_cache
def training_failure() -> str | None:
    """Try a tiny case of oneDNN's products in the backward; return why they are not used, or None."""
    given = [_drawn(shape) for shape in ((1, 5, 48), (33, 48), (33,))]
    gaps = []
    with torch.enable_grad():
        for is_transposed in (False, True):
            leaves = [tensor.requires_grad_() for tensor in (given[0], given[1], given[2])]
            rows, weight, bias = leaves
            weight = weight.t().clone().t() if is_transposed else weight
            upstream = _drawn((1, 5, 33))
            expected = torch.autograd.grad(nn.functional.linear(rows, weight, bias), leaves, upstream)
            try:
                found = torch.autograd.grad(_trained_product(rows, weight, bias), leaves, upstream)
            except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
                return (str(error).splitlines() or [type(error).__name__])[0]
            gaps += [float((ours - torchs).abs().max()) for ours, torchs in zip(found, expected, strict=True)]
    gap = max(gaps)
    return None if gap <= 64 * torch.finfo(torch.float32).eps else f"it was off by {gap:.1e}"


@lru_cache
def is_faster() -> bool:
    """Return whether oneDNN is faster with unpacked weights, plain and transposed, for few rows and for more.

    One thread is measured by its own time on the processor, so that other work on the machine does not matter.
    """
    weight, bias = _drawn((_COMPARED_SIZE, _COMPARED_SIZE)), _drawn((_COMPARED_SIZE,))
    ratios = []
    with _one_thread():
        for num_rows in _COMPARED_ROWS:
            rows = _drawn((num_rows, _COMPARED_SIZE))
            for given in (weight, weight.t()):
                plain, ours = [], []
                for _ in range(5):
                    plain.append(_seconds(lambda r=rows, w=given: nn.functional.linear(r, w, bias)))  # type: ignore[misc]
                    ours.append(_seconds(lambda r=rows, w=given: product(r, w, bias)))  # type: ignore[misc]
                ratios.append(min(plain) / min(ours))
    return min(ratios) >= FASTER


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _drawn(shape: tuple[int, ...]) -> Tensor:
    """Return random float32 numbers on the CPU; the caller's random state stays unchanged."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")


def _seconds(work: Callable[[], object]) -> float:
    clock = time.perf_counter if sys.platform == "win32" else time.thread_time  # Windows counts whole ticks of it
    started = clock()
    work()
    return clock() - started


def _outputs_first(layer: nn.Module) -> Tensor:
    """Return a view of a layer's weights as `(outputs, inputs)`."""
    weight = _weight(layer).detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_TO_PACK_FOR)
    return packed


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `rows @ weight.T + bias`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
