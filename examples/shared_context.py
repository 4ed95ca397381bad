"""A long context and 20 requests about it: the seconds that sharing the context saves, and the bytes that it costs.

Three ways to the next-token logits of `manual + request` for each request, each starting from nothing:

    plain          model(tokenizer(manual + request)), a request at a time
    as they come   (manual + request).logits, a request at a time; the first computes the manual
    together       evaluate(all of them)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backprompt import LM, Text, evaluate
from demo_model import add_model_argument, load_model
from plain import next_token_logits

MANUAL = (Path(__file__).parent / "data" / "manual.txt").read_text(encoding="utf-8")
QUESTIONS = (
    "What does the blinking blue light mean?",
    "How many litres does the tank hold?",
    "orange light is on, what now?",
    "How much coffee goes into the double basket?",
    "My espresso runs through in ten seconds. What should I change?",
    "can the tray go in the dishwasher",
    "How long is the guarantee on the boiler?",
    "How do I reset the volumes?",
    "Is distilled water fine?",
    "there is water under the machine",
    "How hot should the milk be?",
    "Where do I find the serial number?",
    "Why is my coffee lukewarm?",
    "how often do i have to descale",
    "Does the guarantee cover a machine in our office of thirty people?",
    "What do I do after steaming milk, before the next coffee?",
    "red light blinks, is it broken",
    "When can I reach the service desk?",
    "the pump got really loud today",
    "How do I set my own cup size?",
)


@dataclass(frozen=True)
class Run:
    """The results of one way."""

    logits: Tensor  # (requests, vocab)
    seconds: float
    tokens_computed: int
    bytes_held: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A product manual and 20 questions, with and without sharing.")
    add_model_argument(parser)
    lm = load_model(parser.parse_args(argv).model)
    requests = [f"\n\nQuestion: {question}\nAnswer:" for question in QUESTIONS]
    runs = run_all(lm, requests)
    print_table(lm, requests, runs)


def run_all(lm: LM, requests: Sequence[str]) -> dict[str, Run]:
    """The three ways by name; both sides have run a text before, so that no first call is timed."""
    lm.evaluate([Text("Warm up.", lm)])
    next_token_logits(lm.model, Text("Warm up.", lm).tokens)
    return {
        "plain calls, one at a time": ask_plainly(lm, requests),
        "sharing, one at a time, as they come": share(lm, lambda manual: [(manual + r).logits for r in requests]),
        "sharing, all in one plan": share(
            lm, lambda manual: [r.logits for r in evaluate(manual + r for r in requests)]
        ),
    }


def ask_plainly(lm: LM, requests: Sequence[str]) -> Run:
    begin = time.perf_counter()
    token_ids = [lm.tokenizer(MANUAL + request)["input_ids"] for request in requests]
    logits = torch.stack([next_token_logits(lm.model, ids) for ids in token_ids])
    return Run(logits, time.perf_counter() - begin, sum(map(len, token_ids)), bytes_held=0)


def share(lm: LM, ask: Callable[[Text], list[Tensor]]) -> Run:
    lm.clear()
    before = lm.stats
    begin = time.perf_counter()
    logits = torch.stack(ask(Text(MANUAL, lm)))
    seconds = time.perf_counter() - begin
    return Run(logits, seconds, (lm.stats - before).tokens_computed, lm.stats.bytes_held)


def print_table(lm: LM, requests: Sequence[str], runs: dict[str, Run]) -> None:
    manual = Text(MANUAL, lm)
    plain, *shared = runs.values()
    print(f"A manual of {len(manual.tokens)} tokens, and {len(requests)} requests about it.\n")
    print(
        f"{'next-token logits of each request':<38}{'tokens computed':>16}{'seconds':>9}{'speed-up':>10}{'MB held':>9}"
    )
    for name, run in runs.items():
        speed_up = f"{plain.seconds / run.seconds:.1f} x"
        print(f"{name:<38}{run.tokens_computed:>16,}{run.seconds:>9.2f}{speed_up:>10}{run.bytes_held / 1e6:>9.1f}")
    manual_bytes = manual.model_repr.num_bytes
    print(
        f"\nWhat sharing costs: {shared[-1].bytes_held:,} bytes of keys, values and hidden states, "
        f"{manual_bytes:,} of them\nfor the manual, held until lm.clear() or the end of the program."
    )
    gap = max((run.logits - plain.logits).abs().max().item() for run in shared)
    print(f"Largest gap in logits to the plain call: {gap:.0e}, where logits reach {plain.logits.abs().max():.0f}.")


if __name__ == "__main__":
    main()
