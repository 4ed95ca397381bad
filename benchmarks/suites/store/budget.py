"""The budget in memory: a forest ten times larger than it, with and without tiers below."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text, evaluate
from benchmarks import workloads
from benchmarks.measure import Spread, seconds_of
from benchmarks.rows import Key
from benchmarks.tables import Table, markdown, megabytes, with_range


@dataclass(frozen=True)
class Line:
    """The forest scored under one budget, and once more in reversed order: tokens, bytes, seconds."""

    computed: int
    recomputed: int
    held: int
    peak: int
    again: float
    computed_again: Annotated[int, Key("computed again")]
    seconds: Spread
    times_as_long: Annotated[Spread, Key("times as long")]


@dataclass(frozen=True)
class Budget:
    num_bytes: Annotated[int, Key("bytes")]  # of the whole forest
    lines: dict[str, Line]  # by the budget

    def table(self) -> Table:
        headings = [
            f"a forest of {megabytes(self.num_bytes)} MB",
            "seconds",
            "times as long",
            "computed",
            "recomputed",
            "held, MB",
            "at most, MB",
            "once more, reversed, s",
            "computed",
        ]
        rows = [
            [
                name,
                f"{line.seconds.median:.1f}",
                with_range(line.times_as_long),
                f"{line.computed:,}",
                f"{line.recomputed:,}",
                megabytes(line.held),
                megabytes(line.peak),
                f"{line.again:.1f}",
                f"{line.computed_again:,}",
            ]
            for name, line in self.lines.items()
        ]
        return Table("table budget", markdown(headings, rows))


def measure_budget(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Budget:
    """A forest ten times larger than the budget, scored: without a budget, within it, and with tiers below."""
    forest = workloads.classes(24)
    strings = [prompt.string + completion for prompt in forest.prompts for completion in prompt.completions]
    unlimited = LM(model, tokenizer)
    _score(unlimited, strings)
    num_bytes = unlimited.stats.bytes_held
    makers: dict[str, Callable[[], LM]] = {
        "no budget": lambda: LM(model, tokenizer),
        "a tenth": lambda: LM(model, tokenizer, memory_bytes=num_bytes // 10),
        "a tenth, the rest in a second pool": lambda: LM(
            model, tokenizer, memory_bytes=num_bytes // 10, host_memory_bytes=num_bytes
        ),
        "a tenth, the rest in a store": lambda: LM(
            model, tokenizer, memory_bytes=num_bytes // 10, store=folder / "budget.bp"
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    lines: dict[str, dict[str, Any]] = {}  # the last round's
    for _ in range(3):
        for name, make in makers.items():
            shutil.rmtree(folder / "budget.bp", ignore_errors=True)
            lm = make()
            evaluate(Text("warm-up", lm))
            lm.fingerprint  # noqa: B018
            peak = _watch_peak(lm)
            before = lm.stats
            seconds[name].append(seconds_of(lambda lm=lm: _score(lm, strings)))
            done = lm.stats - before
            again = seconds_of(lambda lm=lm: _score(lm, strings[::-1]))
            lines[name] = {
                "computed": done.tokens_computed,
                "recomputed": done.tokens_recomputed,
                "held": lm.stats.bytes_held,
                "peak": max(peak),
                "again": again,
                "computed_again": (lm.stats - before - done).tokens_computed,
            }
    return Budget(
        num_bytes,
        {
            name: Line(
                **line,
                seconds=Spread.of(seconds[name]),
                times_as_long=Spread.of_ratios(seconds[name], seconds["no budget"]),
            )
            for name, line in lines.items()
        },
    )


def _watch_peak(lm: LM) -> list[int]:
    """Return a list that grows by the bytes that are held right after each pass."""
    held: list[int] = [0]
    forward = lm._evaluator._forward

    def forward_and_note(spans: Any, *, use_store: bool) -> None:
        forward(spans, use_store=use_store)
        held.append(lm._evaluator.memory.num_bytes)

    lm._evaluator._forward = forward_and_note  # type: ignore[method-assign]
    return held


def _score(lm: LM, strings: list[str]) -> None:
    lm.token_logprobs([Text(string, lm) for string in strings])
