"""Where representations lie: blocks of computed rows.

A pass leaves two blocks: `KeysValues`, for each layer the keys and values of all its rows, and `States`, their final
hidden states and log-probabilities. A computed span holds `BlockRows` of each, a range of rows, so that splitting a
span moves nothing and spans of one pass share one allocation. A block is freed with the last span that refers to it;
one of which only some rows are still referred to is made smaller in place (`compact`). What moves from one tier of
memory to another goes from blocks to new blocks (`moved`). A tensor costs some hundred bytes besides its numbers, so
small blocks become one where they are many (`joined`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from backprompt.logprobs import logprob_dtype
from backprompt.radix import Span

SMALL_TENSOR_BYTES = 16 << 10
"""A block of smaller tensors is small: the 550 bytes that a tensor takes besides its numbers count there."""


@dataclass(frozen=True)
class Location:
    """Where tensors are made: a device, and if that is the CPU, whether in pinned (page-locked) memory."""

    device: torch.device
    is_pinned: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Location:
        """Return where a tensor lies."""
        return cls(tensor.device, tensor.is_pinned())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a new tensor here, with any content."""
        return torch.empty(shape, dtype=dtype, device=self.device, pin_memory=self.is_pinned)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy here; done when this returns."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


class Block(ABC):
    """Rows of tensors, one row a token. Nothing in it is a view of anything larger."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """How many tokens it represents."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""

    @property
    @abstractmethod
    def tensor_bytes(self) -> int:
        """Bytes of one of its large tensors."""

    @property
    def is_small(self) -> bool:
        """Whether its tensors are so small that they cost more than they should."""
        return self.tensor_bytes < SMALL_TENSOR_BYTES

    @abstractmethod
    def keep(self, pieces: Sequence[slice]) -> None:
        """Keep only these rows, in this order. Each tensor is copied and the old one freed before the next."""

    @abstractmethod
    def append(self, others: Sequence[Any]) -> None:
        """Copy the rows of other blocks of the same kind and place behind its own, in their order."""

    @abstractmethod
    def copied(self, pieces: Sequence[slice], location: Location) -> Block:
        """Return a block of these rows, in this order, at a location: one copy a tensor."""


@dataclass(eq=False)
class KeysValues(Block):
    """Keys and values of consecutive rows.

    Attributes:
        keys: for each layer `(kv_heads, rows, head_dim)`, positions already encoded.
        values: for each layer `(kv_heads, rows, value_dim)`.

    """

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def num_rows(self) -> int:
        """How many tokens it represents."""
        return self.keys[0].shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one of its large tensors."""
        return self.keys[0].nbytes

    def keep(self, pieces: Sequence[slice]) -> None:
        """Keep only these rows, in this order."""
        for tensors in (self.keys, self.values):
            for layer_idx, tensor in enumerate(tensors):
                tensors[layer_idx] = _picked(tensor, pieces, dim=1)

    def append(self, others: Sequence[KeysValues]) -> None:
        """Copy the rows of other blocks behind its own, in their order."""
        for layer_idx in range(len(self.keys)):
            self.keys[layer_idx] = _side_by_side([block.keys[layer_idx] for block in (self, *others)], dim=1)
            self.values[layer_idx] = _side_by_side([block.values[layer_idx] for block in (self, *others)], dim=1)

    def copied(self, pieces: Sequence[slice], location: Location) -> KeysValues:
        """Return a block of these rows, in this order, at a location."""
        keys, values = (
            [location.copy(_picked(tensor, pieces, dim=1)) for tensor in tensors]
            for tensors in (self.keys, self.values)
        )
        return KeysValues(keys, values)


@dataclass(eq=False)
class States(Block):
    """What logits and log-probabilities of rows are read off.

    Attributes:
        hidden: what the output head reads, `(rows, hidden)`.
        logprobs: `(rows,)`, nats, float64 where `hidden` is, else float32; of a row's own token given those before it.
        is_argmax: `(rows,)`, bool; whether no other token was more probable there.
        has_logprobs: `(rows,)`, which of `logprobs` and `is_argmax` were computed; on the CPU wherever the block lies,
            so never page-locked: it does not move.

    """

    hidden: Tensor
    logprobs: Tensor
    is_argmax: Tensor
    has_logprobs: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> States:
        """Return states without log-probabilities."""
        num_rows = hidden.shape[0]
        logprobs = torch.zeros(num_rows, dtype=logprob_dtype(hidden.dtype), device=hidden.device)
        is_argmax = torch.zeros(num_rows, dtype=torch.bool, device=hidden.device)
        return cls(hidden, logprobs, is_argmax, torch.zeros(num_rows, dtype=torch.bool))

    @property
    def num_rows(self) -> int:
        """How many tokens it represents."""
        return self.hidden.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return self.hidden.nbytes + self.logprobs.nbytes + self.is_argmax.nbytes + self.has_logprobs.nbytes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one of its large tensors."""
        return self.hidden.nbytes

    def keep(self, pieces: Sequence[slice]) -> None:
        """Keep only these rows, in this order."""
        self.hidden = _picked(self.hidden, pieces)
        self.logprobs = _picked(self.logprobs, pieces)
        self.is_argmax = _picked(self.is_argmax, pieces)
        self.has_logprobs = _picked(self.has_logprobs, pieces)

    def append(self, others: Sequence[States]) -> None:
        """Copy the rows of other blocks behind its own, in their order."""
        blocks = (self, *others)
        self.hidden = _side_by_side([block.hidden for block in blocks])
        self.logprobs = _side_by_side([block.logprobs for block in blocks])
        self.is_argmax = _side_by_side([block.is_argmax for block in blocks])
        self.has_logprobs = _side_by_side([block.has_logprobs for block in blocks])

    def copied(self, pieces: Sequence[slice], location: Location) -> States:
        """Return a block of these rows, in this order, at a location; `has_logprobs` stays on the CPU."""
        return States(
            location.copy(_picked(self.hidden, pieces)),
            location.copy(_picked(self.logprobs, pieces)),
            location.copy(_picked(self.is_argmax, pieces)),
            _picked(self.has_logprobs, pieces).clone(),
        )


