"""The tables of a pass (tables.py) on the device, where the kernels read them: one tensor, and one copy to fill it.

The tables of an ordinary pass have exactly the size of their content. The tables of captured steps have room for more,
so that the next step's content goes to the same addresses: see model/steps.py. Unused programs and joins have no rows,
so they write nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from backprompt.attention.tables import JOIN_COLUMNS, PIECE_COLUMNS, PROGRAM_COLUMNS, Cut, Segments, Work
from backprompt.transfers import copy_to

ADDRESS_COLUMNS = 4
"""Columns of the table of addresses: the addresses of a layer's first key and first value, the stride between heads in
elements; one is spare."""

ROOM_FOR_BLOCKS = 8
"""The smallest number of blocks that fit tables with room."""

ROOM_FOR_PIECES = 1024
"""The smallest number of pieces that fit tables with room."""


class Addressed(Protocol):
    """Keys and values of computed rows, with their addresses."""

    def addresses(self) -> ArrayLike:
        """Return each layer's addresses of keys and values, and the stride between heads in elements, `(layers, 3)`."""
        ...


@dataclass(frozen=True)
class Room:
    """The number of entries that fit the tables.

    Attributes:
        rows: the rows of the pass.
        blocks, programs, joins, pieces: see tables.py.
        slots: the partial results.

    """

    rows: int
    blocks: int
    programs: int
    joins: int
    pieces: int
    slots: int

    @classmethod
    def of(cls, segments: Segments, work: Work) -> Room:
        """Return the room that the tables of one pass take."""
        sizes = len(work.programs), len(work.joins), len(work.pieces), work.num_slots
        return cls(len(segments.positions), len(segments.blocks), *sizes)

    @classmethod
    def for_steps(cls, segments: Segments, work: Work, cut: Cut) -> Room:
        """Return the room for the steps of a generation that begin with this one.

        Programs and joins have room for any step with this number of rows, pieces and blocks for twice as many as now.
        """
        num_rows = len(segments.positions)
        pieces = max(ROOM_FOR_PIECES, _power_of_two(2 * len(work.pieces)))
        tiles = -(-num_rows // cut.tile_rows)
        programs = tiles + math.ceil(min(cut.shares, pieces))  # a tile, and an equal share of the pieces
        blocks = max(ROOM_FOR_BLOCKS, _power_of_two(2 * len(segments.blocks)))
        return cls(num_rows, blocks, programs, tiles, pieces, programs)

    def holds(self, other: Room) -> bool:
        """Return whether the tables of another pass fit, with the same number of rows."""
        return (
            self.rows == other.rows
            and self.blocks >= other.blocks
            and self.programs >= other.programs
            and self.joins >= other.joins
            and self.pieces >= other.pieces
            and self.slots >= other.slots
        )


@dataclass
class DeviceTables:
    """The tables on the device; the columns of each are named in tables.py and above.

    Attributes:
        room: the number of entries that fit.
        numbers: all tables, one behind the other, as numbers of 4 bytes.
        sizes: the size of each table, in the order of the properties.
        loaded: the same numbers on the host.
        work: the programs of the step for which all tables were made.
        num_steps: the number of steps since then.

    """

    room: Room
    numbers: Tensor
    sizes: tuple[int, ...]
    loaded: NDArray[np.int32]
    work: Work
    num_steps: int = 0

    @classmethod
    def of(cls, segments: Segments, work: Work, device: torch.device, room: Room | None = None) -> DeviceTables:
        """Return the tables of a pass on the device, by one copy from pinned memory; the host does not wait for it."""
        room = Room.of(segments, work) if room is None else room
        numbers, sizes = _laid_out(segments, work, room)
        made = cls(room, torch.empty(sum(sizes), dtype=torch.int32, device=device), sizes, numbers, work)
        copy_to(made.numbers, numbers)
        return made

    def load(self, segments: Segments, work: Work) -> bool:
        """Set another pass with the same number of rows, at the same addresses; return False if there is no room."""
        if not self.room.holds(Room.of(segments, work)):
            return False
        numbers, sizes = _laid_out(segments, work, self.room)
        if sizes != self.sizes:
            return False  # another number of layers
        copy_to(self.numbers, numbers)
        self.loaded, self.work, self.num_steps = numbers, work, 0
        return True

    def advance(self, segments: Segments, num_steps: int) -> bool:
        """Set a step some steps after the last one (`Segments.steps_since`); return False if it has other programs."""
        work = self.work
        if not 0 <= num_steps <= work.steps_left - self.num_steps:
            return False
        addresses, start = _addresses(segments.blocks, self.room.blocks), self.sizes[0]
        self.loaded[: 2 * addresses.size] = addresses.reshape(-1).view(np.int32)
        self.loaded[start : start + len(segments.positions)] = segments.positions
        pieces = self.loaded[sum(self.sizes[:5]) :].reshape(-1, PIECE_COLUMNS)
        pieces[work.last, 2] += num_steps
        pieces[work.own, 5] += num_steps
        copy_to(self.numbers, self.loaded)
        self.num_steps += num_steps
        return True

    def _table(self, idx: int) -> Tensor:
        start = sum(self.sizes[:idx])
        return self.numbers[start : start + self.sizes[idx]]

    @cached_property
    def addresses(self) -> Tensor:
        """The table of addresses, `(layers, blocks, columns)`, flat."""
        return self._table(0).view(torch.int64)

    @cached_property
    def positions(self) -> Tensor:
        """The position of each row."""
        return self._table(1)

    @cached_property
    def until(self) -> Tensor:
        """For each row, the row behind the last one that sees it."""
        return self._table(2)

    @cached_property
    def programs(self) -> Tensor:
        """The programs, flat."""
        return self._table(3)

    @cached_property
    def joins(self) -> Tensor:
        """The joins, flat."""
        return self._table(4)

    @cached_property
    def pieces(self) -> Tensor:
        """The pieces, flat."""
        return self._table(5)


def _laid_out(segments: Segments, work: Work, room: Room) -> tuple[NDArray[np.int32], tuple[int, ...]]:
    """Return all tables as one array, and the size of each with its room; the room of the last table is left out."""
    addresses = _addresses(segments.blocks, room.blocks)
    num_programs, num_joins = room.programs * PROGRAM_COLUMNS, room.joins * JOIN_COLUMNS
    lengths = 2 * addresses.size, room.rows, room.rows, num_programs, num_joins, room.pieces * PIECE_COLUMNS
    sizes = tuple(-(-length // 4) * 4 + 4 for length in lengths)  # aligned, and never empty
    parts: list[NDArray[Any]] = [addresses, segments.positions, segments.until, work.programs, work.joins, work.pieces]
    numbers = np.zeros(sum(sizes[:-1]) + work.pieces.size, dtype=np.int32)
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        numbers[start : start + part.nbytes // 4] = part.reshape(-1).view(np.int32)
        start += size
    start = sum(sizes[:3])
    numbers[start + work.programs.size + 4 : start + num_programs : PROGRAM_COLUMNS] = -1  # no slot
    return numbers, sizes


def _addresses(blocks: Sequence[object], room: int) -> NDArray[np.int64]:
    """Return the table of addresses, `(layers, room, columns)`."""
    if not blocks:
        return np.zeros((0, 0, ADDRESS_COLUMNS), dtype=np.int64)
    of_blocks = np.array([cast(Addressed, block).addresses() for block in blocks], dtype=np.int64)
    table = np.zeros((of_blocks.shape[1], room, ADDRESS_COLUMNS), dtype=np.int64)
    table[:, : len(blocks), :3] = of_blocks.transpose(1, 0, 2)
    return table


def _power_of_two(number: int) -> int:
    """Return the least power of two that is no smaller than the number."""
    return 1 << max(0, number - 1).bit_length()
