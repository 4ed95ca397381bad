"""Sort 40 customer questions into 12 intents, as one tree of prompts: 480 texts, each distinct token computed once.

    instruction + shot 1 + ... + shot 8          shared by all 480 texts
    ├── question 1                               shared by 12
    │   ├── keywords of intent 1                 scored: log p(these tokens | everything before them)
    │   ├── ...
    │   └── keywords of intent 12
    └── question 2 ...

Each text is a plain concatenation; `evaluate` finds the shared parts. The predicted intent is the one whose completion
gained most by the question: its log-probability minus its mean over all the questions. Without this correction a small
model prefers the same few completions for every question (https://arxiv.org/abs/2309.17249).
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backprompt import LM, ModelRepr, Stats, Text, evaluate
from backprompt.visible import visible
from demo_model import add_model_argument, load_model
from plain import Continuation, Estimate, estimate_seconds, sorted_batches, token_logprobs

DATA = Path(__file__).parent / "data"

INTENTS = {  # and the keywords that stand for each in the prompt
    "ask if something is in stock": "in stock, available, sold out",
    "cancel an order": "cancel, stop order, changed mind",
    "change the delivery address": "address, moving, deliver to",
    "delete an account": "delete account, personal data",
    "get an invoice": "invoice, receipt, bill",
    "report a damaged item": "damaged, broken, cracked",
    "report a failed payment": "payment failed, card, checkout",
    "reset a password": "password, login, sign in",
    "return an item": "return, send back, exchange",
    "track an order": "tracking, late delivery, where is it",
    "use a discount code": "discount code, voucher, coupon",
    "none of these": "other topic, not about orders",
}


@dataclass(frozen=True)
class Question:
    """A customer's message, and the intent that a person would give it."""

    string: str
    intent: str


INSTRUCTION = "Messages to our online kitchen shop, with keywords.\n\n"
SHOTS = (
    Question("Who won the cup final?", "none of these"),
    Question("hello, my order 20155 should have been here on monday", "track an order"),
    Question("i forgot my password again", "reset a password"),
    Question("the pan is too heavy for me, how can I send it back?", "return an item"),
    Question("your site wont take my mastercard", "report a failed payment"),
    Question("we moved last week, plz ship to 3 Hill Road instead", "change the delivery address"),
    Question("one of the glasses was brokn when i opened the box", "report a damaged item"),
    Question("do you have the big whisk again?", "ask if something is in stock"),
)
CHANGED_SHOT_IDX = 4
CHANGED_SHOT = Question("tried to pay with my visa and got an error", "report a failed payment")


@dataclass(frozen=True)
class Tree:
    """The texts of the job: the shared part, a prompt for each question, and the leaves, intent by intent in each."""

    context: Text
    prompts: list[Text]
    leaves: list[Text]


def build_tree(lm: LM, shots: Sequence[Question], questions: Sequence[Question]) -> Tree:
    context = Text(INSTRUCTION, lm)
    for shot in shots:
        context += f"Message: {shot.string}\nKeywords: {INTENTS[shot.intent]}\n\n"
    prompts = [context + f"Message: {question.string}\nKeywords:" for question in questions]
    leaves = [prompt + f" {keywords}\n" for prompt in prompts for keywords in INTENTS.values()]
    return Tree(context, prompts, leaves)


@dataclass(frozen=True)
class Scored:
    """The results of a tree, and their cost."""

    continuations: list[Continuation]  # a leaf each
    logprobs: Tensor  # of each completion given its prompt, (questions, intents), nats
    seconds: float  # tokenizing, evaluating and scoring
    stats: Stats  # of this evaluation alone

    @property
    def probabilities(self) -> Tensor:
        """(questions, intents): the softmax of log-probabilities, less their mean over the questions."""
        return (self.logprobs - self.logprobs.mean(dim=0)).softmax(dim=-1)

    @property
    def uncorrected_probabilities(self) -> Tensor:
        """(questions, intents): the softmax of the log-probabilities as they are."""
        return self.logprobs.softmax(dim=-1)


