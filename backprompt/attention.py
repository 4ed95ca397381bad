"""Attention over a packed forest: the only file that knows kernels.

Axes, everywhere in this library: layers, batch, heads (of queries), kv_heads, tokens (rows), head_dim, vocab.
A *kernel* attends slices of rows to slices of keys and returns the output and the log-sum-exp of the scores:

    kernel(query (heads, rows, head_dim), key (kv_heads, keys, head_dim), value (kv_heads, keys, value_dim),
           scaling, is_causal, mask (rows, keys) or None)  ->  output (rows, heads, value_dim), lse (rows, heads)

Partial results of one row over disjoint sets of keys are joined by their log-sum-exp: with w = sigmoid(b - a),
softmax over the union is `lerp(output_a, output_b, w)` and its log-sum-exp is `logaddexp(a, b)`. Keys that count n
times have log(n) added to their log-sum-exp. This is exact, as in "Hydragen" (Juravsky et al. 2024, arXiv 2402.05099)
and FlashAttention. Keys and values are used where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from backprompt.plan import Cross, Own, Pass

KernelOutput: TypeAlias = "tuple[Tensor, Tensor]"
CALL_MULTIPLICATIONS = 1_500_000
"""What a kernel call costs besides its products, in multiplications of a query and a key: about 65 us on two cores."""

WINDOW_CHUNK_ROWS = 512
"""Under a sliding window a long causal run is attended to in chunks of rows, so that its mask stays small."""


class Kernel(Protocol):
    """The contract of a kernel; shapes are at the top of this file."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool, mask: Tensor | None
    ) -> KernelOutput:
        """Attend `query` to `key` and `value`."""
        ...


class KeysValues(Protocol):
    """A block of computed rows: `keys[layer]` and `values[layer]`, each `(kv_heads, rows, head_dim)`."""

    keys: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True)
