"""The plan: which spans to forward, packed in what order, and which attention calls each pass makes. Pure Python.

All spans that the wanted texts need and that are not computed are laid out depth first in one row of tokens, cut
into *passes*. In that order the descendants of a span are one contiguous slice of the row, so a pass needs only
two kinds of attention calls, each on contiguous slices:

- `Own`: rows that attend to themselves. Either a causal run (a long span, with the first child that continues it),
  or a *tile*: consecutive small runs and subtrees, attended to densely under a mask of what each row descends from.
- `Cross`: rows that all descend from the same earlier span and attend to all of its keys, unmasked.

Example: an instruction of 300 tokens, cached; under it two prompts of 200 tokens, each with two completions of 3:

    rows    0..200  prompt a   Own(0, 200)         Cross(rows 0..412, keys of the instruction)
    rows  200..206  its two    Own(200, 206, tile) Cross(rows 200..206, keys 0..200 of this pass)
    rows  206..406  prompt b   Own(206, 406)
    rows  406..412  its two    Own(406, 412, tile) Cross(rows 406..412, keys 206..406 of this pass)

The partial results of one row are joined by their log-sum-exp, which is exact.

What stands behind a junction descends from several spans, so the rows that see a branch's keys may lie in several
slices, and there they may count several times: a Cross each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from backprompt.radix import Forest, Span, depth_first

TILE_TOKENS = 128
"""Subtrees up to this many tokens are attended to densely under a tree mask."""

SMALL_TOKENS = 32
"""Causal runs and tiles up to this many tokens share a tile with their neighbours: a call costs more than that."""

MIN_CUT_TOKENS = 32
"""A span is cut at the end of a pass only where at least this many tokens of it still fit."""


@dataclass(frozen=True, slots=True)
class Own:
    """Rows `start..stop` of the pass attend to themselves.

    `visible_until` is None for a causal run. For a tile it holds, for each row, the row at which the last descendant
    of its span ends: row q sees row k when `k <= q < visible_until[k - start]`.
    """

    start: int
    stop: int
    visible_until: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Cross:
    """Rows `start..stop` of the pass attend to all rows `key_start..key_stop` of a block of keys and values.

    `block` is None for the pass itself. The first key is at position `key_position`; the others follow it. Each key
    counts `times` times: its branch stands there so often.
    """

    start: int
    stop: int
    block: object | None
    key_start: int
    key_stop: int
    key_position: int
    times: int = 1


@dataclass(frozen=True, slots=True)
class Pass:
    """One packed forward pass: the spans to compute, in row order, and how their rows attend."""

    spans: tuple[Span, ...]
    own: tuple[Own, ...]
    cross: tuple[Cross, ...]

    @property
    def num_tokens(self) -> int:
        """How many tokens the pass forwards: the length of its row."""
        return sum(len(span.token_ids) for span in self.spans)

    @property
    def slices(self) -> list[slice]:
        """Which rows each span has."""
        stops = list(accumulate(len(span.token_ids) for span in self.spans))
        return [slice(stop - len(span.token_ids), stop) for span, stop in zip(self.spans, stops, strict=True)]

    @property
    def token_ids(self) -> list[int]:
        """The row: all spans' ids, one after the other."""
        return [token_id for span in self.spans for token_id in span.token_ids]

    @property
    def positions(self) -> list[int]:
        """The position of each token of the row in its own text."""
        return [p for span in self.spans for p in range(span.position, span.position + len(span.token_ids))]