def score_tree(lm: LM, tree: Tree) -> Scored:
    before, begin = lm.stats, time.perf_counter()
    continuations = continue_prompts(tree, evaluate(tree.leaves))
    stats = lm.stats - before
    logprobs = lm.token_logprobs(tree.leaves, [text.start for text in continuations])
    by_question = torch.stack([completion.sum() for completion in logprobs]).view(len(tree.prompts), len(INTENTS))
    return Scored(continuations, by_question, time.perf_counter() - begin, stats)


def continue_prompts(tree: Tree, reprs: Sequence[ModelRepr]) -> list[Continuation]:
    """The leaves' tokens, and where they differ from their prompts' tokens: tokens may merge at the join."""
    prompt_ids = [ids for ids in (prompt.tokens for prompt in tree.prompts) for _ in INTENTS]
    leaf_ids = [tuple(r.input_ids.tolist()) for r in reprs]
    return [Continuation(ids, num_common(ids, before)) for ids, before in zip(leaf_ids, prompt_ids, strict=True)]


def num_common(some: Sequence[int], others: Sequence[int]) -> int:
    """The number of items that two sequences have in common at their beginning."""
    pairs = zip(some, others)  # noqa: B905  # the shorter one ends it
    return next((idx for idx, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))


def read_questions(path: Path) -> list[Question]:
    """One question a line, a tab, its intent."""
    questions = [Question(*line.split("\t")) for line in path.read_text(encoding="utf-8").splitlines()]
    unknown = {question.intent for question in questions} - set(INTENTS)
    if unknown:
        raise SystemExit(f"{path}: intents must be among {', '.join(INTENTS)}; not {', '.join(sorted(unknown))}.")
    return questions


def num_right(probabilities: Tensor, questions: Sequence[Question]) -> int:
    predicted = [list(INTENTS)[idx] for idx in probabilities.argmax(dim=-1)]
    return sum(intent == question.intent for intent, question in zip(predicted, questions, strict=True))


def largest_gap(lm: LM, texts: Sequence[Text]) -> float:
    """The largest difference, over all tokens of the texts, to the plain call's log-probabilities."""
    gaps = [text.token_logprobs[1:] - token_logprobs(lm.model, text.tokens) for text in texts]
    return torch.cat(gaps).abs().max().item()


