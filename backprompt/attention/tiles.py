"""Sizes of tiles of the one-launch kernel (triton.py), for sizes of heads and dtypes.

Found on an H200 on 2026-11-26 with torch 2.11 and Triton 3.6. Each candidate was timed on all passes of the five
workloads of `python -m benchmarks --gpu` with the heads of GPT-2, Llama 1B and Llama 8B, and on steps of generation:
the launch of one layer, repeated in a captured graph. Heads of more than 128 were not timed.
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


# Bytes of a number -> the largest size of heads -> the tile for many rows, and the tile for few.
_TILES: dict[int, dict[int, tuple[Tile, Tile]]] = {
    2: {
        64: (Tile(64, 64, 4, 2), Tile(16, 128, 4, 2)),
        128: (Tile(64, 64, 4, 2), Tile(16, 128, 4, 2)),
        256: (Tile(64, 32, 4, 2), Tile(16, 32, 4, 2)),
    },
    4: {
        64: (Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
        128: (Tile(64, 32, 8, 2), Tile(16, 32, 8, 2)),
        256: (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
}

LARGEST_HEAD = 256
"""The largest size of heads for which there is a tile: the kernel keeps a row of sums for each row of a tile."""

FEW_ROWS = 256
"""The largest number of rows of queries for the tile for few rows: its programs are shorter, and more of them run."""

COST_OF_FEW = 1.1
"""The time of a piece of keys with the tile for few rows, relative to the time with the other tile."""

PROGRAMS_A_PROCESSOR = 4
"""The assumed number of programs that a multiprocessor runs at once. It decides how many programs share few rows."""

LEAST_PIECES = 4
"""The smallest number of pieces of keys for which a separate program is worth the join."""


def tiles_for(head_dim: int, num_bytes: int, *, has_tensor_cores: bool = True) -> tuple[Tile, Tile]:
    """Return the tiles for many and for few rows.

    Without tensor cores, half precision takes float32's tile for few rows. In all larger tiles the compiled kernel
    keeps numbers in slow memory (compiled for compute capability 7.5, and not timed).

    Args:
        head_dim: the size of heads, up to `LARGEST_HEAD`.
        num_bytes: the bytes of a number.
        has_tensor_cores: whether Triton multiplies half precision in tensor cores.

    """
    if num_bytes == 2 and not has_tensor_cores:
        _, few = tiles_for(head_dim, 4)
        return few, few
    return next(tiles for largest, tiles in _TILES[num_bytes].items() if head_dim <= largest)
