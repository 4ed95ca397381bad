"""A monitor that notices changed weights, and a hash that names weights by content.

Before each evaluation a quick look compares the identity, `data_ptr`, `_version` and a strided sample of the content of
each parameter and buffer. It also compares the module tree, the state of adapters, configurations and replaced methods.
A write through `.data` keeps the version. The sample shows such writes if they touch many elements, as merging an
adapter does. The quick look misses `.data` writes to a few elements; `LM.refresh()` finds them by hashing all weights.
Tensors made in inference mode have no versions, so the quick look sums all of their bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor, nn
from transformers import PreTrainedModel

from backprompt.model.behaviour import UNIMPORTANT_CONFIG, BehaviourMonitor, describe_forwards
from backprompt.model.quantized import describe, is_special, numbers_of, special_weights
from backprompt.model.skeleton import is_foreign, is_rewritten_in_place, unwrap
from backprompt.model.spread import FileState, Offloaded, offloaded
from backprompt.progress import progress_bar

HASH_FORMAT = 2
"""Raise this number with every change to the results of `content_hash`: fingerprints are kept on disk."""

SAMPLES_PER_TENSOR = 16
PIECE_BYTES = 16 << 20
"""Part of the hash's format."""

_ADAPTER_STATE = ("_active_adapter", "merged_adapters", "_disable_adapters", "scaling")
_UNIMPORTANT_SETTINGS = frozenset({"compute_type_is_set", "gradient_checkpointing", "training"})


class PartsMonitor:
    """The parts of a model at one moment, without the numbers in them.

    The parts are modules, their methods, hooks and configurations, and tensors with their addresses.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        rewritten = [is_rewritten_in_place(module) for module in modules]
        named = list(zip(modules, rewritten, strict=True))
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._behaviour = BehaviourMonitor(model)
        self._offloaded = offloaded(model)
        self._sources = self._current_sources()
        self._names_elsewhere: dict[nn.Module, set[str]] = {}
        for weight in self._offloaded:
            self._names_elsewhere.setdefault(weight.module, set()).add(weight.name)
        self._children = [module._modules for module in modules]
        self._seen_children = list(map(dict, self._children))
        self._ordered = [children.values() for children in self._children if len(children) > 1]
        self._order = list(itertools.chain.from_iterable(self._ordered))
        self._tensors_in_place = _Tables(
            [
                *(self._own(module, module._parameters) for module in modules),
                *(self._own(module, module._buffers) for module, is_rewritten in named if not is_rewritten),
            ]
        )
        self._rewritten = [(module._buffers, len(module._buffers)) for module, is_rewritten in named if is_rewritten]
        self._special = special_weights(model)
        self._numbers = self._special_numbers()
        held = (number for _, _, tensor in _places(model) if not tensor.is_meta for number in numbers_of(tensor))
        self.tensors = list({id(number): number for number in held}.values())  # a tied weight has several places
        self.tensors += [source for source in self._sources if isinstance(source, Tensor)]
        self._pointers = _pointers(self.tensors)

    def have_changed(self) -> bool:
        """Return whether a part is another object, or lies at another address, than at construction."""
        return (
            self._children != self._seen_children  # modules are equal only to themselves
            or list(itertools.chain.from_iterable(self._ordered)) != self._order  # equal dicts may differ in it
            or self._tensors_in_place.have_changed()
            or (any(self._hooks) and any(is_foreign(hook) for hooks in self._hooks for hook in hooks.values()))
            or (self._rewritten and any(len(table) != num_before for table, num_before in self._rewritten))
            or (self._offloaded and not all(map(_is_same, self._current_sources(), self._sources)))
            or (bool(self._special) and not _are_same(self._special_numbers(), self._numbers))
            or _pointers(self.tensors) != self._pointers
            or self._behaviour.has_changed()
        )

    def _current_sources(self) -> list[object]:
        return [weight.source() for weight in self._offloaded]

    def _special_numbers(self) -> list[Tensor]:
        return [number for weight in self._special for number in numbers_of(weight)]

    def _own(self, module: nn.Module, table: Mapping[str, object]) -> Mapping[str, object]:
        """Return a module's table without offloaded weights: each plain call puts other tensors there."""
        names = self._names_elsewhere.get(module, set()) & table.keys()
        return _Without(table, names) if names else table


