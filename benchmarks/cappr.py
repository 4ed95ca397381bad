"""`backprompt.classify` against CAPPr itself, which runs in a process and an environment of its own.

They take turns: backprompt, CAPPr, backprompt, CAPPr, ..., backprompt; while one runs, the other waits for its input.
So a ratio is one of a run of CAPPr to the mean of the two runs of backprompt beside it. Each run begins with strings
and with nothing computed, and ends with the log-probability of each token of each completion; these must agree.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text, classify
from benchmarks import workloads
from benchmarks.bench import TOLERANCE, describe_machine
from benchmarks.contenders import RIVALS, encode
from benchmarks.measure import Spread, peak_bytes_of, seconds_of
from benchmarks.peer import Peer
from benchmarks.workloads import Prompt, Workload

CAPPR = "CAPPr"
HOW_TO_INSTALL = """\
CAPPr is not measured: it needs an environment of its own, with the versions that it works with. Make one and say where:

    python3 -m venv ~/cappr
    ~/cappr/bin/pip install 'torch==2.13.0' 'transformers==4.49.0' accelerate 'cappr==0.9.6' 'numpy<2'
    python -m benchmarks --only cappr --cappr-python ~/cappr/bin/python"""

ROUNDS = 3
ENOUGH_SECONDS = 30.0
"""When CAPPr has run for so long on a workload, no further round begins."""
NUM_CLASSES = (2, 4, 8, 16, 32, 64)
GENERATING = ("generating 1 token", "generating 4 tokens")

Scores = list[list[list[float]]]


@dataclass(frozen=True)
class Setting:
    """How CAPPr is called."""

    cached: bool  # with its cache of what prompts share
    batch_size: int  # prompts
    batch_size_completions: int | None  # None: all of them


@dataclass(frozen=True)
class Case:
    """A workload, and the settings of CAPPr that are tried on its first prompts."""

    table: str
    workload: Workload
    settings: tuple[Setting, ...]
    num_tried: int
    max_rounds: int = ROUNDS


def settings(cached: Sequence[tuple[int, int | None]], whole: Sequence[tuple[int, int | None]]) -> tuple[Setting, ...]:
    """Batch sizes (prompts, completions) to try with CAPPr's cache of what prompts share, and without it."""
    return (*(Setting(True, *sizes) for sizes in cached), *(Setting(False, *sizes) for sizes in whole))


def cases() -> list[Case]:
    many_classes = settings([(1, None), (1, 16), (2, 16), (4, 16), (1, 32)], [(1, 16), (2, 16)])
    few = settings([(1, None), (4, None), (8, None)], [(8, None)])
    five = [
        Case("five", workloads.two_choices(), settings([], [(b, None) for b in (1, 4, 8, 16, 48)]), num_tried=48),
        Case("five", workloads.classes(2), many_classes, num_tried=2),
        Case("five", workloads.classes(16), many_classes, num_tried=4),
        Case("five", workloads.few_shots(), few, num_tried=8),
        Case("five", workloads.nested(), settings([(1, None), (3, None), (6, None)], [(8, None)]), num_tried=18),
    ]
    curve = [
        Case("curve", workloads.classes(96, num, shared_words=40), curve_settings(num), num_tried=8, max_rounds=1)
        for num in NUM_CLASSES
    ]
    names_settings = settings([(4, None), (8, None), (16, None)], [(8, None)])  # no batches of completions
    names = [
        Case("names", workloads.one_word_classes(96, num, shared_words=40), names_settings, num_tried=16, max_rounds=1)
        for num in NUM_CLASSES
    ]
    return [joined_by_spaces(case) for case in five + curve + names]


