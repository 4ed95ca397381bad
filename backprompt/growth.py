"""Texts that grow a token at a time: their spans stay few, and their rows side by side.

Each step of a generation leaves one span of one token a text, with its row among those of all texts. Attending to a
thousand such spans would take a thousand calls a layer. So after each step the new spans absorb those that they
continue, and their rows are copied behind those in a buffer with room for more; what ends a text that somebody else
knows of is never absorbed. Texts that outgrow their room at the same step move on to one buffer together, where each
has room for an eighth more, or 16 rows: so that one call a layer can attend to what all of them added.

    prompt -- " the" -- " cat"        step 3        prompt -- " the cat"
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor

from backprompt.cache import Block, BlockRows, KeysValues, Location, States, keys_values_of, states_of
from backprompt.forest import Forest
from backprompt.radix import Span

ROWS_AT_A_TIME = 16
"""A text has room for as many rows more than it needs, or an eighth of them."""


@dataclass
class _Buffer:
    """What is known of a buffer: the states beside its keys and values, and where there is room.

    `room` says at which row the room ends that begins where a text's rows end. It holds for as long as the buffer has
    `num_rows`: one that was made smaller has none.
    """

    states: ref[States]
    num_rows: int
    room: dict[int, int]


@dataclass(frozen=True)
class _Copy:
    """Rows that go to another place: a span's, and where they begin there."""

    rows: BlockRows[KeysValues]
    states: BlockRows[States]
    to_keys_values: KeysValues
    to_states: States
    start: int


