"""Constraints of the texts of a call: checked, each distinct one compiled once.

The mask stands where transformers puts a caller's own processors: behind penalties and processors that exclude tokens,
and before temperature, top-k and the like. So temperature, top-k and the like divide the probability among the allowed
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from backprompt.arguments import as_list
from backprompt.errors import GenerationError
from backprompt.lm import LM
from backprompt.tokens.constraints import Constraint, as_constraint
from backprompt.tokens.matching import Allowed, Language, Matching, Vocabulary
from backprompt.tokens.tokenizer import PrivateTokenizer
from backprompt.visible import counted

MAX_FORCED = 128
"""The largest number of forced tokens (tokens without an alternative) that are forwarded in one pass."""


class AllowedTokens(LogitsProcessor):
    """Marks the place of the mask among a text's processors; `choosing.processed` applies the masks of many texts."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores unchanged."""
        return scores


@dataclass(frozen=True)
class Constraints:
    """The constraints of the texts of a call.

    Attributes:
        given: the constraint of each text, None for a text without one; empty if no text has one.
        languages: each distinct constraint, compiled.

    """

    given: tuple[Constraint | None, ...]
    languages: Mapping[Constraint, Language]

    @classmethod
    def of(cls, given: Sequence[Constraint | None], tokenizer: PrivateTokenizer) -> Constraints:
        """Return constraints, compiled; raises the errors of `Vocabulary` and of `Vocabulary.language`."""
        distinct = dict.fromkeys(constraint for constraint in given if constraint is not None)
        if not distinct:
            return UNCONSTRAINED
        vocabulary = Vocabulary.of(tokenizer)
        return cls(tuple(given), {constraint: vocabulary.language(constraint) for constraint in distinct})

    def __bool__(self) -> bool:
        return bool(self.languages)

    def repeated(self, num_each: int) -> Constraints:
        """Return the constraints for a call in which each text stands `num_each` times in a row."""
        return Constraints(tuple(own for own in self.given for _ in range(num_each)), self.languages)

    def matching(self, text_idx: int, num_tokens: int, end_ids: Iterable[int]) -> Matching | None:
        """Return the matching of a text at the beginning of its continuation; None for a text without a constraint."""
        constraint = self.given[text_idx] if self.given else None
        return None if constraint is None else Matching(self.languages[constraint], num_tokens, end_ids)

    def check_begin(self, num_tokens: int, end_ids: Iterable[int]) -> None:
        """Raise GenerationError for a constraint under which no token can come first."""
        for language in self.languages.values():
            Matching(language, num_tokens, end_ids).check_begins()


UNCONSTRAINED = Constraints((), {})


def constraints_of(lm: LM, given: Any, num_texts: int) -> Constraints:
    """Return the constraints of texts, given as one for all texts or as a list with one, or None, for each text.

    Raises:
        TextTypeError: an element is not a constraint.
        GenerationError: the numbers of constraints and texts differ, or llguidance refuses a constraint.
        MissingDependencyError, TokenizerError: see `Vocabulary`.

    """
    if given is None:
        return UNCONSTRAINED
    if isinstance(given, (list, tuple)):
        listed = as_list(given, "constraint")
        if len(listed) != num_texts:
            raise GenerationError(
                f"The list has {counted(len(listed), 'constraint')} for {counted(num_texts, 'text')}. Give one for all "
                "texts, or one for each text."
            )
        checked = [None if own is None else as_constraint(own, f"constraint[{idx}]") for idx, own in enumerate(listed)]
    else:
        checked = [as_constraint(given, "constraint")] * num_texts
    if not any(checked):
        return UNCONSTRAINED
    with lm.session.exclusive():
        lm.session.current(with_weights=False)
        return Constraints.of(checked, lm.session.private_tokenizer)


def allowed_rows(rows: Sequence[Sequence[Allowed] | None], rows_each: int, like: Tensor) -> Tensor | None:
    """Return which tokens may follow, `(rows, vocab)`, for all rows of all texts; None if no text has a constraint.

    Args:
        rows: for each text the allowed tokens of its rows; None for a text without a constraint.
        rows_each: the number of rows of each text.
        like: the scores of all rows, `(rows, vocab)`.

    """
    if rows.count(None) == len(rows):
        return None
    any_token = np.ones(like.shape[1], dtype=bool)
    stacked = np.stack([row for own in rows for row in (own if own is not None else [any_token] * rows_each)])
    return torch.from_numpy(stacked).to(like.device)
