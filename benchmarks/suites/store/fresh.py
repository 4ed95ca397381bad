"""The stored prompt in processes that start tomorrow: reading it against computing it again."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text, evaluate
from backprompt.store import DiskStore
from benchmarks.fresh_process import drop_from_page_cache
from benchmarks.measure import Spread, seconds_of
from benchmarks.rows import Key
from benchmarks.tables import Table, markdown, milliseconds, with_range
from benchmarks.workloads import token_ids

PROMPT_TOKENS = 1000
ROUNDS = 5


@dataclass(frozen=True)
class Reading:
    """Seconds to read the prompt's entry, all of it and warm."""

    read_and_checked: Annotated[float, Key("read and checked")]
    bytes_only: Annotated[float, Key("bytes only")]


@dataclass(frozen=True)
class FreshProcess:
    """The costs of a stored prompt for other processes, beside the costs for this one."""

    tokens: int
    num_bytes: Annotated[int, Key("bytes")]
    gap: float
    first_fingerprint: Annotated[float, Key("first fingerprint")]
    later_fingerprint: Annotated[float, Key("later fingerprint")]
    seconds: dict[str, Spread]  # by what was timed, such as "child, warm"
    times_faster: Annotated[dict[str, Spread], Key("times faster")]  # reading than computing, by what was read
    entry: Reading

    def tables(self) -> list[Table]:
        return [self._reading_or_computing(), self._whole_file(), self._once_a_process()]

    def _reading_or_computing(self) -> Table:
        headings = ["milliseconds", "computed", "read, warm page cache", "times faster", "read, cold", "times faster"]
        rows = [
            self._row(f"`.logits` of the stored prompt of {self.tokens:,} tokens", "prompt"),
            self._row("of a child, one token longer", "child"),
        ]
        return Table("table fresh", markdown(headings, rows))

    def _row(self, label: str, name: str) -> list[str]:
        cells = [label, self._milliseconds(f"{name}, computed")]
        for reading in (f"{name}, warm", f"{name}, cold"):
            cells += [self._milliseconds(reading), with_range(self.times_faster[reading], 0)]
        return cells

    def _milliseconds(self, name: str) -> str:
        return milliseconds(self.seconds[name].median)

    def _whole_file(self) -> Table:
        readers = [
            ("`store.get`: read and checked", self.entry.read_and_checked),
            ("`Path.read_bytes`", self.entry.bytes_only),
            ("`cat`, warm", self.seconds["cat, warm"].median),
            ("`cat`, cold", self.seconds["cat, cold"].median),
        ]
        headings = [f"the entry's {self.num_bytes / 1e6:.1f} MB", "milliseconds", "MB/s"]
        rows = [[label, milliseconds(value), f"{self.num_bytes / value / 1e6:,.0f}"] for label, value in readers]
        return Table("table reading", markdown(headings, rows))

    def _once_a_process(self) -> Table:
        rows = [
            ["fingerprint of the weights, first process", milliseconds(self.first_fingerprint)],
            ["fingerprint of the weights, other processes", milliseconds(self.later_fingerprint)],
            ["computing the prompt, no store", self._milliseconds("computed")],
            ["computing and storing it", self._milliseconds("computed and stored")],
        ]
        return Table("table once", markdown(["once a process, milliseconds", ""], rows))


def measure_fresh_process(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> FreshProcess:
    """Fill the store in this process, then read it in others; `cat` of the same file beside it."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    store_folder = folder / "fresh.bp"
    ids = token_ids(PROMPT_TOKENS)
    filling, plain = LM(model, tokenizer, store=store_folder), LM(model, tokenizer)
    filling.fingerprint  # noqa: B018  # hashes the weights, which is measured apart
    seconds: dict[str, list[float]] = {"computed": [], "computed and stored": []}
    for lm in (filling, plain):
        evaluate(Text.from_tokens([1, 2, 3], lm))
    plain_seconds, store_seconds = seconds["computed"], seconds["computed and stored"]
    for round_idx in range(ROUNDS):
        fresh = [round_idx + 1, *ids[1:]] if round_idx else ids
        plain_seconds.append(seconds_of(lambda fresh=fresh: evaluate(Text.from_tokens(fresh, plain))))
        store_seconds.append(seconds_of(lambda fresh=fresh: evaluate(Text.from_tokens(fresh, filling))))
    command = [sys.executable, "-m", "benchmarks.fresh_process", folder / "model", store_folder, len(ids)]
    processes = [json.loads(subprocess.check_output([*map(str, command), str(2)])) for _ in range(ROUNDS)]
    for process in processes:
        for name, values in process["seconds"].items():
            seconds.setdefault(name, []).append(statistics.median(values))
    file = max(store_folder.glob("entries/*/*"), key=lambda path: path.stat().st_size)
    cat = ["cat", str(file)]
    for _ in range(ROUNDS):
        drop_from_page_cache(file)
        for name in ("cat, cold", "cat, warm"):
            run = lambda: subprocess.run(cat, stdout=subprocess.DEVNULL, check=True)  # noqa: E731
            seconds.setdefault(name, []).append(seconds_of(run))
    ratios = {
        f"{name}, {state}": Spread.of_ratios(seconds[f"{name}, computed"], seconds[f"{name}, {state}"])
        for name in ("prompt", "child")
        for state in ("warm", "cold")
    }
    return FreshProcess(
        tokens=len(ids),
        num_bytes=processes[0]["bytes"],
        gap=max(process["gap"] for process in processes),
        first_fingerprint=processes[0]["seconds"]["fingerprint"][0],
        later_fingerprint=statistics.median(p["seconds"]["fingerprint"][0] for p in processes[1:]),
        seconds={name: Spread.of(values) for name, values in seconds.items()},
        times_faster=ratios,
        entry=_read_entry(file, store_folder),
    )


def _read_entry(file: Path, store_folder: Path) -> Reading:
    """Seconds to read and check the whole entry, beside those of reading its bytes only, warm."""
    with DiskStore(store_folder) as store:
        checked = min(seconds_of(lambda: store.get(file.stem)) for _ in range(ROUNDS))
    return Reading(checked, bytes_only=min(seconds_of(file.read_bytes) for _ in range(ROUNDS)))
