"""The form of the cache that a model's own `forward` takes and returns: which tensors grow, and which are states.

A cache is any object of tensors: a `DynamicCache`, a class of the model's own file, a list. Three small calls, which
differ in the number of texts and the number of tokens, show the kind of each tensor in it:

- *rows*: one axis grows with the tokens. Examples are keys and values, compressed ones, and the keys of an indexer.
  Each token has a row, as in the keys and values of packed models (memory/blocks.py).
- *states*: no axis grows. Examples are recurrent and convolution states, each of which represents all tokens so far.
  The states of a text side by side, as bytes, are its *snapshot* (memory/snapshots.py).
- *counters*: whole numbers that go up by one for each token. All other values in a cache are constant.

A cache for a batch is built of these parts. Layers that keep a sliding window of keys are replaced by layers that keep
all keys; the model's mask hides the keys outside the window.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicCache

from backprompt.errors import UnsupportedModelError

KEYS_VALUES_NAMES = ("past_key_values", "cache")
"""The names under which a `forward` takes and returns keys and values: `cache` since transformers 5.24."""

_NAMES = (*KEYS_VALUES_NAMES, "cache_params", "state")
"""The names under which a `forward` takes and returns its cache."""

_FULL_LAYERS: Mapping[type, type] = {
    getattr(cache_utils, forgetful): getattr(cache_utils, full)
    for forgetful, full in (
        ("DynamicSlidingWindowLayer", "DynamicLayer"),
        ("LinearAttentionAndSlidingWindowAttentionLayer", "LinearAttentionAndFullAttentionLayer"),  # since 5.15
    )
    if hasattr(cache_utils, forgetful)
}
"""For each class of layers that forget keys, the class that keeps them."""

_NUM_TOKENS, _MORE_TOKENS = 5, 7
_MAX_DEPTH = 8
_ALIGNMENT = 16
"""States begin at multiples of this many bytes of a snapshot."""

Path: TypeAlias = "tuple[object, ...]"
"""The place of a value in a cache: keys, indices and names of attributes on the way to it."""


class CacheError(UnsupportedModelError):
    """A cache that cannot be taken apart and put together again; the message says why."""


@dataclass(frozen=True)
class RowTensor:
    """A tensor of a cache that has a row for each token.

    Attributes:
        path: its place.
        batch_axis, token_axis, num_axes: its axes.
        num_each: the size that each text takes of the batch axis; more than one if heads are part of this axis.

    """

    path: Path
    batch_axis: int
    token_axis: int
    num_axes: int
    num_each: int

    def as_rows(self, tensor: Tensor) -> Tensor:
        """Return a view or a copy as `(texts, heads, tokens, size)`."""
        if (self.batch_axis, self.token_axis, self.num_axes, self.num_each) == (0, 2, 4, 1):
            return tensor
        rows = tensor.movedim((self.batch_axis, self.token_axis), (0, 1))
        rows = rows.reshape(-1, self.num_each, *rows.shape[1:])
        return rows.reshape(*rows.shape[:3], -1)

    def from_rows(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the cache's tensor; `sizes`: the sizes of its axes in order, those of batch and tokens left out."""
        if (self.batch_axis, self.token_axis, self.num_axes, self.num_each) == (0, 2, 4, 1):
            return rows
        rows = rows.reshape(-1, rows.shape[2], *sizes)
        return rows.movedim((0, 1), (self.batch_axis, self.token_axis)).contiguous()


