"""The plan of a step that continues texts by one token each, made from the plan of the step before.

From step to step the rows stand for the same texts in the same order, each row at the next position. A row sees the
same keys as before, and one more: the key of the token that its text got in the step before. This key lies directly
behind the other keys of the text's last span. So a plan is made once (plan.py), and then its lengths grow by one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import attrgetter, is_

from backprompt.forest.passes import missing_spans
from backprompt.forest.plan import TILE_TOKENS, KeySegment, Pass, plan_pass
from backprompt.forest.span import Span

_KEYS_VALUES = attrgetter("keys_values")


class StepPlan:
    """The plan of the next step of texts that grow together, and of the steps after it.

    Args:
        to_come: a span for the next token of each text, with the last span of the text as its parent. These spans are
            not in the forest. If the last span takes the token in itself, the given span only stands for the token.
        tile_tokens: see `plan_pass`.

    Attributes:
        pass_: the plan of the next step, but with the segments of the first step; see `later`.
        ends: the last spans of the texts, in the order of the rows.

    """

    def __init__(self, to_come: Iterable[Span], tile_tokens: int = TILE_TOKENS) -> None:
        planned = plan_pass(missing_spans(to_come, with_keys_values=True), tile_tokens)
        self.ends = [span.parent for span in planned.spans if span.parent is not None]
        self.pass_ = Pass(planned.spans, _with_growing(planned.segments, self.ends))
        self._chains = [[span for span in end.closure() if span.token_ids and span is not end] for end in self.ends]
        self._above = list({span: None for chain in self._chains for span in chain})
        self._rows_above = list(map(_KEYS_VALUES, self._above))
        self._rows = list(map(_KEYS_VALUES, self.ends))

    @property
    def tokens(self) -> list[tuple[Span, int]]:
        """The last span of each text and its next token."""
        return [(end, span.token_ids[0]) for end, span in zip(self.ends, self.pass_.spans, strict=True)]

    def rows_of(self, ends: Container[Span]) -> list[int]:
        """Return the rows of these texts."""
        return [row for row, end in enumerate(self.ends) if end in ends]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in ascending order; the other texts have ended."""
        self.ends, self._chains = [self.ends[row] for row in rows], [self._chains[row] for row in rows]
        self.pass_ = kept(self.pass_, rows)
        self._rows = [self._rows[row] for row in rows]
        noted = dict(zip(self._above, self._rows_above, strict=True))
        self._above = list({span: None for chain in self._chains for span in chain})
        self._rows_above = [noted[span] for span in self._above]

    def is_current(self) -> bool:
        """Return whether all keys and values still lie where the plan noted them."""
        is_above = all(map(is_, map(_KEYS_VALUES, self._above), self._rows_above))
        return is_above and all(map(is_, map(_KEYS_VALUES, self.ends), self._rows))

    def begin(self, token_ids: Sequence[int]) -> None:
        """Set the tokens of the next step, in the order of `ends`."""
        for span, end, token_id in zip(self.pass_.spans, self.ends, token_ids, strict=True):
            span.token_ids, span.position = (token_id,), end.position + len(end.token_ids)
        self.pass_ = Pass(self.pass_.spans, self.pass_.segments)

    def advance(self) -> None:
        """Note the new places of the ends' rows, once the ends have taken their tokens in."""
        self._rows = list(map(_KEYS_VALUES, self.ends))


def later(pass_: Pass, num_steps: int) -> Pass:
    """Return the plan of the step `num_steps` after this one. Its spans are those of the given plan."""
    return Pass(pass_.spans, tuple(_later(segment, num_steps) for segment in pass_.segments))


def kept(pass_: Pass, rows: Sequence[int]) -> Pass:
    """Return the plan of a step that continues only some of the texts; `rows`: their rows, in ascending order."""
    places = places_of(rows, len(pass_.spans))
    segments = (segment for segment in pass_.segments if places[segment.start] < places[segment.stop])
    spans = tuple(pass_.spans[row] for row in rows)
    return Pass(spans, tuple(_moved(segment, places, pass_.spans, spans) for segment in segments))


def places_of(rows: Iterable[int], num_rows: int) -> list[int]:
    """Return, for each row of a pass and for the end of the pass, the number of kept `rows` before it."""
    kept_rows = set(rows)
    return [0, *accumulate(row in kept_rows for row in range(num_rows))]


def _later(segment: KeySegment, num_steps: int) -> KeySegment:
    if segment.is_own:
        return replace(segment, key_position=segment.key_position + num_steps)
    return replace(segment, key_stop=segment.key_stop + num_steps) if segment.grows else segment


def _moved(
    segment: KeySegment, places: Sequence[int], spans_before: Sequence[Span], spans: Sequence[Span]
) -> KeySegment:
    """Return a segment without the rows that are left out. In a step no row sees another row."""
    start, stop = places[segment.start], places[segment.stop]
    if not segment.is_own:
        return replace(segment, start=start, stop=stop)
    position = segment.key_position + spans[start].position - spans_before[segment.start].position
    return KeySegment.own(start, stop, position, tuple(range(start + 1, stop + 1)))


def _with_growing(segments: Sequence[KeySegment], ends: Sequence[Span]) -> tuple[KeySegment, ...]:
    """Mark the segments whose last key is the last of a text: those grow by the key of each new token."""
    last_keys = {(idx, end.keys_values.block, end.keys_values.stop) for idx, end in enumerate(ends) if end.keys_values}
    return tuple(
        replace(segment, grows=True)
        if segment.stop - segment.start == 1 and (segment.start, segment.block, segment.key_stop) in last_keys
        else segment
        for segment in segments
    )
