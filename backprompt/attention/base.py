"""The contract of attention over a packed forest.

Axes, everywhere in this library: layers, batch, heads (of queries), kv_heads, tokens (rows), head_dim, vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from backprompt.forest.plan import Pass


@dataclass(frozen=True)
class Scoring:
    """The treatment of attention scores in a layer: scaling, window, softcap and sinks.

    `window`: a query sees keys fewer than this many positions back. `softcap`: scores become
    `softcap * tanh(score / softcap)`. `sinks`: one score for each head, `(heads,)`, that takes part in the softmax and
    has no value.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class PreparedAttention(Protocol):
    """Attention over the forest for one pass, called once for each layer."""

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the forest, `(tokens, heads, value_dim)`, in the dtype of `query`.

        Args:
            layer_idx: the layer in the blocks that the pass's segments name.
            query: `(heads, tokens, head_dim)`, the rows of the pass.
            key: `(kv_heads, tokens, head_dim)`, the keys of the pass itself.
            value: `(kv_heads, tokens, value_dim)`.
            scoring: the scoring of the layer.

        """
        ...

    def advance(self, rows: Sequence[int] | None = None) -> None:
        """Advance to the next step of a generation: each row of a segment that `grows` also sees the next key.

        `rows`: the rows that stay, in order; None if all rows stay.
        """
        ...


class CannotStandError(Exception):
    """A step cannot be recorded in a graph, or a `StandingAttention` cannot be used for a layer."""


class StandingAttention(Protocol):
    """Attention of steps with the same number of rows. Its tables stay at their addresses, so a graph can replay it.

    A step may have fewer rows; the other rows see no keys.
    """

    @property
    def num_bytes(self) -> int:
        """The bytes of the tables."""
        ...

    def load(self, prepared: PreparedAttention) -> bool:
        """Set the next step; return False if the tables have no room: then a load must succeed before the next use."""
        ...

    def load_next(self, prepared: PreparedAttention) -> bool:
        """Set the step behind the one for which an attention is prepared; see `load`. `prepared` stays as it is."""
        ...

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the forest; see `PreparedAttention.attend`.

        Raises:
            CannotStandError: this layer needs another way of attending.

        """
        ...


class ForestAttention(Protocol):
    """A way to attend over a packed forest.

    Attributes:
        name: the kernel in use; "none yet" before the first layer.

    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    def prepare(self, pass_: Pass, num_steps: int = 1) -> PreparedAttention:
        """Return the attention of a pass, with the data that all layers share. Release it after the pass.

        `num_steps`: the number of consecutive steps of a generation for which it can be used; see `advance`.
        """
        ...

    def standing(self, num_rows: int) -> StandingAttention | None:
        """Return the attention of captured steps with `num_rows` rows; None if this way of attending has none."""
        ...
