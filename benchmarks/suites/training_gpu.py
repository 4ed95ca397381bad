"""A step of training on a GPU, by each way of attention, and by the plain padded batch: which way comes first?

`python -m benchmarks --only training_gpu` takes some minutes on one GPU. Its table decides the order of
`backprompt.training.attention.ORDER`. Forward and backward of groups that share a prompt, random weights from a seed;
every clock is read after a synchronisation. FlexAttention's first step compiles, so it is timed on its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated
from unittest.mock import patch

import torch

from backprompt.training import attention
from backprompt.training.attention import TrieAttention, Way
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.suites.gpu import WHY_NOT, is_there
from benchmarks.suites.gpu.counting import launches_of, peak_bytes_of
from benchmarks.suites.gpu.rigs import GPT2, LLAMA_1B, Rig
from benchmarks.suites.training import gradients, scoring
from benchmarks.suites.training.batches import Batch, Done, group
from benchmarks.tables import Table, markdown, megabytes

PLAIN = "plain padded"
ORDERS: dict[str, tuple[Way, ...]] = {"flex": ("flex",), "fast calls": ("fast",), "clear calls": ()}
NUM_ROWS = (8, 16)
ROUNDS = 5


@dataclass(frozen=True)
class Line:
    """A step on one batch, by each way.

    Attributes:
        kernels: what each way came to, and why not the way asked for.
        gaps: the largest difference from the plain batch, of log-probabilities and of gradients' norms over the
            largest norm; in half precision the plain batch itself is off by some hundredths.

    """

    model: str
    batch: str
    tokens_padded: Annotated[int, Key("tokens padded")]
    tokens_forwarded: Annotated[int, Key("tokens forwarded")]
    kernels: dict[str, str]
    first_seconds: Annotated[dict[str, float], Key("first seconds")]
    seconds: dict[str, Spread]
    peak_bytes: Annotated[dict[str, int | None], Key("peak bytes")]
    launches: dict[str, int | None]
    gaps: dict[str, float]


class TrainingOnGpu(Suite):
    name = "training_gpu"
    place = 106
    rows_type = list[Line]

    def measure(self, say: Say, peer_python: object) -> Measured | None:
        if not is_there():
            say(f"The suite {self.name} is left out: {WHY_NOT.split(' With')[0]}")
            return None
        lines = []
        for shape in (LLAMA_1B, GPT2):
            rig = Rig(shape, torch.device("cuda"), 1.0)
            for num_rows in NUM_ROWS:
                lines.append(line_of(rig, f"group of {num_rows}", group(num_rows, shape.vocabulary)))
                say(json.dumps(as_json(lines[-1])))
            machine = describe_machine(rig.lm) | {"GPU": torch.cuda.get_device_name()}
        return Measured(lines, machine)

    def tables(self, results: Results) -> list[Table]:
        return [Table("table training_gpu", table_of(self.rows(results)))]


def line_of(rig: Rig, name: str, batch: Batch) -> Line:
    """Measure one batch: a first step of each way, then its peak and its launches, then rounds in turns."""
    on_device = (tensor.to(rig.device) for tensor in (batch.input_ids, batch.attention_mask))
    batch = Batch(*on_device, batch.num_kept)
    done: dict[str, Done] = {}
    kernels: dict[str, str] = {}
    first: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    launches: dict[str, int | None] = {}
    seconds: dict[str, list[float]] = {way: [] for way in (PLAIN, *ORDERS)}

    def run(way: str) -> None:
        if way == PLAIN:
            done[way] = gradients.by_rows(scoring.selected_logprobs, rig.model, batch)
            return
        with attending(rig.device, ORDERS[way]) as names:
            done[way] = gradients.by_backprompt(rig.model, batch)
        kernels[way] = ", ".join(sorted(names))

    for way in seconds:
        first[way] = rig.seconds_of(partial(run, way))
        peaks[way] = peak_bytes_of(rig, partial(run, way))
        launches[way] = launches_of(rig, partial(run, way))
    for _ in range(ROUNDS):
        for way, found in seconds.items():
            found.append(rig.seconds_of(partial(run, way)))
    return Line(
        model=rig.shape.name,
        batch=name,
        tokens_padded=batch.num_padded,
        tokens_forwarded=done["flex"].tokens_forwarded,
        kernels=kernels,
        first_seconds=first,
        seconds={way: Spread.of(values) for way, values in seconds.items()},
        peak_bytes=peaks,
        launches=launches,
        gaps={way: float((done[way].numbers - done[PLAIN].numbers).abs().max()) for way in ORDERS},
    )


@contextmanager
def attending(device: torch.device, order: tuple[Way, ...]) -> Iterator[set[str]]:
    """Let these ways come first on a device; gives the names of the ways that served."""
    names: set[str] = set()
    plain: Callable[..., torch.Tensor] = TrieAttention.attend

    def noted(self: TrieAttention, *arguments: object) -> torch.Tensor:
        attended = plain(self, *arguments)
        names.add(self.name)
        return attended

    with patch.dict(attention.ORDER, {device.type: order}), patch.object(TrieAttention, "attend", noted):
        yield names


def table_of(lines: list[Line]) -> str:
    ways = (*ORDERS, PLAIN)
    headings = ["model", "batch", "tokens padded", "forwarded"]
    headings += [f"s, {way}" for way in ways] + ["s, flex's first step", "flex came to"]
    headings += [f"peak MB, {way}" for way in ways] + [f"launches, {way}" for way in ways]
    rows = [
        [line.model, line.batch, f"{line.tokens_padded:,}", f"{line.tokens_forwarded:,}"]
        + [f"{line.seconds[way].median:.4f}" for way in ways]
        + [f"{line.first_seconds['flex']:.1f}", line.kernels["flex"]]
        + [megabytes(line.peak_bytes[way]) for way in ways]
        + ["" if line.launches[way] is None else f"{line.launches[way]:,}" for way in ways]
        for line in lines
    ]
    return markdown(headings, rows)


SUITE = TrainingOnGpu()