@dataclass(frozen=True)
class Layout:
    """What rows of one model look like, the same in every pass: dtypes, and sizes of all axes but that of rows.

    Attributes:
        keys: for each layer `(kv_heads, head_dim)`.
        values: for each layer `(kv_heads, value_dim)`.
        hidden: `(hidden,)`.
        logprobs: `()`.

    """

    keys: tuple[RowSpec, ...]
    values: tuple[RowSpec, ...]
    hidden: RowSpec
    logprobs: RowSpec

    @classmethod
    def of(cls, keys_values: KeysValues, states: States) -> Layout:
        """Return that of the rows of a pass."""
        keys, values = (
            tuple(_row_spec(tensor, dim=1) for tensor in tensors) for tensors in (keys_values.keys, keys_values.values)
        )
        return cls(keys, values, _row_spec(states.hidden, dim=0), _row_spec(states.logprobs, dim=0))


@dataclass(frozen=True)
class RowSpec:
    """A tensor's dtype, and the sizes of its axes but that of rows."""

    dtype: torch.dtype
    sizes: tuple[int, ...]


def _row_spec(tensor: Tensor, dim: int) -> RowSpec:
    return RowSpec(tensor.dtype, (*tensor.shape[:dim], *tensor.shape[dim + 1 :]))


BlockType = TypeVar("BlockType", bound=Block)


@dataclass(frozen=True, slots=True)
class BlockRows(Generic[BlockType]):
    """Rows `start..stop` of a block: what a computed span refers to."""

    block: BlockType
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Their share of the block's bytes."""
        return self.block.num_bytes * (self.stop - self.start) // self.block.num_rows

    def split(self, num_tokens: int) -> tuple[BlockRows[BlockType], BlockRows[BlockType]]:
        """Return the first `num_tokens` rows and the others; nothing is copied."""
        middle = self.start + num_tokens
        return BlockRows(self.block, self.start, middle), BlockRows(self.block, middle, self.stop)


def compact(places: Mapping[Span, BlockRows[Any]]) -> dict[Span, BlockRows[Any]]:
    """Make the blocks smaller of which `places` are not all rows; return where the spans' rows lie then."""
    compacted = {}
    for block, group in _by_block(places).items():
        if sum(place.stop - place.start for place in group.values()) < block.num_rows:
            block.keep(_pieces(group))
            compacted.update(_one_after_the_other(group, block))
    return compacted


