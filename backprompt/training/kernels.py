"""Kernels with a backward: attention of a slice of rows over a slice of keys, and the gradients of the slice.

The forward kernels are those of `attention/kernels.py`. A row may see keys of several slices, and the results are
joined. A backward kernel is given the *joined* output and log-sum-exp: exp(score - joined lse) is the weight of a key
in the softmax over all keys. So the gradients of the slices add up to those of the whole, as in "Ring Attention"
(Liu et al. 2023, arXiv 2310.01889).

backward(grad (rows, heads, value_dim), query, key, value, output (rows, heads, value_dim), lse (rows, heads),
         scaling, is_causal, mask)  ->  gradients of query, key and value
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeAlias

import torch
from torch import Tensor

from backprompt.attention.kernels import FAST_KERNELS, KernelOutput, additive_mask, clear_kernel

Gradients: TypeAlias = "tuple[Tensor, Tensor, Tensor]"


@dataclass(frozen=True)
class Pair:
    """A kernel and its backward; the name of a clear pair may include the reason why it is used."""

    name: str
    forward: Callable[..., KernelOutput]
    backward: Callable[..., Gradients]
    is_fast: bool = False


def clear_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scaling: float,
    is_causal: bool,
    mask: Tensor | None,
    *,
    softcap: float | None = None,
) -> Gradients:
    """Compute the gradients plainly, with matmul in float32 at least: reference and fallback."""
    heads, rows, _ = query.shape
    kv_heads, keys, _ = value.shape
    accumulate = torch.promote_types(query.dtype, torch.float32)

    def folded(given: Tensor) -> Tensor:
        """The group is folded into the rows: `(heads, rows, dim)` -> `(kv_heads, group * rows, dim)`."""
        return given.to(accumulate).reshape(kv_heads, heads // kv_heads * rows, -1)

    queries, grads, outputs = folded(query), folded(grad.transpose(0, 1)), folded(output.transpose(0, 1))
    wide_key, wide_value = key.to(accumulate), value.to(accumulate)
    scores = (queries @ wide_key.transpose(1, 2)) * scaling  # (kv_heads, group * rows, keys)
    bent = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if is_causal:
        mask = additive_mask(torch.ones((rows, keys), dtype=torch.bool, device=query.device).tril(), accumulate)
    seen = bent if mask is None else (bent.view(heads, rows, keys) + mask).view_as(bent)
    weights = torch.exp(seen - folded(lse.transpose(0, 1)[..., None]))
    slopes = weights * (grads @ wide_value.transpose(1, 2) - (grads * outputs).sum(dim=-1, keepdim=True))
    if softcap is not None:
        slopes = slopes * (1 - (bent / softcap) ** 2)
    slopes = slopes * scaling
    grad_query = (slopes @ wide_key).view(heads, rows, -1)
    grad_key, grad_value = slopes.transpose(1, 2) @ queries, weights.transpose(1, 2) @ grads
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _flash_cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scaling: float,
    is_causal: bool,
    mask: Tensor | None,
) -> Gradients:
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.transpose(0, 1)[None],
        query[None],
        key[None],
        value[None],
        output.transpose(0, 1)[None],
        lse.transpose(0, 1)[None],
        0.0,
        is_causal,
        attn_mask=None if mask is None else mask[None, None],
        scale=scaling,
    )
    return grads[0][0], grads[1][0], grads[2][0]


def _efficient_cuda_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scaling: float,
    is_causal: bool,
    mask: Tensor | None,
) -> Gradients:
    heads, rows, _ = query.shape
    kv_heads, keys, _ = value.shape
    groups = (kv_heads, heads // kv_heads)  # kv_heads is the batch, and the keys are expanded over the group

    def by_group(given: Tensor) -> Tensor:
        return given.reshape(*groups, *given.shape[1:])

    lse = torch.nn.functional.pad(lse.transpose(0, 1), (0, -rows % 32))  # whole blocks of rows, as in the forward
    no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        by_group(grad.contiguous().transpose(0, 1)),
        by_group(query),
        key[:, None].expand(-1, groups[1], -1, -1),
        value[:, None].expand(-1, groups[1], -1, -1),
        None if mask is None else mask.expand(*groups, rows, keys),
        by_group(output.transpose(0, 1)),
        by_group(lse),
        no_dropout,
        no_dropout,
        0.0,
        [True, True, True, False],
        is_causal,
        scale=scaling,
    )
    return grads[0].flatten(0, 1), grads[1].sum(dim=1), grads[2].sum(dim=1)


FAST_BACKWARDS: dict[str, Callable[..., Gradients]] = {"cpu": _flash_cpu_backward, "cuda": _efficient_cuda_backward}


def clear_pair(softcap: float | None = None) -> Pair:
    """Return the clear pair, which is right on any device; `softcap`: the soft cap of a layer's scores, or None."""
    if softcap is None:
        return Pair("clear", clear_kernel, clear_backward)
    return Pair("clear (soft cap)", partial(clear_kernel, softcap=softcap), partial(clear_backward, softcap=softcap))


