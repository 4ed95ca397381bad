"""Blocks of computed rows, which hold representations. Only this file knows the tensors of blocks and their axis of
tokens.

A pass leaves two blocks: `KeysValues`, for each layer the keys and values of all its rows, and `States`, their final
hidden states and log-probabilities. A computed span holds `BlockRows` of each, a range of rows. So splitting a span
moves no data, and spans of one pass share one allocation. A block is freed with the last span that refers to it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.forest.span import Span
from backprompt.logprobs import logprob_dtype
from backprompt.memory.location import Location
from backprompt.transfers import index_on, on_device

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
"""The axes of each kind of tensor. Keys and values have a tensor for each layer: "keys.0", "values.0", "keys.1" ..."""

STATE_TENSORS = frozenset({"hidden", "logprobs", "is_argmax", "has_logprobs"})
"""The tensors of `States`."""

IN_MODEL_DTYPE = frozenset({"keys", "values", "hidden"})
"""The kinds of tensors that are in the dtype of the model."""

SMALL_TENSOR_BYTES = 16 << 10
"""A block with smaller tensors counts as small: the overhead of 550 bytes for each tensor matters there."""


def kind_of(name: str) -> str:
    """Return the kind of a tensor, a key of `AXES`: "keys" for "keys.0"."""
    return name.partition(".")[0]


def token_axis(name: str) -> int:
    """Return the axis of tokens of a tensor."""
    return AXES[kind_of(name)].index("tokens")


@lru_cache(maxsize=1024)
def layer_names(layer_idx: int) -> tuple[str, str]:
    """Return the names of a layer's keys and values."""
    return f"keys.{layer_idx}", f"values.{layer_idx}"


@dataclass(frozen=True)
class Watch:
    """Changes of a tier's blocks, which the tier processes from time to time.

    Attributes:
        takers: spans that have begun to hold rows of a block.
        loose: blocks in use that also have rows that no span holds any more.

    """

    takers: dict[Span, None] = field(default_factory=dict)
    loose: set[Block] = field(default_factory=set)


