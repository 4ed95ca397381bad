"""Distributions: results for wanted tokens, read from rows of logits, beyond the scores that the forest keeps.

A wanted token is predicted by one row: that of the token before it, which many texts may share. Each distinct row goes
through the head once, in slices, and all requested results are read from its slice: log-probabilities at a
temperature, the entropy, the most probable tokens, the log-probabilities of given tokens. None of these is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.evaluation.computation import Computation, Request
from backprompt.evaluation.predicting import PredictingRows
from backprompt.evaluation.predictions import NumberedRows, ranges
from backprompt.evaluation.rating import LOG_SOFTMAX_BYTES
from backprompt.evaluation.reading import Wanted
from backprompt.forest.span import Span
from backprompt.logprobs import are_distributions
from backprompt.progress import progress_bar
from backprompt.tokens.adapted import plain_array
from backprompt.tokens.graph import flat
from backprompt.transfers import on_device

Ints: TypeAlias = "npt.NDArray[np.int64]"

NO_TOKEN = -1
"""The id given for the most probable tokens of a place that no row predicts."""


@dataclass(frozen=True)
class Asked:
    """The results to read from each distribution.

    Attributes:
        temperature: divides the logits.
        entropy: whether the entropy is read.
        top_k: the number of most probable tokens to read; None for none.
        given: for each wanted token the ids of other tokens to score at its position, `(tokens, k)`, on the model's
            device; None for none.

    """

    temperature: float = 1.0
    entropy: bool = False
    top_k: int | None = None
    given: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether only log-probabilities are read, as the forest keeps them."""
        return self.temperature == 1 and not self.entropy and self.top_k is None and self.given is None


@dataclass(frozen=True)
class Distributions:
    """The results for all wanted tokens, one text after the other; None for a result that was not requested.

    Log-probabilities and entropies are in nats, float64 for a model in float64 and else float32, and nan where no row
    predicts the token.

    Attributes:
        logprobs: of the tokens themselves, `(tokens,)`.
        entropies: of the distributions that predict the tokens, `(tokens,)`.
        top_logprobs, top_ids: of the most probable tokens in each token's place, in falling order, `(tokens, k)`; equal
            ones in any order.
        given_logprobs: of the given tokens, `(tokens, k)`.

    """

    logprobs: Tensor
    entropies: Tensor | None
    top_logprobs: Tensor | None
    top_ids: Tensor | None
    given_logprobs: Tensor | None


def distributions(computation: Computation, wanted: Sequence[Wanted], asked: Asked) -> Distributions:
    """Evaluate texts and read the distributions that predict the wanted tokens of each, candidates included.

    Raises:
        NonFiniteError: a row that predicts a wanted token is not a distribution.

    """
    with computation.inserted([text.token_ids for text in wanted]) as ends:
        rows = PredictingRows()
        waiting: dict[Span, list[int]] = {}
        for idx, (end, (token_ids, start, candidates)) in enumerate(zip(ends, wanted, strict=True)):
            rows.add(computation.forest, end, token_ids, start, len(candidates))
            waiting.setdefault(end, []).append(idx)
        found = _Found(computation, rows, _token_ids(wanted), asked)
        arrived = [end for end in waiting if end.is_held()]

        def collect() -> None:
            """Read results off the spans that are there, before any span is dropped."""
            found.read([span for end in arrived for idx in waiting.pop(end) for span in rows.spans_of(idx)])
            arrived.clear()

        computation.compute(ends, Request(before_eviction=collect, arrived=arrived))
        collect()
        return found.of_tokens()


def _token_ids(wanted: Sequence[Wanted]) -> Ints:
    """Return the ids of all wanted tokens, one text after the other."""
    parts = [part for text in wanted for part in (flat(text.token_ids)[text.start :], text.candidates)]
    return plain_array(np.array([token_id for part in parts for token_id in part], dtype=np.int64))


