"""`python -m benchmarks`: measure, and write `benchmarks/results.json`, the tables and the plots.

python -m benchmarks                       everything, over an hour on two cores with nothing else running
python -m benchmarks --only five others    these suites; the others stay as they were measured before
python -m benchmarks --only cappr --cappr-python ~/cappr/bin/python    against CAPPr in its own environment
python -m benchmarks --report              no measuring: tables and plots from results.json
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from benchmarks.peer import PeerProgram
from benchmarks.report import draw_plots, write_tables
from benchmarks.suite import Results, Suite
from benchmarks.suites import find_suites

RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    suites = find_suites()
    peers = sorted(((suite.peer, suite) for suite in suites if suite.peer is not None), key=lambda pair: pair[0].option)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[suite.name for suite in suites], help="suites to measure")
    for peer, suite in peers:
        parser.add_argument(
            peer.option,
            type=Path,
            metavar="PATH",
            default=peer.default,
            help=f"the interpreter of an environment with {peer.name}, for the suite {suite.name}; "
            f"default: ${peer.variable}",
        )
    parser.add_argument("--report", action="store_true", help="measure nothing; write tables and plots")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()
    pythons: dict[PeerProgram, Path | None] = {peer: getattr(arguments, peer.destination) for peer, _ in peers}
    for peer, python in pythons.items():
        if python is not None and not python.is_file():
            parser.error("\n".join(filter(None, [f"there is no interpreter {python}.", peer.how_to_install])))
    if not arguments.report:
        chosen = [suite for suite in suites if not arguments.only or suite.name in arguments.only]
        _measure(arguments.results, chosen, pythons)
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    if arguments.results == RESULTS:
        write_tables(results)
    draw_plots(results, arguments.results.parent / "plots")


def _measure(path: Path, suites: list[Suite], pythons: dict[PeerProgram, Path | None]) -> None:
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machines": {}, "lines": []}
    say = partial(print, flush=True)
    for suite in suites:
        measured = suite.measure(say, pythons[suite.peer] if suite.peer is not None else None)
        if measured is not None:
            suite.keep(results, measured.rows)
            results["machines"][suite.name] = measured.machine
            _write(path, results)  # a suite that is done is kept


def _write(path: Path, results: Results) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
