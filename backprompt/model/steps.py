"""Captured steps: a step of a generation is recorded once as a CUDA graph, and replayed for the steps after it.

A model's body makes hundreds of launches for a step, and each takes the host longer than the GPU. A graph launches all
of them at once. There is a graph for each *bucket*, a number of rows. If a step has fewer rows, the other rows see
nothing. All data that changes from step to step lies in tensors at fixed addresses: ids and positions, the tables of
attention (`StandingAttention`), and the places to which the graph copies the new rows.

A graph is valid as long as Python would take the same way through the model, with the same addresses of weights and the
same meaning of masks. A graph is dropped when it is no longer valid, or when its tables have no room for a step. After
some more steps it is recorded again. A model that cannot be recorded takes all steps without graphs, and the log gives
the reason.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from backprompt.attention.base import CannotStandError, ForestAttention, PreparedAttention, StandingAttention
from backprompt.forest.plan import Pass
from backprompt.memory.blocks import KeysValues
from backprompt.memory.budget import free_bytes
from backprompt.memory.places import Places
from backprompt.model import skeleton
from backprompt.model.in_flight import InFlight
from backprompt.model.quantized import numbers_of
from backprompt.model.recording import CudaRecorder, Output, Recorder, Recording
from backprompt.transfers import copy_to

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""The numbers of rows for which there are graphs."""

STEPS_BEFORE_RECORDING = 3
"""The number of first steps of a bucket without a graph: they take about as long as the recording."""

MAX_BLOCKS = 8
"""The largest number of blocks to which a graph copies rows."""

LARGEST_SHARE = 1 / 16
"""The share that graphs may take of the memory that is free when a model is wrapped."""

CLOSE = 8
"""The largest difference of the first replay from the plain run, in units of the dtype's precision, relative to the
largest number."""


Run: TypeAlias = "Callable[[Tensor, StandingAttention, int], tuple[InFlight, Tensor]]"
"""Runs a model's body: see `Executor.run`."""

Place: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]"
"""Copies rows to their places: see memory/placing.py."""


@dataclass(frozen=True)
class Replayed:
    """A step that a graph has computed.

    Attributes:
        hidden, keys_values: of the step's rows; the next step overwrites them.
        is_finite: whether all numbers are finite, `()`.
        are_placed: whether the rows lie at their places already.
        is_first: whether the graph was recorded for this step.

    """

    hidden: Tensor
    keys_values: KeysValues
    is_finite: Tensor
    are_placed: bool
    is_first: bool


