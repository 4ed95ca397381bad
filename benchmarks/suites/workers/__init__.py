"""Several workers of Ray on this machine, and what more of them on more machines would do.

Ray starts its workers with a niceness of 15, so that other processes go first; here it is 0, since nothing else runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from backprompt import LM
from backprompt.engines.ray import RayLM
from benchmarks.machine import describe_machine
from benchmarks.rows import as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.suites.workers import duel, simulation
from benchmarks.suites.workers.duel import NUM_CORES, ONE_PROCESS, ONE_WORKER, TWO_WORKERS, Work, generated, scored
from benchmarks.suites.workers.simulation import Measures, simulated
from benchmarks.tables import Table, markdown, milliseconds, with_range

NO_RAY = "The workers are not measured: they need Ray. pip install 'backprompt-lm[ray]'"
NICENESS = 0
NUM_PROMPTS = (20_000, 1_000_000)
"""Of the calls that are simulated."""


@dataclass(frozen=True)
class Rows:
    """What was measured on this machine, and what follows from it."""

    duels: list[duel.Line]
    measures: Measures
    simulated: list[simulation.Line]


def works() -> tuple[Work, ...]:
    return (scored(48, 16, 190), scored(48, 4, 0), generated(16, 32, 170))


class Workers(Suite):
    name = "workers"
    place = 67
    rows_type = Rows

    def measure(self, say: Say, peer_python: object) -> Measured | None:
        if find_spec("ray") is None:
            say(NO_RAY)
            return None
        return measured(say, works(), NUM_PROMPTS)

    def tables(self, results: Results) -> list[Table]:
        rows: Rows = self.rows(results)
        return [
            Table("table workers", duel_table(rows.duels)),
            Table("table simulation", f"{simulation_table(rows.simulated)}\n\n{as_sentence(rows.measures)}"),
        ]


def measured(say: Say, works: tuple[Work, ...], nums_prompts: tuple[int, ...]) -> Measured:
    """Measure this machine, and simulate calls of so many prompts."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_CORES)
    try:
        with _ray():
            lm = LM(*duel.loader())
            with RayLM(duel.loader, num_workers=2) as two, RayLM(duel.loader) as one:
                duels = []
                for line in duel.measured(works, lm, two, one):
                    duels.append(line)
                    say(duel_table([line]))
            with RayLM(simulation.tiny) as tiny:
                measures = simulation.measured(tiny, _rate(duels[0]))
            say(json.dumps(as_json(measures)))
    finally:
        torch.set_num_threads(num_threads)
    lines = [line for num_prompts in nums_prompts for line in simulated(measures, num_prompts)]
    say(simulation_table(lines))
    machine = describe_machine(lm) | {"threads": NUM_CORES, "niceness of workers": NICENESS}
    return Measured(Rows(duels, measures, lines), machine)


@contextmanager
def _ray() -> Iterator[None]:
    import ray

    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(num_cpus=NUM_CORES + 1, _system_config={"worker_niceness": NICENESS}, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _rate(line: duel.Line) -> float:
    """Return the tokens that a worker of one thread computes in a second."""
    return line.tokens[ONE_WORKER][0] / line.seconds[ONE_WORKER].median


def duel_table(lines: list[duel.Line]) -> str:
    headings = [
        "GPT-2 124M, two cores",
        "tokens, one process",
        "two workers",
        "seconds, one process of two threads",
        "two workers of one thread",
        "times faster",
        "one worker of one thread",
        "largest gap, nats",
    ]
    rows = [
        [
            line.work,
            f"{line.tokens[ONE_PROCESS][0]:,}",
            " + ".join(f"{tokens:,}" for tokens in line.tokens[TWO_WORKERS]),
            *(with_range(line.seconds[name]) for name in (ONE_PROCESS, TWO_WORKERS)),
            with_range(line.ratio),
            with_range(line.seconds[ONE_WORKER]),
            f"{line.gap:.1g}",
        ]
        for line in lines
    ]
    return markdown(headings, rows)


def simulation_table(lines: list[simulation.Line]) -> str:
    headings = [
        "prompts",
        "workers",
        "computed by distinct",
        "slowest part, s",
        "driver, s",
        "network, s",
        "all, s",
        "times faster than one worker",
    ]
    rows = [
        [
            f"{line.num_texts:,}",
            f"{line.num_workers}",
            f"{line.of_distinct:.3f}",
            *(f"{seconds:,.1f}" for seconds in (line.slowest, line.driver, line.moving)),
            f"{line.slowest + line.driver + line.moving:,.1f}",
            f"{line.faster:.1f}",
        ]
        for line in lines
    ]
    return markdown(headings, rows)


def as_sentence(measures: Measures) -> str:
    """The rates behind the simulation."""
    return (
        f"Measured here: a worker computes {measures.tokens_a_second:,.0f} tokens a second; the driver spends "
        f"{1e6 * measures.driver_seconds_a_text:.0f} microseconds on a text; a question to a worker takes "
        f"{milliseconds(measures.seconds_a_question)} milliseconds; ids and results of a text take "
        f"{measures.bytes_a_text:,.0f} bytes. Assumed: a network of 10 Gbit/s."
    )


SUITE = Workers()
