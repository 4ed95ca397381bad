"""The keys and values of a pass as its block holds them, and whether queries, keys and hidden states are finite.

A model's key may be a view of a tensor of queries, keys and values; a copy keeps only the key. torch's attention
returns finite numbers for some rows whose scores are NaN, so queries and keys are checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """The copies of one pass, made layer by layer. Shapes are those of `PreparedAttention.attend`."""

    def of(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return contiguous copies of keys and values in storage of their own.

        Queries and keys are checked for NaN and infinity; see `are_finite`.
        """
        ...

    def are_finite(self) -> Tensor:
        """Return whether all checked numbers so far are finite, `()`, on their device; `of` must have been called."""
        ...

    def check(self, hidden: Tensor) -> None:
        """Check final hidden states, `(tokens, hidden)`, for NaN and infinity; see `are_finite`."""
        ...


class PlainCopies:
    """Copies made by torch: four operations for each layer."""

    def __init__(self) -> None:
        self._extremes: list[Tensor] = []

    def of(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Copies`."""
        copies = _copy(key), _copy(value)
        self._extremes += (*query.aminmax(), *copies[0].aminmax())
        return copies

    def are_finite(self) -> Tensor:
        """See `Copies`."""
        return torch.stack(self._extremes).isfinite().all()

    def check(self, hidden: Tensor) -> None:
        """See `Copies`."""
        self._extremes += hidden.aminmax()


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return whether all numbers of tensors on one device are finite, `()`.

    An extreme of a tensor with NaN is NaN. `isfinite` of all numbers takes the CPU 20 times as long.
    """
    extremes = [extreme for tensor in tensors if tensor.numel() for extreme in tensor.aminmax()]
    return torch.stack(extremes).isfinite().all()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
