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
from backprompt.memory.blocks import Block, BlockRows, KeysValues, States, copy_rows, keys_values_of, states_of
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


class _Place(NamedTuple):
    """Free rows of a buffer, `start..stop`."""

    keys_values: KeysValues
    states: States
    start: int
    stop: int

    def split(self, num_rows: int) -> tuple[_Place, _Place]:
        """Return the first `num_rows` rows, or all, and the others."""
        middle = min(self.start + num_rows, self.stop)
        return self._replace(stop=middle), self._replace(start=middle)


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
        chains = [chain for span in spans if len(chain := _absorbable(span, held)) > 1]
        adjacent = list(map(_adjacent, chains))
        apart = [chain for chain, rows in zip(chains, adjacent, strict=True) if rows is None]
        needed = [(upper, num_tokens_of(following)) for upper, *following in apart]
        made = self._make_room(
            {upper: _num_free(upper, num) for upper, num in needed if not self._has_room(upper, num)}
        )
        appended = iter(self._append(apart))
        for chain, rows in zip(chains, adjacent, strict=True):
            self._forest.absorb(chain, *(next(appended) if rows is None else rows))
        return made + self.release(spans)

    def make_room(self, ends: Iterable[Span]) -> list[Block]:
        """Make room for one more token behind the spans that have none; return the new blocks."""
        return self._make_room({end: _num_free(end, 1) for end in ends if not self._has_room(end, 1)})

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
        block_idx = [idx_of.setdefault((keys_values_of(end).block, states_of(end).block), len(idx_of)) for end in ends]
        target_rows = [keys_values_of(end).stop for end in ends]
        return Places(list(idx_of), np.array(block_idx), np.array(target_rows))

    def extend(self, ends: Sequence[Span], token_ids: Sequence[int], new: NewRows) -> None:
        """Add a token to each span; there must be room behind each span.

        Args:
            ends: the spans.
            token_ids: the token of each.
            new: the rows of the tokens, in the order of `ends`.

        """
        held = list(map(_Held.of, ends))
        by_block: dict[tuple[KeysValues, States], list[int]] = {}
        for idx, (keys_values, states) in enumerate(held):
            by_block.setdefault((keys_values.block, states.block), []).append(idx)
        for blocks, indices in by_block.items():
            targets = np.array([held[idx].keys_values.stop for idx in indices])
            new.copy_to(*blocks, np.array([new.rows[idx] for idx in indices]), targets)
        with self._forest.changing():
            for (own_keys_values, _), indices in by_block.items():
                room = self._buffers[own_keys_values].room
                for idx in indices:
                    _take_in(ends[idx], token_ids[idx], held[idx], room)

    def release(self, spans: Iterable[Span]) -> list[Block]:
        """Move the parents of spans, which others continue as well, out of blocks that are mostly unused.

        Returns the new blocks.
        """
        parents = dict.fromkeys(parent for span in spans if (parent := span.parent) is not None)
        block_of = {
            parent: keys_values_of(parent).block
            for parent in parents
            if parent.token_ids and not parent.is_end and parent.is_held(with_keys_values=True)
        }
        unused = {block for block in dict.fromkeys(block_of.values()) if self._is_mostly_unused(block)}
        return self._make_room({parent: 0 for parent, block in block_of.items() if block in unused})

    def finish(self, span: Span) -> list[Block]:
        """Free the room behind a text that will not grow any more; return the new blocks.

        Other texts may have split the text meanwhile, so all its spans are checked.
        """
        return [block for part in span.path() for block in self._move_out(part)]

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

    def _make_room(self, free: Mapping[Span, int]) -> list[Block]:
        """Move spans to where the given number of free rows is behind each; return the new blocks.

        Rows that other texts have left are taken first, also with a little less room. The other spans move to one new
        buffer.
        """
        left = self._left() if free else []
        places: dict[Span, _Place] = {}
        homeless: list[Span] = []
        for span, num_free in free.items():
            num_rows = len(span.token_ids) + num_free
            least = num_rows - min(num_free, ROWS_AT_A_TIME) // 2
            idx = next((idx for idx, place in enumerate(left) if place.stop - place.start >= least), None)
            if idx is None:
                homeless.append(span)
            else:
                places[span], left[idx] = left[idx].split(num_rows)
        made: list[Block] = []
        if homeless:
            rest = self._new_buffer(homeless[0], num_tokens_of(homeless) + sum(free[span] for span in homeless))
            made = [rest.keys_values, rest.states]
            for span in homeless:
                places[span], rest = rest.split(len(span.token_ids) + free[span])
        self._move(places)
        return made

    def _left(self) -> list[_Place]:
        """Return the rows that no text uses any more in buffers that are not mostly unused."""
        left: list[_Place] = []
        for keys_values, buffer in list(self._buffers.items()):
            states = buffer.states()
            if states is None or self._buffer_of(keys_values, states) is None:
                continue
            if self._is_mostly_unused(keys_values):
                continue
            held = [(rows.start, rows.stop) for rows in map(keys_values_of, keys_values.spans)]
            held += [(rows.start, rows.stop) for rows in map(states_of, states.spans)]
            last = 0
            for start, stop in sorted(held):
                if start > last:
                    left.append(_Place(keys_values, states, last, start))
                last = max(last, buffer.room.get(stop, stop))
            left.append(_Place(keys_values, states, last, buffer.num_rows))
        return left

    def _new_buffer(self, like: Span, num_rows: int) -> _Place:
        """Return the rows of a new buffer, with the shapes and the location of a span's rows."""
        held = _Held.of(like)
        # A masked key that is nan would spoil the rows that do not see it, so the room is filled with zeros.
        keys_values, states = held.keys_values.block.zeros(num_rows), held.states.block.zeros(num_rows)
        self._buffers[keys_values] = _Buffer(ref(states), num_rows, {})
        self._mixed.update((keys_values, states))
        return _Place(keys_values, states, 0, num_rows)

    def _move(self, places: Mapping[Span, _Place]) -> None:
        """Copy the rows of each span to the beginning of a place; the rest of the place is the room behind the span."""
        copies: list[_Copy] = []
        for span, place in places.items():
            copies += [
                (keys_values_of(span), place.keys_values, place.start),
                (states_of(span), place.states, place.start),
            ]
        copy_rows(copies)
        with self._forest.changing():
            for span, (keys_values, states, start, stop_of_room) in places.items():
                stop = start + len(span.token_ids)
                self._buffers[keys_values].room[stop] = stop_of_room
                span.place(keys_values=BlockRows(keys_values, start, stop), states=BlockRows(states, start, stop))

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

    def _is_mostly_unused(self, block: KeysValues) -> bool:
        """Whether less than half of the rows of a block of several texts are held, or room behind a text."""
        buffer, num_used = self._buffers.get(block), block.num_held
        if buffer is not None:
            growing = [keys_values_of(span).stop for span in block.spans if len(span.children) < 2]
            buffer.room = {stop: buffer.room[stop] for stop in growing if stop in buffer.room}
            num_used += sum(buffer.room.values()) - sum(buffer.room)
        return block in self._mixed and 2 * num_used < block.num_rows

    def _is_shared(self, block: Block, span: Span) -> bool:
        """Whether a block of a span has rows of other texts, or free room."""
        return block in self._mixed and block.num_rows > len(span.token_ids)


def _num_free(span: Span, num_tokens: int) -> int:
    """Return the number of free rows behind a span that is about to take in tokens, and may take in more later."""
    return num_tokens + max(ROWS_AT_A_TIME, (len(span.token_ids) + num_tokens) // 8)


def _take_in(end: Span, token_id: int, held: _Held, room: dict[int, int]) -> None:
    """Add to a span a token whose rows lie right behind the span's own rows, `held`; `room`: see `_Buffer`."""
    keys_values, states = held
    room[keys_values.stop + 1] = room.pop(keys_values.stop)
    end.take_in(
        token_id,
        BlockRows(keys_values.block, keys_values.start, keys_values.stop + 1),
        BlockRows(states.block, states.start, states.stop + 1),
    )


def takes_tokens_in(span: Span) -> bool:
    """Whether a span may grow in place: it holds its rows, and no other text, child or store refers to its end."""
    return not (span.children or span.is_end or span.is_stored or span.error) and span.is_held(with_keys_values=True)


def _absorbable(span: Span, held: Container[Span]) -> list[Span]:
    """Return a span with the spans right above it that it may absorb, from the first on."""
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
