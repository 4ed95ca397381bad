"""Texts that grow a token at a time: their spans stay few, and their rows side by side.

Each step of a generation leaves one span of one token a text, with its row among those of all texts. Attending to a
thousand such spans would take a thousand calls a layer. So after each step the new span absorbs the one that it
continues, and its row is copied behind that one's into a buffer with room for more; what ends a text that somebody else
knows of is never absorbed. A buffer that is full is copied into one that is larger by an eighth, or by 16 rows.

    prompt -- " the" -- " cat"        step 3        prompt -- " the cat"
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet, ref

from backprompt.cache import Block, BlockRows, KeysValues, Location, States, keys_values_of, states_of
from backprompt.radix import Forest, Span

ROWS_AT_A_TIME = 16
"""A buffer has room for as many rows more than it needs, or an eighth of them."""


@dataclass
class _Room:
    """How many rows of a buffer are used, and where the states beside its keys and values are."""

    states: ref[States]
    num_used: int


class Growth:
    """Absorbs what was computed a token at a time.

    Args:
        forest: whose spans.

    """

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._rooms: WeakKeyDictionary[KeysValues, _Room] = WeakKeyDictionary()  # buffers live as long as their spans
        self._mixed: WeakSet[Block] = WeakSet()  # blocks with rows of several texts, or with room

    def note_pass(self, span: Span) -> None:
        """Note that a span was computed in a pass together with those of other texts."""
        self._mixed.update((keys_values_of(span).block, states_of(span).block))

    def absorb(self, span: Span) -> list[Block]:
        """Let a span absorb what it continues, where nobody else knows of that; return blocks that were made for it."""
        made: list[Block] = []
        while (upper := _absorbable(span)) is not None:
            rows, states = _adjacent(upper, span)
            if rows is None or states is None:
                if not self._has_room(upper, len(span.token_ids)):
                    made += self._move_to_buffer(upper, len(upper.token_ids) + len(span.token_ids))
                rows, states = self._append(upper, span)
            self._forest.absorb(span)
            span.rows, span.states = rows, states
        if span.parent is not None and not span.parent.is_end:
            made += self._move_out(span.parent)  # several continue it
        return made

    def finish(self, span: Span) -> list[Block]:
        """Give back the room beside a span's rows: nothing will be appended to it any more."""
        return self._move_out(span)

    def _has_room(self, span: Span, num_more: int) -> bool:
        """Whether a span's rows are the last ones of a buffer with room for more."""
        rows, states = keys_values_of(span), states_of(span)
        room = self._rooms.get(rows.block)
        return (
            room is not None
            and room.states() is states.block
            and rows.stop == states.stop == room.num_used
            and room.num_used + num_more <= min(rows.block.num_rows, states.block.num_rows)
        )

    def _move_to_buffer(self, span: Span, num_rows: int) -> list[Block]:
        """Copy a span's rows into a buffer with room for as many in all and some more."""
        rows, states = keys_values_of(span), states_of(span)
        num_rows += max(ROWS_AT_A_TIME, num_rows // 8)
        keys_values, new_states = _empty_keys_values(rows.block, num_rows), _empty_states(states.block, num_rows)
        _copy_rows(rows, states, keys_values, new_states, 0)
        num_used = len(span.token_ids)
        self._rooms[keys_values] = _Room(ref(new_states), num_used)
        self._mixed.update((keys_values, new_states))
        span.rows, span.states = BlockRows(keys_values, 0, num_used), BlockRows(new_states, 0, num_used)
        return [keys_values, new_states]

    def _append(self, upper: Span, span: Span) -> tuple[BlockRows[KeysValues], BlockRows[States]]:
        """Copy a span's rows behind those of what it continues; return where both lie then."""
        above, states_above = keys_values_of(upper), states_of(upper)
        _copy_rows(keys_values_of(span), states_of(span), above.block, states_above.block, above.stop)
        stop = above.stop + len(span.token_ids)
        self._rooms[above.block].num_used = stop
        return BlockRows(above.block, above.start, stop), BlockRows(states_above.block, states_above.start, stop)

    def _move_out(self, span: Span) -> list[Block]:
        """Give what was generated blocks of its own; those of several texts would keep the others' rows alive."""
        if not span.token_ids or span.rows is None or span.states is None:
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


def _copy_rows(
    rows: BlockRows[KeysValues], states: BlockRows[States], keys_values: KeysValues, into: States, start: int
) -> None:
    """Copy a span's rows into other blocks, from row `start` on."""
    num_rows = rows.stop - rows.start
    for targets, sources in ((keys_values.keys, rows.block.keys), (keys_values.values, rows.block.values)):
        for target, source in zip(targets, sources, strict=True):
            target.narrow(1, start, num_rows).copy_(source.narrow(1, rows.start, num_rows))
    for name in ("hidden", "logprobs", "is_argmax", "has_logprobs"):
        target, source = getattr(into, name), getattr(states.block, name)
        target.narrow(0, start, num_rows).copy_(source.narrow(0, states.start, num_rows))


def _absorbable(span: Span) -> Span | None:
    """Return what a span directly continues, if that is nobody's end and only this continues it."""
    upper = span.parent
    if (
        upper is None
        or not upper.token_ids
        or upper.is_end
        or upper.num_pins
        or len(upper.children) > 1
        or span.begins_chain
        or upper.rows is None
        or span.rows is None
        or span.states is None
        or (upper.is_stored, upper.error) != (span.is_stored, span.error)
    ):
        return None
    return upper


def _adjacent(upper: Span, lower: Span) -> tuple[BlockRows[KeysValues] | None, BlockRows[States] | None]:
    """Return where both lie together, if they lie side by side already."""
    rows, more_rows = keys_values_of(upper), keys_values_of(lower)
    states, more_states = states_of(upper), states_of(lower)
    return (
        BlockRows(rows.block, rows.start, more_rows.stop)
        if rows.block is more_rows.block and rows.stop == more_rows.start
        else None,
        BlockRows(states.block, states.start, more_states.stop)
        if states.block is more_states.block and states.stop == more_states.start
        else None,
    )


def _empty_keys_values(like: KeysValues, num_rows: int) -> KeysValues:
    keys, values = (
        [Location.of(t).empty((t.shape[0], num_rows, t.shape[2]), t.dtype) for t in tensors]
        for tensors in (like.keys, like.values)
    )
    return KeysValues(keys, values)


def _empty_states(like: States, num_rows: int) -> States:
    return States.of(Location.of(like.hidden).empty((num_rows, like.hidden.shape[1]), like.hidden.dtype))
