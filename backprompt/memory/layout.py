"""The layout of rows: the format of the tensors that every pass of a model leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from backprompt.memory.blocks import STATE_TENSORS, Block, kind_of, token_axis
from backprompt.memory.snapshots import snapshot_bytes_of


@dataclass(frozen=True)
class RowSpec:
    """A tensor's dtype, the sizes of all its axes except that of tokens, and its device."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    device: torch.device


@dataclass(frozen=True)
class Layout:
    """The format of the rows of one model and their devices, the same in every pass.

    Attributes:
        rows: the format of each tensor of both blocks, by name.
        snapshot_bytes: the bytes of a snapshot of states, 0 for a model without states; see snapshots.py.

    """

    rows: Mapping[str, RowSpec]
    snapshot_bytes: int = 0

    @classmethod
    def of(cls, *blocks: Block) -> Layout:
        """Return the layout of the rows of a pass."""
        rows = {name: _row_spec(t, block.token_axis) for block in blocks for name, t in block.tensors.items()}
        return cls(rows, max(map(snapshot_bytes_of, blocks)))

    def shape(self, name: str, num_tokens: int) -> tuple[int, ...]:
        """Return the shape of a tensor of `num_tokens` tokens."""
        axis, sizes = token_axis(name), self.rows[name].sizes
        return (*sizes[:axis], num_tokens, *sizes[axis:])

    @property
    def num_layers(self) -> int:
        """The number of layers with attention."""
        return sum(kind_of(name) == "keys" for name in self.rows)

    @property
    def times_smaller(self) -> float:
        """The ratio of the bytes of all of a token's rows to the bytes of its states alone."""
        num_bytes = {name: math.prod(row.sizes) * row.dtype.itemsize for name, row in self.rows.items()}
        return sum(num_bytes.values()) / sum(num_bytes[name] for name in STATE_TENSORS)


def _row_spec(tensor: Tensor, axis: int) -> RowSpec:
    return RowSpec(tensor.dtype, (*tensor.shape[:axis], *tensor.shape[axis + 1 :]), tensor.device)
