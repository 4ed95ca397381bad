"""The plots and the pages with tables, from `results.json`. Tables stand between markers and are rewritten in place."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.machine import as_sentence
from benchmarks.plots import Plot, write_plots
from benchmarks.suite import Results, Suite
from benchmarks.suites import find_suites
from benchmarks.tables import Table

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "performance.md")


def write_tables(results: Results) -> None:
    """Rewrite what stands between `<!-- NAME -->` and `<!-- /NAME -->` on the pages."""
    tables = tables_of(results)
    for path in PAGES:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


def draw_plots(results: Results, folder: Path) -> None:
    """Write the plots of all measured suites."""
    write_plots(plots_of(results), folder)


def tables_of(results: Results) -> dict[str, str]:
    """The text of every table, by its marker.

    Raises:
        ValueError: two tables have the same marker.

    """
    tables = [table for suite in _measured(results) for table in suite.tables(results)]
    tables.append(Table("machine", _machines(results)))
    texts = {table.marker: table.text for table in tables}
    if len(texts) < len(tables):
        raise ValueError(f"Two tables have the same marker: {sorted(table.marker for table in tables)}.")
    return texts


def plots_of(results: Results) -> list[Plot]:
    """The plots of all measured suites."""
    return [plot for suite in _measured(results) for plot in suite.plots(results)]


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with every marked part replaced; one whose suite was not measured stays as it is."""

    def replace(match: re.Match[str]) -> str:
        if match[1] not in tables:
            return match[0]
        return f"<!-- {match[1]} -->\n{tables[match[1]]}\n<!-- /{match[1]} -->"

    return re.sub(r"^<!-- ((?:table )?\w+) -->\n.*?^<!-- /\1 -->", replace, page, flags=re.DOTALL | re.M)


def _machines(results: Results) -> str:
    """Return the machines, each behind the names of the suites that were measured on it."""
    names: dict[str, list[str]] = {}
    for name, machine in results["machines"].items():
        names.setdefault(as_sentence(machine), []).append(name)
    return "\n".join(f"- *{', '.join(own)}*: {machine}" for machine, own in names.items())


def _measured(results: Results) -> list[Suite]:
    return [suite for suite in find_suites() if suite.is_measured(results)]
