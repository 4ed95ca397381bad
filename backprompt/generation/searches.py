"""Beam searches side by side: the tensors of transformers' `_beam_search`, for texts with as many new tokens.

Transformers' own functions compute the scores, the penalties and the end of each search, once for all searches. The
functions look only at tokens behind the prompt, so the sequences hold only new tokens, and the prompts may have
different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backprompt.transfers import on_device

UNREACHABLE = -1e9
"""The score that transformers gives to a place without a beam."""


@dataclass(frozen=True, eq=False)
class Continuations:
    """Continuations of several texts by the same number of tokens: candidates for beams, or beams.

    Attributes:
        num_new: the number of new tokens.
        sequences: the new tokens, with room for all later ones, `(searches, continuations, tokens)`.
        scores: the accumulated scores, `(searches, continuations)`.
        indices: the beam that was continued by each token, counted over the searches that were side by side at the
            time; -1: no token; shaped as `sequences`.

    """

    num_new: int
    sequences: Tensor
    scores: Tensor
    indices: Tensor

    @property
    def last_tokens(self) -> Tensor:
        """The last token of each continuation, `(searches, continuations)`."""
        return self.sequences[:, :, self.num_new - 1]

    @property
    def beams_before(self) -> Tensor:
        """The beam that was continued by the last token, as in `indices`, `(searches, continuations)`."""
        return self.indices[:, :, self.num_new - 1].long()


@dataclass(frozen=True, eq=False)
class Searches(Continuations):
    """The states of beam searches with the same options and the same number of new tokens.

    The attributes of `Continuations` are those of the beams.

    Attributes:
        ended, ended_scores, ended_indices: the same of the finished beams, which may have fewer tokens.
        is_ended: whether there is a finished beam in a place, `(searches, beams)`.
        can_improve: whether a beam may still become better than the finished beams, `(searches, 1)`.

    """

    ended: Tensor
    ended_scores: Tensor
    ended_indices: Tensor
    is_ended: Tensor
    can_improve: Tensor

    @property
    def num_beams(self) -> int:
        """The number of beams of each search."""
        return self.scores.shape[1]

    @classmethod
    def begin(cls, num_beams: int, max_new_tokens: int, device: torch.device) -> Searches:
        """Return one search without new tokens."""
        sequences = torch.zeros((1, num_beams, max_new_tokens), dtype=torch.long, device=device)
        indices = torch.full((1, num_beams, max_new_tokens), -1, dtype=torch.int32, device=device)
        scores = torch.zeros((1, num_beams), device=device)
        scores[:, 1:] = UNREACHABLE  # all beams begin alike: only the first counts
        return cls(
            0,
            sequences,
            scores,
            indices,
            sequences.clone(),
            torch.full_like(scores, UNREACHABLE),
            indices.clone(),
            torch.zeros_like(scores, dtype=torch.bool),
            torch.ones((1, 1), dtype=torch.bool, device=device),
        )

    @classmethod
    def together(cls, searches: Sequence[Search]) -> Searches:
        """Return searches with the same number of new tokens side by side, without a copy if they are so already."""
        parts = [of._at([row for _, row in own]) for of, own in groupby(searches, key=itemgetter(0))]
        tensors = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return cls(searches[0].of.num_new, *tensors)

    def candidates(self, model: Any, accumulated: Tensor, num_kept: int) -> Continuations:
        """Return the best `num_kept` continuations of each search by one token.

        Args:
            model: the causal LM, with transformers' functions.
            accumulated: the score of each beam with each token behind the beam, `(searches, beams * vocab)`.
            num_kept: the number of candidates of each search.

        """
        scores, sequences, indices = model._get_top_k_continuations(
            accumulated_log_probs=accumulated,
            running_sequences=self.sequences,
            running_beam_indices=self.indices,
            cur_len=self.num_new,
            decoder_prompt_len=0,
            do_sample=False,
            beams_to_keep=num_kept,
            num_beams=self.num_beams,
            batch_size=len(self.scores),
        )
        return Continuations(self.num_new + 1, sequences, scores, indices)

    def with_candidates(self, model: Any, candidates: Continuations, ends_now: Tensor, config: Any) -> Searches:
        """Return the searches one token later.

        Args:
            model: the causal LM, with transformers' functions.
            candidates: what `candidates` has returned.
            ends_now: whether a candidate is finished, `(searches, candidates)`.
            config: the options of generation.

        """
        common = {"early_stopping": config.early_stopping, "length_penalty": config.length_penalty}
        sequences, scores, indices = model._get_running_beams_for_next_iteration(
            topk_log_probs=candidates.scores,
            topk_running_sequences=candidates.sequences,
            topk_running_beam_indices=candidates.indices,
            next_token_hits_stopping_criteria=ends_now,
            num_beams=self.num_beams,
        )
        ended, ended_scores, ended_indices, is_ended = model._update_finished_beams(
            sequences=self.ended,
            topk_running_sequences=candidates.sequences,
            beam_scores=self.ended_scores,
            topk_log_probs=candidates.scores,
            beam_indices=self.ended_indices,
            topk_running_beam_indices=candidates.indices,
            is_early_stop_heuristic_unsatisfied=self.can_improve,
            is_sent_finished=self.is_ended,
            next_token_hits_stopping_criteria=ends_now,
            top_num_beam_mask=torch.arange(ends_now.shape[1], device=ends_now.device) < self.num_beams,
            num_beams=self.num_beams,
            cur_len=self.num_new,
            decoder_prompt_len=0,
            **common,
        )
        can_improve = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=self.can_improve,
            running_beam_scores=scores,
            beam_scores=ended_scores,
            is_sent_finished=is_ended,
            cur_len=candidates.num_new,
            max_length=config.max_new_tokens,
            decoder_prompt_len=0,
            **common,
        )
        return Searches(
            candidates.num_new, sequences, scores, indices, ended, ended_scores, ended_indices, is_ended, can_improve
        )

    def are_finished(self, model: Any, ends_now: Tensor, config: Any) -> Tensor:
        """Return whether each search is finished, `(searches,)`; for the arguments, see `with_candidates`."""

        def goes_on(*own: Tensor) -> Tensor:
            found: Tensor = model._beam_search_has_unfinished_sequences(*own, config.early_stopping)
            return found

        states = self.can_improve, self.is_ended, ends_now
        if len(ends_now) == 1:
            return ~goes_on(*states)[None]
        found: Tensor = torch.vmap(goes_on)(*states)  # the function reduces over all of its input
        return ~found

    def hypotheses(self) -> list[list[tuple[int, ...]]]:
        """Return the new tokens of the finished beams of each search."""
        are_ended = self.is_ended.tolist()
        if not any(map(any, are_ended)):
            return [[] for _ in are_ended]
        nums_new = (self.ended_indices >= 0).sum(dim=-1).tolist()
        return [
            [tuple(ids[:num_new]) for ids, num_new, is_ended in zip(*own, strict=True) if is_ended]
            for own in zip(self.ended[:, :, : self.num_new].tolist(), nums_new, are_ended, strict=True)
        ]

    def _at(self, rows: Sequence[int]) -> list[Tensor]:
        """Return the tensors of these searches; those of all searches are not copied."""
        tensors: list[Tensor] = [getattr(self, field.name) for field in fields(self)[1:]]
        if rows == list(range(len(self.scores))):
            return tensors
        own = on_device(np.array(rows), self.scores.device)
        return [tensor[own] for tensor in tensors]


class Search(NamedTuple):
    """One of several searches, by its row."""

    of: Searches
    row: int