def missing_spans(ends: Iterable[Span], *, with_keys: bool = False) -> list[Span]:
    """Return the spans to forward so that `ends` hold their states, depth first; each before what continues it.

    These are the spans on the way that hold no states, and what they continue and holds no keys and values any more.
    `with_keys`: the ends shall hold keys and values, too.

    Texts that share nothing come as asked for. Of several continuations of one span the one with the most tokens to
    compute comes first: it joins the causal run of what it continues, and the small ones lie side by side behind it.
    """
    wanted: dict[Span, list[Span]] = {}  # all spans on the way, with those that continue them
    for end in ends:
        if end.states is not None and not (with_keys and end.rows is None):
            continue
        stack = [end]
        while stack:
            span = stack.pop()
            if span not in wanted:
                wanted[span] = []
                stack += span.parents
    for span in list(wanted):
        if span.parent is not None:
            wanted[span.parent].append(span)
    root = next((span for span in wanted if span.parent is None), None)
    if root is None:
        return []
    num_missing = _num_missing(root, wanted)

    def largest_first(span: Span) -> list[Span]:
        following = wanted[span]
        # With junctions as asked for: what stands behind one is through before the branches of others.
        if span is root or not all(child.token_ids for child in following):
            return following
        return sorted(following, key=num_missing.__getitem__, reverse=True)

    return list(filter(_is_missing, depth_first(root, largest_first)))


def _num_missing(root: Span, children: Mapping[Span, list[Span]]) -> dict[Span, int]:
    """Return, for each span, how many tokens are to be computed of it and of what continues it."""
    top_down = [root]
    for span in top_down:
        top_down += children[span]
    num_missing: dict[Span, int] = {}
    for span in reversed(top_down):
        own = len(span.token_ids) if _is_missing(span) else 0
        num_missing[span] = own + sum(map(num_missing.__getitem__, children[span]))
    return num_missing


def _is_missing(span: Span) -> bool:
    """Return whether a span on the way to an end that must be computed has to be forwarded."""
    return span.parent is not None and span.rows is None