def pair_for(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Pair:
    """Return the pair for such tensors: the device's fast pair if it supports them and agrees with the clear pair."""
    if softcap is not None:
        return clear_pair(softcap)
    if key.shape[-1] != value.shape[-1]:
        return Pair("clear (keys and values differ in size)", clear_kernel, clear_backward)
    return choose_pair(query.device, query.dtype, query.shape[0], key.shape[0], key.shape[-1])


@lru_cache(maxsize=64)
def choose_pair(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> Pair:
    """Return the device's fast pair if it agrees with the clear pair on a tiny case, else the clear pair.

    The fast kernels are private operations of torch, like those of `attention/kernels.py`.
    """
    if device.type not in FAST_BACKWARDS:
        return clear_pair()
    name, forward = FAST_KERNELS[device.type]
    fast = Pair(name, forward, FAST_BACKWARDS[device.type], is_fast=True)
    try:
        gap = _largest_gap(fast, device, dtype, heads, kv_heads, head_dim)
    except torch.OutOfMemoryError:
        raise  # this error says nothing about the kernel, and the choice is cached
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Pair(f"clear ({name} failed: {reason})", clear_kernel, clear_backward)
    if not gap <= 64 * torch.finfo(dtype).eps:
        return Pair(f"clear ({name} was off by {gap:.1e})", clear_kernel, clear_backward)
    return fast


def _largest_gap(
    fast: Pair, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> float:
    """Return the largest gap between a pair and the clear pair: 70 rows over 40 keys, causal and masked."""
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int, rows: int) -> Tensor:
        # The layout of models: heads are interleaved in each row.
        drawn = torch.randn((rows, num_heads, head_dim), generator=generator, device="cpu").to(device, dtype)
        return drawn.transpose(0, 1)

    query, key, value = draw(heads, 70), draw(kv_heads, 40), draw(kv_heads, 40)
    grad = draw(heads, 70).transpose(0, 1)
    visible = torch.ones((70, 40), dtype=torch.bool, device=device).tril().triu(-30)
    visible[:, 7] = True  # every row sees some key
    scaling = head_dim**-0.5
    gaps = []
    exact_query = query.double()  # torch multiplies no float64 in TF32
    for is_causal, mask in ((True, None), (False, additive_mask(visible, dtype))):
        exact = clear_kernel(exact_query, key, value, scaling, is_causal, mask)
        found = fast.forward(query, key, value, scaling, is_causal, mask)
        gaps += [_gap(*both) for both in zip(found, exact, strict=True)]
        # The log-sum-exp over more keys than these, as of a row that sees other slices, too.
        output, lse = exact[0].to(dtype), (exact[1] + math.log(2)).to(torch.promote_types(dtype, torch.float32))
        given = (key, value, output, lse, scaling, is_causal, mask)
        both_ways = fast.backward(grad, query, *given), clear_backward(grad, exact_query, *given)
        gaps += [_gap(*both) for both in zip(*both_ways, strict=True)]
    return float(torch.stack(gaps).max())  # nan stays nan


def _gap(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1)
