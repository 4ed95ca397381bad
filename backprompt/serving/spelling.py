"""Spelling: the names of tokens for clients, and the places of tokens in a string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from backprompt.tokens.decoded import Decoder
from backprompt.tokens.tokenizer import Speller, added

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level tokens
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's tokens for bytes that no other token covers
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")


class Spelling:
    r"""Names tokens as OpenAI does: the name of a token that is part of a character is like `bytes:\xe6`.

    Clients compare names to find whether a token is the most probable one. So a name keeps the space before a word,
    which decoders drop at the beginning of a string.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._speller = Speller(tokenizer)
        self._ids_before = tuple(tokenizer.encode("a", add_special_tokens=False))
        self._before = self._speller.decode(self._ids_before)
        self._names: dict[int, str] = {}

    def name(self, token_id: int) -> str:
        """Return the name of a token: its string within a text, or its bytes if it is part of a character."""
        found = self._names.get(token_id)
        if found is None:
            found = self._names[token_id] = self._name(token_id)
        return found

    def _name(self, token_id: int) -> str:
        string = added(self._before, self._speller.decode((*self._ids_before, token_id)))
        if string and "\N{REPLACEMENT CHARACTER}" not in string:
            return string
        found = self._bytes_of(token_id)
        return string if found is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _bytes_of(self, token_id: int) -> bytes | None:
        token = None if self._speller.lacks(token_id) else self._tokenizer.convert_ids_to_tokens(token_id)
        if not token:
            return None
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(match[1])
        return bytes(_BYTE_OF[one] for one in token) if set(token) <= _BYTE_OF.keys() else None


class Offsets:
    """The places of consecutive tokens in their string, which has no special tokens.

    Args:
        tokenizer: the tokenizer of the tokens.
        before: the ids before the string.

    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._decoder = Decoder(tokenizer, tokenizer.all_special_ids)
        self._decoded = self._decoder.begin(before)
        self._offset = 0

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Return the offsets, in characters, of the next tokens; a part of a character has the character's offset."""
        found = []
        for token_id in token_ids:
            string = self._decoded.string.rstrip("\N{REPLACEMENT CHARACTER}")
            self._offset = max(self._offset, len(string))
            found.append(self._offset)
            self._decoded = self._decoder.with_token(self._decoded, token_id)
        return found


def bytes_named(name: str) -> bytes:
    """Return the bytes of the token with this name."""
    match = _BYTES.fullmatch(name)
    return bytes.fromhex(match[1].replace("\\x", "")) if match else name.encode()
