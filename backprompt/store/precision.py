"""Storing fewer bits than were computed, on request, with the error that it costs measured.

"float16" stores keys, values and hidden states as float16. "int8" stores keys and values as int8 with a scale for each
token and head, `x ~ scale * q` with `scale = max|x| / 127`, so that a row's bytes do not depend on where an entry was
cut; hidden states, which logits are read off and which are small, go as float16. Log-probabilities stay as they are.
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
"""What the name of a tensor of scales ends in, behind the name of the tensor that they belong to."""

COMPUTED_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What keys, values and hidden states are computed in, by name."""


@dataclass(frozen=True)
class Encoded:
    """What is stored in place of some tensors.

    Attributes:
        tensors: by name; the scales of "keys.0" are "keys.0.scale".
        dtypes: what "keys", "values" and "hidden" were, such as "float32".
        error: the largest of the tensors' relative errors, `|decoded - given| / |given|` in the Euclidean norm.

    """

    tensors: dict[str, Tensor]
    dtypes: dict[str, str]
    error: float


def encode(tensors: Mapping[str, Tensor], dtype: StoredDtype) -> Encoded:
    """Return the tensors in fewer bits; one whose numbers are too large for them stays as it is."""
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
    """Return the tensor that was encoded under this name, or, if it was not, the one that has it."""
    kind = kind_of(name)
    scale, stored = tensors.get(name + SCALE), tensors[name]
    if kind not in dtypes:
        return stored
    return (stored if scale is None else stored * scale).to(COMPUTED_DTYPES[dtypes[kind]])


def parts_of(name: str) -> tuple[str, str]:
    """Return the names of the tensors that decoding this one may need."""
    return name, name + SCALE


def check_stored_dtype(dtype: StoredDtype | None) -> StoredDtype | None:
    """Return `dtype`.

    Raises:
        ValueError: it is neither None nor one of `STORED_DTYPES`.

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
    # A scale too small for a normal number is inexact enough for a quotient beyond 127.
    return {name: quotient.round().clamp(-127, 127).to(torch.int8), name + SCALE: scale}


def _relative_error(decoded: Tensor, given: Tensor) -> float:
    norm = float(given.double().norm())
    return float((decoded.double() - given.double()).norm()) / norm if norm else 0.0
