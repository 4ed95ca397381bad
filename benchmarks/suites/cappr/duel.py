"""`backprompt.classify` against CAPPr itself, which runs in a process and an environment of its own.

They take turns: backprompt, CAPPr, backprompt, CAPPr, ..., backprompt; while one runs, the other waits for its input.
So a ratio is one of a run of CAPPr to the mean of the two runs of backprompt beside it. Each run begins with strings
and with nothing computed, and ends with the log-probability of each token of each completion; these must agree.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text, classify
from benchmarks import workloads
from benchmarks.bench import TOLERANCE
from benchmarks.contenders import BACKPROMPT, GENERATING_1, GENERATING_4, Rival, encode
from benchmarks.measure import Spread, peak_bytes_of, seconds_of
from benchmarks.peer import Peer
from benchmarks.suites.cappr.cases import Case, Setting, joined_by_spaces, settings, with_spaces
from benchmarks.suites.cappr.rows import CAPPR, CapprPeak, Line, Memory, Peak, Tried
from benchmarks.workloads import Prompt, Workload

ENOUGH_SECONDS = 30.0
"""When CAPPr has run for so long on a workload, no further round begins."""

Scores = list[list[list[float]]]


# backprompt


def with_classify(lm: LM, workload: Workload) -> Scores:
    """The log-probabilities of each completion's tokens, prompt by prompt; composing and encoding are on the clock."""
    prompts = [compose(lm, prompt) for prompt in workload.prompts]
    completions = [prompt.completions for prompt in workload.prompts]
    if all(own == completions[0] for own in completions):
        return classify.log_probs(prompts, completions[0], end_of_prompt=" ", show_progress_bar=False)
    examples = [
        classify.Example(prompt, own, end_of_prompt=" ") for prompt, own in zip(prompts, completions, strict=True)
    ]
    return classify.log_probs(examples, show_progress_bar=False)


def compose(lm: LM, prompt: Prompt) -> Text:
    first, *others = prompt.parts
    text = Text(first, lm)
    for part in others:
        text = text + f" {part}"
    return text


# CAPPr


def ask_cappr(process: Peer, workload: Workload, setting: Setting, *, trace_memory: bool = False) -> dict[str, Any]:
    """Let CAPPr score a workload; see cappr_process.py."""
    return process.ask(
        {
            "prompts": [{"parts": prompt.parts, "completions": prompt.completions} for prompt in workload.prompts],
            "setting": dataclasses.asdict(setting),
            "trace_memory": trace_memory,
        }
    )