class CapturedSteps:
    """The graphs of a model, by bucket.

    Args:
        attention: the attention of the model, which makes the attention of steps.
        weights: all tensors that the model's body reads.
        record: records graphs.
        place: see `Place`.
        refusal: the reason why there are no graphs; None if there may be graphs.
        max_bytes: the memory that graphs may take. If a graph exceeds it, all graphs are dropped, and steps with as
            many rows or more are no longer recorded.

    Attributes:
        graphs: see above.
        counts: the numbers of steps that were "replayed" or "eager", and of graphs that were "recorded" or "left"
            (dropped).
        refusal: see above; set once a recording has failed.

    """

    def __init__(
        self,
        attention: ForestAttention,
        weights: Sequence[Tensor],
        record: Recorder,
        place: Place,
        refusal: str | None = None,
        max_bytes: float = math.inf,
    ) -> None:
        self._attention = attention
        self._weights = weights
        self._record = record
        self._place = place
        self.graphs: dict[int, Graph] = {}
        self._asked: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()
        self.refusal = refusal
        self._max_bytes = max_bytes
        self._max_rows = BUCKETS[-1]
        self._pool_bytes = 0

    @property
    def num_bytes(self) -> int:
        """The memory of all graphs, which share it; it is freed with the last graph."""
        return self._pool_bytes + sum(graph.num_bytes for graph in self.graphs.values())

    def forget(self) -> bool:
        """Drop all graphs, because memory is short; return whether there were any."""
        had_some = bool(self.graphs)
        self.graphs.clear()
        self._asked.clear()
        self._pool_bytes = 0
        return had_some

    def step(self, run: Run, pass_: Pass, prepared: PreparedAttention, places: Places) -> Replayed | None:
        """Compute a step of one token a span; None if it must be computed without a graph."""
        bucket = next((size for size in BUCKETS if len(pass_.spans) <= size <= self._max_rows), None)
        num_recorded = self.counts["recorded"]
        graph = (
            None if bucket is None or self.refusal is not None else self._ready(bucket, run, pass_, prepared, places)
        )
        if graph is None:
            self.counts["eager"] += 1
            return None
        self.counts["replayed"] += 1
        return graph.replayed(len(pass_.spans), is_first=self.counts["recorded"] > num_recorded)

    def _ready(self, bucket: int, run: Run, pass_: Pass, prepared: PreparedAttention, places: Places) -> Graph | None:
        """Return a graph that is ready to replay the step."""
        addresses = [weight.data_ptr() for weight in self._weights]
        graph = self.graphs.get(bucket)
        if graph is None:
            self._asked[bucket] += 1
            if self._asked[bucket] > STEPS_BEFORE_RECORDING:
                graph = self._recorded(bucket, run, pass_, prepared, places, addresses)
            return graph
        reason = graph.reason_to_leave(pass_, addresses) or graph.load(pass_, prepared, places)
        if reason is None:
            return graph
        logger.debug("The graph of steps of %d rows is dropped: %s.", bucket, reason)
        del self.graphs[bucket], self._asked[bucket]
        if not self.graphs:
            self._pool_bytes = 0
        self.counts["left"] += 1
        return None

    def _recorded(
        self,
        bucket: int,
        run: Run,
        pass_: Pass,
        prepared: PreparedAttention,
        places: Places,
        addresses: Sequence[int],
    ) -> Graph | None:
        """Record a graph for steps like this one."""
        graph: Graph | None = None
        try:
            standing = self._attention.standing(bucket)
            if standing is None:
                raise CannotStandError("the calls of attention differ from step to step")
            graph = Graph(bucket, standing, addresses, self._weights[0].device, self._place)
            graph.load(pass_, prepared, places)
            graph.record(run, self._record, max(pass_.positions))
            graph.load(pass_, prepared, places)
            if not graph.is_plain_run_finite():
                graph = None  # such a run says nothing about graphs; nor does a lack of memory
            else:
                self.refusal = graph.gap_to_plain_run(len(pass_.spans))
        except torch.OutOfMemoryError:
            graph = None
        except (
            Exception
        ) as error:  # the model does something that a graph cannot hold; a step without a graph works or raises
            self.refusal = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if self.refusal is not None:
            logger.info("Steps are not captured: %s.", self.refusal)
            return None
        if graph is None:
            del self._asked[bucket]
            return None
        self.graphs[bucket] = graph
        self._pool_bytes += graph.recording.num_bytes
        self.counts["recorded"] += 1
        if self.num_bytes > self._max_bytes:
            logger.info(
                "Steps of %d rows are not captured: with them graphs would take %d bytes, more than the limit of %d.",
                bucket,
                self.num_bytes,
                self._max_bytes,
            )
            self._max_rows = bucket // 2
            self.forget()
        return graph


