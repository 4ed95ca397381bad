"""Scoring: log-probabilities of texts' tokens, and of tokens that may follow texts, each computed once.

No score is kept here: the scores of forwarded tokens lie with their spans' states, those of candidates in their
pool. A text's last token needs no row of its own to be scored, so it is scored as a candidate behind the others. The
scores of all texts of a call are read with one gather, into one tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from backprompt.evaluation.behind import Behind, Placed, placed_behind
from backprompt.evaluation.computation import Computation, Request
from backprompt.evaluation.predictions import NumberedRows, Targets, ranges
from backprompt.evaluation.rating import Rated, rated_tokens
from backprompt.evaluation.reading import Reading, Wanted
from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.forest.fan import Fan
from backprompt.forest.span import Inserted, Span
from backprompt.logprobs import are_distributions
from backprompt.progress import progress_bar
from backprompt.tokens.graph import TokenGraph, TokenIds, num_positions, without_last


@dataclass(frozen=True)
class ScoredTexts:
    """The scores of texts, one text after the other.

    Attributes:
        scores: of each text its wanted tokens in written order, then its candidates.
        lengths: the number of scores of each text.

    """

    scores: TokenScores
    lengths: Sequence[int]

    @classmethod
    def in_order(cls, parts: Sequence[tuple[Sequence[int], ScoredTexts]]) -> ScoredTexts:
        """Return the texts of several parts, each given with the indices of its texts, in the order of the indices."""
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
    """Return the part of a text to forward when it is scored from `start` on, and its last token, not forwarded.

    Return None if all tokens are forwarded: no token is scored, or no single token stands before the last one.
    """
    return without_last(token_ids) if start < len(token_ids) else None


def to_score(token_ids: TokenIds, start: int, is_computed: bool) -> Wanted:
    """Return a text to be scored from a token on. Its last token is not forwarded, unless the text is computed."""
    split = None if is_computed else split_to_score(token_ids, start)  # else a computed span would be cut
    return Wanted(token_ids, start) if split is None else Wanted(split[0], start, split[1:])


def num_positions_to_score(token_ids: TokenIds, start: int) -> int:
    """Return the number of positions that a text scored from `start` on takes; see `split_to_score`."""
    if isinstance(token_ids, TokenGraph):
        split = split_to_score(token_ids, start)
        return num_positions(token_ids if split is None else split[0])
    return len(token_ids) - (start < len(token_ids) > 1)


class Scoring:
    """Scores texts.

    Args:
        computation: the computation of their spans.

    """

    def __init__(self, computation: Computation) -> None:
        self._computation = computation

    def token_scores(
        self, texts: Iterable[TokenIds], starts: Iterable[int], ends: Sequence[Span | None]
    ) -> ScoredTexts:
        """Evaluate texts and return the scores of their tokens, from a token of each on.

        The last token of a text is scored by the row before it and is not forwarded, unless the text is computed.
        `ends`: the ends of texts that are computed, else None.
        """
        are_computed = [end is not None for end in ends]  # a computed span would be cut
        return self.scored(list(map(to_score, texts, starts, are_computed)), ends)

    def scored(self, wanted: Sequence[Wanted], known: Sequence[Span | None] | None = None) -> ScoredTexts:
        """Evaluate texts and score the wanted tokens of each; `known`: the ends of those that are in the forest.

        Raises:
            NonFiniteError: a row that predicts a wanted token is not a distribution.

        """
        with self._computation.inserted([text.token_ids for text in wanted], known) as ends:
            for end, text in zip(ends, wanted, strict=True):
                if text.candidates:
                    self._computation.forest.unfold(end)
            return self._computed(wanted, ends)

    def behind(self, prompts: Sequence[Behind]) -> ScoredTexts:
        """Evaluate completions behind prompts, and score their tokens: of each prompt those of all its completions.

        Raises:
            NonFiniteError: a row that predicts a token is not a distribution.

        """
        return self.mixed(prompts, itertools.repeat(None))[1]

    def mixed(self, asked: Sequence[Wanted | Behind], known: Iterable[Span | None]) -> tuple[list[Span], ScoredTexts]:
        """Evaluate texts, and completions behind prompts, together.

        Args:
            asked: texts with their wanted tokens, and prompts with completions.
            known: the ends of texts that are in the forest, else None.

        Returns:
            The end of each text and of each prompt, and the scores of each.

        Raises:
            NonFiniteError: a row that predicts a wanted token is not a distribution.

        """
        with self._computation.inserted([item.token_ids for item in asked], known) as ends:
            behind: list[Behind] = []
            prompt_ends: list[Span] = []
            for end, item in zip(ends, asked, strict=True):
                if isinstance(item, Behind):
                    behind.append(item)
                    prompt_ends.append(end)
                elif item.candidates:
                    self._computation.forest.unfold(end)
            placed = iter(placed_behind(self._computation, behind, prompt_ends))
            parts = [
                next(placed).behind(item, end) if isinstance(item, Behind) else Placed([item], [end])
                for item, end in zip(asked, ends, strict=True)
            ]
            items = [item for part in parts for item in part.items]
            item_ends = [end for part in parts for end in part.ends]
            self._computation.memory.touch(item_ends)
            found = self._computed(items, item_ends)
        lengths = iter(found.lengths)
        return ends, ScoredTexts(found.scores, [sum(itertools.islice(lengths, len(part.ends))) for part in parts])

    def _computed(self, items: Sequence[Wanted | Fan], ends: Sequence[Span]) -> ScoredTexts:
        """Compute the inserted texts and fans that end here, and score them."""
        parts: list[tuple[Sequence[int], ScoredTexts]] = []
        waiting = _Waiting(ends)
        arrived = [end for end in waiting.ends if end.is_held()]

        def collect() -> None:
            """Read results off the spans that are there, before any span is dropped."""
            ready = waiting.take(arrived)
            arrived.clear()
            if parts and not ready:
                return
            parts.append((ready, self.read([items[idx] for idx in ready], [ends[idx] for idx in ready])))

        self._computation.compute(ends, Request(before_eviction=collect, arrived=arrived))
        collect()
        return ScoredTexts.in_order(parts)

    def read(self, items: Sequence[Wanted | Fan], ends: Sequence[Span], ahead: Iterable[Inserted] = ()) -> ScoredTexts:
        """Return the wanted scores of held texts and fans; missing scores are computed.

        A row that predicts several tokens is computed once. A row that predicts only tokens before the starts is not
        computed.

        Args:
            items: the texts and fans.
            ends: the end of each.
            ahead: other texts to be scored along with them.

        Raises:
            NonFiniteError: a row that predicts a wanted token is not a distribution. The tokens that such rows predict
                stay unscored.

        """
        reading = Reading(self._computation.forest, self._computation.pools)
        lengths = list(map(reading.add, items, ends))
        for text in ahead:
            reading.add_ahead(text)
        unusable = self._compute(reading)
        if unusable:
            self._check_wanted(reading, zip(items, ends, strict=True), unusable)
        reading.keep_leaves()
        executor = self._computation.executor
        return ScoredTexts(reading.scores(executor.logprob_dtype, executor.device), lengths)

    def note_last(self, scores: Mapping[Span, TokenScore]) -> None:
        """Keep the scores, computed elsewhere, of the last tokens of computed spans that have no score yet."""
        rows = NumberedRows()
        by_row = {rows.last_of(end): score for end, score in scores.items()}
        are_scored = rows.are_scored()
        rows.write_values({row: score for row, score in by_row.items() if not are_scored[row]})

    def _compute(self, reading: Reading) -> dict[int, int]:
        """Compute the missing scores; the host waits for the device once.

        An interrupt or an error keeps the scores of the slices before it.

        Returns:
            The numbers of the rows that are not distributions, by the numbers of the scores that they should have
            given.

        """
        parts = reading.predictions().slices(self._computation.executor.rows_in_a_slice)
        with progress_bar(sum(len(part.rows) for part in parts), "scoring", "tokens", is_long=len(parts) > 1) as bar:
            found: list[Rated] = []
            try:
                for part in parts:
                    hidden = reading.rows.hidden(part.rows)
                    # No name for the logits: their memory is free for those of the next slice.
                    found.append(rated_tokens(self._computation.logits(hidden), part.row_idx, part.token_ids))
                    bar.update(len(part.rows))
            except BaseException:
                self._write(reading, parts[: len(found)], found)
                raise
        return self._write(reading, parts, found)

    def _write(self, reading: Reading, parts: Sequence[Targets], found: Sequence[Rated]) -> dict[int, int]:
        """Write the results of each part; see `_compute`."""
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

    def _check_wanted(
        self, reading: Reading, added: Iterable[tuple[Wanted | Fan, Span]], unusable: Mapping[int, int]
    ) -> None:
        """Raise if a wanted token, or a candidate, was to be scored by the logits of an `unusable` row."""
        executor = self._computation.executor
        for item, end in added:
            for number, ids_before in reading.numbers_of(item, end):
                if number in unusable:
                    hidden = reading.rows.hidden(np.array([unusable[number]]))
                    raise executor.logits_error(executor.logits(hidden)[0], ids_before())


class _Waiting:
    """The items that wait for their ends' states. An object for each item would slow the garbage collector."""

    def __init__(self, ends: Sequence[Span]) -> None:
        self._last_of: dict[Span, int] = {}
        self._before: list[int] = []  # for each item, the one before it with the same end, or -1
        for idx, end in enumerate(ends):
            self._before.append(self._last_of.get(end, -1))
            self._last_of[end] = idx

    @property
    def ends(self) -> Iterable[Span]:
        """The ends of all items that wait."""
        return self._last_of.keys()

    def take(self, ends: Iterable[Span]) -> list[int]:
        """Return the items that end here, in order, and remove them."""
        found: list[int] = []
        for end in ends:
            idx = self._last_of.pop(end)
            while idx >= 0:
                found.append(idx)
                idx = self._before[idx]
        return sorted(found)


def unusable_rows(logits: Tensor) -> list[int]:
    """Return which rows of `(rows, vocab)` have no log-probabilities."""
    is_usable = are_distributions(logits)
    return [] if bool(is_usable.all()) else (~is_usable).nonzero()[:, 0].tolist()
