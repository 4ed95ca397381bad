"""Keys that name a representation by content: section "Keys by content" of docs/design/forest.md.

A key belongs to a position, not to a span, so it does not depend on where spans are cut:
`key(i) = SHA-256(key(i - 1), position, token id)`, from a root key that covers the model, its adapter, its dtype, the
tokenizer and the format. Another process that computes the same text finds the same keys. The key behind a group is the
SHA-256 of the key before it, of its branches' keys in sorted order, and of the position.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

from backprompt.tokens.graph import TokenIds, fold

FORMAT_VERSION = 1

EXACT = "exact"
"""The exactness of results computed from tokens alone, and of results stored at full precision."""

_POSITION_AND_TOKEN = struct.Struct("<qq")


def root_key(*, model: str, dtype: str, tokenizer: str, exactness: str = EXACT) -> bytes:
    """Return the key before the first token.

    Args:
        model: the content hash of the weights, the configuration and the adapters.
        dtype: the dtype of the computation.
        tokenizer: the tokenizer's fingerprint.
        exactness: "exact", or the dtype, such as "int8", in which earlier results may have been stored.

    """
    parts = (str(FORMAT_VERSION), model, dtype, tokenizer, exactness)
    framed = b"".join(len(part.encode()).to_bytes(8, "little") + part.encode() for part in parts)
    return hashlib.sha256(framed).digest()


def gap_key(key: bytes, position: int) -> bytes:
    """Return the key of entries whose first position does not directly follow the position named by `key`."""
    return hashlib.sha256(b"".join([b"gap", key, struct.pack("<q", position)])).digest()


def group_key(key: bytes, branch_keys: Iterable[tuple[bytes, bool]], position: int) -> bytes:
    """Return the key behind a group.

    Args:
        key: the key before the group.
        branch_keys: the key of each branch's last token, repeats included, in any order; and whether the branch is
            frozen, so that its key excludes the text before it.
        position: the position behind the group.

    """
    parts = sorted(branch_key + bytes([is_frozen]) for branch_key, is_frozen in branch_keys)
    return hashlib.sha256(b"".join([b"group", key, struct.pack("<q", position), *parts])).digest()


def key_of(token_ids: TokenIds, root: bytes) -> bytes:
    """Return the key of a whole text."""
    key, _ = fold(token_ids, root, extend_key, group_key)
    return key


def extend_key(key: bytes, position: int, token_ids: Iterable[int]) -> bytes:
    """Return the key of the last of `token_ids`; they follow the text that `key` names, the first at `position`."""
    for token_id in token_ids:
        key = hashlib.sha256(key + _POSITION_AND_TOKEN.pack(position, token_id)).digest()
        position += 1
    return key
