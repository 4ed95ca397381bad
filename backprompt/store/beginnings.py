"""Names of empty objects that say which entries begin at a key; a listing of them takes the place of an index.

    begins/<start>/<number of tokens>.<first token ids, hexadecimal>.<end>

A listing of `begins/<start>/` names all entries at this key with their first token ids. A name has room for about 20 to
40 ids. Entries with equal ids in their names are distinguished by their headers.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from backprompt.store.base import Header, Match, num_common

FOLDER = "begins"
MAX_CHARS = 120
"""The characters for token ids in a name: file systems allow 255 characters, and a key has 64."""

_NAME = re.compile(r"([1-9][0-9]{0,18})\.((?:[0-9a-f]{1,16}\.)+)([A-Za-z0-9_]{1,200})")


@dataclass(frozen=True, order=True)
class Beginning:
    """An entry at a key: its first token ids (or all of them), the number of its tokens, and its end."""

    token_ids: tuple[int, ...]
    num_tokens: int
    end: str

    @classmethod
    def of(cls, header: Header) -> Beginning:
        """Return the beginning of an entry: as many token ids as a name has room for."""
        return cls(_shown(tuple(header.token_ids)), len(header.token_ids), header.end)

    @classmethod
    def parsed(cls, name: str) -> Beginning | None:
        """Return the beginning that a name stands for; None if the string is not such a name."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        number, ids, end = found.groups()
        return cls(tuple(int(token_id, 16) for token_id in ids[:-1].split(".")), int(number), end)

    @property
    def name(self) -> str:
        """The name of the empty object."""
        return ".".join([str(self.num_tokens), *(f"{token_id:x}" for token_id in self.token_ids), self.end])

    @property
    def is_whole(self) -> bool:
        """Whether these are all token ids of the entry."""
        return len(self.token_ids) == self.num_tokens


class Beginnings:
    """The entries at one key, sorted by their first token ids. Changes do not disturb lookups of other threads."""

    def __init__(self, start: str, names: Iterable[str]) -> None:
        self._start = start
        self._sorted = sorted(found for found in map(Beginning.parsed, names) if found is not None)

    def add(self, beginning: Beginning) -> None:
        """Add an entry."""
        if beginning not in self._sorted:
            added = list(self._sorted)  # other threads may be looking through the old one
            insort(added, beginning)
            self._sorted = added

    def remove(self, end: str) -> None:
        """Remove the entry with this end, if it is there."""
        self._sorted = [beginning for beginning in self._sorted if beginning.end != end]

    def longest(self, token_ids: tuple[int, ...], ids_of: Callable[[str], Sequence[int] | None]) -> Match | None:
        """Return the entry with the longest common prefix with `token_ids`; None if none shares a token.

        Args:
            token_ids: the token ids to look up.
            ids_of: returns all token ids of the entry with this name, or None if there is no such entry. It is called
                only for entries with more ids than their names show, if the ids in the name agree with `token_ids`.

        """
        ordered = self._sorted
        place = bisect_left(ordered, token_ids, key=lambda beginning: beginning.token_ids)
        # In the order of token ids, the entry with the longest common prefix is next to the given sequence.
        neighbours = ordered[max(0, place - 1) : place + 1]
        best = max(neighbours, key=lambda found: num_common(found.token_ids, token_ids), default=None)
        if best is None or not (num_tokens := num_common(best.token_ids, token_ids)):
            return None
        match = Match(self._name(best), num_tokens)
        if num_tokens < len(best.token_ids) or num_tokens == len(token_ids):
            return match
        first = bisect_left(ordered, best.token_ids, key=lambda beginning: beginning.token_ids)
        for beginning in ordered[first:]:
            if beginning.token_ids != best.token_ids:
                break
            if not beginning.is_whole and (ids := ids_of(self._name(beginning))) is not None:
                match = max(match, Match(self._name(beginning), num_common(ids, token_ids)), key=_num_tokens)
        return match

    def goes_on(self, token_ids: tuple[int, ...], ids_of: Callable[[str], Sequence[int] | None]) -> bool:
        """Return whether an entry begins with `token_ids` and has more tokens; `ids_of`: see `longest`."""
        num_tokens, ordered, shown = len(token_ids), self._sorted, _shown(token_ids)
        first = bisect_left(ordered, shown, key=lambda beginning: beginning.token_ids)
        behind = map(ordered.__getitem__, range(first, len(ordered)))
        return any(
            len(shown) == num_tokens
            or (
                beginning.token_ids == shown
                and (ids := ids_of(self._name(beginning))) is not None
                and tuple(ids[:num_tokens]) == token_ids
            )
            for beginning in itertools.takewhile(lambda found: found.token_ids[: len(shown)] == shown, behind)
            if beginning.num_tokens > num_tokens
        )

    def _name(self, beginning: Beginning) -> str:
        return f"{self._start}-{beginning.end}"


def _shown(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return the first ids, as many as a name has room for."""
    ends = itertools.accumulate(len(f"{token_id:x}.") for token_id in token_ids)
    return token_ids[: sum(1 for _ in itertools.takewhile(MAX_CHARS.__ge__, ends))]


def _num_tokens(match: Match) -> int:
    return match.num_tokens
