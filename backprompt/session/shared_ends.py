"""Texts that are prompts with shared ends of token ids, as scored completions behind these prompts.

    prompts = [Text.from_tokens(ids, lm) for ids in all_ids]
    ends = [Text.from_tokens(ids, lm) for ids in completions]
    lm.token_logprobs([prompt + end for prompt in prompts for end in ends], starts)

Such texts are told by how they were built: prompts by identity, ends by their ids. The ids of whole texts are never
joined, checked or inserted one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from backprompt.evaluation.behind import Behind
from backprompt.evaluation.scoring import ScoredTexts
from backprompt.forest.fan import Shape
from backprompt.session.session import Session
from backprompt.text.node import Text, sides
from backprompt.tokens.graph import ends_in_group, num_positions


def scores_of_shared_ends(session: Session, texts: Sequence[Text], starts: Sequence[Text | int]) -> ScoredTexts | None:
    """Return the scores of the ends of texts; None for texts to be scored one by one. The lock must be held.

    The texts must be prompts with the same few sequences of ends of token ids, each text scored from its end on, and
    none of them evaluated.
    """
    grouped = _grouped(texts)
    if grouped is None:
        return None
    prompts, shapes = grouped
    prompt_ids = session.ids_before_more(prompts)
    if not all(prompt_ids) or any(map(ends_in_group, prompt_ids)):
        return None
    given = iter(zip(texts, starts, strict=True))
    for ids, shape in zip(prompt_ids, shapes, strict=True):
        for _ in shape.completions:
            text, start = next(given)
            if not (start == len(ids) if type(start) is int else start is (sides(text) or (None,))[0]):
                return None
    if any(session.are_computed(texts)):
        return None
    behind = list(map(Behind, prompt_ids, shapes))
    return scores_if_fine(session, behind)


def scores_if_fine(session: Session, behind: Sequence[Behind]) -> ScoredTexts | None:
    """Return the scores of completions behind prompts, of each completion its own; None if one cannot be evaluated.

    The lock must be held.
    """
    completions = dict.fromkeys(ids for shape in dict.fromkeys(own for _, own in behind) for ids in shape.completions)
    lengths = [num_positions(prompt) + max(map(len, shape.completions)) - 1 for prompt, shape in behind]
    if not session.limits.are_fine([*(prompt for prompt, _ in behind), *completions], lengths):
        return None
    session.counters.tokens_requested += sum(
        len(prompt) * len(shape.completions) + shape.num_scores for prompt, shape in behind
    )
    found = session.evaluator.scoring.behind(behind)
    return ScoredTexts(found.scores, [len(ids) for _, shape in behind for ids in shape.completions])


def _grouped(texts: Sequence[Text]) -> tuple[list[Text], list[Shape]] | None:
    """Return the prompts of texts in order, and what stands behind each; None if prompts do not share their ends."""
    both = list(map(sides, texts))
    prompts: list[Text] = []
    ends: list[tuple[Text, ...]] = []
    for _, group in groupby(both, key=lambda pair: id(pair and pair[0])):
        pairs = [pair for pair in group if pair is not None]
        if not pairs or len(ends) * 2 > len(texts):
            return None
        prompts.append(pairs[0][0])
        ends.append(tuple(right for _, right in pairs))
    by_objects: dict[tuple[int, ...], Shape] = {}
    by_ids: dict[tuple[tuple[int, ...], ...], Shape] = {}
    shapes: list[Shape] = []
    for own in ends:
        objects = tuple(map(id, own))
        shape = by_objects.get(objects)
        if shape is None:
            completions = _token_ids_of(own)
            if completions is None:
                return None
            shape = by_objects[objects] = by_ids.setdefault(completions, Shape(completions))
        if len(by_ids) * 2 > len(ends):
            return None
        shapes.append(shape)
    return prompts, shapes


def _token_ids_of(ends: Sequence[Text]) -> tuple[tuple[int, ...], ...] | None:
    """Return the ids of texts that are token ids; None for others."""
    found: list[tuple[int, ...]] = []
    for end in ends:
        segments = end.segments
        if len(segments) != 1 or not isinstance(segments[0], tuple):
            return None
        found.append(segments[0])
    return tuple(found)
