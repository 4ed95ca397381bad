"""Generation against `model.generate` of transformers on a padded batch, and against vLLM where it is at hand.

All find the same greedy tokens, or the run fails. vLLM runs in a process and an environment of its own; while one runs
the others wait.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from backprompt import LM, Text, generate
from benchmarks import workloads
from benchmarks.bench import describe_machine
from benchmarks.measure import Spread, matmul_seconds, seconds_of
from benchmarks.peer import Peer
from benchmarks.workloads import Writer

HOW_TO_INSTALL = """\
vLLM is not measured: it needs an environment of its own. Where there is one, say so:

    python -m benchmarks --only generation --vllm-python ~/vllm/bin/python"""

NUM_PROMPTS = 16
NEW_TOKENS = 32
CONTEXT_WORDS = 170  # about 200 tokens
ROUNDS = 3
NUM_SAMPLES = 64
SAMPLED_WORDS = 680  # about 800 tokens

BACKPROMPT, PACKED = "backprompt", "backprompt, packed weights"
MATRIX_PRODUCTS = "matrix products"
Completions = list[tuple[int, ...]]


def measure(say: Callable[[str], None], vllm_python: Path | None = None) -> tuple[dict[str, Any], dict[str, object]]:
    """Measure all of it; returns results and the machine, both as can be written to JSON."""
    model, tokenizer = workloads.make_model(), workloads.make_tokenizer()
    lms = {BACKPROMPT: LM(model, tokenizer), PACKED: LM(model, tokenizer, pack_weights=True)}
    machine = describe_machine(lms[BACKPROMPT])
    writer = Writer(20)
    context = writer.text(CONTEXT_WORDS)
    questions = [f"\n\n{writer.text(12)}\nAnswer:" for _ in range(NUM_PROMPTS)]
    with ExitStack() as stack:
        vllm = None
        if vllm_python is None:
            say(HOW_TO_INSTALL)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            model.save_pretrained(folder)
            vllm = stack.enter_context(Peer(vllm_python, "vllm_process", folder))
            machine["vLLM"] = vllm.started
        lines = []
        for num_prompts in (NUM_PROMPTS, 1):
            lines.append(_Race(model, lms, vllm, context, questions[:num_prompts]).line())
            say(json.dumps(lines[-1]))
    packed_bytes = lms.pop(PACKED).stats.packed_weight_bytes
    samples = _samples(lms[BACKPROMPT], Text(writer.text(SAMPLED_WORDS), lms[BACKPROMPT]))
    say(json.dumps(samples))
    return {"lines": lines, "packed weights": packed_bytes, "samples": samples}, machine


class _Race:
    """Some prompts, and all who continue them, backprompt and vLLM with an empty cache."""

    def __init__(
        self, model: GPT2LMHeadModel, lms: dict[str, LM], vllm: Peer | None, context: str, questions: list[str]
    ) -> None:
        self._model = model
        self._lms = lms
        self._texts = {
            name: [base + question for question in questions]
            for name, base in ((name, Text(context, lm)) for name, lm in lms.items())
        }
        self._prompts = [text.tokens for text in self._texts[BACKPROMPT]]
        self._vllm = vllm

    def line(self) -> dict[str, Any]:
        """All in turns.

        Raises:
            AssertionError: they generate different tokens.

        """
        seconds: dict[str, list[float]] = {}
        done = {}
        for round_idx in range(ROUNDS + 1):  # the first one warms up
            found: dict[str, Completions] = {}
            spent: dict[str, float] = {}
            for name in (BACKPROMPT, PACKED):
                found[name], spent[name], done[name] = self._ours(name, spent)
            spent["model.generate"] = seconds_of(
                lambda found=found: found.update({"model.generate": self._generated()})  # type: ignore[misc]
            )
            if self._vllm is not None:
                answer = self._vllm.ask({"prompts": self._prompts, "max_new_tokens": NEW_TOKENS})
                found["vLLM"], spent["vLLM"] = [tuple(ids) for ids in answer["completions"]], answer["seconds"]
            for name, completions in found.items():
                assert completions == found[BACKPROMPT], f"{name} generates other tokens"
            if round_idx:
                for name, value in spent.items():
                    seconds.setdefault(name, []).append(value)
        line: dict[str, Any] = {"prompts": len(self._prompts), "new tokens": NEW_TOKENS}
        line["tokens"] = {BACKPROMPT: done[BACKPROMPT], "model.generate": self._num_forwarded()}
        line["seconds"] = {name: vars(Spread.of(values)) for name, values in seconds.items()}
        for name in (BACKPROMPT, PACKED):
            rivals = ["model.generate", _products_of(name), *(["vLLM"] if self._vllm is not None else [])]
            line[f"{name}, times faster"] = {
                rival: vars(Spread.of_ratios(seconds[rival], seconds[name])) for rival in rivals
            }
        return line

    def _ours(self, name: str, spent: dict[str, float]) -> tuple[Completions, float, int]:
        """Continue the texts with one of our LMs; also note the seconds that its matrix products take alone."""
        lm = self._lms[name]
        executor, pass_sizes = lm.session.evaluator.executor, []
        forward = executor.forward
        executor.forward = lambda pass_: pass_sizes.append(pass_.num_tokens) or forward(pass_)  # type: ignore
        lm.clear()
        before, generated = lm.stats, []
        seconds = seconds_of(
            lambda: generated.extend(generate(self._texts[name], max_new_tokens=NEW_TOKENS, show_progress_bar=False))
        )
        del executor.forward
        done = lm.stats - before
        rows_a_step = max(1, done.logit_rows // len(pass_sizes))  # the head runs once a step
        rows = min(rows_a_step, executor.rows_in_a_slice)
        spent[_products_of(name)] = matmul_seconds(lm, pass_sizes, done.logit_rows, rows)
        return [text.completion_tokens for text in generated], seconds, done.tokens_computed

    @torch.no_grad()
    def _generated(self) -> Completions:
        width = max(map(len, self._prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in self._prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self._prompts])
        found = self._model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        return [tuple(row[width:].tolist()) for row in found]

    def _num_forwarded(self) -> int:
        """What a padded batch forwards, padding included."""
        return len(self._prompts) * (max(map(len, self._prompts)) + NEW_TOKENS - 1)


def _products_of(name: str) -> str:
    return f"{MATRIX_PRODUCTS} of {name}"


def _samples(lm: LM, prompt: Text) -> dict[str, Any]:
    """Bytes held after sampling one long prompt many times, against the prompt once and the new tokens."""
    lm.clear()
    texts = generate(prompt, max_new_tokens=NEW_TOKENS, n=NUM_SAMPLES, do_sample=True, seed=1, show_progress_bar=False)
    distinct = {text.tokens[:stop] for text in texts for stop in range(len(prompt.tokens) + 1, len(text.tokens))}
    needed = (len(prompt.tokens) + len(distinct)) * lm.session.evaluator.executor.token_bytes
    return {
        "prompt tokens": len(prompt.tokens),
        "samples": NUM_SAMPLES,
        "new tokens": NEW_TOKENS,
        "held": lm.stats.bytes_held,
        "prompt once and new tokens": needed,
    }
