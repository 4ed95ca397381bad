"""The places where tensors are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Location:
    """The place where tensors are made: a device and, for the CPU, whether memory is pinned (page-locked).

    Attributes:
        device, is_pinned: see above.
        device_of: the devices of those tensors of a block that lie on another device, by the tensors' names.

    """

    device: torch.device
    is_pinned: bool = False
    device_of: Mapping[str, torch.device] = field(default_factory=dict)

    @classmethod
    def of(cls, tensor: Tensor) -> Location:
        """Return the location of a tensor."""
        return cls(tensor.device, tensor.is_pinned())

    def of_tensor(self, name: str) -> Location:
        """Return the location of a tensor of a block."""
        return Location(self.device_of[name], self.is_pinned) if name in self.device_of else self

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a new tensor here, with arbitrary content."""
        return torch.empty(shape, dtype=dtype, device=self.device, pin_memory=self.is_pinned)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy here; the copy is complete on return."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)
