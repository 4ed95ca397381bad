"""Where representations lie: blocks of computed rows. No other file knows which tensors they are made of, nor which
axis of a tensor is that of tokens.

A pass leaves two blocks: `KeysValues`, for each layer the keys and values of all its rows, and `States`, their final
hidden states and log-probabilities. A computed span holds `BlockRows` of each, a range of rows, so that splitting a
span moves nothing and spans of one pass share one allocation. A block is freed with the last span that refers to it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from backprompt.forest.span import Span
from backprompt.logprobs import logprob_dtype

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on

AXES: Mapping[str, tuple[str, ...]] = {
    "keys": ("kv_heads", "tokens", "head_dim"),
    "values": ("kv_heads", "tokens", "value_dim"),
    "hidden": ("tokens", "hidden"),
    "logprobs": ("tokens",),
    "is_argmax": ("tokens",),
    "has_logprobs": ("tokens",),
}
"""The axes of each kind of tensor. Of keys and values there is one a layer: "keys.0", "values.0", "keys.1" ..."""

STATE_TENSORS = frozenset({"hidden", "logprobs", "is_argmax", "has_logprobs"})
"""The tensors of `States`."""

IN_MODEL_DTYPE = frozenset({"keys", "values", "hidden"})
"""The kinds of tensors that are in the dtype of the model."""

SMALL_TENSOR_BYTES = 16 << 10
"""A block of smaller tensors is small: the 550 bytes that a tensor takes besides its numbers count there."""


def kind_of(name: str) -> str:
    """Return of which kind a tensor is, one of `AXES`: "keys" for "keys.0"."""
    return name.partition(".")[0]


def token_axis(name: str) -> int:
    """Return which axis of a tensor is that of tokens."""
    return AXES[kind_of(name)].index("tokens")


@lru_cache(maxsize=1024)
def layer_names(layer_idx: int) -> tuple[str, str]:
    """Return the names of a layer's keys and values."""
    return f"keys.{layer_idx}", f"values.{layer_idx}"


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
    """Rows of tensors, one row a token. Nothing in it is a view of anything larger.

    Attributes:
        tensors: by the names under which a store has them.

    """

    token_axis: ClassVar[int]
    """The axis of tokens, the same in all of its tensors."""

    first_name: ClassVar[str]
    """The name of one of its large tensors."""

    on_host: ClassVar[frozenset[str]] = frozenset()
    """The tensors that lie on the CPU wherever the block lies, never page-locked: they do not move."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def num_rows(self) -> int:
        """How many tokens it represents."""
        return self.tensors[self.first_name].shape[self.token_axis]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum([tensor.nbytes for tensor in self.tensors.values()])

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one of its large tensors."""
        return self.tensors[self.first_name].nbytes

    @property
    def is_small(self) -> bool:
        """Whether its tensors are so small that they cost more than they should."""
        return self.tensor_bytes < SMALL_TENSOR_BYTES

    def keep(self, pieces: Sequence[slice]) -> None:
        """Keep only these rows, in this order. Each tensor is copied and the old one freed before the next."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = _picked(tensor, pieces, self.token_axis)

    def append(self, others: Sequence[Self]) -> None:
        """Copy the rows of other blocks of the same kind and place behind its own, in their order."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = _side_by_side([tensor, *(other.tensors[name] for other in others)], self.token_axis)

    def copied(self, pieces: Sequence[slice], location: Location | None = None) -> Self:
        """Return a block of these rows, in this order, at a location, by default where this lies: one copy a tensor."""
        at = location or Location.of(self.tensors[self.first_name])
        return type(self)({name: self._copied(name, pieces, at) for name in self.tensors})

    def _copied(self, name: str, pieces: Sequence[slice], location: Location) -> Tensor:
        rows = _picked(self.tensors[name], pieces, self.token_axis)
        return rows.clone() if name in self.on_host else location.copy(rows)

    def zeros(self, num_rows: int) -> Self:
        """Return a block of so many rows of the same shape where this lies; all numbers are 0."""
        return type(self)(
            {
                name: Location.of(tensor).empty(_with_rows(tensor, num_rows, self.token_axis), tensor.dtype).zero_()
                for name, tensor in self.tensors.items()
            }
        )

    def copy_rows_to(self, other: Self, sources: Tensor, targets: Tensor) -> None:
        """Copy the rows `sources` to the rows `targets` of another block of the same kind, which may be this one."""
        for name, tensor in self.tensors.items():
            rows = tensor.index_select(self.token_axis, sources.to(tensor.device))
            other.tensors[name].index_copy_(self.token_axis, targets.to(tensor.device), rows)


