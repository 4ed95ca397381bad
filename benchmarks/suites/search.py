"""Best-first search against exhaustive search: 10 to 10,000 classes, on the demo model, whose probabilities are real.

How many completions a search must look at depends on what the model finds probable, so random weights would say
nothing. The labels are the 1,000 of data/labels.txt (two to four words, many with the same first word); fewer are an
evenly spaced part of them, and for more each is continued in ten ways.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from backprompt import LM, Stats, Text
from backprompt.classify import predict
from benchmarks import workloads
from benchmarks.contenders import BACKPROMPT, PLAIN_PADDED
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread, seconds_of
from benchmarks.plots import Plot, draw_legend
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, with_range

ROOT = Path(__file__).parent.parent.parent
LABELS = ROOT / "benchmarks" / "data" / "labels.txt"
CONTINUATIONS = (
    "",
    " online",
    " by phone",
    " in store",
    " today",
    " next week",
    " for me",
    " again",
    " at once",
    " twice",
)
ROUNDS = {10: 3, 100: 3, 1000: 3, 10_000: 1}
"""By the number of classes."""
NUM_PROMPTS = 8

INSTRUCTION = "Messages to our online kitchen shop, with topics.\n\n"
SHOTS = {
    "hello, my order 20155 should have been here on monday": "track order",
    "i forgot my password again": "reset account password",
    "the pan is too heavy for me, how can I send it back?": "request return label",
    "your site wont take my mastercard": "verify credit card",
    "we moved last week, plz ship to 3 Hill Road instead": "change delivery address",
    "one of the glasses was brokn when i opened the box": "report damaged parcel",
    "where do I type in the ten percent off?": "apply discount code",
}


def labels(num_labels: int) -> list[str]:
    """Distinct labels, the same for the same number."""
    listed = LABELS.read_text(encoding="utf-8").splitlines()
    if num_labels <= len(listed):
        return listed[:: len(listed) // num_labels][:num_labels]
    return [label + continuation for label in listed for continuation in CONTINUATIONS][:num_labels]


def make_prompts(lm: LM) -> list[Text]:
    questions = (ROOT / "examples" / "data" / "questions.tsv").read_text(encoding="utf-8").splitlines()
    shared = Text(INSTRUCTION, lm)
    for message, label in SHOTS.items():
        shared += f"Message: {message}\nTopic: {label}\n\n"
    strings = [question.split("\t")[0] for question in questions]
    return [shared + f"Message: {string}\nTopic:" for string in strings[:: len(strings) // NUM_PROMPTS][:NUM_PROMPTS]]


@dataclass(frozen=True)
class Line:
    """Both searches over as many classes, by one aggregate of a completion's tokens."""

    classes: int
    prompts: int
    aggregate: str
    exhaustive_tokens: Annotated[int, Key("exhaustive, tokens")]  # computed; rows are those of the head
    exhaustive_passes: Annotated[int, Key("exhaustive, passes")]
    exhaustive_rows: Annotated[int, Key("exhaustive, rows")]
    best_first_tokens: Annotated[int, Key("best-first, tokens")]
    best_first_passes: Annotated[int, Key("best-first, passes")]
    best_first_rows: Annotated[int, Key("best-first, rows")]
    seconds: dict[str, Spread]  # by search
    times_faster: Annotated[Spread, Key("times faster")]


@dataclass(frozen=True)
class Rows:
    lines: list[Line]


class Search(Suite):
    name = "search"
    place = 80
    rows_type = Rows

    def measure(self, say: Say, peer_python: Path | None) -> Measured:
        lm = workloads.demo_lm()
        prompts = make_prompts(lm)
        lm.evaluate(prompts)
        lines = []
        for num_classes, rounds in ROUNDS.items():
            for aggregate in ("sum", "mean"):
                lines.append(_line(lm, prompts, labels(num_classes), aggregate, rounds))
                say(f"{num_classes} classes, {aggregate}: {json.dumps(as_json(lines[-1]))}")
        return Measured(Rows(lines), describe_machine(lm))

    def tables(self, results: Results) -> list[Table]:
        return [Table("table search", search_table(self.rows(results).lines))]

    def plots(self, results: Results) -> list[Plot]:
        return [Plot("search", partial(draw_search, lines=self.rows(results).lines))]


def _line(lm: LM, prompts: list[Text], completions: list[str], aggregate: str, rounds: int) -> Line:
    """Both searches in turns, each with an empty cache.

    Raises:
        AssertionError: they find different completions.

    """
    done: dict[str, Stats] = {}
    seconds: dict[str, list[float]] = {"exhaustive": [], "best-first": []}
    answers: dict[str, list[str]] = {}
    for _ in range(rounds):
        for search in seconds:

            def run(search: str = search) -> None:
                answers[search] = predict(
                    prompts, completions, search=search, aggregate=aggregate, show_progress_bar=False
                )

            lm.clear()
            before = lm.stats
            seconds[search].append(seconds_of(run))
            done[search] = lm.stats - before
        assert answers["exhaustive"] == answers["best-first"], answers
    exhaustive, best_first = done["exhaustive"], done["best-first"]
    return Line(
        classes=len(completions),
        prompts=len(prompts),
        aggregate=aggregate,
        exhaustive_tokens=exhaustive.tokens_computed,
        exhaustive_passes=exhaustive.forward_passes,
        exhaustive_rows=exhaustive.logit_rows,
        best_first_tokens=best_first.tokens_computed,
        best_first_passes=best_first.forward_passes,
        best_first_rows=best_first.logit_rows,
        seconds={search: Spread.of(values) for search, values in seconds.items()},
        times_faster=Spread.of_ratios(seconds["exhaustive"], seconds["best-first"]),
    )


def search_table(lines: list[Line]) -> str:
    headings = [
        "classes",
        "score",
        "tokens, exhaustive",
        "tokens, best-first",
        "times fewer",
        "seconds, exhaustive",
        "seconds, best-first",
        "times faster",
        "passes",
    ]
    rows = [
        [
            f"{line.classes:,}",
            line.aggregate,
            f"{line.exhaustive_tokens:,}",
            f"{line.best_first_tokens:,}",
            f"{line.exhaustive_tokens / line.best_first_tokens:.1f}",
            *(f"{line.seconds[search].median:.2f}" for search in ("exhaustive", "best-first")),
            with_range(line.times_faster, 1),
            f"{line.exhaustive_passes}, {line.best_first_passes}",
        ]
        for line in lines
    ]
    return markdown(headings, rows)


def draw_search(axes: Any, lines: list[Line]) -> None:
    for search, look in (("exhaustive", PLAIN_PADDED.look), ("best-first", BACKPROMPT.look)):
        for aggregate, style in (("sum", "-"), ("mean", "--")):
            chosen = [line for line in lines if line.aggregate == aggregate]
            seconds = [line.seconds[search].median for line in chosen]
            label = f"{search}, by {aggregate}"
            classes = [line.classes for line in chosen]
            axes.plot(classes, seconds, style, marker=look.marker, markersize=5, label=label, color=look.colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"number of classes, log scale; {lines[0].prompts} prompts")
    axes.set_ylabel("seconds, log scale")
    draw_legend(axes)


SUITE = Search()
