"""Quantized weights: the tensors that hold their numbers, and the layers that cannot share a pass.

A quantized weight is one parameter made of several tensors: integers, scales, zero points. torchao and quanto wrap
these in a tensor that can be flattened, and bitsandbytes attaches a state with scales to the parameter. All code that
names, watches or hashes weights uses `numbers_of`, so that a changed scale is a changed weight.

Some layers quantize their *inputs* row by row. They compute each row by itself, but may round numbers that differ in
the last bit to different integers. So their model is compared with its plain call by the tolerances of bfloat16. Layers
that quantize by the range of the whole call mix the texts of a pass, and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backprompt.errors import UnsupportedModelError

COARSE = torch.bfloat16
"""The dtype whose tolerances fit models with layers that round inputs to 8 bits, or compute in bfloat16."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_ONE_RANGE = "PerTensor"


def numbers_of(tensor: Tensor) -> Sequence[Tensor]:
    """Return the plain tensors that hold the numbers of a parameter or a buffer: most often the tensor itself."""
    if not is_special(tensor):
        return (tensor,)
    names = _names_in(tensor)
    if names is not None:
        return [number for name in names for number in numbers_of(getattr(tensor, name))]
    return [tensor, *_state_tensors(getattr(tensor, "quant_state", None))]


def is_special(tensor: Tensor) -> bool:
    """Return whether a tensor is made of several, or carries a state that its layer reads."""
    return type(tensor) not in (Tensor, nn.Parameter) and (
        hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "quant_state")
    )


def special_weights(model: nn.Module) -> list[Tensor]:
    """Return the distinct parameters and buffers of a model that are made of several tensors."""
    found = [tensor for tensor in (*model.parameters(), *model.buffers()) if is_special(tensor)]
    return list({id(tensor): tensor for tensor in found}.values())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all distinct parameters and buffers; quantized weights count with their bytes in memory."""
    distinct = {id(number): number for held in (*model.parameters(), *model.buffers()) for number in numbers_of(held)}
    return sum(number.nbytes for number in distinct.values())


def describe(tensor: Tensor) -> str:
    """Return a special tensor's settings, which decide its values besides its numbers; equal in all processes."""
    if _names_in(tensor) is not None:
        settings: Any = tensor.__tensor_flatten__()[1]  # type: ignore[attr-defined]
        described = repr((settings, [describe(part) for part in _parts_of(tensor) if is_special(part)]))
    else:
        described = repr(list(_state_settings(getattr(tensor, "quant_state", None))))
    return _ADDRESS.sub("", f"{type(tensor).__qualname__} {described}")


