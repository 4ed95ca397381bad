"""Scores of the tokens of texts, and of tokens behind texts; a scored last token is not forwarded for its score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from backprompt.arguments import as_list, is_int
from backprompt.evaluation.behind import Behind
from backprompt.evaluation.reading import Wanted
from backprompt.evaluation.scoring import ScoredTexts, to_score
from backprompt.session.limits import check_has_last_token
from backprompt.session.shared_ends import scores_if_fine, scores_of_shared_ends
from backprompt.session.texts import TextSession
from backprompt.session.together import Needed, TextsCall, scores_found
from backprompt.text.node import Text, lazily
from backprompt.tokens.adapted import plain
from backprompt.tokens.graph import TokenIds, flat, is_beginning


def token_scores(session: TextSession, texts: Iterable[Text], starts: Iterable[Text | int] | None) -> ScoredTexts:
    """Return the scores of each text's tokens from its start on; see `LM.token_scores`."""
    texts = session.own_texts(texts)
    given = given_starts(texts, starts)

    def alone() -> ScoredTexts:
        session.current()
        shared = scores_of_shared_ends(session, texts, given)
        if shared is not None:
            return shared
        encoded, first = encoded_to_score(session, texts, given)
        return session.scoring.token_scores(encoded, first, session.computed_ends(texts))

    def needed() -> Needed:
        encoded, first = encoded_to_score(session, texts, given)
        known = session.computed_ends(texts)
        return Needed(list(map(to_score, encoded, first, [end is not None for end in known])), known)

    return session.answer(TextsCall(alone, needed, scores_found))


def encoded_to_score(
    session: TextSession, texts: Sequence[Text], starts: Iterable[Text | int] | None
) -> tuple[list[TokenIds], list[int]]:
    """Return the ids of texts to be scored, and the first token to score of each; the lock must be held.

    Raises:
        ValueError: the numbers of starts and texts differ, or a start is not the beginning of its text.
        The errors of `evaluate` for texts that cannot be evaluated.

    """
    first = _first_scored(session, texts, given_starts(texts, starts))
    return session.checked_ids(texts, first, is_scoring=True), first


def given_starts(texts: Sequence[Text], starts: Iterable[Text | int] | None) -> Sequence[Text | int]:
    """Return the start of each text, as it was given.

    Raises:
        ValueError: the numbers of starts and texts differ.

    """
    given = [0] * len(texts) if starts is None else as_list(starts, "starts must be a Text or an int for each text")
    if len(given) != len(texts):
        raise ValueError(f"starts has {len(given)} elements for {len(texts)} texts; give one start for each text.")
    return given


def scores_behind(session: TextSession, prompts: Sequence[Behind]) -> ScoredTexts:
    """Return the scores of completions behind prompts, with one length for all completions of a prompt.

    Args:
        session: the session of the prompts.
        prompts: the ids of each prompt (see `TextSession.prompt_ids`), and its completions. The caller has checked that
            they can be evaluated.

    """

    def alone() -> ScoredTexts:
        session.current()
        session.counters.tokens_requested += sum(behind.num_tokens for behind in prompts)
        return session.scoring.behind(prompts)

    def needed() -> Needed:
        session.counters.tokens_requested += sum(behind.num_tokens for behind in prompts)
        return Needed.new(prompts)

    return session.answer(TextsCall(alone, needed, scores_found))


def scores_of_ids(session: TextSession, prompts: Sequence[Behind]) -> ScoredTexts | None:
    """Return the scores of completions behind prompts, with a length for each; None if one cannot be evaluated."""
    with session.exclusive():
        session.current()
        found = scores_if_fine(session, prompts)
        lengths = [len(ids) for behind in prompts for ids in behind.shape.completions]
        return None if found is None else ScoredTexts(found, lengths)


def scores_of_next(session: TextSession, texts: Sequence[tuple[TokenIds, Sequence[int]]]) -> ScoredTexts:
    """Return the scores of tokens that may follow texts of ids; the caller has checked the texts."""
    return scores_of_wanted(session, [Wanted(ids, len(ids), own) for ids, own in texts])


