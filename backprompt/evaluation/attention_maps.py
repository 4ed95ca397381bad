"""Attention maps of held texts: the requested rows are forwarded once more, behind the keys that are held.

Maps are kept in a pool by the token ids of their text, so equal texts share them and an eviction of rows does not
matter. The held rows stay unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from backprompt.attention.maps import Chosen, MapAttention, Sight
from backprompt.evaluation.computation import Computation
from backprompt.forest.span import Inserted, Span
from backprompt.memory.blocks import gather, keys_values_of, layer_names
from backprompt.model.in_flight import Work
from backprompt.model.levels import check_packed
from backprompt.tokens.graph import TokenIds, flat
from backprompt.tokens.written import WrittenRun, positions_of, visible_to, written_runs


class AttentionMaps:
    """Reads attention maps off held texts.

    Args:
        computation: the computation of their spans.

    """

    def __init__(self, computation: Computation) -> None:
        self._computation = computation
        self._pool = computation.pools.attention

    def num_layers(self) -> int:
        """Return the number of layers that attend.

        Raises:
            UnsupportedModelError: the model goes by levels, so its attention cannot be read.

        """
        executor = self._computation.executor
        check_packed(executor.levels, "Attention maps")
        assert executor.layout is not None, "a text was evaluated"
        return executor.layout.num_layers

    def pooled(self, token_ids: TokenIds, chosen: Chosen) -> Tensor | None:
        """Return a copy of weights that were computed and are still held."""
        found = self._pool.get((token_ids, chosen))
        return None if found is None else found.clone()

    def read(self, text: Inserted, chosen: Chosen) -> Tensor:
        """Return weights of a text whose keys and values are held, `(layers, heads, rows, keys or spans)`."""
        runs = written_runs(text.token_ids)
        spans = self._computation.forest.in_order(text)
        at_once = self._computation.max_tokens
        parts = [
            self._read_rows(text, chosen, runs, spans, chosen.rows[start : start + at_once])
            for start in range(0, len(chosen.rows), at_once)
        ]
        weights = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        self._pool.put((text.token_ids, chosen), weights)
        return weights

    def _read_rows(
        self, text: Inserted, chosen: Chosen, runs: Sequence[WrittenRun], spans: Sequence[Span], rows: Sequence[int]
    ) -> Tensor:
        """Return the weights of some rows, which are forwarded together."""
        started = time.perf_counter()
        counters, executor = self._computation.counters, self._computation.executor
        ids, positions = flat(text.token_ids), positions_of(runs)
        own_positions = positions[list(rows)]
        sight = Sight(visible_to(runs, rows), own_positions, positions)
        attention = MapAttention(
            partial(_keys_values, spans), sight, chosen, executor.device, may_stop=executor.may_stop
        )
        with self._computation.blaming_weights():
            executor.observe([ids[row] for row in rows], own_positions.tolist(), attention)
        counters.tokens_requested += len(rows)
        counters.note_pass(Work(num_again=len(rows)))
        counters.seconds += time.perf_counter() - started
        return attention.weights


def _keys_values(spans: Sequence[Span], layer_idx: int) -> tuple[Tensor, Tensor]:
    """Return a copy of a layer's keys and values of spans, one behind the other."""
    keys, values = layer_names(layer_idx)
    rows = [keys_values_of(span) for span in spans]
    return gather(rows, keys), gather(rows, values)
