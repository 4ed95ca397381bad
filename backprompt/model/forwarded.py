"""The results of a pass: rows on which the device may still work, and the spans that take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

from torch import Tensor

from backprompt.forest.span import Span
from backprompt.memory.blocks import BlockRows, KeysValues, States
from backprompt.model.graphs import Launched

Way: TypeAlias = Literal["replayed", "recorded", "plain"]
"""The way in which a step of a generation was computed: by a graph, by the first run of a graph, or without a graph."""


@dataclass(frozen=True)
class Work:
    """The work of a pass in addition to its own tokens.

    Attributes:
        num_calls: the calls of the model's body.
        num_again: tokens that were forwarded again, for states that were not kept; see levels.py.
        restored: the states that were computed again, as snapshots of the spans that hold their other rows.

    """

    num_calls: int = 1
    num_again: int = 0
    restored: Mapping[Span, Tensor] = field(default_factory=dict)


ONE_CALL = Work()


@dataclass(frozen=True)
class Forwarded:
    """The output of a pass, on which the device may still work.

    Attributes:
        keys_values: the keys and values.
        hidden: the final hidden states, `(tokens, hidden)`.
        are_finite: whether all numbers are finite, `()`.
        are_placed: whether keys, values and hidden states were copied to their places, see `Executor.step`. Then the
            tensors here only show the number of rows: the next step may overwrite them already.
        way: the way in which a step was computed.
        work: the additional work.
        launched: the step, if a graph computes it.

    """

    keys_values: KeysValues
    hidden: Tensor
    are_finite: Tensor
    are_placed: bool = False
    way: Way = "plain"
    work: Work = ONE_CALL
    launched: Launched | None = None

    @classmethod
    def of(cls, launched: Launched) -> Forwarded:
        """Return the output of a step that a graph computes; rows without places are copied."""
        output, num_rows = launched.graph.recording.output, len(launched.rows)
        keys_values, hidden = output.keys_values, output.hidden[:num_rows]
        are_placed = launched.step.are_placed
        way: Way = "recorded" if launched.is_first else "replayed"
        if launched.step.places is None:
            keys_values, hidden = keys_values.copied([slice(0, num_rows)]), hidden.clone()
        elif not are_placed:
            keys_values = keys_values.first_rows(num_rows)
        return cls(keys_values, hidden, output.is_finite, are_placed=are_placed, way=way, launched=launched)

    @cached_property
    def is_finite(self) -> bool:
        """Whether all numbers are finite; the first look waits for the device."""
        if self.launched is not None:
            return self.launched.report.is_finite
        return bool(self.are_finite)


@dataclass(frozen=True)
class Computed:
    """The results of a pass, which no span holds yet.

    Attributes:
        keys_values: the keys and values of all spans.
        states: the states of the spans that held none; None if all spans did.
        keys_values_of, states_of: the rows of each span.
        work: the additional work.

    """

    keys_values: KeysValues
    states: States | None
    keys_values_of: Mapping[Span, BlockRows[KeysValues]]
    states_of: Mapping[Span, BlockRows[States]]
    work: Work

    def place(self) -> None:
        """Hand the results to the spans."""
        for span, keys_values in self.keys_values_of.items():
            span.place(keys_values=keys_values, states=self.states_of.get(span))
