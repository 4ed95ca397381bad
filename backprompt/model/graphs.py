"""The graph of the steps of one bucket: the tensors that it reads, its recording, and the steps that it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import is_
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from backprompt.attention.base import CannotStandError, PreparedAttention, StandingAttention
from backprompt.memory.blocks import KeysValues
from backprompt.memory.places import Places
from backprompt.model.in_flight import InFlight
from backprompt.model.limits import Limits
from backprompt.model.recording import Output, Recorder, Recording
from backprompt.model.report import Report, report_tensor
from backprompt.transfers import Arriving, copy_to, on_device

MAX_BLOCKS = 8
"""The largest number of blocks to which a graph copies rows."""

CLOSE = 8
"""The largest difference of the first replay from the plain run, in units of the dtype's precision, relative to the
largest number."""

Place: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]"
"""Copies rows to their places: see memory/placing.py."""

Look: TypeAlias = "Callable[[], Tensor | None]"
"""Returns whether sampled numbers of the weights are those of before, `()`, bool, without waiting for the device.

The result is None if only the host can tell."""


class Runs(Protocol):
    """The model whose steps are captured: an `Executor`."""

    limits: Limits

    @property
    def rows_in_a_slice(self) -> int:
        """The largest number of rows that `logits` should compute at once."""

    def run(self, inputs: Tensor, attention: StandingAttention, max_position: int) -> tuple[InFlight, Tensor]:
        """Run the body: see `Executor.run`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Run the head: see `Executor.logits`."""


@dataclass(frozen=True)
class Step:
    """A step of one token a text.

    Attributes:
        token_ids: the tokens, on the host or on the device.
        positions: the position of each.
        places: the places to which the new rows go; None if the caller copies the rows.

    """

    token_ids: Sequence[int] | Tensor
    positions: Sequence[int]
    places: Places | None

    @property
    def are_placed(self) -> bool:
        """Whether a graph copies the rows to their places: they lie in few blocks."""
        return self.places is not None and len(self.places.blocks) <= MAX_BLOCKS

    def tensors(self) -> list[Tensor]:
        """Return the first tensors of the blocks that take the rows in."""
        return [] if self.places is None else self.places.first_tensors()


@dataclass(frozen=True)
class Launched:
    """A step that a graph computes, or has computed already.

    Attributes:
        graph: the graph. Its next launch overwrites the outputs of this step, but for the report.
        num_launches: the number of steps that the graph had computed with this one.
        step: the step.
        rows: the rows of the step that count; texts may have ended since.
        token_ids: the tokens of these rows; None if they are not known yet.
        targets: the first tensors of the blocks that take the rows in.
        arriving: the report on its way to the host.
        is_first: whether the graph was recorded for this step.

    """

    graph: Graph
    num_launches: int
    step: Step
    rows: Sequence[int]
    token_ids: Sequence[int] | None
    targets: Sequence[Tensor]
    arriving: Arriving
    is_first: bool = False

    @cached_property
    def report(self) -> Report:
        """The report of the rows; the first look waits for this step."""
        return Report(self.arriving.numbers()).of(self.rows)

    @property
    def is_latest(self) -> bool:
        """Whether the outputs of the graph are still those of this step."""
        return not self.graph.is_released and self.num_launches == self.graph.num_launches

    @property
    def lies_right(self) -> bool:
        """Whether the blocks that have taken the rows in still lie where they did."""
        return all(map(is_, self.targets, self.step.tensors()))

    @property
    def tells_tokens(self) -> bool:
        """Whether the next tokens can be read from the report."""
        return self.graph.recording.output.logits is not None

    def kept(self, rows: Sequence[int]) -> Launched:
        """Return the same step, of which only some of the rows count."""
        token_ids = None if self.token_ids is None else [self.token_ids[row] for row in rows]
        return replace(self, rows=[self.rows[row] for row in rows], token_ids=token_ids)

    def with_tokens(self, token_ids: Sequence[int]) -> Launched:
        """Return the same step, whose tokens are known now."""
        return replace(self, token_ids=token_ids)

    def next_step(self, token_ids: Tensor | None = None) -> Step:
        """Return the step behind this one, with these tokens, `(rows,)`; by default with the most probable ones."""
        assert self.is_latest
        token_ids = self._of_rows(self.graph.chosen_ids) if token_ids is None else token_ids
        positions = [self.step.positions[row] + 1 for row in self.rows]
        return Step(token_ids, positions, None if self.step.places is None else self.step.places.next_rows(self.rows))

    def logits(self) -> Tensor | None:
        """Return the logits behind the rows, `(rows, vocab)`, which the next launch overwrites.

        None if the head is not part of the graph.
        """
        assert self.is_latest
        logits = self.graph.recording.output.logits
        return None if logits is None else self._of_rows(logits)

    def _of_rows(self, tensor: Tensor) -> Tensor:
        """Return the part of an output, `(rows, ...)`, that belongs to the rows; a view if all rows count."""
        is_whole = len(self.rows) == len(self.step.positions)
        return tensor[: len(self.rows)] if is_whole else tensor[on_device(np.array(self.rows), tensor.device)]


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
        self._recorded: Recording | None = None
        self.num_launches = 0
        """The number of steps that the graph has computed."""
        self._last: Arriving | None = None
        """The report of the last step."""
        self.is_released = False
        """Whether the memory of the graph was given back; then the graph computes no step any more."""

    @property
    def chosen_ids(self) -> Tensor:
        """The most probable token behind each row of the last step, `(rows,)`: each launch leaves them here."""
        return self._numbers[: self._num_rows]

    def release(self) -> None:
        """Give the memory back, also if a step that was launched still refers to the graph."""
        self.is_released = True
        self._recorded = self._sources = self._last = None
        self._numbers = self._numbers.new_empty(0)
        del self._standing

    def reason_to_leave(self, step: Step, addresses: Sequence[int]) -> str | None:
        """Return why the graph is not valid for a step; None if it is."""
        if addresses != self._addresses:
            return "weights lie elsewhere"
        if not self.recording.output.in_flight.means_the_same_at(max(step.positions)):
            return "a mask has another meaning at other positions"
        return None

    def load(self, step: Step, prepared: PreparedAttention, *, is_next: bool = False) -> str | None:
        """Load a step; return why that is not possible, or None.

        The rows beyond those of the step are like its first row, or have any ids.

        Args:
            step: the step.
            prepared: the attention of the step, or of the step before.
            is_next: whether `prepared` is the attention of the step before.

        """
        if self._last is not None:
            self._last.keep_behind(self._numbers.device)
        num_live, num_rows = len(step.positions), self._num_rows
        rows = np.zeros((5, num_rows), dtype=np.int64)
        rows[1] = step.positions[0]
        rows[1, :num_live] = step.positions
        rows[2, num_live:] = 1
        rows[3] = -1
        targets = np.zeros(0, dtype=np.int64)
        if step.places is not None:
            targets = step.places.addresses()[:MAX_BLOCKS]
            if not len(self._numbers):
                self._numbers = self._numbers.new_zeros(rows.size + MAX_BLOCKS * targets[0].size)
            if step.are_placed:
                rows[3, :num_live], rows[4, :num_live] = step.places.block_idx, step.places.target_rows
        if isinstance(step.token_ids, Tensor):
            if step.token_ids.data_ptr() != self.chosen_ids.data_ptr():
                self.chosen_ids[:num_live] = step.token_ids
            copy_to(self._numbers[num_rows:], np.concatenate([rows[1:].ravel(), targets.ravel()]))
        else:
            rows[0] = step.token_ids[0]
            rows[0, :num_live] = step.token_ids
            copy_to(self._numbers, np.concatenate([rows.ravel(), targets.ravel()]))
        load = self._standing.load_next if is_next else self._standing.load
        return None if load(prepared) else "the tables have no room for the step"

    def record(self, model: Runs, look: Look, record: Recorder, max_position: int) -> None:
        """Record the run of the model, the report, and the copy of new rows to their places.

        `load` must be called before, and again after. The recording itself copies no row to its place.
        """
        rows = self._numbers[: 5 * self._num_rows].view(5, self._num_rows)
        num_tensors = (len(self._numbers) - rows.numel()) // (2 * MAX_BLOCKS)
        sources = self._sources = rows.new_zeros((num_tensors, 4))
        rows[3] = -1

        def compute() -> Output:
            in_flight, hidden = model.run(rows[:2], self._standing, max_position)
            is_finite = (hidden.isfinite().all(dim=1) | (rows[2] > 0)).all() & in_flight.copies.are_finite()
            is_scored = self._num_rows <= model.rows_in_a_slice
            logits = model.logits(hidden.clone()) if is_scored else None  # a head may write to its input
            report = report_tensor(hidden, look(), logits)
            keys_values = KeysValues.of(in_flight.keys, in_flight.values)
            return Output(hidden, keys_values, is_finite.int(), in_flight, logits, report)

        def finish(output: Output) -> None:
            self._place(output.hidden, output.is_finite, sources, self._numbers[rows.numel() :], rows[3:])
            output.report[0].copy_(output.is_finite)
            if output.logits is not None:
                rows[0].copy_(output.report[2].clamp(max=model.limits.num_embeddings - 1))  # a head may score more

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

    def is_plain_run_finite(self, num_live: int) -> bool:
        """Return whether the run before the recording was finite, its logits included."""
        return bool(self._plain.is_finite) and bool(self._plain.report[1:, :num_live].isfinite().all())

    @property
    def _plain(self) -> Output:
        assert self.recording.plain is not None, "was compared already"
        return self.recording.plain

    def gap_to_plain_run(self, num_live: int) -> str | None:
        """Return in words how far a replay is from the run before the recording, once; None if it is close."""
        self.recording.replay()
        output, plain = self.recording.output, self._plain
        self._recorded = replace(self.recording, plain=None)  # frees the rows of the plain run
        allowed = CLOSE * torch.finfo(output.hidden.dtype).eps
        for found, expected in ((output.hidden, plain.hidden), (output.report[3:].T, plain.report[3:].T)):
            if found.numel():
                gap = float((found - expected)[:num_live].abs().max())
                if not gap <= allowed * float(expected[:num_live].abs().max()):
                    return f"a replay was off by {gap:.1e}"
        return None

    def launch(self, step: Step, *, is_first: bool = False) -> Launched:
        """Compute the step that was loaded, without waiting for its results."""
        self.recording.replay()
        self.num_launches += 1
        report = self._last = Arriving(self.recording.output.report)
        token_ids = None if isinstance(step.token_ids, Tensor) else step.token_ids
        rows = range(len(step.positions))
        return Launched(self, self.num_launches, step, rows, token_ids, step.tensors(), report, is_first)
