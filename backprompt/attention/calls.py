"""Attention over a packed forest by one kernel call for each slice of keys.

Partial results of one row over disjoint sets of keys are joined by their log-sum-exp: with w = sigmoid(b - a),
softmax over the union is `lerp(output_a, output_b, w)` and its log-sum-exp is `logaddexp(a, b)`. For keys that count n
times, log(n) is added to their log-sum-exp. The join is exact, as in "Hydragen" (Juravsky et al. 2024,
arXiv 2402.05099) and FlashAttention. Keys and values are read in place, without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.attention.base import Scoring
from backprompt.attention.kernels import (
    ChosenKernel,
    Kernel,
    KernelOutput,
    additive_mask,
    aligned,
    choose_kernel,
    clear_kernel,
)
from backprompt.forest.plan import Call, Pass
from backprompt.forest.steps import kept, later, places_of
from backprompt.transfers import on_device

Ints: TypeAlias = "npt.NDArray[np.int64]"


class Layers(Protocol):
    """Keys and values of computed rows."""

    def layer(self, layer_idx: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the keys and values of some rows of a layer, each `(kv_heads, rows, head_dim)`."""
        ...


class CallsAttention:
    """A `ForestAttention` that makes the calls of the plan one after the other.

    Args:
        kernel: the kernel of each call; by default the device's fast kernel for the model's heads, if it agrees with
            the clear kernel.
        reason: why the calls are used instead of a faster attention; the name includes the reason.

    """

    def __init__(self, kernel: ChosenKernel | None = None, reason: str | None = None) -> None:
        self._given = kernel
        self._reason = reason
        self.name = "none yet"

    def prepare(self, pass_: Pass, num_steps: int = 1) -> PreparedCalls:
        """Return the attention of a pass, for one or several steps; see `ForestAttention.prepare`."""
        return PreparedCalls(self, pass_, num_steps)

    def standing(self, num_rows: int) -> None:
        """Return None: the calls differ from step to step."""

    def kernel_for(self, query: Tensor, key: Tensor, value: Tensor) -> Kernel:
        """Return the kernel for such tensors; shapes are those of `PreparedAttention.attend`."""
        if self._given is not None:
            chosen = self._given
        elif key.shape[-1] != value.shape[-1]:
            chosen = ChosenKernel("clear (keys and values differ in size)", clear_kernel)
        else:
            chosen = choose_kernel(query.device, query.dtype, query.shape[0], key.shape[0], key.shape[-1])
        self.name = chosen.name if self._reason is None else f"{chosen.name} ({self._reason})"
        return chosen.kernel


@dataclass
class _Masked:
    """A call of the plan with its mask.

    Attributes:
        call: the call.
        keys: the keys of the next step.
        mask: additive, `(rows, keys)`, with room for the keys of later steps; None if every row sees every key.
        blind: which rows see none of the keys, `(rows, 1)`; None if every row sees some.
        next_keys: for the rows that see one more key in each step, the row and the next key, `(2, rows)`, both counted
            from the first of the call.
        last_stop: the key behind the last key that such a row sees.

    """

    call: Call
    keys: slice
    mask: Tensor | None = None
    blind: Tensor | None = None
    next_keys: Tensor | None = None
    last_stop: int = 0

    @property
    def seen(self) -> Tensor | None:
        """The mask of the keys."""
        if self.mask is None or not self.last_stop:
            return self.mask
        return self.mask[:, : self.keys.stop - self.keys.start]

    def advance(self) -> None:
        """Let the growing rows see one key more."""
        self.last_stop += 1
        self.keys = slice(self.keys.start, max(self.keys.stop, self.last_stop))
        if self.mask is not None and self.next_keys is not None:
            rows, keys = self.next_keys
            self.mask[rows, keys] = 0
            keys += 1

    def keep(self, rows: Sequence[int], places: Sequence[int]) -> None:
        """Keep only these rows of the pass; `places`: see `steps.places_of`."""
        call = self.call
        self.call = replace(call, rows=slice(places[call.rows.start], places[call.rows.stop]))
        if call.is_own:
            self.keys = self.call.rows
        if self.mask is None:
            return
        own = [row - call.rows.start for row in rows if call.rows.start <= row < call.rows.stop]
        stay = torch.tensor(own).to(self.mask.device)
        self.mask = aligned(self.mask[stay][:, stay] if call.is_own else self.mask[stay])
        if self.blind is not None:
            self.blind = self.blind[stay]
        if self.next_keys is not None:
            place_of = {row: place for place, row in enumerate(own)}
            growing = [(place_of[row], key) for row, key in self.next_keys.T.tolist() if row in place_of]
            self.next_keys = torch.tensor(growing, dtype=torch.long).reshape(-1, 2).T.contiguous().to(self.mask.device)