class _Found:
    """The results that were read so far.

    Args:
        computation: holds the rows and applies the head.
        rows: the distinct rows that predict wanted tokens.
        token_ids: of the wanted tokens, `(tokens,)`.
        asked: the results to read.

    """

    def __init__(self, computation: Computation, rows: PredictingRows, token_ids: Ints, asked: Asked) -> None:
        self._computation = computation
        self._rows = rows
        self._token_ids = token_ids
        self._asked = asked
        self._row_of = rows.numbers()
        self._by_row = np.argsort(self._row_of, kind="stable")
        self._sorted = self._row_of[self._by_row]
        self._read: set[Span] = set()
        device, dtype = computation.executor.device, computation.executor.logprob_dtype
        num_tokens, num_rows, k = len(token_ids), rows.num_rows, asked.top_k
        like = torch.full((num_tokens,), torch.nan, dtype=dtype, device=device)
        self._logprobs = like
        # The last row stands for tokens without a prediction, whose number is -1.
        self._entropies = like.new_full((num_rows + 1,), torch.nan) if asked.entropy else None
        self._top = None if k is None else like.new_full((num_rows + 1, k), torch.nan)
        self._top_ids = None if k is None else torch.full((num_rows + 1, k), NO_TOKEN, device=device)
        self._given = None if asked.given is None else like.new_full(tuple(asked.given.shape), torch.nan)

    def of_tokens(self) -> Distributions:
        """Return the results, by token."""
        row_of = on_device(self._row_of, self._logprobs.device)

        def by_token(found: Tensor | None) -> Tensor | None:
            return None if found is None else found[row_of]

        return Distributions(
            self._logprobs, by_token(self._entropies), by_token(self._top), by_token(self._top_ids), self._given
        )

    def read(self, spans: Sequence[Span]) -> None:
        """Read the wanted rows of spans that hold their states; spans that were read before are left out.

        Raises:
            NonFiniteError: a row is not a distribution.

        """
        new = [span for span in dict.fromkeys(spans) if span not in self._read]
        self._read.update(new)
        if not new:
            return
        held, pieces = NumberedRows(), [piece for span in new for piece in self._rows.pieces_of(span)]
        bounds = np.array([(held.first_of(span), *rows) for span, *rows in pieces], dtype=np.int64)
        firsts, starts, stops, numbers = bounds.T
        held_rows, own_rows = ranges(firsts + starts, firsts + stops), ranges(numbers, numbers + stops - starts)
        order = np.argsort(held_rows)
        size = self._computation.executor.rows_in_a_slice
        usable: list[Tensor] = []
        with progress_bar(len(order), "scoring", "tokens", is_long=len(order) > size) as bar:
            for first in range(0, len(order), size):
                part = order[first : first + size]
                logits = self._computation.logits(held.hidden(held_rows[part]))
                usable += self._take(own_rows[part], logits)
                bar.update(len(part))
        is_usable = torch.cat(usable).cpu().numpy()
        if not is_usable.all():
            self._raise_for(held, [piece.span for piece in pieces], held_rows[order][np.flatnonzero(~is_usable)[0]])

    def _take(self, numbers: Ints, logits: Tensor) -> list[Tensor]:
        """Take the requested results from a slice of logits; return which rows are distributions.

        The CPU takes few rows at a time, which stay in its cache.
        """
        is_cpu = logits.device.type == "cpu"
        size = max(1, LOG_SOFTMAX_BYTES // (4 * logits.shape[1])) if is_cpu else len(numbers)
        starts = range(0, len(numbers), size)
        return [self._take_few(numbers[first : first + size], logits[first : first + size]) for first in starts]

    def _take_few(self, numbers: Ints, logits: Tensor) -> Tensor:
        asked, device = self._asked, logits.device
        values = logits.to(self._logprobs.dtype)
        if asked.temperature != 1:
            values = values / asked.temperature
        logprobs = values.log_softmax(dim=-1)  # (rows, vocab)
        own = on_device(numbers, device)
        tokens, row_idx = self._tokens_of(numbers)
        places, of_rows, ids = on_device(np.stack([tokens, row_idx, self._token_ids[tokens]]), device)
        self._logprobs[places] = logprobs[of_rows, ids]
        if self._given is not None and asked.given is not None:
            self._given[places] = logprobs[of_rows[:, None], asked.given[places]]
        if self._top is not None and self._top_ids is not None:
            self._top[own], self._top_ids[own] = logprobs.topk(self._top.shape[1], dim=-1)
        if self._entropies is not None:  # last: a token of probability 0 adds 0, and not 0 * -inf
            least = torch.finfo(logprobs.dtype).min
            self._entropies[own] = -values.softmax(dim=-1).mul_(logprobs.clamp_min_(least)).sum(dim=-1)
        return are_distributions(values)

    def _tokens_of(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Return the tokens that rows predict, and the row that predicts each."""
        starts, stops = (np.searchsorted(self._sorted, numbers, side) for side in ("left", "right"))
        return self._by_row[ranges(starts, stops)], np.repeat(np.arange(len(numbers)), stops - starts)

    def _raise_for(self, held: NumberedRows, spans: Sequence[Span], number: int) -> None:
        """Raise the error of the row with this number in `held`."""
        executor = self._computation.executor
        for span in spans:
            row = number - held.first_of(span)
            if 0 <= row < len(span.token_ids):
                before = [token_id for part in span.path()[:-1] for token_id in part.token_ids]
                logits = executor.logits(held.hidden(np.array([number])))[0]
                raise executor.logits_error(logits, [*before, *span.token_ids[: row + 1]])
