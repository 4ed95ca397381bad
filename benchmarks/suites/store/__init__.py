"""The memory budget and the database: reads, writes, look-ups and evictions, and their costs."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from backprompt import LM, Text, evaluate
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.suites.store.budget import Budget, measure_budget
from benchmarks.suites.store.entries import ManyEntries, Precision, Run, measure_many, measure_precision, measure_runs
from benchmarks.suites.store.fresh import FreshProcess, measure_fresh_process
from benchmarks.tables import Table


@dataclass(frozen=True)
class Rows:
    """The suite's parts, in the order in which they are measured."""

    fresh_process: Annotated[FreshProcess, Key("fresh process")]
    runs: list[Run]
    precision: list[Precision]
    many_entries: Annotated[ManyEntries, Key("many entries")]
    budget: Budget


class Store(Suite):
    name = "store"
    place = 60
    rows_type = Rows

    def measure(self, say: Say, peer_python: Path | None) -> Measured:
        model, tokenizer = workloads.make_model(), workloads.make_tokenizer()

        def said(name: str, part: Any) -> Any:
            say(f"{name}: {json.dumps(as_json(part))}")
            return part

        with tempfile.TemporaryDirectory(prefix="backprompt-bench-") as name:
            folder = Path(name)
            rows = Rows(
                fresh_process=said("fresh process", measure_fresh_process(model, tokenizer, folder)),
                runs=said("runs", measure_runs(model, tokenizer, folder)),
                precision=said("precision", measure_precision(model, tokenizer, folder)),
                many_entries=said("many entries", measure_many(folder)),
                budget=said("budget", measure_budget(model, tokenizer, folder)),
            )
        lm = LM(model, tokenizer)
        evaluate(Text("which kernel serves", lm))
        return Measured(rows, describe_machine(lm))

    def tables(self, results: Results) -> list[Table]:
        rows = self.rows(results)
        return [
            *rows.fresh_process.tables(),
            Run.table(rows.runs),
            Precision.table(rows.precision),
            rows.many_entries.table(),
            rows.budget.table(),
        ]


SUITE = Store()
