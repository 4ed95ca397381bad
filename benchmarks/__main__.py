"""`python -m benchmarks`: measure, and write `benchmarks/results.json`, the tables and the plots.

python -m benchmarks                       everything, over an hour on two cores with nothing else running
python -m benchmarks --only five others    these suites; the others stay as they were measured before
python -m benchmarks --only cappr --cappr-python ~/cappr/bin/python    against CAPPr in its own environment
python -m benchmarks --report              no measuring: tables and plots from results.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cappr, generation, harness, lookahead, search, store
from benchmarks.bench import Bench, describe_machine
from benchmarks.report import draw_plots, table, write_tables
from benchmarks.workloads import SUITES

RESULTS = Path(__file__).parent / "results.json"

OTHER_SUITES: dict[str, Callable[..., Any]] = {
    "store": store.measure,
    "lm-eval": harness.measure,
    "search": search.measure,
    "generation": generation.measure,
    "lookahead": lookahead.measure,
    "cappr": cappr.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*(suite.name for suite in SUITES), *OTHER_SUITES], help="suites to measure"
    )
    parser.add_argument(
        "--cappr-python",
        type=Path,
        metavar="PATH",
        default=os.environ.get("CAPPR_PYTHON"),
        help="the interpreter of an environment with CAPPr, for the suite cappr; default: $CAPPR_PYTHON",
    )
    parser.add_argument(
        "--vllm-python",
        type=Path,
        metavar="PATH",
        default=os.environ.get("VLLM_PYTHON"),
        help="the interpreter of an environment with vLLM, for the suite generation; default: $VLLM_PYTHON",
    )
    parser.add_argument("--report", action="store_true", help="measure nothing; write tables and plots")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.cappr_python is not None and not arguments.cappr_python.is_file():
        parser.error(f"there is no interpreter {arguments.cappr_python}.\n{cappr.HOW_TO_INSTALL}")
    if arguments.vllm_python is not None and not arguments.vllm_python.is_file():
        parser.error(f"there is no interpreter {arguments.vllm_python}.")
    if not arguments.report:
        _measure(arguments.results, arguments.only, arguments.cappr_python, arguments.vllm_python)
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    if arguments.results == RESULTS:
        write_tables(results)
    draw_plots(results, arguments.results.parent / "plots")


def _measure(path: Path, only: list[str] | None, cappr_python: Path | None, vllm_python: Path | None) -> None:
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machines": {}, "lines": []}
    chosen = [suite for suite in SUITES if not only or suite.name in only]
    bench = Bench() if chosen else None
    for suite in chosen:
        assert bench is not None
        lines = []
        for make in suite.workloads:
            lines.append(asdict(bench.measure(suite, make())))
            print(table(lines[-1:]), flush=True)
        results["machines"][suite.name] = describe_machine(bench.lm)
        results["lines"] = [line for line in results["lines"] if line["suite"] != suite.name] + lines
        _write(path, results)  # a suite that is done is kept
    for name in OTHER_SUITES:
        if only and name not in only:
            continue
        if name == "cappr" and cappr_python is None:
            print(cappr.HOW_TO_INSTALL)
            continue
        say = partial(print, flush=True)
        measure = OTHER_SUITES[name]
        if name == "cappr":
            measure = partial(measure, cappr_python)
        if name == "generation":
            measure = partial(measure, vllm_python=vllm_python)
        results[name], results["machines"][name] = measure(say)
        _write(path, results)


def _write(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