@dataclass(frozen=True)
class StateTensor:
    """A tensor of a cache that represents all tokens so far.

    Attributes:
        path: its place.
        batch_axis: the axis of texts.
        shape: its shape for one text, the axis of texts first.
        dtype: its dtype.
        start, stop: its bytes in a snapshot.

    """

    path: Path
    batch_axis: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int

    def as_bytes(self, tensor: Tensor) -> Tensor:
        """Return the numbers of each text as bytes, `(texts, bytes)`, padded to a multiple of the alignment."""
        own = tensor.movedim(self.batch_axis, 0)
        if own.shape[1:] != self.shape[1:]:
            raise CacheError("its cache has states of other sizes for other texts")
        numbers = own.reshape(own.shape[0] // self.shape[0], -1).contiguous().view(torch.uint8)
        return nn.functional.pad(numbers, (0, self.stop - self.start - numbers.shape[1]))

    def from_bytes(self, snapshots: Tensor) -> Tensor:
        """Return the cache's tensor for several texts, in storage of its own; `snapshots`: `(texts, bytes)`."""
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        numbers = snapshots[:, self.start : self.start + num_bytes].clone().view(self.dtype)
        return numbers.reshape(-1, *self.shape[1:]).movedim(0, self.batch_axis).contiguous()


@dataclass(frozen=True)
class CacheForm:
    """The form of a model's cache.

    Attributes:
        name: the name under which `forward` takes the cache, and under which its output has it.
        rows, states: the tensors, see the top of this file.
        sizes: for each of `rows`, the sizes of its axes, those of batch and tokens left out.
        counters: whole numbers, by place, with their values for no tokens.
        tensor_counters: the same for numbers that lie in a tensor.
        template: a cache without rows and states.
        empty: an empty cache, a copy of which begins each text; None if the model makes its own.
        snapshot_bytes: the bytes of a snapshot.

    """

    name: str
    rows: tuple[RowTensor, ...]
    states: tuple[StateTensor, ...]
    sizes: tuple[tuple[int, ...], ...]
    counters: Mapping[Path, int]
    tensor_counters: Mapping[Path, Tensor]
    template: object
    empty: DynamicCache | None
    snapshot_bytes: int

    def begun(self) -> object:
        """Return the cache with which texts begin; None if the model makes its own."""
        return _empty_like(self.empty)

    def built(self, rows: Sequence[Tensor], snapshots: Tensor | None, num_tokens: int) -> object:
        """Return a new cache of several texts of the same length.

        Args:
            rows: for each of `self.rows`, `(texts, heads, tokens, size)`.
            snapshots: `(texts, bytes)`; None for a model without states.
            num_tokens: the number of tokens.

        """
        values: dict[Path, object] = {
            form.path: form.from_rows(tensor, sizes)
            for form, tensor, sizes in zip(self.rows, rows, self.sizes, strict=True)
        }
        if snapshots is not None:
            values |= {form.path: form.from_bytes(snapshots) for form in self.states}
        values |= {path: number + num_tokens for path, number in self.counters.items()}
        values |= {path: number + num_tokens for path, number in self.tensor_counters.items()}
        return _with_leaves(self.template, values)

    def rows_of(self, cache: object, num_tokens: int) -> list[Tensor]:
        """Return the rows of all texts of a cache, for each of `self.rows` `(texts, heads, tokens, size)`."""
        values = dict(_leaves(cache))
        found = [form.as_rows(_tensor(values, form.path)) for form in self.rows]
        if any(rows.shape[2] != num_tokens for rows in found):
            raise CacheError("its cache does not keep a row for each token of a longer text")
        return found

    def snapshots_of(self, cache: object) -> Tensor:
        """Return the snapshots of all texts of a cache, `(texts, bytes)`, in storage of their own."""
        values = dict(_leaves(cache))
        return torch.cat([form.as_bytes(_tensor(values, form.path)) for form in self.states], dim=1)

    def kinds_of_states(self) -> list[tuple[StateTensor, ...]]:
        """Return the states by kind, such as all layers' convolution states and all layers' recurrent states."""
        kinds: dict[object, list[StateTensor]] = {}
        for form in self.states:
            name = next((part for part in reversed(form.path) if isinstance(part, str)), None)
            kinds.setdefault(form.path if name is None else name, []).append(form)
        return [tuple(forms) for forms in kinds.values()]


class Body:
    """A model's body with its own attention, called with the cache that its `forward` takes.

    Args:
        body: the model without its head.
        device: the device of token ids.

    Attributes:
        takes_positions: whether calls give the positions of the tokens. Without positions, some models count from 0
            behind a cache; others count positions in a way of their own.

    """

    def __init__(self, body: nn.Module, device: torch.device) -> None:
        self._body = body
        self._device = device
        parameters = inspect.signature(body.forward).parameters
        self.name = next((name for name in _NAMES if name in parameters), None)
        self.takes_positions = "position_ids" in parameters

    def call(self, token_ids: Sequence[Sequence[int]], cache: object, num_before: int = 0) -> tuple[Tensor, object]:
        """Forward tokens behind a cache; return final hidden states, `(texts, tokens, hidden)`, and the cache.

        The given cache has `num_before` tokens, and cannot be used afterwards. Without a cache, the texts begin here.
        """
        assert self.name is not None
        ids = torch.tensor(token_ids, device=self._device)
        keywords: dict[str, object] = {self.name: cache}
        if self.takes_positions:
            keywords["position_ids"] = torch.arange(num_before, num_before + ids.shape[1], device=ids.device).expand_as(
                ids
            )
        output: Any = self._body(input_ids=ids, use_cache=True, **keywords)
        return output.last_hidden_state, getattr(output, self.name, None)

    def form(self, token_id: int) -> CacheForm:
        """Find out the form of the cache by small calls.

        Raises:
            CacheError: there is no cache, or its form is unknown.

        """
        if self.name is None:
            raise CacheError("its forward takes no cache")
        _, cache = self.call([[token_id]], None)
        empty = _empty_like(cache)
        caches = [
            self.call([[token_id] * num_tokens] * num_texts, _empty_like(empty))[1]
            for num_texts, num_tokens in ((1, _NUM_TOKENS), (2, _NUM_TOKENS), (1, _MORE_TOKENS))
        ]
        form = _form_of(self.name, empty, *caches)
        if form.states:
            form.snapshots_of(cache)  # raises if a state grows while tokens are few, as a window of keys does
        return form


def _empty_like(cache: object) -> DynamicCache | None:
    """Return an empty cache with the layers of another, which keep all keys; None for a class of the model's own."""
    if type(cache) is not DynamicCache or any(
        type(layer).__module__ != DynamicCache.__module__ for layer in cache.layers
    ):
        return None
    made = copy.copy(cache)
    made.layers = [
        _FULL_LAYERS.get(type(layer), type(layer))(number_of_states=getattr(layer, "number_of_states", 1))
        for layer in cache.layers
    ]
    if made.layer_class_to_replicate is not None:
        made.layers = []
        made.layer_class_to_replicate = _FULL_LAYERS.get(made.layer_class_to_replicate, made.layer_class_to_replicate)
    return made


def _form_of(name: str, empty: DynamicCache | None, one: object, two: object, longer: object) -> CacheForm:
    """Return the form of caches of one text, of two, and of one that is longer."""
    values, of_two, of_longer = (dict(_leaves(cache)) for cache in (one, two, longer))
    if not values or values.keys() != of_two.keys() or values.keys() != of_longer.keys():
        raise CacheError("its forward returns no cache that always has the same parts")
    rows: list[RowTensor] = []
    states: list[StateTensor] = []
    sizes: list[tuple[int, ...]] = []
    counters: dict[Path, int] = {}
    tensor_counters: dict[Path, Tensor] = {}
    start = 0
    for path, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool):
            if _is_counter(path, value, of_longer[path]):
                counters[path] = value - _NUM_TOKENS
            continue
        if not isinstance(value, Tensor):
            continue
        batch_axis, token_axis = _grown_axis(value, of_two[path]), _grown_axis(value, of_longer[path])
        if batch_axis is None:
            if value.numel() != 1:
                raise CacheError("its cache has tensors that all texts of a batch share")
            if _is_counter(path, value.item(), _tensor(of_longer, path).item()):
                tensor_counters[path] = value - _NUM_TOKENS
        elif token_axis is None:
            own = value.movedim(batch_axis, 0)
            stop = start + -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
            states.append(StateTensor(path, batch_axis, tuple(own.shape), value.dtype, start, stop))
            start = stop
        elif value.shape[token_axis] != _NUM_TOKENS:
            raise CacheError("its cache does not keep a row for each token")
        else:
            rows.append(RowTensor(path, batch_axis, token_axis, value.ndim, value.shape[batch_axis]))
            sizes.append(tuple(size for axis, size in enumerate(value.shape) if axis not in (batch_axis, token_axis)))
    if not rows and not states:
        raise CacheError("its forward returns an empty cache")
    grown = [form.path for form in rows] + [form.path for form in states]
    template = _with_leaves(one, dict.fromkeys(grown))
    return CacheForm(name, tuple(rows), tuple(states), tuple(sizes), counters, tensor_counters, template, empty, start)


