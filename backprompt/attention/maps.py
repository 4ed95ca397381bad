"""Attention maps: some rows of a text attend once more, and the weights of chosen layers and heads are kept.

The keys and values of all tokens of the text are held, those of the rows included, so a row needs no other row. Weights
are the softmax over all keys that a row sees, by the scores of the clear kernel. Few rows are taken at a time. So
weights take little memory if their layer was not requested, or if they are summed over spans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.attention.base import Scoring
from backprompt.attention.kernels import scores_of
from backprompt.errors import UnsupportedModelError
from backprompt.transfers import on_device

WEIGHTS_BYTES = 16 << 20
"""The weights of one layer are computed in slices of rows of at most this size, or a row at a time."""

KeysValuesOf: TypeAlias = Callable[[int], "tuple[Tensor, Tensor]"]
"""Returns a layer's keys and values of all tokens of a text, `(kv_heads, tokens, head_dim)` each."""


@dataclass(frozen=True)
class Chosen:
    """The requested part of all weights of a text.

    Attributes:
        layers: the layers, each from 0 on, in the order of the result.
        heads: the heads, counted from the end if negative; None for all.
        rows: the rows: the tokens that attend, in the text's written order.
        spans: the first token of each span of keys, and the token behind its last; None for the keys themselves.

    """

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    rows: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class Sight:
    """The sight of some rows of a text.

    Attributes:
        visible: the keys that each row sees, `(rows, keys)`; a window may hide more.
        row_positions: the position of each row, `(rows,)`.
        key_positions: the position of each token of the text, `(keys,)`.

    """

    visible: npt.NDArray[np.bool_]
    row_positions: npt.NDArray[np.int64]
    key_positions: npt.NDArray[np.int64]

    def within(self, window: int | None) -> npt.NDArray[np.bool_]:
        """Return the keys that each row sees in a layer with a window, `(rows, keys)`."""
        if window is None:
            return self.visible
        seen: npt.NDArray[np.bool_] = self.visible & (self.row_positions[:, None] - self.key_positions < window)
        return seen


class EnoughSeen(Exception):
    """The last chosen layer has attended, so the further layers of the model need not run."""


class MapAttention:
    """The attention of some rows of one text, a `PreparedAttention` that keeps weights.

    Args:
        keys_values_of: the keys and values of all tokens of the text.
        sight: the sight of the rows.
        chosen: the weights to keep. `chosen.rows` is not read: all rows of the call are kept.
        device: the device of the kept weights.
        may_stop: whether the call may end behind the last chosen layer.

    """

    def __init__(
        self, keys_values_of: KeysValuesOf, sight: Sight, chosen: Chosen, device: torch.device, *, may_stop: bool
    ) -> None:
        self._keys_values_of = keys_values_of
        self._sight = sight
        self._chosen = chosen
        self._device = device
        self._last_layer = max(chosen.layers) if may_stop else None
        self._kept: dict[int, Tensor] = {}  # by layer, (heads, rows, keys or spans)

    @property
    def weights(self) -> Tensor:
        """The kept weights, `(layers, heads, rows, keys or spans)`; float64 if queries are, else float32.

        Raises:
            UnsupportedModelError: the chosen layers have different numbers of heads.

        """
        numbers = sorted({weights.shape[0] for weights in self._kept.values()})
        if len(numbers) > 1:
            raise UnsupportedModelError(
                f"The chosen layers have different numbers of heads ({', '.join(map(str, numbers))}), so their "
                "attention does not fit one tensor. Ask for layers of one kind, or for heads that all of them have."
            )
        return torch.stack([self._kept[layer] for layer in self._chosen.layers])

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the text, `(rows, heads, value_dim)`.

        `key` and `value` are not read: the rows' keys and values are held already.

        Raises:
            EnoughSeen: this was the last chosen layer, and the call may stop here.
            ValueError: the layer does not have the chosen heads.

        """
        heads = self._heads(query.shape[0])
        keys, values = self._keys_values_of(layer_idx)
        hidden = on_device(~self._sight.within(scoring.window), query.device)
        num_rows = max(1, WEIGHTS_BYTES // (query.shape[0] * keys.shape[1] * 4))
        is_chosen, is_last = layer_idx in self._chosen.layers, layer_idx == self._last_layer
        kept: list[Tensor] = []
        outputs: list[Tensor] = []
        for few, hidden_of_few in zip(torch.split(query, num_rows, dim=1), torch.split(hidden, num_rows), strict=True):
            weights = _softmax(scores_of(few, keys, scoring.scaling, scoring.softcap), hidden_of_few, scoring.sinks)
            if is_chosen:
                own = weights if heads is None else weights[heads]
                kept.append(own if self._chosen.spans is None else _sums(own, self._chosen.spans))
            if not is_last:
                outputs.append(_weighted(weights, values))
        if is_chosen:
            self._kept[layer_idx] = torch.cat(kept, dim=1).to(self._device)
        if is_last:
            raise EnoughSeen
        return torch.cat(outputs).to(query.dtype)

    def advance(self, rows: Sequence[int] | None = None) -> None:
        """Raise: a map has only one step."""
        raise AssertionError(rows)

    def _heads(self, num_heads: int) -> list[int] | None:
        if self._chosen.heads is None:
            return None
        for head in self._chosen.heads:
            if not -num_heads <= head < num_heads:
                raise ValueError(f"heads must be ints from {-num_heads} to {num_heads - 1}, not {head}.")
        return [head % num_heads for head in self._chosen.heads]


class PackedMaps:
    """The attention of rows of several texts in one call, a `PreparedAttention`: each text's rows see their own text.

    Args:
        parts: the attention of each text; all have the same chosen layers.
        num_rows: the number of rows of each text. In the call, the rows of the texts follow each other in this order.

    """

    def __init__(self, parts: Sequence[MapAttention], num_rows: Sequence[int]) -> None:
        self._parts = parts
        self._num_rows = list(num_rows)

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the texts, `(rows, heads, value_dim)`; see `MapAttention.attend`.

        Raises:
            EnoughSeen: this was the last chosen layer, and the call may stop here.
            ValueError: the layer does not have the chosen heads.

        """
        queries = torch.split(query, self._num_rows, dim=1)
        outputs = []
        for part, own in zip(self._parts, queries, strict=True):
            with suppress(EnoughSeen):
                outputs.append(part.attend(layer_idx, own, key, value, scoring))
        if not outputs:
            raise EnoughSeen
        return torch.cat(outputs)

    def advance(self, rows: Sequence[int] | None = None) -> None:
        """Raise: a map has only one step."""
        raise AssertionError(rows)


def _softmax(scores: Tensor, hidden: Tensor, sinks: Tensor | None) -> Tensor:
    """Return weights, `(heads, rows, keys)`; scores are overwritten. A sink takes a share that belongs to no key."""
    scores.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    lse = torch.logaddexp(scores.logsumexp(dim=-1), sinks.to(scores.dtype)[:, None])
    return scores.sub_(lse[..., None]).exp_()


def _sums(weights: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return the sums over spans of keys, `(heads, rows, spans)`."""
    sums = [weights[..., start:stop].sum(dim=-1) for start, stop in spans]
    return torch.stack(sums, dim=-1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Return the weighted means of values, `(rows, heads, value_dim)`; grouped heads share values."""
    heads, rows, keys = weights.shape
    kv_heads, _, value_dim = values.shape
    output = weights.view(kv_heads, -1, keys) @ values.to(weights.dtype)
    return output.view(heads, rows, value_dim).transpose(0, 1)
