"""Token ids under adapters: one int names a token and the adapter that computes the token.

    token id + (number of the adapter << 28)

So the forest, keys, plans and stores treat a token under another adapter as another token. The two parts are separated
before a model, a tokenizer or a caller gets an id. The number of an adapter is a hash of its content
(model/adapters.py), the same in all processes. Tokens without an adapter of their own have the number 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = "npt.NDArray[np.int64]"
IntOrInts = TypeVar("IntOrInts", int, Ints)

_BITS = 28

MAX_EMBEDDINGS = 1 << _BITS
"""The largest vocabulary whose tokens can be under adapters."""

NUMBER_BITS = 63 - _BITS
"""The bits of an adapter's number. An id with its adapter fits the signed 64 bits of arrays and of stores."""


def under(number: int, token_ids: Iterable[int]) -> tuple[int, ...]:
    """Return plain ids under the adapter of this number."""
    shifted = number << _BITS
    return tuple(token_id | shifted for token_id in token_ids) if number else tuple(token_ids)


def number_of(token_id: IntOrInts) -> IntOrInts:
    """Return the number of an id's adapter, or of each id of an array."""
    return token_id >> _BITS


def base_of(token_id: int) -> int:
    """Return the id of token 0 under the adapter of `token_id`; plus a plain id, it is that token under the adapter."""
    return token_id & -MAX_EMBEDDINGS


def are_plain(token_ids: Sequence[int]) -> bool:
    """Return whether no id is under an adapter."""
    return max(token_ids, default=0) < MAX_EMBEDDINGS


def plain(token_ids: Sequence[int]) -> tuple[int, ...]:
    """Return ids without their adapters."""
    ids = tuple(token_ids)
    if are_plain(ids):
        return ids
    return tuple(token_id & (MAX_EMBEDDINGS - 1) if token_id >= MAX_EMBEDDINGS else token_id for token_id in ids)


def plain_array(token_ids: Ints) -> Ints:
    """Return an array of ids without their adapters."""
    return token_ids & (MAX_EMBEDDINGS - 1)


def numbers_in(token_ids: Iterable[int]) -> set[int]:
    """Return the distinct numbers of the ids' adapters, without 0."""
    return {number_of(token_id) for token_id in token_ids if token_id >= MAX_EMBEDDINGS}
