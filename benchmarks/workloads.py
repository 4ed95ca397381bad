"""The measured inputs: a model, a tokenizer, and forests of prompts and completions, all from a seed.

The model is GPT-2 124M with random weights (timing does not depend on the weights), the tokenizer a byte-level BPE
trained on made-up text. A workload is a list of prompts, each a tuple of strings that other prompts may begin with as
well, and the completions to score after it.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM

SEED = 20261122
VOCABULARY = 4096
TRAINING_WORDS = 40_000


@dataclass(frozen=True)
class Prompt:
    """A prompt in parts that may be shared, outermost first, and what may follow it."""

    parts: tuple[str, ...]
    completions: tuple[str, ...]

    @property
    def string(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True)
class Workload:
    name: str
    prompts: tuple[Prompt, ...]

    @property
    def num_texts(self) -> int:
        return sum(len(prompt.completions) for prompt in self.prompts)

    def with_fresh_prefix(self, mark: str) -> Workload:
        """The same work on other strings: every prompt begins with `mark`, so nothing cached can serve it."""
        prompts = tuple(Prompt((mark + p.parts[0], *p.parts[1:]), p.completions) for p in self.prompts)
        return Workload(self.name, prompts)


def demo_lm() -> LM:
    """The small trained model that the examples run on, for what random weights say nothing of."""
    sys.path.append(str(Path(__file__).parent.parent / "examples"))
    from demo_model import load_model

    return load_model(None)


def make_model() -> GPT2LMHeadModel:
    torch.manual_seed(SEED)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator([Writer(SEED).text(TRAINING_WORDS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def token_ids(num_tokens: int, seed: object = 0, vocabulary: int = VOCABULARY) -> list[int]:
    draw = random.Random(str(seed))
    return [draw.randrange(1, vocabulary) for _ in range(num_tokens)]


class Writer:
    """Writes made-up text: pseudo-words of a few syllables, common ones first, in sentences."""

    def __init__(self, seed: int) -> None:
        words = random.Random(SEED)  # one language for all writers
        syllables = [c + v + e for c in "bdfghklmnprstvw" for v in "aeiou" for e in ("", "n", "s", "r")]
        self._words = ["".join(words.choices(syllables, k=words.choice((1, 1, 2, 2, 3)))) for _ in range(2000)]
        self._weights = [1 / (rank + 3) for rank in range(len(self._words))]
        self._random = random.Random(seed)

    def words(self, num_words: int) -> str:
        return " ".join(self._random.choices(self._words, self._weights, k=num_words))

    def text(self, num_words: int) -> str:
        """Sentences of about ten words."""
        sentences = []
        while num_words > 0:
            length = min(num_words, self._random.randint(5, 15))
            sentences.append(self.words(length).capitalize() + self._random.choice((".", ".", "?", ", well.")))
            num_words -= length
        return " ".join(sentences)

    def labels(self, num_labels: int, max_words: int = 3) -> tuple[str, ...]:
        """Distinct labels of one to `max_words` words, each with a space before it; some share their first word."""
        firsts = [self.words(1) for _ in range(max(2, num_labels // 2))]
        labels: dict[str, None] = {}
        while len(labels) < num_labels:
            rest = self._random.randint(0, max_words - 1)
            label = " ".join([self._random.choice(firsts), *([self.words(rest)] if rest else [])])
            labels[" " + label] = None
        return tuple(labels)

    def names(self, num_names: int) -> tuple[str, ...]:
        """Distinct words of the 200 most common, each with a space before it; the tokenizer has one token for each."""
        common = list(dict.fromkeys(self._words))[:200]
        return tuple(" " + word for word in self._random.sample(common, num_names))


def two_choices() -> Workload:
    writer = Writer(1)
    return Workload(
        "48 prompts x 2 choices",
        tuple(Prompt((writer.text(18) + "\nAnswer:",), writer.labels(2)) for _ in range(48)),
    )


def classes(num_prompts: int, num_classes: int = 77, shared_words: int = 190) -> Workload:
    writer = Writer(2)
    instruction, labels = writer.text(shared_words), writer.labels(num_classes)
    questions = [f"\n\nCustomer: {writer.text(15)}\nIntent:" for _ in range(num_prompts)]
    return Workload(
        f"{num_prompts} prompts x {num_classes} classes",
        tuple(Prompt((instruction, question), labels) for question in questions),
    )


def one_word_classes(num_prompts: int, num_classes: int, shared_words: int) -> Workload:
    writer = Writer(2)
    instruction, names = writer.text(shared_words), Writer(12).names(num_classes)
    questions = [f"\n\nCustomer: {writer.text(15)}\nIntent:" for _ in range(num_prompts)]
    return Workload(
        f"{num_prompts} prompts x {num_classes} names of one token",
        tuple(Prompt((instruction, question), names) for question in questions),
    )


def few_shots() -> Workload:
    writer = Writer(3)
    shots = "".join(f"Question: {writer.text(20)}\nAnswer: {writer.words(3)}\n\n" for _ in range(8))
    questions = [f"Question: {writer.text(20)}\nAnswer:" for _ in range(24)]
    return Workload(
        "8 shots, 24 questions x 4 choices",
        tuple(Prompt((shots, question), writer.labels(4)) for question in questions),
    )


def nested() -> Workload:
    writer = Writer(4)
    labels = writer.labels(3)
    prompts = []
    for instruction in [writer.text(25) for _ in range(3)]:
        for shot in [f"\n\n{writer.text(20)}\nLabel: {writer.words(1)}\n\n" for _ in range(3)]:
            for question in [f"{writer.text(12)}\nLabel:" for _ in range(6)]:
                prompts.append(Prompt((instruction, shot, question), labels))
    return Workload("3 instructions x 3 shots x 6 questions x 3 labels", tuple(prompts))


def notebook() -> Workload:
    """The original toy's notebook: one long context, 20 requests."""
    writer = Writer(5)
    context = writer.text(400)
    return Workload(
        "long context, 20 requests",
        tuple(Prompt((context, f"\n\nRequest: {writer.text(12)}\n"), (" " + writer.words(4),)) for _ in range(20)),
    )


