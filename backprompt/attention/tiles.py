"""Sizes of tiles of the one-launch kernel (triton.py), for sizes of heads and dtypes.

The table was written down from the memory and the registers of the devices and has not been tuned yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A tile: rows of queries (tokens times heads of a group) and keys that are multiplied at once, and its launch.

    Attributes:
        rows, keys: powers of two from 16 on.
        warps, stages: see Triton's `num_warps` and `num_stages`.

    """

    rows: int
    keys: int
    warps: int
    stages: int


# The largest head size -> the tile; the first that fits serves.
_TILES: dict[int, dict[int, Tile]] = {  # bytes of a number ->
    2: {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 4, 2)},
    4: {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
}

FEW_ROWS = 16
"""Up to this many rows of queries a tile has 16 rows: the fewest that can be multiplied."""

PROGRAMS_A_PROCESSOR = 2
"""Programs that a multiprocessor runs at once, for the number of programs that share few rows."""

LEAST_PIECES = 4
"""The fewest pieces of keys for which a program of its own is worth the join."""


def tile_for(head_dim: int, num_bytes: int, num_rows: int) -> Tile:
    """Return the tile for a head size, bytes of a number, and rows of queries (tokens times heads of a group)."""
    table = _TILES[num_bytes]
    tile = next((tile for largest, tile in table.items() if head_dim <= largest), table[256])
    return Tile(16, tile.keys, tile.warps, tile.stages) if num_rows <= FEW_ROWS else tile
