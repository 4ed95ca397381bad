"""Scoring: log-probabilities of texts' tokens, and of tokens that may follow texts, each computed once.

Keeps nothing of its own: the scores of forwarded tokens lie with their spans' states, those of candidates in their
pool. A text's last token needs no row of its own to be scored, so it is scored as a candidate behind the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from backprompt.evaluation.computation import Computation, Request
from backprompt.evaluation.predictions import (
    HeldRow,
    Predictions,
    Sink,
    Target,
    first_row_of,
    first_scores,
    has_first_score,
    held_child,
    held_children,
    is_scored,
    last_row_of,
    picked_scores,
    unscored,
    write_first_score,
    write_scores,
)
from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.forest.forest import Forest
from backprompt.forest.span import Inserted, Span
from backprompt.logprobs import are_distributions
from backprompt.memory.blocks import gather, states_of
from backprompt.progress import progress_bar
from backprompt.tokens.graph import TokenGraph, TokenIds, without_last


@dataclass(frozen=True, slots=True)
class Wanted:
    """A text to be scored: its tokens from `start` on, and tokens that may follow it and are not forwarded."""

    token_ids: TokenIds
    start: int
    candidates: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of a text's tokens from `start` on, and of each candidate."""

    tokens: TokenScores
    candidates: Mapping[int, TokenScore]


def split_to_score(token_ids: TokenIds, start: int) -> tuple[TokenIds, int] | None:
    """Return what is forwarded of a text that is scored from `start` on, and its last token, which is not.

    None where all of it is forwarded: nothing is scored, or no one token stands before the last one.
    """
    return without_last(token_ids) if start < len(token_ids) else None