class Block(ABC):
    """Rows of tensors, one row for each token. No tensor is a view of a larger one.

    Attributes:
        tensors: the tensors by their names in a store.
        row_bytes: bytes of a row.
        spans: the spans that hold rows of the block.
        num_held: the number of rows that these spans hold.
        watch: the watch of the tier that counts the block.

    """

    token_axis: ClassVar[int]
    """The axis of tokens, the same in all tensors of the block."""

    first_name: ClassVar[str]
    """The name of one of the large tensors."""

    on_host: ClassVar[frozenset[str]] = frozenset()
    """The tensors that always lie on the CPU, never page-locked: they do not move with the block."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.row_bytes = self.num_bytes // max(1, self.num_rows)
        self.spans: dict[Span, None] = {}
        self.num_held = 0
        self.watch: Watch | None = None
        self._addresses: npt.NDArray[np.int64] | None = None  # kept until the tensors are others

    def take(self, span: Span, num_rows: int) -> None:
        """Note that a span holds rows of the block. `num_rows`: the increase in the number of held rows."""
        self.num_held += num_rows
        if span not in self.spans:
            self.spans[span] = None
            if self.watch is not None:
                self.watch.takers[span] = None

    def take_more(self, num_rows: int) -> None:
        """Note that spans which hold rows of the block hold more rows of it."""
        self.num_held += num_rows

    def release(self, span: Span, num_rows: int) -> None:
        """Note that a span no longer holds its rows of the block."""
        self.spans.pop(span, None)
        self.num_held -= num_rows
        if self.watch is None:
            return
        if self.spans:
            self.watch.loose.add(self)
        else:
            self.watch.loose.discard(self)  # the block may be freed

    @property
    def num_rows(self) -> int:
        """The number of tokens."""
        return self.tensors[self.first_name].shape[self.token_axis]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum([tensor.nbytes for tensor in self.tensors.values()])

    @property
    def num_unheld_bytes(self) -> int:
        """Bytes of the rows that no span holds."""
        return self.row_bytes * (self.num_rows - self.num_held)

    def bytes_of(self, start: int, stop: int) -> int:
        """Return the bytes of the rows `start..stop`."""
        return self.row_bytes * (stop - start)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one of the large tensors."""
        return self.tensors[self.first_name].nbytes

    @property
    def is_small(self) -> bool:
        """Whether the tensors are so small that their overhead matters."""
        return self.tensor_bytes < SMALL_TENSOR_BYTES

    def keep(self, pieces: Sequence[slice]) -> None:
        """Keep only these rows, in this order. Tensors are copied one by one, and each old tensor is freed at once."""
        self._addresses = None
        for name, tensor in self.tensors.items():
            self.tensors[name] = _picked(tensor, pieces, self.token_axis)

    def append(self, others: Sequence[Self]) -> None:
        """Append the rows of other blocks, in order. The blocks have this block's kind and location."""
        self._addresses = None
        for name, tensor in self.tensors.items():
            self.tensors[name] = _side_by_side([tensor, *(other.tensors[name] for other in others)], self.token_axis)

    def copied(self, pieces: Sequence[slice], location: Location | None = None) -> Self:
        """Return a new block of these rows, in this order, by default at this block's location: one copy per tensor."""
        return type(self)({name: self._copied(name, pieces, location) for name in self.tensors})

    def _copied(self, name: str, pieces: Sequence[slice], location: Location | None) -> Tensor:
        tensor = self.tensors[name]
        rows = _picked(tensor, pieces, self.token_axis)
        if rows is not tensor and (location is None or name in self.on_host):
            return rows  # a copy already
        if name in self.on_host:
            return rows.clone()
        return (Location.of(tensor) if location is None else location.of_tensor(name)).copy(rows)

    def zeros(self, num_rows: int) -> Self:
        """Return a block of `num_rows` rows of zeros, with the same shapes and location."""
        return type(self)(
            {
                name: Location.of(tensor).empty(_with_rows(tensor, num_rows, self.token_axis), tensor.dtype).zero_()
                for name, tensor in self.tensors.items()
            }
        )

    def copy_rows_to(self, other: Self, sources: npt.NDArray[np.int64] | None, targets: npt.NDArray[np.int64]) -> None:
        """Copy the rows `sources` to the rows `targets` of another block of the same kind, or of this block.

        `sources` None: all rows, in order.
        """
        places: dict[torch.device, tuple[Tensor | None, Tensor]] = {}  # moved once to each device
        for name, tensor in self.tensors.items():
            if tensor.device not in places:
                own = None if sources is None else on_device(sources, tensor.device)
                places[tensor.device] = own, on_device(targets, tensor.device)
            own_sources, own_targets = places[tensor.device]
            rows = tensor if own_sources is None else tensor.index_select(self.token_axis, own_sources)
            other.tensors[name].index_copy_(self.token_axis, own_targets, rows)


