"""Storage at reduced precision, on request, with a measured error.

"float16" stores keys, values and hidden states as float16. "int8" stores keys and values as int8 with a scale for each
token and head, `x ~ scale * q` with `scale = max|x| / 127`. So the bytes of a row do not depend on the place at which
an entry was cut. Hidden states take little space and determine the logits, so "int8" stores them as float16.
Log-probabilities are stored unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from backprompt.memory.blocks import IN_MODEL_DTYPE, kind_of

StoredDtype: TypeAlias = Literal["float16", "int8"]
STORED_DTYPES: tuple[StoredDtype, ...] = ("float16", "int8")

SCALE = ".scale"
"""The suffix of the name of a tensor of scales, behind the name of the scaled tensor."""

COMPUTED_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtypes in which keys, values and hidden states are computed, by name."""


@dataclass(frozen=True)
class Encoded:
    """The stored form of some tensors.

    Attributes:
        tensors: the tensors by name; the scales of "keys.0" are "keys.0.scale".
        dtypes: the original dtypes of "keys", "values" and "hidden", such as "float32".
        error: the largest relative error of a tensor, `|decoded - given| / |given|` in the Euclidean norm.

    """

    tensors: dict[str, Tensor]
    dtypes: dict[str, str]
    error: float


def encode(tensors: Mapping[str, Tensor], dtype: StoredDtype) -> Encoded:
    """Return the tensors at reduced precision; a tensor with numbers beyond the range of `dtype` stays unchanged."""
    encoded = Encoded({}, {}, 0.0)
    error = 0.0
    for name, tensor in tensors.items():
        kind = kind_of(name)
        parts = {name: tensor}
        if kind in IN_MODEL_DTYPE:
            encoded.dtypes[kind] = str(tensor.dtype).removeprefix("torch.")
            fewer_bits = _in_fewer_bits(name, tensor, dtype)
            decoded = decode(fewer_bits, name, encoded.dtypes)
            if bool(torch.isfinite(decoded).all()):
                parts, error = fewer_bits, max(error, _relative_error(decoded, tensor))
        encoded.tensors.update(parts)
    return replace(encoded, error=error)


def decode(tensors: Mapping[str, Tensor], name: str, dtypes: Mapping[str, str]) -> Tensor:
    """Return the decoded tensor of this name; a tensor that was not encoded is returned as stored."""
    kind = kind_of(name)
    scale, stored = tensors.get(name + SCALE), tensors[name]
    if kind not in dtypes:
        return stored
    return (stored if scale is None else stored * scale).to(COMPUTED_DTYPES[dtypes[kind]])


def parts_of(name: str) -> tuple[str, str]:
    """Return the names of the tensors that decoding the tensor `name` may need."""
    return name, name + SCALE


def check_stored_dtype(dtype: StoredDtype | None) -> StoredDtype | None:
    """Return `dtype`.

    Raises:
        ValueError: `dtype` is neither None nor one of `STORED_DTYPES`.

    """
    if dtype is not None and dtype not in STORED_DTYPES:
        known = ", ".join(map(repr, STORED_DTYPES))
        raise ValueError(f"dtype must be None (as computed) or one of {known}, not {dtype!r}.")
    return dtype


def _in_fewer_bits(name: str, tensor: Tensor, dtype: StoredDtype) -> dict[str, Tensor]:
    if dtype == "float16" or name == "hidden":
        return {name: tensor.half()}
    scale = tensor.float().abs().amax(dim=-1, keepdim=True) / 127  # (kv_heads, tokens, 1)
    quotient = tensor.float() / scale.where(scale > 0, 1)
    # A scale below the normal numbers is so inexact that a quotient may exceed 127.
    return {name: quotient.round().clamp(-127, 127).to(torch.int8), name + SCALE: scale}


def _relative_error(decoded: Tensor, given: Tensor) -> float:
    norm = float(given.double().norm())
    return float((decoded.double() - given.double()).norm()) / norm if norm else 0.0
