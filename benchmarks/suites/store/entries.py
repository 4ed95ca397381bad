"""Entries of the store: short and long ones, in reduced precision, and many of them."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text, evaluate
from backprompt.store import DiskStore, Entry, Header
from benchmarks.measure import Spread, resident_bytes, seconds_of
from benchmarks.rows import Key
from benchmarks.tables import Table, markdown, milliseconds
from benchmarks.workloads import token_ids

PROMPT_TOKENS = 1000
NUM_ENTRIES = 10_000
RUN_LENGTHS = (1, 4, 16, 64, 256)
ROUNDS = 5


@dataclass(frozen=True)
class Run:
    """Seconds that a run of so many tokens takes."""

    tokens: int
    computing: float
    writing: float
    reading: float

    @staticmethod
    def table(runs: list[Run]) -> Table:
        headings = ["tokens in a run", "computing, in company, ms", "writing, ms", "reading, ms"]
        rows = [
            [str(run.tokens), *(milliseconds(seconds) for seconds in (run.computing, run.writing, run.reading))]
            for run in runs
        ]
        return Table("table runs", markdown(headings, rows))


@dataclass(frozen=True)
class Precision:
    """The savings of storing in a dtype, and the effect on a child's next-token distribution."""

    dtype: str
    bytes_a_token: Annotated[float, Key("bytes a token")]
    relative_error: Annotated[float, Key("relative error")]
    largest_change_nats: Annotated[float, Key("largest change, nats")]
    divergence_nats: Annotated[float, Key("divergence, nats")]

    @staticmethod
    def table(precisions: list[Precision]) -> Table:
        headings = ["stored as", "bytes a token", "relative error", "largest change, nats", "divergence, nats"]
        rows = [
            [
                one.dtype,
                f"{one.bytes_a_token:,.0f}",
                *(f"{value:.2g}" for value in (one.relative_error, one.largest_change_nats, one.divergence_nats)),
            ]
            for one in precisions
        ]
        return Table("table precision", markdown(headings, rows))


@dataclass(frozen=True)
class ManyEntries:
    """Seconds for a store of many entries, and the bytes by which the process grows with it."""

    entries: int
    writing_one: Annotated[float, Key("writing one")]
    opening: Spread
    looking_up: Annotated[Spread, Key("looking up")]
    reading_one: Annotated[Spread, Key("reading one")]
    opening_without_its_index: Annotated[float, Key("opening without its index")]
    memory_grown: Annotated[int, Key("memory grown")]

    def table(self) -> Table:
        headings = [f"{self.entries:,} entries, milliseconds", "median", "lowest", "highest"]
        rows = [
            [label, *(milliseconds(seconds) for seconds in (spread.median, spread.lowest, spread.highest))]
            for label, spread in (
                ("opening", self.opening),
                ("looking up", self.looking_up),
                ("reading one", self.reading_one),
            )
        ]
        rows += [
            ["opening without its index", milliseconds(self.opening_without_its_index), "", ""],
            ["writing one", milliseconds(self.writing_one), "", ""],
            ["memory grown, MB", f"{self.memory_grown / 1e6:.1f}", "", ""],
        ]
        return Table("table many", markdown(headings, rows))


def measure_runs(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[Run]:
    """The times of computing a run of tokens in company, writing it and reading it, by the run's length."""
    store = DiskStore(folder / "runs.bp", persist="explicit")
    lm = LM(model, tokenizer, store=store)
    lm.fingerprint  # noqa: B018
    lines = []
    for num_tokens in RUN_LENGTHS:
        texts = [
            Text.from_tokens(token_ids(num_tokens, seed=(num_tokens, idx)), lm) for idx in range(512 // num_tokens)
        ]
        computing = seconds_of(lambda texts=texts: evaluate(texts)) / len(texts)
        writing = statistics.median(seconds_of(text.save) for text in texts[:ROUNDS])
        lm.clear()
        reading = statistics.median(seconds_of(lambda t=text: t.pin().release()) for text in texts[:ROUNDS])
        lines.append(Run(num_tokens, computing, writing, reading))
    return lines


def measure_precision(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[Precision]:
    """By the dtype stored: bytes, the measured error, and what it does to a child's next-token distribution."""
    prompt, question = token_ids(PROMPT_TOKENS - 24), token_ids(24, seed=1)
    exact = Text.from_tokens([*prompt, *question], LM(model, tokenizer)).logits.double().log_softmax(-1)
    lines = []
    for dtype in (None, "float16", "int8"):
        store_folder = folder / f"{dtype}.bp"
        Text.from_tokens(prompt, LM(model, tokenizer, store=DiskStore(store_folder, dtype=dtype))).logits  # noqa: B018
        store = DiskStore(store_folder, dtype=dtype)
        child = (
            Text.from_tokens([*prompt, *question], LM(model, tokenizer, store=store)).logits.double().log_softmax(-1)
        )
        stats = store.stats()
        lines.append(
            Precision(
                dtype=dtype or "as computed (float32)",
                bytes_a_token=stats.num_bytes / stats.num_tokens,
                relative_error=stats.largest_error,
                largest_change_nats=float((child - exact).abs().max()),
                divergence_nats=float((exact.exp() * (exact - child)).sum()),
            )
        )
    return lines


def measure_many(folder: Path) -> ManyEntries:
    """Opening, looking up and memory with many entries, which are small ones so that the disk does not fill."""
    store = DiskStore(folder / "many.bp")
    draw = token_ids(NUM_ENTRIES * 16, vocabulary=50_000)
    headers = [
        Header(
            start=f"{idx // 10:064x}",
            end=f"{NUM_ENTRIES + idx:064x}",
            position=0,
            token_ids=tuple(draw[16 * idx : 16 * idx + 16]),
            text=f"text {idx}",
            model="model",
            tokenizer="tokenizer",
            dtype="torch.float16",
        )
        for idx in range(NUM_ENTRIES)
    ]
    tensors = {  # 512 bytes
        "keys.0": torch.zeros(1, 16, 4, dtype=torch.float16),
        "values.0": torch.zeros(1, 16, 4, dtype=torch.float16),
        "hidden": torch.zeros(16, 5, dtype=torch.float16),
        "logprobs": torch.zeros(16),
        "is_argmax": torch.zeros(16, dtype=torch.bool),
        "has_logprobs": torch.ones(16, dtype=torch.bool),
    }
    writing = seconds_of(lambda: [store.put(Entry(header, tensors)) for header in headers])
    store.close()
    opening = [seconds_of(lambda: DiskStore(folder / "many.bp").close()) for _ in range(ROUNDS)]
    before = resident_bytes()
    with DiskStore(folder / "many.bp") as store:
        looked_up = headers[:: NUM_ENTRIES // 1000]
        finding = [seconds_of(lambda h=h: store.longest(h.start, h.token_ids)) for h in looked_up]
        reading = [seconds_of(lambda h=h: store.get(h.name)) for h in looked_up]
        grown = resident_bytes() - before
        (folder / "many.bp" / "index.sqlite").unlink()
    return ManyEntries(
        entries=NUM_ENTRIES,
        writing_one=writing / NUM_ENTRIES,
        opening=Spread.of(opening),
        looking_up=_without_values(Spread.of(finding)),
        reading_one=_without_values(Spread.of(reading)),
        opening_without_its_index=seconds_of(lambda: DiskStore(folder / "many.bp").close()),
        memory_grown=grown,
    )


def _without_values(spread: Spread) -> Spread:
    return dataclasses.replace(spread, values=[])