class WeightsMonitor:
    """The state of a model's weights at one moment, and a check whether it has changed.

    The check runs before every evaluation, so all compared values lie in flat lists.

    Attributes:
        parts: the parts of the model.
        adapters: the active adapters of each layer, the merged ones, and their scales.

    """

    def __init__(self, model: nn.Module) -> None:
        self.parts = PartsMonitor(model)
        self._versioned = [tensor for tensor in self.parts.tensors if not tensor.is_inference()]
        self._unversioned = [tensor for tensor in self.parts.tensors if tensor.is_inference()]
        self._sums = _sums(self._unversioned)
        self._versions = _versions(self._versioned)
        self._adapted = [module for module in model.modules() if "merged_adapters" in module.__dict__]
        self.adapters = tuple(map(_adapter_state, self._adapted))
        self._sample = _Sample(self.parts.tensors)

    def has_changed(self) -> bool:
        """Return whether a quick look finds a difference from the state at construction."""
        return (
            self.has_moved()
            or self._sample.has_changed()
            or (bool(self._unversioned) and _sums(self._unversioned) != self._sums)
        )

    def look(self) -> Tensor | None:
        """Return whether the sample is the same as at construction, `()`, bool, without waiting for the device.

        None if only the host can tell.
        """
        return None if self._unversioned else self._sample.look()

    def has_moved(self) -> bool:
        """Return whether parts, versions or adapters have changed. No number is read, so no device is waited for."""
        return (
            self.parts.have_changed()
            or _versions(self._versioned) != self._versions
            or (bool(self._adapted) and tuple(map(_adapter_state, self._adapted)) != self.adapters)
        )


def _are_same(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    return len(tensors) == len(before) and all(map(operator.is_, tensors, before))


def _is_same(source: object, before: object) -> bool:
    """Return whether the numbers of an offloaded weight still lie in the same tensor, or in an unchanged file."""
    return source is before or (isinstance(source, FileState) and source == before)


class _Without(Mapping[str, object]):
    """A table without some names."""

    def __init__(self, table: Mapping[str, object], names: Set[str]) -> None:
        self._table = table
        self._names = names

    def __getitem__(self, name: str) -> object:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._table if name not in self._names)

    def __len__(self) -> int:
        return len(self._table) - len(self._names)


class _Tables:
    """The elements of some tables at one moment, by identity: the parameters or buffers of modules."""

    def __init__(self, tables: Sequence[Mapping[str, object]]) -> None:
        self._empty = [table for table in tables if not table]
        self._tables = [table for table in tables if table]
        self._lengths = list(map(len, self._tables))
        self._values = [table.values() for table in self._tables]  # they show later changes
        self._contents = list(itertools.chain.from_iterable(self._values))

    def have_changed(self) -> bool:
        """Return whether an element is another object, or has another place."""
        if any(self._empty) or list(map(len, self._tables)) != self._lengths:
            return True
        return not all(map(operator.is_, itertools.chain.from_iterable(self._values), self._contents))


class _Sample:
    """Some elements of each tensor, as bytes.

    Elements on the CPU are read by numpy, all of a size at once: torch takes longer for each tensor than numpy for all.
    The arrays keep the tensors' memory alive. So callers must first check that no tensor has got other or resized
    memory.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        groups = _sample_views(tensors)
        plain = [_as_array(view) for views in groups for view in views if _is_plain(view)]
        self._scattered = [_Scattered([a for a in plain if a.itemsize == size]) for size in {a.itemsize for a in plain}]
        rest = ([view for view in views if not _is_plain(view)] for views in groups)
        self._views = [views for views in rest if views]
        self._bytes, self._elsewhere = self._take_bytes(), self._take_elsewhere()

    def has_changed(self) -> bool:
        """Return whether an element is another one now."""
        return self._take_bytes() != self._bytes or (
            bool(self._views) and not all(map(torch.equal, self._take_elsewhere(), self._elsewhere))
        )

    def look(self) -> Tensor | None:
        """Return whether all elements are the same, `()`, bool; None unless all of them lie on one other device."""
        if self._scattered or len(self._elsewhere) != 1:
            return None
        return (self._take_elsewhere()[0] == self._elsewhere[0]).all()

    def _take_bytes(self) -> bytes:
        return b"".join([scattered.read() for scattered in self._scattered])

    def _take_elsewhere(self) -> list[Tensor]:
        """Return the bytes that numpy cannot read, one tensor for each device: each comparison waits for its device."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for views in self._views:
            by_device.setdefault(views[0].device, []).append(torch.cat(views).view(torch.uint8))
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in by_device.values()]


