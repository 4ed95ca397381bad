"""Tables in Markdown, and how their cells show what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measure import Spread


@dataclass(frozen=True)
class Table:
    """A text that stands between `<!-- {marker} -->` and `<!-- /{marker} -->` in the README files."""

    marker: str
    text: str


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join(map(markdown_row, [headings, ["---"] * len(headings), *rows]))


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def with_range(spread: Spread, num_digits: int = 2) -> str:
    """The median, and in parentheses the lowest and the highest."""
    median, lowest, highest = (f"{value:.{num_digits}f}" for value in (spread.median, spread.lowest, spread.highest))
    return f"{median} ({lowest} to {highest})"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def megabytes(num_bytes: int | None) -> str:
    """In whole megabytes; empty where the system did not tell."""
    return "" if num_bytes is None else f"{num_bytes / 1e6:,.0f}"