class Scoring:
    """Scores texts.

    Args:
        computation: of their spans.

    """

    def __init__(self, computation: Computation) -> None:
        self._computation = computation
        self._candidates = computation.pools.candidates

    def token_scores(self, texts: Sequence[tuple[TokenIds, int]]) -> list[TokenScores]:
        """Evaluate texts and return the scores of their tokens, from a token of each on.

        A text's last token is scored by the row before it; it is not forwarded unless something continues it.
        """
        splits = [split_to_score(token_ids, start) for token_ids, start in texts]
        wanted = [
            Wanted(token_ids, start) if split is None else Wanted(split[0], start, split[1:])
            for (token_ids, start), split in zip(texts, splits, strict=True)
        ]
        found = self.scored(wanted)
        lasts = self._as_tensors([s for scored in found for s in scored.candidates.values()])
        ends = itertools.accumulate(len(scored.candidates) for scored in found)
        return [
            scored.tokens.followed_by(lasts[end - len(scored.candidates) : end])
            for scored, end in zip(found, ends, strict=True)
        ]

    def scored(self, wanted: Sequence[Wanted]) -> list[Scored]:
        """Evaluate texts and score the wanted tokens of each."""
        found: dict[int, Scored] = {}
        with self._computation.inserted([text.token_ids for text in wanted]) as ends:
            inserted = [Inserted(end, text.token_ids) for end, text in zip(ends, wanted, strict=True)]

            def collect() -> None:
                """Read off what is there, before any of it is dropped."""
                ready = [idx for idx, text in enumerate(inserted) if idx not in found and text.end.is_held()]
                candidates: dict[Span, dict[int, None]] = {}
                for idx in ready:
                    if wanted[idx].candidates:
                        candidates.setdefault(inserted[idx].end, {}).update(dict.fromkeys(wanted[idx].candidates))
                scored = self.score([(inserted[idx], wanted[idx].start) for idx in ready], candidates)
                for idx in ready:
                    following = {token_id: scored[inserted[idx].end][token_id] for token_id in wanted[idx].candidates}
                    found[idx] = Scored(self.scores_from(inserted[idx], wanted[idx].start), following)

            self._computation.compute(ends, Request(before_eviction=collect))
            collect()
        return [found[idx] for idx in range(len(wanted))]

    def score(
        self,
        texts: Sequence[tuple[Inserted, int]],
        candidates: Mapping[Span, Collection[int]] | None = None,
        ahead: Iterable[Inserted] = (),
    ) -> dict[Span, dict[int, TokenScore]]:
        """Compute the log-probabilities of computed texts from a token of each on, counted in written order.

        Each row that predicts several tokens is computed once, and none that predicts only tokens before the start.

        Args:
            texts: each with the first token to be scored.
            candidates: tokens to score as well that may follow the texts that end there; theirs are returned.
            ahead: other texts to be scored along with them.

        Raises:
            NonFiniteError: a row that predicts a token of `texts`, or a candidate, is no distribution. What such rows
                predict stays unscored.

        """
        candidates = candidates or {}
        predictions = Predictions()
        self._add_texts(predictions, [*texts, *((other, 0) for other in ahead)])
        found = self._add_candidates(predictions, candidates)
        unusable = self._carry_out(predictions, found)
        if unusable:
            self._check_wanted(texts, candidates, unusable)
        held: list[tuple[Span, int, Span]] = []
        for end, token_ids in candidates.items():
            held += [(end, t, child) for t in token_ids if t not in found[end] and (child := held_child(end, t))]
        for (end, token_id, _), score in zip(held, first_scores([child for _, _, child in held]), strict=True):
            found[end][token_id] = score
        return found

    def scores_from(self, text: Inserted, start: int) -> TokenScores:
        """Return a copy of a scored text's scores from token `start` on, `(tokens - start,)`."""
        spans = _spans_from(self._computation.forest, text, start)
        if not spans:
            return self._as_tensors([])
        _, first_row = spans[0]
        rows = [states_of(span) for span, _ in spans]
        return TokenScores(gather(rows, "logprobs")[first_row:], gather(rows, "is_argmax")[first_row:])

    def note_last(self, scores: Mapping[Span, TokenScore]) -> None:
        """Keep the scores of computed spans' last tokens that somebody else has computed, where they are new."""
        rows = dict(zip(map(last_row_of, scores), scores.values(), strict=True))
        new = unscored(list(rows))
        targets = [Target(0, 0, row) for row in new]
        write_scores(targets, self._as_tensors([rows[row] for row in new]))

    def _add_texts(self, predictions: Predictions, texts: Iterable[tuple[Inserted, int]]) -> None:
        """Add the tokens of texts that have no score yet, from a token of each on."""
        first_rows: dict[Span, int] = {}  # of each span that holds wanted tokens, the first of them
        for text, start in texts:
            for span, first_row in _spans_from(self._computation.forest, text, start):
                first_rows[span] = min(first_row, first_rows.get(span, first_row))
        for span, first_row in first_rows.items():
            if first_row == 0:
                self._recall(span)
            if not is_scored(span, first_row):
                predictions.add(span, first_row)

    def _add_candidates(
        self, predictions: Predictions, candidates: Mapping[Span, Collection[int]]
    ) -> dict[Span, dict[int, TokenScore]]:
        """Add the candidates that have no score yet; return the scores of those that lie in the pool."""
        found: dict[Span, dict[int, TokenScore]] = {end: {} for end in candidates}
        for end, token_ids in candidates.items():
            pooled = self._candidates.get(end)
            for token_id in token_ids:
                if token_id in pooled:
                    found[end][token_id] = pooled[token_id]
                elif (child := held_child(end, token_id)) is None:
                    predictions.add_candidate(end, token_id)
                elif not has_first_score(child):
                    predictions.add_branches(end)
        return found

    def _carry_out(self, predictions: Predictions, found: dict[Span, dict[int, TokenScore]]) -> dict[Sink, Tensor]:
        """Compute the scores of all predictions, those of candidates into `found`.

        Returns:
            The logits that are no distribution, by what they should have scored.

        """
        unusable: dict[Sink, Tensor] = {}
        num_rows, rows_in_a_slice = predictions.num_rows, self._computation.executor.rows_in_a_slice
        with progress_bar(num_rows, "scoring", "tokens", is_long=num_rows > rows_in_a_slice) as bar:
            for rows, targets in predictions.slices(rows_in_a_slice):
                logits = self._computation.logits(rows)
                rows_left_out = set(unusable_rows(logits))
                if rows_left_out:
                    unusable |= {t.sink: logits[t.row_idx] for t in targets if t.row_idx in rows_left_out}
                    targets = [target for target in targets if target.row_idx not in rows_left_out]
                for end, scored in write_scores(targets, picked_scores(logits, targets)).items():
                    self._candidates.put(end, scored)
                    found[end] |= scored
                bar.update(len(rows))
        return unusable

    def _check_wanted(
        self, texts: Sequence[tuple[Inserted, int]], candidates: Iterable[Span], unusable: Mapping[Sink, Tensor]
    ) -> None:
        """Raise if a wanted token of the texts, or a candidate, was to be scored by `unusable` logits."""
        executor = self._computation.executor
        for text, start in texts:
            for span, first_row in _spans_from(self._computation.forest, text, start):
                rows = states_of(span)
                for idx in range(first_row, len(span.token_ids)):
                    logits = unusable.get(HeldRow(rows.block, rows.start + idx))
                    if logits is not None:
                        assert span.parent is not None
                        raise executor.logits_error(logits, ids_up_to(span.parent) + span.token_ids[:idx])
        for end in candidates:
            sinks: list[Sink] = [end, *map(first_row_of, held_children(end))]
            for sink in sinks:
                if sink in unusable:
                    raise executor.logits_error(unusable[sink], ids_up_to(end))

    def _recall(self, span: Span) -> None:
        """Write the score that a span's first token got before it was forwarded, if any, to where it is held now."""
        assert span.parent is not None
        score = self._candidates.get(span.parent).get(span.token_ids[0])
        if score is not None and not has_first_score(span):
            write_first_score(span, score)

    def _as_tensors(self, scores: Sequence[TokenScore]) -> TokenScores:
        executor = self._computation.executor
        return TokenScores.of(scores, executor.logprob_dtype, executor.device)


def unusable_rows(logits: Tensor) -> list[int]:
    """Return which rows of `(rows, vocab)` have no log-probabilities."""
    is_usable = are_distributions(logits)
    return [] if bool(is_usable.all()) else (~is_usable).nonzero()[:, 0].tolist()


def ids_up_to(end: Span) -> tuple[int, ...]:
    """Return the ids of the text that ends here, those of groups before it left out."""
    return tuple(token_id for span in end.path() for token_id in span.token_ids)


def _spans_from(forest: Forest, text: Inserted, start: int) -> list[tuple[Span, int]]:
    """Return the spans of a text's tokens from `start` on, in written order, each with its first such row."""
    if not isinstance(text.token_ids, TokenGraph):
        return [(span, max(0, start - span.position)) for span in _path_from(text.end, start)]
    spans, num_before = [], 0
    for span in forest.in_order(text):
        stop = num_before + len(span.token_ids)
        if stop > start:
            spans.append((span, max(0, start - num_before)))
        num_before = stop
    return spans


def _path_from(end: Span, start: int) -> list[Span]:
    """Return the spans of a text, in order, that hold tokens from `start` on."""
    spans: list[Span] = []
    span = end
    while span.parent is not None and span.position + len(span.token_ids) > start:
        spans.append(span)
        span = span.parent
    spans.reverse()
    return spans
