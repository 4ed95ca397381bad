"""Generation against `model.generate` of transformers on a padded batch: the same greedy tokens, seconds and bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from backprompt import LM, Text, generate
from benchmarks import workloads
from benchmarks.bench import describe_machine
from benchmarks.measure import Spread, matmul_seconds, seconds_of
from benchmarks.workloads import Writer

NUM_PROMPTS = 16
NEW_TOKENS = 32
CONTEXT_WORDS = 170  # about 200 tokens
ROUNDS = 3
NUM_SAMPLES = 64
SAMPLED_WORDS = 680  # about 800 tokens


def measure(say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, object]]:
    """Measure all of it; returns results and the machine, both as can be written to JSON."""
    model, lm = workloads.make_model(), None
    lm = LM(model, workloads.make_tokenizer())
    writer = Writer(20)
    context = Text(writer.text(CONTEXT_WORDS), lm)
    texts = [context + f"\n\n{writer.text(12)}\nAnswer:" for _ in range(NUM_PROMPTS)]
    lines = []
    for chosen in (texts, texts[:1]):
        lines.append(_line(model, lm, chosen))
        say(json.dumps(lines[-1]))
    results = {"lines": lines, "samples": _samples(lm, Text(writer.text(SAMPLED_WORDS), lm))}
    say(json.dumps(results["samples"]))
    return results, describe_machine(lm)


def _line(model: GPT2LMHeadModel, lm: LM, texts: list[Text]) -> dict[str, Any]:
    """Both in turns, backprompt with an empty cache.

    Raises:
        AssertionError: they generate different tokens.

    """
    seconds: dict[str, list[float]] = {"backprompt": [], "model.generate": [], "matrix products": []}
    found: dict[str, list[tuple[int, ...]]] = {}

    def ours() -> None:
        generated = generate(texts, max_new_tokens=NEW_TOKENS, show_progress_bar=False)
        found["backprompt"] = [text.completion_tokens for text in generated]

    def theirs() -> None:
        found["model.generate"] = _generated(model, [text.tokens for text in texts])

    line: dict[str, Any] = {"prompts": len(texts), "new tokens": NEW_TOKENS}
    executor, pass_sizes = lm._evaluator.executor, []
    forward = executor.forward
    executor.forward = lambda pass_: pass_sizes.append(pass_.num_tokens) or forward(pass_)  # type: ignore
    for work in (ours, theirs):
        work()  # warm
    for _ in range(ROUNDS):
        lm.clear()
        pass_sizes.clear()
        before = lm.stats
        seconds["backprompt"].append(seconds_of(ours))
        done = lm.stats - before
        seconds["model.generate"].append(seconds_of(theirs))
        seconds["matrix products"].append(_matmul_seconds(model, lm, pass_sizes, done.logit_rows))
        assert found["backprompt"] == found["model.generate"]
    del executor.forward
    line["tokens"] = {"backprompt": done.tokens_computed, "model.generate": _num_forwarded(texts)}
    line["seconds"] = {name: vars(Spread.of(values)) for name, values in seconds.items()}
    for name in ("model.generate", "matrix products"):
        line[f"times {name}"] = vars(Spread.of_ratios(seconds[name], seconds["backprompt"]))
    return line


def _matmul_seconds(model: GPT2LMHeadModel, lm: LM, pass_sizes: list[int], num_rows: int) -> float:
    """The matrix products alone: the head's run once a step, so in as many slices."""
    rows_a_step = max(1, num_rows // len(pass_sizes))
    return matmul_seconds(model, pass_sizes, num_rows, min(rows_a_step, lm._evaluator.executor.rows_in_a_slice))


def _num_forwarded(texts: list[Text]) -> int:
    """What a padded batch forwards, padding included."""
    return len(texts) * (max(len(text.tokens) for text in texts) + NEW_TOKENS - 1)


@torch.no_grad()
def _generated(model: GPT2LMHeadModel, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return [tuple(row[width:].tolist()) for row in found]


def _samples(lm: LM, prompt: Text) -> dict[str, Any]:
    """Bytes held after sampling one long prompt many times, against the prompt once and the new tokens."""
    lm.clear()
    texts = generate(prompt, max_new_tokens=NEW_TOKENS, n=NUM_SAMPLES, do_sample=True, seed=1, show_progress_bar=False)
    distinct = {text.tokens[:stop] for text in texts for stop in range(len(prompt.tokens) + 1, len(text.tokens))}
    needed = (len(prompt.tokens) + len(distinct)) * lm._evaluator.executor.token_bytes
    return {
        "prompt tokens": len(prompt.tokens),
        "samples": NUM_SAMPLES,
        "new tokens": NEW_TOKENS,
        "held": lm.stats.bytes_held,
        "prompt once and new tokens": needed,
    }
