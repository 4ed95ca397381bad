"""The five workloads of the design, with the summary and the plot of the README, which show "others" below them."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import workloads
from benchmarks.bench import Line
from benchmarks.contenders import BACKPROMPT, SCORING_RIVALS, Rival
from benchmarks.contest import Contest, rival_seconds, times_as_long
from benchmarks.plots import Plot, draw_legend
from benchmarks.suite import Results
from benchmarks.suites import others
from benchmarks.tables import Table, markdown


class Five(Contest):
    def tables(self, results: Results) -> list[Table]:
        return [*super().tables(results), Table("summary", summary(self._with_others(results)))]

    def plots(self, results: Results) -> list[Plot]:
        return [Plot("workloads", partial(draw_dots, lines=self._with_others(results)))]

    def _with_others(self, results: Results) -> list[Line]:
        return self.rows(results) + others.SUITE.rows(results)


def summary(lines: list[Line]) -> str:
    """Seconds, and how many times faster than each rival."""
    headings = [
        "seconds",
        "tokens in all strings",
        "computed",
        BACKPROMPT.name,
        *(rival.heading for rival in SCORING_RIVALS),
    ]
    rows = [
        [
            line.workload,
            f"{line.tokens_in_strings:,}",
            f"{line.tokens_computed:,}",
            f"{line.seconds[BACKPROMPT.name].median:.1f}",
            *(_seconds_and_times(line, rival) for rival in SCORING_RIVALS),
        ]
        for line in lines
    ]
    return markdown(headings, rows)


def _seconds_and_times(line: Line, rival: Rival) -> str:
    return f"{rival_seconds(line, rival)} ({times_as_long(line, rival)})" if rival.name in line.seconds else ""


def draw_dots(axes: Any, lines: list[Line]) -> None:
    """A dot a contender and workload, the first workload on top: a logarithmic axis has no 0 for bars to begin at."""
    upwards = lines[::-1]
    contenders = (BACKPROMPT, *SCORING_RIVALS)
    height = 0.84 / len(contenders)
    for contender_idx, contender in enumerate(contenders):
        seconds = {
            idx: line.seconds[contender.name] for idx, line in enumerate(upwards) if contender.name in line.seconds
        }
        look = contender.look
        axes.plot(
            [spread.median for spread in seconds.values()],
            [idx + 0.42 - (contender_idx + 0.5) * height for idx in seconds],
            look.marker,
            markersize=6,
            label=contender.name,
            color=look.colour,
        )
    for idx in range(len(upwards) - 1):
        axes.axhline(idx + 0.5, color="#7d8590", linewidth=0.5)
    axes.set_yticks(range(len(upwards)), [line.workload for line in upwards], fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("seconds, log scale; further left is better")
    draw_legend(axes)
    axes.figure.set_size_inches(8.2, 4.6)


SUITE = Five(
    name="five",
    place=10,
    workloads=(
        workloads.two_choices,
        partial(workloads.classes, 2),
        partial(workloads.classes, 16),
        workloads.few_shots,
        workloads.nested,
    ),
    rounds=3,
    rivals=SCORING_RIVALS,
)
