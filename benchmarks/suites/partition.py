"""A forest of a million prompts cut for 256 workers: seconds, memory, balance, and tokens that are computed twice.

The first shapes are planned from token ids, as `RayLM` plans a call. The others have more tokens than a machine's
memory: they are cut from two numbers a prompt, its length and the tokens that it shares with the one before.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from backprompt.forest.partition import Ints, Partition, Rates, cut, partition
from benchmarks.machine import processor
from benchmarks.measure import peak_bytes_of
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, megabytes

NUM_PROMPTS = 1_000_000
NUM_WORKERS = 256
SEED = 20261122
VOCABULARY = 50_000
RATES = Rates(attention=1 / (6 * 768))
"""Of GPT-2: a layer of hidden size h multiplies 12 h^2 times for a token, and 2 h times for each token before it."""

Tokens = tuple[int, ...]
Numbers = tuple[Ints, Ints]
"""The lengths of prompts in forest order, and the tokens that each shares with the one before."""


@dataclass(frozen=True)
class Line:
    """One shape.

    Attributes:
        shape: in words.
        num_tokens: in all prompts.
        num_distinct: distinct ones.
        seconds: of the processor.
        peak_bytes: by which memory grows at most, beside the prompts.
        num_parts: the number of parts.
        of_mean, of_least: the slowest part, by the mean of all and by the cost that no cut stays below.
        of_slowest: the fastest part, by the slowest.
        of_distinct, least_of_distinct: tokens computed in all parts, and those of the cut with the fewest, however
            uneven, by the distinct ones.

    """

    shape: str
    num_tokens: int
    num_distinct: int
    seconds: float
    peak_bytes: int | None
    num_parts: int
    of_mean: float
    of_least: float
    of_slowest: float
    of_distinct: float
    least_of_distinct: float


@dataclass(frozen=True)
class Shape:
    """A shape of about so many prompts, as token ids or as two numbers a prompt."""

    name: str
    make: Callable[[int], list[Tokens] | Numbers]

    def measured(self, num_prompts: int, num_workers: int) -> Line:
        made = self.make(num_prompts)
        found: list[Partition] = []
        seconds: list[float] = []

        def plan() -> None:
            started = time.process_time()
            found.append(
                cut(*made, num_workers, rates=RATES)
                if isinstance(made, tuple)
                else partition(made, num_workers, rates=RATES)
            )
            seconds.append(time.process_time() - started)

        peak_bytes = peak_bytes_of(plan)
        (parts,) = found
        return Line(
            shape=self.name,
            num_tokens=int(made[0].sum()) if isinstance(made, tuple) else sum(map(len, made)),
            num_distinct=parts.num_distinct,
            seconds=seconds[0],
            peak_bytes=peak_bytes,
            num_parts=len(parts.costs),
            of_mean=float(parts.costs.max() / parts.costs.mean()),
            of_least=float(parts.costs.max() / parts.least_cost),
            of_slowest=float(parts.costs.min() / parts.costs.max()),
            of_distinct=float(parts.num_tokens.sum() / parts.num_distinct),
            least_of_distinct=parts.least_tokens / parts.num_distinct,
        )


def tree(num_prompts: int) -> list[Tokens]:
    """Ten instructions, ten shots behind each, questions behind these, and the same four labels behind all."""
    draw = np.random.default_rng(SEED)
    labels = [_ids(draw, draw.integers(1, 4)) for _ in range(4)]
    prompts = []
    for instruction in [_ids(draw, draw.integers(20, 60)) for _ in range(10)]:
        for shots in [instruction + _ids(draw, draw.integers(30, 90)) for _ in range(10)]:
            for _ in range(max(1, num_prompts // 400)):
                question = shots + _ids(draw, draw.integers(10, 40))
                prompts += [question + label for label in labels]
    return prompts


def star(num_prompts: int) -> list[Tokens]:
    """One centre of 100 tokens, and an end of 3 tokens behind it in each prompt."""
    draw = np.random.default_rng(SEED)
    centre = _ids(draw, 100)
    return [centre + tuple(end) for end in draw.integers(1, VOCABULARY, (num_prompts, 3)).tolist()]


def all_distinct(num_prompts: int) -> list[Tokens]:
    """Prompts of 10 to 60 tokens that share nothing."""
    draw = np.random.default_rng(SEED)
    return [(VOCABULARY + idx, *_ids(draw, draw.integers(9, 60))) for idx in range(num_prompts)]


def giant_root(num_prompts: int) -> Numbers:
    """A root of 20,000 tokens, and 1 to 4 tokens behind it in each prompt."""
    ends = np.random.default_rng(SEED).integers(1, 5, num_prompts)
    return 20_000 + ends, np.where(np.arange(num_prompts) > 0, 20_000, 0)


def chain(num_prompts: int) -> Numbers:
    """Each prompt is the one before and a token."""
    return np.arange(1, num_prompts + 1), np.arange(num_prompts)


def comb(num_prompts: int) -> Numbers:
    """A chain of 1,000 runs of 20 tokens, behind each of which the same number of prompts of 5 tokens stand."""
    num_each = max(1, num_prompts // 1000)
    depths = 20 * np.repeat(np.arange(1, 1001), num_each)
    return depths + 5, np.where(np.arange(len(depths)) % num_each > 0, depths, depths - 20)


def _ids(draw: np.random.Generator, num_tokens: int) -> Tokens:
    return tuple(draw.integers(1, VOCABULARY, num_tokens).tolist())


SHAPES = (
    Shape("a tree: 10 instructions, 10 shots each, 2,500 questions each, 4 labels", tree),
    Shape("a star: a centre of 100 tokens, ends of 3", star),
    Shape("all distinct: 10 to 60 tokens each", all_distinct),
    Shape("one giant root of 20,000 tokens, ends of 1 to 4", giant_root),
    Shape("a chain: each prompt the one before and a token", chain),
    Shape("a comb: a chain of 20,000 tokens, 1,000 prompts behind every 20th", comb),
)


class Partitions(Suite):
    name = "partition"
    place = 66
    rows_type = list[Line]

    def measure(self, say: Say, peer_python: object) -> Measured:
        lines = []
        for line in measured(NUM_PROMPTS, NUM_WORKERS):
            lines.append(line)
            say(table_of([line]))
        machine = {"processor": processor(), "threads": 1, "python": platform.python_version(), "numpy": np.__version__}
        return Measured(lines, machine)

    def tables(self, results: Results) -> list[Table]:
        return [Table("table partition", table_of(self.rows(results)))]


def measured(num_prompts: int, num_workers: int) -> Iterator[Line]:
    """Plan all shapes."""
    for shape in SHAPES:
        yield shape.measured(num_prompts, num_workers)


def table_of(lines: list[Line]) -> str:
    headings = [
        f"{NUM_PROMPTS:,} prompts, {NUM_WORKERS} workers",
        "tokens",
        "distinct",
        "seconds",
        "peak MB",
        "parts",
        "slowest by the mean",
        "slowest by its bound",
        "fastest by the slowest",
        "computed by distinct",
        "its bound",
    ]
    rows = [
        [
            line.shape,
            *(f"{number:,}" for number in (line.num_tokens, line.num_distinct)),
            f"{line.seconds:.1f}",
            megabytes(line.peak_bytes),
            f"{line.num_parts}",
            *(f"{ratio:.3f}" for ratio in (line.of_mean, line.of_least, line.of_slowest)),
            *(f"{ratio:.4f}" for ratio in (line.of_distinct, line.least_of_distinct)),
        ]
        for line in lines
    ]
    return markdown(headings, rows)


SUITE = Partitions()
