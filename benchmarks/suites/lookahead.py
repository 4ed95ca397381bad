"""Look-ahead by n-grams on the demo model: where it helps, and where it does not.

How much of what comes stands in the text already depends on the task, so random weights would say nothing. Each task is
a chat with one user message, answered greedily with and without look-ahead; the answers are the same, or the run fails.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from backprompt import LM, Text, chat, generate
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread, seconds_of
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, with_range

NEW_TOKENS = 96
NUM_AHEAD = 8
ROUNDS = 3

LETTER = (
    "Dear Ms Keller, thank you for your order 20155 of one cast iron pan and two lids. We are sorry to say "
    "that the pan was damaged on its way to us, and that a new one will arrive on Monday. The two lids were "
    "sent to you today. Please tell us whether you would like to wait for the pan, or to have your money back. "
    "With kind regards, the kitchen shop."
)
CODE = """def total(prices, rate):
    result = 0
    for price in prices:
        result = result + price * (1 + rate)
    return result


def mean(prices, rate):
    return total(prices, rate) / len(prices)
"""
TASKS = {
    "copy a letter": f"Repeat this letter word by word, and nothing else:\n\n{LETTER}",
    "correct a letter": f"Write this letter again, with Mr Stone in place of Ms Keller:\n\n{LETTER}",
    "edit code": f"Write this code again, with the name amount in place of price:\n\n{CODE}",
    "summarise a letter": f"Summarise this letter in two sentences:\n\n{LETTER}",
    "tell a story": "Tell me a story about a fox and a lighthouse.",
}


@dataclass(frozen=True)
class Work:
    """Forward passes, and the tokens computed in them."""

    passes: int
    tokens: int


@dataclass(frozen=True)
class Line:
    """A task, or all tasks at once, without look-ahead and with it."""

    task: str
    without: Work
    ahead: Annotated[Work, Key("with")]
    new_tokens: Annotated[int, Key("new tokens")]
    seconds: dict[str, Spread]  # "without" and "with"
    times_faster: Annotated[Spread, Key("times faster")]


@dataclass(frozen=True)
class Rows:
    lines: list[Line]
    new_tokens: Annotated[int, Key("new tokens")]  # at most
    ahead: int


class LookAhead(Suite):
    """All tasks one by one, and all of them in one batch."""

    name = "lookahead"
    place = 100
    rows_type = Rows

    def measure(self, say: Say, peer_python: Path | None) -> Measured:
        lm = workloads.demo_lm()
        texts = {name: chat(lm, [{"role": "user", "content": message}]) for name, message in TASKS.items()}
        cases = {name: [text] for name, text in texts.items()} | {"all five at once": list(texts.values())}
        lines = []
        for name, own in cases.items():
            lines.append(_line(lm, name, own))
            say(json.dumps(as_json(lines[-1])))
        return Measured(Rows(lines, NEW_TOKENS, NUM_AHEAD), describe_machine(lm))

    def tables(self, results: Results) -> list[Table]:
        return [Table("table lookahead", lookahead_table(self.rows(results).lines))]


def _line(lm: LM, name: str, texts: list[Text]) -> Line:
    """With and without, in turns.

    Raises:
        AssertionError: the answers differ.

    """
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    work: dict[str, Work] = {}
    for round_idx in range(ROUNDS + 1):  # the first one warms up
        answers = {}
        for way, options in (("without", {}), ("with", {"prompt_lookup_num_tokens": NUM_AHEAD})):
            lm.clear()
            for text in texts:
                _ = text.logits  # the prompt is not on the clock
            before, found = lm.stats, []
            spent = seconds_of(
                lambda options=options, found=found: found.extend(  # type: ignore[misc]
                    generate(texts, max_new_tokens=NEW_TOKENS, show_progress_bar=False, **options)
                )
            )
            done = lm.stats - before
            answers[way] = [text.completion_tokens for text in found]
            work[way] = Work(done.forward_passes, done.tokens_computed)
            if round_idx:
                seconds[way].append(spent)
        assert answers["with"] == answers["without"], f"{name}: look-ahead changes the answer"
    return Line(
        task=name,
        without=work["without"],
        ahead=work["with"],
        new_tokens=sum(map(len, answers["with"])),
        seconds={way: Spread.of(values) for way, values in seconds.items()},
        times_faster=Spread.of_ratios(seconds["without"], seconds["with"]),
    )


def lookahead_table(lines: list[Line]) -> str:
    headings = [
        "task",
        "new tokens",
        "passes",
        "with look-ahead",
        "tokens",
        "with look-ahead",
        "seconds",
        "with look-ahead",
        "times faster",
    ]
    rows = [
        [
            line.task,
            f"{line.new_tokens:,}",
            *(f"{work.passes:,}" for work in (line.without, line.ahead)),
            *(f"{work.tokens:,}" for work in (line.without, line.ahead)),
            *(with_range(line.seconds[way]) for way in ("without", "with")),
            with_range(line.times_faster, 1),
        ]
        for line in lines
    ]
    return markdown(headings, rows)


SUITE = LookAhead()
