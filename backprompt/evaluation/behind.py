"""Completions behind prompts, as they stand in the forest: as a fan where possible, else as texts.

A fan needs a prompt behind which nothing stands yet, several completions or one that several prompts of the call share,
and no store, which knows spans. All else is computed as texts, so that no token is computed twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from backprompt.evaluation.computation import Computation
from backprompt.evaluation.reading import Ready
from backprompt.forest.fan import Fan, Shape
from backprompt.forest.span import FAN, Inserted, Span
from backprompt.tokens.graph import TokenIds, with_more

FANS_IN_A_PASS = 4
"""A pass has room for so many fans at least: a fan is not cut, and the room that is left for no whole fan is lost."""


class Behind(NamedTuple):
    """A prompt, and completions to be scored behind it; and how many of the prompt's last tokens are scored before."""

    prompt: TokenIds
    shape: Shape
    num_own: int = 0

    @property
    def num_scores(self) -> int:
        """The number of tokens that are scored: the prompt's own ones, then those of all completions."""
        return self.num_own + self.shape.num_scores

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all texts: the prompt with each completion."""
        return len(self.prompt) * len(self.shape.completions) + self.shape.num_scores


Placed: TypeAlias = "Fan | list[Ready]"
"""Completions in the forest: a fan, or texts whose scores in this order are those of the completions."""


def placed_behind(computation: Computation, prompts: Sequence[Behind], ends: Sequence[Span]) -> list[Placed]:
    """Put completions behind prompts that were inserted and end at `ends`."""
    forest = computation.forest
    num_prompts = Counter(behind.shape for behind in prompts)
    max_rows = 0 if computation.archive is not None else computation.max_tokens // FANS_IN_A_PASS
    placed: list[Placed | None] = [
        forest.fan(end, shape)
        if (len(shape.completions) > 1 or num_prompts[shape] > 1) and shape.has_rows and shape.num_rows <= max_rows
        else None
        for end, (_, shape, _) in zip(ends, prompts, strict=True)
    ]
    # Texts may run through prompts that have a fan already, which then unfolds: their completions are texts, too.
    while lost := [idx for idx, found in enumerate(placed) if found is None or _is_unfolded(found)]:
        for idx in lost:
            placed[idx] = _as_texts(computation, prompts[idx], ends[idx])
    return [found for found in placed if found is not None]


def _is_unfolded(placed: Placed) -> bool:
    return isinstance(placed, Fan) and placed.parent is not None and placed.parent.children.get(FAN) is not placed


def _as_texts(computation: Computation, behind: Behind, end: Span) -> list[Ready]:
    """Insert completions without their last tokens, which are scored as candidates."""
    forest, start = computation.forest, len(behind.prompt)
    forest.unfold(end)
    if not behind.shape.has_rows:
        return [Ready(Inserted(end, behind.prompt), start, [token_id for (token_id,) in behind.shape.completions])]
    texts = []
    for ids in behind.shape.completions:
        last = forest.extend(end, end.stop, ids[:-1])
        last.is_end = True
        forest.unfold(last)
        texts.append(Ready(Inserted(last, with_more(behind.prompt, ids[:-1])), start, ids[-1:]))
    return texts
