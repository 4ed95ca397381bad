"""A long context, nothing shared, a single text. The plot and the summary of "five" show them, too."""

from __future__ import annotations

from benchmarks import workloads
from benchmarks.contenders import SCORING_RIVALS
from benchmarks.contest import Contest

SUITE = Contest(
    name="others",
    place=20,
    workloads=(workloads.notebook, workloads.nothing_shared, workloads.single_text),
    rounds=3,
    rivals=SCORING_RIVALS,
)