class KeysValues(Block):
    """Keys and values of consecutive rows, for each layer as in `AXES`, with positions already encoded."""

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
        """The number of layers with attention."""
        return len(self.tensors) // 2

    def layer(self, layer_idx: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return views of the keys and values of some rows of a layer, shaped as in `of`."""
        keys, values = layer_names(layer_idx)
        return self.tensors[keys][:, rows], self.tensors[values][:, rows]

    def first_rows(self, num_rows: int) -> KeysValues:
        """Return views of the first rows."""
        return KeysValues({name: tensor[:, :num_rows] for name, tensor in self.tensors.items()})

    def in_order(self) -> list[Tensor]:
        """Return the keys and the values of each layer in turn."""
        return [self.tensors[name] for idx in range(self.num_layers) for name in layer_names(idx)]

    def addresses(self) -> npt.NDArray[np.int64]:
        """Return each layer's addresses of keys and of values, and the stride between heads in elements, `(layers, 3)`.

        The rows of a head are contiguous. The addresses are valid until the block changes or moves.
        """
        if self._addresses is None:
            tensors = self.in_order()
            pairs = zip(tensors[::2], tensors[1::2], strict=True)
            found = [(keys.data_ptr(), values.data_ptr(), keys.stride(0)) for keys, values in pairs]
            self._addresses = np.array(found, dtype=np.int64).reshape(-1, 3)
        return self._addresses


class States(Block):
    """Final hidden states of rows, from which logits are computed, and the log-probabilities computed so far."""

    token_axis = 0
    first_name = "hidden"
    on_host = frozenset({"has_logprobs"})

    @classmethod
    def of(cls, hidden: Tensor) -> States:
        """Return states without log-probabilities; `hidden`: the input of the output head, `(tokens, hidden)`."""
        num_rows = hidden.shape[0]
        logprobs = torch.zeros(num_rows, dtype=logprob_dtype(hidden.dtype), device=hidden.device)
        is_argmax = torch.zeros(num_rows, dtype=torch.bool, device=hidden.device)
        has_logprobs = torch.zeros(num_rows, dtype=torch.bool, device="cpu")
        return cls({"hidden": hidden, "logprobs": logprobs, "is_argmax": is_argmax, "has_logprobs": has_logprobs})

    @classmethod
    def of_rows(cls, hidden: Tensor, pieces: Sequence[slice]) -> States:
        """Return states without log-probabilities of some rows, in this order; see `of`."""
        return cls.of(_picked(hidden, pieces, cls.token_axis))

    @classmethod
    def of_scored(cls, hidden: Tensor, logprobs: Tensor, is_argmax: Tensor) -> States:
        """Return states with log-probabilities; see `of`, `logprobs` and `is_argmax`."""
        has_logprobs = torch.ones(hidden.shape[0], dtype=torch.bool, device="cpu")
        return cls({"hidden": hidden, "logprobs": logprobs, "is_argmax": is_argmax, "has_logprobs": has_logprobs})

    @property
    def hidden(self) -> Tensor:
        """The input of the output head, `(tokens, hidden)`."""
        return self.tensors["hidden"]

    @property
    def logprobs(self) -> Tensor:
        """Log-probability of each row's token, `(tokens,)`, nats; float64 if `hidden` is, else float32."""
        return self.tensors["logprobs"]

    @property
    def is_argmax(self) -> Tensor:
        """Whether each row's token was the most probable, `(tokens,)`, bool."""
        return self.tensors["is_argmax"]

    @property
    def has_logprobs(self) -> Tensor:
        """Whether `logprobs` and `is_argmax` were computed for each row, `(tokens,)`, bool, on the CPU."""
        return self.tensors["has_logprobs"]

    def is_scored(self, start: int, stop: int) -> bool:
        """Return whether all tokens of the rows `start..stop` have a log-probability."""
        return bool(np.count_nonzero(self.has_logprobs.numpy()[start:stop]) == stop - start)

    def write_scores(self, rows: npt.NDArray[np.int64], logprobs: Tensor, is_argmax: Tensor) -> None:
        """Write `logprobs` and `is_argmax` of the rows with the indices `rows`; all three are `(rows,)`."""
        indices = index_on(rows, self.logprobs.device)
        self.logprobs[indices] = logprobs
        self.is_argmax[indices] = is_argmax
        self.has_logprobs.numpy()[rows] = True

    def note_unpredicted(self, rows: npt.NDArray[np.int64]) -> None:
        """Set the log-probabilities of rows whose tokens no row predicts to NaN; see `write_scores`."""
        self.logprobs[index_on(rows, self.logprobs.device)] = torch.nan
        self.has_logprobs.numpy()[rows] = True


BlockType = TypeVar("BlockType", bound=Block)


@dataclass(slots=True, unsafe_hash=True)
class BlockRows(Generic[BlockType]):
    """Rows `start..stop` of a block, without row `stop`: the place of a computed span's data.

    Never changed, so it has a hash. But not frozen: each span has two, and a frozen one takes three times as long to
    make.
    """

    block: BlockType
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """The rows' share of the block's bytes."""
        return self.block.bytes_of(self.start, self.stop)

    def split(self, num_tokens: int) -> tuple[BlockRows[BlockType], BlockRows[BlockType]]:
        """Return the first `num_tokens` rows and the others, without copying."""
        middle = self.start + num_tokens
        return BlockRows(self.block, self.start, middle), BlockRows(self.block, middle, self.stop)

    def with_next(self, others: BlockRows[BlockType]) -> BlockRows[BlockType] | None:
        """Return these rows and others as one range, without copying; None if the others do not directly follow."""
        is_next = self.block is others.block and self.stop == others.start
        return BlockRows(self.block, self.start, others.stop) if is_next else None

    def alone(self) -> BlockRows[BlockType]:
        """Return a copy of these rows, in a block of their own at the same location."""
        return BlockRows(self.block.copied([slice(self.start, self.stop)]), 0, self.stop - self.start)


def copy_rows(copies: Iterable[tuple[BlockRows[Any], Block, int]]) -> None:
    """Copy each range of rows into its target block, from the given row on.

    All ranges with the same source and the same target take one copy per tensor.
    """
    by_blocks: dict[tuple[Block, Block], list[tuple[int, int, int]]] = {}
    for rows, target, start in copies:
        by_blocks.setdefault((rows.block, target), []).append((rows.start, rows.stop - rows.start, start))
    for (block, target), parts in by_blocks.items():
        starts, lengths, targets = np.array(parts, dtype=np.int64).T
        within = np.arange(lengths.sum(), dtype=np.int64) - np.repeat(lengths.cumsum() - lengths, lengths)
        block.copy_rows_to(target, np.repeat(starts, lengths) + within, np.repeat(targets, lengths) + within)


def gather(rows: Iterable[BlockRows[Any]], name: str) -> Tensor:
    """Return the tensor `name` of rows of several blocks, concatenated along the tokens into a new tensor."""
    axis = token_axis(name)
    parts = [(part.block.tensors[name], part.start, part.stop - part.start) for part in rows]
    if len(parts) == 1:
        ((tensor, start, num_rows),) = parts
        return torch.narrow_copy(tensor, axis, start, num_rows)
    return torch.cat([tensor.narrow(axis, start, num_rows) for tensor, start, num_rows in parts], dim=axis)


def gather_each(rows: Sequence[BlockRows[Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each tensor of the blocks, with the result of `gather` for it."""
    yield from ((name, gather(rows, name)) for name in rows[0].block.tensors)


def gather_hidden(rows: Sequence[tuple[States, int]]) -> Tensor:
    """Return the hidden states of single rows, in the given order, `(rows, hidden)`."""
    by_block: dict[States, list[int]] = {}
    for idx, (block, _) in enumerate(rows):
        by_block.setdefault(block, []).append(idx)
    first = rows[0][0].hidden
    if len(by_block) == 1:
        return first[on_device(np.array([row for _, row in rows]), first.device)]
    hidden = first.new_empty((len(rows), first.shape[1]))
    for block, indices in by_block.items():
        targets, sources = on_device(np.array([indices, [rows[idx][1] for idx in indices]]), hidden.device)
        hidden[targets] = block.hidden[sources]
    return hidden


def keys_values_of(span: Span) -> BlockRows[KeysValues]:
    """Return the rows of the keys and values of a span that holds them."""
    rows = span.keys_values
    assert isinstance(rows, BlockRows), span
    return rows


def states_of(span: Span) -> BlockRows[States]:
    """Return the rows of the states of a span that holds them."""
    rows = span.states
    assert isinstance(rows, BlockRows), span
    return rows


def rows_of_each(spans: Sequence[Span]) -> tuple[list[BlockRows[KeysValues]], list[BlockRows[States]]]:
    """Return the rows of the keys and values, and of the states, of spans that hold both; without a call for each."""
    keys_values, states = [span.keys_values for span in spans], [span.states for span in spans]
    return cast("list[BlockRows[KeysValues]]", keys_values), cast("list[BlockRows[States]]", states)


def _picked(tensor: Tensor, pieces: Sequence[slice], axis: int) -> Tensor:
    """Return these rows of a tensor side by side, at its location; the tensor itself if these are all its rows."""
    num_rows = sum(piece.stop - piece.start for piece in pieces)
    if len(pieces) == 1 and num_rows == tensor.shape[axis]:
        return tensor
    parts = [tensor.narrow(axis, piece.start, piece.stop - piece.start) for piece in pieces]
    if parts:
        return _side_by_side(parts, axis)
    return Location.of(tensor).empty(_with_rows(tensor, num_rows, axis), tensor.dtype)


def _side_by_side(tensors: list[Tensor], axis: int) -> Tensor:
    """Return tensors as one, at their location."""
    shape = _with_rows(tensors[0], sum(tensor.shape[axis] for tensor in tensors), axis)
    return torch.cat(tensors, dim=axis, out=Location.of(tensors[0]).empty(shape, tensors[0].dtype))


def _with_rows(tensor: Tensor, num_rows: int, axis: int) -> list[int]:
    """Return the shape of a tensor with another number of rows."""
    return [*tensor.shape[:axis], num_rows, *tensor.shape[axis + 1 :]]
