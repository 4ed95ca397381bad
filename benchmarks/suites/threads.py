"""Threads that ask for a text each at the same time, against one call with all texts, and against one call a text.

What all texts share is computed before. Each way gives the same numbers, or the run fails.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from backprompt import LM, Text, generate
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread, seconds_of
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, with_range
from benchmarks.workloads import Writer

NUM_THREADS = 32
SHARED_WORDS = 170  # about 200 tokens
OWN_WORDS = 8
NEW_TOKENS = 8
ROUNDS = 3

TOGETHER, THREADS, ONE_BY_ONE = "one call", "threads", "one by one"
SCORES, STREAMS = "log-probabilities of a text each", f"a stream of {NEW_TOKENS} tokens each"


@dataclass(frozen=True)
class Line:
    """What is asked for, and three ways to ask."""

    asked: str
    passes: dict[str, int]  # by way
    seconds: dict[str, Spread]
    slower_than_one_call: Annotated[dict[str, Spread], Key("times as long as one call")]


@dataclass(frozen=True)
class Rows:
    threads: int
    lines: list[Line]


class Threads(Suite):
    name = "threads"
    place = 97
    rows_type = Rows

    def measure(self, say: Say, peer_python: Path | None) -> Measured:
        lm = LM(workloads.make_model(), workloads.make_tokenizer())
        writer = Writer(21)
        shared = Text(writer.text(SHARED_WORDS), lm)
        texts = [shared + f"\n\n{writer.text(OWN_WORDS)}\nAnswer:" for _ in range(NUM_THREADS)]
        lines = []
        for asked, ways in ((SCORES, scoring(lm, texts)), (STREAMS, streaming(texts))):
            lines.append(_line(lm, shared, asked, ways))
            say(json.dumps(as_json(lines[-1])))
        return Measured(Rows(NUM_THREADS, lines), describe_machine(lm))

    def tables(self, results: Results) -> list[Table]:
        return [Table("table threads", threads_table(self.rows(results)))]


Ways = dict[str, Callable[[], list[torch.Tensor]]]


def scoring(lm: LM, texts: list[Text]) -> Ways:
    """The ways to ask for the log-probabilities of texts."""
    alone = [lambda text=text: lm.token_logprobs([text])[0] for text in texts]
    return {
        TOGETHER: lambda: lm.token_logprobs(texts),
        THREADS: lambda: in_threads(alone),
        ONE_BY_ONE: lambda: [one() for one in alone],
    }


def streaming(texts: list[Text]) -> Ways:
    """The ways to ask for continuations, whose log-probabilities are returned."""

    def streamed(text: Text) -> torch.Tensor:
        with text.stream(max_new_tokens=NEW_TOKENS) as stream:
            for _ in stream:
                pass
        return stream.text.completion_logprobs

    alone = [lambda text=text: streamed(text) for text in texts]
    return {
        TOGETHER: lambda: [one.completion_logprobs for one in generate(texts, max_new_tokens=NEW_TOKENS)],
        THREADS: lambda: in_threads(alone),
        ONE_BY_ONE: lambda: [one() for one in alone],
    }


def in_threads(work: list[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """Call each in a thread of its own, and return what they return."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(work)

    def run(idx: int) -> None:
        found[idx] = work[idx]()

    threads = [threading.Thread(target=run, args=(idx,)) for idx in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _line(lm: LM, shared: Text, asked: str, ways: Ways) -> Line:
    """All ways in turns, each with nothing computed but what the texts share.

    Raises:
        AssertionError: the numbers differ.

    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    passes: dict[str, int] = {}
    expected: list[torch.Tensor] = []
    for round_idx in range(ROUNDS + 1):  # the first one warms up
        for way, ask in ways.items():
            lm.clear()
            lm.evaluate([shared])
            before, found = lm.stats, []
            spent = seconds_of(lambda ask=ask, found=found: found.extend(ask()))  # type: ignore[misc]
            passes[way] = (lm.stats - before).model_calls
            expected = expected or found
            for own, other in zip(found, expected, strict=True):
                torch.testing.assert_close(own[1:], other[1:], rtol=0, atol=1e-3)
            if round_idx:
                seconds[way].append(spent)
    return Line(
        asked=asked,
        passes=passes,
        seconds={way: Spread.of(values) for way, values in seconds.items()},
        slower_than_one_call={way: Spread.of_ratios(seconds[way], seconds[TOGETHER]) for way in (THREADS, ONE_BY_ONE)},
    )


def threads_table(rows: Rows) -> str:
    cells = [
        [
            line.asked,
            way,
            f"{line.passes[way]:,}",
            with_range(line.seconds[way]),
            with_range(line.slower_than_one_call[way], 1) if way in line.slower_than_one_call else "",
        ]
        for line in rows.lines
        for way in line.seconds
    ]
    return markdown([f"{rows.threads} callers", "way", "passes", "seconds", "times as long as one call"], cells)


SUITE = Threads()
