"""Recordings of work on a device: Python launches the work once, and from then on a graph launches it as a whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backprompt.attention.base import CannotStandError
from backprompt.memory.blocks import KeysValues
from backprompt.model.in_flight import InFlight


@dataclass(frozen=True)
class Output:
    """The results of a step, in tensors that each replay fills anew.

    Attributes:
        hidden: final hidden states, `(rows, hidden)`.
        keys_values: the keys and values of all rows.
        is_finite: 1 if the step's own rows, and the rows that were placed, are finite, `()`, int32.
        in_flight: the state of the forward call that was recorded.
        logits: the logits behind each row, `(rows, vocab)`; None where the head is not part of the step.
        report: the numbers for the host, `(numbers, rows)`; see report.py.

    """

    hidden: Tensor
    keys_values: KeysValues
    is_finite: Tensor
    in_flight: InFlight
    logits: Tensor | None
    report: Tensor

    def sources(self) -> npt.NDArray[np.int64]:
        """Return the addresses of the tensors that are copied to places, in the order of `Places.addresses`."""
        found = [(tensor.data_ptr(), tensor.stride(0), *tensor.shape[::2]) for tensor in self.keys_values.in_order()]
        return np.array([*found, (self.hidden.data_ptr(), 0, 1, self.hidden.shape[1])], dtype=np.int64)


@dataclass(frozen=True)
class Recording:
    """Recorded work.

    Attributes:
        plain: the results of the first run, which was not recorded; None after the comparison with a replay.
        output: the tensors that `replay` fills.
        replay: does the work.
        num_bytes: the memory that the recording took, in addition to the memory of earlier recordings.

    """

    plain: Output | None
    output: Output
    replay: Callable[[], None]
    num_bytes: int = 0


_ATEN = torch.ops.aten
_WAITING = frozenset(
    {
        _ATEN._local_scalar_dense,
        _ATEN._unique2,
        _ATEN.bincount,
        _ATEN.equal,
        _ATEN.lift_fresh,  # of `torch.tensor(numbers, device=...)`, which copies the numbers out of a mode's sight
        _ATEN.masked_select,
        _ATEN.nonzero,
        _ATEN.repeat_interleave,
        _ATEN.unique_consecutive,
        _ATEN.unique_dim,
    }
)
_PICKING = frozenset({_ATEN.index, _ATEN.index_put, _ATEN.index_put_})
"""Operations that wait for the device if an index is a mask, or lies elsewhere."""
_COPYING = frozenset({_ATEN._to_copy, _ATEN.copy_})


class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which operations that wait for the device, or copy from one to another, raise an error.

    A recording cannot hold such an operation, and a failed recording leaves random numbers on CUDA unusable.

    Args:
        device_type: the type of the device.

    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation, or raise CannotStandError."""
        packet = func.overloadpacket
        flat = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        tensors = [each for each in flat if isinstance(each, Tensor)]
        is_here = any(tensor.device.type == self._device_type for tensor in tensors)
        picks = packet in _PICKING and any(map(self._is_waited_for, tensors[1:]))
        if is_here and (packet in _WAITING or picks):
            raise CannotStandError(f"the model waits for the device in {packet}")
        found = func(*args, **(kwargs or {}))
        devices = {tensor.device.type for tensor in (*tensors, found) if isinstance(tensor, Tensor) and tensor.dim()}
        if packet in _COPYING and len(devices) > 1:
            raise CannotStandError("the model copies numbers from one device to another")
        return found

    def _is_waited_for(self, index: Tensor) -> bool:
        return index.dtype in (torch.bool, torch.uint8) or index.device.type != self._device_type


class Recorder(Protocol):
    """Records work on a device."""

    def __call__(self, compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
        """Record the function `compute`, and `finish` with its output."""
        ...


class CudaRecorder:
    """Records work as CUDA graphs, which share one pool of memory.

    Args:
        device: the device.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
        """See `Recorder`. A first run on the same stream makes the allocations that the work needs only once."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            alive = list(self._graphs)  # until the recording has begun
            if not alive:  # torch cannot use a pool whose graphs are all freed
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.stream(self._stream):
                plain = compute()  # makes tables and compiles kernels, once
                finish(plain)
                with NoWaits(self._device.type):
                    compute()
                self._stream.synchronize()
                reserved = torch.cuda.memory_reserved()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = compute()
                    finish(output)
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            current.wait_stream(self._stream)
            num_bytes = max(0, torch.cuda.memory_reserved() - reserved)
        del alive
        self._graphs.add(graph)

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return Recording(plain, output, replay, num_bytes)
