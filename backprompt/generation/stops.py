r"""Stop strings: when one ends a continuation, the part of the continuation that stays, and the part to hold back.

Only the generated string, which the tokens add to the prompt's string, is searched for stop strings. The first stop
string that is complete counts; of several that are complete at once, the longest counts. So the borders of tokens do
not matter. Special tokens are left out of a completion, and so of the searched string. A stop string that names a
special token is searched for in the string with special tokens written out.

A stop string may begin within a token ("abc\n" as one token, for the stop string "\n"). The tokens before such a token
stay as they were generated, and the kept part of the token ("abc") stands behind them as a string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from backprompt.arguments import as_bool, as_list, check_encodable
from backprompt.errors import GenerationError
from backprompt.tokens.decoded import Decoded, Decoder


@dataclass(frozen=True)
class Cut:
    """The kept part of a continuation: a number of its tokens, and a string behind them."""

    num_tokens: int
    rest: str


@dataclass(frozen=True)
class Watched:
    """A continuation that is searched for stop strings: its string, decoded for each search."""

    decoded: tuple[Decoded, ...]
    is_stopped: bool = False


@dataclass(frozen=True)
class _Search:
    """Stop strings, and the decoder of the string that is searched for them."""

    strings: tuple[str, ...]
    decoder: Decoder

    def first(self, string: str, start: int = 0) -> tuple[int, int] | None:
        """Return the start and stop of the stop string that ends first, from `start` on; None without one."""
        found = [(idx, idx + len(stop)) for stop in self.strings if (idx := string.find(stop, start)) >= 0]
        return min(found, key=lambda place: (place[1], place[0]), default=None)

    def is_met(self, before: Decoded, after: Decoded) -> bool:
        """Return whether a new token completes a stop string."""
        longest = max(map(len, self.strings))
        return self.first(after.string, max(0, len(before.settled) - longest + 1)) is not None

    def cut(self, prompt_ids: Sequence[int], token_ids: Sequence[int], *, include_stop: bool) -> Cut | None:
        states = accumulate(token_ids, self.decoder.with_token, initial=self.decoder.begin(prompt_ids))
        strings = [state.string for state in states]
        place = self.first(strings[-1])
        if place is None:
            return None
        kept = strings[-1][: place[1] if include_stop else place[0]]
        num_tokens = max(num for num, string in enumerate(strings) if kept.startswith(string))
        return Cut(num_tokens, kept[len(strings[num_tokens]) :])


class StopStrings:
    """Stop strings of continuations.

    Args:
        given: a string or strings; without any, no continuation is ended by a stop string.
        tokenizer: a tokenizer of transformers.
        include_stop: whether the stop string stays; by default it is cut off. The string behind it is always cut off.
        is_behind_prompt: whether a continuation is decoded behind its prompt. In a continuation decoded by itself,
            SentencePiece drops a space before the first token.

    Raises:
        GenerationError: `given` has something other than strings, an empty string, or one that no tokens can spell.

    """

    def __init__(
        self,
        given: str | Iterable[str] | None,
        tokenizer: Any,
        *,
        include_stop: bool = False,
        is_behind_prompt: bool = True,
    ) -> None:
        self.strings = as_stop_strings(given, tokenizer, "stop")
        self.include_stop = as_bool(include_stop, "include_stop", error=GenerationError)
        self.is_behind_prompt = is_behind_prompt
        self._searches: list[_Search] = []
        if not self.strings:
            return
        names = list(filter(None, tokenizer.all_special_tokens))
        naming = tuple(string for string in self.strings if any(name in string for name in names))
        others = tuple(string for string in self.strings if string not in naming)
        if others:
            self._searches.append(_Search(others, Decoder(tokenizer, tokenizer.all_special_ids)))
        if naming:
            self._searches.append(_Search(naming, Decoder(tokenizer)))
        self._held = {*self.strings, *(_without(string, names) for string in naming)}

    def begin(self, prompt_ids: Sequence[int]) -> Watched:
        """Return the empty continuation of a prompt."""
        return Watched(tuple(search.decoder.begin(self._before(prompt_ids)) for search in self._searches))

    def with_token(self, watched: Watched, token_id: int) -> Watched:
        """Return a continuation with one more token; `is_stopped` says whether a stop string ends it."""
        if not self._searches:
            return watched
        after = [
            search.decoder.with_token(decoded, token_id)
            for search, decoded in zip(self._searches, watched.decoded, strict=True)
        ]
        is_stopped = any(map(_Search.is_met, self._searches, watched.decoded, after))
        return Watched(tuple(after), is_stopped)

    def cut(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Cut | None:
        """Return the kept part of a continuation that a stop string ends; None if no stop string ends it."""
        before = self._before(prompt_ids)
        cuts = [search.cut(before, token_ids, include_stop=self.include_stop) for search in self._searches]
        return min(filter(None, cuts), key=lambda cut: (cut.num_tokens, len(cut.rest)), default=None)

    def decided(self, string: str) -> str:
        """Return the beginning of an unfinished completion, up to a possible beginning of a stop string to cut off."""
        if self.include_stop or not self.strings:
            return string
        longest = max(map(len, self._held))
        for start in range(max(0, len(string) - longest), len(string)):
            if any(held.startswith(string[start:]) for held in self._held):
                return string[:start]
        return string

    def _before(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        return prompt_ids if self.is_behind_prompt else ()


def as_stop_strings(given: str | Iterable[str] | None, tokenizer: Any, name: str) -> tuple[str, ...]:
    """Return a string or strings as a tuple; an empty tuple for None.

    Raises:
        TextTypeError: `given` is something else.
        GenerationError: an element is not a string, is empty, or is a string that no tokens can spell.
        TokenizerError: a string has half of a surrogate pair.

    """
    if given is None:
        return ()
    needed = f"{name} must be a string or several in a list"
    strings = (given,) if isinstance(given, str) else tuple(as_list(given, needed, any_order=True))
    for string in strings:
        if not isinstance(string, str) or not string:
            raise GenerationError(f"{name} must be strings that are not empty, not {string!r}.")
        check_encodable(string, "A stop string")
        if missing := missing_characters(string, tokenizer):
            raise GenerationError(
                f"The stop string {string!r} has characters without tokens in the tokenizer's vocabulary "
                f"({', '.join(map(repr, sorted(set(missing))))}), so no text would ever end with it. Leave it out."
            )
    return strings


def missing_characters(string: str, tokenizer: Any) -> list[str]:
    """Return the characters of a stop string that no tokens can spell, so that they are never generated."""
    names = list(filter(None, tokenizer.all_special_tokens))
    return [char for char in _without(string, names) if not _can_be_generated(char, tokenizer)]


def _can_be_generated(char: str, tokenizer: Any) -> bool:
    token_ids = tokenizer.encode(f"a{char}a", add_special_tokens=False)
    if char in tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        return True
    vocabulary = tokenizer.get_vocab()
    if any(char in token for token in vocabulary):  # within a token
        return True
    byte_names = bytes_to_unicode()  # a normalizer may change the character, but tokens can still spell it
    return any(
        all(name in vocabulary for name in names)
        for names in (
            [byte_names[byte] for byte in char.encode()],
            [f"<0x{byte:02X}>" for byte in char.encode()],
        )
    )


def _without(string: str, names: Iterable[str]) -> str:
    """Return a string without the names of special tokens."""
    for name in names:
        string = string.replace(name, "")
    return string
