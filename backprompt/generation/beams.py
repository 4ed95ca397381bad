"""Beam search of one text: the rules of transformers, over branches of the forest.

Scores, penalties and the end of the search are computed by transformers' own functions, called in the order of its
`_beam_search`. Only the logits are our own. Beams are continuations of one text, so beams with a common beginning share
its spans, and a discarded beam is a branch that is dropped. Ids and scores are reordered with the beams, as in
transformers; keys and values are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from backprompt.evaluation.predictions import slices
from backprompt.evaluation.scores import TokenScore
from backprompt.generation.choosing import Logits, check_best, constrained_logprobs, processed
from backprompt.generation.constrained import MAX_FORCED, allowed_rows
from backprompt.generation.decoding import Decoding, Rules
from backprompt.generation.found import Choice, Completion, Found
from backprompt.generation.quick import first_of_largest
from backprompt.logprobs import log_softmax
from backprompt.tokens.matching import Allowed, Matching

UNREACHABLE = -1e9
"""The score that transformers gives to a place without a beam."""


def choose_beams(texts: Sequence[BeamDecoding], rows: Sequence[Mapping[Completion, int]], logits: Logits) -> None:
    """Continue the beams of each text as long as there are logits after all of its beams.

    Args:
        texts: beam searches with the same options.
        rows: for each text, the row of `logits` after each of its `ahead`.
        logits: the logits of all texts.

    Raises:
        GenerationError: the options leave no token to choose for a text.

    """
    num_beams = texts[0].num_beams
    going_on = list(zip(texts, rows, strict=True))
    while going_on:
        for group in slices(going_on, max(1, logits.slice_rows // num_beams)):
            own = logits.of([row[beam] for text, row in group for beam in text.beams])
            _go_on([text for text, _ in group], own)
        going_on = [
            (text, row) for text, row in going_on if not text.is_finished and all(beam in row for beam in text.beams)
        ]
    for text in texts:
        text.look_ahead()


def _go_on(texts: Sequence[BeamDecoding], logits: Tensor) -> None:
    """Continue the beams of some texts by the logits after them, `(beams of all texts, vocab)`."""
    for text in texts:
        text.begin(logits.device)
    logprobs = log_softmax(logits)
    allowed = allowed_rows([text.allowed() for text in texts], texts[0].num_beams, logits)
    scores = processed(texts, logprobs.float(), allowed)
    constrained = constrained_logprobs(logits, allowed)
    among_allowed = logprobs if constrained is None else constrained
    so_far = torch.cat([text.scores for text in texts])
    accumulated = (scores + so_far[:, None]).reshape(len(texts), -1)  # (texts, beams * vocab)
    check_best(accumulated.amax(dim=-1).tolist(), is_drawn=False)
    most_probable = first_of_largest(logits.float()).reshape(len(texts), -1).tolist()
    own_rows = [rows.tensor_split(len(texts)) for rows in (logprobs, among_allowed)]
    for idx, (text, own, own_allowed) in enumerate(zip(texts, *own_rows, strict=True)):
        text.go_on(accumulated[idx : idx + 1], own, own_allowed, most_probable[idx])


class BeamDecoding:
    """The beam search of one text.

    Args:
        decoding: the options.
        prompt_ids: the text's ids.
        matching: tells the tokens that the text's constraint allows; None without a constraint.

    """

    rules: Rules

    def __init__(self, decoding: Decoding, prompt_ids: Sequence[int], matching: Matching | None = None) -> None:
        self._decoding = decoding
        self._matching = matching
        self._prompt_ids = prompt_ids
        self.num_beams = decoding.num_beams
        self._is_begun = False
        self._num_ids = len(prompt_ids)
        # Of the beams, and of the finished beams: ids, with room for all later tokens; scores; the beam that each token
        # came from (-1: no token). All but the last two tensors are `(1, beams, ...)`, as in transformers.
        self._sequences = self._scores = self._indices = torch.empty(0)
        self._ended = self._ended_scores = self._ended_indices = self._is_ended = torch.empty(0)
        self._can_improve = torch.empty(0)  # (1, 1), whether a beam may still become better than the finished beams
        self._is_top = torch.empty(0)  # (candidates,), whether a candidate may be finished
        self._choices: dict[Completion, tuple[Choice, ...]] = {(): ()}  # of beams, and of finished beams
        self._continued: dict[Completion, tuple[Choice, ...]] = {}  # `_choices` one step before
        self._hypotheses: list[Completion] = []
        self._watched = {(): decoding.stops.begin(prompt_ids)}  # the latest candidates, the beams among them
        self.beams: list[Completion] = [()] * self.num_beams
        """The completion of each beam; at first all are empty."""
        self._possible: list[Completion] = [()]  # the beams, without the fillers of score -inf
        self.ahead: list[Completion] = [()]
        self.is_finished = False

    @property
    def num_new(self) -> int:
        """The number of tokens that a beam has added so far."""
        return self._num_ids - len(self._prompt_ids)

    @property
    def num_ids(self) -> int:
        """The number of ids of a beam so far, the prompt included."""
        return self._num_ids

    def ids(self) -> Tensor:
        """Return the ids of the beams so far, `(beams, tokens)`."""
        return self._sequences[0, :, : self._num_ids]

    @property
    def scores(self) -> Tensor:
        """The accumulated scores of the beams, `(beams,)`."""
        return self._scores[0]

    def allowed(self) -> list[Allowed] | None:
        """Return the tokens that the constraint allows behind each beam; None for a text without a constraint."""
        return None if self._matching is None else list(map(self._matching.allowed, self.beams))

    def look_ahead(self) -> None:
        """Add to `ahead` the tokens that the constraint forces behind the beams, if it forces tokens behind each."""
        if self._matching is None or self.is_finished:
            return
        num_left = min(self._decoding.max_new_tokens - self.num_new - 1, MAX_FORCED)
        forced = {beam: self._matching.forced(beam, num_left) for beam in self.ahead}
        num_forced = min(map(len, forced.values()))
        more = [beam + tokens[:num] for beam, tokens in forced.items() for num in range(1, num_forced + 1)]
        self.ahead = list(dict.fromkeys((*self.ahead, *more)))

    def go_on(self, accumulated: Tensor, logprobs: Tensor, constrained: Tensor, most_probable: Sequence[int]) -> None:
        """Find the next beams.

        Args:
            accumulated: the score of each beam with each token behind the beam, `(1, beams * vocab)`.
            logprobs: the log-probability of each token behind each beam, `(beams, vocab)`, nats.
            constrained: the same among the tokens that the constraint allows.
            most_probable: the token with the largest logit behind each beam.

        """
        config, model = self.rules.config, self._decoding.model
        num_kept = self._is_top.shape[0]
        top_scores, top_sequences, top_indices = model._get_top_k_continuations(
            accumulated_log_probs=accumulated,
            running_sequences=self._sequences,
            running_beam_indices=self._indices,
            cur_len=self._num_ids,
            decoder_prompt_len=len(self._prompt_ids),
            do_sample=False,
            beams_to_keep=num_kept,
            num_beams=self.num_beams,
            batch_size=1,
        )
        ends_now = self._ends(top_sequences[0, :, : self._num_ids + 1])[None]
        lengths = {"num_beams": self.num_beams}
        common = {"early_stopping": config.early_stopping, "length_penalty": config.length_penalty}
        self._sequences, self._scores, self._indices = model._get_running_beams_for_next_iteration(
            topk_log_probs=top_scores,
            topk_running_sequences=top_sequences,
            topk_running_beam_indices=top_indices,
            next_token_hits_stopping_criteria=ends_now,
            **lengths,
        )
        self._ended, self._ended_scores, self._ended_indices, self._is_ended = model._update_finished_beams(
            sequences=self._ended,
            topk_running_sequences=top_sequences,
            beam_scores=self._ended_scores,
            topk_log_probs=top_scores,
            beam_indices=self._ended_indices,
            topk_running_beam_indices=top_indices,
            is_early_stop_heuristic_unsatisfied=self._can_improve,
            is_sent_finished=self._is_ended,
            next_token_hits_stopping_criteria=ends_now,
            top_num_beam_mask=self._is_top,
            cur_len=self._num_ids,
            decoder_prompt_len=len(self._prompt_ids),
            **lengths,
            **common,
        )
        self._num_ids += 1
        self._can_improve = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=self._can_improve,
            running_beam_scores=self._scores,
            beam_scores=self._ended_scores,
            is_sent_finished=self._is_ended,
            cur_len=self._num_ids,
            max_length=config.max_length,
            decoder_prompt_len=len(self._prompt_ids),
            **common,
        )
        goes_on = model._beam_search_has_unfinished_sequences(
            self._can_improve, self._is_ended, ends_now, config.early_stopping
        )
        self.is_finished = not bool(goes_on)
        self._note(logprobs, constrained, most_probable)
        if self._hypotheses and self._matching is not None:  # of a small language all may be found before `num_beams`
            self.is_finished |= not any(row.any() for row in map(self._matching.allowed, self.beams))

    def needed(self) -> set[Completion]:
        """Return the continuations to keep: live and finished beams, each without its last token."""
        going_on = [] if self.is_finished else self.ahead
        return {ids[:-1] for ids in (*going_on, *self._hypotheses)}

    def score_of(self, completion: Completion) -> TokenScore | None:
        """Return the score of the last token of a beam, or of a beam one step before; else None."""
        choices = self._choices.get(completion) or self._continued.get(completion)
        return choices[-1].score if choices else None

    def found(self, num: int) -> list[Found]:
        """Return the `num` best continuations, finished ones first."""
        ranked = list(dict.fromkeys((*self._hypotheses, *self._possible)))[:num]
        return [self._found(ids) for ids in ranked]

    def _found(self, completion: Completion) -> Found:
        choices = self._choices[completion]
        if completion not in self._hypotheses:
            return Found(choices, "interrupted")
        cut = self._decoding.stops.cut(self._prompt_ids, completion)
        reason = self._decoding.reason(
            self.rules,
            lambda: torch.tensor([[*self._prompt_ids, *completion]], device=self._sequences.device),
            completion[-1],
            len(completion),
            is_stopped=cut is not None,
            is_over=lambda: self._is_over(completion),
        )
        return Found(choices, reason or "interrupted", cut)

    def _ends(self, sequences: Tensor) -> Tensor:
        """Return whether each of `(candidates, tokens)` is finished, `(candidates,)`."""
        added = [tuple(ids) for ids in sequences[:, len(self._prompt_ids) :].tolist()]
        self._watched = {
            ids: self._decoding.stops.with_token(self._watched[ids[:-1]], ids[-1]) for ids in dict.fromkeys(added)
        }
        are_over = [self._watched[ids].is_stopped or self._is_over(ids) for ids in added]
        return self.rules.are_met(sequences) | torch.tensor(are_over, device=sequences.device)

    def _is_over(self, completion: Completion) -> bool:
        """Return whether the constraint allows no token behind a continuation."""
        return self._matching is not None and self._matching.is_over(completion)

    def begin(self, device: torch.device) -> None:
        """Make the rules and the first beams on the device of the scores; later calls do nothing."""
        if self._is_begun:
            return
        prompt = torch.tensor([self._prompt_ids], device=device)
        self.rules = self._decoding.rules(prompt)
        config, num_beams = self.rules.config, self.num_beams
        self._sequences = prompt.new_zeros((1, num_beams, config.max_length))
        self._sequences[:, :, : self._num_ids] = prompt
        self._ended = self._sequences.clone()
        self._scores = torch.zeros((1, num_beams), device=device)
        self._scores[:, 1:] = UNREACHABLE  # all beams begin alike: only the first counts
        self._ended_scores = torch.full((1, num_beams), UNREACHABLE, device=device)
        self._is_ended = torch.zeros((1, num_beams), dtype=torch.bool, device=device)
        self._can_improve = torch.ones((1, 1), dtype=torch.bool, device=device)
        self._indices = torch.full((1, num_beams, self._decoding.max_new_tokens), -1, dtype=torch.int32, device=device)
        self._ended_indices = self._indices.clone()
        end_tokens = config._eos_token_tensor
        num_kept = max(2, 1 + (0 if end_tokens is None else len(end_tokens))) * num_beams
        self._is_top = torch.arange(num_kept, device=device) < num_beams
        self._is_begun = True

    def _note(self, logprobs: Tensor, constrained: Tensor, most_probable: Sequence[int]) -> None:
        """Note the beams, the finished beams, and the scores of their last tokens."""
        row_of = {beam: row for row, beam in reversed(list(enumerate(self.beams)))}  # of the beams that were continued
        added = self._sequences[0, :, len(self._prompt_ids) : self._num_ids].tolist()
        self.beams = list(map(tuple, added))
        self.ahead = list(dict.fromkeys(self.beams))
        self._possible = [
            ids for ids, score in zip(self.beams, self._scores[0].tolist(), strict=True) if score > -math.inf
        ]
        ended = zip(
            self._ended[0, :, len(self._prompt_ids) :].tolist(),
            (self._ended_indices[0] >= 0).sum(dim=-1).tolist(),
            self._is_ended[0].tolist(),
            strict=True,
        )
        self._hypotheses = [tuple(ids[:num_new]) for ids, num_new, is_ended in ended if is_ended]
        seen = dict.fromkeys((*self.ahead, *self._hypotheses))
        new = [ids for ids in seen if ids not in self._choices]
        last_ids = [ids[-1] for ids in new]
        rows = [row_of[ids[:-1]] for ids in new]
        picked = [values[rows, last_ids].tolist() if new else [] for values in (logprobs, constrained)]
        lasts = {
            ids: Choice(ids[-1], logprob, most_probable[row] == ids[-1], among_allowed)
            for ids, row, logprob, among_allowed in zip(new, rows, *picked, strict=True)
        }
        choices = {ids: (*self._choices[ids[:-1]], lasts[ids]) if ids in lasts else self._choices[ids] for ids in seen}
        self._continued, self._choices = self._choices, choices
