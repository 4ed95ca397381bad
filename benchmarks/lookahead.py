"""Look-ahead by n-grams on the demo model: where it helps, and where it does not.

How much of what comes stands in the text already depends on the task, so random weights would say nothing. Each task is
a chat with one user message, answered greedily with and without look-ahead; the answers are the same, or the run fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from backprompt import LM, Text, chat, generate
from benchmarks import workloads
from benchmarks.bench import describe_machine
from benchmarks.measure import Spread, seconds_of

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


def measure(say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, object]]:
    """Measure all tasks, and all of them in one batch."""
    lm = workloads.demo_lm()
    texts = {name: chat(lm, [{"role": "user", "content": message}]) for name, message in TASKS.items()}
    cases = {name: [text] for name, text in texts.items()} | {"all five at once": list(texts.values())}
    lines = []
    for name, own in cases.items():
        lines.append(_line(lm, name, own))
        say(json.dumps(lines[-1]))
    return {"lines": lines, "new tokens": NEW_TOKENS, "ahead": NUM_AHEAD}, describe_machine(lm)


def _line(lm: LM, name: str, texts: list[Text]) -> dict[str, Any]:
    """With and without, in turns.

    Raises:
        AssertionError: the answers differ.

    """
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    line: dict[str, Any] = {"task": name}
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
            line[way] = {"passes": done.forward_passes, "tokens": done.tokens_computed}
            if round_idx:
                seconds[way].append(spent)
        assert answers["with"] == answers["without"], f"{name}: look-ahead changes the answer"
    line["new tokens"] = sum(map(len, answers["with"]))
    line["seconds"] = {way: vars(Spread.of(values)) for way, values in seconds.items()}
    line["times faster"] = vars(Spread.of_ratios(seconds["without"], seconds["with"]))
    return line
