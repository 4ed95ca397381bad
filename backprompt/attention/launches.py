"""Launches of Triton's kernels that take the host little time.

Triton examines each argument of a launch in Python, to find the compiled kernel. That takes longer than a layer of a
small model takes on the device. So compiled kernels are kept here, by all properties on which they depend, and called
with addresses instead of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
"""Whether a compiled kernel is also called with its constants. In older versions each launch goes through Triton."""


knobs: Any = getattr(triton, "knobs", None)
"""Triton's settings; None in older versions."""


class Launcher:
    """A kernel with its constants.

    The tensors of all launches must have the same device and dtypes; another device or dtype needs another launcher.

    Args:
        kernel: its arguments are tensors, then whole numbers, then numbers that Triton does not specialise on, then
            constants.
        constants: by name, in the order of the kernel's arguments.
        options: `num_warps` and `num_stages`.

    """

    def __init__(self, kernel: Any, constants: Mapping[str, object], options: Mapping[str, int]) -> None:
        self.kernel = kernel
        self._constants = dict(constants)
        self._values = tuple(constants.values())
        self._options = dict(options)
        self._compiled: dict[object, Any] = {}

    def launch(
        self, num_programs: int, tensors: Sequence[Tensor], sizes: Sequence[int] = (), others: Sequence[float] = ()
    ) -> None:
        """Launch `num_programs` programs on the device of the tensors."""
        device = tensors[0].device
        if not _is_current(device):
            with torch.cuda.device(device):
                return self.launch(num_programs, tensors, sizes, others)
        addresses = [*map(_address_of, tensors)]
        is_long = max(others, default=0) >= 1 << 31  # the first launch decides the number of bits of each
        # Triton specialises on addresses and sizes that are multiples of 16, on 1, and on more than 31 bits.
        kind = (
            is_long,
            *[address % 16 for address in addresses],
            *[-1 if size >= 1 << 31 else 0 if size % 16 == 0 else 1 if size == 1 else 2 for size in sizes],
        )
        compiled = self._compiled.get(kind)
        if compiled is not None:
            return _run(compiled, num_programs, device.index or 0, (*addresses, *sizes, *others, *self._values))
        compiled = self.kernel[num_programs,](*tensors, *sizes, *others, **self._constants, **self._options)
        if compiled is not None and TAKES_CONSTANTS:  # the interpreter compiles nothing
            self._compiled[kind] = compiled
        return None


_address_of = Tensor.data_ptr


def _run(compiled: Any, num_programs: int, device_idx: int, args: Sequence[object]) -> None:
    """Launch a compiled kernel. `compiled[...]` describes each launch for the hooks of profilers, even without any."""
    if are_launches_hooked():
        compiled[num_programs, 1, 1](*args)
        return
    stream = driver.active.get_current_stream(device_idx)
    compiled.run(num_programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def are_launches_hooked() -> bool:
    """Return whether a profiler watches launches; true in versions of Triton whose hooks are elsewhere."""
    if knobs is None:
        return True
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # a chain of hooks, one, or None


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a device is the current one."""
    return _AS_IS if _is_current(device) else torch.cuda.device(device)


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch._C._cuda_getDevice()


_AS_IS: AbstractContextManager[None] = nullcontext()
