"""The holders of texts: pins, owners of growing texts, and computing or reading in progress.

Keeps the pins, weak references to the owners of growing texts, and the ends of the texts in use. Each holder is asked
for its ends whenever they are needed. Holds are not counted, so an error cannot leave a count too high.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from backprompt.forest.span import Span
from backprompt.tokens.graph import TokenIds


class Growing(Protocol):
    """A text that grows."""

    @property
    def ends(self) -> Mapping[Any, Span]:
        """The ends of the held continuations."""
        ...


@dataclass(eq=False)
class PinnedText:
    """A text that is held until its pin is released, and its end."""

    token_ids: TokenIds = ()
    end: Span | None = None


class Holders:
    """All holders of texts of one forest."""

    def __init__(self) -> None:
        self._pins: dict[PinnedText, None] = {}
        self._growing: WeakKeyDictionary[object, Sequence[Growing]] = WeakKeyDictionary()  # by owner
        self._in_use: dict[object, Sequence[Span]] = {}

    def ends(self) -> set[Span]:
        """Return the ends of all texts that must stay: of pinned texts, of growing texts, and of those in use now."""
        held = set(self.pinned_ends())
        for texts in self._growing.values():
            held.update(end for text in texts for end in text.ends.values())
        return held.union(*self._in_use.values())

    def others(self, owners: Collection[object]) -> set[Span]:
        """Return the ends of the growing texts of all other owners; nearly always there are none."""
        theirs = (texts for other, texts in self._growing.items() if other not in owners)
        return {end for texts in theirs for text in texts for end in text.ends.values()}

    def pinned_ends(self) -> list[Span]:
        """Return the ends of pinned texts."""
        return [pin.end for pin in self._pins if pin.end is not None]

    @property
    def pins(self) -> Collection[PinnedText]:
        """All pinned texts."""
        return self._pins.keys()

    def pin(self, text: PinnedText) -> None:
        """Hold a text until `unpin`."""
        self._pins[text] = None

    def unpin(self, text: PinnedText) -> None:
        """Release a pinned text; a text that is not pinned may be given, too."""
        self._pins.pop(text, None)

    def unpin_all(self) -> None:
        """Release every pin."""
        self._pins.clear()

    def let_grow(self, owner: object, texts: Sequence[Growing]) -> None:
        """Hold the ends of these texts, also those of later steps, for as long as their owner lives."""
        self._growing[owner] = texts

    @contextmanager
    def using(self, ends: Sequence[Span]) -> Iterator[None]:
        """Hold the texts that end here for as long as the context lasts."""
        use = object()
        self._in_use[use] = ends
        try:
            yield
        finally:
            self._in_use.pop(use, None)  # `stop_using` may have removed the use

    def stop_using(self) -> None:
        """Release the texts in use: after an error no operation runs any more."""
        self._in_use.clear()