def evenly_spaced(texts: Sequence[Text], num_texts: int) -> list[Text]:
    return [texts[(2 * idx + 1) * len(texts) // (2 * num_texts)] for idx in range(min(num_texts, len(texts)))]


def print_predictions(scored: Scored, questions: Sequence[Question]) -> None:
    print(f"{'':4}{'p':>4}  {'intent':<30}question")
    for question, row in zip(questions, scored.probabilities, strict=True):
        intent = list(INTENTS)[row.argmax()]
        is_right = intent == question.intent
        string = visible(textwrap.shorten(question.string, 58, placeholder=" ..."))
        print(f"{'ok' if is_right else '--':<4}{row.max():.2f}  {intent:<30}{string}")
        if not is_right:
            print(f"{'':10}not: {question.intent}")
    most_frequent = max(sum(question.intent == intent for question in questions) for intent in INTENTS)
    print(f"\nRight: {num_right(scored.probabilities, questions)} of {len(questions)}.", end=" ")
    print(f"By the log-probabilities as they are: {num_right(scored.uncorrected_probabilities, questions)}.", end=" ")
    print(f"Always the most frequent intent: {most_frequent}.\n")


def print_row(name: str, value: str, note: str = "") -> None:
    print(f"{name:<24}{value:>9}  {note}".rstrip())


def print_work(lm: LM, scored: Scored) -> None:
    requested, computed = scored.stats.tokens_requested, scored.stats.tokens_computed
    print_row("tokens in all strings", f"{requested:,}")
    print_row("tokens computed", f"{computed:,}", f"1 in {requested / computed:.1f}, none of them padding")
    print_row("held for it", f"{lm.stats.bytes_held / 1e6:,.0f} MB", "keys, values and hidden states")


def print_seconds(scored: Scored, plain: Estimate, batch_size: int) -> None:
    print_row("backprompt", f"{scored.seconds:.1f} s", "tokenizing, evaluating and scoring all texts")
    sample = f"{plain.batches_run} of {plain.batches} batches of {batch_size}, which took {plain.seconds_run:.1f} s"
    print_row("plain padded batches", f"{plain.seconds:.1f} s", f"estimated from {sample}")
    print_row("speed-up", f"{plain.seconds / scored.seconds:.1f} x")


def change_a_shot(lm: LM, tree: Tree, questions: Sequence[Question]) -> Tree:
    """Evaluate the tree with another fifth shot, and print what was computed for it."""
    shots = list(SHOTS)
    shots[CHANGED_SHOT_IDX] = CHANGED_SHOT
    changed = build_tree(lm, shots, questions)
    scored = score_tree(lm, changed)
    kept = num_common(tree.context.tokens, changed.context.tokens)
    recomputed = len(changed.context.tokens) - kept
    print(f"\nShot {CHANGED_SHOT_IDX + 1} of {len(shots)} becomes {CHANGED_SHOT.string!r}:")
    print_row("tokens not recomputed", f"{kept:,}", "the instruction, the shots before it, its first words")
    print_row("tokens computed", f"{recomputed:,}", "the rest of it, the shots behind it")
    print_row(
        "", f"{scored.stats.tokens_computed - recomputed:,}", "questions and intents, which now follow other shots"
    )
    print_row("backprompt", f"{scored.seconds:.1f} s", f"{num_right(scored.probabilities, questions)} right")
    return changed


def evaluate_again(lm: LM, texts: Sequence[Text]) -> None:
    before, begin = lm.stats, time.perf_counter()
    evaluate(texts)
    seconds, stats = time.perf_counter() - begin, lm.stats - before
    print(f"\nAll {len(texts)} texts, with the old shot and with the new one, again:")
    print_row("tokens computed", f"{stats.tokens_computed}", f"in {stats.forward_passes} forward passes")
    print_row("backprompt", f"{seconds:.3f} s")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Sort customer questions into 12 intents with a language model, as one tree of prompts, "
        "and compare with plain padded batches.",
    )
    add_model_argument(parser)
    parser.add_argument(
        "--questions",
        type=Path,
        default=DATA / "questions.tsv",
        metavar="FILE",
        help="one question a line: the customer's words, a tab, the intent (default: the 40 of data/questions.tsv)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="texts in a plain padded batch (default: %(default)s)"
    )
    parser.add_argument(
        "--plain-batches",
        type=int,
        default=4,
        metavar="N",
        help="the number of those batches to time (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    questions = read_questions(arguments.questions)
    lm = load_model(arguments.model)
    lm.evaluate([Text("Warm up.", lm)])  # the plain side has a batch to warm up, too

    tree = build_tree(lm, SHOTS, questions)
    print(f"{len(SHOTS)} shots, {len(questions)} questions, {len(INTENTS)} intents: {len(tree.leaves)} texts.", end=" ")
    print(f"{type(lm.model).__name__}, {torch.get_num_threads()} threads.\n")
    scored = score_tree(lm, tree)
    print_predictions(scored, questions)
    print_work(lm, scored)
    batches = sorted_batches(scored.continuations, arguments.batch_size)
    print_seconds(scored, estimate_seconds(lm.model, batches, arguments.plain_batches), arguments.batch_size)
    sample = evenly_spaced(tree.leaves, 8)
    gap = largest_gap(lm, sample)
    print_row("largest gap in log p", f"{gap:.0e}", f"of a token, in {len(sample)} texts, to the plain call")

    changed = change_a_shot(lm, tree, questions)
    evaluate_again(lm, tree.leaves + changed.leaves)


if __name__ == "__main__":
    main()