class _Scattered:
    """The elements of several aligned arrays of one type, read as elements of one array from the lowest address on."""

    def __init__(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        self._arrays = arrays  # their memory is read
        addresses = np.concatenate([a.ctypes.data + a.strides[0] * np.arange(len(a)) for a in arrays])
        first = min(arrays, key=lambda array: array.ctypes.data)
        self._index = (addresses - first.ctypes.data) // first.itemsize
        self._from_first = as_strided(first, (self._index.max() + 1,), (first.itemsize,), writeable=False)

    def read(self) -> bytes:
        """Return the elements as they are now."""
        return self._from_first.take(self._index).tobytes()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer types, by their bytes."""


def _is_plain(view: Tensor) -> bool:
    """Return whether numpy can read a view."""
    has_numbers = type(view) is Tensor and view.device.type == "cpu" and not view.is_quantized
    return has_numbers and view.itemsize in _INTEGERS and view.data_ptr() % view.itemsize == 0


def _as_array(view: Tensor) -> npt.NDArray[Any]:
    """Return a view as an array of integers; `Tensor.numpy` would forbid the user to resize the tensor's memory."""
    return np.from_dlpack(view.view(_INTEGERS[view.itemsize]))


_version_of = operator.attrgetter("_version")


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(_version_of, tensors))


def _sums(tensors: Iterable[Tensor]) -> list[float]:
    """Return the sum of the bytes of each tensor, read as integers: it serves as the version of an inference tensor.

    Each of these tensors is read in full.
    """
    with torch.inference_mode():
        sums = [_as_integers(tensor).sum(dtype=torch.int64) for tensor in tensors]
        return [of.item() for of in sums]


def _as_integers(tensor: Tensor) -> Tensor:
    flat = _plain(tensor).contiguous().view(-1)
    return flat.view(torch.int64 if flat.nbytes % 8 == 0 and flat.storage_offset() == 0 else torch.uint8)


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def content_hash(model: nn.Module) -> str:
    """Return the SHA-256, as hex, of all data that decides a model's results.

    Every weight is read once, on as many threads as torch has: hashing releases the interpreter lock.
    """
    elsewhere = {id(weight.like): weight for weight in offloaded(model)}
    tensors = _distinct_tensors(model)
    digests: list[bytes] = []
    with (
        ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool,
        progress_bar(sum(tensor.nbytes for tensor in tensors), "hashing weights", "bytes") as bar,
    ):
        for portion in _portions(tensors, elsewhere):
            pieces = [piece for tensor in portion for piece in _pieces(tensor)]
            for piece, digest in zip(pieces, pool.map(_digest, pieces), strict=True):
                digests.append(digest)
                bar.update(piece.nbytes)
    return _hash_described(model, digests)


def sample_hash(model: nn.Module) -> str:
    """Return a hash like `content_hash`, but of only a sample of each parameter; takes milliseconds.

    The hash distinguishes models of one shape from different trainings. Buffers are hashed in full: another machine
    may compute other buffers on loading.
    """
    causal_model = unwrap(model)
    buffers = {id(number) for buffer in causal_model.buffers() for number in numbers_of(buffer)}
    tensors = _distinct_tensors(model)
    samples = [torch.cat(views) for views in _sample_views(tensors)]
    return _hash_described(model, map(_digest, [*samples, *(t for t in tensors if id(t) in buffers)]))