class PreparedCalls:
    """The calls of a pass; masks are made once for all layers with the same window and heads.

    For several steps of a generation, masks are also made once: a mask has room for the coming keys, and each step
    shows the next keys to their rows. Only the calls under a window are planned again in each step.
    """

    def __init__(self, attention: CallsAttention, pass_: Pass, num_steps: int = 1) -> None:
        self._attention = attention
        self._pass = pass_
        self._steps_left = num_steps
        self._num_done = 0
        self._prepared: dict[tuple[int | None, int, torch.dtype], list[_Masked]] = {}

    def advance(self, rows: Sequence[int] | None = None) -> None:
        """Advance to the next step; see `PreparedAttention.advance`."""
        self._num_done += 1
        self._steps_left -= 1
        self._prepared = {key: calls for key, calls in self._prepared.items() if key[0] is None}
        if rows is not None:
            self._keep(rows)
        for calls in self._prepared.values():
            for masked in calls:
                if masked.last_stop:
                    masked.advance()

    def _keep(self, rows: Sequence[int]) -> None:
        places = places_of(rows, len(self._pass.spans))
        self._pass = kept(self._pass, rows)
        for key, calls in self._prepared.items():
            stay = [masked for masked in calls if places[masked.call.rows.start] < places[masked.call.rows.stop]]
            for masked in stay:
                masked.keep(rows, places)
            self._prepared[key] = stay

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the forest; see `PreparedAttention.attend`."""
        kernel = self._attention.kernel_for(query, key, value)
        if scoring.softcap is not None:
            kernel = partial(clear_kernel, softcap=scoring.softcap)

        calls = self._calls(query, scoring.window)
        if len(calls) == 1 and scoring.sinks is None:  # one run of rows that see no other keys
            output, _ = kernel(query, key, value, scoring.scaling, calls[0].call.is_causal, calls[0].seen)
            return output.contiguous()

        def result_of(masked: _Masked) -> KernelOutput:
            call = masked.call
            if call.block is None:
                keys, values = key[:, masked.keys], value[:, masked.keys]
            else:
                keys, values = cast(Layers, call.block).layer(layer_idx, masked.keys)  # the plan does not read blocks
            return kernel(query[:, call.rows], keys, values, scoring.scaling, call.is_causal, masked.seen)

        joined = Joined.of([result_of(masked) for masked in calls if masked.call.is_own])
        for masked in calls:
            if masked.call.is_own:
                continue
            output, lse = result_of(masked)
            if masked.blind is not None:
                output, lse = output.masked_fill(masked.blind[..., None], 0), lse.masked_fill(masked.blind, -math.inf)
            times = masked.call.times
            joined.add(masked.call.rows, output, lse + math.log(times) if times > 1 else lse)
        return joined.result(scoring.sinks)

    def _calls(self, query: Tensor, window: int | None) -> list[_Masked]:
        multiplications_a_pair = query.shape[0] * query.shape[2]
        key = window, multiplications_a_pair, query.dtype
        if key not in self._prepared:
            planned = later(self._pass, self._num_done) if self._num_done else self._pass
            calls = planned.calls(window, multiplications_a_pair)
            positions = np.array([] if window is None else planned.positions, dtype=np.int64)
            known: dict[bytes, Tensor] = {}  # fans of one shape have one mask
            self._prepared[key] = [self._masked(call, query, positions, known) for call in calls]
        return self._prepared[key]

    def _masked(self, call: Call, query: Tensor, positions: Ints, known: dict[bytes, Tensor]) -> _Masked:
        """Return a call with its mask.

        `positions`: those of the rows of the pass, for a window. `known`: the masks of trees of rows, for equal trees.
        """
        last_stop = max((segment.key_stop for segment in call.segments if segment.grows), default=0)
        if not call.needs_mask:
            return _Masked(call, call.keys, last_stop=last_stop)
        if call.is_own and call.window is None and not last_stop:
            until = np.array(call.segments[0].visible_until, dtype=np.int32) - call.rows.start
            mask = known.get(until.tobytes())
            if mask is None:
                visible = on_device(_visible_tree(until), query.device)
                mask = known[until.tobytes()] = additive_mask(visible, query.dtype)
            return _Masked(call, call.keys, mask)
        seen = _visible(call, positions)
        visible, sees_some = on_device(seen, query.device), seen.max(axis=1, keepdims=True)
        blind = None if call.is_own or sees_some.all() else on_device(~sees_some, query.device)
        if call.window is not None or not last_stop:
            return _Masked(call, call.keys, additive_mask(visible, query.dtype), blind)
        visible = torch.nn.functional.pad(visible, (0, self._steps_left - 1))  # the keys to come
        next_keys = _next_keys(call).to(query.device)
        return _Masked(call, call.keys, additive_mask(visible, query.dtype), blind, next_keys, last_stop)


def _next_keys(call: Call) -> Tensor:
    """Return the growing rows of a call and the next key of each, `(2, rows)`; see `_Masked`."""
    growing = [
        (row - call.rows.start, segment.key_stop - call.keys.start)
        for segment in call.segments
        if segment.grows
        for row in range(segment.start, segment.stop)
    ]
    return torch.tensor(growing).T.contiguous()


def _visible(call: Call, positions: Ints) -> npt.NDArray[np.bool_]:
    """Return which rows of a call see which of its keys, `(rows, keys)`; `positions` are those of the pass's rows."""
    return _visible_own(call, positions) if call.is_own else _visible_others(call, positions)


