"""The suite: both processes, all cases, and the plot by the number of classes."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.peer import Peer, PeerProgram
from benchmarks.plots import Plot, draw_curves, draw_doubling_ticks, draw_legend
from benchmarks.rows import as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.suites.cappr.cases import cases
from benchmarks.suites.cappr.duel import Duel, save_for_cappr
from benchmarks.suites.cappr.rows import CAPPR, CURVE, NAMES, Rows, tables_of
from benchmarks.tables import Table

HOW_TO_INSTALL = """\
CAPPr is not measured: it needs an environment of its own, with the versions that it works with. Make one and say where:

    python3 -m venv ~/cappr
    ~/cappr/bin/pip install 'torch==2.13.0' 'transformers==4.49.0' accelerate 'cappr==0.9.6' 'numpy<2'
    python -m benchmarks --only cappr --cappr-python ~/cappr/bin/python"""


class Cappr(Suite):
    name = "cappr"
    place = 110
    rows_type = Rows
    peer = PeerProgram(CAPPR.name, HOW_TO_INSTALL)

    def measure(self, say: Say, peer_python: Path | None) -> Measured | None:
        if peer_python is None:
            say(HOW_TO_INSTALL)
            return None
        model, tokenizer = workloads.make_model(), workloads.make_tokenizer()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="backprompt-bench-")))
            save_for_cappr(model, tokenizer, folder)
            cappr = stack.enter_context(Peer(peer_python, "cappr_process", folder))
            duel = Duel(cappr, model, tokenizer)
            lines = []
            for case in cases():
                lines.append(duel.measure(case))
                say(json.dumps(as_json(lines[-1])))
            memory = duel.measure_memory()
            say(json.dumps(as_json(memory)))
            return Measured(Rows(**cappr.started, lines=lines, memory=memory), describe_machine(duel.lm))

    def tables(self, results: Results) -> list[Table]:
        return tables_of(self.rows(results))

    def plots(self, results: Results) -> list[Plot]:
        return [Plot("classes", partial(draw_classes, rows=self.rows(results)))]


def draw_classes(axes: Any, rows: Rows) -> None:
    curve, names = rows.of("curve"), rows.of("names")
    xs = [line.classes for line in curve]
    draw_curves(axes, xs, [line.seconds for line in curve], CURVE)
    for contender in NAMES:
        axes.plot(
            xs,
            [line.seconds[contender.name].median for line in names],
            ":",
            marker=contender.look.marker,
            markersize=5,
            markerfacecolor="none",
            label=f"{contender.name}, names of one token",
            color=contender.look.colour,
        )
    draw_legend(axes)
    draw_doubling_ticks(axes, xs)
    axes.set_xlabel("number of classes; 96 inputs")


SUITE = Cappr()