def compared_as(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype whose tolerances fit a model with results in `dtype`."""
    is_coarse = any(map(_quantizes_inputs, special_weights(model))) or any(map(_computes_in_half, model.modules()))
    return COARSE if is_coarse and dtype.itemsize > COARSE.itemsize else dtype


def multiplies_in_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch rounds the factors of matrix products to TF32, for a device and the dtype of weights."""
    if device.type != "cuda" or dtype != torch.float32:
        return False
    products: Any = torch.backends.cuda.matmul
    precision = getattr(products, "fp32_precision", None)  # older versions of torch have the other attribute alone
    return bool(products.allow_tf32) if precision is None else precision == "tf32"


def copied_weights(model: nn.Module) -> set[int]:
    """Return the ids of weights that private copies cannot share.

    On some CPUs the first call of a 4-bit layer of bitsandbytes puts its weight into another order, in place.
    """
    return {id(module.weight) for module in model.modules() if _is_reordered(module) and not _has_order_of_cpu(module)}


def copied_bytes(private: nn.Module) -> int:
    """Return the bytes of the weights that a private copy could not share, before its first call."""
    copied = copied_weights(private)
    return sum(number.nbytes for held in private.parameters() if id(held) in copied for number in numbers_of(held))


def check_quantized(model: nn.Module) -> None:
    """Raise UnsupportedModelError if quantized layers cannot share a pass, or their weights cannot be watched."""
    model_name = type(model).__name__
    for where, module in model.named_modules():
        kind = type(module)
        named = f"{model_name} has the quantized layer {kind.__qualname__} at {where!r}"
        if kind.__name__ == "Linear8bitLt":
            raise UnsupportedModelError(
                f"{model_name} has int8 layers of bitsandbytes, which move numbers out of their weights in their first "
                "call, so private copies cannot share the weights. Load the model without load_in_8bit=True."
            )
        if kind.__module__.startswith("torch.ao.nn.") and hasattr(module, "_packed_params"):
            if ".dynamic." in kind.__module__:
                raise UnsupportedModelError(
                    f"{named}, made by torch's quantize_dynamic. It scales its inputs by the largest number of the "
                    "whole call, so its texts cannot share a pass. Quantize with torchao, which scales each row: "
                    'backprompt.load(name, weights="int8").'
                )
            raise UnsupportedModelError(
                f"{named}, which packs its weight into an object that cannot be watched. Quantize with torchao."
            )
        if kind.__name__ == "HQQLinear":
            raise UnsupportedModelError(
                f"{named}, whose scales are not parameters, so a change of them would not be noticed. Quantize with "
                "torchao or bitsandbytes."
            )
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if not is_special(weight):
            continue
        if any(number.is_meta for number in numbers_of(weight)):
            raise UnsupportedModelError(
                f"{model_name} has the quantized weight {name!r} on the meta device: quantized weights cannot be "
                "offloaded. Load the model without offloading it."
            )
        if _scales_whole_calls(weight):
            raise UnsupportedModelError(
                f"{model_name} scales the inputs of {name!r} by the largest number of the whole call (PerTensor), so "
                "its texts cannot share a pass. Quantize it with granularity=PerRow()."
            )


def _names_in(tensor: Tensor) -> list[str] | None:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return None if flatten is None else list(flatten()[0])


def _parts_of(tensor: Tensor) -> list[Tensor]:
    return [getattr(tensor, name) for name in _names_in(tensor) or ()]


def _state_tensors(state: object) -> list[Tensor]:
    """Return the tensors in the state of a 4-bit weight of bitsandbytes; the scales may have a state of their own."""
    values = list(vars(state).values()) if state is not None else []
    nested = [value for value in values if type(value) is type(state)]
    return [
        *(value for value in values if isinstance(value, Tensor)),
        *(t for each in nested for t in _state_tensors(each)),
    ]


def _state_settings(state: object) -> Iterator[tuple[str, str]]:
    for name, value in sorted(vars(state).items()) if state is not None else ():
        if type(value) is type(state):
            yield from ((f"{name}.{inner}", shown) for inner, shown in _state_settings(value))
        elif not isinstance(value, Tensor):
            yield name, repr(value)


def _quantizes_inputs(weight: Tensor) -> bool:
    return any(
        getattr(weight, name, None) is not None
        for name in ("act_quant_kwargs", "activation_quantization", "input_quant_func")
    ) or any(_quantizes_inputs(part) for part in _parts_of(weight) if is_special(part))


def _computes_in_half(module: nn.Module) -> bool:
    """Return whether a 4-bit layer of bitsandbytes computes in 16 bits, whatever the dtype of the model."""
    is_half = getattr(module, "compute_dtype", None) in (torch.bfloat16, torch.float16)
    return hasattr(getattr(module, "weight", None), "quant_state") and (is_half or _is_reordered(module))


def _is_reordered(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_on_cpu = isinstance(weight, Tensor) and weight.device.type == "cpu"
    return is_on_cpu and bool(getattr(module, "support_avx512bf16_for_cpu", False))


def _has_order_of_cpu(module: nn.Module) -> bool:
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


def _scales_whole_calls(weight: Tensor) -> bool:
    asked = getattr(getattr(weight, "act_quant_kwargs", None), "granularity", None)
    is_dynamic = getattr(weight, "act_quant_scale", None) is None
    return is_dynamic and type(asked).__name__ == _ONE_RANGE
