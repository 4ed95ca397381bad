"""A contest: a suite of workloads that backprompt and its rivals of this process run in turns, a row a workload."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.bench import Bench, Line
from benchmarks.contenders import BACKPROMPT, RIVALS, Rival
from benchmarks.machine import describe_machine
from benchmarks.rows import as_json, from_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, megabytes, with_range
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Contest(Suite):
    """Workloads that one table shows together, and how often each is run."""

    rows_type = list[Line]

    name: str
    place: int
    workloads: tuple[Callable[[], Workload], ...]
    rounds: int
    rivals: tuple[Rival, ...]

    def measure(self, say: Say, peer_python: Path | None) -> Measured:
        bench = _bench()
        lines = []
        for make in self.workloads:
            lines.append(bench.measure(self.name, make(), self.rivals, self.rounds))
            say(line_table(lines[-1:]))
        return Measured(lines, describe_machine(bench.lm))

    def tables(self, results: Results) -> list[Table]:
        return [Table(f"table {self.name}", line_table(self.rows(results)))]

    def is_measured(self, results: Results) -> bool:
        return bool(self.rows(results))

    def rows(self, results: Results) -> list[Line]:
        """The contest's lines among those of all contests, which lie in one list."""
        own = [line for line in results["lines"] if line["suite"] == self.name]
        lines: list[Line] = from_json(self.rows_type, own)
        return lines

    def keep(self, results: Results, rows: list[Line]) -> None:
        others = [line for line in results["lines"] if line["suite"] != self.name]
        results["lines"] = others + as_json(rows)


@cache
def _bench() -> Bench:
    """The model of all contests of this process, made and warmed up when the first one is measured."""
    return Bench()


def line_table(lines: list[Line]) -> str:
    """All measured columns, a Markdown row a workload."""
    rivals = [rival for rival in RIVALS if any(rival.name in line.seconds for line in lines)]
    headings = [
        "workload",
        "tokens in all strings",
        "computed",
        "seconds (lowest to highest)",
        "control",
        "of the matmul limit",
        "of the dense forward",
        *(rival.heading for rival in rivals),
        "peak MB",
        *(f"{rival.heading}, MB" for rival in rivals),
    ]
    return markdown(headings, [_cells(line, rivals) for line in lines])


def _cells(line: Line, rivals: list[Rival]) -> list[str]:
    assert line.fraction_of_matmul_limit is not None
    assert line.fraction_of_dense_forward is not None
    return [
        line.workload,
        f"{line.tokens_in_strings:,}",
        f"{line.tokens_computed:,}",
        with_range(line.seconds[BACKPROMPT.name]),
        f"{line.seconds['control'].median:.2f}",
        with_range(line.fraction_of_matmul_limit),
        with_range(line.fraction_of_dense_forward),
        *(rival_seconds(line, rival) for rival in rivals),
        megabytes(line.peak_bytes.get(BACKPROMPT.name)),
        *(megabytes(line.peak_bytes.get(rival.name)) for rival in rivals),
    ]


def rival_seconds(line: Line, rival: Rival) -> str:
    """A rival's seconds, behind `~` where a sample was timed; empty where it did not run."""
    if rival.name not in line.seconds:
        return ""
    return ("~" if rival.name in line.sampled else "") + f"{line.seconds[rival.name].median:.1f}"


def times_as_long(line: Line, rival: Rival) -> str:
    """How many times as long a rival takes: the median over the rounds in which it ran, two digits."""
    pairs = zip(line.seconds[rival.name].values, line.seconds[BACKPROMPT.name].values)  # noqa: B905  # fewer rounds
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{float(f'{ratio:.1e}'):.0f}x"
