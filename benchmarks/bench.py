"""Measures one workload: backprompt, its control, its yardsticks and its rivals, in turns.

In each round backprompt, the control (the same work behind a fresh prefix), the matrix products alone and the dense
forward follow each other, so that a drift of the machine's speed hits all of them, and each ratio is one of
neighbours in time. A rival that takes long runs once.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, evaluate
from benchmarks import workloads
from benchmarks.contenders import RIVALS, Scores, compose, encode, with_backprompt
from benchmarks.measure import Spread, dense_seconds, matmul_seconds, peak_bytes_of, seconds_of
from benchmarks.workloads import Suite, Workload

TOLERANCE = 1e-3  # nats; the rivals sum the same products in other orders
SLOW_SECONDS = 5.0
"""A rival that takes longer runs once."""
COPYING = frozenset({"cache recipe (deepcopy)", "original toy"})
MAX_COPIED_TOKENS = 100_000
"""Rivals that copy keys and values for every text do not run on more: of 316,000 tokens the toy would hold 23 GB."""


@dataclass
class Line:
    """What is reported of one workload."""

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
        self.run(warm_up, self.completion_lengths(warm_up))
        few = encode(self.tokenizer, workloads.classes(2, 4))
        for rival in RIVALS.values():
            rival(self.model, few)

    def completion_lengths(self, workload: Workload) -> list[list[int]]:
        return [[len(ids) for ids in prompt.completions] for prompt in encode(self.tokenizer, workload)]

    def run(self, workload: Workload, lengths: list[list[int]]) -> Scores:
        self.lm.clear()
        return with_backprompt(self.lm, workload, lengths)

    def measure(self, suite: Suite, workload: Workload) -> Line:
        """Measure one workload.

        Raises:
            AssertionError: a rival's numbers differ, or a join changed tokens, so the work would not be the same.

        """
        lengths, encoded = self.completion_lengths(workload), encode(self.tokenizer, workload)
        texts = [text for prompt in workload.prompts for text in compose(self.lm, prompt)]
        expected_ids = [prompt.ids + completion for prompt in encoded for completion in prompt.completions]
        self.lm.session.encoder.encode(texts)  # all together: one at a time takes long
        assert [text.tokens for text in texts] == expected_ids, f"{workload.name}: joins change tokens"

        before, pass_sizes = self.lm.stats, []
        scores = self._run_noting_pass_sizes(workload, lengths, pass_sizes)
        done = self.lm.stats - before
        line = Line(
            suite=suite.name,
            workload=workload.name,
            num_texts=workload.num_texts,
            tokens_in_strings=sum(map(len, expected_ids)),
            tokens_shared=_num_shared(expected_ids),
            tokens_computed=done.tokens_computed,
            forward_passes=done.forward_passes,
            logit_rows=done.logit_rows,
        )
        rows = self.lm.session.evaluator.executor.rows_in_a_slice
        too_large = COPYING if line.tokens_in_strings > MAX_COPIED_TOKENS else frozenset()
        rivals = [name for name in suite.rivals if name not in too_large]
        seconds: dict[str, list[float]] = {}
        for round_idx in range(suite.rounds):
            fresh = workload.with_fresh_prefix(f"Control {round_idx}. ")
            for name, seconds_spent in {
                "backprompt": lambda: seconds_of(lambda: self.run(workload, lengths)),
                "control": lambda fresh=fresh: seconds_of(lambda: self.run(fresh, lengths)),
                "matrix products": lambda: matmul_seconds(self.lm, pass_sizes, done.logit_rows, rows),
                "dense forward": lambda: dense_seconds(self.model, done.tokens_computed, done.logit_rows, rows),
            }.items():
                seconds.setdefault(name, []).append(seconds_spent())
            for name in rivals:
                if seconds.get(name, [0.0])[0] < SLOW_SECONDS:
                    seconds.setdefault(name, []).append(self._run_rival(name, encoded, scores, line))
        ours = seconds["backprompt"]
        line.fraction_of_matmul_limit = Spread.of_ratios(seconds["matrix products"], ours)
        line.fraction_of_dense_forward = Spread.of_ratios(seconds["dense forward"], ours)
        line.seconds = {name: Spread.of(values) for name, values in seconds.items()}
        self.lm.clear()  # what is held now would not count as growth
        line.peak_bytes["backprompt"] = peak_bytes_of(lambda: self.run(workload, lengths))
        for name in rivals:
            if line.seconds[name].lowest < 5 * SLOW_SECONDS:
                line.peak_bytes[name] = peak_bytes_of(lambda name=name: RIVALS[name](self.model, encoded))
        line.seconds_to_evaluate_again = self._seconds_again(workload)
        self.lm.clear()
        return line

    def _run_rival(self, name: str, encoded: list, scores: Scores, line: Line) -> float:
        """Return a rival's seconds, extrapolated where it ran a sample, after comparing its numbers with ours."""
        started = time.perf_counter()
        done = RIVALS[name](self.model, encoded)
        seconds = time.perf_counter() - started
        scored = [(ours, theirs) for ours, theirs in zip(scores, done.scores, strict=True) if theirs]  # not left out
        gaps = [abs(a - b) for ours, theirs in scored for a, b in zip(ours, theirs, strict=True)]
        assert all(gap < TOLERANCE for gap in gaps), f"{name} is off by {max(gaps)} nats"
        line.largest_gap_nats = max([line.largest_gap_nats, *gaps])
        if done.fraction < 1:
            line.sampled[name] = done.fraction
        return seconds / done.fraction

    def _seconds_again(self, workload: Workload) -> float:
        """Seconds to evaluate all texts of the workload once more, when all are cached: the best of five."""
        texts = [text for prompt in workload.prompts for text in compose(self.lm, prompt)]
        evaluate(texts)
        before = self.lm.stats
        seconds = min(seconds_of(lambda: evaluate(texts)) for _ in range(5))
        assert (self.lm.stats - before).tokens_computed == 0
        return seconds

    def _run_noting_pass_sizes(self, workload: Workload, lengths: list[list[int]], pass_sizes: list[int]) -> Scores:
        executor = self.lm.session.evaluator.executor
        forward = executor.forward
        executor.forward = lambda pass_: pass_sizes.append(pass_.num_tokens) or forward(pass_)  # type: ignore
        try:
            return self.run(workload, lengths)
        finally:
            del executor.forward


def _num_shared(texts: list[tuple[int, ...]]) -> int:
    return next((idx for idx, ids in enumerate(zip(*texts)) if len(set(ids)) > 1), min(map(len, texts)))  # noqa: B905  # the shortest ends it


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_machine(lm: LM) -> dict[str, object]:
    """What the numbers were taken on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernel": lm.stats.kernel,
        "linears": lm.stats.linears,
    }
