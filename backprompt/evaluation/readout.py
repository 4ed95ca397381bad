"""Reading out: logits, log-probabilities, hidden states, and keys and values of texts that are held.

The module keeps no results: rows of next-token logits go into their pool. A reader of one text may name other texts
that will probably be read next, and these are read along with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from backprompt.evaluation.computation import Computation
from backprompt.evaluation.predictions import is_scored, slices
from backprompt.evaluation.reading import Wanted, ids_up_to
from backprompt.evaluation.scoring import Scoring, unusable_rows
from backprompt.forest.span import Inserted, Span
from backprompt.memory.blocks import KeysValues, States, gather, gather_each, gather_hidden, keys_values_of, states_of
from backprompt.tokens.graph import flat

ReadAhead: TypeAlias = "Callable[[], list[Inserted]]"
"""Returns other texts that will probably be read next; called only if something must be computed."""


class Readout:
    """Reads results off held texts.

    Args:
        computation: the computation of their spans.
        scoring: computes their log-probabilities.

    """

    def __init__(self, computation: Computation, scoring: Scoring) -> None:
        self._computation = computation
        self._scoring = scoring
        self._pool = computation.pools.logits
        self._logprobs = computation.pools.logprobs

    def next_logits(self, ends: Sequence[Span]) -> list[Tensor]:
        """Return the logits after held texts, in slices `(rows, vocab)`; no row goes into the pool.

        Each slice but the last has `Executor.rows_in_a_slice` rows.

        Raises:
            NonFiniteError: a row is not a distribution.

        """
        return self.logits_after(ends, self.last_hidden(ends)) if ends else []

    def last_hidden(self, ends: Sequence[Span]) -> Tensor:
        """Return the final hidden state behind each of several held texts, `(texts, hidden)`."""
        return gather_hidden(list(map(_last_row, ends)))

    def logits_after(self, ends: Sequence[Span], hidden: Tensor) -> list[Tensor]:
        """Return the logits from the final hidden state behind each text, `(texts, hidden)`; see `next_logits`."""
        executor = self._computation.executor
        found: list[Tensor] = []
        for first, rows in enumerate(torch.split(hidden, executor.rows_in_a_slice)):
            logits = self._computation.logits(rows)
            for idx in unusable_rows(logits):
                raise executor.logits_error(logits[idx], ids_up_to(ends[first * executor.rows_in_a_slice + idx]))
            found.append(logits)
        return found

    def pooled_logits(self, end: Span) -> Tensor | None:
        """Return a copy of the next-token logits after `end`, `(vocab,)`, if they were computed and are still held."""
        row = self._pool.get(end)
        return None if row is None else row.clone()

    def last_logits(self, end: Span, ahead: ReadAhead) -> Tensor:
        """Return the next-token logits after `end`, `(vocab,)`; the rows of `ahead()` are computed along with them.

        `end` must not be a junction, which has no last row; junctions among `ahead()` are left out.

        Raises:
            NonFiniteError: the row is not a distribution. Rows of other texts may not be distributions, either; such
                rows are not kept.

        """
        if (pooled := self.pooled_logits(end)) is not None:
            return pooled
        executor = self._computation.executor
        ends = dict.fromkeys([end, *(text.end for text in ahead() if text.end.token_ids)])
        missing = [other for other in ends if self._pool.get(other) is None]
        missing = missing[: max(1, self._pool.max_bytes // executor.logit_row_bytes)]
        first: Tensor | None = None
        for group in slices(missing, executor.rows_in_a_slice):
            logits = self._computation.logits(gather_hidden(list(map(_last_row, group))))
            unusable = set(unusable_rows(logits))
            if first is None:  # the row of `end`
                if 0 in unusable:
                    raise executor.logits_error(logits[0], ids_up_to(end))
                first = logits[0].clone()
            for idx, (other, row) in enumerate(zip(group, logits, strict=True)):
                if idx not in unusable:
                    self._pool.put(other, row)
        assert first is not None
        return first

    def all_logits(self, text: Inserted, start: int, stop: int) -> Tensor:
        """Return the logits after the tokens `start..stop` of the text, `(tokens, vocab)`.

        Raises:
            NonFiniteError: a row is not a distribution.

        """
        executor = self._computation.executor
        hidden = self.hidden_states(text)[start:stop]
        pieces = [self._computation.logits(piece) for piece in torch.split(hidden, executor.rows_in_a_slice)]
        logits = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        for idx in unusable_rows(logits):
            raise executor.logits_error(logits[idx], flat(text.token_ids)[: start + idx + 1])
        return logits

    def token_logprobs(self, text: Inserted, ahead: ReadAhead) -> Tensor:
        """Return the text's log-probabilities, `(tokens,)`; the texts of `ahead()` are scored along with the text."""
        if (scored := self.scored_logprobs(text)) is not None:
            return scored
        return self._scoring.read([Wanted(text.token_ids, 0)], [text.end], ahead()).scores.logprobs

    def scored_logprobs(self, text: Inserted) -> Tensor | None:
        """Return a copy of the text's log-probabilities, `(tokens,)`, if all of them were computed and are held."""
        # Texts with the same branches in another order have the same end.
        is_path = isinstance(text.token_ids, tuple)
        if is_path and (pooled := self._logprobs.get(text.end)) is not None:
            return pooled.clone()
        spans = self._computation.forest.in_order(text)
        if not all(map(is_scored, spans)):
            return None
        found = gather(map(states_of, spans), "logprobs")
        if is_path:
            self._logprobs.put(text.end, found)
        return found

    def hidden_states(self, text: Inserted) -> Tensor:
        """Return a copy of the text's final hidden states, `(tokens, hidden)`, in written order."""
        spans = self._computation.forest.in_order(text)
        return gather(map(states_of, spans), "hidden")

    def keys_values(self, end: Span) -> KeysValues:
        """Return a copy of the text's keys and values."""
        return KeysValues(dict(gather_each([keys_values_of(span) for span in end.path()])))


def _last_row(end: Span) -> tuple[States, int]:
    rows = states_of(end)
    return rows.block, rows.stop - 1
