"""Captured steps: a step of a generation is recorded once as a CUDA graph, and replayed for the steps after it.

A model makes hundreds of launches for a step, and each takes the host longer than the GPU. A graph launches all of them
at once: the body, the head, the most probable token behind each row, and a look at the weights. There is a graph for
each *bucket*, a number of rows. If a step has fewer rows, the other rows see nothing. All data that changes from step
to step lies in tensors at fixed addresses: ids and positions, the tables of attention (`StandingAttention`), and the
places to which the graph copies the new rows.

Where each text takes its most probable token, the graph leaves these tokens as the ids of the step after it. Sampled
tokens lie on the device, too. So the next step can be launched *ahead*, before the host has read the tokens, and the
device need not wait for the host. If the next step turns out to be another one, the results are dropped: their rows lie
behind all rows that are held.

A graph is valid as long as Python would take the same way through the model, with the same addresses of weights and the
same meaning of masks. A graph is dropped when it is no longer valid, or when its tables have no room for a step. After
some more steps it is recorded again. A model that cannot be recorded takes all steps without graphs, and the log gives
the reason.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor, nn

from backprompt.attention.base import CannotStandError, ForestAttention, PreparedAttention
from backprompt.memory.budget import free_bytes
from backprompt.model import skeleton
from backprompt.model.graphs import Graph, Launched, Look, Place, Runs, Step
from backprompt.model.quantized import numbers_of
from backprompt.model.recording import CudaRecorder, Recorder

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""The numbers of rows for which there are graphs."""

STEPS_BEFORE_RECORDING = 3
"""The number of first steps of a bucket without a graph: they take about as long as the recording."""

LARGEST_SHARE = 1 / 16
"""The share that graphs may take of the memory that is free when a model is wrapped."""


class CapturedSteps:
    """The graphs of a model, by bucket.

    Args:
        attention: the attention of the model, which makes the attention of steps.
        weights: all tensors that the model reads.
        record: records graphs.
        place: see `Place`.
        refusal: the reason why there are no graphs; None if there may be graphs.
        max_bytes: the memory that graphs may take. If a graph exceeds it, all graphs are dropped, and steps with as
            many rows or more are no longer recorded.

    Attributes:
        graphs: see above.
        counts: the numbers of steps that were "replayed" or "eager", of launches "ahead" of the tokens, of replayed
            steps that were "taken" from those, and of graphs that were "recorded" or "left" (dropped).
        refusal: see above; set once a recording has failed.
        look: becomes part of each graph.

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
        self.look: Look = lambda: None
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
        for graph in self.graphs.values():
            graph.release()
        self.graphs.clear()
        self._asked.clear()
        self._pool_bytes = 0
        return had_some

    def launch(self, model: Runs, step: Step, prepared: PreparedAttention) -> Launched | None:
        """Compute a step, without waiting for its results; None if it must be computed without a graph.

        No graph is recorded for a step without places.
        """
        bucket = self._bucket_of(step)
        num_recorded = self.counts["recorded"]
        graph: Graph | None = None
        if bucket is not None and self.refusal is None:
            graph = (
                self._ready(bucket, model, step, prepared) if step.places else self._suitable(bucket, step, prepared)
            )
        if graph is None:
            self.counts["eager"] += 1
            return None
        self.counts["replayed"] += 1
        return graph.launch(step, is_first=self.counts["recorded"] > num_recorded)

    def launch_behind(
        self, launched: Launched, prepared: PreparedAttention, token_ids: Tensor | None
    ) -> Launched | None:
        """Compute the step behind another one before the host knows its tokens.

        Args:
            launched: the step before.
            prepared: the attention of the step before.
            token_ids: the tokens on the device, `(rows,)`; None for the most probable ones.

        Returns:
            The step. None if it must wait for the tokens.

        """
        if not (launched.is_latest and launched.step.are_placed) or (token_ids is None and not launched.tells_tokens):
            return None
        step = launched.next_step(token_ids)
        graph = self.graphs.get(self._bucket_of(step) or 0)
        if graph is None or graph.reason_to_leave(step, self._addresses()) is not None:
            return None
        if graph.load(step, prepared, is_next=True) is not None:
            return None
        self.counts["ahead"] += 1
        return graph.launch(step)

    def take(self, launched: Launched, token_ids: Sequence[int]) -> bool:
        """Return whether the results of a step that was launched ahead are those of a step with these tokens."""
        is_taken = launched.is_latest and launched.lies_right and launched.token_ids == list(token_ids)
        self.counts.update({"taken": is_taken, "replayed": is_taken})
        return is_taken

    def _bucket_of(self, step: Step) -> int | None:
        return next((size for size in BUCKETS if len(step.positions) <= size <= self._max_rows), None)

    def _addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights]

    def _suitable(self, bucket: int, step: Step, prepared: PreparedAttention) -> Graph | None:
        """Return a graph that is ready to compute a step without places, if there is one; no graph changes."""
        graph = self.graphs.get(bucket)
        if graph is None or graph.reason_to_leave(step, self._addresses()) or graph.load(step, prepared):
            return None
        return graph

    def _ready(self, bucket: int, model: Runs, step: Step, prepared: PreparedAttention) -> Graph | None:
        """Return a graph that is ready to compute the step."""
        addresses = self._addresses()
        graph = self.graphs.get(bucket)
        if graph is None:
            self._asked[bucket] += 1
            if self._asked[bucket] > STEPS_BEFORE_RECORDING:
                graph = self._recorded(bucket, model, step, prepared, addresses)
            return graph
        reason = graph.reason_to_leave(step, addresses) or graph.load(step, prepared)
        if reason is None:
            return graph
        logger.debug("The graph of steps of %d rows is dropped: %s.", bucket, reason)
        del self.graphs[bucket], self._asked[bucket]
        if not self.graphs:
            self._pool_bytes = 0
        self.counts["left"] += 1
        return None

    def _recorded(
        self, bucket: int, model: Runs, step: Step, prepared: PreparedAttention, addresses: Sequence[int]
    ) -> Graph | None:
        """Record a graph for steps like this one, and load the step."""
        graph: Graph | None = None
        try:
            standing = self._attention.standing(bucket)
            if standing is None:
                raise CannotStandError("the calls of attention differ from step to step")
            graph = Graph(bucket, standing, addresses, self._weights[0].device, self._place)
            graph.load(step, prepared)
            graph.record(model, self.look, self._record, max(step.positions))
            graph.load(step, prepared)
            if not graph.is_plain_run_finite(len(step.positions)):
                graph = None  # such a run says nothing about graphs; nor does a lack of memory
            else:
                self.refusal = graph.gap_to_plain_run(len(step.positions))
                graph.load(step, prepared)  # the replay has left its own tokens
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
            return None
        return graph


def captured_steps(body: nn.Module, head: nn.Module, attention: ForestAttention) -> CapturedSteps | None:
    """Return the captured steps of a model; None where the device has no graphs, or no kernel for them."""
    weights = tensors_of(body, head)
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


def tensors_of(body: nn.Module, head: nn.Module) -> list[Tensor]:
    """Return all tensors that the two parts of a model read."""
    held = dict.fromkeys(tensor for part in (body, head) for tensor in (*part.parameters(), *part.buffers()))
    return [number for tensor in held for number in numbers_of(tensor)]
