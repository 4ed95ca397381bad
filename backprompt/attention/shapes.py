"""The shape of a layer's heads, and the way in which the one-launch kernel is launched for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from backprompt.attention.tables import Cut, Segments, num_pieces
from backprompt.attention.tiles import COST_OF_FEW, FEW_ROWS, LEAST_PIECES, PROGRAMS_A_PROCESSOR, Tile, tiles_for


@dataclass(frozen=True)
class Shape:
    """The shape of a layer's heads, and the device and dtype of the layer."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Shape:
        """Return the shape of a layer; shapes of tensors are those of `PreparedAttention.attend`."""
        return cls(query.device, query.dtype, query.shape[0], key.shape[0], query.shape[-1])

    @property
    def group(self) -> int:
        """The number of heads that share a head of keys."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Launch:
    """The way in which a layer is launched: its tile, and how programs share rows."""

    tile: Tile
    programs_a_processor: float = PROGRAMS_A_PROCESSOR
    least_pieces: int = LEAST_PIECES

    def heads_of_program(self, shape: Shape) -> int:
        """Return the number of heads of a group that a program computes; a large group is cut into equal parts."""
        num_parts = -(-shape.group // self.tile.rows)
        return -(-shape.group // num_parts)

    def num_axes(self, shape: Shape) -> int:
        """Return the number of programs that compute the heads of the same rows and keys."""
        return shape.kv_heads * -(-shape.group // self.heads_of_program(shape))

    def cut(self, shape: Shape) -> Cut:
        """Return the sizes of tiles and pieces."""
        shares = _num_processors(shape.device) * self.programs_a_processor / self.num_axes(shape)
        return Cut(self.tile.rows // self.heads_of_program(shape), self.tile.keys, shares, self.least_pieces)

    def num_pieces(self, shape: Shape, segments: Segments) -> int:
        """Return a quick estimate of the number of pieces of keys of a pass."""
        return num_pieces(segments, self.tile.rows // self.heads_of_program(shape), self.tile.keys)


def launch_for(shape: Shape, segments: Segments) -> Launch:
    """Return the way of launching that takes the least time, estimated by numbers of pieces.

    A tile of many rows wastes work if each segment has few rows, as in a step of generation.
    """
    tiles = tiles_for(shape.head_dim, shape.dtype.itemsize, has_tensor_cores=_has_tensor_cores(shape.device))
    many, few = map(Launch, tiles)
    if len(segments.positions) * shape.group <= FEW_ROWS:
        return few
    return few if few.num_pieces(shape, segments) * COST_OF_FEW <= many.num_pieces(shape, segments) else many


@lru_cache(maxsize=16)
def _has_tensor_cores(device: torch.device) -> bool:
    """Return whether Triton multiplies half precision in tensor cores: on CUDA from compute capability 8.0 on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=16)
def _num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
