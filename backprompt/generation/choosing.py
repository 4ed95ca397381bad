"""The choice of the next tokens of many texts at once, from the rows of one tensor of scores.

The processors of transformers are called in their order. A processor is called once for all rows that it treats alike.
`_LOOKS_AT` names the inputs of a kind of processor besides a row of scores. A kind that is not named there may have any
input, so its processors are called for the rows of one text at a time. The masks of all constraints are applied
together. Each text has its own random numbers, equal to those that `torch.multinomial` draws for its row alone. One
transfer reads the results of all texts, and all results are checked before a token is added to any text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as kinds

from backprompt.errors import GenerationError
from backprompt.evaluation.predictions import slices
from backprompt.generation.constrained import AllowedTokens, allowed_rows
from backprompt.generation.decoding import Rules, TextDecoding
from backprompt.generation.found import Choice, Completion
from backprompt.generation.quick import quickly_processed
from backprompt.logprobs import first_of_largest, log_softmax
from backprompt.tokens.matching import Allowed

NOISE_BYTES = 4 << 20
"""The bytes of random numbers that are drawn at a time, so that they fit the processor's cache."""

MAX_SHARE_PICKED = 1 / 8
"""The largest share of positive numbers in the rows for which only the positive numbers are computed."""

_LOOKS_AT: dict[type, Callable[[Any, int], Hashable] | None] = {
    **dict.fromkeys(
        (
            kinds.EpsilonLogitsWarper,
            kinds.EtaLogitsWarper,
            kinds.InfNanRemoveLogitsProcessor,
            kinds.LogitNormalization,
            kinds.MinPLogitsWarper,
            kinds.SuppressTokensLogitsProcessor,
            kinds.TemperatureLogitsWarper,
            kinds.TopHLogitsWarper,
            kinds.TopKLogitsWarper,
            kinds.TopPLogitsWarper,
            kinds.TypicalLogitsWarper,
        ),
        None,
    ),
    kinds.ExponentialDecayLengthPenalty: lambda processor, num_ids: max(0, num_ids - processor.regulation_start),
    kinds.ForcedBOSTokenLogitsProcessor: lambda _, num_ids: num_ids == 1,
    kinds.ForcedEOSTokenLogitsProcessor: lambda processor, num_ids: num_ids == processor.max_length - 1,
    kinds.MinLengthLogitsProcessor: lambda processor, num_ids: num_ids < processor.min_length,
    kinds.MinNewTokensLengthLogitsProcessor: lambda processor, num_ids: (
        num_ids - processor.prompt_length_to_skip < processor.min_new_tokens
    ),
    kinds.SuppressTokensAtBeginLogitsProcessor: lambda processor, num_ids: num_ids == processor.begin_index,
}
"""For each kind of processor, a function that returns its inputs besides a row of scores, given the number of ids; None
for a kind that looks at nothing else. None of them looks at the ids themselves.

All texts have processors with the same options, so processors with the same inputs change a row in the same way.
"""


class Ruled(Protocol):
    """A text, or its beams, with processors of its own."""

    rules: Rules

    @property
    def num_ids(self) -> int:
        """The number of ids so far."""
        ...

    def ids(self) -> Tensor:
        """Return the ids so far, `(rows, ids)`."""
        ...

    def allowed(self) -> Sequence[Allowed] | None:
        """Return the tokens that the text's constraint allows next, `(vocab,)` a row; None without a constraint."""
        ...


Columns: TypeAlias = "Sequence[Sequence[float]]"
"""The results of `choices_of` on the host: five columns, one number a text each."""


