"""A GPU: whole calls of forests against plain padded batches, a batched cache recipe, and the linear layers alone.

`python -m benchmarks --gpu` takes less than five minutes on one H100. Random weights from a seed, drawn token ids,
every clock read after a synchronisation, the best of three after a warm-up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.machine import describe_machine
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.suites.gpu import steps
from benchmarks.suites.gpu.lines import Line, table_of
from benchmarks.tables import Table

SECONDS = 280.0
"""The budget of one run."""
WHY_NOT = "no GPU: torch.cuda.is_available() is False. With --try-out all steps run small, on the CPU."


class Gpu(Suite):
    name = "gpu"
    place = 90
    rows_type = list[Line]

    def measure(self, say: Say, peer_python: object) -> Measured | None:
        if not is_there():
            say(f"The suite gpu is left out: {WHY_NOT}")
            return None
        return measured(sizes(), SECONDS, say, lambda found: None)

    def rows(self, results: Results) -> list[Line]:
        return super().rows(results) if self.is_measured(results) else []

    def tables(self, results: Results) -> list[Table]:
        return [Table("table gpu", table_of(self.rows(results)))]


def is_there() -> bool:
    return torch.cuda.is_available()


def sizes(*, is_try_out: bool = False) -> steps.Sizes:
    """All of it on CUDA, or a try-out on the CPU."""
    return steps.try_out() if is_try_out else steps.on_cuda()


def measured(sizes: steps.Sizes, seconds: float, say: Say, keep: Callable[[Measured], None]) -> Measured:
    """Measure within a budget; `keep` gets all that is there after each step, so that a run can be cut off."""
    measuring = steps.Measuring(sizes, seconds, say)
    found = Measured([], {})
    for _ in measuring.run():
        rig = measuring.any_rig()
        machine = describe_machine(rig.lm)
        if sizes.device.type == "cuda":
            machine |= {"GPU": torch.cuda.get_device_name()}
        found = Measured(list(measuring.lines.values()), machine)
        keep(found)
    say(table_of(found.rows))
    return found


SUITE = Gpu()
