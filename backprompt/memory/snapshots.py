"""Blocks of rows with snapshots: the recurrent and convolution states of a model behind some of the rows.

A snapshot is a tensor of bytes, the states of all layers side by side (model/cache_form.py knows their form). It covers
all tokens up to its row. A block keeps the snapshots of the last rows of spans, by row. So a snapshot moves with
its row when a span is split, evicted, moved to the second pool or back, or copied to a buffer in which it grows. If a
span was split because a text ends within it, the last row of the upper part has no snapshot. This snapshot is computed
again from the last snapshot before it.

Snapshots never change, so blocks share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from backprompt.forest.span import Span
from backprompt.memory.blocks import Block, BlockRows, KeysValues, keys_values_of
from backprompt.memory.location import Location

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on


class KeysValuesAndSnapshots(KeysValues):
    """Keys and values, and the snapshots behind some rows.

    Attributes:
        snapshots: the snapshots by row, `(bytes,)` each.

    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.snapshots: dict[int, Tensor] = {}
        super().__init__(tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return super().num_bytes + sum([snapshot.nbytes for snapshot in self.snapshots.values()])

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one of the large tensors, or of all snapshots if those are more."""
        return max(super().tensor_bytes, sum([snapshot.nbytes for snapshot in self.snapshots.values()]))

    def bytes_of(self, start: int, stop: int) -> int:
        """Return the bytes of the rows `start..stop`."""
        behind = [snapshot.nbytes for row, snapshot in self.snapshots.items() if start <= row < stop]
        return super().bytes_of(start, stop) + sum(behind)

    def keep(self, pieces: Sequence[slice]) -> None:
        """Keep only these rows, in this order, with their snapshots."""
        super().keep(pieces)
        self.snapshots = self._picked_snapshots(pieces)

    def append(self, others: Sequence[Self]) -> None:
        """Copy the rows of other blocks behind this block's own rows, in order, with their snapshots."""
        start = self.num_rows
        super().append(others)
        for other in others:
            self.snapshots |= {start + row: snapshot for row, snapshot in other.snapshots.items()}
            start += other.num_rows

    def copied(self, pieces: Sequence[slice], location: Location | None = None) -> Self:
        """Return a new block of these rows, in this order, by default where this block lies."""
        made = super().copied(pieces, location)
        picked = self._picked_snapshots(pieces)
        made.snapshots = picked if location is None else {row: location.copy(own) for row, own in picked.items()}
        return made

    def copy_rows_to(self, other: Self, sources: npt.NDArray[np.int64] | None, targets: npt.NDArray[np.int64]) -> None:
        """Copy the rows `sources` to the rows `targets` of another block of the same kind, or of this block.

        A copied snapshot takes the place of the snapshot right before its target: a growing text keeps only its latest.
        """
        super().copy_rows_to(other, sources, targets)
        rows = range(self.num_rows) if sources is None else sources.tolist()
        for source, target in zip(rows, targets.tolist(), strict=True):
            snapshot = self.snapshots.get(source)
            if snapshot is not None:
                other.snapshots.pop(target - 1, None)
                other.snapshots[target] = snapshot

    def _picked_snapshots(self, pieces: Sequence[slice]) -> dict[int, Tensor]:
        """Return the snapshots of these rows, by their new rows."""
        found: dict[int, Tensor] = {}
        start = 0
        for piece in pieces:
            for row, snapshot in self.snapshots.items():
                if piece.start <= row < piece.stop:
                    found[start + row - piece.start] = snapshot
            start += piece.stop - piece.start
        return found


def snapshot_bytes_of(block: Block) -> int:
    """Return the bytes of one snapshot of a block, 0 if the block has none."""
    snapshots = block.snapshots if isinstance(block, KeysValuesAndSnapshots) else {}
    return next((snapshot.nbytes for snapshot in snapshots.values()), 0)


def snapshot_of(span: Span) -> Tensor | None:
    """Return the snapshot behind a span that holds its keys and values, None if there is none."""
    rows = span.keys_values
    if not isinstance(rows, BlockRows) or not isinstance(rows.block, KeysValuesAndSnapshots):
        return None
    return rows.block.snapshots.get(rows.stop - 1)


def keep_snapshot(span: Span, snapshot: Tensor) -> KeysValues:
    """Add a snapshot to a span that holds its keys and values; return the span's block, which grows by these bytes."""
    block, stop = keys_values_of(span).block, keys_values_of(span).stop
    assert isinstance(block, KeysValuesAndSnapshots), block
    block.snapshots[stop - 1] = snapshot
    return block