def curve_settings(num_classes: int) -> tuple[Setting, ...]:
    """About as many rows in a batch for any number of classes."""
    cached: list[tuple[int, int | None]] = [(max(1, rows // num_classes), None) for rows in (16, 32, 64)]
    if num_classes > 16:
        cached += [(1, 16), (4, 16)]
    return settings(list(dict.fromkeys(cached)), [(max(1, 16 // num_classes), None)])


def joined_by_spaces(case: Case) -> Case:
    """The same with parts that a space joins, as CAPPr does; so the ids of parts apart are those of the whole."""
    prompts = [
        Prompt(
            tuple(part.strip() for part in prompt.parts), tuple(completion.strip() for completion in prompt.completions)
        )
        for prompt in case.workload.prompts
    ]
    return dataclasses.replace(case, workload=Workload(case.workload.name, tuple(prompts)))


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
        self._generate("generating 4 tokens", warm_up)

    def measure(self, case: Case) -> dict[str, Any]:
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
        generated = GENERATING if case.table == "curve" else ()
        while not others or (len(others[CAPPR]) < case.max_rounds and sum(others[CAPPR]) < ENOUGH_SECONDS):
            found = ask_cappr(self._cappr, workload, best)
            gap = max(gap, largest_gap(scores, found["scores"]))
            others.setdefault(CAPPR, []).append(found["seconds"])
            for name in generated:
                others.setdefault(name, []).append(self._generate(name, workload))
            ours.append(self._ours(workload)[0])
        self.lm.clear()
        beside = [(before + after) / 2 for before, after in pairwise(ours)]
        return {
            "table": case.table,
            "workload": workload.name,
            "classes": len(workload.prompts[0].completions),
            "texts": workload.num_texts,
            "tokens in strings": sum(len(p) + len(c) for p, cs in ids for c in cs),
            "distinct tokens": distinct_tokens(ids),
            "computed": done.tokens_computed,
            "seconds": {name: _spread(values) for name, values in {"backprompt": ours, **others}.items()},
            "times faster": {name: _spread_of_ratios(values, beside) for name, values in others.items()},
            "setting": dataclasses.asdict(best),
            "tried": [{**dataclasses.asdict(setting), "seconds": seconds} for setting, seconds in tried.items()],
            "prompts tried": min(case.num_tried, len(workload.prompts)),
            "gap": gap,
        }

    def measure_memory(self, num_words: int = 786, num_classes: int = 77) -> dict[str, Any]:
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
            lines.append({**dataclasses.asdict(setting), "peak": memory["peak_bytes"], "seconds": seconds["seconds"]})
        seconds_ours, _ = self._ours(workload)
        self.lm.clear()
        ((prompt, completions),) = ids
        return {
            "prompt tokens": len(prompt),
            "completion tokens": sum(map(len, completions)),
            "distinct tokens": distinct_tokens(ids),
            "classes": num_classes,
            "held": num_bytes,
            "bytes a token": self.lm.session.evaluator.executor.token_bytes,
            "backprompt": {"peak": peak, "seconds": seconds_ours},
            "CAPPr": lines,
        }

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

    def _generate(self, name: str, workload: Workload) -> float:
        encoded = encode(self._tokenizer, with_spaces(workload))
        return seconds_of(lambda: RIVALS[name](self._model, encoded))

    def _ids(self, prompt: Prompt) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Ids of a prompt and of its completions; those of the parts apart must be those of the whole."""
        (apart,) = encode(self._tokenizer, with_spaces(Workload("", (prompt,))))
        assert apart.ids == compose(self.lm, prompt).tokens, f"joins change tokens: {prompt.parts}"
        return apart.ids, list(apart.completions)


def with_spaces(workload: Workload) -> Workload:
    """The same with the spaces in the strings, for who does not add them: as parts and completions are encoded."""
    prompts = [
        Prompt((p.parts[0], *(f" {part}" for part in p.parts[1:])), tuple(f" {c}" for c in p.completions))
        for p in workload.prompts
    ]
    return Workload(workload.name, tuple(prompts))


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
        AssertionError: it is too large.
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


def _spread(values: list[float]) -> dict[str, Any]:
    return dataclasses.asdict(Spread.of(values))


def _spread_of_ratios(numerators: list[float], denominators: list[float]) -> dict[str, Any]:
    return dataclasses.asdict(Spread.of_ratios(numerators, denominators))


def measure(python: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, object]]:
    """Measure all of it; returns results and the machine, both as can be written to JSON."""
    model, tokenizer = workloads.make_model(), workloads.make_tokenizer()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="backprompt-bench-")))
        save_for_cappr(model, tokenizer, folder)
        cappr = stack.enter_context(Peer(python, "cappr_process", folder))
        duel = Duel(cappr, model, tokenizer)
        lines = []
        for case in cases():
            lines.append(duel.measure(case))
            say(json.dumps(lines[-1]))
        memory = duel.measure_memory()
        say(json.dumps(memory))
        results = {**cappr.started, "lines": lines, "memory": memory}
        return results, describe_machine(duel.lm)
