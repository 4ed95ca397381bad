"""Attention over a trie, with gradients.

Token q sees token k if `k <= q < until[k]`. Under a window, their positions must also be near. The keys are divided
into the edges of the trie, which are runs without a branch. An edge is seen by its own tokens, causally, and by all of
its descendants, which lie right behind it. So one causal call of a kernel for each edge suffices, without a mask, and
the results are joined by log-sum-exp. The backward makes the same calls: see `kernels.py`. On CUDA one call computes a
whole layer: see `flex.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backprompt.attention.base import Scoring
from backprompt.attention.calls import Joined
from backprompt.attention.kernels import additive_mask
from backprompt.training.flex import Kind, NotCompiledError, attend_at_once, block_mask, choose
from backprompt.training.kernels import Pair, clear_pair, pair_for
from backprompt.training.trie import Trie
from backprompt.transfers import on_device

Way: TypeAlias = Literal["flex", "fast"]
"""One call of FlexAttention, or calls of the device's fast pair of kernels."""

ORDER: dict[str, tuple[Way, ...]] = {"cuda": ("flex", "fast")}
"""The ways of a device in the order in which they are tried. The clear pair is used if no way agrees with it."""
ON_OTHERS: tuple[Way, ...] = ("fast",)
"""The order on other devices."""

_NOTHING = -1e30
"""The log-sum-exp of a row that sees no key: finite, so that joins of two such rows have numbers."""


@dataclass(frozen=True)
class _Call:
    """The rows that see some of the keys.

    Attributes:
        rows, keys: the rows, and the keys that they see.
        is_first: whether this is the first call with these rows.
        mask: additive, `(rows, keys)`; None if the call is causal from its first row on.
        blind: which rows see none of the keys, `(rows, 1)`; None if every row sees some.

    """

    rows: slice
    keys: slice
    is_first: bool = True
    mask: Tensor | None = None
    blind: Tensor | None = None


