"""Break-even: the length of the beginning that all prompts share."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import workloads
from benchmarks.bench import Line
from benchmarks.contenders import BACKPROMPT, CACHE_RECIPE, PLAIN_PADDED
from benchmarks.contest import Contest
from benchmarks.plots import Plot, draw_curves
from benchmarks.suite import Results


class Prefix(Contest):
    def plots(self, results: Results) -> list[Plot]:
        return [Plot("prefix", partial(draw_prefix, lines=self.rows(results)))]


def draw_prefix(axes: Any, lines: list[Line]) -> None:
    xs = [line.tokens_shared for line in lines]
    draw_curves(axes, xs, [line.seconds for line in lines], (BACKPROMPT, PLAIN_PADDED, CACHE_RECIPE))
    axes.set_xlabel("tokens that all 8 prompts share; about 100 of their own each")


SUITE = Prefix(
    name="prefix",
    place=30,
    workloads=tuple(partial(workloads.shared_prefix, num_words) for num_words in (0, 40, 80, 160, 320, 745)),
    rounds=2,
    rivals=(PLAIN_PADDED, CACHE_RECIPE),
)
