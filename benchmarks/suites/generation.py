"""Generation against `model.generate` of transformers on a padded batch, and against vLLM where it is at hand.

All find the same greedy tokens, or the run fails. vLLM runs in a process and an environment of its own; while one runs
the others wait.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from transformers import GPT2LMHeadModel

from backprompt import LM, Text, generate
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread, matmul_seconds, noted_passes, seconds_of
from benchmarks.peer import VLLM, Peer
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, with_range
from benchmarks.workloads import Writer

NO_VLLM = """\
vLLM is not measured: it needs an environment of its own. Where there is one, say so:

    python -m benchmarks --only generation --vllm-python ~/vllm/bin/python"""

NUM_PROMPTS = 16
NEW_TOKENS = 32
CONTEXT_WORDS = 170  # about 200 tokens
ROUNDS = 3
NUM_SAMPLES = 64
SAMPLED_WORDS = 680  # about 800 tokens

BACKPROMPT, PACKED = "backprompt", "backprompt, packed weights"
TRANSFORMERS = "model.generate"
MATRIX_PRODUCTS = "matrix products"
Completions = list[tuple[int, ...]]


@dataclass(frozen=True)
class Line:
    """Some prompts, and all who continue them."""

    prompts: int
    new_tokens: Annotated[int, Key("new tokens")]
    tokens: dict[str, int]  # forwarded, by who does it
    seconds: dict[str, Spread]  # by who does it
    times_faster: Annotated[dict[str, Spread], Key(f"{BACKPROMPT}, times faster")]  # than others
    times_faster_packed: Annotated[dict[str, Spread], Key(f"{PACKED}, times faster")]


@dataclass(frozen=True)
class Samples:
    """Bytes held after sampling one long prompt many times."""

    prompt_tokens: Annotated[int, Key("prompt tokens")]
    samples: int
    new_tokens: Annotated[int, Key("new tokens")]
    held: int
    needed: Annotated[int, Key("prompt once and new tokens")]


@dataclass(frozen=True)
class Rows:
    lines: list[Line]
    packed_bytes: Annotated[int, Key("packed weights")]
    samples: Samples


class Generation(Suite):
    name = "generation"
    place = 90
    rows_type = Rows
    peer = VLLM

    def measure(self, say: Say, peer_python: Path | None) -> Measured:
        model, tokenizer = workloads.make_model(), workloads.make_tokenizer()
        lms = {BACKPROMPT: LM(model, tokenizer), PACKED: LM(model, tokenizer, pack_weights=True)}
        machine = describe_machine(lms[BACKPROMPT])
        writer = Writer(20)
        context = writer.text(CONTEXT_WORDS)
        questions = [f"\n\n{writer.text(12)}\nAnswer:" for _ in range(NUM_PROMPTS)]
        with ExitStack() as stack:
            vllm = None
            if peer_python is None:
                say(NO_VLLM)
            else:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                model.save_pretrained(folder)
                vllm = stack.enter_context(Peer(peer_python, "vllm_process", folder))
                machine[VLLM.name] = vllm.started
            lines = []
            for num_prompts in (NUM_PROMPTS, 1):
                lines.append(_Race(model, lms, vllm, context, questions[:num_prompts]).line())
                say(json.dumps(as_json(lines[-1])))
        packed_bytes = lms.pop(PACKED).stats.packed_weight_bytes
        samples = _samples(lms[BACKPROMPT], Text(writer.text(SAMPLED_WORDS), lms[BACKPROMPT]))
        say(json.dumps(as_json(samples)))
        return Measured(Rows(lines, packed_bytes, samples), machine)

    def tables(self, results: Results) -> list[Table]:
        rows = self.rows(results)
        return [Table("table generation", f"{generation_table(rows.lines)}\n\n{_held(rows)}")]


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

    def line(self) -> Line:
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
            spent[TRANSFORMERS] = seconds_of(
                lambda found=found: found.update({TRANSFORMERS: self._generated()})  # type: ignore[misc]
            )
            if self._vllm is not None:
                answer = self._vllm.ask({"prompts": self._prompts, "max_new_tokens": NEW_TOKENS})
                found[VLLM.name], spent[VLLM.name] = [tuple(ids) for ids in answer["completions"]], answer["seconds"]
            for name, completions in found.items():
                assert completions == found[BACKPROMPT], f"{name} generates other tokens"
            if round_idx:
                for name, value in spent.items():
                    seconds.setdefault(name, []).append(value)
        return Line(
            prompts=len(self._prompts),
            new_tokens=NEW_TOKENS,
            tokens={BACKPROMPT: done[BACKPROMPT], TRANSFORMERS: self._num_forwarded()},
            seconds={name: Spread.of(values) for name, values in seconds.items()},
            times_faster=self._times_faster(BACKPROMPT, seconds),
            times_faster_packed=self._times_faster(PACKED, seconds),
        )

    def _times_faster(self, name: str, seconds: dict[str, list[float]]) -> dict[str, Spread]:
        """One of our LMs against all others, its own matrix products among them."""
        rivals = [TRANSFORMERS, _products_of(name), *([VLLM.name] if self._vllm is not None else [])]
        return {rival: Spread.of_ratios(seconds[rival], seconds[name]) for rival in rivals}

    def _ours(self, name: str, spent: dict[str, float]) -> tuple[Completions, float, int]:
        """Continue the texts with one of our LMs; also note the seconds that its matrix products take alone."""
        lm = self._lms[name]
        lm.clear()
        before, generated = lm.stats, []
        with noted_passes(lm) as pass_sizes:
            seconds = seconds_of(
                lambda: generated.extend(
                    generate(self._texts[name], max_new_tokens=NEW_TOKENS, show_progress_bar=False)
                )
            )
        done = lm.stats - before
        rows_a_step = max(1, done.logit_rows // len(pass_sizes))  # the head runs once a step
        rows = min(rows_a_step, lm.session.evaluator.executor.rows_in_a_slice)
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
        """The number of tokens that a padded batch forwards, padding included."""
        return len(self._prompts) * (max(map(len, self._prompts)) + NEW_TOKENS - 1)


def _products_of(name: str) -> str:
    return f"{MATRIX_PRODUCTS} of {name}"


def _samples(lm: LM, prompt: Text) -> Samples:
    """Bytes held after sampling one long prompt many times, against the prompt once and the new tokens."""
    lm.clear()
    texts = generate(prompt, max_new_tokens=NEW_TOKENS, n=NUM_SAMPLES, do_sample=True, seed=1, show_progress_bar=False)
    distinct = {text.tokens[:stop] for text in texts for stop in range(len(prompt.tokens) + 1, len(text.tokens))}
    needed = (len(prompt.tokens) + len(distinct)) * lm.session.evaluator.executor.token_bytes
    return Samples(
        prompt_tokens=len(prompt.tokens),
        samples=NUM_SAMPLES,
        new_tokens=NEW_TOKENS,
        held=lm.stats.bytes_held,
        needed=needed,
    )


def generation_table(lines: list[Line]) -> str:
    """Ours and the others', some lines for each number of prompts."""
    rivals = [name for name in (TRANSFORMERS, VLLM.name) if name in lines[0].seconds]
    headings = [
        "32 new tokens each, behind 200 tokens",
        "tokens",
        "seconds",
        *(f"times faster than {_code(rival)}" for rival in rivals),
        "of the matmul limit",
    ]
    return markdown(headings, [row for line in lines for row in _table_rows(line, rivals)])


