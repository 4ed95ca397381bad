"""The host: seconds beside the model, for a model so small that it hardly counts, on one thread.

Seconds are the processor's, which other processes on the machine do not stretch. Each workload begins with
nothing computed and is held against a yardstick of the same run: a plain dictionary trie of
the same token ids, built in Python. The model's own part stays in the seconds: one layer, hidden size 32. A second
figure is without it (`ModelClock`).
"""

from __future__ import annotations

import functools
import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text, classify, evaluate, generate
from backprompt.attention.calls import CallsAttention
from backprompt.logprobs import rated
from backprompt.model.executor import Executor
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.measure import cpu_seconds_of
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, milliseconds
from benchmarks.workloads import Writer, token_ids

ROUNDS = 5
STEPS = 24
"""Steps of generation that are timed; those before, in which buffers and rules are made, are not."""
WARM_UP_STEPS = 4
NUM_IDS = 3000
"""Ids below this number are drawn; the tokenizer has some more."""


@dataclass(frozen=True)
class Line:
    """One workload.

    `per` says of what a figure is: "all", "text" or "step". `of_trie`: the same by the yardstick's seconds; None where
    no trie is built, as for a step of generation. `beside_model`: the seconds of the same run outside the model.
    """

    workload: str
    per: str
    seconds: float
    of_trie: float | None
    tokens_computed: int
    beside_model: float | None = None


@dataclass(frozen=True)
class Case:
    """A workload: `prepare` makes what is not timed, and returns the work and the ids for the yardstick."""

    name: str
    prepare: Callable[[Rig], tuple[Callable[[], object], Sequence[Sequence[int]]]]
    per: str = "all"
    num_parts: int = 1
    rounds: int = ROUNDS


class Timed(NamedTuple):
    """The seconds of some work, and those of them outside the model."""

    seconds: float
    beside_model: float


