"""Continuations: texts that are begun, grow a token at a time, and end.

Keeps the abandoned texts that have not been ended yet, and the buffers in which texts grow (memory/growth.py). The ends
of a live text are kept by its generation alone, and are read from there when they are needed (holders.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from weakref import finalize

from backprompt.evaluation.computation import Computation, Request
from backprompt.evaluation.holders import Growing
from backprompt.evaluation.scores import TokenScore
from backprompt.evaluation.scoring import Scoring
from backprompt.evaluation.steps import Following, Stepped, Steps, Token
from backprompt.forest.span import Span
from backprompt.memory.growth import Growth
from backprompt.tokens.graph import TokenIds


class Continuations:
    """Computes texts that grow.

    Args:
        computation: computes the spans of the texts.
        scoring: takes the scores of tokens that generations have chosen.

    Attributes:
        steps: lets texts grow in place.
        abandoned: growing texts whose owner failed or was discarded; any thread may add to them at any time.

    """

    def __init__(self, computation: Computation, scoring: Scoring) -> None:
        self._computation = computation
        self._scoring = scoring
        self.growth = Growth(computation.forest)
        self.steps = Steps(computation, self.growth)
        self.abandoned: deque[Sequence[Growing]] = deque()

    def let_grow(self, owner: object, texts: Sequence[Growing]) -> None:
        """Hold the ends of these texts, also those of later steps, for as long as their owner lives."""
        self._computation.holders.let_grow(owner, texts)
        # A dropped stream gives no notice: the next `end_abandoned` ends its texts.
        finalize(owner, self.abandoned.append, texts).atexit = False

    def begin(self, texts: Sequence[TokenIds]) -> list[Span]:
        """Compute texts that are to grow. The caller holds the ends by noting them in the texts given to `let_grow`."""
        self._computation.forest.begin_evaluation()
        with self._computation.held(texts, Request(with_keys_values=True)) as ends:
            return ends

    def extend(
        self, owners: Collection[object], tokens: Mapping[Token, TokenScore], num_texts: int, following: Following
    ) -> Stepped | None:
        """Let texts take in a token each; None if that is not possible, see `Steps.extend`.

        `num_texts`: the number of texts, of which several may be equal so far.
        """
        stepped = self.steps.extend(owners, tokens, following)
        if stepped is not None:
            self._computation.counters.tokens_requested += num_texts
        return stepped

    def grow(
        self, parts: Sequence[tuple[Span, tuple[int, ...]]], whole: Callable[[], Iterable[TokenIds]]
    ) -> list[Span]:
        """Forward the new tokens of texts in one pass; the caller notes the ends as for `begin`.

        The new tokens are not stored until the growth ends.

        Args:
            parts: for each text the span that it continues, and the ids from there.
            whole: returns all ids of each text, for texts whose results another thread has dropped.

        """
        computation, counters = self._computation, self._computation.counters
        computation.forest.next_step = None
        num_before = counters.tokens_computed
        if all(end.is_held(with_keys_values=True) for end, _ in parts):
            inserted = computation.extended(parts)
        else:
            inserted = computation.inserted(whole(), are_ends=False)
        with inserted as ends, computation.holders.using(ends):
            new = [end for end in dict.fromkeys(ends) if not end.is_held(with_keys_values=True)]
            computation.compute(ends, Request(with_keys_values=True, is_step=True))
        counters.tokens_requested += max(len(parts), counters.tokens_computed - num_before)
        self.growth.note_pass(new)
        return ends

    def settle(self, grown: Sequence[Span], dropped: Sequence[Span], scores: Mapping[Span, TokenScore]) -> None:
        """Choose which of the grown texts stay.

        Args:
            grown: ends that `grow` returned last and that stay held; they absorb their parents.
            dropped: ends that are no longer needed. Such a span leaves the forest if it has no children and no other
                holder, and no text in use ends there.
            scores: the scores of the last tokens of some grown texts.

        """
        self._scoring.note_last(scores)
        held, memory = self._computation.holders.ends(), self._computation.memory
        memory.note([self._computation.forest.discard(end, held) for end in dropped])
        memory.add(self.growth.absorb(list(dict.fromkeys(grown)), held))
        memory.note(grown)

    def end(self, ends: Sequence[Span], *, are_stored: bool = True) -> None:
        """Finish grown texts that have no holder any more: from now on they are like all other texts.

        Args:
            ends: the ends of the texts.
            are_stored: whether the texts are written to a store; False for texts that will grow further later.

        """
        for end in ends:
            end.is_end = True
        archive = self._computation.archive
        for end in dict.fromkeys(ends):
            self._computation.memory.add(self.growth.finish(end))
            if are_stored and archive is not None and end.is_held(with_keys_values=True):
                archive.save_new([end])
        self.steps.end(ends)
        self._computation.make_room()

    def end_abandoned(self) -> None:
        """Finish the texts whose owner is gone or has failed."""
        while self.abandoned:
            self.end([end for text in self.abandoned.popleft() for end in text.ends.values()])