def _table_rows(line: Line, rivals: list[str]) -> list[list[str]]:
    prompts = f"{line.prompts} prompt{'s' if line.prompts > 1 else ''}"
    rows = [
        [
            f"{prompts}, {name}",
            f"{line.tokens[BACKPROMPT]:,}",
            with_range(line.seconds[name]),
            *(with_range(faster[rival], 1) for rival in rivals),
            with_range(faster[_products_of(name)]),
        ]
        for name, faster in ((BACKPROMPT, line.times_faster), (PACKED, line.times_faster_packed))
    ]
    for rival in rivals:
        tokens = f"{line.tokens[rival]:,}" if rival in line.tokens else ""
        rows.append([f"{prompts}, {_code(rival)}", tokens, with_range(line.seconds[rival]), *("" for _ in rivals), ""])
    return rows


def _held(rows: Rows) -> str:
    samples = rows.samples
    return (
        f"The packed copy of the weights takes {rows.packed_bytes / 1e6:,.0f} MB. "
        f"{samples.samples} samples of one prompt of {samples.prompt_tokens} tokens, {samples.new_tokens} "
        f"tokens each, are held in {samples.held / 1e6:,.1f} MB; the prompt once and the new tokens take "
        f"{samples.needed / 1e6:,.1f} MB."
    )


def _code(name: str) -> str:
    return f"`{name}`" if "." in name else name


SUITE = Generation()
