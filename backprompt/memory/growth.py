"""Texts that grow a token at a time: their spans stay few, and their rows side by side.

Each step of a generation leaves one span of one token a text, with its row among those of all texts. Attending to a
thousand such spans would take a thousand calls a layer. So after each step the new spans absorb those that they
continue, and their rows are copied behind those in a buffer with room for more; what ends a text that somebody else
knows of is never absorbed. Texts that outgrow their room at the same step move on to one buffer together, where each
has room for an eighth more, or 16 rows: so that one call a layer can attend to what all of them added.

    prompt -- " the" -- " cat"        step 3        prompt -- " the cat"
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, WeakSet, ref

from backprompt.forest.forest import Forest
from backprompt.forest.span import Span
from backprompt.memory.blocks import Block, BlockRows, KeysValues, States, copy_rows, keys_values_of, states_of

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


class _Held(NamedTuple):
    """Where both of a span lie."""

    keys_values: BlockRows[KeysValues]
    states: BlockRows[States]

    @classmethod
    def of(cls, span: Span) -> _Held:
        """Return those of a span that holds both."""
        return cls(keys_values_of(span), states_of(span))

    def with_next(self, others: _Held) -> _Held | None:
        """Return these rows and others as one, if those lie right behind these."""
        keys_values, states = self.keys_values.with_next(others.keys_values), self.states.with_next(others.states)
        return None if keys_values is None or states is None else _Held(keys_values, states)


_Copy: TypeAlias = "tuple[BlockRows[Any], Block, int]"
"""Rows that go into a block, and where they begin there."""


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
            together = {span: _Held.of(upper).with_next(_Held.of(span)) for upper, span in pairs}
            apart = [(upper, span) for upper, span in pairs if together[span] is None]
            made += self._make_room([pair for pair in apart if not self._has_room(*pair)])
            together |= self._append(apart)
            for _, span in pairs:
                both = together[span]
                assert both is not None
                self._forest.absorb(span, both.keys_values, both.states)
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
        keys_values, states = _Held.of(upper)
        buffer = self._buffers.get(keys_values.block)
        return (
            buffer is not None
            and buffer.states() is states.block
            and keys_values.block.num_rows == states.block.num_rows == buffer.num_rows
            and keys_values.stop == states.stop
            and keys_values.stop + len(span.token_ids) <= buffer.room.get(keys_values.stop, 0)
        )

    def _make_room(self, pairs: Sequence[tuple[Span, Span]]) -> list[Block]:
        """Copy the rows of spans into one buffer, each with room for what continues it and some more."""
        if not pairs:
            return []
        num_rows = 0
        room: dict[int, int] = {}
        ranges: list[tuple[int, int]] = []
        for upper, span in pairs:
            num_needed = len(upper.token_ids) + len(span.token_ids)
            start, stop = num_rows, num_rows + len(upper.token_ids)
            num_rows += num_needed + max(ROWS_AT_A_TIME, num_needed // 8)
            ranges.append((start, stop))
            room[stop] = num_rows
        first = _Held.of(pairs[0][0])
        # A masked key that is nan would spoil the rows that do not see it, so the room is of zeros.
        keys_values, states = first.keys_values.block.zeros(num_rows), first.states.block.zeros(num_rows)
        copies: list[_Copy] = []
        for (upper, _), (start, _) in zip(pairs, ranges, strict=True):
            copies += [(keys_values_of(upper), keys_values, start), (states_of(upper), states, start)]
        copy_rows(copies)
        self._buffers[keys_values] = _Buffer(ref(states), num_rows, room)
        self._mixed.update((keys_values, states))
        for (upper, _), rows in zip(pairs, ranges, strict=True):
            upper.place(keys_values=BlockRows(keys_values, *rows), states=BlockRows(states, *rows))
        return [keys_values, states]

    def _append(self, pairs: Sequence[tuple[Span, Span]]) -> dict[Span, _Held]:
        """Copy spans' rows behind those of what they continue; return where both lie then."""
        copies: list[_Copy] = []
        together: dict[Span, _Held] = {}
        for upper, span in pairs:
            keys_values, states = keys_values_of(upper), states_of(upper)
            start, stop = keys_values.stop, keys_values.stop + len(span.token_ids)
            room = self._buffers[keys_values.block].room
            room[stop] = room.pop(start)
            copies += [
                (keys_values_of(span), keys_values.block, start),
                (states_of(span), states.block, start),
            ]
            together[span] = _Held(
                BlockRows(keys_values.block, keys_values.start, stop), BlockRows(states.block, states.start, stop)
            )
        copy_rows(copies)
        return together

    def _move_out(self, span: Span) -> list[Block]:
        """Give what was generated blocks of its own; those of several texts would keep the others' rows alive."""
        if not (span.token_ids and span.is_held(with_keys_values=True)):
            return []
        made: list[Block] = []
        keys_values, states = keys_values_of(span), states_of(span)
        if self._is_shared(keys_values.block, span):
            span.place(keys_values=keys_values.alone())
            made.append(keys_values_of(span).block)
        if self._is_shared(states.block, span):
            span.place(states=states.alone())
            made.append(states_of(span).block)
        return made

    def _is_shared(self, block: Block, span: Span) -> bool:
        """Whether a block that a span refers to has rows of other texts, or room."""
        return block in self._mixed and block.num_rows > len(span.token_ids)


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
        or not upper.is_held(with_keys_values=True)
        or not span.is_held(with_keys_values=True)
        or (upper.is_stored, upper.error) != (span.is_stored, span.error)
    ):
        return None
    return upper
