"""Calls about texts: the requests of several threads, computed as one forest and scored with one reading.

Each call says which of its texts must be computed and scored. All of them go into the forest together, as the texts of
one call would, so any part that calls have in common is computed once, in as few passes as possible.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from backprompt.evaluation.behind import Behind
from backprompt.evaluation.evaluator import Evaluator
from backprompt.evaluation.reading import Wanted
from backprompt.evaluation.scores import TokenScores
from backprompt.evaluation.scoring import ScoredTexts
from backprompt.forest.span import Span
from backprompt.session.evaluated import Batch
from backprompt.session.sharing import Answer, Call


class Needed(NamedTuple):
    """Texts to be computed and scored, and the ends of those that are in the forest."""

    items: Sequence[Wanted | Behind]
    known: Sequence[Span | None]

    @classmethod
    def new(cls, items: Sequence[Wanted | Behind]) -> Needed:
        """Return texts of which none is known to be in the forest."""
        return cls(items, [None] * len(items))


class Found(NamedTuple):
    """Texts and prompts of a call, the end of each, and the scores that it wanted; and the batch of all calls."""

    batch: Batch
    items: Sequence[Wanted | Behind]
    ends: Sequence[Span]
    scores: ScoredTexts


def scores_found(found: Found) -> ScoredTexts:
    """Return the scores of a call's texts, as tensors of their own: views would keep those of all calls in memory."""
    scores, lengths = found.scores.scores, found.scores.lengths
    return ScoredTexts(TokenScores(scores.logprobs.clone(), scores.is_argmax.clone()), lengths)


class TextsCall(Call[Answer]):
    """A question about texts.

    Args:
        alone: answers it; the lock is held.
        needed: returns the texts to compute for it; raises the errors of texts that cannot be evaluated. None if the
            question cannot be answered along with others, or nothing is missing.
        answer: makes the answer from the results; None if `alone` answers from results that are held by then.

    """

    def __init__(
        self,
        alone: Callable[[], Answer],
        needed: Callable[[], Needed | None],
        answer: Callable[[Found], Answer] | None = None,
    ) -> None:
        super().__init__()
        self._alone, self.needed, self._answer = alone, needed, answer

    def finish(self) -> Answer:
        """Return the answer."""
        if self._answer is None or not self.is_answered:
            return self._alone()
        return self._answer(self.found)

    @staticmethod
    def together(evaluator: Evaluator, calls: Sequence[TextsCall[Answer]]) -> None:
        """Compute the needs of calls in one go. A call whose texts cannot be evaluated is left to its own thread."""
        parts: list[tuple[TextsCall[Answer], Needed]] = []
        for call in calls:
            try:
                needed = call.needed()
            except Exception:  # its owner meets it again
                needed = None
            if needed is None:
                call.is_alone = True
            else:
                parts.append((call, needed))
        if not parts:
            return
        items = [item for _, needed in parts for item in needed.items]
        known = [end for _, needed in parts for end in needed.known]
        ends, scored = evaluator.scoring.mixed(items, known)
        stops = itertools.accumulate(len(needed.items) for _, needed in parts)
        slices = list(itertools.starmap(slice, itertools.pairwise([0, *stops])))
        lengths = [scored.lengths[own] for own in slices]
        scores = scored.scores.split(list(map(sum, lengths)))
        batch = Batch(evaluator)
        for (call, needed), own, score, nums in zip(parts, slices, scores, lengths, strict=True):
            call.found = Found(batch, needed.items, ends[own], ScoredTexts(score, nums))
