"""Texts that grow one token at a time: their spans stay few, and their rows stay side by side.

Each step of a generation leaves one span of one token for each text, and one block with the rows of all these spans.
Attention to a thousand such spans would take a thousand calls for each layer. So after each step the new spans absorb
their parents, and their rows are copied behind the parents' rows in a buffer with free room. A span at which another
text in use ends is never absorbed. Texts that outgrow their room at the same step move to one buffer together. The free
room of each text there is an eighth of its rows, but at least 16 rows. So one call for each layer can attend to the new
rows of all of them.

    prompt -- " the" -- " cat"        step 3        prompt -- " the cat"
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, WeakSet, ref

import numpy as np
import numpy.typing as npt

from backprompt.forest.forest import Forest
from backprompt.forest.passes import num_tokens_of
from backprompt.forest.span import Span
from backprompt.memory.blocks import (
    Block,
    BlockRows,
    KeysValues,
    States,
    copy_rows,
    keys_values_of,
    rows_of_each,
    states_of,
)
from backprompt.memory.places import Places
from backprompt.transfers import on_device

ROWS_AT_A_TIME = 16
"""The least free room of a text in a new buffer, in rows; an eighth of its rows if that is more."""


@dataclass
class _Buffer:
    """A block of keys and values with free room behind each text: the states that belong to it, and its free room.

    `room` maps the row right behind each text's rows to the end of the text's free room. It is valid while the buffer
    has `num_rows` rows: a buffer that was made smaller has no room.
    """

    states: ref[States]
    num_rows: int
    room: dict[int, int]


class _Held(NamedTuple):
    """The rows of both kinds of data of a span."""

    keys_values: BlockRows[KeysValues]
    states: BlockRows[States]

    @classmethod
    def of(cls, span: Span) -> _Held:
        """Return the rows of a span that holds both."""
        return cls(keys_values_of(span), states_of(span))

    def with_next(self, others: _Held) -> _Held | None:
        """Return these rows and others as one range if the others directly follow these."""
        keys_values, states = self.keys_values.with_next(others.keys_values), self.states.with_next(others.states)
        return None if keys_values is None or states is None else _Held(keys_values, states)


@dataclass(frozen=True)
class NewRows:
    """The rows of the tokens that are added to spans, one token to each.

    Attributes:
        rows: the row of each token in the blocks.
        keys_values, states: the blocks that the pass has left.
        are_placed: whether keys, values and hidden states lie at their target already.

    """

    rows: Sequence[int]
    keys_values: KeysValues
    states: States
    are_placed: bool = False

    def copy_to(
        self, keys_values: KeysValues, states: States, rows: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]
    ) -> None:
        """Copy some rows to the rows `targets` of other blocks."""
        are_all = len(rows) == self.states.num_rows
        if self.are_placed:
            logprobs, is_argmax = self.states.logprobs, self.states.is_argmax
            if not are_all:
                chosen = on_device(rows, logprobs.device)
                logprobs, is_argmax = logprobs[chosen], is_argmax[chosen]
            states.write_scores(targets, logprobs, is_argmax)
            return
        sources = None if are_all else rows
        self.keys_values.copy_rows_to(keys_values, sources, targets)
        self.states.copy_rows_to(states, sources, targets)


_Taking: TypeAlias = "tuple[Span, int, int, BlockRows[KeysValues], BlockRows[States]]"
"""A span, the token that it takes in, the token's row in the blocks of the pass, and the span's rows so far."""

_Copy: TypeAlias = "tuple[BlockRows[Any], Block, int]"
"""Rows to copy, the target block, and their start row there."""


class Growth:
    """Absorbs spans that were computed one token at a time.

    Args:
        forest: the forest of the spans.

    """

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._buffers: WeakKeyDictionary[KeysValues, _Buffer] = WeakKeyDictionary()  # live as long as their spans
        self._mixed: WeakSet[Block] = WeakSet()  # blocks with rows of several texts, or with free room

    def note_pass(self, spans: Iterable[Span]) -> None:
        """Record that spans were computed in passes together with spans of other texts."""
        self._mixed.update({rows.block for span in spans for rows in _Held.of(span)})

    def absorb(self, spans: Sequence[Span], held: Container[Span]) -> list[Block]:
        """Let spans absorb the spans above them, up to the first that another text uses; return the new blocks.

        Args:
            spans: the spans that absorb.
            held: the ends of texts in use.

        """
        chains = [chain for span in spans if len(chain := _absorbed_by(span, held)) > 1]
        adjacent = list(map(_adjacent, chains))
        apart = [chain for chain, rows in zip(chains, adjacent, strict=True) if rows is None]
        needed = [(upper, num_tokens_of(following)) for upper, *following in apart]
        made = self._make_room([pair for pair in needed if not self._has_room(*pair)])
        appended = iter(self._append(apart))
        for chain, rows in zip(chains, adjacent, strict=True):
            self._forest.absorb(chain, *(next(appended) if rows is None else rows))
        return made + self.release(spans)

    def make_room(self, ends: Iterable[Span]) -> list[Block]:
        """Make room for one more token behind the spans that have none, in one new buffer; return the new blocks."""
        return self._make_room([(end, 1) for end in ends if not self._has_room(end, 1)])

    def num_steps(self, ends: Iterable[Span]) -> int:
        """Return the number of steps for which there is room behind every span, one token a step."""
        found: dict[object, _Buffer | None] = {}
        num_steps = sys.maxsize
        for end in ends:
            keys_values, states = keys_values_of(end), states_of(end)
            if keys_values.block not in found:
                found[keys_values.block] = self._buffer_of(keys_values.block, states.block)
            buffer = found[keys_values.block]
            if buffer is None or states.block is not buffer.states() or states.stop != keys_values.stop:
                return 0
            num_steps = min(num_steps, buffer.room.get(keys_values.stop, 0) - keys_values.stop)
        return max(0, num_steps)

    def places(self, ends: Sequence[Span]) -> Places:
        """Return the places of the next rows of spans; there must be room behind each span."""
        idx_of: dict[tuple[KeysValues, States], int] = {}
        keys_values, states = rows_of_each(ends)
        block_idx = [
            idx_of.setdefault((rows.block, others.block), len(idx_of))
            for rows, others in zip(keys_values, states, strict=True)
        ]
        return Places(list(idx_of), np.array(block_idx), np.array([rows.stop for rows in keys_values]))

    def extend(self, ends: Sequence[Span], token_ids: Sequence[int], new: NewRows) -> None:
        """Add a token to each span; there must be room behind each span.

        Args:
            ends: the spans.
            token_ids: the token of each.
            new: the rows of the tokens, in the order of `ends`.

        """
        by_block: dict[tuple[KeysValues, States], list[_Taking]] = {}
        for taking in zip(ends, token_ids, new.rows, *rows_of_each(ends), strict=True):
            by_block.setdefault((taking[3].block, taking[4].block), []).append(taking)
        for blocks, takings in by_block.items():
            targets = np.array([keys_values.stop for _, _, _, keys_values, _ in takings])
            new.copy_to(*blocks, np.array([row for _, _, row, _, _ in takings]), targets)
        with self._forest.changing():
            for (block, states_block), takings in by_block.items():
                room = self._buffers[block].room
                for end, token_id, _, keys_values, states in takings:
                    stop = keys_values.stop
                    room[stop + 1] = room.pop(stop)
                    end.take_in(
                        token_id,
                        BlockRows(block, keys_values.start, stop + 1),
                        BlockRows(states_block, states.start, states.stop + 1),
                    )
                block.take_more(len(takings))
                states_block.take_more(len(takings))

    def release(self, spans: Iterable[Span]) -> list[Block]:
        """Move the parents of spans out of blocks that are mostly unused; return the new blocks, one of each kind.

        No text extends these parents in place any more, so they need no room behind them.
        """
        parents = dict.fromkeys(span.parent for span in spans)
        return self._move_together(
            {parent: 0 for parent in parents if parent is not None and self._is_wasteful(parent)}
        )

    def finish(self, span: Span) -> list[Block]:
        """Free the room behind a text that will not grow any more; return the new blocks.

        Other texts may have split the text meanwhile, so all its spans are checked.
        """
        path = span.path()
        for part in path:
            part.token_ids = tuple(part.token_ids)
        return [block for part in path for block in self._move_out(part)]

    def _has_room(self, upper: Span, num_tokens: int) -> bool:
        """Whether there is room for more tokens behind the rows of a span."""
        keys_values, states = _Held.of(upper)
        buffer = self._buffer_of(keys_values.block, states.block)
        return (
            buffer is not None
            and keys_values.stop == states.stop
            and keys_values.stop + num_tokens <= buffer.room.get(keys_values.stop, 0)
        )

    def _buffer_of(self, keys_values: KeysValues, states: States) -> _Buffer | None:
        """Return the buffer that consists of these two blocks; None if they are no buffer, or no longer one."""
        buffer = self._buffers.get(keys_values)
        if buffer is None or buffer.states() is not states:
            return None
        return buffer if keys_values.num_rows == states.num_rows == buffer.num_rows else None

    def _make_room(self, spans: Sequence[tuple[Span, int]]) -> list[Block]:
        """Copy the rows of spans into one new buffer, with room behind each for the given number of tokens and more."""
        free = {}
        for upper, num_tokens in spans:
            free[upper] = num_tokens + max(ROWS_AT_A_TIME, (len(upper.token_ids) + num_tokens) // 8)
        return self._move_together(free)

    def _move_together(self, free: Mapping[Span, int]) -> list[Block]:
        """Copy the rows of spans into one new block of each kind, with free room behind each; return the blocks."""
        if not free:
            return []
        num_rows = 0
        room: dict[int, int] = {}
        ranges: list[tuple[int, int]] = []
        for span, num_free in free.items():
            start, stop = num_rows, num_rows + len(span.token_ids)
            num_rows = stop + num_free
            ranges.append((start, stop))
            room[stop] = num_rows
        first = _Held.of(next(iter(free)))
        # A masked key that is nan would spoil the rows that do not see it, so the room is filled with zeros.
        keys_values, states = first.keys_values.block.zeros(num_rows), first.states.block.zeros(num_rows)
        copies: list[_Copy] = []
        for span, (start, _) in zip(free, ranges, strict=True):
            copies += [(keys_values_of(span), keys_values, start), (states_of(span), states, start)]
        copy_rows(copies)
        self._buffers[keys_values] = _Buffer(ref(states), num_rows, room)
        self._mixed.update((keys_values, states))
        with self._forest.changing():
            for span, rows in zip(free, ranges, strict=True):
                span.place(keys_values=BlockRows(keys_values, *rows), states=BlockRows(states, *rows))
        return [keys_values, states]

    def _append(self, chains: Iterable[Sequence[Span]]) -> list[_Held]:
        """Copy the rows of each chain of spans behind those of its first span; return the combined rows."""
        copies: list[_Copy] = []
        together: list[_Held] = []
        for upper, *following in chains:
            keys_values, states = _Held.of(upper)
            start = stop = keys_values.stop
            for span in following:
                copies += [(keys_values_of(span), keys_values.block, stop), (states_of(span), states.block, stop)]
                stop += len(span.token_ids)
            room = self._buffers[keys_values.block].room
            room[stop] = room.pop(start)
            together.append(
                _Held(
                    BlockRows(keys_values.block, keys_values.start, stop), BlockRows(states.block, states.start, stop)
                )
            )
        copy_rows(copies)
        return together

    def _move_out(self, span: Span) -> list[Block]:
        """Copy generated rows into blocks of their own; shared blocks would keep the rows of other texts alive."""
        if not (span.token_ids and span.is_held(with_keys_values=True)):
            return []
        keys_values, states = keys_values_of(span), states_of(span)
        own_keys_values = keys_values.alone() if self._is_shared(keys_values.block, span) else None
        own_states = states.alone() if self._is_shared(states.block, span) else None
        if own_keys_values is not None or own_states is not None:
            with self._forest.changing():
                span.place(keys_values=own_keys_values, states=own_states)
        return [rows.block for rows in (own_keys_values, own_states) if rows is not None]

    def _is_wasteful(self, span: Span) -> bool:
        """Whether a generated span at which no text ends lies in blocks that are mostly unused."""
        if span.is_end or not (span.token_ids and span.is_held(with_keys_values=True)):
            return False
        block = states_of(span).block
        return block in self._mixed and 2 * block.num_held < block.num_rows

    def _is_shared(self, block: Block, span: Span) -> bool:
        """Whether a block of a span has rows of other texts, or free room."""
        return block in self._mixed and block.num_rows > len(span.token_ids)


def takes_tokens_in(span: Span) -> bool:
    """Whether a span may grow in place: it holds its rows, and no other text, child or store refers to its end."""
    return not (span.children or span.is_end or span.is_stored or span.error) and span.is_held(with_keys_values=True)


def _absorbed_by(span: Span, held: Container[Span]) -> list[Span]:
    """Return the chain of spans that a span may absorb, from the first on, with the span itself at the end."""
    chain = [span]
    while (upper := _absorbable_parent(chain[-1], held)) is not None:
        chain.append(upper)
    return chain[::-1]


def _adjacent(chain: Sequence[Span]) -> _Held | None:
    """Return the rows of a chain of spans as one range if they directly follow each other."""
    first, *following = map(_Held.of, chain)
    together: _Held | None = first
    for rows in following:
        together = None if together is None else together.with_next(rows)
    return together


def _absorbable_parent(span: Span, held: Container[Span]) -> Span | None:
    """Return a span's parent if the span may absorb it: no text ends there, and it has no other child; else None."""
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
