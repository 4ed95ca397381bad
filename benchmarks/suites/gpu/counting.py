"""Counts beside the clock: the phases of a call, launches, synchronisations, and memory."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.suites.gpu.rigs import Rig


def phases_of(rig: Rig, run: Callable[[], object]) -> dict[str, float]:
    """The seconds of the body with its attention, of the output head, and of the rest, each synchronised."""
    executor = rig.lm.session.evaluator.executor
    seconds: Counter[str] = Counter()
    with _timed(rig, executor, "forward", seconds), _timed(rig, executor, "logits", seconds):
        total = rig.seconds_of(run)
    forward, head = seconds["forward"], seconds["logits"]
    return {"forward": forward, "head": head, "rest": total - forward - head}


@contextmanager
def _timed(rig: Rig, executor: Any, name: str, seconds: Counter[str]) -> Iterator[None]:
    plain = getattr(executor, name)

    def timed(*arguments: Any, **keywords: Any) -> Any:
        rig.synchronise()
        started = time.perf_counter()
        found = plain(*arguments, **keywords)
        rig.synchronise()
        seconds[name] += time.perf_counter() - started
        return found

    setattr(executor, name, timed)
    try:
        yield
    finally:
        delattr(executor, name)


def launches_of(rig: Rig, run: Callable[[], object]) -> int | None:
    """How many kernels were launched; None without CUDA."""
    if rig.device.type != "cuda":
        run()
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        rig.seconds_of(run)
    return sum(event.count for event in profiled.key_averages() if "LaunchKernel" in event.key)


def synchronisations_of(rig: Rig, run: Callable[[], object]) -> Counter[str] | None:
    """Where the host waited for the device, how often at each line; None without CUDA."""
    if rig.device.type != "cuda":
        run()
        return None
    rig.synchronise()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    rig.synchronise()
    found = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return Counter(f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}" for warning in found)


def peak_bytes_of(rig: Rig, run: Callable[[], object]) -> int | None:
    """The most bytes that tensors took on the device at a time, those before left out; None without CUDA."""
    if rig.device.type != "cuda":
        run()
        return None
    rig.synchronise()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    rig.synchronise()
    return torch.cuda.max_memory_allocated() - before
