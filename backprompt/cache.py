"""Where representations lie: blocks of computed rows, and a pool of logit rows.

A pass leaves one `Block`: for each layer the keys and values of all its rows, their final hidden states, and their
log-probabilities once asked for. A computed span holds `BlockRows`, a range of rows of a block, so that splitting a
span moves nothing and spans of one pass share one allocation; a block is freed with the last span that refers to it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backprompt.radix import Span


@dataclass(eq=False)
class Block:
    """The representation of consecutive rows. Nothing in it is a view of anything larger.

    Attributes:
        keys: for each layer `(kv_heads, rows, head_dim)`, positions already encoded.
        values: for each layer `(kv_heads, rows, value_dim)`.
        hidden: what the output head reads, `(rows, hidden)`.
        logprobs: `(rows,)`, float32, nats; of a row's own token given those before it.
        has_logprobs: `(rows,)`, on the CPU; which of `logprobs` were computed.

    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor
    logprobs: Tensor
    has_logprobs: Tensor

    @property
    def num_rows(self) -> int:
        """How many tokens it represents."""
        return self.hidden.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = [*self.keys, *self.values, self.hidden, self.logprobs, self.has_logprobs]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class BlockRows:
    """Rows `start..stop` of a block: what a computed span refers to."""

    block: Block
    start: int
    stop: int

    def split(self, num_tokens: int) -> tuple[BlockRows, BlockRows]:
        """Return the first `num_tokens` rows and the others; nothing is copied."""
        middle = self.start + num_tokens
        return BlockRows(self.block, self.start, middle), BlockRows(self.block, middle, self.stop)


def rows_of(span: Span) -> BlockRows:
    """Return where a computed span lies."""
    rows = span.rows
    assert isinstance(rows, BlockRows), span
    return rows


def gather(path: Sequence[Span], pick: Callable[[Block], Tensor], dim: int) -> Tensor:
    """Return the rows of a path of computed spans as one new tensor; `pick` chooses a block's tensor."""
    located = [rows_of(span) for span in path]
    return torch.cat([pick(rows.block).narrow(dim, rows.start, rows.stop - rows.start) for rows in located], dim=dim)


class LogitPool:
    """Last rows of logits, the most recently used ones, under a bound of bytes of their own."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._rows: OrderedDict[Span, Tensor] = OrderedDict()

    def get(self, end: Span) -> Tensor | None:
        """Return the row that a text ending at this span left here, `(vocab,)`, or None. Do not write to it."""
        row = self._rows.get(end)
        if row is not None:
            self._rows.move_to_end(end)
        return row

    def put(self, end: Span, row: Tensor) -> None:
        """Keep a copy of `row`, dropping the least recently used rows over the bound."""
        if row.nbytes > self.max_bytes or end in self._rows:
            return
        self._rows[end] = row.clone()  # a row of a slice would keep the whole slice alive
        self.num_bytes += row.nbytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._rows.popitem(last=False)
            self.num_bytes -= dropped.nbytes

    def clear(self) -> None:
        """Drop every row."""
        self._rows.clear()
        self.num_bytes = 0