def _is_counter(path: Path, value: float, of_longer: Any) -> bool:
    """Return whether a number counts tokens.

    Raises:
        CacheError: the number changes in another way.

    """
    change = of_longer - value
    if change not in (0, _MORE_TOKENS - _NUM_TOKENS):
        raise CacheError(f"its cache has a changing number that does not count tokens ({'.'.join(map(str, path))})")
    return bool(change)


def _grown_axis(value: Tensor, other: object) -> int | None:
    """Return the axis along which another tensor of a cache is larger; None if there is none."""
    if not isinstance(other, Tensor) or other.ndim != value.ndim or other.dtype != value.dtype:
        raise CacheError("its cache has tensors of other kinds for other texts")
    axes = [axis for axis, (own, more) in enumerate(zip(value.shape, other.shape, strict=True)) if own != more]
    if len(axes) > 1:
        raise CacheError("its cache has tensors that grow in two ways")
    return axes[0] if axes else None


def _tensor(values: Mapping[Path, object], path: Path) -> Tensor:
    value = values.get(path)
    if not isinstance(value, Tensor):
        raise CacheError("its cache has other parts for other texts")
    return value


def _parts(value: object, depth: int) -> list[tuple[object, Any]] | None:
    """Return the named parts of a container, None for a value that stays whole."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, (type, nn.Module, PreTrainedConfig)) or not hasattr(value, "__dict__"):
        return None
    return list(vars(value).items()) if type(value).__module__.startswith("transformers") else None


def _leaves(value: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Yield the values of a cache with their places."""
    parts = _parts(value, len(path))
    if parts is None:
        yield path, value
        return
    for key, part in parts:
        yield from _leaves(part, (*path, key))


def _with_leaves(value: object, leaves: Mapping[Path, object], path: Path = ()) -> object:
    """Return a copy of a cache with other values in some places."""
    parts = _parts(value, len(path))
    if parts is None:
        return leaves.get(path, value)
    made = [(key, _with_leaves(part, leaves, (*path, key))) for key, part in parts]
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update(made)
        return copied
    if isinstance(value, list):
        return [part for _, part in made]
    if isinstance(value, tuple):
        return tuple(part for _, part in made)
    part = copy.copy(value)
    vars(part).update(made)  # type: ignore[arg-type]
    return part
