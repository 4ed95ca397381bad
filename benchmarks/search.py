"""Best-first search against exhaustive search: 10 to 10,000 classes, on the demo model, whose probabilities are real.

How many completions a search must look at depends on what the model finds probable, so random weights would say
nothing. The labels are the 1,000 of data/labels.txt (two to four words, many with the same first word); fewer are an
evenly spaced part of them, and for more each is continued in ten ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backprompt import LM, Text
from backprompt.classify import predict
from benchmarks import workloads
from benchmarks.bench import describe_machine
from benchmarks.measure import Spread, seconds_of

ROOT = Path(__file__).parent.parent
LABELS = Path(__file__).parent / "data" / "labels.txt"
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


def measure(say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, object]]:
    """Measure all of it; returns results and the machine, both as can be written to JSON."""
    lm = workloads.demo_lm()
    prompts = make_prompts(lm)
    lm.evaluate(prompts)
    lines = []
    for num_classes, rounds in ROUNDS.items():
        for aggregate in ("sum", "mean"):
            lines.append(_line(lm, prompts, labels(num_classes), aggregate, rounds))
            say(f"{num_classes} classes, {aggregate}: {json.dumps(lines[-1])}")
    return {"lines": lines}, describe_machine(lm)


def _line(lm: LM, prompts: list[Text], completions: list[str], aggregate: str, rounds: int) -> dict[str, Any]:
    """Both searches in turns, each with an empty cache.

    Raises:
        AssertionError: they find different completions.

    """
    line: dict[str, Any] = {"classes": len(completions), "prompts": len(prompts), "aggregate": aggregate}
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
            done = lm.stats - before
            line[f"{search}, tokens"], line[f"{search}, passes"] = done.tokens_computed, done.forward_passes
            line[f"{search}, rows"] = done.logit_rows
        assert answers["exhaustive"] == answers["best-first"], answers
    line["seconds"] = {search: vars(Spread.of(values)) for search, values in seconds.items()}
    line["times faster"] = vars(Spread.of_ratios(seconds["exhaustive"], seconds["best-first"]))
    return line
