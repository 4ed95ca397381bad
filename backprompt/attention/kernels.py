"""Kernels: attention of a slice of rows over a slice of keys, with the log-sum-exp of the scores.

kernel(query (heads, rows, head_dim), key (kv_heads, keys, head_dim), value (kv_heads, keys, value_dim),
       scaling, is_causal, mask (rows, keys) or None)  ->  output (rows, heads, value_dim), lse (rows, heads)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

KernelOutput: TypeAlias = "tuple[Tensor, Tensor]"


class Kernel(Protocol):
    """The contract of a kernel; shapes are at the top of this file."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool, mask: Tensor | None
    ) -> KernelOutput:
        """Return the attention of `query` to `key` and `value`, and the log-sum-exp of the scores."""
        ...


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of 0 where `visible`, `(rows, keys)`, is true and -inf elsewhere; `aligned` on CUDA."""
    mask = torch.where(visible, torch.zeros((), dtype=dtype, device=visible.device), -math.inf)
    return aligned(mask) if visible.is_cuda else mask


def aligned(mask: Tensor) -> Tensor:
    """Return a mask with rows aligned to 16 elements, for CUDA."""
    keys = mask.shape[1]
    return torch.nn.functional.pad(mask, (0, -keys % 16))[:, :keys]


def clear_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    is_causal: bool,
    mask: Tensor | None,
    *,
    softcap: float | None = None,
) -> KernelOutput:
    """Compute attention plainly, with matmul and softmax in float32 at least: reference and fallback."""
    heads, rows, _ = query.shape
    kv_heads, keys, value_dim = value.shape
    scores = scores_of(query, key, scaling, softcap)
    accumulate = scores.dtype
    if is_causal:
        mask = additive_mask(torch.ones((rows, keys), dtype=torch.bool, device=query.device).tril(), accumulate)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(dim=-1, keepdim=True)  # (heads, rows, 1)
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(accumulate).min))  # all zeros for a row that sees no key
    output = weights.view(kv_heads, -1, keys) @ value.to(accumulate)
    return output.view(heads, rows, value_dim).transpose(0, 1).to(query.dtype), lse[..., 0].transpose(0, 1)


def scores_of(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Return all scores before any mask, `(heads, rows, keys)`, in float32 at least; shapes as above."""
    heads, rows, head_dim = query.shape
    kv_heads, keys, _ = key.shape
    accumulate = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(kv_heads, heads // kv_heads * rows, head_dim)  # the group is folded into the rows
    scores = (grouped.to(accumulate) @ key.to(accumulate).transpose(1, 2)).mul_(scaling).view(heads, rows, keys)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _flash_cpu_kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool, mask: Tensor | None
) -> KernelOutput:
    output, lse = torch._scaled_dot_product_flash_attention_for_cpu(
        query[None],
        key[None],
        value[None],
        0.0,
        is_causal,
        attn_mask=mask,
        scale=scaling,
    )
    return output[0].transpose(0, 1), lse[0].transpose(0, 1)


def _efficient_cuda_kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool, mask: Tensor | None
) -> KernelOutput:
    heads, rows, _ = query.shape
    kv_heads, keys, value_dim = value.shape
    group = heads // kv_heads
    # Grouped heads: kv_heads is the batch, and the keys are expanded over the group, not repeated.
    output, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query.view(kv_heads, group, rows, -1),
        key[:, None].expand(-1, group, -1, -1),
        value[:, None].expand(-1, group, -1, -1),
        None if mask is None else mask.expand(kv_heads, group, rows, keys),
        True,
        0.0,
        is_causal,
        scale=scaling,
    )
    lse = lse[..., :rows].reshape(heads, rows)  # the kernel pads its log-sum-exp to whole blocks of rows
    return output.reshape(heads, rows, value_dim).transpose(0, 1), lse.transpose(0, 1)


FAST_KERNELS: dict[str, tuple[str, Kernel]] = {
    "cpu": ("flash_cpu", _flash_cpu_kernel),
    "cuda": ("efficient_cuda", _efficient_cuda_kernel),
}


@dataclass(frozen=True)
class ChosenKernel:
    """The kernel in use and its name; the name of the clear kernel gives the reason why it is used."""

    name: str
    kernel: Callable[..., KernelOutput]


@lru_cache(maxsize=64)
def choose_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> ChosenKernel:
    """Return the device's fast kernel if it agrees with the clear kernel on a tiny case, else the clear kernel.

    The fast kernels are private operations of torch: a fast kernel that is missing, refuses its arguments or gives
    other numbers is not used.
    """
    if device.type not in FAST_KERNELS:
        return ChosenKernel("clear", clear_kernel)
    name, kernel = FAST_KERNELS[device.type]
    try:
        gap = _largest_gap(kernel, device, dtype, heads, kv_heads, head_dim)
    except torch.OutOfMemoryError:
        raise  # this error says nothing about the kernel, and the choice is cached
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ChosenKernel(f"clear ({name} failed: {reason})", clear_kernel)
    if not gap <= 32 * torch.finfo(dtype).eps:
        return ChosenKernel(f"clear ({name} was off by {gap:.1e})", clear_kernel)
    return ChosenKernel(name, kernel)


def _largest_gap(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> float:
    """Return the largest absolute gap between a kernel and the clear kernel: causal, unmasked and masked, 5 rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int, rows: int) -> Tensor:
        # The layout of models: heads are interleaved in each row.
        drawn = torch.randn((rows, num_heads, head_dim), generator=generator).to(device=device, dtype=dtype)
        return drawn.transpose(0, 1)

    query, key, value = draw(heads, 5), draw(kv_heads, 5), draw(kv_heads, 5)
    long_key, long_value = draw(kv_heads, 19), draw(kv_heads, 19)
    visible = torch.eye(5, dtype=torch.bool, device=device)
    visible[:, 0] = True
    mask = additive_mask(visible, dtype)
    gaps = []
    for case in (
        (query, key, value, 0.3, True, None),
        (query, long_key, long_value, 0.3, False, None),
        (query, key, value, 0.3, False, mask),
    ):
        exact = clear_kernel(case[0].double(), *case[1:])  # torch multiplies no float64 in TF32
        for fast, clear in zip(kernel(*case), exact, strict=True):
            gaps.append((fast.float() - clear.float()).abs().max())
    return float(torch.stack(gaps).max())  # nan stays nan
