"""Calls about texts: the requests of several threads, computed as one forest and scored together.

Each call says which of its texts must be computed and scored. The texts of all calls are inserted into the forest
together, like the texts of one call. So a part that calls have in common is computed once, in as few passes as
possible.
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
    """Texts to be computed and scored, and the end of each text that is in the forest, else None."""

    items: Sequence[Wanted | Behind]
    known: Sequence[Span | None]

    @classmethod
    def new(cls, items: Sequence[Wanted | Behind]) -> Needed:
        """Return texts that are not known to be in the forest."""
        return cls(items, [None] * len(items))


class Found(NamedTuple):
    """The results of a call: its texts and prompts, their ends and their scores, and the batch of all calls."""

    batch: Batch
    items: Sequence[Wanted | Behind]
    ends: Sequence[Span]
    scores: ScoredTexts


def scores_found(found: Found) -> ScoredTexts:
    """Return copies of the scores of a call's texts: views would keep the scores of all calls in memory."""
    scores, lengths = found.scores.scores, found.scores.lengths
    return ScoredTexts(TokenScores(scores.logprobs.clone(), scores.is_argmax.clone()), lengths)


class TextsCall(Call[Answer]):
    """A call about texts.

    Args:
        alone: returns the answer, computed for this call alone; the lock is held.
        needed: returns the texts to compute for the call, and raises the errors of texts that cannot be evaluated.
            Returns None if the call cannot be answered along with others, or if no result is missing.
        answer: makes the answer from the results that were computed with others. If it is None, `alone` makes the
            answer, and finds these results in memory.

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
        """Compute the texts of all calls together. A call whose texts cannot be evaluated is left to its own thread."""
        parts: list[tuple[TextsCall[Answer], Needed]] = []
        for call in calls:
            try:
                needed = call.needed()
            except Exception:  # raised again in the thread of the call
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
