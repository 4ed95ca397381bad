"""All strings of a finite language.

llguidance walks the language byte by byte, with a tokenizer whose tokens are the bytes. So a constraint has the same
strings here as in a generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from backprompt.tokens.constraints import Constraint
from backprompt.tokens.matching import check_ends_here, compiled, guidance, named

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_STRINGS = 10_000
"""The largest number of strings of a language that counts as finite."""

MAX_BYTES = 1_000
"""The largest number of bytes, in UTF-8, of a string of such a language."""


def strings_of(constraint: Constraint, *, max_strings: int = MAX_STRINGS, max_bytes: int = MAX_BYTES) -> list[str]:
    """Return all strings of a finite language, in the order of their bytes.

    These are the strings that a continuation under the constraint may be.

    Args:
        constraint: the language.
        max_strings: the largest number of strings.
        max_bytes: the largest number of bytes of a string, in UTF-8.

    Raises:
        MissingDependencyError: llguidance is not installed.
        GenerationError: llguidance refuses the constraint.
        ValueError: the language is not finite, or exceeds one of the limits.

    """
    strings: list[str] = []
    waiting = [(b"", compiled(constraint, _bytes()))]  # beginnings to visit, each with the matcher one byte before
    while waiting:
        path, before = waiting.pop()
        matcher = before.deep_copy()
        if path:
            matcher.consume_token(path[-1])
        following = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:256]
        if matcher.is_error():
            check_ends_here(matcher, constraint)
            continue
        strings += [path.decode()] if matcher.is_accepting() else []
        if len(strings) > max_strings or len(path) > max_bytes:
            raise ValueError(
                f"The language of {named(constraint)} has more than {max_strings:,} strings, or a string of more than "
                f"{max_bytes:,} bytes, or infinitely many strings. Give a finite and smaller language, such as "
                "[0-9]{1,2} in place of [0-9]+."
            )
        waiting += [(path + bytes([byte]), matcher) for byte in reversed(np.flatnonzero(following).tolist())]
    return strings


class _Bytes:
    """A tokenizer of llguidance whose tokens are the 256 bytes, and an end token."""

    eos_token_id = 256
    bos_token_id = None
    tokens: Sequence[bytes] = [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]
    special_token_ids = (256,)

    def __call__(self, string: bytes) -> list[int]:
        return list(string)


def _bytes() -> LLTokenizer:
    library = guidance()
    tokenizer: LLTokenizer = library.LLTokenizer(library.TokenizerWrapper(_Bytes()))
    return tokenizer
