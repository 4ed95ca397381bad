"""Measures one workload: backprompt, its control, its yardsticks and its rivals, in turns.

In each round backprompt, the control (the same work behind a fresh prefix), the matrix products alone and the dense
forward follow each other, so that a drift of the machine's speed hits all of them, and each ratio is one of
neighbours in time. A rival that takes long runs once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, evaluate
from benchmarks import workloads
from benchmarks.contenders import RIVALS, Rival, Scores, compose_all, encode, with_backprompt
from benchmarks.measure import Spread, dense_seconds, matmul_seconds, noted_passes, peak_bytes_of, seconds_of
from benchmarks.workloads import Workload

TOLERANCE = 1e-3  # nats; the rivals sum the same products in other orders
SLOW_SECONDS = 5.0
"""A rival that takes longer runs once."""
MAX_COPIED_TOKENS = 100_000
"""Rivals that copy keys and values for every text do not run on more: of 316,000 tokens the toy would hold 23 GB."""


@dataclass
class Line:
    """The reported results of one workload."""

    suite: str
    workload: str
    num_texts: int
    tokens_in_strings: int
    tokens_shared: int  # by all texts, at their beginning
    tokens_computed: int
    forward_passes: int
    logit_rows: int
    largest_gap_nats: float = 0.0
    seconds: dict[str, Spread] = field(default_factory=dict)
    sampled: dict[str, float] = field(default_factory=dict)  # rivals timed on this fraction of the work
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    fraction_of_matmul_limit: Spread | None = None
    fraction_of_dense_forward: Spread | None = None
    seconds_to_evaluate_again: float = 0.0


class Bench:
    """One process, one model; an empty cache before each run."""

    def __init__(self) -> None:
        self.model: GPT2LMHeadModel = workloads.make_model()
        self.tokenizer: PreTrainedTokenizerFast = workloads.make_tokenizer()
        self.lm = LM(self.model, self.tokenizer)
        warm_up = workloads.two_choices()
        self.run(warm_up)
        few = encode(self.tokenizer, workloads.classes(2, 4))
        for rival in RIVALS:
            rival.run(self.model, few)

    def run(self, workload: Workload) -> Scores:
        self.lm.clear()
        return with_backprompt(self.lm, workload)

    def measure(self, suite: str, workload: Workload, rivals: tuple[Rival, ...], num_rounds: int) -> Line:
        """Measure one workload of the suite of that name.

        Raises:
            AssertionError: a rival's numbers differ, or a join changed tokens, so the work would not be the same.

        """
        encoded = encode(self.tokenizer, workload)
        texts = compose_all(self.lm, workload)
        expected_ids = [prompt.ids + completion for prompt in encoded for completion in prompt.completions]
        self.lm.session.encoder.encode(texts)  # all together: one at a time takes long
        assert [text.tokens for text in texts] == expected_ids, f"{workload.name}: joins change tokens"

        before = self.lm.stats
        with noted_passes(self.lm) as pass_sizes:
            scores = self.run(workload)
        done = self.lm.stats - before
        line = Line(
            suite=suite,
            workload=workload.name,
            num_texts=workload.num_texts,
            tokens_in_strings=sum(map(len, expected_ids)),
            tokens_shared=_num_shared(expected_ids),
            tokens_computed=done.tokens_computed,
            forward_passes=done.forward_passes,
            logit_rows=done.logit_rows,
        )
        rows = self.lm.session.evaluator.executor.rows_in_a_slice
        if line.tokens_in_strings > MAX_COPIED_TOKENS:
            rivals = tuple(rival for rival in rivals if not rival.copies_for_each_text)
        seconds: dict[str, list[float]] = {}
        for round_idx in range(num_rounds):
            fresh = workload.with_fresh_prefix(f"Control {round_idx}. ")
            for name, seconds_spent in {
                "backprompt": lambda: seconds_of(lambda: self.run(workload)),
                "control": lambda fresh=fresh: seconds_of(lambda: self.run(fresh)),
                "matrix products": lambda: matmul_seconds(self.lm, pass_sizes, done.logit_rows, rows),
                "dense forward": lambda: dense_seconds(self.model, done.tokens_computed, done.logit_rows, rows),
            }.items():
                seconds.setdefault(name, []).append(seconds_spent())
            for rival in rivals:
                if seconds.get(rival.name, [0.0])[0] < SLOW_SECONDS:
                    seconds.setdefault(rival.name, []).append(self._run_rival(rival, encoded, scores, line))
        ours = seconds["backprompt"]
        line.fraction_of_matmul_limit = Spread.of_ratios(seconds["matrix products"], ours)
        line.fraction_of_dense_forward = Spread.of_ratios(seconds["dense forward"], ours)
        line.seconds = {name: Spread.of(values) for name, values in seconds.items()}
        self.lm.clear()  # otherwise held rows would not count as growth
        line.peak_bytes["backprompt"] = peak_bytes_of(lambda: self.run(workload))
        for rival in rivals:
            if line.seconds[rival.name].lowest < 5 * SLOW_SECONDS:
                line.peak_bytes[rival.name] = peak_bytes_of(lambda rival=rival: rival.run(self.model, encoded))
        line.seconds_to_evaluate_again = self._seconds_again(workload)
        self.lm.clear()
        return line

    def _run_rival(self, rival: Rival, encoded: list, scores: Scores, line: Line) -> float:
        """Return a rival's seconds, extrapolated where it ran a sample, after comparing its numbers with ours."""
        started = time.perf_counter()
        done = rival.run(self.model, encoded)
        seconds = time.perf_counter() - started
        scored = [(ours, theirs) for ours, theirs in zip(scores, done.scores, strict=True) if theirs]  # not left out
        gaps = [abs(a - b) for ours, theirs in scored for a, b in zip(ours, theirs, strict=True)]
        assert all(gap < TOLERANCE for gap in gaps), f"{rival.name} is off by {max(gaps)} nats"
        line.largest_gap_nats = max([line.largest_gap_nats, *gaps])
        if done.fraction < 1:
            line.sampled[rival.name] = done.fraction
        return seconds / done.fraction

    def _seconds_again(self, workload: Workload) -> float:
        """Seconds to evaluate all texts of the workload once more, when all are cached: the best of five."""
        texts = compose_all(self.lm, workload)
        evaluate(texts)
        before = self.lm.stats
        seconds = min(seconds_of(lambda: evaluate(texts)) for _ in range(5))
        assert (self.lm.stats - before).tokens_computed == 0
        return seconds


def _num_shared(texts: list[tuple[int, ...]]) -> int:
    return next((idx for idx, ids in enumerate(zip(*texts)) if len(set(ids)) > 1), min(map(len, texts)))  # noqa: B905  # the shortest ends it
