"""Scoring: log-probabilities of texts' tokens, and of tokens that may follow texts, each computed once.

Keeps nothing of its own: the scores of forwarded tokens lie with their spans' states, those of candidates in their
pool. A text's last token needs no row of its own to be scored, so it is scored as a candidate behind the others. The
scores of all texts of a call are read with one gather, into one tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from backprompt.evaluation.behind import Behind, placed_behind
from backprompt.evaluation.computation import Computation, Request
from backprompt.evaluation.predictions import NumberedRows, Targets, ranges
from backprompt.evaluation.rating import Rated, rated_tokens
from backprompt.evaluation.reading import Reading, Ready
from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.forest.fan import Fan
from backprompt.forest.span import Inserted, Span
from backprompt.logprobs import are_distributions
from backprompt.progress import progress_bar
from backprompt.tokens.graph import TokenGraph, TokenIds, num_positions, without_last


class Wanted(NamedTuple):
    """A text to be scored: its tokens from `start` on, and tokens that may follow it and are not forwarded."""

    token_ids: TokenIds
    start: int
    candidates: Sequence[int] = ()


@dataclass(frozen=True)
class ScoredTexts:
    """The scores of texts, one text after the other.

    Attributes:
        scores: of each text its wanted tokens in written order, then its candidates.
        lengths: how many each text has.

    """

    scores: TokenScores
    lengths: Sequence[int]

    @classmethod
    def in_order(cls, parts: Sequence[tuple[Sequence[int], ScoredTexts]]) -> ScoredTexts:
        """Return the texts of several parts, each with the numbers of its texts, in the order of these numbers."""
        if len(parts) == 1:
            return parts[0][1]  # all texts, and each part is in order
        order = np.argsort([idx for idxs, _ in parts for idx in idxs])
        lengths = np.array([length for _, part in parts for length in part.lengths], dtype=np.int64)
        stops = np.cumsum(lengths)
        index = ranges((stops - lengths)[order], stops[order])
        return cls(TokenScores.concatenated([part.scores for _, part in parts]).at(index), lengths[order].tolist())

    def split(self) -> list[TokenScores]:
        """Return the scores of each text, as views."""
        return self.scores.split(self.lengths)


def split_to_score(token_ids: TokenIds, start: int) -> tuple[TokenIds, int] | None:
    """Return what is forwarded of a text that is scored from `start` on, and its last token, which is not.

    None where all of it is forwarded: nothing is scored, or no one token stands before the last one.
    """
    return without_last(token_ids) if start < len(token_ids) else None


def to_score(token_ids: TokenIds, start: int, is_computed: bool) -> Wanted:
    """Return a text to be scored from a token on. Its last token is not forwarded, unless the text is computed."""
    split = None if is_computed else split_to_score(token_ids, start)  # else a computed span would be cut
    return Wanted(token_ids, start) if split is None else Wanted(split[0], start, split[1:])


def num_positions_to_score(token_ids: TokenIds, start: int) -> int:
    """Return how many positions a text takes that is scored from `start` on; see `split_to_score`."""
    if isinstance(token_ids, TokenGraph):
        split = split_to_score(token_ids, start)
        return num_positions(token_ids if split is None else split[0])
    return len(token_ids) - (start < len(token_ids) > 1)


class Scoring:
    """Scores texts.

    Args:
        computation: of their spans.

    """

    def __init__(self, computation: Computation) -> None:
        self._computation = computation

    def token_scores(
        self, texts: Iterable[TokenIds], starts: Iterable[int], are_computed: Iterable[bool]
    ) -> ScoredTexts:
        """Evaluate texts and return the scores of their tokens, from a token of each on.

        The last token of a text is scored by the row before it and is not forwarded, unless the text is computed.
        """
        return self.scored(list(map(to_score, texts, starts, are_computed)))

    def scored(self, wanted: Sequence[Wanted]) -> ScoredTexts:
        """Evaluate texts and score the wanted tokens of each.

        Raises:
            NonFiniteError: a row that predicts a wanted token is no distribution.

        """
        with self._computation.inserted([text.token_ids for text in wanted]) as ends:
            texts = []
            for end, (token_ids, start, candidates) in zip(ends, wanted, strict=True):
                if candidates:
                    self._computation.forest.unfold(end)
                texts.append(Ready(Inserted(end, token_ids), start, candidates))
            return self._computed(texts, ends)

    def behind(self, prompts: Sequence[Behind]) -> ScoredTexts:
        """Evaluate completions behind prompts, and score their tokens: of each prompt those of all its completions.

        Raises:
            NonFiniteError: a row that predicts a token is no distribution.

        """
        with self._computation.inserted([behind.prompt for behind in prompts]) as ends:
            items: list[Ready | Fan] = []
            placed = placed_behind(self._computation, prompts, ends)
            for end, (prompt, _, num_own), found in zip(ends, prompts, placed, strict=True):
                if num_own:
                    items.append(Ready(Inserted(end, prompt), len(prompt) - num_own))
                items += [found] if isinstance(found, Fan) else found
            item_ends = [item if isinstance(item, Fan) else item.text.end for item in items]
            self._computation.memory.touch(item_ends)
            scores = self._computed(items, item_ends).scores
        return ScoredTexts(scores, [behind.num_scores for behind in prompts])

    def _computed(self, items: Sequence[Ready | Fan], ends: Sequence[Span]) -> ScoredTexts:
        """Compute what is inserted and ends here, and score it."""
        parts: list[tuple[Sequence[int], ScoredTexts]] = []
        waiting: dict[Span, list[int]] = {}
        for idx, end in enumerate(ends):
            waiting.setdefault(end, []).append(idx)
        arrived = [end for end in waiting if end.is_held()]

        def collect() -> None:
            """Read off what is there, before any of it is dropped."""
            ready = sorted(itertools.chain.from_iterable(waiting.pop(end) for end in arrived))
            arrived.clear()
            if parts and not ready:
                return
            parts.append((ready, self.read([items[idx] for idx in ready])))

        self._computation.compute(ends, Request(before_eviction=collect, arrived=arrived))
        collect()
        return ScoredTexts.in_order(parts)

    def read(self, items: Sequence[Ready | Fan], ahead: Iterable[Inserted] = ()) -> ScoredTexts:
        """Return the wanted scores of held texts and fans; those that are not there yet are computed.

        Each row that predicts several tokens is computed once, and none that predicts only tokens before the starts.

        Args:
            items: the texts and fans.
            ahead: other texts to be scored along with them.

        Raises:
            NonFiniteError: a row that predicts a wanted token is no distribution. The tokens that such rows predict
                stay unscored.

        """
        reading = Reading(self._computation.forest, self._computation.pools)
        lengths = [reading.add(item) for item in items]
        for text in ahead:
            reading.add_ahead(text)
        unusable = self._compute(reading)
        if unusable:
            self._check_wanted(reading, items, unusable)
        reading.keep_leaves()
        executor = self._computation.executor
        return ScoredTexts(reading.scores(executor.logprob_dtype, executor.device), lengths)

    def note_last(self, scores: Mapping[Span, TokenScore]) -> None:
        """Keep the scores of computed spans' last tokens that somebody else has computed, where they are new."""
        rows = NumberedRows()
        by_row = {rows.last_of(end): score for end, score in scores.items()}
        are_scored = rows.are_scored()
        rows.write_values({row: score for row, score in by_row.items() if not are_scored[row]})

    def _compute(self, reading: Reading) -> dict[int, int]:
        """Compute the scores that are not there yet; the host waits for the device once.

        An interrupt or an error keeps the scores of the slices before it.

        Returns:
            The numbers of the rows that are no distribution, by the numbers of the scores that they should have given.

        """
        parts = reading.predictions().slices(self._computation.executor.rows_in_a_slice)
        with progress_bar(sum(len(part.rows) for part in parts), "scoring", "tokens", is_long=len(parts) > 1) as bar:
            found: list[Rated] = []
            try:
                for part in parts:
                    logits = self._computation.logits(reading.rows.hidden(part.rows))
                    found.append(rated_tokens(logits, part.row_idx, part.token_ids))
                    bar.update(len(part.rows))
            except BaseException:
                self._write(reading, parts[: len(found)], found)
                raise
        return self._write(reading, parts, found)

    def _write(self, reading: Reading, parts: Sequence[Targets], found: Sequence[Rated]) -> dict[int, int]:
        """Write what was found of each part; see `_compute`."""
        if not found:
            return {}
        scores, numbers = Rated.concatenated(found), np.concatenate([part.numbers for part in parts])
        on_host = scores.on_host()
        is_usable = on_host[2] != 0
        if is_usable.all():
            reading.write(numbers, scores.scores, on_host[:2])
            return {}
        usable = np.flatnonzero(is_usable)
        reading.write(numbers[usable], scores.scores.at(usable), on_host[:2, usable])
        rows = np.concatenate([part.rows[part.row_idx] for part in parts])
        return dict(zip(numbers[~is_usable].tolist(), rows[~is_usable].tolist(), strict=True))

    def _check_wanted(self, reading: Reading, items: Iterable[Ready | Fan], unusable: Mapping[int, int]) -> None:
        """Raise if a wanted token, or a candidate, was to be scored by the logits of an `unusable` row."""
        executor = self._computation.executor
        for item in items:
            for number, ids_before in reading.numbers_of(item):
                if number in unusable:
                    hidden = reading.rows.hidden(np.array([unusable[number]]))
                    raise executor.logits_error(executor.logits(hidden)[0], ids_before())


def unusable_rows(logits: Tensor) -> list[int]:
    """Return which rows of `(rows, vocab)` have no log-probabilities."""
    is_usable = are_distributions(logits)
    return [] if bool(is_usable.all()) else (~is_usable).nonzero()[:, 0].tolist()
