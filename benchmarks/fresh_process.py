"""The cost of a prompt for a later process: `python -m benchmarks.fresh_process MODEL STORE NUM_TOKENS NUM_ROUNDS`.

Reads the stored prompt and computes it again without the store, in turns, and prints seconds as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from backprompt import LM, Text, evaluate, load
from benchmarks.measure import seconds_of
from benchmarks.workloads import token_ids


def main() -> None:
    model_folder, store_folder, num_tokens, num_rounds = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    prompt = token_ids(num_tokens)
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    with_store = load(model_folder, store=store_folder)
    note("fingerprint", seconds_of(lambda: with_store.fingerprint))
    without = LM(with_store.model, with_store.tokenizer)
    for lm in (with_store, without):
        evaluate(Text.from_tokens([1, 2, 3], lm))  # the probe, and first calls of everything
    read_logits(without, prompt)
    file = max(store_folder.glob("entries/*/*"), key=lambda path: path.stat().st_size)
    for round_idx in range(num_rounds):
        child = [*prompt, round_idx]
        for is_cold in (True, False):
            for name, ids in (("prompt", prompt), ("child", child)):
                if is_cold:
                    drop_from_page_cache(file)
                before = with_store.stats
                note(f"{name}, {'cold' if is_cold else 'warm'}", read_logits(with_store, ids))
                done = with_store.stats - before
                assert (done.tokens_loaded, done.tokens_computed) == (num_tokens, len(ids) - num_tokens)
        note("prompt, computed", read_logits(without, prompt))
        note("child, computed", read_logits(without, child))
    gap = float((logits(with_store, prompt) - logits(without, prompt)).abs().max())
    print(json.dumps({"seconds": seconds, "gap": gap, "bytes": file.stat().st_size}))


def read_logits(lm: LM, ids: list[int]) -> float:
    """Return the seconds to the next-token logits of a text of which memory holds nothing."""
    lm.clear()
    return seconds_of(lambda: logits(lm, ids))


def logits(lm: LM, ids: list[int]):  # a tensor
    return Text.from_tokens(ids, lm).logits


def drop_from_page_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
