"""A norm, a gated layer and a rotation of positions in one launch each, in a private body on CUDA.

transformers computes them in seven, two and ten elementwise launches. A comparison finds the modules that a kernel can
replace: the kernel must give the numbers of the module's own forward for random rows. Numbers are rounded at the same
steps as in transformers. A model without equal numbers stays unchanged.

A module is replaced by giving the private module a class of its own, a subclass of the module's class that changes
`forward` alone. The user's model, transformers' classes and its functions stay as they are, and a `forward` that
somebody gives to the class later is noticed. The measurements are in `docs/design/model.md`, "The body".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import lru_cache
from itertools import starmap
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from backprompt.attention.launches import Launcher, on_device
from backprompt.model.fused_kernels import gate_kernel, rms_norm_kernel, rotate_kernel

logger = logging.getLogger(__name__)

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

LARGEST_NORM = 16384
"""The longest row that fits into a program of the norm."""

ROTATION = "apply_rotary_pos_emb"
"""The name under which modules of attention find their rotation among the names of their file."""

LARGEST_GAP = 8
"""A kernel is used if its numbers differ by at most this many roundings of the largest number of a row."""

LEAST_EQUAL = 0.9
"""In half precision at least this share of the numbers must be equal: rounding at another step changes more."""

_PROGRAM_NUMBERS = 2048
_EPS_NAMES = ("variance_epsilon", "eps")
_WAYS = ((False, True), (False, False), (True, False))
"""Kinds of norms: whether 1 is added to the weight, and whether rows are cast before the weight multiplies them."""


def fuse(body: nn.Module, device_types: Collection[str] = ("cuda",)) -> int:
    """Give modules of a private body their kernels; return how many modules have one.

    Args:
        body: a private copy of a model; must be called in `plain_surroundings`.
        device_types: the types of devices on which the kernels are used. Triton's interpreter computes on the CPU.

    """
    num_fused = 0
    classes: dict[object, type[nn.Module] | None] = {}
    for module in list(body.modules()):
        parameter = next(module.parameters(), None)
        if (
            parameter is None
            or parameter.device.type not in device_types
            or parameter.dtype not in DTYPES
            or _is_changed(module)
        ):
            continue
        shapes = tuple(tuple(one.shape) for one in module.parameters())
        parts = tuple(map(type, module.children()))  # each layer may have another activation
        kind = type(module), parts, shapes, parameter.dtype, parameter.device, _eps_of(module)
        if kind not in classes:
            with on_device(parameter.device):
                classes[kind] = _fused_class(module, parameter)
        fused = classes[kind]
        if fused is not None:
            module.__class__ = fused
            num_fused += 1
    return num_fused


def _is_changed(module: nn.Module) -> bool:
    """Return whether a module has a replaced forward or hooks."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _fused_class(module: nn.Module, parameter: Tensor) -> type[nn.Module] | None:
    """Return the class for modules like this one, or None where no kernel gives the same numbers."""
    try:
        return _norm_class(module, parameter) or _gated_class(module, parameter) or _rotating_class(module, parameter)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler, or foreign code on our rows, may raise anything
        logger.info("%s keeps its own code: %s", type(module).__name__, error)
        return None


