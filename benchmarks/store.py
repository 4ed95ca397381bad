"""The memory budget and the database: what is read, written, looked up and dropped, and what each costs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text, evaluate
from backprompt.store import DiskStore, Entry, Header
from benchmarks import workloads
from benchmarks.bench import describe_machine
from benchmarks.fresh_process import drop_from_page_cache
from benchmarks.measure import Spread, resident_bytes, seconds_of
from benchmarks.workloads import token_ids

PROMPT_TOKENS = 1000
NUM_ENTRIES = 10_000
RUN_LENGTHS = (1, 4, 16, 64, 256)
ROUNDS = 5


def measure(say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, object]]:
    """Measure all of it; returns results and the machine, both as can be written to JSON."""
    model, tokenizer = workloads.make_model(), workloads.make_tokenizer()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="backprompt-bench-") as folder:
        for name, part in {
            "fresh process": lambda: _fresh_process(model, tokenizer, Path(folder)),
            "runs": lambda: _runs(model, tokenizer, Path(folder)),
            "precision": lambda: _precision(model, tokenizer, Path(folder)),
            "many entries": lambda: _many_entries(Path(folder)),
            "budget": lambda: _budget(model, tokenizer, Path(folder)),
        }.items():
            results[name] = part()
            say(f"{name}: {json.dumps(results[name])}")
    lm = LM(model, tokenizer)
    evaluate(Text("which kernel serves", lm))
    return results, describe_machine(lm)


def _fresh_process(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
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
    return {
        "tokens": len(ids),
        "bytes": processes[0]["bytes"],
        "gap": max(process["gap"] for process in processes),
        "first fingerprint": processes[0]["seconds"]["fingerprint"][0],
        "later fingerprint": statistics.median(p["seconds"]["fingerprint"][0] for p in processes[1:]),
        "seconds": {name: dataclasses.asdict(Spread.of(values)) for name, values in seconds.items()},
        "times faster": {name: dataclasses.asdict(spread) for name, spread in ratios.items()},
        "entry": _read_entry(file, store_folder),
    }


def _read_entry(file: Path, store_folder: Path) -> dict[str, float]:
    """Seconds to read and check the whole entry, beside those of reading its bytes only, warm."""
    with DiskStore(store_folder) as store:
        checked = min(seconds_of(lambda: store.get(file.stem)) for _ in range(ROUNDS))
    return {"read and checked": checked, "bytes only": min(seconds_of(file.read_bytes) for _ in range(ROUNDS))}


def _runs(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[dict[str, float]]:
    """By the length of a run of tokens: what computing it in company, writing it and reading it take."""
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
        lines.append({"tokens": num_tokens, "computing": computing, "writing": writing, "reading": reading})
    return lines


def _precision(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[dict[str, Any]]:
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
            {
                "dtype": dtype or "as computed (float32)",
                "bytes a token": stats.num_bytes / stats.num_tokens,
                "relative error": stats.largest_error,
                "largest change, nats": float((child - exact).abs().max()),
                "divergence, nats": float((exact.exp() * (exact - child)).sum()),
            }
        )
    return lines


def _many_entries(folder: Path) -> dict[str, Any]:
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
            dtype="torch.float32",
        )
        for idx in range(NUM_ENTRIES)
    ]
    writing = seconds_of(lambda: [store.put(Entry(header, {"hidden": torch.zeros(16, 8)})) for header in headers])
    store.close()
    opening = [seconds_of(lambda: DiskStore(folder / "many.bp").close()) for _ in range(ROUNDS)]
    before = resident_bytes()
    with DiskStore(folder / "many.bp") as store:
        looked_up = headers[:: NUM_ENTRIES // 1000]
        finding = [seconds_of(lambda h=h: store.longest(h.start, h.token_ids)) for h in looked_up]
        reading = [seconds_of(lambda h=h: store.get(h.name)) for h in looked_up]
        grown = resident_bytes() - before
        (folder / "many.bp" / "index.sqlite").unlink()
    return {
        "entries": NUM_ENTRIES,
        "writing one": writing / NUM_ENTRIES,
        "opening": dataclasses.asdict(Spread.of(opening)),
        "looking up": dataclasses.asdict(_without_values(Spread.of(finding))),
        "reading one": dataclasses.asdict(_without_values(Spread.of(reading))),
        "opening without its index": seconds_of(lambda: DiskStore(folder / "many.bp").close()),
        "memory grown": grown,
    }


def _budget(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    """A forest ten times larger than the budget, scored: without a budget, within it, and with tiers below."""
    forest = workloads.classes(24)
    strings = [prompt.string + completion for prompt in forest.prompts for completion in prompt.completions]
    unlimited = LM(model, tokenizer)
    _score(unlimited, strings)
    num_bytes = unlimited.stats.bytes_held
    makers: dict[str, Callable[[], LM]] = {
        "no budget": lambda: LM(model, tokenizer),
        "a tenth": lambda: LM(model, tokenizer, memory_bytes=num_bytes // 10),
        "a tenth, the rest in a second pool": lambda: LM(
            model, tokenizer, memory_bytes=num_bytes // 10, host_memory_bytes=num_bytes
        ),
        "a tenth, the rest in a store": lambda: LM(
            model, tokenizer, memory_bytes=num_bytes // 10, store=folder / "budget.bp"
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    lines: dict[str, dict[str, Any]] = {}
    for _ in range(3):
        for name, make in makers.items():
            shutil.rmtree(folder / "budget.bp", ignore_errors=True)
            lm = make()
            evaluate(Text("warm-up", lm))
            lm.fingerprint  # noqa: B018
            peak = _watch_peak(lm)
            before = lm.stats
            seconds[name].append(seconds_of(lambda lm=lm: _score(lm, strings)))
            done = lm.stats - before
            again = seconds_of(lambda lm=lm: _score(lm, strings[::-1]))
            lines[name] = {
                "computed": done.tokens_computed,
                "recomputed": done.tokens_recomputed,
                "held": lm.stats.bytes_held,
                "peak": max(peak),
                "again": again,
                "computed again": (lm.stats - before - done).tokens_computed,
            }
    for name, line in lines.items():
        line["seconds"] = dataclasses.asdict(Spread.of(seconds[name]))
        line["times as long"] = dataclasses.asdict(Spread.of_ratios(seconds[name], seconds["no budget"]))
    return {"bytes": num_bytes, "lines": lines}


def _watch_peak(lm: LM) -> list[int]:
    """Return a list that grows by the bytes that are held right after each pass."""
    held: list[int] = [0]
    forward = lm.session.evaluator._forward

    def forward_and_note(spans: Any) -> None:
        forward(spans)
        held.append(lm.session.evaluator.memory.num_bytes)

    lm.session.evaluator._forward = forward_and_note  # type: ignore[method-assign]
    return held


def _score(lm: LM, strings: list[str]) -> None:
    lm.token_logprobs([Text(string, lm) for string in strings])


def _without_values(spread: Spread) -> Spread:
    return dataclasses.replace(spread, values=[])