def scores_of_wanted(session: TextSession, wanted: Sequence[Wanted]) -> ScoredTexts:
    """Return the scores of wanted tokens; the caller has checked that the texts can be evaluated."""

    def alone() -> ScoredTexts:
        session.current()
        session.counters.tokens_requested += sum(len(text.token_ids) for text in wanted)
        return session.scoring.scored(wanted)

    def needed() -> Needed:
        session.counters.tokens_requested += sum(len(text.token_ids) for text in wanted)
        return Needed.new(wanted)

    return session.answer(TextsCall(alone, needed, scores_found))


def next_token_logprobs(
    session: TextSession, texts: Iterable[Text], token_ids: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Return the log-probabilities of tokens behind each text; see `LM.next_token_logprobs`."""
    texts = session.own_texts(texts)
    token_ids = [
        as_list(ids, f"token_ids[{idx}] must be a sequence of ids")
        for idx, ids in enumerate(as_list(token_ids, "token_ids must be a sequence of ids for each text"))
    ]
    if len(token_ids) != len(texts):
        raise ValueError(
            f"token_ids has {len(token_ids)} elements for {len(texts)} texts; give a sequence of ids for each text."
        )

    def wanted() -> list[Wanted]:
        session.current()
        for text, encoded in zip(texts, session.encoder.encode(texts), strict=True):
            check_has_last_token(text, encoded)
        limits = session.limits
        candidates = [tuple(map(limits.as_id, ids)) for ids in token_ids]
        return [Wanted(ids, len(ids), own) for ids, own in zip(session.checked_ids(texts), candidates, strict=True)]

    call = TextsCall(lambda: session.scoring.scored(wanted()), lambda: Needed.new(wanted()), scores_found)
    found = session.answer(call)
    return list(torch.split(found.scores.logprobs, list(found.lengths)))


def _first_scored(session: TextSession, texts: Sequence[Text], starts: Sequence[Text | int]) -> list[int]:
    """Return the first token to score of each text; the lock must be held.

    Raises:
        ValueError: a start is not the beginning of its text.

    """
    session.current()
    if all(map(is_int, starts)):
        return [int(start) for start in starts if not isinstance(start, Text)]
    beginnings = list(dict.fromkeys(start for start in starts if isinstance(start, Text)))
    with lazily():
        bound = [Text("", texts[0].lm) + start for start in beginnings]
    ids_of = dict(zip(beginnings, session.encoder.encode_beginnings(bound), strict=True))
    first = []
    for idx, (text, start, whole) in enumerate(zip(texts, starts, session.encoder.encode(texts), strict=True)):
        if isinstance(start, Text):
            if not is_beginning(ids_of[start], whole):
                message = f"starts[{idx}], {start!r}, is not the beginning of {text!r}"
                raise ValueError(f"{message}: {_why_no_beginning(session, ids_of[start], whole)}. {_ADVICE}")
            first.append(len(ids_of[start]))
        elif not is_int(start):
            raise TypeError(f"starts[{idx}] must be a Text or an int, not {type(start).__name__}: {start!r}.")
        else:
            first.append(int(start))
    return first


_ADVICE = (
    "If a token spans the join, let the start end before that token (often before a space), or add the rest as "
    "token ids, which are never joined: prompt + Text.from_tokens(ids, lm)."
)


def _why_no_beginning(session: TextSession, start: TokenIds, whole: TokenIds) -> str:
    ids, whole_ids = flat(start), flat(whole)
    idx = next((idx for idx, pair in enumerate(zip(ids, whole_ids, strict=False)) if pair[0] != pair[1]), None)
    if idx is not None:
        own, expected = plain(whole_ids[idx : idx + 1]), plain(ids[idx : idx + 1])
        if own == expected:
            return f"token {idx} of the text is under another adapter than that of the start"
        shown = [f"{i[0]} ({session.private_tokenizer.decode(i)!a})" for i in (own, expected)]
        return f"token {idx} of the text is {shown[0]}, and that of the start is {shown[1]}"
    if len(ids) > len(whole_ids):
        return f"it has {len(ids)} tokens, and the text has {len(whole_ids)}"
    return "its groups differ, or continue behind it"
