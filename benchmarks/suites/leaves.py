"""10,000 leaves, and the cost of evaluating them again when all are cached."""

from __future__ import annotations

from benchmarks import workloads
from benchmarks.bench import Line
from benchmarks.contenders import CAPPR_WAY
from benchmarks.contest import Contest
from benchmarks.suite import Results
from benchmarks.tables import Table


class Leaves(Contest):
    def tables(self, results: Results) -> list[Table]:
        return [*super().tables(results), Table("again", "\n".join(map(again, self.rows(results))))]


def again(line: Line) -> str:
    """The cost of evaluating cached texts, in a sentence."""
    seconds, num_texts = line.seconds_to_evaluate_again, line.num_texts
    return (
        f"Evaluating {num_texts:,} texts that are cached takes {seconds:.3f} s, {1e6 * seconds / num_texts:.1f} "
        "microseconds a text (the best of five)."
    )


SUITE = Leaves(name="leaves", place=50, workloads=(workloads.ten_thousand_leaves,), rounds=1, rivals=(CAPPR_WAY,))
