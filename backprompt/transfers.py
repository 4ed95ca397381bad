"""Copies between the host and a device that do not wait for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def on_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device; on the CPU the tensor may share the array's memory.

    A copy from ordinary memory to CUDA waits until the device has done all work before it. A copy from page-locked
    memory does not wait.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def index_on(rows: npt.NDArray[np.int64], device: torch.device) -> Tensor | slice:
    """Return row numbers as an index on a device. Consecutive rows are a slice, so nothing is copied to the device."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (rows[1:] - rows[:-1] == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return on_device(rows, device)


def copy_to(target: Tensor, values: npt.NDArray[Any]) -> None:
    """Copy an array into the beginning of a tensor with one axis, without waiting."""
    source = torch.from_numpy(np.ascontiguousarray(values))
    if target.device.type == "cuda":
        source = source.pin_memory()
    target[: len(source)].copy_(source, non_blocking=True)


class Arriving:
    """A copy of a tensor that is on its way to the host; later work on the device may overwrite the tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        is_cuda = tensor.device.type == "cuda"
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda)
        self._copy.copy_(tensor, non_blocking=is_cuda)
        self._has_arrived: torch.cuda.Event | None = None
        if is_cuda:
            self._has_arrived = torch.cuda.current_stream(tensor.device).record_event()

    def keep_behind(self, device: torch.device) -> None:
        """Let later work on the device's current stream wait for the copy, in case this is another stream."""
        if self._has_arrived is not None:
            torch.cuda.current_stream(device).wait_event(self._has_arrived)

    def numbers(self) -> npt.NDArray[Any]:
        """Return the copy; the first call waits for it, but not for work that was given to the device later."""
        if self._has_arrived is not None:
            self._has_arrived.synchronize()
            self._has_arrived = None
        found: npt.NDArray[Any] = self._copy.numpy()
        return found
