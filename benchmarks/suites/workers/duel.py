"""Two workers of one thread each against one process of two threads, on the two cores of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text, classify, generate
from backprompt.engines.crew_lm import CrewLM
from benchmarks import workloads
from benchmarks.measure import Spread
from benchmarks.workloads import Writer

TOLERANCE = 1e-3  # nats
ROUNDS = 3
NUM_CORES = 2

ONE_PROCESS, TWO_WORKERS, ONE_WORKER = "one process", "two workers", "one worker"

Numbers = list[float]


@dataclass(frozen=True)
class Work:
    """A work, and the log-probabilities that it finds, in order."""

    name: str
    run: Callable[[LM], Numbers]


@dataclass(frozen=True)
class Line:
    """One work, and all who do it.

    Attributes:
        work: in words.
        tokens: forwarded, by who does it; of two workers each.
        seconds: by who does it.
        ratio: the seconds of one process by those of two workers, of neighbours in time.
        gap: the largest gap between log-probabilities, nats.

    """

    work: str
    tokens: dict[str, list[int]]
    seconds: dict[str, Spread]
    ratio: Spread
    gap: float


def loader() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The model of all benchmarks, the same in every process."""
    return workloads.make_model(), workloads.make_tokenizer()


def scored(num_prompts: int, num_classes: int, shared_words: int) -> Work:
    """Score the same completions behind prompts that share a beginning, or nothing."""
    workload = workloads.classes(num_prompts, num_classes, shared_words)
    prompts = [prompt.string for prompt in workload.prompts]
    completions = [completion.removeprefix(" ") for completion in workload.prompts[0].completions]

    def run(lm: LM) -> Numbers:
        found: list[list[list[float]]] = classify.log_probs(prompts, completions, lm, show_progress_bar=False)
        return list(chain.from_iterable(chain.from_iterable(found)))

    return Work(f"{num_prompts} prompts x {num_classes} classes behind {shared_words} words: scores", run)


def generated(num_prompts: int, num_new: int, shared_words: int) -> Work:
    """Continue prompts that share a beginning, greedily."""
    writer = Writer(3)
    context = writer.text(shared_words)
    prompts = [f"{context}\n\n{writer.text(12)}\n" for _ in range(num_prompts)]

    def run(lm: LM) -> Numbers:
        texts = [Text(prompt, lm) for prompt in prompts]
        found = generate(texts, max_new_tokens=num_new, min_new_tokens=num_new, show_progress_bar=False)
        return [*chain.from_iterable(text.completion_logprobs.tolist() for text in found)]

    return Work(f"{num_prompts} prompts behind {shared_words} words: {num_new} new tokens each", run)


def measured(works: Sequence[Work], process: LM, two: CrewLM, one: CrewLM, num_rounds: int = ROUNDS) -> Iterator[Line]:
    """Do each work in turns; all begin with nothing computed.

    Raises:
        AssertionError: the numbers differ.

    """
    contenders: dict[str, LM] = {ONE_PROCESS: process, TWO_WORKERS: two, ONE_WORKER: one}
    for work in works:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        tokens: dict[str, list[int]] = {}
        numbers: dict[str, Numbers] = {}
        for round_idx in range(num_rounds + 1):  # the first warms up
            for name, lm in contenders.items():
                lm.clear()
                before = _tokens_of(lm)
                started = time.perf_counter()
                numbers[name] = work.run(lm)
                spent = time.perf_counter() - started
                tokens[name] = [now - then for now, then in zip(_tokens_of(lm), before, strict=True)]
                if round_idx:
                    seconds[name].append(spent)
        gaps = [
            abs(ours - theirs)
            for name in (TWO_WORKERS, ONE_WORKER)
            for ours, theirs in zip(numbers[name], numbers[ONE_PROCESS], strict=True)
        ]
        assert max(gaps) < TOLERANCE, f"{work.name}: workers are off by {max(gaps)} nats"
        yield Line(
            work=work.name,
            tokens=tokens,
            seconds={name: Spread.of(values) for name, values in seconds.items()},
            ratio=Spread.of_ratios(seconds[ONE_PROCESS], seconds[TWO_WORKERS]),
            gap=max(gaps),
        )


def _tokens_of(lm: LM) -> list[int]:
    """Return the tokens that were computed so far, by each worker where there are some."""
    return [stats.tokens_computed for stats in (lm.worker_stats if isinstance(lm, CrewLM) else [lm.stats])]
