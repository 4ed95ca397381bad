"""The string of a continuation whose tokens arrive one at a time, decoded in small windows.

The string that a token adds depends on the tokens before it: decoders drop the space before the first token, bytes of
several tokens make one character, and SentencePiece's byte tokens are decoded in runs. So a token is decoded together
with the earlier tokens that its string depends on. The end of the string may be *open*: an incomplete character, or a
run of byte tokens, may still change with the next token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from backprompt.tokens.tokenizer import Speller, added

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's tokens for bytes that no other token covers

_NUM_BEFORE = 8
"""The number of prompt tokens in the first window, since the prompt may end inside a character."""


@dataclass(frozen=True)
class Decoded:
    """The string of a continuation so far.

    Attributes:
        settled: the part that later tokens cannot change.
        open: the part behind `settled`, which a later token may change.
        window: the ids that are decoded together: one or a few settled ids, and the ids of `open`.
        before: the string of the settled ids in `window`.

    """

    settled: str
    open: str
    window: tuple[int, ...]
    before: str

    @property
    def string(self) -> str:
        """The whole string."""
        return self.settled + self.open


class Decoder:
    """Decodes continuations token by token.

    Args:
        tokenizer: a tokenizer of transformers.
        left_out: ids that are not part of the string; the strings around them are joined. Ids that the tokenizer lacks
            are left out as well.

    """

    def __init__(self, tokenizer: Any, left_out: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._speller = Speller(tokenizer)
        self._left_out = frozenset(left_out)

    def begin(self, prompt_ids: Sequence[int]) -> Decoded:
        """Return the empty continuation of a prompt."""
        start = max(0, len(prompt_ids) - _NUM_BEFORE)
        while start > 0 and self._is_byte(prompt_ids[start]):
            start -= 1
        window = tuple(prompt_ids[start:])
        return Decoded("", "", window, self._speller.decode(window))

    def with_token(self, decoded: Decoded, token_id: int) -> Decoded:
        """Return a continuation with one more token."""
        if token_id in self._left_out or self._speller.lacks(token_id):
            return decoded
        window = (*decoded.window, token_id)
        more = added(decoded.before, self._speller.decode(window))
        is_open = not more or more.endswith("\N{REPLACEMENT CHARACTER}")  # some decoders drop half a character
        if is_open or self._is_byte(token_id):
            return Decoded(decoded.settled, more, window, decoded.before)
        return Decoded(decoded.settled + more, "", (token_id,), self._speller.decode((token_id,)))

    def _is_byte(self, token_id: int) -> bool:
        if self._speller.lacks(token_id):
            return False
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return isinstance(token, str) and _BYTE_TOKEN.fullmatch(token) is not None
