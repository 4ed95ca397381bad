"""Keys that name a representation by content: section "Keys by content" of docs/design/forest.md.

A key belongs to a position, not to a span, so it does not depend on how spans happen to be cut:
`key(i) = SHA-256(key(i - 1), position, token id)`, from a root key that covers the model, its adapter, its dtype, the
tokenizer and the format. Another process that computes the same text finds the same keys. Behind a group it is the
SHA-256 of what stands before it, of its branches' keys in sorted order, and of the position.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

from backprompt.tokens.graph import TokenIds, fold

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


def gap_key(key: bytes, position: int) -> bytes:
    """Return what entries in a store begin at whose first position does not follow the last one that `key` names."""
    return hashlib.sha256(b"".join([b"gap", key, struct.pack("<q", position)])).digest()


def group_key(key: bytes, branch_keys: Iterable[tuple[bytes, bool]], position: int) -> bytes:
    """Return the key behind a group.

    Args:
        key: of what stands before the group.
        branch_keys: of each branch's last token, repeats included, in any order; and whether the branch is frozen, so
            that it does not count what stands before.
        position: behind the group.

    """
    parts = sorted(branch_key + bytes([is_frozen]) for branch_key, is_frozen in branch_keys)
    return hashlib.sha256(b"".join([b"group", key, struct.pack("<q", position), *parts])).digest()


def key_of(token_ids: TokenIds, root: bytes) -> bytes:
    """Return the key of a whole text."""
    key, _ = fold(token_ids, root, extend_key, group_key)
    return key


def extend_key(key: bytes, position: int, token_ids: Iterable[int]) -> bytes:
    """Return the key of the last of `token_ids`, the first of which is at `position`, after what `key` names."""
    for token_id in token_ids:
        key = hashlib.sha256(key + _POSITION_AND_TOKEN.pack(position, token_id)).digest()
        position += 1
    return key
