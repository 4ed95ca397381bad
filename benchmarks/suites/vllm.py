"""The same calls on the same forests with an `LM` and with a `VllmLM`, and with vLLM as its documentation says.

All find the same log-probabilities, or the run fails. vLLM runs in a process and an environment of its own; while one
runs the others wait. All run on one thread, and seconds are those of the processor.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from backprompt import LM, classify
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread, cpu_seconds_of
from benchmarks.peer import VLLM, Peer
from benchmarks.rows import as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, with_range
from benchmarks.workloads import Workload

HOW_TO_INSTALL = """\
VllmLM is not measured: vLLM needs an environment of its own. Make one and say where:

    make vllm
    python -m benchmarks --only vllm --vllm-python .venv-vllm/bin/python"""

ROUNDS = 3
MAX_WHOLE_TOKENS = 5_000
"""Of larger workloads vLLM does not compute all texts as a whole: that takes minutes."""
MAX_GAP = 1e-3  # nats

BACKPROMPT, THROUGH_VLLM, WHOLE = "LM", "VllmLM", "vLLM, whole texts"


@dataclass(frozen=True)
class Line:
    """A workload, and all who score it."""

    workload: str
    tokens: int  # in all strings
    computed: dict[str, int]  # tokens forwarded, by who does it
    seconds: dict[str, Spread]  # by who does it
    ratio: Spread  # seconds of a VllmLM by those of an LM, round by round
    gap: float  # the largest, of VllmLM's log-probabilities, nats


class Vllm(Suite):
    name = "vllm"
    place = 92
    rows_type = list[Line]
    peer = VLLM

    def measure(self, say: Say, peer_python: Path | None) -> Measured | None:
        if peer_python is None:
            say(HOW_TO_INSTALL)
            return None
        model, tokenizer = workloads.make_model(), workloads.make_tokenizer()
        lm = LM(model, tokenizer)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, num_threads)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            vllm = stack.enter_context(Peer(peer_python, "vllm_lm_process", folder))
            lines = []
            for workload in (
                workloads.two_choices(),
                workloads.classes(2),
                workloads.few_shots(),
                workloads.nested(),
            ):
                lines.append(_line(workload, lm, vllm))
                say(json.dumps(as_json(lines[-1])))
            return Measured(lines, {**describe_machine(lm), VLLM.name: vllm.started})

    def tables(self, results: Results) -> list[Table]:
        headings = [
            "workload",
            "tokens in all strings",
            "who",
            "computed",
            "seconds",
            "of an LM's",
            "largest gap, nats",
        ]
        return [
            Table("table vllm", markdown(headings, [row for line in self.rows(results) for row in _table_rows(line)]))
        ]


def _line(workload: Workload, lm: LM, vllm: Peer) -> Line:
    """All in turns, each with nothing computed.

    Raises:
        AssertionError: they find different log-probabilities.

    """
    prompts = [(prompt.string, list(prompt.completions)) for prompt in workload.prompts]
    examples = [classify.Example(*prompt, end_of_prompt="") for prompt in prompts]
    seconds: dict[str, list[float]] = {BACKPROMPT: [], THROUGH_VLLM: []}
    computed: dict[str, int] = {}
    scores: dict[str, list[list[list[float]]]] = {}

    def ask(name: str) -> float:
        answer = vllm.ask({"prompts": prompts, "is_whole": name == WHOLE})
        scores[name], computed[name] = answer["scores"], answer["computed"]
        spent: float = answer["seconds"]
        return spent

    for round_idx in range(ROUNDS + 1):  # the first one warms up
        lm.clear()
        before, found = lm.stats, []
        spent = {BACKPROMPT: cpu_seconds_of(lambda: found.extend(classify.log_probs(examples, lm=lm)))}  # noqa: B023
        scores[BACKPROMPT] = found
        done = lm.stats - before
        computed[BACKPROMPT] = done.tokens_computed
        spent[THROUGH_VLLM] = ask(THROUGH_VLLM)
        if round_idx:
            for name, value in spent.items():
                seconds[name].append(value)
    if done.tokens_requested <= MAX_WHOLE_TOKENS:
        seconds[WHOLE] = [ask(WHOLE)]
        computed[WHOLE] = done.tokens_requested
    gaps = {name: _gap(found, scores[BACKPROMPT]) for name, found in scores.items()}
    assert max(gaps.values()) < MAX_GAP, f"log-probabilities of {workload.name} differ: {gaps}"
    return Line(
        workload=workload.name,
        tokens=done.tokens_requested,
        computed=computed,
        seconds={name: Spread.of(values) for name, values in seconds.items()},
        ratio=Spread.of_ratios(seconds[THROUGH_VLLM], seconds[BACKPROMPT]),
        gap=gaps[THROUGH_VLLM],
    )


def _gap(scores: list[list[list[float]]], others: list[list[list[float]]]) -> float:
    return max(
        abs(own - other)
        for rows, other_rows in zip(scores, others, strict=True)
        for row, other_row in zip(rows, other_rows, strict=True)
        for own, other in zip(row, other_row, strict=True)
    )


def _table_rows(line: Line) -> list[list[str]]:
    return [
        [
            line.workload if name == BACKPROMPT else "",
            f"{line.tokens:,}" if name == BACKPROMPT else "",
            f"`{name}`" if name in (BACKPROMPT, THROUGH_VLLM) else name,
            f"{line.computed[name]:,}",
            with_range(seconds),
            with_range(line.ratio, 1) if name == THROUGH_VLLM else "",
            f"{line.gap:.1e}" if name == THROUGH_VLLM else "",
        ]
        for name, seconds in line.seconds.items()
    ]


SUITE = Vllm()
