"""The plan of a pass: its row of tokens, the keys that each row sees, and the kernel calls for them. Pure Python.

The spans of a pass are laid out depth first in one row of tokens (passes.py), so the descendants of a span are one
contiguous slice of rows. Each *segment* pairs a contiguous slice of rows with a contiguous slice of the keys that they
see:

- Own: rows that see each other. Either a causal run (a long span, with the first child that continues it), or a
  *tile*: consecutive small runs and subtrees, computed densely under a mask of each row's ancestors.
- Cross: rows that all descend from the same earlier span and see all of its keys.

Example: an instruction of 300 tokens, cached; under it two prompts of 200 tokens, each with two completions of 3:

    rows    0..200  prompt a   own             cross: rows 0..412, keys of the instruction
    rows  200..206  its two    own, a tile     cross: rows 200..206, keys 0..200 of this pass
    rows  206..406  prompt b   own
    rows  406..412  its two    own, a tile     cross: rows 406..412, keys 206..406 of this pass

Partial results of one row are joined by their log-sum-exp, which is exact.

Rows behind a junction descend from several spans. So the rows that see a branch's keys may lie in several slices, each
with its own count of those keys: each slice has a segment.

Segments do not depend on the model, but the kernel calls (`Pass.calls`) do. A sliding window hides keys. Calls with
keys near each other are merged under a mask if that is cheaper, and this depends on the model's heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from backprompt.forest.fan import Fan
from backprompt.forest.span import Junction, Span

TILE_TOKENS = 128
"""Subtrees up to this many tokens are computed densely under a tree mask."""

SMALL_TOKENS = 32
"""Causal runs and tiles up to this many tokens share a tile with their neighbours: a separate call costs more."""

CALL_MULTIPLICATIONS = 1_500_000
"""The fixed cost of a kernel call, in multiplications of two numbers (a query and a key take heads times head_dim of
them): about 65 us on two cores."""

WINDOW_CHUNK_ROWS = 512
"""Under a sliding window a long causal run is computed in chunks of this many rows, so that its mask stays small."""


@dataclass(frozen=True, slots=True)
class KeySegment:
    """Rows `start..stop` of a pass see keys `key_start..key_stop` of a block, or of the pass itself.

    Attributes:
        start, stop: the rows.
        block: the block that holds the keys; None for the pass itself.
        key_start, key_stop: the keys.
        key_position: the position of the first key; the other keys follow at consecutive positions, except in tiles.
        times: how often each key counts: the number of equal branches.
        visible_until: for a tile, the row at which the last descendant of each key's span ends: row q sees key k if
            `k <= q < visible_until[k - key_start]`. None for a causal run, and for keys outside the rows, which every
            row sees.
        grows: whether the row also sees the next key in the next step of a generation; see steps.py.

    """

    start: int
    stop: int
    block: object | None
    key_start: int
    key_stop: int
    key_position: int
    times: int = 1
    visible_until: tuple[int, ...] | None = None
    grows: bool = False

    @classmethod
    def own(cls, start: int, stop: int, position: int, visible_until: tuple[int, ...] | None = None) -> KeySegment:
        """Return the segment of rows that see each other, the first at `position`."""
        return cls(start, stop, None, start, stop, position, visible_until=visible_until)

    @property
    def is_own(self) -> bool:
        """Whether the keys belong to the rows themselves."""
        return self.block is None and self.key_start == self.start


@dataclass(frozen=True)
class Call:
    """One kernel call: `rows` of the pass against `keys` of a block, or of the pass itself if `block` is None.

    Attributes:
        segments: the segments of these rows and keys.
        window: rows see keys fewer than this many positions back; None if the window hides none of the keys.

    """

    rows: slice
    block: object | None
    keys: slice
    segments: tuple[KeySegment, ...]
    window: int | None

    @cached_property
    def is_own(self) -> bool:
        """Whether rows see each other; each row has exactly one such call, and its other calls are joined to it."""
        return self.segments[0].is_own

    @cached_property
    def times(self) -> int:
        """How often each key counts."""
        return self.segments[0].times

    @cached_property
    def needs_mask(self) -> bool:
        """Whether some row sees only a part of the keys, in another way than causally."""
        return len(self.segments) > 1 or self.window is not None or self.segments[0].visible_until is not None

    @cached_property
    def is_causal(self) -> bool:
        """Whether row i sees keys 0 to i, without a mask."""
        return self.is_own and not self.needs_mask

    @cached_property
    def num_pairs(self) -> int:
        """The number of pairs of a row and a key that the kernel multiplies."""
        num_rows: int = self.rows.stop - self.rows.start
        num_keys: int = self.keys.stop - self.keys.start
        return num_rows * num_keys


@dataclass(frozen=True)
class Pass:
    """One packed forward pass: the spans to compute, in row order, and the keys that their rows see.

    Attributes:
        spans: spans with tokens, depth first.
        segments: first the own segments, in the order of the rows, each row in exactly one; then the cross segments.

    """

    spans: tuple[Span, ...]
    segments: tuple[KeySegment, ...]

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the pass forwards: the length of its row."""
        return sum(len(span.token_ids) for span in self.spans)

    @property
    def slices(self) -> list[slice]:
        """The rows of each span."""
        stops = list(accumulate(len(span.token_ids) for span in self.spans))
        return [slice(stop - len(span.token_ids), stop) for span, stop in zip(self.spans, stops, strict=True)]

    @cached_property
    def token_ids(self) -> list[int]:
        """The row: the ids of all spans, one after the other."""
        return [token_id for span in self.spans for token_id in span.token_ids]

    @cached_property
    def positions(self) -> list[int]:
        """The position of each token of the row in its own text."""
        return [position for span in self.spans for position in span.positions]

    def calls(self, window: int | None, multiplications_a_pair: int) -> list[Call]:
        """Return the kernel calls of a layer, own calls first.

        Args:
            window: rows see keys fewer than this many positions back; None without a window.
            multiplications_a_pair: the number of products for a pair of a row and a key: heads times head_dim.

        """
        positions = [] if window is None else self.positions
        own = [call for segment in self.segments if segment.is_own for call in _own_calls(segment, window)]
        others = [
            call
            for segment in self.segments
            if not segment.is_own
            for call in _cross_calls(segment, positions[segment.start : segment.stop], window)
        ]
        return own + _merge_calls(others, CALL_MULTIPLICATIONS // multiplications_a_pair)


def plan_pass(spans: Sequence[Span], tile_tokens: int = TILE_TOKENS) -> Pass:
    """Lay depth-first `spans` out in one row and return the keys that its rows see.

    Junctions have no rows and are left out. Ancestors outside `spans` must be computed: an earlier pass, or an earlier
    evaluation, holds their keys.
    """
    laid_out = tuple(span for span in spans if span.token_ids)
    spans = [part for span in laid_out for part in _parts(span, tile_tokens)]
    layout = _Layout(spans)
    own: list[KeySegment] = []
    reach: dict[tuple[Span, int], list[slice]] = {}  # ancestor, its count -> rows that see it
    run_end: Span | None = None  # the last span of the causal run at the end of `own`, if there is one
    seen: dict[Span, int] = {}  # the ancestors that the current rows see
    idx = 0
    while idx < len(spans):
        start = layout.starts[idx]
        next_idx = layout.end_of_tile(idx, tile_tokens)
        visible_until = layout.visible_until(idx, next_idx)
        next_idx = max(next_idx, idx + 1)
        stop = layout.starts[next_idx]
        if visible_until is None and spans[idx].parent is run_end and not spans[idx].begins_chain:
            # A span that directly continues a causal run, as its only or first child, joins it.
            own[-1] = KeySegment.own(own[-1].start, stop, own[-1].key_position)
        else:
            own.append(KeySegment.own(start, stop, spans[idx].position, visible_until))
            seen = _seen_by(spans[idx])
        run_end = spans[next_idx - 1] if visible_until is None else None
        for ancestor in seen.items():
            slices = reach.setdefault(ancestor, [])
            if slices and slices[-1].stop == start:
                slices[-1] = slice(slices[-1].start, stop)
            else:
                slices.append(slice(start, stop))
        idx = next_idx
    return Pass(laid_out, (*_merge_small(own, tile_tokens), *_cross_segments(reach, layout)))


def _parts(span: Span, tile_tokens: int) -> Sequence[Span]:
    """Return the spans that a fan unfolds into if it is too large for a tile, in the order of its rows; else the span.

    The fan itself stays unchanged.
    """
    return span.unfolded() if isinstance(span, Fan) and len(span.token_ids) > tile_tokens else (span,)


def _seen_by(span: Span) -> dict[Span, int]:
    """Return the earlier spans that the rows of a span attend to, from the first on, and how often each counts."""
    counts: dict[Span, int] = {}
    if span.parent is not None:
        _count_chain(counts, span.parent, None, 1)
    return dict(reversed(counts.items()))


def _count_chain(counts: dict[Span, int], end: Span, base: Span | None, times: int) -> None:
    """Add the spans between `base` and `end` to `counts`, from the last back to the first."""
    span: Span | None = end
    while span is not None and span is not base:
        if isinstance(span, Junction):
            for (branch_end, is_frozen), repeats in span.branches.items():
                _count_chain(counts, branch_end, None if is_frozen else span.parent, times * repeats)
        elif span.token_ids:
            counts[span] = counts.get(span, 0) + times
        span = span.parent


class _Layout:
    """The place of each span of a pass in its row: span `i` at rows `starts[i]..starts[i + 1]`."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.starts = [0]
        for span in spans:
            self.starts.append(self.starts[-1] + len(span.token_ids))
        self.idx_of = {span: idx for idx, span in enumerate(spans)}
        self.subtree_ends = list(range(1, len(spans) + 1))  # idx after the last descendant in this pass
        for idx in range(len(spans) - 1, -1, -1):
            parent_idx = self.idx_of.get(_parent(spans[idx]))
            if parent_idx is not None:
                self.subtree_ends[parent_idx] = max(self.subtree_ends[parent_idx], self.subtree_ends[idx])
        self._until: list[int] = []  # for each row, the row at which its last descendant ends
        for span, start, subtree_end in zip(spans, self.starts, self.subtree_ends, strict=False):
            if isinstance(span, Fan):
                self._until += [start + row for row in span.shape.rows.until]
            else:
                self._until += [self.starts[subtree_end]] * len(span.token_ids)

    def end_of_tile(self, idx: int, tile_tokens: int) -> int:
        """Return the idx after the sibling subtrees from `idx` on that fit into one tile; `idx` if none fits."""
        parent = self.spans[idx].parent
        end = idx
        while end < len(self.spans) and self.spans[end].parent is parent:
            subtree_end = self.subtree_ends[end]
            if self.starts[subtree_end] - self.starts[idx] > tile_tokens or not self._is_tree(end, subtree_end):
                break
            end = subtree_end
        return end

    def _is_tree(self, idx: int, end: int) -> bool:
        """Return whether these spans are one tree in depth-first order.

        Spans that a junction needs are moved forward, and may lie between a span and its child.
        """
        above = [self.spans[idx]]
        for span in self.spans[idx + 1 : end]:
            while above and above[-1] is not span.parent:
                above.pop()
            if not above:
                return False
            above.append(span)
        return True

    def visible_until(self, idx: int, end: int) -> tuple[int, ...] | None:
        """Return the tile's `KeySegment.visible_until`; None if the tile is one chain, which is simply causal.

        A chain has no gaps of positions, so a window covers as many rows as positions.
        """
        until = tuple(self._until[self.starts[idx] : self.starts[end]])
        spans = self.spans[idx:end]
        is_chain = until.count(self.starts[end]) == len(until) and not any(isinstance(span, Fan) for span in spans)
        return None if is_chain and not any(span.begins_chain for span in spans[1:]) else until


def _merge_small(own: Sequence[KeySegment], tile_tokens: int) -> list[KeySegment]:
    """Put small neighbours into one tile, with any ancestors: the mask hides unrelated rows from each other."""
    merged: list[KeySegment] = []
    is_small = False  # whether the last segment may take in more
    for piece in own:
        last = merged[-1] if merged else piece
        fits = is_small and piece.stop - piece.start <= SMALL_TOKENS and piece.stop - last.start <= tile_tokens
        if fits:
            until = _visible_until(last) + _visible_until(piece)
            merged[-1] = KeySegment.own(last.start, piece.stop, last.key_position, until)
        else:
            merged.append(piece)
            is_small = piece.stop - piece.start <= SMALL_TOKENS
    return merged


def _visible_until(own: KeySegment) -> tuple[int, ...]:
    return (own.stop,) * (own.stop - own.start) if own.visible_until is None else own.visible_until


def _cross_segments(reach: Mapping[tuple[Span, int], list[slice]], layout: _Layout) -> list[KeySegment]:
    """Return a segment for each ancestor and slice of rows; adjacent keys that the same rows see share a segment."""
    segments: list[KeySegment] = []
    last_of_rows: dict[tuple[int, int, int], int] = {}
    for (span, times), slices in reach.items():
        idx = layout.idx_of.get(span)
        if idx is not None:
            block, key_start, key_stop = None, layout.starts[idx], layout.starts[idx + 1]
        else:
            held = span.keys_values
            assert held is not None, f"{span!r} is neither in the pass nor computed"
            block, key_start, key_stop = held.block, held.start, held.stop
        for rows in slices:
            segment = KeySegment(rows.start, rows.stop, block, key_start, key_stop, span.position, times)
            last_idx = last_of_rows.get((rows.start, rows.stop, times))
            if last_idx is not None and _is_neighbour(segments[last_idx], segment):
                segments[last_idx] = replace(segments[last_idx], key_stop=key_stop)
            else:
                last_of_rows[rows.start, rows.stop, times] = len(segments)
                segments.append(segment)
    return segments


def _is_neighbour(segment: KeySegment, following: KeySegment) -> bool:
    """Return whether the second segment's keys directly follow those of the first, in memory and by position."""
    return (
        segment.block is following.block
        and segment.key_stop == following.key_start
        and segment.key_position + segment.key_stop - segment.key_start == following.key_position
    )


def _parent(span: Span) -> Span:
    assert span.parent is not None
    return span.parent


# Kernel calls


def _own_calls(segment: KeySegment, window: int | None) -> Iterator[Call]:
    """Yield the calls of rows that see each other."""
    rows = slice(segment.start, segment.stop)
    if segment.visible_until is not None:
        yield Call(rows, None, rows, (segment,), window)
    elif window is None or segment.stop - segment.start <= window:
        yield Call(rows, None, rows, (segment,), None)
    else:  # a run has no gaps of positions, so a window covers as many rows as positions
        for start in range(segment.start, segment.stop, WINDOW_CHUNK_ROWS):
            chunk = slice(start, min(start + WINDOW_CHUNK_ROWS, segment.stop))
            keys = slice(max(segment.start, start - window + 1), chunk.stop)
            yield Call(chunk, None, keys, (segment,), window)


def _cross_calls(segment: KeySegment, positions: Sequence[int], window: int | None) -> Iterator[Call]:
    """Yield the call of rows, at `positions`, that see keys other than their own; none if the window hides all."""
    rows, keys = slice(segment.start, segment.stop), slice(segment.key_start, segment.key_stop)
    if window is None:
        yield Call(rows, segment.block, keys, (segment,), None)
        return
    num_hidden = max(0, min(positions) - window + 1 - segment.key_position)  # keys that no row sees
    if num_hidden >= segment.key_stop - segment.key_start:
        return
    seen = replace(segment, key_start=segment.key_start + num_hidden, key_position=segment.key_position + num_hidden)
    hides_some = max(positions) - seen.key_position >= window
    yield Call(rows, segment.block, slice(seen.key_start, seen.key_stop), (seen,), window if hides_some else None)


def _merge_calls(calls: Sequence[Call], pairs_a_call: int) -> list[Call]:
    """Merge calls whose keys lie near each other in a block, if one call for all of them costs less.

    A merged call multiplies all its rows by all keys between the first and the last. Each call saved is worth
    `pairs_a_call` pairs.
    """
    merged: list[_Merged] = []
    last_of: dict[tuple[int, int], _Merged] = {}  # by block, and by how often the keys count
    for call in sorted(calls, key=lambda call: call.keys.start):
        last = last_of.get((id(call.block), call.times))
        if last is None or not last.takes_in(call, pairs_a_call):
            last = last_of[id(call.block), call.times] = _Merged(call)
            merged.append(last)
    return [of_several.call for of_several in merged]


class _Merged:
    """A call that takes in others: its rows and keys so far, and the cost of separate calls, in pairs."""

    def __init__(self, first: Call) -> None:
        self._calls = [first]
        self._rows, self._keys = first.rows, first.keys
        self._num_pairs = first.num_pairs

    def takes_in(self, call: Call, pairs_a_call: int) -> bool:
        """Take another call in if one call for all costs less; return whether it does."""
        rows, keys = _union(self._rows, call.rows), _union(self._keys, call.keys)
        num_pairs = self._num_pairs + call.num_pairs + pairs_a_call
        if (rows.stop - rows.start) * (keys.stop - keys.start) > num_pairs:
            return False
        self._calls.append(call)
        self._rows, self._keys, self._num_pairs = rows, keys, num_pairs
        return True

    @property
    def call(self) -> Call:
        """One call for all."""
        if len(self._calls) == 1:
            return self._calls[0]
        segments = tuple(segment for call in self._calls for segment in call.segments)
        window = next((call.window for call in self._calls if call.window), None)
        return Call(self._rows, self._calls[0].block, self._keys, segments, window)


def _union(a: slice, b: slice) -> slice:
    return slice(min(a.start, b.start), max(a.stop, b.stop))