def _hash_described(model: nn.Module, digests: Iterable[bytes]) -> str:
    """Return the SHA-256 of a model's description and of the digests of its numbers."""
    causal_model = unwrap(model)
    config: Any = causal_model.config
    described = sorted((key, repr(value)) for key, value in config.to_dict().items() if key not in UNIMPORTANT_CONFIG)
    adapters = [_adapter_state(module) for module in model.modules() if "merged_adapters" in module.__dict__]
    settings = [
        _settings(module)
        for module in causal_model.modules()
        if not isinstance(module, PreTrainedModel) and not is_rewritten_in_place(module)
    ]
    names = {id(tensor): name for name, tensor in (*causal_model.named_parameters(), *causal_model.named_buffers())}
    # A tied weight is named here at each of its places; its numbers are hashed once.
    tensors = [(names[id(t)], tuple(t.shape), str(t.dtype)) for _, _, t in _places(causal_model)]
    quantized = [(names[id(t)], describe(t)) for _, _, t in _places(causal_model) if is_special(t)]
    description: tuple[object, ...] = (
        *(HASH_FORMAT, type(causal_model).__qualname__, described, adapters, settings, tensors),
        *describe_forwards(causal_model),
        *quantized,
    )
    return hashlib.sha256(repr(description).encode() + b"".join(digests)).hexdigest()


def _distinct_tensors(model: nn.Module) -> list[Tensor]:
    numbers = (number for _, _, tensor in _places(unwrap(model)) for number in numbers_of(tensor))
    return list({id(number): number for number in numbers}.values())


def _portions(tensors: Iterable[Tensor], elsewhere: Mapping[int, Offloaded]) -> Iterator[list[Tensor]]:
    """Yield the tensors with their numbers, in order. Each offloaded tensor comes alone, so that it is soon freed."""
    for is_elsewhere, group in itertools.groupby(tensors, key=lambda tensor: id(tensor) in elsewhere):
        if is_elsewhere:
            yield from ([elsewhere[id(tensor)].load()] for tensor in group)
        else:
            yield list(group)


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor's numbers as a plain view, which shows later writes."""
    if not is_special(tensor):
        return tensor.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Cut a tensor, rows at a time, into views of about `PIECE_BYTES`, to be hashed in parallel."""
    rows = _plain(tensor) if tensor.dim() else _plain(tensor)[None]
    return torch.split(rows, max(1, PIECE_BYTES * len(rows) // max(1, rows.nbytes)))


def _digest(piece: Tensor) -> bytes:
    data = piece.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(data.data).digest()


def _places(model: nn.Module) -> Iterator[tuple[Mapping[str, Tensor | None], str, Tensor]]:
    """Yield the place of each parameter and buffer, except for buffers that the model rewrites while it runs."""
    for module in model.modules():
        tables: list[Mapping[str, Tensor | None]] = (
            [module._parameters] if is_rewritten_in_place(module) else [module._parameters, module._buffers]
        )
        for table in tables:
            yield from ((table, name, tensor) for name, tensor in table.items() if tensor is not None)


def _adapter_state(module: nn.Module) -> str:
    """Return the active adapters of a layer, the merged ones, and their scales."""
    return repr([(name, module.__dict__.get(name)) for name in _ADAPTER_STATE])


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    """Return a module's plain attributes, such as a scaling, which its code may read besides tensors."""
    return sorted(
        (name, value)
        for name, value in module.__dict__.items()
        if isinstance(value, (bool, int, float, str)) and name[0] != "_" and name not in _UNIMPORTANT_SETTINGS
    )


def _sample_views(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return a strided view of each tensor, grouped by dtype and device; views show later writes."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        view = _plain(tensor)
        if view.is_contiguous():
            view = view.view(-1)
        while view.dim() > 1:  # along the longest axis
            view = view.select(min(range(view.dim()), key=lambda axis: view.shape[axis]), 0)
        view = view.reshape(-1)
        if view.numel():
            stride = -(-view.numel() // SAMPLES_PER_TENSOR)
            groups.setdefault((tensor.dtype, tensor.device), []).append(view[::stride])
    return list(groups.values())