def joined(places: Mapping[Span, BlockRows[Any]]) -> dict[Span, BlockRows[Any]]:
    """Let small blocks become one, as many as it takes for that one not to be small; return where spans' rows lie then.

    `places` are all that refer to rows of these blocks.
    """
    found: dict[Span, BlockRows[Any]] = {}
    groups = {block: group for block, group in _by_block(places).items() if block.is_small}
    for blocks in _portions(groups):
        first, *others = blocks
        start = 0
        for block in blocks:
            found |= {span: BlockRows(first, start + at.start, start + at.stop) for span, at in groups[block].items()}
            start += block.num_rows
        first.append(others)
        for other in others:
            other.keep([])  # it may be referred to until all are joined
    return found


def _portions(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Yield two and more blocks at a time that are not small together; the last ones may be."""
    portion: list[Block] = []
    num_bytes = 0
    for block in blocks:
        portion.append(block)
        num_bytes += block.tensor_bytes
        if num_bytes >= SMALL_TENSOR_BYTES:
            yield portion
            portion, num_bytes = [], 0
    if len(portion) > 1:
        yield portion


def moved(places: Mapping[Span, BlockRows[Any]], location: Location) -> dict[Span, BlockRows[Any]]:
    """Copy spans' rows to a location; return where they lie there. What comes from one block goes to one block.

    Junctions have none, here as there.
    """
    copies = {span: place for span, place in places.items() if not span.token_ids}
    for block, group in _by_block(places).items():
        copies.update(_one_after_the_other(group, block.copied(_pieces(group), location)))
    return copies


def _by_block(places: Mapping[Span, BlockRows[Any]]) -> dict[Block, dict[Span, BlockRows[Any]]]:
    """Group places by their blocks, and order each group by its rows."""
    groups: dict[Block, dict[Span, BlockRows[Any]]] = {}
    with_rows = [(span, place) for span, place in places.items() if span.token_ids]
    for span, place in sorted(with_rows, key=lambda item: item[1].start):
        groups.setdefault(place.block, {})[span] = place
    return groups


def _pieces(group: Mapping[Span, BlockRows[Any]]) -> list[slice]:
    """Return the rows of one block's places, neighbours as one slice."""
    pieces: list[slice] = []
    for place in group.values():
        if pieces and pieces[-1].stop == place.start:
            pieces[-1] = slice(pieces[-1].start, place.stop)
        else:
            pieces.append(slice(place.start, place.stop))
    return pieces


def _one_after_the_other(group: Mapping[Span, BlockRows[Any]], block: Block) -> dict[Span, BlockRows[Any]]:
    """Return the places of rows that were put into `block` one after the other."""
    places, start = {}, 0
    for span, place in group.items():
        stop = start + place.stop - place.start
        places[span] = BlockRows(block, start, stop)
        start = stop
    return places


def _picked(tensor: Tensor, pieces: Sequence[slice], dim: int = 0) -> Tensor:
    """Return these rows of a tensor side by side, where the tensor lies; the tensor itself if these are all."""
    num_rows = sum(piece.stop - piece.start for piece in pieces)
    if len(pieces) == 1 and num_rows == tensor.shape[dim]:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = num_rows
    parts = [tensor.narrow(dim, piece.start, piece.stop - piece.start) for piece in pieces]
    return _side_by_side(parts, dim) if parts else Location.of(tensor).empty(shape, tensor.dtype)


def _side_by_side(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Return tensors as one, where they lie."""
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.cat(tensors, dim=dim, out=Location.of(tensors[0]).empty(shape, tensors[0].dtype))


def keys_values_of(span: Span) -> BlockRows[KeysValues]:
    """Return where the keys and values of a span lie that holds them."""
    rows = span.rows
    assert isinstance(rows, BlockRows), span
    return rows


def states_of(span: Span) -> BlockRows[States]:
    """Return where the states of a span lie that holds them."""
    states = span.states
    assert isinstance(states, BlockRows), span
    return states


def gather(places: Iterable[BlockRows[BlockType]], pick: Callable[[BlockType], Tensor], dim: int) -> Tensor:
    """Return rows of several blocks as one new tensor; `pick` chooses a block's tensor."""
    return torch.cat([pick(rows.block).narrow(dim, rows.start, rows.stop - rows.start) for rows in places], dim=dim)