class Scoring:
    """What a layer does to its scores besides scaling.

    `window`: a query sees keys fewer than this many positions back. `softcap`: scores become
    `softcap * tanh(score / softcap)`. `sinks`: one score a head `(heads,)` that takes part in the softmax and has no
    value.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """One kernel call: these rows against these rows of keys. `block` is None for the keys of the pass itself."""

    rows: slice
    block: KeysValues | None
    keys: slice
    is_causal: bool
    mask: Tensor | None  # additive, (rows, keys)
    is_first: bool  # of its rows: what follows is joined to it
    times: int = 1  # how often each key counts
    blind: Tensor | None = None  # which rows see none of the keys, (rows, 1)

    @property
    def num_pairs(self) -> int:
        """How many pairs of a row and a key it multiplies."""
        return _num_pairs(self.rows, self.keys)


class PackedAttention:
    """Attention for one pass: built once, called once a layer."""

    def __init__(self, pass_: Pass, kernel: Kernel, dtype: torch.dtype, device: torch.device) -> None:
        self._pass = pass_
        self._kernel = kernel
        self._dtype = dtype
        self._device = device
        self._positions = pass_.positions
        self._prepared: dict[tuple[int | None, int], list[_Call]] = {}

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the forest, `(tokens, heads, value_dim)`, in the dtype of `query`.

        Shapes: query `(heads, tokens, head_dim)`, key and value `(kv_heads, tokens, head_dim or value_dim)`.
        """
        kernel: Kernel = self._kernel if scoring.softcap is None else partial(clear_kernel, softcap=scoring.softcap)
        joined = _Joined(query, value)
        for call in self._calls(scoring.window, query.shape[0] * query.shape[2]):
            keys, values = (
                (key, value) if call.block is None else (call.block.keys[layer_idx], call.block.values[layer_idx])
            )
            output, lse = kernel(
                query[:, call.rows],
                keys[:, call.keys],
                values[:, call.keys],
                scoring.scaling,
                call.is_causal,
                call.mask,
            )
            if call.is_first:
                joined.start_with(call.rows, output, lse)
            else:
                if call.blind is not None:
                    output, lse = output.masked_fill(call.blind[..., None], 0), lse.masked_fill(call.blind, -math.inf)
                joined.add(call.rows, output, lse + math.log(call.times) if call.times > 1 else lse)
        return joined.result(scoring.sinks)

    def _calls(self, window: int | None, multiplications_a_pair: int) -> list[_Call]:
        """Return the kernel calls of a layer; prepared once for all layers with the same window and heads."""
        key = window, multiplications_a_pair
        if key not in self._prepared:
            calls = [call for own in self._pass.own for call in self._own_calls(own, window)]
            crosses = [call for cross in self._pass.cross for call in self._cross_calls(cross, window)]
            calls += map(self._together, _neighbours(crosses, CALL_MULTIPLICATIONS // multiplications_a_pair))
            self._prepared[key] = calls
        return self._prepared[key]

    def _together(self, calls: Sequence[_Call]) -> _Call:
        """Return one call for several of the same block, under a mask that hides from each row what is not its own."""
        if len(calls) == 1 and calls[0].mask is None:
            return calls[0]
        rows, keys = _union([call.rows for call in calls]), _union([call.keys for call in calls])
        shape = (rows.stop - rows.start, keys.stop - keys.start)
        visible = torch.zeros(shape, dtype=torch.bool, device=self._device)
        for call in calls:
            seen = visible[call.rows.start - rows.start : call.rows.stop - rows.start]
            seen = seen[:, call.keys.start - keys.start : call.keys.stop - keys.start]
            seen |= True if call.mask is None else call.mask == 0
        blind = ~visible.any(dim=1, keepdim=True)
        return replace(
            calls[0],
            rows=rows,
            keys=keys,
            mask=self._additive_mask(visible),
            blind=blind if bool(blind.any()) else None,
        )

    def _own_calls(self, own: Own, window: int | None) -> Iterator[_Call]:
        rows = slice(own.start, own.stop)
        if own.visible_until is not None:
            idx = torch.arange(own.start, own.stop, device=self._device)
            until = torch.tensor(own.visible_until, device=self._device)
            visible = (idx <= idx[:, None]) & (idx[:, None] < until)
            if window is not None:
                visible &= self._distances(rows, self._positions[rows]) < window
            yield _Call(rows, None, rows, False, self._additive_mask(visible), is_first=True)
        elif window is None or own.stop - own.start <= window:
            yield _Call(rows, None, rows, True, None, is_first=True)
        else:
            for start in range(own.start, own.stop, WINDOW_CHUNK_ROWS):
                chunk = slice(start, min(start + WINDOW_CHUNK_ROWS, own.stop))
                keys = slice(max(own.start, start - window + 1), chunk.stop)
                distances = self._distances(chunk, self._positions[keys])
                mask = self._additive_mask((distances >= 0) & (distances < window))
                yield _Call(chunk, None, keys, False, mask, is_first=True)

    def _cross_calls(self, cross: Cross, window: int | None) -> Iterator[_Call]:
        rows = slice(cross.start, cross.stop)
        block: KeysValues | None = cross.block  # type: ignore[assignment]  # the plan does not look into blocks
        if window is None:
            keys = slice(cross.key_start, cross.key_stop)
            yield _Call(rows, block, keys, False, None, is_first=False, times=cross.times)
            return
        first, last = min(self._positions[rows]), max(self._positions[rows])
        num_hidden = max(0, first - window + 1 - cross.key_position)  # keys that no row sees any more
        keys = slice(cross.key_start + num_hidden, cross.key_stop)
        if keys.start >= keys.stop:
            return
        key_position = cross.key_position + num_hidden
        mask = None
        if last - key_position >= window:
            distances = self._distances(rows, list(range(key_position, key_position + keys.stop - keys.start)))
            mask = self._additive_mask(distances < window)
        yield _Call(rows, block, keys, False, mask, is_first=False, times=cross.times)

    def _distances(self, rows: slice, key_positions: list[int]) -> Tensor:
        """Return how many positions each key lies back from each row, `(rows, keys)`."""
        positions = torch.tensor(self._positions[rows], device=self._device)
        return positions[:, None] - torch.tensor(key_positions, device=self._device)

    def _additive_mask(self, visible: Tensor) -> Tensor:
        return additive_mask(visible, self._dtype)


def _neighbours(calls: Sequence[_Call], pairs_a_call: int) -> list[list[_Call]]:
    """Group calls whose keys lie near each other in a block, where one call for all of them costs less.

    It multiplies all rows by all keys between the first and the last, and saves a call's other costs, worth
    `pairs_a_call` pairs, for each but one.
    """
    groups: list[list[_Call]] = []
    last_of: dict[tuple[int, int], _Shared] = {}
    for call in sorted(calls, key=lambda call: call.keys.start):
        last = last_of.get((id(call.block), call.times))
        if last is not None and last.can_take(call, pairs_a_call):
            last.take(call, pairs_a_call)
        else:
            group = [call]
            groups.append(group)
            last_of[id(call.block), call.times] = _Shared(group, call.rows, call.keys, call.num_pairs)
    return groups


@dataclass
class _Shared:
    """Calls that are to be one: their rows, their keys, and the pairs that they may multiply together."""

    calls: list[_Call]
    rows: slice
    keys: slice
    num_pairs: int

    def can_take(self, call: _Call, pairs_a_call: int) -> bool:
        """Return whether one call more costs less within this one than on its own."""
        together = _num_pairs(_union([self.rows, call.rows]), _union([self.keys, call.keys]))
        return together <= self.num_pairs + call.num_pairs + pairs_a_call

    def take(self, call: _Call, pairs_a_call: int) -> None:
        """Add a call."""
        self.calls.append(call)
        self.rows, self.keys = _union([self.rows, call.rows]), _union([self.keys, call.keys])
        self.num_pairs += call.num_pairs + pairs_a_call


def _num_pairs(rows: slice, keys: slice) -> int:
    num_rows: int = rows.stop - rows.start
    num_keys: int = keys.stop - keys.start
    return num_rows * num_keys


def _union(slices: Sequence[slice]) -> slice:
    return slice(min(piece.start for piece in slices), max(piece.stop for piece in slices))


class _Joined:
    """The running join of partial results; float32 unless the model computes in float64."""

    def __init__(self, query: Tensor, value: Tensor) -> None:
        heads, tokens, _ = query.shape
        self._dtype = query.dtype
        accumulate = torch.promote_types(query.dtype, torch.float32)
        self._output = torch.empty((tokens, heads, value.shape[-1]), dtype=accumulate, device=query.device)
        self._lse = torch.empty((tokens, heads), dtype=accumulate, device=query.device)

    def start_with(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        self._output[rows] = output
        self._lse[rows] = lse

    def add(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        so_far = self._lse[rows]
        self._output[rows].lerp_(output.to(self._output.dtype), torch.sigmoid(lse - so_far)[..., None])
        torch.logaddexp(so_far, lse.to(so_far.dtype), out=so_far)

    def result(self, sinks: Tensor | None) -> Tensor:
        if sinks is not None:
            self._output *= torch.sigmoid(self._lse - sinks)[..., None]
        return self._output.to(self._dtype)


# Kernels


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `visible` (rows, keys) and -inf elsewhere; rows lie aligned to 16 elements, for CUDA."""
    rows, keys = visible.shape
    mask = torch.zeros((rows, -(-keys // 16) * 16), dtype=dtype, device=visible.device)[:, :keys]
    return mask.masked_fill_(~visible, -math.inf)


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
    """The clear version, with matmul and softmax in float32 at least: reference and fallback."""
    heads, rows, head_dim = query.shape
    kv_heads, keys, value_dim = value.shape
    accumulate = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(kv_heads, heads // kv_heads * rows, head_dim)  # the group is folded into the rows
    scores = (grouped.to(accumulate) @ key.to(accumulate).transpose(1, 2)).mul_(scaling)
    scores = scores.view(heads, rows, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        mask = additive_mask(torch.ones((rows, keys), dtype=torch.bool, device=query.device).tril(), accumulate)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(dim=-1, keepdim=True)  # (heads, rows, 1)
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(accumulate).min))  # a row that sees nothing: all zeros
    output = weights.view(kv_heads, -1, keys) @ value.to(accumulate)
    return output.view(heads, rows, value_dim).transpose(0, 1).to(query.dtype), lse[..., 0].transpose(0, 1)


def _flash_cpu_kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool, mask: Tensor | None
) -> KernelOutput:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None],
        key[None],
        value[None],
        0.0,
        is_causal,
        attn_mask=None if mask is None else mask[None, None],
        scale=scaling,
    )
    return output[0].transpose(0, 1), lse[0].transpose(0, 1)


def _efficient_cuda_kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool, mask: Tensor | None
) -> KernelOutput:
    heads, rows, _ = query.shape
    kv_heads, keys, value_dim = value.shape
    group = heads // kv_heads
    # Grouped heads: kv_heads is the batch, and the keys are expanded, not repeated, over the group.
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


_FAST_KERNELS: dict[str, tuple[str, Kernel]] = {
    "cpu": ("flash_cpu", _flash_cpu_kernel),
    "cuda": ("efficient_cuda", _efficient_cuda_kernel),
}


@dataclass(frozen=True)
class ChosenKernel:
    """The kernel that serves, and its name; a name other than a fast kernel's says why the clear one serves."""

    name: str
    kernel: Callable[..., KernelOutput]


@lru_cache(maxsize=64)
def choose_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> ChosenKernel:
    """Return the device's fast kernel if it agrees with the clear one on a tiny case, else the clear one.

    The fast kernels are private operations of torch: one that is missing, refuses its arguments or gives other
    numbers is not used.
    """
    if device.type not in _FAST_KERNELS:
        return ChosenKernel("clear", clear_kernel)
    name, kernel = _FAST_KERNELS[device.type]
    try:
        gap = _largest_gap(kernel, device, dtype, heads, kv_heads, head_dim)
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernel, and the choice is remembered
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ChosenKernel(f"clear ({name} failed: {reason})", clear_kernel)
    if not gap <= 32 * torch.finfo(dtype).eps:
        return ChosenKernel(f"clear ({name} was off by {gap:.1e})", clear_kernel)
    return ChosenKernel(name, kernel)


def _largest_gap(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> float:
    """Return the largest absolute gap between a kernel and the clear one: causal, unmasked and masked, 5 rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int, rows: int) -> Tensor:
        # Laid out as models do: heads are interleaved in each row.
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
        for fast, clear in zip(kernel(*case), clear_kernel(*case), strict=True):
            gaps.append((fast.float() - clear.float()).abs().max())
    return float(torch.stack(gaps).max())  # nan stays nan