class TrieAttention:
    """Attends over one trie, in each layer; masks are made once for all layers with the same window.

    Attributes:
        name: the way in use, and the reason why no faster way is used.

    """

    def __init__(self, trie: Trie, device: torch.device) -> None:
        self._trie = trie
        self._device = device
        self._calls: dict[tuple[int | None, torch.dtype], list[_Call]] = {}
        self._masks: dict[int | None, Any] = {}
        self.name = "none yet"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the trie, `(tokens, heads, value_dim)`, with gradients.

        Shapes: query `(heads, tokens, head_dim)`, key and value `(kv_heads, tokens, head_dim)`.
        """
        dtype = _dtype_of(query, key, value)
        query, key, value = (given.to(dtype) for given in (query, key, value))
        scoring = replace(scoring, window=self._biting(scoring.window))
        pair, reason = clear_pair(scoring.softcap), ""
        with _without_autocast(query.device):
            for way in ORDER.get(query.device.type, ON_OTHERS):
                if way == "flex":
                    attended = self._in_one_call(query, key, value, scoring)
                    if isinstance(attended, Tensor):
                        self.name = "flex"
                        return attended
                    reason = f" ({attended})"
                else:
                    pair = pair_for(query, key, value, scoring.softcap)
                    if pair.is_fast:
                        break
        self.name = pair.name + reason
        calls = self._calls_for(scoring.window, dtype)
        in_calls: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
            query, key, value, scoring.sinks, scoring.scaling, calls, pair
        )
        return in_calls

    def _in_one_call(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor | str:
        """Return attention by FlexAttention, or the reason why it is not used."""
        choice = choose(Kind.of(query, key, value, scoring))
        if choice.call is None:
            return choice.reason
        if scoring.window not in self._masks:
            self._masks[scoring.window] = block_mask(self._trie, scoring.window, self._device)
        try:
            return attend_at_once(choice.call, query, key, value, scoring, self._masks[scoring.window])
        except NotCompiledError as error:
            return f"flex failed: {error}"

    def _biting(self, window: int | None) -> int | None:
        """Return the window; None for one that hides nothing."""
        return None if window is None or int(self._trie.positions.max()) < window else window

    def _calls_for(self, window: int | None, dtype: torch.dtype) -> list[_Call]:
        if (window, dtype) not in self._calls:
            found = self._causal_calls() if window is None else self._windowed_calls(window, dtype)
            self._calls[window, dtype] = list(found)
        return self._calls[window, dtype]

    def _causal_calls(self) -> Iterator[_Call]:
        trie = self._trie
        for edge in trie.edges:
            rows = slice(edge.start, int(trie.until[edge.start]))
            yield _Call(rows, edge, is_first=trie.positions[edge.start] == 0)

    def _windowed_calls(self, window: int, dtype: torch.dtype) -> Iterator[_Call]:
        """Yield a call for each run of at most `window` keys, with the rows up to the last one that sees such a key."""
        trie = self._trie
        for edge in trie.edges:
            stop = int(trie.until[edge.start])
            for first in range(edge.start, edge.stop, window):
                keys = slice(first, min(first + window, edge.stop))
                sees_some = trie.positions[first:stop] < trie.positions[keys.stop - 1] + window
                sees_some = sees_some[: np.flatnonzero(sees_some)[-1] + 1]
                rows = slice(first, first + len(sees_some))
                distances = trie.positions[rows, None] - trie.positions[keys]
                visible = (distances >= 0) & (distances < window)
                blind = None if sees_some.all() else on_device(~sees_some[:, None], self._device)
                mask = additive_mask(on_device(visible, self._device), dtype)
                yield _Call(rows, keys, False, mask, blind)


class _Attend(torch.autograd.Function):
    """Attention by several calls, and the gradients by as many; both without autocast."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        scaling: float,
        calls: list[_Call],
        pair: Pair,
    ) -> Tensor:
        joined = Joined.empty(query, value)
        with _without_autocast(query.device):
            if not all(call.is_first for call in calls[:1]):
                joined.start_with(slice(None), value.new_zeros(()), value.new_full((), _NOTHING, dtype=torch.float32))
            for call in calls:
                is_causal = call.mask is None
                keys, values = key[:, call.keys], value[:, call.keys]
                output, lse = pair.forward(query[:, call.rows], keys, values, scaling, is_causal, call.mask)
                if call.blind is not None:
                    output, lse = output.masked_fill(call.blind[..., None], 0), lse.masked_fill(call.blind, _NOTHING)
                (joined.start_with if call.is_first else joined.add)(call.rows, output, lse)
            output = joined.result(sinks)
            lse = joined.lse if sinks is None else torch.logaddexp(joined.lse, sinks.to(joined.lse.dtype))
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.scaling, ctx.calls, ctx.pair = scaling, calls, pair
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, lse = ctx.saved_tensors
        grad_query = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
        grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
        with _without_autocast(query.device):
            for call in ctx.calls:
                rows, keys = call.rows, call.keys
                of_rows, grad_key[:, keys], grad_value[:, keys] = ctx.pair.backward(
                    grad[rows],
                    query[:, rows],
                    key[:, keys],
                    value[:, keys],
                    output[rows],
                    lse[rows],
                    ctx.scaling,
                    call.mask is None,
                    call.mask,
                )
                grad_query[:, rows] += of_rows
            grad_sinks = None if sinks is None else _grad_sinks(grad, output, lse, sinks)
        return grad_query.to(query.dtype), grad_key, grad_value, grad_sinks, None, None, None


def _grad_sinks(grad: Tensor, output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of the sinks: each sink takes weight from the output of its head."""
    weights = torch.exp(sinks.to(lse.dtype) - lse)  # (tokens, heads)
    return -(weights * (grad.to(lse.dtype) * output).sum(dim=-1)).sum(dim=0).to(sinks.dtype)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _dtype_of(*given: Tensor) -> torch.dtype:
    """Return the dtype in which to attend: autocast's where it is on, as in torch's own attention."""
    device_type = given[0].device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    dtype = given[0].dtype
    for tensor in given[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
