"""Other shots for each question: a prompt of three shots drawn from eight, for each of 40 questions.

    instruction + (shot 7 | shot 2 | shot 4) + question 1       the shots do not see each other, so
    instruction + (shot 2 | shot 8 | shot 1) + question 2       each of the eight is computed once

In ordinary prompts, shots that stand behind others are different texts each time. The example prints the computed
tokens and seconds, the number of right intents, and the change of the next-token distribution if shots do not see each
other.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from intents import DATA, INSTRUCTION, INTENTS, SHOTS, Question, num_right, read_questions
from torch import Tensor

from backprompt import LM, Stats, Text, evaluate, independence_gap, parallel
from demo_model import add_model_argument, load_model

NUM_SHOTS = 3
SEED = 1
NEUTRAL = "N/A"

Arrange = Callable[[list[Text]], Text]
ARRANGEMENTS: dict[str, Arrange] = {
    "one after the other": lambda shots: sum(shots, Text("")),
    "parallel, shared positions": lambda shots: parallel(shots),
    "parallel, sequential positions": lambda shots: parallel(shots, positions="sequential"),
}


@dataclass(frozen=True)
class Run:
    """The results of one arrangement of the shots."""

    prompts: list[Text]
    num_right: int
    seconds: float
    stats: Stats


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_argument(parser)
    parser.add_argument("--questions", type=int, default=40, metavar="N", help="the first N of them (default: 40)")
    arguments = parser.parse_args(argv)
    lm = load_model(arguments.model)
    questions = read_questions(DATA / "questions.tsv")[: arguments.questions]
    evaluate(Text("warm-up", lm))
    draw = random.Random(SEED)
    chosen = [draw.sample(SHOTS, NUM_SHOTS) for _ in questions]

    print(f"{len(questions)} questions, {NUM_SHOTS} of {len(SHOTS)} shots each, {len(INTENTS)} intents\n")
    print(f"{'shots':<32}{'right':>7}{'tokens computed':>17}{'seconds':>9}")
    runs = {}
    for name, arrange in ARRANGEMENTS.items():
        lm.clear()
        runs[name] = run = classify(lm, arrange, chosen, questions)
        print(f"{name:<32}{run.num_right:>7}{run.stats.tokens_computed:>17,}{run.seconds:>9.1f}")
    print("\nAgainst full attention over the same tokens, by the token after the prompt:")
    for name, run in list(runs.items())[1:]:
        print(f"{name}: {independence_gap(run.prompts)}")


def classify(lm: LM, arrange: Arrange, chosen: Sequence[Sequence[Question]], questions: Sequence[Question]) -> Run:
    """Score every intent for every question, and count those that are right.

    An intent's log-probability is compared with its value behind the same shots and a neutral message (contextual
    calibration, https://arxiv.org/abs/2102.09690), because different shots prefer different intents. It is then
    compared with the mean over the questions, as in intents.py.
    """
    before, begin = lm.stats, time.perf_counter()
    contexts = [Text(INSTRUCTION, lm) + arrange([Text(shown(shot)) for shot in shots]) for shots in chosen]
    asked = [context + ask(question.string) for context, question in zip(contexts, questions, strict=True)]
    neutral = [context + ask(NEUTRAL) for context in contexts]
    sums = completion_logprobs(lm, asked + neutral).view(2, len(questions), len(INTENTS))
    gains = sums[0] - sums[1]
    probabilities = (gains - gains.mean(dim=0)).softmax(dim=-1)
    return Run(asked, num_right(probabilities, questions), time.perf_counter() - begin, lm.stats - before)


def completion_logprobs(lm: LM, prompts: Sequence[Text]) -> Tensor:
    """The log-probability of each intent's keywords behind each prompt, prompt by prompt."""
    leaves = [(prompt, prompt + f" {keywords}\n") for prompt in prompts for keywords in INTENTS.values()]
    found = lm.token_logprobs([leaf for _, leaf in leaves], [prompt for prompt, _ in leaves])
    return torch.stack([logprobs.sum() for logprobs in found])


def ask(message: str) -> str:
    return f"Message: {message}\nKeywords:"


def shown(shot: Question) -> str:
    return f"Message: {shot.string}\nKeywords: {INTENTS[shot.intent]}\n\n"


if __name__ == "__main__":
    main()
