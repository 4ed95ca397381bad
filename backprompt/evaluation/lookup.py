"""Looking up the held parts of texts, without changing them.

The texts go into a forest of their own, a *sketch*, whose spans are cut wherever the place of the held rows changes. A
mark on each span then names the place of its states, another that of its keys and values; unmarked spans would be
forwarded. So a sketch can be planned like the forest that it shows, and splitting its spans splits no held span.

    held       "the cat" (in memory) --+-- " sat" (dropped over the budget)
    asked for  "the cat sat down"
    sketch     "the cat" memory -- " sat" evicted -- " down" absent
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from backprompt.evaluation.archive import Archive
from backprompt.forest.forest import Forest
from backprompt.forest.passes import cut_into_passes, missing_spans
from backprompt.forest.span import Inserted, Junction, Kind, Span, child_key
from backprompt.tokens.graph import TokenIds, common_length

Where: TypeAlias = Literal["memory", "host", "disk", "evicted", "absent"]
"""The place of rows: the device's memory, the second pool, the store; or none, for rows dropped or never computed."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of a text whose hidden states lie in one place.

    Attributes:
        start, stop: the index of the first token and the index behind the last token, in `text.tokens`.
        where: "memory" (the model's device), "host" (the second pool), "disk" (the store says that it has them),
            "evicted" (computed once, and dropped over the budget), or "absent".

    """

    start: int
    stop: int
    where: Where


@dataclass(frozen=True)
class _Mark:
    """A mark on a span of a sketch: it names the place of the real rows, and stands for them."""

    where: Where
    block = None
    start = stop = num_bytes = 0

    def split(self, num_tokens: int) -> tuple[_Mark, _Mark]:
        return self, self


_MEMORY, _HOST, _DISK = _Mark("memory"), _Mark("host"), _Mark("disk")


@dataclass(frozen=True)
class _Reached:
    """A place in the inspected forest: behind the first `num_tokens` tokens of a span."""

    span: Span
    num_tokens: int

    def next(self, position: int, token_id: int) -> _Reached | None:
        """Return this place as the one right before the next token, in that token's span; None if no span has it."""
        if self.num_tokens == len(self.span.token_ids):
            child = self.span.children.get(child_key(self.span, position, token_id))
            return None if child is None else _Reached(child, 0)
        is_next = self.span.position + self.num_tokens == position and self.span.token_ids[self.num_tokens] == token_id
        return self if is_next else None


@dataclass(frozen=True)
class Aside:
    """The tokens that a text would have from index `token_idx` on if a join had not changed them."""

    text_idx: int
    token_idx: int
    token_ids: tuple[int, ...]


class Sketch:
    """The held parts of texts.

    Args:
        held: the inspected forest; it stays unchanged, except that fans on the way unfold.
        texts: the texts' token ids.
        archive: the store to ask for tokens that the forest does not hold; only its index is read.
        asides: other tokens to look up; texts are planned without them.

    """

    def __init__(
        self,
        held: Forest,
        texts: Iterable[TokenIds],
        archive: Archive | None = None,
        asides: Iterable[Aside] = (),
    ) -> None:
        self._held = held
        self.forest = Forest()
        self.forest.evaluation = held.evaluation
        self.texts = [Inserted(self.forest.insert(token_ids), token_ids) for token_ids in texts]
        self._asides = {aside: self._insert_aside(aside) for aside in asides}
        self._reached: dict[Span, _Reached] = {self.forest.root: _Reached(held.root, 0)}
        for span in list(self.forest.spans()):
            self._match(span)
        for span in list(self.forest.spans()):
            self._mark(span)
            if archive is not None:
                self._mark_stored(span, archive)

    def pieces(self, text: Inserted) -> list[Piece]:
        """Return the places of a text's tokens, in written order; neighbours in one place are one piece."""
        pieces: list[Piece] = []
        start = 0
        for span in self.forest.in_order(text):
            stop = start + len(span.token_ids)
            if pieces and pieces[-1].where == where(span):
                pieces[-1] = Piece(pieces[-1].start, stop, where(span))
            else:
                pieces.append(Piece(start, stop, where(span)))
            start = stop
        return pieces

    def has(self, aside: Aside) -> bool:
        """Return whether all tokens of an aside are held or stored."""
        before, span = self._asides[aside]
        while span is not before:
            if not span.is_held() or span.parent is None:
                return False
            span = span.parent
        return True

    def passes(self, max_tokens: int) -> list[tuple[Span, ...]]:
        """Return the passes for evaluating the texts; spans of the sketch are cut as passes need."""
        missing = missing_spans(text.end for text in self.texts)
        passes = cut_into_passes(self.forest, missing, max_tokens)
        return [spans for spans in passes if any(span.token_ids for span in spans)]

    def _insert_aside(self, aside: Aside) -> tuple[Span, Span]:
        """Insert an aside; return the span before it, and its end."""
        num_before = 0
        spans = iter(self.forest.in_order(self.texts[aside.text_idx]))
        span = next(spans)
        while num_before + len(span.token_ids) <= aside.token_idx:
            num_before += len(span.token_ids)
            span = next(spans)
        if num_before < aside.token_idx:
            self.forest.split(span, aside.token_idx - num_before)
        assert span.parent is not None
        return span.parent, self.forest.extend(span.parent, span.position, aside.token_ids)

    def _match(self, span: Span) -> None:
        """Note the part of a span that is in the inspected forest; the span is cut where that changes."""
        assert span.parent is not None
        if isinstance(span, Junction):
            found = self._matching_junction(span)
            if found is not None:
                self._reached[span] = _Reached(found, 0)
            return
        reached = self._reached.get(span.parent)
        part: Span | None = None
        while reached is not None and part is not span:
            self._held.unfold(reached.span)
            following = reached.next(span.position, span.token_ids[0])
            if following is None:
                return
            rest = following.span.token_ids[following.num_tokens :]
            num_common = common_length(rest, span.token_ids, 0)
            part = span if num_common == len(span.token_ids) else self.forest.split(span, num_common)
            reached = self._reached[part] = _Reached(following.span, following.num_tokens + num_common)

    def _matching_junction(self, junction: Junction) -> Span | None:
        assert junction.parent is not None
        before = self._whole_span_at(junction.parent)
        ends = [
            (self._whole_span_at(end), is_frozen)
            for (end, is_frozen), repeats in junction.branches.items()
            for _ in range(repeats)
        ]
        known = [(end, is_frozen) for end, is_frozen in ends if end is not None]
        return None if before is None or len(known) < len(ends) else before.junction(known)

    def _whole_span_at(self, span: Span) -> Span | None:
        """Return the span of the inspected forest that ends where this span of the sketch does."""
        reached = self._reached.get(span)
        is_whole = reached is not None and reached.num_tokens == len(reached.span.token_ids)
        return reached.span if reached is not None and is_whole else None

    def _mark(self, span: Span) -> None:
        if isinstance(span, Junction):  # a junction has no rows of its own
            span.place(states=_mark_of_all(span, "states"), keys_values=_mark_of_all(span, "keys_values"))
        reached = self._reached.get(span)
        if reached is None:
            return
        held = reached.span
        span.was_computed, span.is_stored = held.was_computed, held.is_stored
        span.computed_in, span.loaded_in = held.computed_in, held.loaded_in
        if reached.num_tokens == len(held.token_ids):
            span.key = held.key
        if span.token_ids:
            span.place(states=_mark_of(held, "states"), keys_values=_mark_of(held, "keys_values"))

    def _mark_stored(self, span: Span, archive: Archive) -> None:
        """Mark the stored part of a span that is not held, as `Archive.load` would load it."""
        if _mark_of_all(span, "states") is None:
            return  # of no use without the parents
        can_continue = _mark_of_all(span, "keys_values") is not None
        if not span.token_ids or span.is_held(with_keys_values=True):
            return
        for part in archive.stored_parts(self.forest, span):
            if not part.is_held():
                part.place(states=_DISK)
            if can_continue and not part.is_held(with_keys_values=True):
                part.place(keys_values=_DISK)


def where(span: Span) -> Where:
    """Return where the states of a span of a sketch lie."""
    if isinstance(span.states, _Mark):
        return span.states.where
    return "evicted" if span.was_computed else "absent"


def _mark_of(held: Span, kind: Kind) -> _Mark | None:
    """Return the mark for the place of a held span's rows of one kind."""
    if held.rows_in(kind, "device") is not None:
        return _MEMORY
    return _HOST if held.rows_in(kind, "host") is not None else None


def _mark_of_all(span: Span, kind: Kind) -> _Mark | None:
    """Return a mark if all parents of a span bear one."""
    return _MEMORY if all(parent.holds(kind) for parent in span.parents if parent.parent is not None) else None


def positions_of(held: Forest, runs: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Return, for each run of token ids that is held behind whichever tokens, a position at which it is held."""
    by_first: dict[int, list[tuple[int, ...]]] = {}
    for run in dict.fromkeys(runs):
        by_first.setdefault(run[0], []).append(run)
    found: dict[tuple[int, ...], int] = {}
    held.unfold_all()
    for span in held.spans():
        for idx, token_id in enumerate(span.token_ids):
            for run in by_first.get(token_id, ()):
                if run not in found and _is_held_from(span, idx, run):
                    found[run] = span.position + idx
    return found


def _is_held_from(span: Span, idx: int, run: tuple[int, ...]) -> bool:
    """Return whether a run of ids is held from token `idx` of a span on."""
    reached: _Reached | None = _Reached(span, idx)
    num_found = 0
    while num_found < len(run):
        assert reached is not None
        reached = reached.next(reached.span.position + reached.num_tokens, run[num_found])
        if reached is None or reached.span.is_empty:
            return False
        rest = reached.span.token_ids[reached.num_tokens :]
        num_common = common_length(rest[: len(run) - num_found], run, num_found)
        num_found += num_common
        reached = _Reached(reached.span, reached.num_tokens + num_common)
    return True
