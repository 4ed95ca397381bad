"""Keys that name a representation by content: section "Identity" of docs/design.md.

A key belongs to a position, not to a span, so it does not depend on how spans happen to be cut:
`key(i) = SHA-256(key(i - 1), position, token id)`, from a root key that covers the model, its adapter, its dtype, the
tokenizer and the format. Another process that computes the same text finds the same keys.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

FORMAT_VERSION = 1

EXACT = "exact"
"""The exactness of what was computed from nothing but tokens, and of what was stored as it was computed."""

_POSITION_AND_TOKEN = struct.Struct("<qq")


def root_key(*, model: str, dtype: str, tokenizer: str, exactness: str = EXACT) -> bytes:
    """Return the key before the first token.

    Args:
        model: the content hash of the weights, the configuration and the adapters.
        dtype: of the computation.
        tokenizer: the tokenizer's fingerprint.
        exactness: "exact", or the dtype, such as "int8", in which what is built upon may have been stored.

    """
    parts = (str(FORMAT_VERSION), model, dtype, tokenizer, exactness)
    framed = b"".join(len(part.encode()).to_bytes(8, "little") + part.encode() for part in parts)
    return hashlib.sha256(framed).digest()


def extend_key(key: bytes, position: int, token_ids: Iterable[int]) -> bytes:
    """Return the key of the last of `token_ids`, the first of which is at `position`, after what `key` names."""
    for token_id in token_ids:
        key = hashlib.sha256(key + _POSITION_AND_TOKEN.pack(position, token_id)).digest()
        position += 1
    return key
