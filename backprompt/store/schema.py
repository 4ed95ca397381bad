"""The format of an entry. Readers compare an entry with this format before they read or use its data.

An entry of T tokens has these tensors, with the same number of layers for keys and for values, and no others:

    hidden                     (T, hidden)                  floating point
    logprobs                   (T,)                         float32 or float64
    has_logprobs, is_argmax    (T,)                         bool; old entries lack `is_argmax`
    keys.0, keys.1, ...        (kv_heads, T, head_dim)      floating point
    values.0, values.1, ...    (kv_heads, T, value_dim)     floating point

    snapshot                   (bytes,)                     uint8, only where the model has recurrent states

In a store of reduced precision (precision.py) floating-point tensors may be float16; with "int8", keys and values may
be int8, each with its scales: "keys.0.scale", (kv_heads, T, 1), float32.

An entry of any other form counts as damaged. Wrong numbers in tensors of the right shapes cannot be detected: a store
is only as trustworthy as the people who can write to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from backprompt.errors import DamagedEntryError
from backprompt.forest.keys import EXACT
from backprompt.memory.blocks import AXES, IN_MODEL_DTYPE, STATE_TENSORS, kind_of, layer_names, token_axis
from backprompt.store.base import MAX_INT, Header
from backprompt.store.precision import COMPUTED_DTYPES, SCALE, STORED_DTYPES
from backprompt.visible import abbreviated

MAX_NAME_LENGTH = 200
"""The longest name of an entry, so that it can be a file name."""

_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_NAME_LENGTH}}}")
_WORDS = re.compile(r"[ -~]{1,200}")
SNAPSHOT = "snapshot"
"""The name of the tensor with a model's recurrent states behind the last token."""