@dataclass(frozen=True)
class Logits:
    """Rows of logits, in slices as the head computed them: `(slice_rows, vocab)` each, the last one maybe shorter.

    Attributes:
        slices, slice_rows: see above.
        chosen: the results of `choices_of` for all rows, where tokens are chosen already: those of all texts if there
            are no slices, else those of texts that take their most probable token.

    """

    slices: Sequence[Tensor]
    slice_rows: int
    chosen: Columns | None = None

    def of(self, rows: Sequence[int]) -> Tensor:
        """Return these rows, `(rows, vocab)`; a whole slice is not copied."""
        first = self.slices[rows[0] // self.slice_rows]
        start = rows[0] // self.slice_rows * self.slice_rows
        if rows[0] == start and list(rows) == list(range(start, start + len(first))):
            return first
        if start <= min(rows) and max(rows) < start + len(first):
            return first[torch.tensor([row - start for row in rows]).to(first.device)]
        return torch.stack([self.slices[row // self.slice_rows][row % self.slice_rows] for row in rows])


def choose(texts: Sequence[TextDecoding], rows: Sequence[Mapping[Completion, int]], logits: Logits) -> None:
    """Choose the next tokens of each text as long as there are logits after its completion.

    Args:
        texts: texts with the same options.
        rows: for each text, the row of `logits` after each of its `ahead`.
        logits: the logits of all texts.

    Raises:
        GenerationError: the options leave no token to choose for a text; then these rows add no token to any text.

    """
    nums_before = [text.num_new for text in texts]
    while going_on := [
        (text, row)
        for text, own in zip(texts, rows, strict=True)
        if not text.is_finished and (row := own.get(text.completion)) is not None
    ]:
        _add(going_on, logits)
    for text, own, num_before in zip(texts, rows, nums_before, strict=True):
        text.look_ahead(len(own), text.num_new - num_before)


def choose_next(texts: list[tuple[TextDecoding, int]], logits: Logits) -> None:
    """Choose one token for each text by its row of `logits`; see `choose`."""
    _add(texts, logits)
    if texts[0][0].looks_ahead:
        for text, _ in texts:
            text.look_ahead(1, 1)


def _add(texts: list[tuple[TextDecoding, int]], logits: Logits) -> None:
    for (text, _), choice in zip(texts, _choices(texts, logits), strict=True):
        text.add(choice)


def _choices(texts: list[tuple[TextDecoding, int]], logits: Logits) -> list[Choice]:
    """Return the choice for each text by its row of the logits."""
    is_drawn = texts[0][0].is_drawn
    if logits.chosen is not None and (not logits.slices or texts[0][0].takes_most_probable):
        columns: Columns = [[column[row] for _, row in texts] for column in logits.chosen]
    else:
        parts = []
        for group in slices(texts, logits.slice_rows):
            own = logits.of([row for _, row in group])
            for text, _ in group:
                text.begin(own.device)
            parts.append(choices_of([text for text, _ in group], own))
        columns = torch.cat(parts, dim=1).tolist()
    token_ids, logprobs, are_argmax, constrained, best = columns
    check_best(best, is_drawn=is_drawn)
    return [
        Choice(int(token_id), logprob, bool(is_argmax), among_allowed)
        for token_id, logprob, is_argmax, among_allowed in zip(
            token_ids, logprobs, are_argmax, constrained, strict=True
        )
    ]


def needs_only_scores(text: TextDecoding) -> bool:
    """Whether the next token can be chosen by a row of logits and the number of ids, without the ids themselves."""
    return text.has_begun and all(type(processor) in _LOOKS_AT for processor in text.rules.processors)


def choices_of(texts: Sequence[TextDecoding], logits: Tensor) -> Tensor:
    """Return the choice in each row, and the best score of the row, `(5, texts)`, on the device of the logits.

    The first four are the fields of `Choice`. The dtype is that of log-probabilities, which can hold all ids of a
    vocabulary: float32 holds those below 2**24.
    """
    unprocessed = logits.float()  # transformers chooses by float32, whatever the dtype of the model
    allowed = allowed_rows([text.allowed() for text in texts], 1, logits)
    scores = processed(texts, unprocessed, allowed)
    most_probable = first_of_largest(unprocessed)
    if texts[0].is_drawn:
        chosen = _drawn(scores, [text.generator for text in texts])
    else:
        chosen = most_probable if scores is unprocessed else first_of_largest(scores)
    logprobs = log_softmax(logits).gather(1, chosen[:, None])[:, 0]
    constrained = constrained_logprobs(logits, allowed)
    among_allowed = logprobs if constrained is None else constrained.gather(1, chosen[:, None])[:, 0]
    results = (chosen, logprobs, chosen == most_probable, among_allowed, scores.amax(dim=-1))
    return torch.stack([values.to(logprobs.dtype) for values in results])


def constrained_logprobs(logits: Tensor, allowed: Tensor | None) -> Tensor | None:
    """Return log-probabilities among the allowed tokens, `(rows, vocab)`, nats; NaN in a row that allows none."""
    return None if allowed is None else log_softmax(logits.masked_fill(~allowed, -math.inf))


def processed(texts: Sequence[Ruled], scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Return scores as the processors of the options change them, in order; the given tensor stays unchanged.

    Args:
        texts: texts with the same options.
        scores: `(rows, vocab)`, the same number of rows for each text, one text after the other.
        allowed: which tokens the constraints allow, `(rows, vocab)`; None without constraints.

    """
    if not texts[0].rules.processors:
        return scores
    scores = scores.clone()  # some processors write to their input
    rows_each = scores.shape[0] // len(texts)
    num_ids = [text.num_ids for text in texts]
    for same_place in zip(*(text.rules.processors for text in texts), strict=True):
        if isinstance(same_place[0], AllowedTokens):
            scores = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
            continue
        for group in _alike(same_place, num_ids):
            processor = same_place[group[0]]
            if type(processor) in _LOOKS_AT:
                ids = torch.zeros((1, 1), dtype=torch.long).expand(1, num_ids[group[0]])  # only their number counts
            else:
                ids = texts[group[0]].ids()
            if len(group) == len(texts):
                scores = quickly_processed(processor, ids, scores)
            elif len(group) == 1:
                rows = slice(group[0] * rows_each, (group[0] + 1) * rows_each)
                scores[rows] = quickly_processed(processor, ids, scores[rows])
            else:
                own = torch.tensor([idx * rows_each + row for idx in group for row in range(rows_each)])
                own = own.to(scores.device)
                scores[own] = quickly_processed(processor, ids, scores[own])
    return scores


def _alike(processors: Sequence[Any], num_ids: Sequence[int]) -> Iterable[Sequence[int]]:
    """Return groups of texts, as indices, whose processors change a row of scores in the same way.

    Args:
        processors: a processor of each text, all of one type.
        num_ids: the number of ids of each text so far.

    """
    if type(processors[0]) not in _LOOKS_AT:
        return ([idx] for idx in range(len(processors)))
    looks_at = _LOOKS_AT[type(processors[0])]
    inputs = [] if looks_at is None else list(map(looks_at, processors, num_ids))
    if len(set(inputs)) <= 1:
        return [range(len(processors))]
    groups: dict[Hashable, list[int]] = {}
    for idx, seen in enumerate(inputs):
        groups.setdefault(seen, []).append(idx)
    return groups.values()


def _drawn(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw a token for each row of `(texts, vocab)`, with its own random numbers, `(texts,)`."""
    if scores.device.type not in ("cpu", "cuda"):
        check_best(scores.amax(dim=-1).tolist(), is_drawn=True)
        rows = torch.split(scores.softmax(dim=-1), 1)
        return torch.cat(
            [torch.multinomial(row, 1, generator=own)[0] for row, own in zip(rows, generators, strict=True)]
        )
    # torch.multinomial does the same for one sample (ATen/native/Distributions.cpp): argmax of p / q, q exponential.
    probabilities = scores.softmax(dim=-1)
    divide = _divide_quickly if scores.device.type == "cpu" and is_quick_the_same() else _divide
    divide(probabilities, generators)
    return first_of_largest(probabilities)


def _divide(rows: Tensor, generators: Sequence[torch.Generator]) -> None:
    """Divide each row by exponentially distributed numbers of its own generator."""
    noise = torch.empty_like(rows)
    for row, own in zip(noise, generators, strict=True):
        row.exponential_(generator=own)
    rows.div_(noise)


def _divide_quickly(rows: Tensor, generators: Sequence[torch.Generator]) -> None:
    """Divide rows as `_divide` does on the CPU: the same random bits, and logarithms of many numbers at a time.

    If few numbers of the rows are above 0, only those are divided, and the other bits never become numbers.
    """
    rows_at_a_time = max(1, NOISE_BYTES // (8 * rows.shape[1]))
    bits = torch.empty((min(len(rows), rows_at_a_time), rows.shape[1]), dtype=torch.int64)
    for start in range(0, len(rows), rows_at_a_time):
        part = rows[start : start + rows_at_a_time]
        drawn = bits[: len(part)]
        for row, own in zip(drawn, generators[start:], strict=False):
            row.random_(generator=own)
        positive = np.flatnonzero(part.numpy() > 0)
        if len(positive) > MAX_SHARE_PICKED * part.numel():
            part.div_(_exponential(drawn).to(part.dtype))
        else:
            places = torch.from_numpy(positive)
            noise = _exponential(drawn.take(places)).to(part.dtype)
            part.put_(places, part.take(places).div_(noise))


def _exponential(bits: Tensor) -> Tensor:
    """Turn random bits into exponentially distributed numbers, in float64.

    As in torch, the lowest 53 bits are the digits of a uniformly distributed number below 1.
    """
    uniform = bits.bitwise_and_((1 << 53) - 1).to(torch.float64).mul_(2.0**-53)
    return uniform.neg_().log1p_().neg_()


@lru_cache(maxsize=1)
def is_quick_the_same() -> bool:
    """Return whether `_divide_quickly` equals `_divide` to the bit, on this machine and with this torch."""
    full = torch.ones((2, 3000))
    sparse = torch.zeros((2, 3000))
    sparse[:, ::20] = 1
    return all(map(_are_divided_the_same, (full, sparse)))


def _are_divided_the_same(rows: Tensor) -> bool:
    found = []
    for divide in (_divide, _divide_quickly):
        divided = rows.clone()
        divide(divided, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
        found.append(divided)
    return torch.equal(*found)


def check_best(best: Sequence[float], *, is_drawn: bool) -> None:
    """Raise if no token can be chosen by a row of processed scores; `best`: the highest score of each row.

    Raises:
        GenerationError: a score is NaN, all are -inf, or, where a token `is_drawn`, a score is inf.

    """
    for value in best:
        if value > -math.inf and not (is_drawn and value == math.inf):  # the highest is NaN if any is
            continue
        what = "-inf for every token, so that none may follow" if value == -math.inf else str(value)
        raise GenerationError(
            f"The options of generate turn scores into {what}. Leave out the options that exclude tokens or "
            "change their scores, one by one, to find the cause. A constraint excludes every token that it does "
            "not allow, and leaves none where the tokenizer has no token for the next character."
        )
