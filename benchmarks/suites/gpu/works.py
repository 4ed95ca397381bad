"""The works on a GPU: forests of token ids, all from a seed.

Token ids are drawn, so no work waits for a tokenizer. Each repetition of a work has ids of its own behind the same
labels, so nothing computed before serves the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.workloads import token_ids

Ids = list[int]


@dataclass(frozen=True)
class Asked:
    """A prompt in parts that others may share, outermost first, and the completions that are scored behind it."""

    parts: tuple[Ids, ...]
    completions: tuple[Ids, ...]

    @property
    def prompt(self) -> Ids:
        return [token_id for part in self.parts for token_id in part]


@dataclass(frozen=True)
class Work:
    """A forest: `make` draws its prompts by a function for ids, a mark of the repetition, and a factor of sizes."""

    name: str
    make: Callable[[Draw, Callable[[int], int]], Iterable[Asked]]

    def drawn(self, mark: str, scale: float, vocabulary: int) -> list[Asked]:
        """Draw the prompts; `scale`: the factor of the number of prompts."""
        return list(self.make(Draw(mark, vocabulary), lambda num: max(1, round(num * scale))))


@dataclass(frozen=True)
class Draw:
    """Draws token ids by a name; those of `own` differ from repetition to repetition."""

    mark: str
    vocabulary: int

    def own(self, num_tokens: int, *name: object) -> Ids:
        return token_ids(num_tokens, (self.mark, *name), self.vocabulary)

    def kept(self, num_tokens: int, *name: object) -> Ids:
        return token_ids(num_tokens, name, self.vocabulary)


def _labels(draw: Draw, size: Callable[[int], int]) -> Iterable[Asked]:
    shared = draw.own(400, "shared")
    labels = tuple(draw.kept(3, "label", j) for j in range(77))
    return (Asked((shared, draw.own(60, "question", i)), labels) for i in range(size(64)))


def _answers(draw: Draw, size: Callable[[int], int]) -> Iterable[Asked]:
    shared = draw.own(600, "shots")
    for i in range(size(128)):
        yield Asked((shared, draw.own(80, "question", i)), tuple(draw.own(20, "answer", i, j) for j in range(4)))


def _pairs(draw: Draw, size: Callable[[int], int]) -> Iterable[Asked]:
    for i in range(size(512)):
        yield Asked((draw.own(30, "prompt", i),), tuple(draw.own(6, "answer", i, j) for j in range(2)))


def _nested(draw: Draw, size: Callable[[int], int]) -> Iterable[Asked]:
    labels = tuple(draw.kept(2, "label", j) for j in range(3))
    for i in range(4):
        for j in range(4):
            for k in range(size(16)):
                parts = draw.own(100, "instruction", i), draw.own(80, "shots", i, j), draw.own(40, "question", k)
                yield Asked(parts, labels)


def _apart(draw: Draw, size: Callable[[int], int]) -> Iterable[Asked]:
    return (Asked((draw.own(400, "text", i),), (draw.kept(4, "end", i),)) for i in range(size(48)))


def _one(draw: Draw, size: Callable[[int], int]) -> Iterable[Asked]:
    return [Asked((draw.own(900, "text"),), (draw.kept(4, "end"),))]


LABELS = Work("64 prompts x 77 labels behind 400 tokens", _labels)
ANSWERS = Work("128 questions x 4 answers behind 600 tokens", _answers)
PAIRS = Work("512 prompts x 2", _pairs)
NESTED = Work("nested 4 x 4 x 16 x 3", _nested)
APART = Work("48 texts, nothing shared", _apart)
ONE = Work("one text", _one)
WORKS = (LABELS, ANSWERS, PAIRS, NESTED, APART, ONE)


def num_tokens(work: Iterable[Asked]) -> int:
    """The tokens of all texts."""
    return sum(len(asked.prompt) + len(completion) for asked in work for completion in asked.completions)


def num_distinct(work: Iterable[Asked]) -> int:
    """The distinct tokens of all texts: those that a forest holds."""
    numbers: dict[tuple[int, int], int] = {}
    for asked in work:
        end = _walked(numbers, 0, asked.prompt)
        for completion in asked.completions:
            _walked(numbers, end, completion)
    return len(numbers)


def _walked(numbers: dict[tuple[int, int], int], number: int, ids: Ids) -> int:
    """Number the tokens of a trie along `ids`, and return the number of the last one."""
    for token_id in ids:
        number = numbers.setdefault((number, token_id), len(numbers) + 1)
    return number
