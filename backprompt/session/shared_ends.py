"""Scores of texts that consist of a prompt and an end of token ids: completions behind shared prompts.

    prompts = [Text.from_tokens(ids, lm) for ids in all_ids]
    ends = [Text.from_tokens(ids, lm) for ids in completions]
    lm.token_logprobs([prompt + end for prompt in prompts for end in ends])

Such texts are recognised by the way in which they were built: prompts by identity, ends by their ids, shared or not.
The ids of whole texts are never joined, checked or inserted one by one. The scores of a prompt's own tokens are read
once, and copied to each text that is scored from a start within the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby, islice

import numpy as np

from backprompt.evaluation.behind import Behind
from backprompt.evaluation.predictions import Ints, ranges
from backprompt.evaluation.scores import TokenScores
from backprompt.evaluation.scoring import ScoredTexts
from backprompt.forest.fan import Shape
from backprompt.session.texts import TextSession
from backprompt.text.node import Text, given_ids, sides
from backprompt.tokens.graph import TokenGraph, TokenIds, ends_in_group, is_beginning, num_positions


def scores_of_shared_ends(
    session: TextSession, texts: Sequence[Text], starts: Sequence[Text | int]
) -> ScoredTexts | None:
    """Return the scores of texts; None if the texts must be scored one by one. The lock must be held.

    The texts must be prompts with several ends of token ids each, each start must be a beginning of its prompt, and no
    text may have been evaluated.
    """
    grouped = _grouped(texts)
    if grouped is None:
        return None
    prompts, shapes = grouped
    beginnings = list({id(start): start for start in [*prompts, *starts] if isinstance(start, Text)}.values())
    if any(start.lm not in (None, texts[0].lm) for start in beginnings):
        return None
    ids_of = dict(zip(map(id, beginnings), session.encoder.encode_beginnings(beginnings), strict=True))
    prompt_ids = [ids_of[id(prompt)] for prompt in prompts]
    if not all(prompt_ids) or any(map(ends_in_group, prompt_ids)):
        return None
    given = iter(starts)
    nums_own = [
        _nums_own(ids, [ids_of.get(id(start), start) for start in islice(given, len(shape.completions))])
        for ids, shape in zip(prompt_ids, shapes, strict=True)
    ]
    if not all(nums_own) or any(session.computed_ends(texts)):
        return None
    behind = list(map(Behind, prompt_ids, shapes, map(max, nums_own)))
    scores = scores_if_fine(session, behind)
    return None if scores is None else _joined(scores, behind, nums_own)


def scores_if_fine(session: TextSession, behind: Sequence[Behind]) -> TokenScores | None:
    """Return the scores of completions behind prompts; None if one cannot be evaluated. The lock must be held."""
    completions = dict.fromkeys(ids for shape in dict.fromkeys(of.shape for of in behind) for ids in shape.completions)
    lengths = [num_positions(of.prompt) + max(map(len, of.shape.completions)) - 1 for of in behind]
    if not session.limits.are_fine([*(of.prompt for of in behind), *completions], lengths):
        return None
    session.counters.tokens_requested += sum(of.num_tokens for of in behind)
    return session.scoring.behind(behind).scores


def _nums_own(prompt: TokenIds, starts: Sequence[TokenIds | Text | int]) -> list[int]:
    """Return the number of the prompt's tokens from each start on; nothing if a start is not its beginning."""
    num_of: dict[int, int] = {}  # by identity: many texts have the same start
    for start in starts:
        if id(start) not in num_of:
            if isinstance(start, (tuple, TokenGraph)):
                num_before = len(start) if is_beginning(start, prompt) else -1
            else:
                num_before = start if type(start) is int else -1
            if not 0 <= num_before <= len(prompt):
                return []
            num_of[id(start)] = len(prompt) - num_before
    return [num_of[id(start)] for start in starts]


def _joined(scores: TokenScores, behind: Sequence[Behind], nums_own: Sequence[Sequence[int]]) -> ScoredTexts:
    """Return the scores of whole texts, made of the scores of each prompt's own tokens and of its completions."""
    lengths = _ints(chain.from_iterable(map(len, of.shape.completions) for of in behind))
    own = _ints(chain.from_iterable(nums_own))
    if not own.any():
        return ScoredTexts(scores, lengths.tolist())
    # The scores before a text's completion: the completions of earlier texts, and the own tokens of its prompt and of
    # earlier prompts.
    num_texts = [len(of.shape.completions) for of in behind]
    stops = np.cumsum(lengths) + np.repeat(np.cumsum([of.num_own for of in behind]), num_texts)
    own_stops = np.repeat(
        np.cumsum([of.num_scores for of in behind]) - [of.shape.num_scores for of in behind], num_texts
    )
    parts = np.stack([own_stops - own, own_stops, stops - lengths, stops], axis=1).reshape(-1, 2)
    return ScoredTexts(scores.at(ranges(parts[:, 0], parts[:, 1])), (own + lengths).tolist())


def _ints(numbers: Iterable[int]) -> Ints:
    return np.fromiter(numbers, dtype=np.int64)


def _grouped(texts: Sequence[Text]) -> tuple[list[Text], list[Shape]] | None:
    """Return the prompts of texts in order, and the ends behind each; None if the texts are of another form."""
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
        shapes.append(shape)
    return prompts, shapes


def _token_ids_of(ends: Sequence[Text]) -> tuple[tuple[int, ...], ...] | None:
    """Return the ids of texts of one segment of token ids each; None if a text is of another form."""
    found = tuple(ids for ids in map(given_ids, ends) if ids is not None)
    return found if len(found) == len(ends) else None
