"""The plan of a step that continues texts by one token each, made from the plan of the step before.

From step to step the rows stand for the same texts in the same order, each row at the next position. A row sees the
same keys as before, and one more: the key of the token that its text got in the step before, which lies directly behind
the other keys of the text's last span. So a plan is made once (plan.py), and from then on its lengths grow by one.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from operator import attrgetter, is_

from backprompt.forest.passes import missing_spans, on_the_way
from backprompt.forest.plan import TILE_TOKENS, KeySegment, Pass, plan_pass
from backprompt.forest.span import Span

_KEYS_VALUES = attrgetter("keys_values")


class StepPlan:
    """The plan of the next step of texts that grow together, and of the steps after it.

    Args:
        ends: the last spans of the texts, which hold their keys and values; each once.
        tile_tokens: see `plan_pass`.

    Attributes:
        pass_: the plan of the next step, with the segments of the first. Its spans stand for the tokens to come, and
            are no spans of the forest: a text's last span takes its token in.
        ends: the last spans of the texts, in the order of the rows.

    """

    def __init__(self, ends: Sequence[Span], tile_tokens: int = TILE_TOKENS) -> None:
        to_come = missing_spans([Span((0,), end.stop, end) for end in ends], with_keys_values=True)
        planned = plan_pass(to_come, tile_tokens)
        self.ends = tuple(span.parent for span in to_come if span.parent is not None)
        self.pass_ = Pass(planned.spans, _with_growing(planned.segments, self.ends))
        own = set(self.ends)
        self._above = [span for span in on_the_way(self.ends) if span.token_ids and span not in own]
        self._rows_above = list(map(_KEYS_VALUES, self._above))
        self._rows = list(map(_KEYS_VALUES, self.ends))

    def is_for(self, ends: Container[Span], num_ends: int) -> bool:
        """Return whether the plan is for these texts, and all keys lie where the plan says."""
        return (
            num_ends == len(self.ends)
            and all(map(ends.__contains__, self.ends))
            and all(map(is_, map(_KEYS_VALUES, self._above), self._rows_above))
            and all(map(is_, map(_KEYS_VALUES, self.ends), self._rows))
        )

    def begin(self, token_ids: Sequence[int]) -> None:
        """Set the tokens of the next step, in the order of `ends`."""
        for span, end, token_id in zip(self.pass_.spans, self.ends, token_ids, strict=True):
            span.token_ids, span.position = (token_id,), end.stop

    def advance(self) -> None:
        """Note that the ends have taken their tokens in: plan the step after this one."""
        self._rows = list(map(_KEYS_VALUES, self.ends))


def _with_growing(segments: Sequence[KeySegment], ends: Sequence[Span]) -> tuple[KeySegment, ...]:
    """Mark the segments whose last key is the last of a text: those grow by the key of each new token."""
    last_keys = {(idx, end.keys_values.block, end.keys_values.stop) for idx, end in enumerate(ends) if end.keys_values}
    return tuple(
        replace(segment, grows=True)
        if segment.stop - segment.start == 1 and (segment.start, segment.block, segment.key_stop) in last_keys
        else segment
        for segment in segments
    )
