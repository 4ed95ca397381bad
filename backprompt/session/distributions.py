"""Entropies and most probable tokens, from the distributions that predict texts' tokens; one tensor for many texts.

No result is kept: evaluation/distributions.py reads the rows. Trainers pass rows of ids in place of texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backprompt.arguments import as_int, as_number
from backprompt.evaluation.distributions import Asked, Distributions
from backprompt.evaluation.reading import Wanted
from backprompt.evaluation.scoring import to_score
from backprompt.session.text_scores import encoded_to_score, given_starts
from backprompt.session.texts import TextSession
from backprompt.session.together import Needed, TextsCall
from backprompt.text.node import Text


@dataclass(frozen=True)
class Entropies:
    """The entropies of the distributions that predict tokens, of many texts in one tensor.

    Attributes:
        entropies: those of all texts, one text after the other, `(tokens,)`, nats, float64 for a model in float64 and
            else float32; nan for a token without a prediction.
        offsets: the index of the first token of each text, and the end of the last text, `(texts + 1,)`, int64, on the
            CPU.

    """

    entropies: Tensor
    offsets: Tensor

    def split(self) -> list[Tensor]:
        """Return the entropies of each text, as views."""
        return list(torch.split(self.entropies, self.offsets.diff().tolist()))


@dataclass(frozen=True)
class TopLogprobs:
    """The most probable tokens at the position of each token, of many texts in two tensors.

    Attributes:
        logprobs: those of all texts, one text after the other, `(tokens, k)`, highest first, nats, float64 for a model
            in float64 and else float32; nan for a token without a prediction.
        token_ids: the ids of the most probable tokens, `(tokens, k)`; -1 for a token without a prediction. Tokens of
            equal probability may stand in any order.
        offsets: the index of the first token of each text, and the end of the last text, `(texts + 1,)`, int64, on the
            CPU.

    """

    logprobs: Tensor
    token_ids: Tensor
    offsets: Tensor

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """Return the log-probabilities and ids of each text, `(tokens, k)` each, as views."""
        lengths = self.offsets.diff().tolist()
        return list(zip(torch.split(self.logprobs, lengths), torch.split(self.token_ids, lengths), strict=True))


def entropies(
    session: TextSession, texts: Iterable[Text], starts: Iterable[Text | int] | None, temperature: float
) -> Entropies:
    """Return the entropies of the distributions that predict texts' tokens; see `LM.entropies`."""
    asked = Asked(temperature=as_temperature(temperature), entropy=True)
    found, offsets = _of_texts(session, texts, starts, asked)
    assert found.entropies is not None
    return Entropies(found.entropies, offsets)


def top_logprobs(
    session: TextSession, texts: Iterable[Text], k: int, starts: Iterable[Text | int] | None, temperature: float
) -> TopLogprobs:
    """Return the most probable tokens at the positions of texts' tokens; see `LM.top_logprobs`."""
    asked = Asked(temperature=as_temperature(temperature), top_k=as_top_k(session, k, "k"))
    found, offsets = _of_texts(session, texts, starts, asked)
    assert found.top_logprobs is not None and found.top_ids is not None
    return TopLogprobs(found.top_logprobs, found.top_ids, offsets)


def distributions_of_ids(session: TextSession, wanted: Sequence[Wanted], asked: Asked) -> Distributions:
    """Return the requested results of the distributions that predict tokens of texts of ids; the lock must be held.

    The caller has checked that the texts can be evaluated.
    """
    session.current()
    session.counters.tokens_requested += sum(len(text.token_ids) + len(text.candidates) for text in wanted)
    return session.distributions(wanted, asked)


def as_temperature(given: float) -> float:
    """Return a temperature as a float.

    Raises:
        TypeError, ValueError: the value is not a finite number above 0.

    """
    temperature = as_number(given, "temperature")
    if temperature <= 0:
        raise ValueError(
            f"temperature must be above 0, not {given!r}. It divides the logits; 1 leaves them as they are."
        )
    return temperature


def as_top_k(session: TextSession, given: int, name: str) -> int:
    """Return the requested number of most probable tokens as an int; `name` names the argument in errors.

    Raises:
        ValueError: the value is not an int from 1 to the size of the vocabulary.

    """
    k, vocab_size = as_int(given, name, at_least=1), session.vocab_size
    if k > vocab_size:
        raise ValueError(f"{name} is {k}, but the model's head has {vocab_size} tokens. Ask for at most {vocab_size}.")
    return k


def _of_texts(
    session: TextSession, texts: Iterable[Text], starts: Iterable[Text | int] | None, asked: Asked
) -> tuple[Distributions, Tensor]:
    """Return the requested results for texts' tokens from a start on, and the offsets of the texts."""
    texts = session.own_texts(texts)
    given = given_starts(texts, starts)

    def wanted() -> tuple[list[Wanted], list[int]]:
        encoded, first = encoded_to_score(session, texts, given)
        lengths = [len(token_ids) - start for token_ids, start in zip(encoded, first, strict=True)]
        return list(map(to_score, encoded, first, [end is not None for end in session.computed_ends(texts)])), lengths

    def alone() -> tuple[Distributions, Tensor]:
        own, lengths = wanted()
        return session.distributions(own, asked), torch.tensor([0, *lengths]).cumsum(0)

    def needed() -> Needed:
        num_requested = session.counters.tokens_requested  # `alone` counts them
        own, _ = wanted()
        session.counters.tokens_requested = num_requested
        return Needed.new([Wanted(text.token_ids, len(text.token_ids)) for text in own])

    return session.answer(TextsCall(alone, needed))
