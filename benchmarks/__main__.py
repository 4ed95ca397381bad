"""`python -m benchmarks`: measure, and write `benchmarks/results.json`, the tables and the plots.

python -m benchmarks                       everything, over an hour on two cores with nothing else running
python -m benchmarks --only five others    these suites; the others stay as they were measured before
python -m benchmarks --only cappr --cappr-python ~/cappr/bin/python    against CAPPr in its own environment
python -m benchmarks --gpu                 the suite gpu alone, in less than five minutes; JSON lines as it goes
python -m benchmarks --report              no measuring: tables and plots from results.json
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

from benchmarks.peer import PeerProgram
from benchmarks.report import draw_plots, write_tables
from benchmarks.suite import Measured, Results, Suite
from benchmarks.suites import find_suites, gpu

RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    suites = find_suites()
    peers = sorted({suite.peer for suite in suites if suite.peer is not None}, key=lambda peer: peer.option)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[suite.name for suite in suites], help="suites to measure")
    for peer in peers:
        names = " and ".join(suite.name for suite in suites if suite.peer == peer)
        parser.add_argument(
            peer.option,
            type=Path,
            metavar="PATH",
            default=peer.default,
            help=f"the interpreter of an environment with {peer.name}, for the suites {names}; "
            f"default: ${peer.variable}",
        )
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU, and nothing else")
    parser.add_argument("--seconds", type=float, default=gpu.SECONDS, help="of --gpu at most; default: %(default)s")
    parser.add_argument("--try-out", action="store_true", help="with --gpu: tiny, on the CPU, and nothing is kept")
    parser.add_argument("--report", action="store_true", help="measure nothing; write tables and plots")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.gpu and not arguments.try_out and not gpu.is_there():
        parser.error(gpu.WHY_NOT)
    pythons: dict[PeerProgram, Path | None] = {peer: getattr(arguments, peer.destination) for peer in peers}
    for peer, python in pythons.items():
        if python is not None and not python.is_file():
            parser.error("\n".join(filter(None, [f"there is no interpreter {python}.", peer.how_to_install])))
    if arguments.gpu:
        _measure_gpu(arguments.results, arguments.seconds, is_try_out=arguments.try_out)
        return
    if not arguments.report:
        chosen = [suite for suite in suites if not arguments.only or suite.name in arguments.only]
        _measure(arguments.results, chosen, pythons)
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    if arguments.results == RESULTS:
        write_tables(results)
    draw_plots(results, arguments.results.parent / "plots")


def _measure_gpu(path: Path, seconds: float, *, is_try_out: bool) -> None:
    results = _read(path)

    def keep(measured: Measured) -> None:
        if not is_try_out:
            gpu.SUITE.keep(results, measured.rows)
            results["machines"][gpu.SUITE.name] = measured.machine
            _write(path, results)

    gpu.measured(gpu.sizes(is_try_out=is_try_out), seconds, partial(print, flush=True), keep)


def _measure(path: Path, suites: list[Suite], pythons: dict[PeerProgram, Path | None]) -> None:
    results = _read(path)
    say = partial(print, flush=True)
    for suite in suites:
        started = time.monotonic()
        measured = suite.measure(say, pythons[suite.peer] if suite.peer is not None else None)
        if measured is not None:
            suite.keep(results, measured.rows)
            results["machines"][suite.name] = measured.machine
            _write(path, results)  # a suite that is done is kept
        say(f"{suite.name}: {(time.monotonic() - started) / 60:.1f} minutes\n")


def _read(path: Path) -> Results:
    found: Results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machines": {}, "lines": []}
    return found


def _write(path: Path, results: Results) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
