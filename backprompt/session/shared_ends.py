"""Scores of texts that consist of a prompt and an end of token ids: completions behind shared prompts.

    prompts = [Text.from_tokens(ids, lm) for ids in all_ids]
    ends = [Text.from_tokens(ids, lm) for ids in completions]
    lm.token_logprobs([prompt + end for prompt in prompts for end in ends])

Such texts are recognised by the way in which they were built: prompts by identity, ends by their ids, shared or not.
The ids of whole texts are never joined, checked or inserted one by one. The scores of a prompt's own tokens are read
once, and copied to each text that is scored from a start within the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain, groupby

import numpy as np

from backprompt.evaluation.behind import Behind
from backprompt.evaluation.predictions import Ints, ranges
from backprompt.evaluation.scores import TokenScores
from backprompt.evaluation.scoring import ScoredTexts
from backprompt.forest.fan import Shape
from backprompt.session.texts import TextSession
from backprompt.text.node import Text, given_ids, sides
from backprompt.tokens.graph import TokenIds, ends_in_group, is_beginning, num_positions


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
    num_texts = _ints(len(shape.completions) for shape in shapes)
    nums_own = _nums_own(prompt_ids, np.repeat(np.arange(len(shapes)), num_texts).tolist(), starts, ids_of)
    if (nums_own < 0).any() or any(session.computed_ends(texts)):
        return None
    most_own = np.maximum.reduceat(nums_own, np.cumsum(num_texts) - num_texts)
    behind = list(map(Behind, prompt_ids, shapes, most_own.tolist()))
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


def _nums_own(
    prompt_ids: Sequence[TokenIds],
    prompt_idxs: Iterable[int],
    starts: Iterable[Text | int],
    ids_of: Mapping[int, TokenIds],
) -> Ints:
    """Return the number of a prompt's tokens from each start on, `(starts,)`; -1 for a start that is not its beginning.

    Args:
        prompt_ids: the ids of each prompt.
        prompt_idxs: the prompt of each start.
        starts: the starts.
        ids_of: the ids of the starts that are texts, by identity.

    """

    @cache  # many texts of a prompt have the same start
    def num_behind(start_id: int, prompt_idx: int) -> int:
        ids, prompt = ids_of.get(start_id), prompt_ids[prompt_idx]
        return len(prompt) - len(ids) if ids is not None and is_beginning(ids, prompt) else -1

    def num_own(start: Text | int, prompt_idx: int) -> int:
        if type(start) is int:
            return len(prompt_ids[prompt_idx]) - start if start >= 0 else -1
        return num_behind(id(start), prompt_idx)

    return _ints(max(-1, num) for num in map(num_own, starts, prompt_idxs))


def _joined(scores: TokenScores, behind: Sequence[Behind], own: Ints) -> ScoredTexts:
    """Return the scores of whole texts, made of the scores of each prompt's own tokens and of its completions.

    `own`: the number of each text's own tokens of its prompt that are scored, `(texts,)`.
    """
    lengths = _ints(chain.from_iterable(map(len, of.shape.completions) for of in behind))
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
