"""Linear layers in int8: torchao makes them, and on the CPU faster kernels multiply them in private copies.

`quantize` gives a model torchao's tensors, with a scale for each output of a layer. There are two ways:

- "int8": only weights are quantized. Products are computed in float32: for each product the integers are converted to
  float32, multiplied by oneDNN, and dropped. Results differ from torchao's by the rounding of float32.
- "int8-dynamic": inputs are quantized as well, with a scale for each row. oneDNN's kernels for int8 read a packed copy
  of the integers. They get the integers that torchao computes, so the sums are the same.

torchao's own products on the CPU are slower than those of float32. oneDNN's operations are not public. So a tiny case
with the largest integers is compared first, and torchao's own products are used if the results differ.

The measurements are in `docs/design/model.md`, "Matrix products".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from backprompt.errors import UnsupportedModelError
from backprompt.model.linear import Linears, failure_of, is_faster, product

PACKAGE = "torchao"

Way: TypeAlias = Literal["int8", "int8-dynamic"]
WAYS: tuple[Way, ...] = get_args(Way)

_STEPS = 127.5
"""torchao maps the largest number of a row to this number, and clips to the largest integer."""
_LEAST_SCALE = torch.finfo(torch.float32).eps
_ZERO = 128
"""Inputs are unsigned for the kernels; this integer stands for 0."""
_ROWS_TO_PACK_FOR = 64


class _Packed(NamedTuple):
    """The integers of a weight in the order of the kernels, and the scale and the zero of each output."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor


def quantize(model: nn.Module, way: Way) -> int:
    """Give the linear layers of a model, except the output head, int8 weights of torchao, in place; return how many.

    Raises:
        ImportError: torchao is missing.
        UnsupportedModelError: the model is quantized already, or has no linear layers to quantize.

    """
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(f"{name} is quantized already. Leave weights={way!r} out.")
    torchao: Any = import_module("torchao.quantization")
    head = model.get_output_embeddings()  # type: ignore[operator]
    _replace_conv1d(model, head)
    layers = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    if not layers:
        raise UnsupportedModelError(
            f"{name} has no linear layers besides its head, so weights={way!r} has nothing to quantize. Leave it out."
        )
    is_dynamic = way == "int8-dynamic"
    chosen = torchao.Int8DynamicActivationInt8WeightConfig if is_dynamic else torchao.Int8WeightOnlyConfig
    wanted = set(layers)
    torchao.quantize_(model, chosen(set_inductor_config=False), lambda module, _: module in wanted)
    return len(layers)


def version() -> str:
    """Return the version of torchao, which decides the integers."""
    return str(import_module(PACKAGE).__version__)


class Int8Linear(nn.Module):
    """Replaces a linear layer of torchao in a private copy of a model: same weight, same result up to rounding."""

    num_bytes = 0
    """The bytes of a packed copy."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias  # read by some models
        self.in_features, self.out_features = like.in_features, like.out_features

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., inputs)` -> `(..., outputs)`."""
        found = self._multiplied(rows.reshape(-1, self.in_features).float())
        if self.bias is not None:
            found += self.bias
        return found.to(rows.dtype).view(*rows.shape[:-1], self.out_features)

    def _multiplied(self, rows: Tensor) -> Tensor:
        weight: Any = self.weight
        return product(rows, weight.qdata.float(), None).mul_(weight.scale.flatten())


class DynamicInt8Linear(Int8Linear):
    """The same with inputs in int8, for layers whose inputs torchao quantizes."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like)
        weight: Any = like.weight
        self._packed = _packed(weight.qdata, weight.scale.flatten())
        self.num_bytes = weight.qdata.nbytes

    def _multiplied(self, rows: Tensor) -> Tensor:
        return dynamic_product(rows, self._packed)


def speed_up_int8(models: Iterable[nn.Module], linears: Linears) -> Linears:
    """Give the int8 layers of private copies faster kernels, if there are any.

    Returns:
        `linears`, with the method's name and the bytes of packed copies added.

    """
    found = [(parent, name, child) for model in models for parent, name, child in _int8_layers(model)]
    kinds = {layer: kind for _, _, layer in found if (kind := _kind_for(layer.weight)) is not None}
    made = {layer: kind(layer) for layer, kind in kinds.items()}
    for parent, name, layer in found:
        if layer in made:
            setattr(parent, name, made[layer])
    if not made:
        return linears
    num_bytes = linears.packed_bytes + sum(layer.num_bytes for layer in made.values())
    return replace(linears, name=f"{linears.name}, int8", packed_bytes=num_bytes)


def _kind_for(weight: Any) -> type[Int8Linear] | None:
    """Return the class for a layer with an int8 weight, or None if torchao's own product is used."""
    if weight.act_quant_kwargs is not None:
        return DynamicInt8Linear if failure_of_int8() is None else None
    is_served = weight.dtype == torch.float32 and failure_of(torch.float32) is None and is_faster()
    return Int8Linear if is_served else None