class Rig:
    """A tiny model, the tokenizer of all benchmarks, and a clock that must run while work is timed."""

    def __init__(self) -> None:
        self.clock = ModelClock()
        self.tokenizer: PreTrainedTokenizerFast = workloads.make_tokenizer()
        torch.manual_seed(workloads.SEED)
        size: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 1024}
        config = GPT2Config(vocab_size=len(self.tokenizer), bos_token_id=0, eos_token_id=0, **size)
        self.model = GPT2LMHeadModel(config).eval()
        self.lm = self.make_lm()

    def timed(self, work: Callable[[], object]) -> Timed:
        """Do some work and return its seconds."""
        before = self.clock.seconds
        seconds = cpu_seconds_of(work)
        return Timed(seconds, seconds - (self.clock.seconds - before))

    def make_lm(self, **options: Any) -> LM:
        return LM(self.model, self.tokenizer, max_tokens_per_forward=8192, **options)

    def token_bytes(self) -> int:
        """Bytes that an `LM` holds of one token."""
        lm = self.make_lm()
        lm.evaluate([Text.from_tokens(range(1, 11), lm)])
        return lm.stats.bytes_held // 10

    def ids(self, strings: Iterable[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(strings))["input_ids"]
        return found


class ModelClock:
    """Counts the seconds inside the model while the context lasts.

    These are the seconds of the modules of body and head, of the attention's kernel calls, and of the log-softmax and
    the argmax of the logits. The rest of attention counts as beside the model: the plan of the calls, their masks, the
    joins of their results.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0  # of modules
        self._is_inside = False
        self._since = 0.0
        self._undo = ExitStack()

    def __enter__(self) -> ModelClock:
        hooks = (
            register_module_forward_pre_hook(lambda module, given: self._nest(1)),
            register_module_forward_hook(lambda module, given, output: self._nest(-1), always_call=True),
        )
        for hook in hooks:
            self._undo.callback(hook.remove)
        attend, kernel_for = Executor.attend, CallsAttention.kernel_for
        self._undo.enter_context(mock.patch("backprompt.evaluation.rating.rated", self._timed(rated, is_inside=True)))
        self._undo.enter_context(mock.patch.object(Executor, "attend", self._timed(attend, is_inside=False)))
        self._undo.enter_context(
            mock.patch.object(
                CallsAttention, "kernel_for", lambda *given: self._timed(kernel_for(*given), is_inside=True)
            )
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _nest(self, by: int) -> None:
        if {self._depth, self._depth + by} == {0, 1}:
            self._go(is_inside=by > 0)
        self._depth += by

    def _timed(self, function: Callable[..., Any], *, is_inside: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*given: Any, **keywords: Any) -> Any:
            before = self._go(is_inside=is_inside)
            try:
                return function(*given, **keywords)
            finally:
                self._go(is_inside=before)

        return timed

    def _go(self, *, is_inside: bool) -> bool:
        """Go inside or out; return where the clock was."""
        now = time.process_time()
        if self._is_inside:
            self.seconds += now - self._since
        before, self._is_inside, self._since = self._is_inside, is_inside, now
        return before


def trie_of(texts: Iterable[Sequence[int]]) -> dict[int, Any]:
    """The yardstick: one dictionary a token."""
    root: dict[int, Any] = {}
    for ids in texts:
        node = root
        for token_id in ids:
            node = node.setdefault(token_id, {})
    return root


def _drawn(num_tokens: int, seed: object) -> list[int]:
    return token_ids(num_tokens, seed, vocabulary=NUM_IDS)


def _classes(num_prompts: int, num_classes: int) -> tuple[list[str], list[str]]:
    workload = workloads.classes(num_prompts, num_classes, shared_words=25)
    completions = [label.removeprefix(" ") for label in workload.prompts[0].completions]
    return [prompt.string for prompt in workload.prompts], completions


def _few(num_prompts: int, num_completions: int) -> tuple[list[str], list[str]]:
    """Prompts of about 20 tokens that share nothing."""
    writer = Writer(num_prompts)
    prompts = [f"{idx} {writer.text(10)}" for idx in range(num_prompts)]
    return prompts, [label.removeprefix(" ") for label in writer.labels(num_completions)]


def _strings(rig: Rig, prompts: list[str], completions: list[str]) -> list[list[int]]:
    return rig.ids(f"{prompt} {completion}" for prompt in prompts for completion in completions)


def _predict_proba(make: Callable[[], tuple[list[str], list[str]]]) -> Any:
    def prepare(rig: Rig) -> tuple[Callable[[], object], list[list[int]]]:
        prompts, completions = make()
        return lambda: classify.predict_proba(prompts, completions, rig.lm), _strings(rig, prompts, completions)

    return prepare


def _ids(make: Callable[[], tuple[list[str], list[str]]]) -> Any:
    def prepare(rig: Rig) -> tuple[Callable[[], object], list[list[int]]]:
        prompts, completions = make()
        own, behind = rig.ids(prompts), rig.ids(f" {completion}" for completion in completions)

        def work() -> None:
            parts = [Text.from_tokens(ids, rig.lm) for ids in behind]
            texts, starts = [], []
            for ids in own:
                prompt = Text.from_tokens(ids, rig.lm)
                texts += [prompt + part for part in parts]
                starts += [len(ids)] * len(parts)
            rig.lm.token_logprobs(texts, starts)

        return work, [ids + completion for ids in own for completion in behind]

    return prepare


def _evaluate_and_score(make: Callable[[], tuple[list[str], list[str]]]) -> Any:
    def prepare(rig: Rig) -> tuple[Callable[[], object], list[list[int]]]:
        prompts, completions = make()

        def work() -> None:
            texts = [
                whole + f" {completion}"
                for prompt in prompts
                for whole in [Text(prompt, rig.lm)]
                for completion in completions
            ]
            evaluate(texts)
            rig.lm.token_logprobs(texts)

        return work, _strings(rig, prompts, completions)

    return prepare


def _many(num_texts: int, *, are_shared: bool = True) -> Any:
    """Texts of ids behind shared parts: 10 instructions, 25 questions each, and as many endings of 2 tokens.

    The endings are those of all questions or, unless `are_shared`, each question's own.
    """

    def prepare(rig: Rig) -> tuple[Callable[[], object], list[list[int]]]:
        draw = random.Random(num_texts)
        shared = [_drawn(30, idx) for idx in range(10)]
        middles = [_drawn(12, (idx, "middle")) for idx in range(250)]
        num_sets = 1 if are_shared else len(middles)
        endings = [
            [[draw.randrange(1, NUM_IDS) for _ in range(2)] for _ in range(num_texts // 250)] for _ in range(num_sets)
        ]

        def work() -> None:
            parts = [[Text.from_tokens(ids, rig.lm) for ids in own] for own in endings]
            texts = []
            for idx, middle in enumerate(middles):
                prompt = Text.from_tokens(shared[idx % 10], rig.lm) + Text.from_tokens(middle, rig.lm)
                texts += [prompt + part for part in parts[idx % num_sets]]
            rig.lm.token_logprobs(texts)

        return work, [
            shared[i % 10] + middle + end for i, middle in enumerate(middles) for end in endings[i % num_sets]
        ]

    return prepare


def _evicting(num_texts: int, num_tokens: int) -> Any:
    def prepare(rig: Rig) -> tuple[Callable[[], object], list[list[int]]]:
        texts = [_drawn(8, idx) for idx in range(num_texts)]
        bound = rig.token_bytes() * num_tokens

        def work() -> None:
            lm = rig.make_lm(memory_bytes=bound)
            lm.evaluate([Text.from_tokens(ids, lm) for ids in texts])

        return work, texts

    return prepare


def _generating(**options: Any) -> Any:
    def prepare(rig: Rig) -> tuple[Callable[[], object], list[list[int]]]:
        prompts = [prompt.string for prompt in workloads.classes(64, 2, shared_words=25).prompts]

        def work() -> Timed:
            runs = []
            for num_steps in (WARM_UP_STEPS, WARM_UP_STEPS + STEPS):
                rig.lm.clear()
                texts = [Text(prompt, rig.lm) for prompt in prompts]
                runs.append(
                    rig.timed(
                        lambda texts=texts, n=num_steps: generate(
                            texts, max_new_tokens=n, min_new_tokens=n, show_progress_bar=False, **options
                        )
                    )
                )
            return Timed(*(long - short for short, long in zip(*runs, strict=True)))

        return work, []

    return prepare


CASES = (
    Case("64 prompts x 77 shared completions, `predict_proba`, strings", _predict_proba(lambda: _classes(64, 77))),
    Case("the same as texts of ids, `token_logprobs`", _ids(lambda: _classes(64, 77))),
    Case("the same as strings, `evaluate` and `token_logprobs`", _evaluate_and_score(lambda: _classes(64, 77))),
    Case("128 x 4, prompts of 20 tokens, ids, `token_logprobs`", _ids(lambda: _few(128, 4))),
    Case("128 x 4, `predict_proba`", _predict_proba(lambda: _few(128, 4))),
    Case("512 x 2, ids, `token_logprobs`", _ids(lambda: _few(512, 2))),
    Case("512 x 2, `predict_proba`", _predict_proba(lambda: _few(512, 2))),
    Case("5,000 texts of ids, `token_logprobs`", _many(5_000), "text", 5_000),
    Case("50,000 texts of ids, `token_logprobs`", _many(50_000), "text", 50_000, rounds=2),
    Case("5,000 texts of ids with their own ends", _many(5_000, are_shared=False), "text", 5_000),
    Case("50,000 texts of ids with their own ends", _many(50_000, are_shared=False), "text", 50_000, rounds=2),
    Case("2,600 texts through a budget of 2,000 tokens", _evicting(2_600, 2_000)),
    Case("26,000 texts through a budget of 20,000 tokens", _evicting(26_000, 20_000), rounds=2),
    Case("generation, 64 texts, greedy", _generating(), "step", STEPS),
    Case(
        "generation, 64 texts, temperature, top-k and top-p",
        _generating(do_sample=True, temperature=0.8, top_k=50, top_p=0.9, seed=1),
        "step",
        STEPS,
    ),
)


class Host(Suite):
    name = "host"
    place = 65
    rows_type = list[Line]

    def measure(self, say: Say, peer_python: object) -> Measured:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            rig = Rig()
            lines = []
            with rig.clock:
                for line in _measured(rig):
                    lines.append(line)
                    say(table_of([line]))
            return Measured(lines, describe_machine(rig.lm))
        finally:
            torch.set_num_threads(num_threads)

    def tables(self, results: Results) -> list[Table]:
        return [Table("table host", table_of(self.rows(results)))]


def _measured(rig: Rig) -> Iterator[Line]:
    for case in CASES:
        work, ids = case.prepare(rig)
        ours: list[Timed] = []
        tries: list[float] = []
        num_computed = 0
        for _ in range(case.rounds + 1):  # the first warms up
            rig.lm.clear()
            gc.collect()
            before = rig.lm.stats.tokens_computed
            found: list[object] = []
            timed = rig.timed(lambda work=work, found=found: found.append(work()))
            ours.append(found[0] if isinstance(found[0], Timed) else timed)
            num_computed = rig.lm.stats.tokens_computed - before
            tries.append(cpu_seconds_of(lambda ids=ids: trie_of(ids)))
        best = min(ours[1:])  # by all seconds
        yield Line(
            workload=case.name,
            per=case.per,
            seconds=best.seconds / case.num_parts,
            of_trie=best.seconds / min(tries[1:]) if ids else None,
            tokens_computed=num_computed,
            beside_model=best.beside_model / case.num_parts,
        )


def table_of(lines: list[Line]) -> str:
    headings = ["workload", "milliseconds", "of a dictionary trie"]
    rows = [
        [line.workload, _figure(line, line.seconds), "" if line.of_trie is None else f"{line.of_trie:.1f}"]
        for line in lines
    ]
    if any(line.beside_model is not None for line in lines):
        headings.insert(2, "beside the model")
        for row, line in zip(rows, lines, strict=True):
            row.insert(2, "" if line.beside_model is None else _figure(line, line.beside_model))
    return markdown(headings, rows)


def _figure(line: Line, seconds: float) -> str:
    return f"{milliseconds(seconds)}{'' if line.per == 'all' else f' a {line.per}'}"


SUITE = Host()
