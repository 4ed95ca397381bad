"""Continuations: texts that are begun, grow a token at a time, go on or not, and end.

Keeps the texts that nobody lets grow any more and that have not been ended yet, and the buffers in which texts grow
(memory/growth.py). The ends of a live text are kept by its generation alone, which is asked for them (holders.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from weakref import finalize

from backprompt.evaluation.computation import Computation, Request
from backprompt.evaluation.holders import Growing
from backprompt.evaluation.scores import TokenScore
from backprompt.evaluation.scoring import Scoring
from backprompt.forest.span import Span
from backprompt.memory.growth import Growth
from backprompt.tokens.graph import TokenIds


class Continuations:
    """Computes texts that grow.

    Args:
        computation: of their spans.
        scoring: takes the scores of tokens that generations have chosen.

    Attributes:
        abandoned: texts that were growing when whoever let them grow failed or was discarded, by any thread at any
            time.

    """

    def __init__(self, computation: Computation, scoring: Scoring) -> None:
        self._computation = computation
        self._scoring = scoring
        self.growth = Growth(computation.forest)
        self.abandoned: deque[Sequence[Growing]] = deque()

    def let_grow(self, owner: object, texts: Sequence[Growing]) -> None:
        """Hold the ends of these texts, as they are at any time, for as long as their owner lives."""
        self._computation.holders.let_grow(owner, texts)
        # Whoever drops a stream does not say so: what it has grown is ended by the next `end_abandoned`.
        finalize(owner, self.abandoned.append, texts).atexit = False

    def begin(self, texts: Sequence[TokenIds]) -> list[Span]:
        """Compute all of texts that are to grow. The caller notes the ends where `let_grow` says, and so holds them."""
        self._computation.forest.begin_evaluation()
        with self._computation.held(texts, Request(with_keys_values=True)) as ends:
            return ends

    def grow(self, texts: Sequence[TokenIds]) -> list[Span]:
        """Forward what texts have more than those that are held, in one pass; the caller notes the ends as well.

        Nothing of it is stored until the growth ends.
        """
        counters = self._computation.counters
        num_before = counters.tokens_computed
        with self._computation.inserted(texts, are_ends=False) as ends, self._computation.holders.using(ends):
            new = [end for end in dict.fromkeys(ends) if not end.is_held(with_keys_values=True)]
            self._computation.compute(ends, Request(with_keys_values=True, is_step=True))
        counters.tokens_requested += max(len(texts), counters.tokens_computed - num_before)
        for end in new:
            self.growth.note_pass(end)
        return ends

    def settle(self, grown: Sequence[Span], dropped: Sequence[Span], scores: Mapping[Span, TokenScore]) -> None:
        """Go on with some of the texts that are held.

        Args:
            grown: ends that `grow` returned last and that stay held; they absorb what they continue.
            dropped: ends that are not needed any more. Where nobody else knows of them and nothing continues them, they
                are forgotten.
            scores: of the last tokens of some that were grown.

        """
        self._scoring.note_last(scores)
        held = self._computation.holders.ends()
        for end in dropped:
            self._computation.forest.discard(end, held)
        self._computation.memory.add(self.growth.absorb(list(dict.fromkeys(grown)), held))

    def end(self, ends: Sequence[Span]) -> None:
        """Finish texts that have grown and that nobody holds any more: they are from now on like all others."""
        for end in ends:
            end.is_end = True
        archive = self._computation.archive
        for end in dict.fromkeys(ends):
            self._computation.memory.add(self.growth.finish(end))
            if archive is not None and end.is_held(with_keys_values=True):
                archive.save_new([end])
        self._computation.make_room()

    def end_abandoned(self) -> None:
        """Finish what grew for somebody who is no more, or who failed."""
        while self.abandoned:
            self.end([end for text in self.abandoned.popleft() for end in text.ends.values()])