@lru_cache(maxsize=256)
def _subclass(kind: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """Return a subclass with another `forward`, which is used as long as the forward of `kind` is not changed."""
    plain = kind.forward

    def checked(self: Any, *args: Any, **keywords: Any) -> Any:
        now = kind.forward
        return forward(self, *args, **keywords) if now is plain else now(self, *args, **keywords)

    return type(kind.__name__, (kind,), {"forward": checked, "__module__": kind.__module__})


# Norms


def _eps_of(module: nn.Module) -> float | None:
    found = [vars(module)[name] for name in _EPS_NAMES if isinstance(vars(module).get(name), float)]
    return found[0] if len(found) == 1 else None


def _norm_class(module: nn.Module, weight: Tensor) -> type[nn.Module] | None:
    kind: Any = type(module)
    if not kind.__name__.endswith("RMSNorm") or kind is nn.RMSNorm or _eps_of(module) is None:
        return None
    if [*module._parameters] != ["weight"] or module._buffers or module._modules or weight.dim() != 1:
        return None
    if len(weight) > LARGEST_NORM:
        return None
    rows = torch.stack([_drawn((len(weight),), weight, seed) * size for seed, size in enumerate((1.0, 30.0, 1e-3))])
    other = _drawn((len(weight),), weight, 3) + 0.5
    expected = torch.func.functional_call(module, {"weight": other}, (rows,))
    if expected.dtype != rows.dtype:
        return None
    eps = _eps_of(module) or 0.0
    way = next((way for way in _WAYS if _is_alike(rms_norm(rows, other, eps, *way), expected)), None)
    return None if way is None else _subclass(kind, _norm_forward(kind, *way))


@lru_cache(maxsize=256)
def _norm_forward(kind: type[nn.Module], adds_one: bool, casts_first: bool) -> Callable[..., Tensor]:
    plain: Any = kind.forward

    def forward(self: Any, rows: Tensor) -> Tensor:
        weight = self.weight
        if rows.dtype != weight.dtype or rows.device != weight.device or rows.shape[-1:] != weight.shape:
            output: Tensor = plain(self, rows)
            return output
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return rms_norm(rows, weight, eps, adds_one, casts_first)

    return forward


def rms_norm(rows: Tensor, weight: Tensor, eps: float, adds_one: bool, casts_first: bool) -> Tensor:
    """Return `rows / rms(rows) * weight` in one launch; see `_WAYS`."""
    rows, weight = rows.contiguous(), weight.contiguous()
    output = torch.empty_like(rows)
    size = weight.shape[0]
    num_rows = rows.numel() // size
    if num_rows:
        launcher, rows_a_program = _norm_launcher(size, rows.dtype, rows.device, adds_one, casts_first)
        launcher.launch(-(-num_rows // rows_a_program), (rows, weight, output), (), (num_rows, eps))
    return output


@lru_cache(maxsize=256)
def _norm_launcher(
    size: int, dtype: torch.dtype, device: torch.device, adds_one: bool, casts_first: bool
) -> tuple[Launcher, int]:
    padded = 1 << (size - 1).bit_length()
    rows = max(1, _PROGRAM_NUMBERS // padded)
    constants = {
        "SIZE": size,
        "PADDED_SIZE": padded,
        "ROWS": rows,
        "ADDS_ONE": adds_one,
        "CASTS_FIRST": casts_first,
    }
    return Launcher(rms_norm_kernel, constants, {"num_warps": 8}), rows


# Gated layers


def _gated_class(module: nn.Module, weight: Tensor) -> type[nn.Module] | None:
    children = module._modules
    if set(children) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or module._parameters or module._buffers:
        return None
    if type(children["act_fn"]) not in (nn.SiLU, SiLUActivation):
        return None
    if not all(isinstance(children[name], nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
        return None
    rows = _drawn((3, module.gate_proj.in_features), weight, 0)  # type: ignore[union-attr, arg-type]
    kind: Any = type(module)
    down = children["down_proj"]
    children["down_proj"] = nn.Identity()  # its sums would blur the comparison
    try:
        is_alike = _is_alike(_gated_forward(module, rows), module(rows))
    finally:
        children["down_proj"] = down
    return _subclass(kind, _gated_forward) if is_alike else None


def _gated_forward(self: Any, rows: Tensor) -> Tensor:
    gates, numbers = self.gate_proj(rows), self.up_proj(rows)
    is_fit = gates.dtype == numbers.dtype and gates.dtype in DTYPES and gates.shape == numbers.shape
    gated = silu_product(gates, numbers) if is_fit else self.act_fn(gates) * numbers
    output: Tensor = self.down_proj(gated)
    return output


def silu_product(gates: Tensor, numbers: Tensor) -> Tensor:
    """Return `silu(gates) * numbers` in one launch."""
    gates, numbers = gates.contiguous(), numbers.contiguous()
    output = torch.empty_like(gates)
    count = gates.numel()
    if count:
        programs = -(-count // _PROGRAM_NUMBERS)
        _gate_launcher(gates.dtype, gates.device).launch(programs, (gates, numbers, output), (), (count,))
    return output


@lru_cache(maxsize=64)
def _gate_launcher(dtype: torch.dtype, device: torch.device) -> Launcher:
    return Launcher(gate_kernel, {"SIZE": _PROGRAM_NUMBERS}, {"num_warps": 8})


# Rotations


def _rotating_class(module: nn.Module, weight: Tensor) -> type[nn.Module] | None:
    kind: Any = type(module)
    forward = kind.forward
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    plain = forward.__globals__.get(ROTATION)
    if not callable(plain) or not _rotates_alike(plain, weight):
        return None
    return _subclass(kind, _forward_with_rotation(forward, plain))


def _rotates_alike(plain: Callable[..., Any], weight: Tensor) -> bool:
    """Return whether a rotation gives the numbers of the kernel."""
    query, key = (_drawn((1, heads, 5, 12), weight, heads) for heads in (3, 2))
    cos, sin = (_drawn((1, 5, 12), weight, seed) for seed in (4, 5))
    expected = plain(query, key, cos, sin)
    return all(starmap(_is_alike, zip(rotated(query, key, cos, sin), expected, strict=True)))


@lru_cache(maxsize=256)
def _forward_with_rotation(forward: FunctionType, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the code of `forward`, which calls our rotation instead of its own."""
    names = forward.__globals__

    def rotate(*args: Any, **keywords: Any) -> Any:
        now = names[ROTATION]
        if now is plain and not keywords and len(args) == 4 and _can_rotate(*args):
            return rotated(*args)
        return now(*args, **keywords)

    changed = FunctionType(
        forward.__code__, {**names, ROTATION: rotate}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


def _can_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    size = query.shape[-1]
    num_tokens = query.shape[-2]
    return (
        query.dim() == key.dim() == 4
        and query.shape[0] == key.shape[0] == 1
        and query.shape[2:] == key.shape[2:]
        and query.stride(-1) == key.stride(-1) == 1
        and size % 2 == 0
        and cos.shape == sin.shape == (1, num_tokens, size)
        and query.dtype == key.dtype == cos.dtype == sin.dtype
        and query.dtype in DTYPES
        and query.device == key.device == cos.device == sin.device
    )


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys `(1, heads, tokens, size)`, rotated in one launch; any strides, except along `size`."""
    _, heads, num_tokens, size = query.shape
    kv_heads = key.shape[1]
    outputs = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in (query, key)]
    if num_tokens:
        launcher, tokens = _rotation_launcher(heads, kv_heads, size, query.dtype, query.device)
        tensors = query, key, cos.contiguous(), sin.contiguous(), *outputs
        strides = query.stride(1), query.stride(2), key.stride(1), key.stride(2)
        launcher.launch(-(-num_tokens // tokens) * (heads + kv_heads), tensors, strides, (num_tokens,))
    return outputs[0], outputs[1]


@lru_cache(maxsize=64)
def _rotation_launcher(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Launcher, int]:
    half = size // 2
    padded = 1 << (half - 1).bit_length()
    tokens = max(1, 1024 // padded)
    constants = {"HEADS": heads, "KV_HEADS": kv_heads, "HALF": half, "PADDED_HALF": padded, "TOKENS": tokens}
    # A fused multiply-add would leave out a rounding of transformers' code in half precision.
    return Launcher(rotate_kernel, constants, {"num_warps": 4, "enable_fp_fusion": False}), tokens


# The comparison


def _drawn(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Return random numbers on the device of a tensor, in its dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like.device, like.dtype)


def _is_alike(found: Tensor, expected: Tensor) -> bool:
    """Return whether numbers differ only as sums in another order do; in half precision most are equal then."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    eps = torch.finfo(found.dtype).eps
    gap = (found.double() - expected.double()).abs()
    allowed = LARGEST_GAP * eps * expected.double().abs().amax(dim=-1, keepdim=True)
    are_equal = found.dtype == torch.float32 or float((gap == 0).double().mean()) >= LEAST_EQUAL
    return are_equal and bool((gap <= allowed).all())
