"""Tables of a pass for a kernel that attends over a whole packed forest in one launch. Arrays of numpy, no tensors.

Rows of the pass are cut into *tiles* of equally many rows. Keys that rows of a tile see are cut into *pieces*: at most
`piece_keys` keys of one segment. A *program* computes a tile against some consecutive pieces of its list. Where rows
are few and keys many, several programs share the list of a tile. Each of them leaves a partial result in a *slot*, and
a *join* combines the slots of a tile.

Example: tiles of 16 rows, pieces of 64 keys; rows 0..20 are a causal run behind 100 keys of a block:

    tile 0, rows 0..16     keys 0..16 of the pass, keys 0..64 and 64..100 of the block
    tile 1, rows 16..20    keys 0..20 of the pass, keys 0..64 and 64..100 of the block
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backprompt.forest.plan import KeySegment

Ints = NDArray[np.int32]

PIECE_COLUMNS = 8
"""Columns of a piece: block (-1: the pass itself), first key, number of keys, first row and row after the last that see
them, position of the first key, kind (1: keys of the segment's own rows, 2: a full piece whose keys are all seen by all
rows of the tile, 0: others), log2 of their count as float32."""

PROGRAM_COLUMNS = 8
"""Columns of a program: first row, row after the last, first piece, piece after the last, slot (-1: none); three are
spare."""

JOIN_COLUMNS = 4
"""Columns of a join: first row, row after the last, first slot, slot after the last."""


@dataclass(frozen=True)
class Segments:
    """The segments of a pass as columns, and data of its rows.

    Attributes:
        columns: for each segment: first row, row after the last, block (-1: the pass itself), first key, number of
            keys, position of the first key, count of each key, whether rows see each other, whether these are a tile
            of several spans, `(9, segments)`.
        blocks: the blocks that hold keys of earlier passes.
        positions: the position of each row.
        until: for each row, the row behind the last one that sees it, `(tokens,)`.
        grows: which segments have one more key in the next step of a generation, `(segments,)`.
        first_step: the same object for all steps that follow each other with the same rows.
        num_steps: the number of steps since the first of these.

    """

    columns: NDArray[np.int64]
    blocks: tuple[object, ...]
    positions: Ints
    until: Ints
    grows: NDArray[np.bool_]
    first_step: object = field(default_factory=object)
    num_steps: int = 0

    @classmethod
    def of(cls, segments: Sequence[KeySegment], positions: Sequence[int]) -> Segments:
        """Return the segments of a pass whose rows have these positions."""
        idx_of: dict[int, int] = {}
        blocks: list[object] = []
        for segment in segments:
            if segment.block is not None and id(segment.block) not in idx_of:
                idx_of[id(segment.block)] = len(blocks)
                blocks.append(segment.block)
        columns = np.array(
            [
                (
                    segment.start,
                    segment.stop,
                    -1 if segment.block is None else idx_of[id(segment.block)],
                    segment.key_start,
                    segment.key_stop - segment.key_start,
                    segment.key_position,
                    segment.times,
                    segment.is_own,
                    segment.visible_until is not None,
                )
                for segment in segments
            ],
            dtype=np.int64,
        ).reshape(-1, 9)
        until = np.zeros(len(positions), dtype=np.int32)
        for segment in segments:
            if segment.is_own:
                until[segment.start : segment.stop] = segment.visible_until or segment.stop
        grows = np.array([segment.grows for segment in segments], dtype=bool)
        return cls(columns.T, tuple(blocks), np.array(positions, dtype=np.int32), until, grows)

    def next_step(self, rows: Sequence[int] | None = None) -> Segments:
        """Return the segments in the next step of a generation (see forest/steps.py); `rows`: the rows that stay."""
        if rows is None:
            return self._next_step
        columns, positions = self._next_step.columns.copy(), self._next_step.positions
        kept = np.array(rows, dtype=np.int64)
        start, stop, _, key_start, num_keys, key_position, _, is_own, _ = columns
        first, is_own = positions[np.minimum(start, len(positions) - 1)], is_own > 0
        start[:], stop[:] = np.searchsorted(kept, start), np.searchsorted(kept, stop)
        stay = start < stop
        positions, until = positions[kept], np.arange(1, len(kept) + 1, dtype=np.int32)  # no row sees another
        key_start[is_own], num_keys[is_own] = start[is_own], (stop - start)[is_own]
        key_position[is_own & stay] += (positions[start[is_own & stay]] - first[is_own & stay]).astype(np.int64)
        return Segments(columns[:, stay], self.blocks, positions, until, self.grows[stay])

    @cached_property
    def _next_step(self) -> Segments:
        columns = self.columns.copy()
        columns[4] += self.grows
        columns[5] += columns[7]
        return replace(self, columns=columns, positions=self.positions + 1, num_steps=self.num_steps + 1)

    def steps_since(self, other: Segments) -> int | None:
        """Return the number of steps from other segments to these; None if they are of other rows."""
        return self.num_steps - other.num_steps if self.first_step is other.first_step else None

    def padded(self, num_rows: int) -> Segments:
        """Return the segments with additional rows behind those of the pass; these see nothing."""
        found = np.zeros((2, num_rows), dtype=np.int32)
        found[:, : len(self.positions)] = self.positions, self.until
        return replace(self, positions=found[0], until=found[1])


@dataclass(frozen=True)
class Cut:
    """The sizes of tiles and pieces, and the rule by which programs share a tile.

    Attributes:
        tile_rows: the rows of a tile.
        piece_keys: the most keys of a piece.
        shares: the number of programs per head that the device runs at once. Several programs share a tile with at
            least twice the pieces of an equal share.
        least_pieces: the smallest number of pieces for which a program is worth its cost.

    """

    tile_rows: int
    piece_keys: int
    shares: float
    least_pieces: int


@dataclass(frozen=True)
class Work:
    """The programs of a pass; the columns are those of the constants above.

    Attributes:
        pieces, programs, joins: the tables, one entry a row.
        num_slots: the number of partial results.
        steps_left: the number of steps after this one with the same programs, whose pieces differ in only two columns:
        last: the last piece of each segment that grows has one more key in each step;
        own: the pieces of rows that see each other are one position later in each step.

    """

    pieces: Ints
    programs: Ints
    joins: Ints
    num_slots: int
    steps_left: int
    last: NDArray[np.int64]
    own: NDArray[np.int64]

    @classmethod
    def of(cls, segments: Segments, cut: Cut, window: int | None) -> Work:
        """Return the programs that compute all rows, the longest first."""
        pieces, piece_counts, last = _pieces(segments, cut, window)
        num_rows = len(segments.positions)
        num_pieces = int(piece_counts.sum())
        share = max(cut.least_pieces, math.ceil(num_pieces / cut.shares), 1)
        parts = np.maximum(piece_counts // share, 1)  # programs of each tile
        tiles, part_idx = _repeated(parts)
        first_piece = np.cumsum(piece_counts) - piece_counts
        slots_of_tile = np.where(parts > 1, parts, 0)
        first_slot = np.cumsum(slots_of_tile) - slots_of_tile
        starts = np.arange(len(piece_counts)) * cut.tile_rows
        stops = np.minimum(starts + cut.tile_rows, num_rows)
        programs = np.zeros((len(tiles), PROGRAM_COLUMNS), dtype=np.int32)
        programs[:, 0] = starts[tiles]
        programs[:, 1] = stops[tiles]
        programs[:, 2] = first_piece[tiles] + piece_counts[tiles] * part_idx // parts[tiles]
        programs[:, 3] = first_piece[tiles] + piece_counts[tiles] * (part_idx + 1) // parts[tiles]
        programs[:, 4] = np.where(parts[tiles] > 1, first_slot[tiles] + part_idx, -1)
        programs = programs[np.argsort(programs[:, 2] - programs[:, 3], kind="stable")]
        joined = np.flatnonzero(parts > 1)
        joins = np.stack(
            [starts[joined], stops[joined], first_slot[joined], first_slot[joined] + parts[joined]], axis=1
        ).astype(np.int32)
        steps_left = 0  # a window hides other keys in each step
        if window is None:  # a full piece may be of another kind
            steps_left = int(cut.piece_keys - 1 - pieces[last, 2].max(initial=0))
        own = np.flatnonzero(pieces[:, 6] == 1)
        return cls(pieces, programs, joins, int(slots_of_tile.sum()), max(0, steps_left), last, own)


def num_pieces(segments: Segments, tile_rows: int, piece_keys: int) -> int:
    """Return a quick estimate of the number of pieces; it includes those that causality or a window hides."""
    start, stop, num_keys = segments.columns[0], segments.columns[1], segments.columns[4]
    num_tiles = (stop - 1) // tile_rows - start // tile_rows + 1
    return int(num_tiles @ -(-num_keys // piece_keys))


def _pieces(segments: Segments, cut: Cut, window: int | None) -> tuple[Ints, NDArray[np.int64], NDArray[np.int64]]:
    """Return the pieces in the order of tiles, the number of pieces of each tile, and the last pieces that grow."""
    start, stop, block, key_start, num_keys, key_position, times, is_own, is_mixed = segments.columns
    num_tiles = -(-len(segments.positions) // cut.tile_rows)
    first_tile = start // cut.tile_rows
    # A pair is a tile and a segment that some row of it sees.
    pair_segment, nth = _repeated((stop - 1) // cut.tile_rows - first_tile + 1)
    pair_tile = first_tile[pair_segment] + nth
    order = np.argsort(pair_tile, kind="stable")
    pair_segment, pair_tile = pair_segment[order], pair_tile[order]
    low = np.maximum(start[pair_segment], pair_tile * cut.tile_rows)
    high = np.minimum(stop[pair_segment], (pair_tile + 1) * cut.tile_rows)
    # Rows that see each other see no later row; a window hides keys from all rows of the tile.
    last_key = np.where(is_own[pair_segment] > 0, high - start[pair_segment], num_keys[pair_segment])
    first_key = np.zeros_like(last_key)
    if window is not None:
        hidden = _least_position(segments.positions, low, high) - window + 1 - key_position[pair_segment]
        first_key = np.where(is_mixed[pair_segment] > 0, 0, np.clip(hidden, 0, last_key))
    pair_pieces = -((first_key - last_key) // cut.piece_keys)
    pair, nth = _repeated(pair_pieces)
    of, first = pair_segment[pair], first_key[pair] + nth * cut.piece_keys
    pieces = np.empty((len(pair), PIECE_COLUMNS), dtype=np.int32)
    pieces[:, 0] = block[of]
    pieces[:, 1] = key_start[of] + first
    pieces[:, 2] = np.minimum(last_key[pair] - first, cut.piece_keys)
    pieces[:, 3] = start[of]
    pieces[:, 4] = stop[of]
    pieces[:, 5] = key_position[of] + first
    pieces[:, 6] = is_own[of]
    tile_stop = np.minimum((pair_tile + 1) * cut.tile_rows, len(segments.positions))
    is_whole_tile = (high - low == tile_stop - pair_tile * cut.tile_rows) & (is_own[pair_segment] == 0)
    if window is None:
        pieces[is_whole_tile[pair] & (pieces[:, 2] == cut.piece_keys), 6] = 2
    pieces[:, 7] = np.log2(times[of].astype(np.float64)).astype(np.float32).view(np.int32)
    piece_counts = np.bincount(pair_tile, weights=pair_pieces, minlength=num_tiles).astype(np.int64)
    return pieces, piece_counts, (np.cumsum(pair_pieces) - 1)[segments.grows[pair_segment]]


def _least_position(positions: Ints, low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the smallest position of the rows `low..high`, for each pair."""
    if not len(low):
        return low
    ranges = np.stack([low, high], axis=1).ravel()
    return np.minimum.reduceat(np.append(positions, 0), ranges)[::2].astype(np.int64)


def _repeated(counts: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each index as often as its count says, and the number of each repeat: [2, 1] -> [0, 0, 1], [0, 1, 0]."""
    indices = np.repeat(np.arange(len(counts)), counts)
    return indices, np.arange(len(indices)) - np.repeat(np.cumsum(counts) - counts, counts)
