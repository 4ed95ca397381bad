"""Texts that grow a token at a time: their spans stay few, and their rows side by side.

Each step of a generation leaves one span of one token a text, with its row among those of all texts. Attending to a
thousand such spans would take a thousand calls a layer. So after each step the new span absorbs the one that it
continues, and its row is copied behind that one's into a buffer with room for more; what ends a text that somebody else
knows of is never absorbed. A buffer that is full is copied into one that is larger by an eighth, or by 16 rows.

    prompt -- " the" -- " cat"        step 3        prompt -- " the cat"
"""

from __future__ import annotations

from dataclasses import dataclass

from backprompt.cache import Block, BlockRows, KeysValues, Location, States, keys_values_of, states_of
from backprompt.radix import Forest, Span

ROWS_AT_A_TIME = 16
"""A buffer has room for as many rows more than it needs, or an eighth of them."""


@dataclass(eq=False)
class _Buffer:
    """Blocks with room behind the rows that are used."""

    keys_values: KeysValues
    states: States
    num_used: int = 0

    @classmethod
    def like(cls, span: Span, num_rows: int) -> _Buffer:
        """Return an empty buffer for rows such as those of a span."""
        keys_values, states = keys_values_of(span).block, states_of(span).block
        return cls(_empty_keys_values(keys_values, num_rows), _empty_states(states, num_rows))

    def is_used_up_to(self, span: Span, num_more: int) -> bool:
        """Whether a span's rows are here, the last ones, and there is room for more."""
        rows, states = keys_values_of(span), states_of(span)
        return (
            rows.block is self.keys_values
            and states.block is self.states
            and rows.stop == states.stop == self.num_used
            and self.num_used + num_more <= min(self.keys_values.num_rows, self.states.num_rows)
        )

    def append(self, span: Span) -> None:
        """Copy a span's rows behind those that are used."""
        rows, states = keys_values_of(span), states_of(span)
        num_rows = rows.stop - rows.start
        for targets, sources in (
            (self.keys_values.keys, rows.block.keys),
            (self.keys_values.values, rows.block.values),
        ):
            for target, source in zip(targets, sources, strict=True):
                target.narrow(1, self.num_used, num_rows).copy_(source.narrow(1, rows.start, num_rows))
        for name in ("hidden", "logprobs", "is_argmax", "has_logprobs"):
            target, source = getattr(self.states, name), getattr(states.block, name)
            target.narrow(0, self.num_used, num_rows).copy_(source.narrow(0, states.start, num_rows))
        self.num_used += num_rows


class Growth:
    """Absorbs what was computed a token at a time.

    Args:
        forest: whose spans.

    """

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._buffers: dict[Span, _Buffer] = {}  # by the span whose rows are the last in it

    def absorb(self, span: Span) -> list[Block]:
        """Let a span absorb what it continues, where nobody else knows of that; return blocks that were made for it."""
        made: list[Block] = []
        while (upper := _absorbable(span)) is not None:
            rows, states = _adjacent(upper, span)
            if rows is None or states is None:
                buffer = self._buffers.pop(upper, None)
                if buffer is None or not buffer.is_used_up_to(upper, len(span.token_ids)):
                    num_rows = len(upper.token_ids) + len(span.token_ids)
                    buffer = _Buffer.like(span, num_rows + max(ROWS_AT_A_TIME, num_rows // 8))
                    buffer.append(upper)
                    made += [buffer.keys_values, buffer.states]
                start = buffer.num_used - len(upper.token_ids)
                buffer.append(span)
                rows = BlockRows(buffer.keys_values, start, buffer.num_used)
                states = BlockRows(buffer.states, start, buffer.num_used)
                self._buffers[span] = buffer
            self._forest.absorb(span)
            span.rows, span.states = rows, states
        if span.parent is not None and not span.parent.is_end:
            made += _moved_out(span.parent)  # several continue it
        return made

    def finish(self, span: Span) -> list[Block]:
        """Give back the room beside a span's rows: nothing will be appended to it any more."""
        self._buffers.pop(span, None)
        return _moved_out(span)


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


def _moved_out(span: Span) -> list[Block]:
    """Give what was generated blocks of its own; its rows would keep those of other texts alive."""
    if not span.token_ids or span.rows is None or span.states is None:
        return []
    made: list[Block] = []
    rows, states = keys_values_of(span), states_of(span)
    if rows.block.num_rows > len(span.token_ids):
        keys_values = rows.block.copied([slice(rows.start, rows.stop)], Location.of(rows.block.keys[0]))
        span.rows = BlockRows(keys_values, 0, len(span.token_ids))
        made.append(keys_values)
    if states.block.num_rows > len(span.token_ids):
        own = states.block.copied([slice(states.start, states.stop)], Location.of(states.block.hidden))
        span.states = BlockRows(own, 0, len(span.token_ids))
        made.append(own)
    return made


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
