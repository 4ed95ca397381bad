"""Spelling: the strings by which clients know tokens, and where tokens stand in a string."""

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
    r"""Names tokens as OpenAI does: a token that is part of a character is `bytes:\xe6`.

    Clients compare names to see which token is the most probable one. So a name keeps the space before a word, which
    decoders drop at the beginning of a string.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._speller = Speller(tokenizer)
        self._ids_before = tuple(tokenizer.encode("a", add_special_tokens=False))
        self._before = self._speller.decode(self._ids_before)
        self._names: dict[int, str] = {}

    def name(self, token_id: int) -> str:
        """Return the string of a token within a text."""
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

    def offsets(self, before: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        """Return where each token stands in the string of the tokens; part of a character, where that begins.

        Special tokens are not in the string.
        """
        decoder = Decoder(self._tokenizer, self._tokenizer.all_special_ids)
        decoded, offset, found = decoder.begin(before), 0, []
        for token_id in token_ids:
            offset = max(offset, len(decoded.string.rstrip("\N{REPLACEMENT CHARACTER}")))
            found.append(offset)
            decoded = decoder.with_token(decoded, token_id)
        return found

    def _bytes_of(self, token_id: int) -> bytes | None:
        token = None if self._speller.lacks(token_id) else self._tokenizer.convert_ids_to_tokens(token_id)
        if not token:
            return None
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(match[1])
        return bytes(_BYTE_OF[one] for one in token) if set(token) <= _BYTE_OF.keys() else None


def bytes_named(name: str) -> bytes:
    """Return the bytes of a token by its name."""
    match = _BYTES.fullmatch(name)
    return bytes.fromhex(match[1].replace("\\x", "")) if match else name.encode()
