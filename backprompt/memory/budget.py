"""Byte budgets: as users write them, and the defaults of the device and of the second pool."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from backprompt.arguments import is_int

DEFAULT_SHARE = 0.5
"""The default budget, as a share of the free memory of the device."""

DEFAULT_HOST_SHARE = 0.25
"""The default budget of the second pool, as a share of the free host memory."""

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_bytes(given: int | str, name: str = "memory_bytes") -> int:
    """Return a number of bytes given as an int or as text: "2 GB" is 2 * 10**9, "2 GiB" is 2 * 2**30.

    Raises:
        ValueError: the value is neither of these, or negative.

    """
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", given.lower())
        if match is not None and match[2] in _UNITS:
            return int(float(match[1]) * _UNITS[match[2]])
    elif is_int(given) and given >= 0:
        return int(given)
    raise ValueError(f'{name} must be a number of bytes such as 2_000_000_000 or "2 GB", not {given!r}.')


def default_max_bytes(device: torch.device) -> int:
    """Return the default budget: `DEFAULT_SHARE` of the memory that is free on the device now."""
    return int(free_bytes(device) * DEFAULT_SHARE)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device now; bytes that torch has reserved but does not use count as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return _free_host_bytes()


def default_host_bytes(device: torch.device) -> int:
    """Return the default budget of the second pool: `DEFAULT_HOST_SHARE` of the host memory that is free now.

    The budget is 0 if the device has no memory of its own.
    """
    return 0 if device.type in ("cpu", "mps") else int(_free_host_bytes() * DEFAULT_HOST_SHARE)


def _free_host_bytes() -> int:
    """Return the bytes of memory that programs may still take; a container's limit is respected."""
    free = _available_bytes()
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the file is missing, or says "max"
        return free
    return max(0, min(free, limit - used + int(counts.get("inactive_file", 0))))  # cached files can be reclaimed


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: total memory is the best estimate without more dependencies
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
