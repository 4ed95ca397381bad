"""Plots: how contenders look, and what the suites' plots have in common. Only drawing imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread

INKS = {"light": "#24292f", "dark": "#e6edf3"}
"""Of text and lines, by the theme of the page."""


@dataclass(frozen=True)
class Look:
    """How a contender is drawn: told by its marker without colour vision, too."""

    colour: str  # of Okabe and Ito, "Color Universal Design", whose colours are told apart without colour vision
    marker: str
    style: str = "-"


@dataclass(frozen=True)
class Contender:
    """A program that is timed: its name in `results.json` and in plots, and how plots draw it."""

    name: str
    look: Look


@dataclass(frozen=True)
class Plot:
    """A plot: `{name}-{theme}.svg`, drawn on the axes of matplotlib."""

    name: str
    draw: Callable[[Any], None]


def files_of(plot: Plot, folder: Path) -> dict[str, Path]:
    """Where a plot is written, by theme."""
    return {theme: folder / f"{plot.name}-{theme}.svg" for theme in INKS}


def write_plots(plots: Iterable[Plot], folder: Path) -> None:
    """Write each plot for light and for dark pages."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "backprompt"  # the same numbers give the same file
    folder.mkdir(exist_ok=True)
    for plot in plots:
        for theme, path in files_of(plot, folder).items():
            figure = Figure(figsize=(8.2, 3.6), layout="constrained")
            figure.patch.set_alpha(0)
            axes = figure.subplots()
            axes.patch.set_alpha(0)
            plot.draw(axes)
            _paint(axes, INKS[theme])
            figure.savefig(path, metadata={"Date": None})


def draw_curves(
    axes: Any, xs: Sequence[float], seconds: Sequence[dict[str, Spread]], contenders: Iterable[Contender]
) -> None:
    """A curve a contender through its median seconds, which are given by its name for each of `xs`."""
    from matplotlib.ticker import LogLocator, NullLocator

    for contender in contenders:
        points = [
            (x, spent[contender.name].median) for x, spent in zip(xs, seconds, strict=True) if contender.name in spent
        ]
        look = contender.look
        axes.plot(
            *zip(*points, strict=True),
            look.style,
            marker=look.marker,
            markersize=5,
            label=contender.name,
            color=look.colour,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("seconds, log scale")
    draw_legend(axes)


def draw_doubling_ticks(axes: Any, xs: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each of `xs`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:.0f}" for x in xs])


def draw_legend(axes: Any) -> None:
    """Beside the plot, where it covers nothing."""
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _paint(axes: Any, ink: str) -> None:
    axes.tick_params(colors=ink, which="both", labelsize=8)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    for text in axes.get_legend().get_texts():
        text.set_color(ink)