class KeysValues(Block):
    """Keys and values of consecutive rows, of each layer those that `AXES` names, positions already encoded."""

    token_axis = 1
    first_name = layer_names(0)[0]

    @classmethod
    def of(cls, keys: Sequence[Tensor], values: Sequence[Tensor]) -> KeysValues:
        """Return a block of each layer's `(kv_heads, tokens, head_dim)` and `(kv_heads, tokens, value_dim)`."""
        tensors: dict[str, Tensor] = {}
        for layer_idx, layer in enumerate(zip(keys, values, strict=True)):
            tensors.update(zip(layer_names(layer_idx), layer, strict=True))
        return cls(tensors)

    @property
    def num_layers(self) -> int:
        """How many layers of the model attend."""
        return len(self.tensors) // 2

    def layer(self, layer_idx: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return views of a layer's keys and values, those of some rows, shaped as in `of`."""
        keys, values = layer_names(layer_idx)
        return self.tensors[keys][:, rows], self.tensors[values][:, rows]


class States(Block):
    """What logits and log-probabilities of rows are read off."""

    token_axis = 0
    first_name = "hidden"
    on_host = frozenset({"has_logprobs"})

    @classmethod
    def of(cls, hidden: Tensor) -> States:
        """Return states without log-probabilities; `hidden`: what the output head reads, `(tokens, hidden)`."""
        num_rows = hidden.shape[0]
        logprobs = torch.zeros(num_rows, dtype=logprob_dtype(hidden.dtype), device=hidden.device)
        is_argmax = torch.zeros(num_rows, dtype=torch.bool, device=hidden.device)
        has_logprobs = torch.zeros(num_rows, dtype=torch.bool)
        return cls({"hidden": hidden, "logprobs": logprobs, "is_argmax": is_argmax, "has_logprobs": has_logprobs})

    @classmethod
    def of_rows(cls, hidden: Tensor, pieces: Sequence[slice]) -> States:
        """Return states without log-probabilities of some rows, in this order; see `of`."""
        return cls.of(_picked(hidden, pieces, cls.token_axis))

    @property
    def hidden(self) -> Tensor:
        """What the output head reads, `(tokens, hidden)`."""
        return self.tensors["hidden"]

    @property
    def logprobs(self) -> Tensor:
        """Of a row's own token given those before it, `(tokens,)`, nats; float64 where `hidden` is, else float32."""
        return self.tensors["logprobs"]

    @property
    def is_argmax(self) -> Tensor:
        """Whether no other token was more probable there, `(tokens,)`, bool."""
        return self.tensors["is_argmax"]

    @property
    def has_logprobs(self) -> Tensor:
        """Which of `logprobs` and `is_argmax` were computed, `(tokens,)`, bool, on the CPU."""
        return self.tensors["has_logprobs"]

    def is_scored(self, start: int, stop: int) -> bool:
        """Return whether all tokens of the rows `start..stop` have their log-probabilities."""
        return bool(self.has_logprobs[start:stop].all())

    def write_scores(self, rows: Tensor, logprobs: Tensor, is_argmax: Tensor) -> None:
        """Write log-probabilities of rows' tokens; `rows`, `(rows,)`, lies on the CPU."""
        indices = rows.to(self.logprobs.device)
        self.logprobs[indices] = logprobs
        self.is_argmax[indices] = is_argmax
        self.has_logprobs[rows] = True

    def note_unpredicted(self, rows: Tensor) -> None:
        """Note that nothing predicts these rows' tokens: their log-probabilities are NaN; see `write_scores`."""
        self.logprobs[rows.to(self.logprobs.device)] = torch.nan
        self.has_logprobs[rows] = True


@dataclass(frozen=True)
class RowSpec:
    """A tensor's dtype, and the sizes of its axes but that of tokens."""

    dtype: torch.dtype
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What rows of one model look like, the same in every pass.

    Attributes:
        rows: of each tensor of both blocks, by name.

    """

    rows: Mapping[str, RowSpec]

    @classmethod
    def of(cls, *blocks: Block) -> Layout:
        """Return that of the rows of a pass."""
        return cls({name: _row_spec(t, block.token_axis) for block in blocks for name, t in block.tensors.items()})

    def shape(self, name: str, num_tokens: int) -> tuple[int, ...]:
        """Return the shape of a tensor of so many tokens."""
        axis, sizes = token_axis(name), self.rows[name].sizes
        return (*sizes[:axis], num_tokens, *sizes[axis:])


def _row_spec(tensor: Tensor, axis: int) -> RowSpec:
    return RowSpec(tensor.dtype, (*tensor.shape[:axis], *tensor.shape[axis + 1 :]))


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

    def with_next(self, others: BlockRows[BlockType]) -> BlockRows[BlockType] | None:
        """Return these and others as one, if those lie right behind these; nothing is copied."""
        is_next = self.block is others.block and self.stop == others.start
        return BlockRows(self.block, self.start, others.stop) if is_next else None

    def alone(self) -> BlockRows[BlockType]:
        """Return a copy of these rows, in a block of their own where this lies."""
        return BlockRows(self.block.copied([slice(self.start, self.stop)]), 0, self.stop - self.start)


def copy_rows(copies: Iterable[tuple[BlockRows[Any], Block, int]]) -> None:
    """Copy rows into blocks, each to where they begin there; rows of one block into another with one copy a tensor."""
    by_blocks: dict[tuple[Block, Block], list[tuple[int, int]]] = {}
    for rows, target, start in copies:
        pairs = by_blocks.setdefault((rows.block, target), [])
        pairs += [(row, start + idx) for idx, row in enumerate(range(rows.start, rows.stop))]
    for (block, target), pairs in by_blocks.items():
        block.copy_rows_to(target, *torch.tensor(pairs).unbind(dim=1))


def gather(rows: Iterable[BlockRows[Any]], name: str) -> Tensor:
    """Return rows of several blocks as one new tensor, of those of this name."""
    axis = token_axis(name)
    parts = [part.block.tensors[name].narrow(axis, part.start, part.stop - part.start) for part in rows]
    return torch.cat(parts, dim=axis)


def gather_each(rows: Sequence[BlockRows[Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each tensor of some blocks, and rows of it as one new tensor."""
    yield from ((name, gather(rows, name)) for name in rows[0].block.tensors)


def keys_values_of(span: Span) -> BlockRows[KeysValues]:
    """Return where the keys and values of a span lie that holds them."""
    rows = span.keys_values
    assert isinstance(rows, BlockRows), span
    return rows


def states_of(span: Span) -> BlockRows[States]:
    """Return where the states of a span lie that holds them."""
    rows = span.states
    assert isinstance(rows, BlockRows), span
    return rows


def last_hidden(span: Span) -> Tensor:
    """Return the hidden state of the last token of a span that holds its states, `(hidden,)`: a view."""
    rows = states_of(span)
    return rows.block.hidden[rows.stop - 1]


def _picked(tensor: Tensor, pieces: Sequence[slice], axis: int) -> Tensor:
    """Return these rows of a tensor side by side, where the tensor lies; the tensor itself if these are all."""
    num_rows = sum(piece.stop - piece.start for piece in pieces)
    if len(pieces) == 1 and num_rows == tensor.shape[axis]:
        return tensor
    parts = [tensor.narrow(axis, piece.start, piece.stop - piece.start) for piece in pieces]
    if parts:
        return _side_by_side(parts, axis)
    return Location.of(tensor).empty(_with_rows(tensor, num_rows, axis), tensor.dtype)


def _side_by_side(tensors: list[Tensor], axis: int) -> Tensor:
    """Return tensors as one, where they lie."""
    shape = _with_rows(tensors[0], sum(tensor.shape[axis] for tensor in tensors), axis)
    return torch.cat(tensors, dim=axis, out=Location.of(tensors[0]).empty(shape, tensors[0].dtype))


def _with_rows(tensor: Tensor, num_rows: int, axis: int) -> list[int]:
    """Return the shape of a tensor with another number of rows."""
    return [*tensor.shape[:axis], num_rows, *tensor.shape[axis + 1 :]]
