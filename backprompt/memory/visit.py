"""Visits: how what lies below the device's memory (host.py, evaluation/archive.py) is found for the texts that need it.

One text after the other: first the states on the way to its end, which is all that results are read off; if the end's
are not among them (or are not enough), the keys and values on the way, which is what its forwarding attends to. A text
that there is no room for waits for the next visit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backprompt.forest.span import KINDS, Kind, Span


class Visit:
    """One visit.

    Args:
        room: how many bytes may come; `bring` takes from it what it brings, and may take too much once.
        bring: asked once for each of the two that a span may hold, after what the span continues; returns whether the
            span holds it or will.

    """

    def __init__(self, room: int, bring: Callable[[Kind, Span], bool]) -> None:
        self.room = room
        self._bring = bring
        self._has: dict[Kind, dict[Span, bool]] = {kind: {} for kind in KINDS}

    def serve(self, ends: Sequence[Span], *, with_keys_values: bool) -> list[Span]:
        """Bring what the texts that end here need; return the ends of those that got it, at least the first."""
        served: list[Span] = []
        for end in ends:
            for kind in KINDS:
                if kind == "keys_values" and self._has["states"][end] and not with_keys_values:
                    continue
                for span in end.closure(known=self._has[kind]):
                    if served and self.room < 0:
                        return served
                    self._has[kind][span] = self._may_hold(kind, span) and self._bring(kind, span)
            served.append(end)
        return served

    @property
    def absent(self) -> list[Span]:
        """Spans that could not be brought all that was wanted of them."""
        return [span for has in self._has.values() for span, is_there in has.items() if not is_there]

    def _may_hold(self, kind: Kind, span: Span) -> bool:
        """Whether what it continues holds such, and it has states if this is for keys and values."""
        if kind == "keys_values" and not (span.is_held() or self._has["states"].get(span)):
            return False
        parents = [parent for parent in span.parents if parent.parent is not None]
        return all(self._has[kind].get(parent) or parent.holds(kind) for parent in parents)