def save_for_cappr(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    (folder / "special.json").write_text(json.dumps(special), encoding="utf-8")


# Measuring


class Duel:
    """Both, and one model."""

    def __init__(self, cappr: Peer, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self._cappr = cappr
        self._model = model
        self._tokenizer = tokenizer
        self.lm = LM(model, tokenizer)
        warm_up = joined_by_spaces(Case("warm-up", workloads.classes(4, 4), (), 0)).workload
        self._ours(warm_up)
        ask_cappr(self._cappr, warm_up, Setting(True, 2, None))
        self._generate(GENERATING_4, warm_up)

    def measure(self, case: Case) -> Line:
        """Measure one workload.

        Raises:
            AssertionError: the two differ, or would not do the same work.

        """
        workload = case.workload
        ids = [self._ids(prompt) for prompt in workload.prompts]
        tried = self._try_settings(case)
        best = min(case.settings, key=lambda setting: tried[setting])
        before = self.lm.stats
        seconds, scores = self._ours(workload)
        done = self.lm.stats - before
        ours, gap = [seconds], 0.0
        others: dict[str, list[float]] = {}
        generated = (GENERATING_1, GENERATING_4) if case.table == "curve" else ()
        cappr_seconds = others.setdefault(CAPPR.name, [])
        while not cappr_seconds or (len(cappr_seconds) < case.max_rounds and sum(cappr_seconds) < ENOUGH_SECONDS):
            found = ask_cappr(self._cappr, workload, best)
            gap = max(gap, largest_gap(scores, found["scores"]))
            cappr_seconds.append(found["seconds"])
            for rival in generated:
                others.setdefault(rival.name, []).append(self._generate(rival, workload))
            ours.append(self._ours(workload)[0])
        self.lm.clear()
        beside = [(before + after) / 2 for before, after in pairwise(ours)]
        return Line(
            table=case.table,
            workload=workload.name,
            classes=len(workload.prompts[0].completions),
            texts=workload.num_texts,
            tokens_in_strings=sum(len(p) + len(c) for p, cs in ids for c in cs),
            distinct_tokens=distinct_tokens(ids),
            computed=done.tokens_computed,
            seconds={name: Spread.of(values) for name, values in {BACKPROMPT.name: ours, **others}.items()},
            times_faster={name: Spread.of_ratios(values, beside) for name, values in others.items()},
            setting=best,
            tried=[Tried(**vars(setting), seconds=seconds) for setting, seconds in tried.items()],
            prompts_tried=min(case.num_tried, len(workload.prompts)),
            gap=gap,
        )

    def measure_memory(self, num_words: int = 786, num_classes: int = 77) -> Memory:
        """By how much each grows at most with one long prompt and many classes, and what backprompt then holds."""
        writer = workloads.Writer(11)
        labels = tuple(label.strip() for label in writer.labels(num_classes))
        workload = Workload("one long prompt", (Prompt((writer.text(num_words),), labels),))
        ids = [self._ids(prompt) for prompt in workload.prompts]
        self.lm.clear()
        scores: list[Scores] = []
        peak = peak_bytes_of(lambda: scores.append(with_classify(self.lm, workload)))
        if not scores:  # the system does not tell
            scores.append(with_classify(self.lm, workload))
        num_bytes = self.lm.stats.bytes_held
        lines = []
        for setting in settings([], [(1, None), (1, 16), (1, 1)]):
            seconds = ask_cappr(self._cappr, workload, setting)
            assert largest_gap(scores[0], seconds["scores"]) < TOLERANCE
            memory = ask_cappr(self._cappr, workload, setting, trace_memory=True)
            lines.append(CapprPeak(**vars(setting), peak=memory["peak_bytes"], seconds=seconds["seconds"]))
        seconds_ours, _ = self._ours(workload)
        self.lm.clear()
        ((prompt, completions),) = ids
        return Memory(
            prompt_tokens=len(prompt),
            completion_tokens=sum(map(len, completions)),
            distinct_tokens=distinct_tokens(ids),
            classes=num_classes,
            held=num_bytes,
            bytes_a_token=self.lm.session.evaluator.executor.token_bytes,
            backprompt=Peak(peak, seconds_ours),
            cappr=lines,
        )

    def _try_settings(self, case: Case) -> dict[Setting, float]:
        """CAPPr's seconds for the first prompts with each setting; both run them once before, to warm up."""
        few = Workload(case.workload.name, case.workload.prompts[: case.num_tried])
        self._ours(few)
        ask_cappr(self._cappr, few, case.settings[0])
        return {setting: ask_cappr(self._cappr, few, setting)["seconds"] for setting in case.settings}

    def _ours(self, workload: Workload) -> tuple[float, Scores]:
        scores: list[Scores] = []
        self.lm.clear()
        seconds = seconds_of(lambda: scores.append(with_classify(self.lm, workload)))
        return seconds, scores[0]

    def _generate(self, rival: Rival, workload: Workload) -> float:
        encoded = encode(self._tokenizer, with_spaces(workload))
        return seconds_of(lambda: rival.run(self._model, encoded))

    def _ids(self, prompt: Prompt) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Ids of a prompt and of its completions; those of the parts apart must be those of the whole."""
        (apart,) = encode(self._tokenizer, with_spaces(Workload("", (prompt,))))
        assert apart.ids == compose(self.lm, prompt).tokens, f"joins change tokens: {prompt.parts}"
        return apart.ids, list(apart.completions)


def distinct_tokens(ids: Sequence[tuple[tuple[int, ...], Sequence[tuple[int, ...]]]]) -> int:
    """Nodes of the trie of all texts."""
    trie: dict[int, Any] = {}
    num_nodes = 0
    for prompt, completions in ids:
        for text in (prompt + completion for completion in completions):
            node = trie
            for token_id in text:
                num_nodes += token_id not in node
                node = node.setdefault(token_id, {})
    return num_nodes


def largest_gap(ours: Scores, theirs: Scores) -> float:
    """The largest difference in nats.

    Raises:
        AssertionError: the difference is too large.
        ValueError: the numbers of prompts, completions or tokens differ.

    """
    gap = max(
        abs(our_value - their_value)
        for our_rows, their_rows in zip(ours, theirs, strict=True)
        for our_row, their_row in zip(our_rows, their_rows, strict=True)
        for our_value, their_value in zip(our_row, their_row, strict=True)
    )
    assert gap < TOLERANCE, f"CAPPr's numbers are off by {gap} nats"
    return gap