@lru_cache
def failure_of_int8() -> str | None:
    """Try a tiny case of the kernels for int8 inputs; return why they are not used, or None.

    Some processors add pairs of products in 16 bits. With the largest integers, which the case has, that is too few.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"):
        integers = torch.randint(-127, 128, (40, 256), generator=generator, dtype=torch.int8)
        integers[:8] = 127
        scales = torch.rand(40, generator=generator, dtype=torch.float32) + 0.5
        rows = torch.randn(5, 256, generator=generator, dtype=torch.float32)
        rows[0] = 1.0
    size = rows.abs().amax(dim=-1, keepdim=True) / _STEPS
    inputs = (rows * (1 / size)).round().clamp(-_ZERO, _ZERO - 1)
    expected = (inputs.double() @ integers.double().t()) * size * scales
    try:
        found = dynamic_product(rows, _packed(integers, scales)).double()
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    gap = float((found - expected).abs().max())
    return None if gap <= 1e-5 * float(expected.abs().max()) else f"they were off by {gap:.1e}"


def dynamic_product(rows: Tensor, packed: _Packed) -> Tensor:
    """Return the product of rows and packed weights; each row is rounded to the integers that torchao computes."""
    size = rows.abs().amax(dim=-1, keepdim=True).div_(_STEPS).clamp_(min=_LEAST_SCALE)
    integers = (rows * size.reciprocal()).round_().add_(_ZERO).clamp_(max=2 * _ZERO - 1).to(torch.uint8)
    multiply: Any = torch.ops.onednn.qlinear_pointwise
    weight, scales, zeros = packed
    sums: Tensor = multiply(integers, 1.0, _ZERO, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return sums.mul_(size)


def _packed(integers: Tensor, scales: Tensor) -> _Packed:
    weight: Tensor = torch.ops.onednn.qlinear_prepack(integers, [_ROWS_TO_PACK_FOR, integers.shape[1]])
    return _Packed(weight, scales, torch.zeros(len(integers), dtype=torch.int64, device="cpu"))


def _int8_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Return the linear layers with int8 weights of the kinds in this file, each with its parent and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and "forward" not in vars(child) and _is_int8(child.weight)
    ]


def _is_int8(weight: Any) -> bool:
    """Return whether a weight is torchao's, with symmetric integers, a scale an output and a scale a row of inputs."""
    if type(weight).__name__ != "Int8Tensor" or weight.device.type != "cpu":
        return False
    inputs, zero = weight.act_quant_kwargs, weight.zero_point
    has_plain_inputs = inputs is None or (
        type(getattr(inputs, "granularity", None)).__name__ == "PerRow"
        and getattr(inputs.mapping_type, "name", "") == "SYMMETRIC"
        and not getattr(inputs, "reduce_range", False)
    )
    return (
        has_plain_inputs
        and not getattr(weight, "reduce_range", False)
        and all(getattr(weight, name, None) is None for name in ("act_quant_scale", "act_pre_scale"))
        and tuple(weight.block_size) == (1, weight.shape[-1])
        and (zero is None or not bool(zero.any()))
    )


def _replace_conv1d(model: nn.Module, head: nn.Module) -> None:
    """Replace GPT-2's `Conv1D` by linear layers: the same with the weight transposed."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Conv1D and child is not head:
                setattr(parent, name, _as_linear(child))


def _as_linear(layer: Conv1D) -> nn.Linear:
    weight: Tensor = layer.weight
    inputs, outputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    made.bias = layer.bias
    return made.train(layer.training)