class Growth:
    """Absorbs what was computed a token at a time.

    Args:
        forest: whose spans.

    """

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._buffers: WeakKeyDictionary[KeysValues, _Buffer] = WeakKeyDictionary()  # live as long as their spans
        self._mixed: WeakSet[Block] = WeakSet()  # blocks with rows of several texts, or with room

    def note_pass(self, span: Span) -> None:
        """Note that a span was computed in a pass together with those of other texts."""
        self._mixed.update((keys_values_of(span).block, states_of(span).block))

    def absorb(self, spans: Sequence[Span], held: Container[Span]) -> list[Block]:
        """Let spans absorb what they continue, where nobody else knows of that; return blocks made for it.

        Args:
            spans: what absorbs.
            held: ends of texts that somebody holds.

        """
        made: list[Block] = []
        absorbing = list(spans)
        while absorbing:
            pairs = [(upper, span) for span in absorbing if (upper := _absorbable(span, held)) is not None]
            apart = [(upper, span) for upper, span in pairs if _adjacent(upper, span) is None]
            made += self._make_room([pair for pair in apart if not self._has_room(*pair)])
            places = self._append(apart)
            for upper, span in pairs:
                place = places.get(span) or _adjacent(upper, span)
                assert place is not None
                self._forest.absorb(span, *place)
            absorbing = [span for _, span in pairs]
        for span in spans:
            if span.parent is not None and not span.parent.is_end:
                made += self._move_out(span.parent)  # several continue it
        return made

    def finish(self, span: Span) -> list[Block]:
        """Give back the room beside what a text was grown in: nothing will be appended to it any more.

        Others may have cut it meanwhile, so all that it continues is looked at.
        """
        return [block for part in span.path() for block in self._move_out(part)]

    def _has_room(self, upper: Span, span: Span) -> bool:
        """Whether there is room behind a span's rows for those of what continues it."""
        rows, states = keys_values_of(upper), states_of(upper)
        buffer = self._buffers.get(rows.block)
        return (
            buffer is not None
            and buffer.states() is states.block
            and rows.block.num_rows == states.block.num_rows == buffer.num_rows
            and rows.stop == states.stop
            and rows.stop + len(span.token_ids) <= buffer.room.get(rows.stop, 0)
        )

    def _make_room(self, pairs: Sequence[tuple[Span, Span]]) -> list[Block]:
        """Copy the rows of spans into one buffer, each with room for what continues it and some more."""
        if not pairs:
            return []
        first, start = pairs[0][0], 0
        copies: list[_Copy] = []
        room: dict[int, int] = {}
        starts = []
        for upper, span in pairs:
            num_rows = len(upper.token_ids) + len(span.token_ids)
            num_rows += max(ROWS_AT_A_TIME, num_rows // 8)
            starts.append(start)
            room[start + len(upper.token_ids)] = start + num_rows
            start += num_rows
        keys_values = _empty_keys_values(keys_values_of(first).block, start)
        states = _empty_states(states_of(first).block, start)
        for (upper, _), start in zip(pairs, starts, strict=True):
            copies.append(_Copy(keys_values_of(upper), states_of(upper), keys_values, states, start))
        _copy(copies)
        self._buffers[keys_values] = _Buffer(ref(states), keys_values.num_rows, room)
        self._mixed.update((keys_values, states))
        for (upper, _), start in zip(pairs, starts, strict=True):
            stop = start + len(upper.token_ids)
            upper.rows, upper.states = BlockRows(keys_values, start, stop), BlockRows(states, start, stop)
        return [keys_values, states]

    def _append(
        self, pairs: Sequence[tuple[Span, Span]]
    ) -> dict[Span, tuple[BlockRows[KeysValues], BlockRows[States]]]:
        """Copy spans' rows behind those of what they continue; return where both lie then."""
        copies, places = [], {}
        for upper, span in pairs:
            rows, states = keys_values_of(upper), states_of(upper)
            copies.append(_Copy(keys_values_of(span), states_of(span), rows.block, states.block, rows.stop))
            room = self._buffers[rows.block].room
            stop = rows.stop + len(span.token_ids)
            room[stop] = room.pop(rows.stop)
            places[span] = BlockRows(rows.block, rows.start, stop), BlockRows(states.block, states.start, stop)
        _copy(copies)
        return places

    def _move_out(self, span: Span) -> list[Block]:
        """Give what was generated blocks of its own; those of several texts would keep the others' rows alive."""
        if not (span.token_ids and span.is_held(with_keys=True)):
            return []
        made: list[Block] = []
        rows, states = keys_values_of(span), states_of(span)
        if rows.block in self._mixed and rows.block.num_rows > len(span.token_ids):
            keys_values = rows.block.copied([slice(rows.start, rows.stop)], Location.of(rows.block.keys[0]))
            span.rows = BlockRows(keys_values, 0, len(span.token_ids))
            made.append(keys_values)
        if states.block in self._mixed and states.block.num_rows > len(span.token_ids):
            own = states.block.copied([slice(states.start, states.stop)], Location.of(states.block.hidden))
            span.states = BlockRows(own, 0, len(span.token_ids))
            made.append(own)
        return made


def _copy(copies: Iterable[_Copy]) -> None:
    """Copy rows, those from one block to another together."""
    by_keys_values: dict[tuple[KeysValues, KeysValues], list[tuple[slice, int]]] = {}
    by_states: dict[tuple[States, States], list[tuple[slice, int]]] = {}
    for copy in copies:
        rows, states = slice(copy.rows.start, copy.rows.stop), slice(copy.states.start, copy.states.stop)
        by_keys_values.setdefault((copy.rows.block, copy.to_keys_values), []).append((rows, copy.start))
        by_states.setdefault((copy.states.block, copy.to_states), []).append((states, copy.start))
    for (block, into), moves in by_keys_values.items():
        indices = _indices(moves)
        for sources, targets in ((block.keys, into.keys), (block.values, into.values)):
            for source, target in zip(sources, targets, strict=True):
                _copy_rows(source, target, indices, dim=1)
    for (states_block, states_into), moves in by_states.items():
        indices = _indices(moves)
        for name in ("hidden", "logprobs", "is_argmax", "has_logprobs"):
            _copy_rows(getattr(states_block, name), getattr(states_into, name), indices, dim=0)


def _indices(moves: Iterable[tuple[slice, int]]) -> tuple[Tensor, Tensor]:
    """Return which rows go, and to which rows."""
    pairs = [(row, start + idx) for rows, start in moves for idx, row in enumerate(range(rows.start, rows.stop))]
    sources, targets = torch.tensor(pairs).unbind(dim=1)
    return sources, targets


def _copy_rows(source: Tensor, target: Tensor, indices: tuple[Tensor, Tensor], dim: int) -> None:
    sources, targets = (index.to(source.device) for index in indices)
    target.index_copy_(dim, targets, source.index_select(dim, sources))


def _absorbable(span: Span, held: Container[Span]) -> Span | None:
    """Return what a span directly continues, if that is nobody's end and only this continues it."""
    upper = span.parent
    if (
        upper is None
        or not upper.token_ids
        or upper.is_end
        or upper in held
        or len(upper.children) > 1
        or span.begins_chain
        or not upper.is_held(with_keys=True)
        or not span.is_held(with_keys=True)
        or (upper.is_stored, upper.error) != (span.is_stored, span.error)
    ):
        return None
    return upper


def _adjacent(upper: Span, lower: Span) -> tuple[BlockRows[KeysValues], BlockRows[States]] | None:
    """Return where both lie together, if they lie side by side already."""
    rows, more_rows = keys_values_of(upper), keys_values_of(lower)
    states, more_states = states_of(upper), states_of(lower)
    if (rows.block, rows.stop) != (more_rows.block, more_rows.start):
        return None
    if (states.block, states.stop) != (more_states.block, more_states.start):
        return None
    return BlockRows(rows.block, rows.start, more_rows.stop), BlockRows(states.block, states.start, more_states.stop)


def _empty_keys_values(like: KeysValues, num_rows: int) -> KeysValues:
    """Return zeros: a masked key that is nan would spoil the rows that do not see it."""
    keys, values = (
        [Location.of(t).empty((t.shape[0], num_rows, t.shape[2]), t.dtype).zero_() for t in tensors]
        for tensors in (like.keys, like.values)
    )
    return KeysValues(keys, values)


def _empty_states(like: States, num_rows: int) -> States:
    return States.of(Location.of(like.hidden).empty((num_rows, like.hidden.shape[1]), like.hidden.dtype))