def cut_into_passes(forest: Forest, spans: Sequence[Span], max_tokens: int) -> list[tuple[Span, ...]]:
    """Group depth-first `spans` into passes of at most `max_tokens` tokens and about equal size.

    A span that does not fit is split in the forest, which changes no result: the cut-off part sees the first part's
    keys as it sees any ancestor's.
    """
    num_tokens = sum(len(span.token_ids) for span in spans)
    num_passes = -(-num_tokens // max_tokens)
    target = -(-num_tokens // num_passes) if num_passes else 0
    passes: list[tuple[Span, ...]] = []
    current: list[Span] = []
    num_current = 0
    for span in spans:
        while num_current + len(span.token_ids) > max_tokens:
            room = target - num_current
            if room >= MIN_CUT_TOKENS or not current:
                current.append(forest.split(span, room))
            passes.append(tuple(current))
            current, num_current = [], 0
        current.append(span)
        num_current += len(span.token_ids)
        if num_current >= target:
            passes.append(tuple(current))
            current, num_current = [], 0
    if current:
        passes.append(tuple(current))
    return passes


def plan_pass(spans: Sequence[Span], tile_tokens: int = TILE_TOKENS) -> Pass:
    """Lay depth-first `spans` out in one row and return the attention calls that they need.

    Junctions have no rows and are left out. Ancestors that are not among `spans` must be computed: an earlier pass, or
    an earlier evaluation, holds their keys.
    """
    spans = [span for span in spans if span.token_ids]
    layout = _Layout(spans)
    own: list[Own] = []
    reach: dict[tuple[Span, int], list[slice]] = {}  # ancestor, how often it counts -> rows that see it by a Cross
    run_end: Span | None = None  # the last span of the causal run that `own` ends with, if it ends with one
    seen: dict[Span, int] = {}  # what the rows at hand see by a Cross
    idx = 0
    while idx < len(spans):
        start = layout.starts[idx]
        next_idx = layout.end_of_tile(idx, tile_tokens)
        visible_until = layout.visible_until(idx, next_idx)
        next_idx = max(next_idx, idx + 1)
        stop = layout.starts[next_idx]
        if visible_until is None and spans[idx].parent is run_end and not spans[idx].begins_chain:
            # What directly continues a causal run, as its only or first child, joins it: no Cross for its rows.
            own[-1] = Own(own[-1].start, stop)
        else:
            own.append(Own(start, stop, visible_until))
            seen = spans[idx].seen()
        run_end = spans[next_idx - 1] if visible_until is None else None
        for ancestor in seen.items():
            slices = reach.setdefault(ancestor, [])
            if slices and slices[-1].stop == start:
                slices[-1] = slice(slices[-1].start, stop)
            else:
                slices.append(slice(start, stop))
        idx = next_idx
    return Pass(tuple(spans), tuple(_merge_small(own, tile_tokens)), tuple(_merge_crosses(reach, layout)))


class _Layout:
    """Where each span of a pass lies in its row: span `i` at rows `starts[i]..starts[i + 1]`."""

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

    def end_of_tile(self, idx: int, tile_tokens: int) -> int:
        """Return the idx after the sibling subtrees from `idx` on that fit into one tile together; `idx` if none."""
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

        What a junction still needs is drawn forward, and may stand between a span and what continues it.
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
        """Return the tile's `Own.visible_until`; None where the tile is one chain, which is plainly causal.

        A chain has no gaps of positions, so that a window is as many rows as positions.
        """
        inner = [self.spans[i] for i in range(idx + 1, end)]
        if all(span.parent is before for span, before in zip(inner, self.spans[idx:end], strict=False)) and not any(
            span.begins_chain for span in inner
        ):
            return None
        return tuple(
            self.starts[self.subtree_ends[i]]
            for i in range(idx, end)
            for _ in range(self.starts[i], self.starts[i + 1])
        )


def _merge_small(own: Sequence[Own], tile_tokens: int) -> list[Own]:
    """Put small neighbours into one tile, whatever they descend from: it hides them from each other anyway."""
    merged: list[Own] = []
    is_small = False  # whether the last one may take in more
    for piece in own:
        last = merged[-1] if merged else piece
        fits = is_small and piece.stop - piece.start <= SMALL_TOKENS and piece.stop - last.start <= tile_tokens
        if fits:
            merged[-1] = Own(last.start, piece.stop, _visible_until(last) + _visible_until(piece))
        else:
            merged.append(piece)
            is_small = piece.stop - piece.start <= SMALL_TOKENS
    return merged


def _visible_until(own: Own) -> tuple[int, ...]:
    return (own.stop,) * (own.stop - own.start) if own.visible_until is None else own.visible_until


def _merge_crosses(reach: Mapping[tuple[Span, int], list[slice]], layout: _Layout) -> list[Cross]:
    """Return a Cross for each ancestor and slice of rows; neighbours in memory that the same rows see share one."""
    crosses: list[Cross] = []
    last_of_rows: dict[tuple[int, int, int], int] = {}
    for (span, times), slices in reach.items():
        idx = layout.idx_of.get(span)
        if idx is not None:
            block, key_start, key_stop = None, layout.starts[idx], layout.starts[idx + 1]
        else:
            assert span.rows is not None, f"{span!r} is neither in the pass nor computed"
            block, key_start, key_stop = span.rows.block, span.rows.start, span.rows.stop
        for rows in slices:
            cross = Cross(rows.start, rows.stop, block, key_start, key_stop, span.position, times)
            last_idx = last_of_rows.get((rows.start, rows.stop, times))
            if last_idx is not None and _is_neighbour(crosses[last_idx], cross):
                crosses[last_idx] = replace(crosses[last_idx], key_stop=key_stop)
            else:
                last_of_rows[rows.start, rows.stop, times] = len(crosses)
                crosses.append(cross)
    return crosses


def _is_neighbour(cross: Cross, following: Cross) -> bool:
    """Return whether the keys of the second lie right behind those of the first, in memory and by position."""
    return (
        cross.block is following.block
        and cross.key_stop == following.key_start
        and cross.key_position + cross.key_stop - cross.key_start == following.key_position
    )


def _parent(span: Span) -> Span:
    assert span.parent is not None
    return span.parent
