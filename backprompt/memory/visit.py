"""Visits: the search for data that texts need, in the second pool (host.py) or a store (evaluation/archive.py).

Texts are served one after the other. First come the states on the way to a text's end, which suffice to read results.
If the end's states are missing (or do not suffice), the keys and values on the way follow: tokens that are still
forwarded attend to them. A text without room waits for the next visit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backprompt.forest.span import KINDS, Kind, Span


class Visit:
    """One search for the data of several texts.

    Args:
        room: the bytes that may be brought. `bring` subtracts the bytes that it brings. Once `room` is negative, the
            visit ends, but at least one text is served.
        bring: called once for each kind of data of each span, parents first; returns whether the span holds that data,
            or will hold it.

    """

    def __init__(self, room: int, bring: Callable[[Kind, Span], bool]) -> None:
        self.room = room
        self._bring = bring
        self._has: dict[Kind, dict[Span, bool]] = {kind: {} for kind in KINDS}

    def serve(self, ends: Sequence[Span], *, with_keys_values: bool) -> list[Span]:
        """Bring the data that the texts with these ends need; return the ends of served texts, at least the first."""
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
        """The spans that miss some of the requested data."""
        return [span for has in self._has.values() for span, is_there in has.items() if not is_there]

    def _may_hold(self, kind: Kind, span: Span) -> bool:
        """Whether the span's parents hold such data and, for keys and values, the span holds or gets its states."""
        if kind == "keys_values" and not (span.is_held() or self._has["states"].get(span)):
            return False
        parents = [parent for parent in span.parents if parent.parent is not None]
        return all(self._has[kind].get(parent) or parent.holds(kind) for parent in parents)
