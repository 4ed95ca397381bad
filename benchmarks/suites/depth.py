"""Trees from flat to deep, with about as many distinct tokens each."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import workloads
from benchmarks.bench import Line
from benchmarks.contenders import BACKPROMPT, DENSE_FORWARD, PLAIN_PADDED
from benchmarks.contest import Contest
from benchmarks.plots import Plot, draw_curves, draw_doubling_ticks
from benchmarks.suite import Results


class Depth(Contest):
    def plots(self, results: Results) -> list[Plot]:
        return [Plot("depth", partial(draw_depth, lines=self.rows(results)))]


def draw_depth(axes: Any, lines: list[Line]) -> None:
    xs = [line.num_texts for line in lines]
    draw_curves(axes, xs, [line.seconds for line in lines], (BACKPROMPT, PLAIN_PADDED, DENSE_FORWARD))
    draw_doubling_ticks(axes, xs)
    axes.set_xlabel("depth of the tree: a chain of that many parts, a leaf hanging from each; about equal tokens")


SUITE = Depth(
    name="depth",
    place=40,
    workloads=tuple(partial(workloads.deep, depth) for depth in (1, 4, 16, 64)),
    rounds=2,
    rivals=(PLAIN_PADDED,),
)