def _visible_tree(until: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Return which rows see which rows, `(rows, rows)`; `until`: for each row, the row behind the last that sees it."""
    row_idx = np.arange(len(until), dtype=until.dtype)
    visible: npt.NDArray[np.bool_] = row_idx[:, None] < until
    visible &= row_idx <= row_idx[:, None]
    return visible


def _visible_own(call: Call, positions: Ints) -> npt.NDArray[np.bool_]:
    """Return which rows of a segment see which of the segment's own rows."""
    (segment,) = call.segments
    row_idx = np.arange(call.rows.start, call.rows.stop)[:, None]
    visible: npt.NDArray[np.bool_] = np.arange(call.keys.start, call.keys.stop) <= row_idx
    if segment.visible_until is not None:
        visible &= row_idx < np.array(segment.visible_until[_shifted(call.keys, -segment.key_start)])
    if call.window is not None:
        visible &= positions[call.rows][:, None] - positions[call.keys] < call.window
    return visible


def _visible_others(call: Call, positions: Ints) -> npt.NDArray[np.bool_]:
    """Return which rows see which keys of segments that are not their own."""
    visible = np.zeros((call.rows.stop - call.rows.start, call.keys.stop - call.keys.start), dtype=np.bool_)
    for segment in call.segments:
        rows = _shifted(slice(segment.start, segment.stop), -call.rows.start)
        keys = _shifted(slice(segment.key_start, segment.key_stop), -call.keys.start)
        if call.window is None:
            visible[rows, keys] = True
        else:
            key_positions = np.arange(keys.stop - keys.start) + segment.key_position
            distance = positions[segment.start : segment.stop, None] - key_positions
            visible[rows, keys] |= distance < call.window
    return visible


def _shifted(piece: slice, by: int) -> slice:
    return slice(piece.start + by, piece.stop + by)


class Joined:
    """The running join of partial results, `(tokens, heads, value_dim)` and `(tokens, heads)`, in float32 at least."""

    def __init__(self, output: Tensor, lse: Tensor) -> None:
        self._dtype = output.dtype
        accumulate = torch.promote_types(output.dtype, torch.float32)
        self._output, self.lse = output.to(accumulate), lse.to(accumulate)

    @classmethod
    def of(cls, parts: Sequence[KernelOutput]) -> Joined:
        """Return the first partial results of all rows, in the order of the rows."""
        return cls(*(each[0].contiguous() if len(each) == 1 else torch.cat(each) for each in zip(*parts, strict=True)))

    @classmethod
    def empty(cls, query: Tensor, value: Tensor) -> Joined:
        """Return a join without results; each row needs a first one."""
        heads, tokens, _ = query.shape
        return cls(query.new_empty((tokens, heads, value.shape[-1])), query.new_empty((tokens, heads)))

    def start_with(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        """Set the first partial result of these rows."""
        self._output[rows] = output
        self.lse[rows] = lse

    def add(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        """Join another partial result of these rows."""
        so_far = self.lse[rows]
        self._output[rows].lerp_(output.to(self._output.dtype), torch.sigmoid(lse - so_far)[..., None])
        torch.logaddexp(so_far, lse.to(so_far.dtype), out=so_far)

    def result(self, sinks: Tensor | None) -> Tensor:
        """Return the joined output, `(tokens, heads, head_dim)`, in the dtype of the queries."""
        if sinks is not None:
            self._output *= torch.sigmoid(self.lse - sinks)[..., None]
        return self._output.to(self._dtype)