_LAYER = re.compile(r"(keys|values)\.(0|[1-9][0-9]{0,5})")
_OPTIONAL = frozenset({"is_argmax"})
_FLOATS = frozenset(COMPUTED_DTYPES.values())


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Return the dtype and shape of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_name(name: object) -> bool:
    """Return whether the value can be the name of an entry."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_header(header: Header) -> None:
    """Raise for a header that no entry can have.

    Raises:
        DamagedEntryError: a field has a wrong type, or a value out of its range.

    """
    if not (is_name(header.start) and is_name(header.end) and is_name(header.name)):
        raise DamagedEntryError("its start or its end is not a key")
    if not isinstance(header.behind, tuple) or not all(map(is_name, header.behind)):
        raise DamagedEntryError("its field behind is not a list of names")
    if not _is_index(header.position):
        raise DamagedEntryError("its position is not a number from 0 to 2**63 - 1")
    if not isinstance(header.token_ids, tuple) or not header.token_ids or not all(map(_is_index, header.token_ids)):
        raise DamagedEntryError("its token ids are not numbers from 0 to 2**63 - 1")
    if header.position + len(header.token_ids) > MAX_INT:
        raise DamagedEntryError("its position is not a number from 0 to 2**63 - 1")
    if not isinstance(header.text, str):
        raise DamagedEntryError("its text is not a string")
    words = (header.model, header.tokenizer, header.dtype)
    if not all(isinstance(word, str) and _WORDS.fullmatch(word) for word in words):
        raise DamagedEntryError("its model, tokenizer or dtype is not a name")
    if type(header.error) is not float or not 0 <= header.error < math.inf:
        raise DamagedEntryError("its error is not a finite number of at least 0")
    _check_precision(header)


def check_tensors(
    header: Header, found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec] | None = None
) -> None:
    """Raise for tensors that an entry with this header cannot have.

    Args:
        header: the header, already checked.
        found: the dtypes and shapes in the entry.
        expected: the dtypes and shapes that the model computes for these tokens, for all tensors or for the requested
            ones; by default those that any model may compute.

    Raises:
        DamagedEntryError: a tensor is missing or superfluous, or has another shape or dtype.

    """
    found = dict(found)
    _check_snapshot(found.pop(SNAPSHOT, None), expected)
    expected = None if expected is None else {name: spec for name, spec in expected.items() if name != SNAPSHOT}
    scales = {name: spec for name, spec in found.items() if isinstance(name, str) and name.endswith(SCALE)}
    tensors = {name: spec for name, spec in found.items() if name not in scales}
    _check_names(tensors, _names_of_any_model(tensors) if expected is None else frozenset(expected))
    for name in scales:
        if name.removesuffix(SCALE) not in tensors:
            raise DamagedEntryError(f"a scale belongs to no tensor: {abbreviated(str(name))}")
    for name, spec in tensors.items():
        _check_shape(header, name, spec, None if expected is None else expected[name])
        _check_dtype(header, name, spec, None if expected is None else expected[name])
        _check_scale(header, name, spec, scales.get(name + SCALE))


def _check_snapshot(found: TensorSpec | None, expected: Mapping[str, TensorSpec] | None) -> None:
    """Raise for a snapshot that an entry cannot have; an entry may have none."""
    if found is None:
        return
    if expected is not None and found != expected.get(SNAPSHOT):
        raise DamagedEntryError("its snapshot is not one of the model's states")
    if found.dtype != torch.uint8 or len(found.shape) != 1 or found.shape[0] < 1:
        raise DamagedEntryError(f"its snapshot is {found.dtype} of the shape {found.shape}")


def _check_precision(header: Header) -> None:
    """Raise if the header does not determine how the tensors were stored."""
    if header.exactness != EXACT and header.exactness not in STORED_DTYPES:
        raise DamagedEntryError("its exactness is unknown")
    kinds = frozenset() if header.exactness == EXACT else IN_MODEL_DTYPE
    dtypes = header.dtypes
    if not isinstance(dtypes, Mapping) or dtypes.keys() != kinds or not COMPUTED_DTYPES.keys() >= _strings(dtypes):
        raise DamagedEntryError("the original dtypes of its tensors are missing or wrong")


def _strings(dtypes: Mapping[str, str]) -> set[str]:
    return {dtype if isinstance(dtype, str) else "no dtype" for dtype in dtypes.values()}


def _names_of_any_model(tensors: Mapping[str, TensorSpec]) -> frozenset[str]:
    """Return the names of the needed tensors, for the number of layers that the given names imply."""
    layers = [_LAYER.fullmatch(name) for name in tensors]
    num_layers = max((int(layer[2]) + 1 for layer in layers if layer is not None), default=1)
    if num_layers > len(tensors):  # bounds the size of the result by that of the input
        raise DamagedEntryError("it lacks layers")
    return STATE_TENSORS.union(*map(layer_names, range(num_layers)))


def _check_names(found: Mapping[str, TensorSpec], expected: frozenset[str]) -> None:
    missing, extra = expected - found.keys() - _OPTIONAL, found.keys() - expected
    if missing:
        raise DamagedEntryError(f"the entry lacks the tensor {abbreviated(min(missing))}")
    if extra:
        raise DamagedEntryError(f"the entry has an unknown tensor: {abbreviated(str(min(extra)))}")


def _check_shape(header: Header, name: str, spec: TensorSpec, expected: TensorSpec | None) -> None:
    if expected is not None and spec.shape != expected.shape:
        raise DamagedEntryError(
            f"tensor {name!r} has the shape {spec.shape}, but the model computes {expected.shape} for its tokens"
        )
    is_right = len(spec.shape) == len(AXES[kind_of(name)]) and min(spec.shape) >= 1
    if not is_right or spec.shape[token_axis(name)] != len(header.token_ids):
        raise DamagedEntryError(
            f"tensor {name!r} has the shape {spec.shape}, but the entry has {len(header.token_ids)} tokens"
        )


def _check_dtype(header: Header, name: str, spec: TensorSpec, expected: TensorSpec | None) -> None:
    kind = kind_of(name)
    if kind == "logprobs":
        is_right = spec.dtype in (torch.float32, torch.float64)
    elif kind not in IN_MODEL_DTYPE:
        is_right = spec.dtype == torch.bool
    else:
        computed = COMPUTED_DTYPES[header.dtypes[kind]] if header.dtypes else spec.dtype
        if expected is not None and computed != expected.dtype:
            raise DamagedEntryError(f"tensor {name!r} was {computed}, but the model computes {expected.dtype}")
        is_right = computed in _FLOATS and spec.dtype in (computed, _stored_dtype(header, kind))
    if not is_right:
        raise DamagedEntryError(f"tensor {name!r} is {spec.dtype}")


def _check_scale(header: Header, name: str, spec: TensorSpec, scale: TensorSpec | None) -> None:
    if (spec.dtype == torch.int8) != (scale is not None):
        raise DamagedEntryError(f"the scale of tensor {name!r} is {'missing' if scale is None else 'superfluous'}")
    if scale is not None and scale != TensorSpec(torch.float32, (*spec.shape[:-1], 1)):
        raise DamagedEntryError(f"the scale of tensor {name!r} is {scale.dtype} of the shape {scale.shape}")


def _stored_dtype(header: Header, kind: str) -> torch.dtype | None:
    """Return the other dtype, besides the computed one, in which a tensor of this kind may be stored; None if none."""
    if header.exactness == EXACT:
        return None
    return torch.int8 if header.exactness == "int8" and kind != "hidden" else torch.float16


def _is_index(number: object) -> bool:
    return type(number) is int and 0 <= number <= MAX_INT
