"""A suite: how it is measured, the rows that come out, and the tables and plots that show them.

Each suite is a file of `benchmarks/suites/`, which ends in `SUITE = ...`. The command line and the report find all
suites in that folder and know none by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine
from benchmarks.peer import PeerProgram
from benchmarks.plots import Plot
from benchmarks.rows import as_json, from_json
from benchmarks.tables import Table

Results = dict[str, Any]
"""The content of `results.json`: `machines`, by the name of a suite, and the rows that each suite keeps there."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """The rows that a suite found, and the machine that they were taken on."""

    rows: Any
    machine: Machine


class Suite(ABC):
    """All that the command line and the report ask of a suite."""

    name: str
    """On the command line, and in `results.json`."""
    place: int
    """Suites run, and are listed, in the order of these numbers."""
    rows_type: Any
    """A dataclass, or a list of one; see `rows.py`."""
    peer: PeerProgram | None = None
    """The program in an environment of its own that the suite compares backprompt with."""

    @abstractmethod
    def measure(self, say: Say, peer_python: Path | None) -> Measured | None:
        """Measure all of it, and say each row as soon as it is there; None where that cannot be, having said why.

        Args:
            say: prints a text.
            peer_python: the interpreter of `peer`'s environment, where there is one.

        Raises:
            AssertionError: contenders differ in what they find, or would not do the same work.

        """

    @abstractmethod
    def tables(self, results: Results) -> list[Table]:
        """The suite's tables; `results` has its rows."""

    def plots(self, results: Results) -> list[Plot]:
        """The suite's plots; `results` has its rows."""
        return []

    def is_measured(self, results: Results) -> bool:
        """Whether `results` has the suite's rows."""
        return self.name in results

    def rows(self, results: Results) -> Any:
        """The suite's rows, of `rows_type`."""
        return from_json(self.rows_type, results[self.name])

    def keep(self, results: Results, rows: Any) -> None:
        """Write rows where `rows` finds them, in place of older ones."""
        results[self.name] = as_json(rows)
