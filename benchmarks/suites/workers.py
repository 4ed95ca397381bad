"""Several workers: two on Ray with a thread each against one process with two threads, and what more would take.

The first table is measured. Both contenders compute the same work, prompts with classes, on the two cores of one
machine, in turns. The second is planned: a forest of a million prompts is cut for more workers than there are, and the
slowest part is divided by the rate of one measured worker. The driver's work a text is measured, too, and comes on top.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from backprompt import LM, classify
from backprompt.engines.layout import Layout
from backprompt.engines.travel import PackedIds
from backprompt.forest.partition import Rates, cut, flattened, forest_order
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, with_range

ROUNDS = 3
MAX_GAP = 1e-4  # of a probability
NUM_PROMPTS, NUM_CLASSES = 24, 8
NUM_PLANNED = 1_000_000
NUM_PLACED = 100_000
"""Texts that are placed and packed, to measure the driver's work."""
NUM_WORKERS = (8, 64, 256)


@dataclass(frozen=True)
class Line:
    """The same work by one contender."""

    contender: str
    tokens: int
    seconds: Spread
    cpu_seconds: Annotated[Spread, Key("cpu seconds")]
    gap: float  # of probabilities, to the first contender's


@dataclass(frozen=True)
class Plan:
    """A million prompts on so many workers."""

    workers: int
    seconds_of_slowest: Annotated[float, Key("seconds of the slowest part")]
    seconds_of_driver: Annotated[float, Key("seconds of the driver")]
    seconds_alone: Annotated[float, Key("seconds alone")]
    tokens_repeated: Annotated[float, Key("tokens repeated")]  # as a share of the distinct ones


@dataclass(frozen=True)
class Rows:
    lines: list[Line]
    plans: list[Plan]


class Workers(Suite):
    name = "workers"
    place = 75
    rows_type = Rows

    def measure(self, say: Say, peer_python: Path | None) -> Measured | None:
        try:
            import ray
        except ImportError:
            say("The suite workers needs Ray: pip install 'backprompt[ray]'.")
            return None
        from backprompt.engines.ray import RayLM

        root = str(Path(__file__).parent.parent.parent)
        ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
        alone = LM(*load())
        with RayLM(load, num_workers=2) as together:
            lines = _compare(alone, together)
            rate = _tokens_a_second(lines[1])
            machine = describe_machine(alone)
        ray.shutdown()
        for line in lines:
            say(json.dumps(as_json(line)))
        plans = _planned(rate)
        for plan in plans:
            say(json.dumps(as_json(plan)))
        return Measured(Rows(lines, plans), machine)

    def tables(self, results: Results) -> list[Table]:
        rows = self.rows(results)
        return [Table("table workers", workers_table(rows.lines)), Table("table planned", planned_table(rows.plans))]


def load() -> tuple[Any, Any]:
    """What both contenders load."""
    return workloads.make_model(), workloads.make_tokenizer()


def _compare(alone: LM, together: Any) -> list[Line]:
    workload = workloads.classes(NUM_PROMPTS, NUM_CLASSES)
    prompts = [prompt.string for prompt in workload.prompts]
    labels = workload.prompts[0].completions
    contenders: dict[str, tuple[LM, Callable[[], float]]] = {
        "one process, two threads": (alone, time.process_time),
        "two workers, a thread each": (
            together,
            lambda: time.process_time() + sum(map(_cpu_seconds_of, together.worker_pids)),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    torch.set_num_threads(2)
    for round_idx in range(ROUNDS + 1):  # the first is not counted
        for name, (lm, cpu) in contenders.items():
            lm.clear()
            before, cpu_before, started = lm.stats.tokens_computed, cpu(), time.perf_counter()
            found[name] = classify.predict_proba(prompts, labels, lm)
            if round_idx:
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(cpu() - cpu_before)
            tokens[name] = lm.stats.tokens_computed - before
    expected = found[next(iter(contenders))]
    lines = [
        Line(
            name,
            tokens[name],
            Spread.of(seconds[name]),
            Spread.of(cpu_seconds[name]),
            float(np.abs(found[name] - expected).max()),
        )
        for name in contenders
    ]
    assert max(line.gap for line in lines) < MAX_GAP, lines
    return lines


def _cpu_seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _tokens_a_second(line: Line) -> float:
    """The rate of one of two workers."""
    return line.tokens / 2 / line.seconds.median


def _planned(rate: float) -> list[Plan]:
    per_text = _driver_seconds_a_text()
    ids, offsets = flattened(list(_forest(NUM_PLANNED)))
    started = time.process_time()
    order, shared = forest_order(ids, offsets)
    ordering = time.process_time() - started
    plans = []
    for num_workers in NUM_WORKERS:
        started = time.process_time()
        found = cut(np.diff(offsets)[order], shared, num_workers, rates=Rates())
        cutting = time.process_time() - started
        plans.append(
            Plan(
                num_workers,
                seconds_of_slowest=float(found.costs.max()) / rate,
                seconds_of_driver=max(per_text * NUM_PLANNED, ordering + cutting),
                seconds_alone=found.num_distinct / rate,
                tokens_repeated=float(found.num_tokens.sum()) / found.num_distinct - 1,
            )
        )
    return plans


def _driver_seconds_a_text() -> float:
    """The driver's work for a text: placing and packing it, and putting its scores in order."""
    texts = [tuple(ids.tolist()) for ids in _forest(NUM_PLACED)]
    layout = Layout(max(NUM_WORKERS))
    started = time.process_time()
    for part in layout.place(texts):
        PackedIds.of([texts[idx] for idx in part.indices.tolist()])
    return (time.process_time() - started) / NUM_PLACED


def _forest(num_texts: int) -> Any:
    """Yield texts: 16 instructions, 64 sets of shots, 4,000 questions, 4 labels."""
    draw = np.random.default_rng(0)

    def ids(num_tokens: int) -> Any:
        return draw.integers(0, 50_000, num_tokens, dtype=np.int32)

    instructions, labels = [ids(60) for _ in range(16)], [ids(length) for length in (1, 2, 3, 3)]
    shots = [ids(int(draw.integers(50, 120))) for _ in range(64)]
    questions = [ids(int(draw.integers(10, 50))) for _ in range(4000)]
    for _ in range(num_texts // len(labels)):
        prompt = [drawn[draw.integers(len(drawn))] for drawn in (instructions, shots, questions)]
        for label in labels:
            yield np.concatenate([*prompt, label])


def workers_table(lines: list[Line]) -> str:
    headings = ["contender", "tokens forwarded", "seconds (lowest to highest)", "CPU seconds", "times as fast"]
    rows = [
        [
            line.contender,
            f"{line.tokens:,}",
            with_range(line.seconds, 1),
            f"{line.cpu_seconds.median:.1f}",
            f"{lines[0].seconds.median / line.seconds.median:.2f}",
        ]
        for line in lines
    ]
    return markdown(headings, rows)


def planned_table(plans: list[Plan]) -> str:
    headings = ["workers", "hours, one worker", "hours, slowest part", "seconds, driver", "times as fast", "repeated"]
    rows = [
        [
            str(plan.workers),
            f"{plan.seconds_alone / 3600:.1f}",
            f"{plan.seconds_of_slowest / 3600:.2f}",
            f"{plan.seconds_of_driver:.0f}",
            f"{plan.seconds_alone / (plan.seconds_of_slowest + plan.seconds_of_driver):.0f}",
            f"{plan.tokens_repeated:.2%}",
        ]
        for plan in plans
    ]
    return markdown(headings, rows)


SUITE = Workers()
