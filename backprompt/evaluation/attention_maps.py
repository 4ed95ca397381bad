"""Attention maps of held texts: the requested rows are forwarded once more, behind the keys that are held.

Maps are kept in a pool by the token ids of their text. So equal texts share maps, and maps outlive an eviction of rows.
The held rows stay unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from backprompt.attention.maps import Chosen, MapAttention, PackedMaps, Sight
from backprompt.evaluation.computation import Computation
from backprompt.forest.span import Inserted, Span
from backprompt.memory.blocks import gather, keys_values_of, layer_names
from backprompt.model.forwarded import Work
from backprompt.model.levels import check_packed
from backprompt.tokens.graph import TokenIds, flat
from backprompt.tokens.written import positions_of, visible_to, written_runs


class AttentionMaps:
    """Reads the attention maps of held texts.

    Args:
        computation: the computation of their spans.

    """

    def __init__(self, computation: Computation) -> None:
        self._computation = computation
        self._pool = computation.pools.attention

    def num_layers(self) -> int:
        """Return the number of layers that attend.

        Raises:
            UnsupportedModelError: passes of the model go by levels, so its attention cannot be read.

        """
        executor = self._computation.executor
        check_packed(executor.levels, "Attention maps")
        assert executor.layout is not None, "a text was evaluated"
        return executor.layout.num_layers

    def pooled(self, token_ids: TokenIds, chosen: Chosen) -> Tensor | None:
        """Return a copy of attention weights that were computed and are still in the pool, or None."""
        found = self._pool.get((token_ids, chosen))
        return None if found is None else found.clone()

    @property
    def max_rows(self) -> int:
        """The largest number of rows that are forwarded together."""
        return self._computation.max_tokens

    @property
    def max_held_tokens(self) -> int:
        """The largest number of tokens of texts that are held at the same time: a pass of rows, within the budget."""
        computation = self._computation
        free = computation.memory.max_bytes - computation.num_bytes_of(computation.holders.ends())
        return min(self.max_rows, free // computation.token_bytes)

    def read(self, texts: Sequence[Inserted], chosen: Sequence[Chosen]) -> list[Tensor]:
        """Return the attention weights of each text, `(layers, heads, rows, keys or spans)`; keys and values are held.

        The same layers are chosen for all texts. Rows of all texts are forwarded together.
        """
        parts: list[list[Tensor]] = [[] for _ in texts]
        for rows_of in self._passes(chosen):
            for (idx, _), weights in zip(rows_of, self._read_pass(texts, chosen, rows_of), strict=True):
                parts[idx].append(weights)
        found = [torch.cat(own, dim=2) if len(own) > 1 else own[0] for own in parts]
        for text, own, weights in zip(texts, chosen, found, strict=True):
            self._pool.put((text.token_ids, own), weights)
        return found

    def _passes(self, chosen: Sequence[Chosen]) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        """Yield the rows of each pass, as pairs: the index of a text, and the rows of this text."""
        rows_of: list[tuple[int, tuple[int, ...]]] = []
        room = self.max_rows
        for idx, own in enumerate(chosen):
            rows = own.rows
            while rows:
                rows_of.append((idx, rows[:room]))
                rows, room = rows[room:], room - len(rows[:room])
                if not room:
                    yield rows_of
                    rows_of, room = [], self.max_rows
        if rows_of:
            yield rows_of

    def _read_pass(
        self, texts: Sequence[Inserted], chosen: Sequence[Chosen], rows_of: Sequence[tuple[int, tuple[int, ...]]]
    ) -> list[Tensor]:
        """Return the weights of rows that are forwarded together, text by text."""
        started = time.perf_counter()
        counters, executor = self._computation.counters, self._computation.executor
        ids: list[int] = []
        positions: list[int] = []
        parts: list[MapAttention] = []
        for idx, rows in rows_of:
            text = texts[idx]
            runs, spans = written_runs(text.token_ids), self._computation.forest.in_order(text)
            flat_ids, all_positions = flat(text.token_ids), positions_of(runs)
            own_positions = all_positions[list(rows)]
            sight = Sight(visible_to(runs, rows), own_positions, all_positions)
            ids += [flat_ids[row] for row in rows]
            positions += own_positions.tolist()
            keys_values = partial(_keys_values, spans)
            parts.append(MapAttention(keys_values, sight, chosen[idx], executor.device, may_stop=executor.may_stop))
        with self._computation.blaming_weights():
            executor.observe(ids, positions, PackedMaps(parts, [len(rows) for _, rows in rows_of]))
        counters.tokens_requested += len(ids)
        counters.note_pass(Work(num_again=len(ids)))
        counters.seconds += time.perf_counter() - started
        return [part.weights for part in parts]


def _keys_values(spans: Sequence[Span], layer_idx: int) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values of spans, concatenated into new tensors."""
    keys, values = layer_names(layer_idx)
    rows = [keys_values_of(span) for span in spans]
    return gather(rows, keys), gather(rows, values)