def nothing_shared() -> Workload:
    writer = Writer(6)
    return Workload(
        "24 texts, nothing shared",
        tuple(Prompt((f"{idx} {writer.text(50)}\n",), (" " + writer.words(3),)) for idx in range(24)),
    )


def single_text() -> Workload:
    writer = Writer(7)
    return Workload("one text", (Prompt((writer.text(300),), (" " + writer.words(4),)),))


def ten_thousand_leaves() -> Workload:
    writer = Writer(8)
    context, labels = writer.text(150), writer.labels(100, max_words=2)
    return Workload(
        "10,000 leaves",
        tuple(Prompt((context, f"\n\n{writer.text(8)}\n:"), labels) for _ in range(100)),
    )


def shared_prefix(num_words: int) -> Workload:
    """8 prompts of 75 words of their own each, behind `num_words` words that all share."""
    writer = Writer(9)
    shared = (f"{writer.text(num_words)}\n\n",) if num_words else ()
    prompts = [Prompt((*shared, f"{idx}: {writer.text(75)}\n"), (" " + writer.words(2),)) for idx in range(8)]
    return Workload(f"shared prefix of {num_words} words", tuple(prompts))


def deep(depth: int) -> Workload:
    """A comb of about equal tokens: a chain of `depth` parts, a leaf hanging from each."""
    writer = Writer(10)
    parts = [f"{writer.text(384 // depth)}\n" for _ in range(depth)]
    prompts = [Prompt(tuple(parts[: idx + 1]), (" " + writer.words(2),)) for idx in range(depth)]
    return Workload(f"depth {depth}", tuple(prompts))
