"""The suite: each step on each batch and model, by backprompt, the plain padded batch and TRL's own method, in turns.

The ratio of tokens is what sharing saves where each token costs the same: the tokens that the plain batch forwards,
padding included, divided by those that backprompt forwards. The output head is not shared. On the CPU backprompt also
multiplies matrices faster than torch, which the batch without a shared prompt shows alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from torch import nn

from backprompt.training.models import scorer_of
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread, peak_bytes_of, seconds_of
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.suites.training import gradients, scoring
from benchmarks.suites.training.batches import Batch, Done, group, nothing_shared
from benchmarks.tables import Table, markdown, megabytes, with_range

BACKPROMPT, PLAIN, TRL = "backprompt", "plain padded", "TRL"
MAX_ROUNDS = 2
SLOW_SECONDS = 15.0
"""A batch that takes longer, all ways together, is measured once."""
TOLERANCE = 1e-3  # nats; the ways sum the same products in other orders
MODELS = {"GPT-2 124M": workloads.make_model, "SmolLM2-135M": lambda: workloads.demo_lm().model}
BATCHES: dict[str, Callable[[int], Batch]] = {
    "group of 8": partial(group, 8),
    "group of 16": partial(group, 16),
    "4 prompts": partial(nothing_shared, 4),
}

Way = Callable[[nn.Module, Batch], Done]


@dataclass(frozen=True)
class Step:
    """Some work on a batch, and the ways to do it; the numbers that they find are compared."""

    name: str
    ways: dict[str, Way]


STEPS = (
    Step(
        "without gradients",
        {
            BACKPROMPT: scoring.by_backprompt,
            PLAIN: partial(scoring.by_rows, scoring.selected_logprobs),
            TRL: partial(scoring.by_rows, scoring.trl_logprobs),
        },
    ),
    Step(
        "with gradients",
        {
            BACKPROMPT: gradients.by_backprompt,
            PLAIN: partial(gradients.by_rows, scoring.selected_logprobs),
            TRL: partial(gradients.by_rows, scoring.trl_logprobs),
        },
    ),
)


@dataclass(frozen=True)
class Line:
    """One step on one batch."""

    model: str
    step: str
    batch: str
    tokens_padded: Annotated[int, Key("tokens padded")]
    tokens_forwarded: Annotated[int, Key("tokens forwarded")]
    seconds: dict[str, Spread]
    ratio: Spread
    ratio_to_trl: Annotated[Spread, Key("ratio to TRL")]
    peak_bytes: Annotated[dict[str, int | None], Key("peak bytes")]

    @property
    def ratio_of_tokens(self) -> float:
        return self.tokens_padded / self.tokens_forwarded


class Training(Suite):
    """All steps on all batches."""

    name = "training"
    place = 105
    rows_type = list[Line]

    def measure(self, say: Say, peer_python: Path | None) -> Measured:
        lines = []
        for model_name, make in MODELS.items():
            model = make()
            for line in _lines(model_name, model):
                lines.append(line)
                say(json.dumps(as_json(line)))
        return Measured(lines, describe_machine(scorer_of(model, None).lm))

    def rows(self, results: Results) -> list[Line]:
        """The lines; none before the suite was measured."""
        lines: list[Line] = super().rows({self.name: results.get(self.name, [])})
        return lines

    def tables(self, results: Results) -> list[Table]:
        return [Table("table training", table_of(self.rows(results)))]


def _lines(model_name: str, model: nn.Module) -> Iterator[Line]:
    vocabulary: int = model.config.vocab_size  # type: ignore[assignment, union-attr]
    for step in STEPS:
        for batch_name, draw in BATCHES.items():
            yield line_of(model_name, model, step, batch_name, draw(vocabulary))


def line_of(model_name: str, model: nn.Module, step: Step, batch_name: str, batch: Batch) -> Line:
    """Measure in turns, behind a warm-up on two rows; the first round gives the peaks, too.

    Raises:
        AssertionError: the ways find different numbers.

    """
    few = Batch(batch.input_ids[:2], batch.attention_mask[:2], batch.num_kept)
    peaks: dict[str, int | None] = {}
    found: dict[str, Done] = {}
    seconds: dict[str, list[float]] = {way: [] for way in step.ways}

    def run(way: str) -> None:
        seconds[way].append(seconds_of(lambda: found.update({way: step.ways[way](model, batch)})))

    for way, work in step.ways.items():
        work(model, few)
        peaks[way] = peak_bytes_of(partial(run, way))
        if peaks[way] is None:  # the system does not tell, so nothing ran
            run(way)
    for way, done in found.items():
        gap = (done.numbers - found[PLAIN].numbers).abs().max()
        assert gap < TOLERANCE, f"{way} on {batch_name}: {gap} from the plain batch"
    while len(seconds[PLAIN]) < MAX_ROUNDS and sum(times[0] for times in seconds.values()) < SLOW_SECONDS:
        for way in step.ways:
            run(way)
    return Line(
        model=model_name,
        step=step.name,
        batch=batch_name,
        tokens_padded=found[PLAIN].tokens_forwarded,
        tokens_forwarded=found[BACKPROMPT].tokens_forwarded,
        seconds={way: Spread.of(values) for way, values in seconds.items()},
        ratio=Spread.of_ratios(seconds[PLAIN], seconds[BACKPROMPT]),
        ratio_to_trl=Spread.of_ratios(seconds[TRL], seconds[BACKPROMPT]),
        peak_bytes=peaks,
    )


def table_of(lines: list[Line]) -> str:
    headings = [
        "model",
        "step",
        "batch",
        "tokens padded",
        "forwarded",
        "ratio of tokens",
        "ratio of seconds",
        "the same to TRL",
        "s, padded",
        "s, TRL",
        "s, backprompt",
        "peak MB, padded",
        "peak MB, TRL",
        "peak MB, backprompt",
    ]
    rows = [
        [
            line.model,
            line.step,
            line.batch,
            f"{line.tokens_padded:,}",
            f"{line.tokens_forwarded:,}",
            f"{line.ratio_of_tokens:.2f}",
            with_range(line.ratio),
            f"{line.ratio_to_trl.median:.2f}",
            *(f"{line.seconds[way].median:.2f}" for way in (PLAIN, TRL, BACKPROMPT)),
            *(megabytes(line.peak_bytes[way]) for way in (PLAIN, TRL, BACKPROMPT)),
        ]
        for line in lines
    ]
    return markdown(headings, rows)


SUITE = Training()
