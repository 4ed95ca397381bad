"""Beam search of many texts: the rules of transformers, over branches of the forest.

Scores, penalties and the end of the searches are computed by transformers' own functions (searches.py), called in the
order of its `_beam_search`, once for all texts with as many new tokens. Only the logits are our own. Beams are
continuations of one text, so beams with a common beginning share its spans, and a discarded beam is a branch that is
dropped. Ids and scores are reordered with the beams, as in transformers; keys and values are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backprompt.evaluation.predictions import slices
from backprompt.evaluation.scores import TokenScore
from backprompt.generation.choosing import Logits, check_best, constrained_logprobs, processed
from backprompt.generation.constrained import MAX_FORCED, allowed_rows
from backprompt.generation.decoding import Decoding, Rules
from backprompt.generation.found import Choice, Completion, Found
from backprompt.generation.searches import Continuations, Search, Searches
from backprompt.generation.stops import Watched
from backprompt.logprobs import first_of_largest, log_softmax
from backprompt.tokens.matching import Allowed, Matching


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
    while going_on := [
        (text, row) for text, row in going_on if not text.is_finished and all(beam in row for beam in text.beams)
    ]:
        by_num_new: dict[int, list[tuple[BeamDecoding, Mapping[Completion, int]]]] = {}
        for text, row in going_on:
            by_num_new.setdefault(text.num_new, []).append((text, row))
        for alike in by_num_new.values():
            for group in slices(alike, max(1, logits.slice_rows // num_beams)):
                own = logits.of([row[beam] for text, row in group for beam in text.beams])
                _go_on([text for text, _ in group], own)
    for text in texts:
        text.look_ahead()


def _go_on(texts: Sequence[BeamDecoding], logits: Tensor) -> None:
    """Continue the beams of texts with as many new tokens by the logits after them, `(beams of all texts, vocab)`."""
    searches = Searches.together([text.begin(logits.device) for text in texts])
    model, config = texts[0].decoding.model, texts[0].rules.config
    logprobs = log_softmax(logits)
    allowed = allowed_rows([text.allowed() for text in texts], texts[0].num_beams, logits)
    scores = processed(texts, logprobs.float(), allowed)
    accumulated = (scores + searches.scores.reshape(-1, 1)).reshape(len(texts), -1)  # (texts, beams * vocab)
    check_best(accumulated.amax(dim=-1).tolist(), is_drawn=False)
    candidates = searches.candidates(model, accumulated, _num_kept(config))
    choices = _choices(texts, candidates, logits, logprobs, constrained_logprobs(logits, allowed))
    ends_now = _end_now(texts, candidates, choices)
    after = searches.with_candidates(model, candidates, ends_now, config)
    are_finished = after.are_finished(model, ends_now, config).tolist()
    lasts = torch.stack((after.beams_before % after.num_beams, after.last_tokens), dim=-1).tolist()
    found = zip(lasts, after.scores.tolist(), after.hypotheses(), choices, are_finished, strict=True)
    for row, (text, (own_lasts, own_scores, hypotheses, own_choices, is_finished)) in enumerate(
        zip(texts, found, strict=True)
    ):
        text.go_on(Search(after, row), own_lasts, own_scores, hypotheses, dict(own_choices), is_finished)


def _num_kept(config: Any) -> int:
    """Return the number of candidates of a search, as in transformers: some can go on even if all end tokens do not."""
    end_tokens = config._eos_token_tensor
    num: int = max(2, 1 + (0 if end_tokens is None else len(end_tokens))) * config.num_beams
    return num


def _choices(
    texts: Sequence[BeamDecoding],
    candidates: Continuations,
    logits: Tensor,
    logprobs: Tensor,
    constrained: Tensor | None,
) -> list[list[tuple[Completion, Choice]]]:
    """Return the candidates of each text, and the last token of each.

    All numbers are read at once, in the dtype of log-probabilities, which can hold all ids of a vocabulary.

    Args:
        texts: the texts, before the step.
        candidates: the candidates of all texts.
        logits: behind the beams of all texts, `(beams, vocab)`.
        logprobs: the log-probabilities of all tokens, `(beams, vocab)`, nats.
        constrained: the same among the tokens that the constraints allow; None without constraints.

    """
    rows, token_ids = candidates.beams_before, candidates.last_tokens
    chosen = logprobs[rows, token_ids]
    among_allowed = chosen if constrained is None else constrained[rows, token_ids]
    are_argmax = first_of_largest(logits.float())[rows] == token_ids
    found = (rows % texts[0].num_beams, token_ids, chosen, are_argmax, among_allowed)
    values = torch.stack([value.to(chosen.dtype) for value in found], dim=-1).tolist()
    return [
        [
            (
                (*text.beams[int(beam)], int(token_id)),
                Choice(int(token_id), logprob, bool(is_argmax), constrained_logprob),
            )
            for beam, token_id, logprob, is_argmax, constrained_logprob in own
        ]
        for text, own in zip(texts, values, strict=True)
    ]


def _end_now(
    texts: Sequence[BeamDecoding], candidates: Continuations, choices: Sequence[Sequence[tuple[Completion, Choice]]]
) -> Tensor:
    """Return whether each candidate is finished, `(texts, candidates)`."""
    if candidates.num_new == texts[0].decoding.max_new_tokens:
        return torch.ones_like(candidates.last_tokens, dtype=torch.bool)
    ends_now = texts[0].rules.are_ends(candidates.last_tokens)
    are_over = [text.are_over([ids for ids, _ in own]) for text, own in zip(texts, choices, strict=True)]
    if any(map(any, are_over)):
        ends_now |= torch.tensor(are_over, device=ends_now.device)
    for text, own, sequences in zip(texts, ends_now, candidates.sequences, strict=True):
        for criterion in text.rules.other_criteria:
            own |= criterion(text.whole(sequences[:, : candidates.num_new]), None)
    return ends_now


class BeamDecoding:
    """The beam search of one text.

    Args:
        decoding: the options.
        prompt_ids: the text's ids.
        matching: tells the tokens that the text's constraint allows; None without a constraint.

    """

    rules: Rules

    def __init__(self, decoding: Decoding, prompt_ids: Sequence[int], matching: Matching | None = None) -> None:
        self.decoding = decoding
        self._matching = matching
        self._prompt_ids = prompt_ids
        self.num_beams = decoding.num_beams
        self._prompt = torch.empty(0)  # `prompt_ids` on the device of the scores, `(1, tokens)`
        self._search: Search | None = None
        self._choices: dict[Completion, tuple[Choice, ...]] = {(): ()}  # of beams, and of finished beams
        self._continued: dict[Completion, tuple[Choice, ...]] = {}  # `_choices` one step before
        self._hypotheses: list[Completion] = []
        # Of the latest candidates, the beams among them.
        self._watched: dict[Completion, Watched] = {(): decoding.stops.begin(prompt_ids)}
        self.beams: list[Completion] = [()] * self.num_beams
        """The completion of each beam; at first all are empty."""
        self._possible: list[Completion] = [()]  # the beams, without the fillers of score -inf
        self.ahead: list[Completion] = [()]
        self.is_finished = False

    @property
    def num_new(self) -> int:
        """The number of tokens that a beam has added so far."""
        return len(self.beams[0])

    @property
    def num_ids(self) -> int:
        """The number of ids of a beam so far, the prompt included."""
        return len(self._prompt_ids) + self.num_new

    def ids(self) -> Tensor:
        """Return the ids of the beams so far, `(beams, tokens)`."""
        assert self._search is not None
        return self.whole(self._search.of.sequences[self._search.row, :, : self.num_new])

    def whole(self, sequences: Tensor) -> Tensor:
        """Return continuations behind the ids of the prompt, `(continuations, tokens)`."""
        return torch.cat([self._prompt.expand(len(sequences), -1), sequences], dim=1)

    def allowed(self) -> list[Allowed] | None:
        """Return the tokens that the constraint allows behind each beam; None for a text without a constraint."""
        return None if self._matching is None else list(map(self._matching.allowed, self.beams))

    def are_over(self, candidates: Sequence[Completion]) -> list[bool]:
        """Return whether a stop string or the constraint ends each continuation of the beams by one token."""
        if self._matching is None and not self.decoding.stops.strings:
            return [False] * len(candidates)
        self._watched = {
            ids: self.decoding.stops.with_token(self._watched[ids[:-1]], ids[-1]) for ids in dict.fromkeys(candidates)
        }
        return [self._watched[ids].is_stopped or self._is_over(ids) for ids in candidates]

    def look_ahead(self) -> None:
        """Add to `ahead` the tokens that the constraint forces behind the beams, if it forces tokens behind each."""
        if self._matching is None or self.is_finished:
            return
        num_left = min(self.decoding.max_new_tokens - self.num_new - 1, MAX_FORCED)
        forced = {beam: self._matching.forced(beam, num_left) for beam in self.ahead}
        num_forced = min(map(len, forced.values()))
        more = [beam + tokens[:num] for beam, tokens in forced.items() for num in range(1, num_forced + 1)]
        self.ahead = list(dict.fromkeys((*self.ahead, *more)))

    def go_on(
        self,
        search: Search,
        lasts: Sequence[tuple[int, int]],
        scores: Sequence[float],
        hypotheses: Sequence[Completion],
        candidates: Mapping[Completion, Choice],
        is_finished: bool,
    ) -> None:
        """Take the next beams.

        Args:
            search: the search in its new state.
            lasts: for each beam the beam that it continues, and its last token.
            scores: the score of each beam.
            hypotheses: the finished beams.
            candidates: the last tokens of all beams, and of all finished beams that are new.
            is_finished: whether no beam can become better than the finished beams.

        """
        self._search = search
        self.beams = [(*self.beams[beam], token_id) for beam, token_id in lasts]
        self.ahead = list(dict.fromkeys(self.beams))
        self._possible = [ids for ids, score in zip(self.beams, scores, strict=True) if score > -math.inf]
        self._hypotheses = list(hypotheses)
        self._continued, self._choices = self._choices, {}
        for ids in (*self.ahead, *hypotheses):
            known = self._continued.get(ids)
            self._choices[ids] = (*self._continued[ids[:-1]], candidates[ids]) if known is None else known
        self.is_finished = is_finished
        if hypotheses and self._matching is not None:  # of a small language all may be found before `num_beams`
            self.is_finished |= not any(row.any() for row in map(self._matching.allowed, self.beams))
        if self.is_finished:
            self._search = None  # it keeps the tensors of all searches of the step

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
        cut = self.decoding.stops.cut(self._prompt_ids, completion)
        reason = self.decoding.reason(
            self.rules,
            lambda: torch.tensor([[*self._prompt_ids, *completion]], device=self._prompt.device),
            completion[-1],
            len(completion),
            is_stopped=cut is not None,
            is_over=lambda: self._is_over(completion),
        )
        return Found(choices, reason or "interrupted", cut)

    def _is_over(self, completion: Completion) -> bool:
        """Return whether the constraint allows no token behind a continuation."""
        return self._matching is not None and self._matching.is_over(completion)

    def begin(self, device: torch.device) -> Search:
        """Return the search; at first make the rules and the first beams on the device of the scores."""
        if self._search is None:
            self._prompt = torch.tensor([self._prompt_ids], device=device)
            self.rules = self.decoding.rules(self._prompt)
            self._search = Search(Searches.begin(self.num_beams, self.decoding.max_new_tokens, device), 0)
        return self._search
