"""Completions behind prompts in the forest: those of a prompt are a fan where possible, else texts.

A fan needs a prompt without other texts behind it, and several completions or one that several prompts of the call
share. A store knows only spans. So with a store, a fan also needs a prompt behind which nothing is stored and nothing
would be stored (`Archive.in_the_way`). All other completions are computed as texts, so that no token is computed twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from backprompt.evaluation.computation import Computation
from backprompt.evaluation.reading import Wanted
from backprompt.forest.fan import Fan, Shape
from backprompt.forest.span import FAN, Span
from backprompt.tokens.graph import TokenIds, with_more

FANS_IN_A_PASS = 4
"""The least number of fans that a pass has room for. A fan is never cut, so room for less than a whole fan is lost."""


class Behind(NamedTuple):
    """A prompt, completions to score behind it, and how many of the prompt's own last tokens are scored as well."""

    prompt: TokenIds
    shape: Shape
    num_own: int = 0

    @property
    def token_ids(self) -> TokenIds:
        """The ids of the prompt."""
        return self.prompt

    @property
    def num_scores(self) -> int:
        """The number of tokens that are scored: the prompt's own ones, then those of all completions."""
        return self.num_own + self.shape.num_scores

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all texts: the prompt with each completion."""
        return len(self.prompt) * len(self.shape.completions) + self.shape.num_scores


class Placed(NamedTuple):
    """Completions in the forest: a fan, or texts that together, in this order, give the completions' scores.

    Attributes:
        items: the fan, or the texts.
        ends: the end of each.

    """

    items: Sequence[Fan | Wanted]
    ends: Sequence[Span]

    def behind(self, behind: Behind, end: Span) -> Placed:
        """Return these items behind one for the prompt's own tokens to score, if any; the prompt ends at `end`."""
        if not behind.num_own:
            return self
        own = Wanted(behind.prompt, len(behind.prompt) - behind.num_own)
        return Placed([own, *self.items], [end, *self.ends])


def placed_behind(computation: Computation, prompts: Sequence[Behind], ends: Sequence[Span]) -> list[Placed]:
    """Put completions behind prompts that were inserted and end at `ends`."""
    forest = computation.forest
    num_prompts = Counter(behind.shape for behind in prompts)
    max_rows = computation.max_tokens // FANS_IN_A_PASS
    fan_shapes = {
        shape
        for shape, num in num_prompts.items()
        if (len(shape.completions) > 1 or num > 1) and shape.has_rows and shape.num_rows <= max_rows
    }
    fans: list[Fan | None] = [
        forest.fan(end, shape) if shape in fan_shapes else None
        for end, (_, shape, _) in zip(ends, prompts, strict=True)
    ]
    if computation.archive is not None:
        to_compute = dict.fromkeys(fan for fan in fans if fan is not None and fan.is_empty)
        for fan in computation.archive.in_the_way(forest, to_compute):
            assert fan.parent is not None
            forest.unfold(fan.parent)
    placed = [None if fan is None else Placed([fan], [fan]) for fan in fans]
    # Texts may run through prompts that have a fan. Such a fan unfolds, so its completions are texts, too.
    while lost := [idx for idx, fan in enumerate(fans) if (placed[idx] is None if fan is None else _is_unfolded(fan))]:
        for idx in lost:
            fans[idx], placed[idx] = None, _as_texts(computation, prompts[idx], ends[idx])
    return [found for found in placed if found is not None]


def _is_unfolded(fan: Fan) -> bool:
    return fan.parent is not None and fan.parent.children.get(FAN) is not fan


def _as_texts(computation: Computation, behind: Behind, end: Span) -> Placed:
    """Insert completions without their last tokens, which are scored as candidates."""
    forest, (prompt, shape, _) = computation.forest, behind
    forest.unfold(end)
    if not shape.has_rows:
        return Placed([Wanted(prompt, len(prompt), [token_id for (token_id,) in shape.completions])], [end])
    texts: list[Wanted] = []
    text_ends: list[Span] = []
    for ids in shape.completions:
        last = forest.extend(end, end.stop, ids[:-1])
        last.is_end = True
        forest.unfold(last)
        texts.append(Wanted(with_more(prompt, ids[:-1]), len(prompt), ids[-1:]))
        text_ends.append(last)
    return Placed(texts, text_ends)