class Graph:
    """A graph for the steps of one bucket, and the tensors that it reads.

    Args:
        num_rows: the bucket.
        standing: the attention of the steps.
        addresses: the addresses of the weights.
        device: their device.
        place: see `Place`.

    """

    def __init__(
        self, num_rows: int, standing: StandingAttention, addresses: Sequence[int], device: torch.device, place: Place
    ) -> None:
        self._num_rows = num_rows
        self._standing = standing
        self._place = place
        self._addresses = addresses
        self._numbers = torch.empty(0, dtype=torch.int64, device=device)
        """For each row its id, its position, whether it is beyond the step's own rows, and its target block and row,
        `(5, rows)`; then the addresses of the blocks, see `Places.addresses`."""
        self._sources: Tensor | None = None
        """The addresses of the new rows, see placing.py. The graph reads this tensor and must not outlive it."""
        self._are_placed = False
        self._recorded: Recording | None = None

    def reason_to_leave(self, pass_: Pass, addresses: Sequence[int]) -> str | None:
        """Return why the graph is not valid for a step; None if it is."""
        if addresses != self._addresses:
            return "weights lie elsewhere"
        if not self.recording.output.in_flight.means_the_same_at(max(pass_.positions)):
            return "a mask has another meaning at other positions"
        return None

    def load(self, pass_: Pass, prepared: PreparedAttention, places: Places) -> str | None:
        """Load a step; return why that is not possible, or None.

        The rows beyond those of the step are like its first row.
        """
        num_live, num_rows = len(pass_.spans), self._num_rows
        rows = np.zeros((5, num_rows), dtype=np.int64)
        rows[0, :num_live], rows[1, :num_live] = pass_.token_ids, pass_.positions
        rows[:2, num_live:] = rows[:2, :1]
        rows[2, num_live:] = 1
        rows[3] = -1
        self._are_placed = len(places.blocks) <= MAX_BLOCKS
        if self._are_placed:
            rows[3, :num_live], rows[4, :num_live] = places.block_idx, places.target_rows
        targets = places.addresses()[:MAX_BLOCKS]
        if not len(self._numbers):
            self._numbers = self._numbers.new_zeros(rows.size + MAX_BLOCKS * targets[0].size)
        copy_to(self._numbers, np.concatenate([rows.ravel(), targets.ravel()]))
        return None if self._standing.load(prepared) else "the tables have no room for the step"

    def record(self, run: Run, record: Recorder, max_position: int) -> None:
        """Record the run of the model's body, and the copy of new rows to their places.

        `load` must be called before, and again after. The recording itself copies no row to its place.
        """
        rows = self._numbers[: 5 * self._num_rows].view(5, self._num_rows)
        num_tensors = (len(self._numbers) - rows.numel()) // (2 * MAX_BLOCKS)
        sources = self._sources = rows.new_zeros((num_tensors, 4))
        rows[3] = -1

        def compute() -> Output:
            in_flight, hidden = run(rows[:2], self._standing, max_position)
            is_finite = (hidden.isfinite().all(dim=1) | (rows[2] > 0)).all() & in_flight.copies.are_finite()
            return Output(hidden, KeysValues.of(in_flight.keys, in_flight.values), is_finite.int(), in_flight)

        def finish(output: Output) -> None:
            self._place(output.hidden, output.is_finite, sources, self._numbers[rows.numel() :], rows[3:])

        self._recorded = record(compute, finish)
        output = self.recording.output
        dtypes = {tensor.dtype for tensor in (output.hidden, *output.keys_values.in_order())}
        if len(dtypes) > 1:
            raise CannotStandError(f"rows have several dtypes: {sorted(map(str, dtypes))}")
        copy_to(sources.view(-1), output.sources().ravel())

    @property
    def recording(self) -> Recording:
        """The recorded work."""
        assert self._recorded is not None, "`record` comes first"
        return self._recorded

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors that the graph reads, in addition to the memory of its recording."""
        return self._numbers.nbytes + self._standing.num_bytes

    def is_plain_run_finite(self) -> bool:
        """Return whether the run before the recording was finite."""
        return bool(self._plain.is_finite)

    @property
    def _plain(self) -> Output:
        assert self.recording.plain is not None, "was compared already"
        return self.recording.plain

    def gap_to_plain_run(self, num_live: int) -> str | None:
        """Return in words how far a replay is from the run before the recording, once; None if it is close."""
        self.recording.replay()
        found, expected = (output.hidden[:num_live].float() for output in (self.recording.output, self._plain))
        self._recorded = replace(self.recording, plain=None)  # frees the rows of the plain run
        allowed = CLOSE * torch.finfo(self.recording.output.hidden.dtype).eps * float(expected.abs().max())
        gap = float((found - expected).abs().max())
        return None if gap <= allowed else f"a replay was off by {gap:.1e}"

    def replayed(self, num_live: int, *, is_first: bool) -> Replayed:
        """Compute the step that was loaded."""
        self.recording.replay()
        output = self.recording.output
        if self._are_placed:
            return Replayed(output.hidden[:num_live], output.keys_values, output.is_finite, True, is_first)
        keys_values = output.keys_values.first_rows(num_live)
        are_finite = [tensor.isfinite().all() for tensor in keys_values.in_order()]
        is_finite = torch.stack([output.is_finite > 0, *are_finite]).all()
        return Replayed(output.hidden[:num_live], keys_values, is_finite, False, is_first)


def captured_steps(body: nn.Module, attention: ForestAttention) -> CapturedSteps | None:
    """Return the captured steps of a model's body; None where the device has no graphs, or no kernel for them."""
    weights = [number for held in (*body.parameters(), *body.buffers()) for number in numbers_of(held)]
    device = weights[0].device
    if device.type != "cuda":
        return None
    try:
        place: Place = import_module("backprompt.memory.placing").place
    except ImportError:  # no triton
        return None
    is_rewritten = any(map(skeleton.is_rewritten_in_place, body.modules()))
    refusal = "rotary tables depend on positions" if is_rewritten else None
    max_bytes = free_bytes(device) * LARGEST_SHARE
    return CapturedSteps(attention, weights, CudaRecorder(device), place, refusal, max_bytes)
