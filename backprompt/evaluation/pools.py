"""Pools of results that no block holds: rows of logits, attention maps, and scores of tokens that were not forwarded.

Each pool keeps the most recently used results, by the end of their text, by their fan or by token ids, under a byte
bound of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from backprompt.attention.maps import Chosen
from backprompt.evaluation.scores import TokenScore
from backprompt.forest.fan import Fan
from backprompt.forest.span import Span
from backprompt.tokens.graph import TokenIds

MAX_CANDIDATE_BYTES = 64 << 20
"""Bound of the pool of log-probabilities of tokens that were scored and not forwarded."""

CANDIDATE_END_BYTES = 300
"""Bytes of a dict besides its entries, and of its place in the pool."""

CANDIDATE_BYTES = 120
"""Bytes of an entry of a dict from int to float, all objects included, when the dict is half full."""


MAX_LEAF_BYTES = 64 << 20
"""Bound of the pool of scores of the leaves of fans."""

MAX_ATTENTION_BYTES = 64 << 20
"""Bound of the pool of attention maps, token ids of their texts included."""

MAX_LOGPROB_BYTES = 4 << 20
"""Bound of the pool of texts' log-probabilities, which their spans hold as well."""

TENSOR_BYTES = 700
"""Bytes of a small tensor besides its numbers, and of its place in a pool."""

ID_BYTES = 40
"""Bytes of a token id in a tuple."""

Key = TypeVar("Key", bound=Hashable)


class Pools:
    """All pools.

    Args:
        max_logit_bytes: the bound of the rows of logits.

    """

    def __init__(self, max_logit_bytes: int) -> None:
        self.logits: TensorPool[Span] = TensorPool(max_logit_bytes)
        self.logprobs: TensorPool[Span] = TensorPool(MAX_LOGPROB_BYTES, lambda end: TENSOR_BYTES)
        self.attention: TensorPool[tuple[TokenIds, Chosen]] = TensorPool(MAX_ATTENTION_BYTES, _num_map_key_bytes)
        self.candidates = CandidatePool(MAX_CANDIDATE_BYTES)
        self.leaves = LeafPool(MAX_LEAF_BYTES)
        self._by_span = (self.logits, self.logprobs, self.candidates, self.leaves)

    @property
    def num_bytes(self) -> int:
        """Bytes that all pools hold."""
        return sum(pool.num_bytes for pool in self._by_span) + self.attention.num_bytes

    def unfold(self, fan: Fan, spans: Sequence[Span]) -> None:
        """Turn the scores of a fan's leaves into scores of candidates behind the spans that take the fan's place."""
        found = self.leaves.take(fan)
        if found is None:
            return
        assert fan.parent is not None
        shape = fan.shape
        end_of = {piece.stop - 1: span for piece, span in zip(shape.pieces(), spans, strict=True)} | {-1: fan.parent}
        by_end: dict[Span, list[tuple[int, TokenScore]]] = {}
        leaves = (numbers[shape.num_rows :].tolist() for numbers in (shape.scores.parents, shape.scores.token_ids))
        for row, token_id, logprob, is_argmax in zip(
            *leaves, found.logprobs.tolist(), found.are_argmax.tolist(), strict=True
        ):
            by_end.setdefault(end_of[row], []).append((token_id, TokenScore(logprob, is_argmax)))
        for end, scores in by_end.items():
            self.candidates.put(end, scores)

    def retain(self, spans: Container[Span]) -> None:
        """Drop the results behind all spans but these; the results would keep the other spans alive."""
        for pool in self._by_span:
            pool.retain(spans)
        self.attention.recount()

    def clear(self) -> None:
        """Drop all results."""
        for pool in (*self._by_span, self.attention):
            pool.clear()


class TensorPool(Generic[Key]):
    """Tensors by key, the most recently used ones, under a bound of bytes of their own.

    Args:
        max_bytes: the bound.
        num_key_bytes: the bytes of a key, which count as well.

    """

    def __init__(self, max_bytes: int, num_key_bytes: Callable[[Key], int] = lambda key: 0) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._num_key_bytes = num_key_bytes
        self._tensors: OrderedDict[Key, Tensor] = OrderedDict()

    def get(self, key: Key) -> Tensor | None:
        """Return the tensor that is kept under a key, or None. The caller must not write to it."""
        tensor = self._tensors.get(key)
        if tensor is not None:
            self._tensors.move_to_end(key)
        return tensor

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a copy of a tensor, dropping the least recently used tensors over the bound."""
        if key in self._tensors or self._num_bytes_of(key, tensor) > self.max_bytes:
            return
        self._tensors[key] = tensor.clone()  # a row of a slice would keep the whole slice alive
        self.num_bytes += self._num_bytes_of(key, tensor)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._num_bytes_of(*self._tensors.popitem(last=False))

    def _num_bytes_of(self, key: Key, tensor: Tensor) -> int:
        return tensor.nbytes + self._num_key_bytes(key)

    def retain(self, keys: Container[Key]) -> None:
        """Drop the tensors under other keys than these, and count anew."""
        self._tensors = OrderedDict((key, tensor) for key, tensor in self._tensors.items() if key in keys)
        self.recount()

    def recount(self) -> None:
        """Count the bytes anew."""
        self.num_bytes = sum(self._num_bytes_of(key, tensor) for key, tensor in self._tensors.items())

    def clear(self) -> None:
        """Drop every tensor."""
        self._tensors.clear()
        self.num_bytes = 0


class CandidatePool:
    """The most recently used scores of candidates: tokens that may follow a text and were scored but not forwarded.

    The scores have a bound of bytes of their own. They lie in dicts of numbers, which Python's garbage collector does
    not walk through. There is one dict for each text, with log-probabilities by token id, and one dict with the argmax
    of each text, where it is known.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._logprobs: OrderedDict[Span, dict[int, float]] = OrderedDict()
        self._argmax: dict[Span, int] = {}

    def get(self, end: Span, token_id: int) -> TokenScore | None:
        """Return the score of a token behind the text that ends here, if it is known."""
        known = self._logprobs.get(end)
        if known is None:
            return None
        self._logprobs.move_to_end(end)
        logprob = known.get(token_id)
        return None if logprob is None else TokenScore(logprob, self._argmax.get(end) == token_id)

    def put(self, end: Span, scores: Iterable[tuple[int, TokenScore]]) -> None:
        """Keep scores by token id, dropping those of the least recently used texts over the bound."""
        known = self._logprobs.get(end)
        if known is None:
            known = self._logprobs[end] = {}
            self.num_bytes += CANDIDATE_END_BYTES
        else:
            self._logprobs.move_to_end(end)
        num_before = len(known)
        for token_id, (logprob, is_argmax) in scores:
            known[token_id] = logprob
            if is_argmax:
                self._argmax[end] = token_id
        self.num_bytes += CANDIDATE_BYTES * (len(known) - num_before)
        while self.num_bytes > self.max_bytes:
            end, dropped = self._logprobs.popitem(last=False)
            self._argmax.pop(end, None)
            self.num_bytes -= _num_candidate_bytes(dropped)

    def retain(self, spans: Container[Span]) -> None:
        """Drop the scores behind all other spans, and count anew."""
        self._logprobs = OrderedDict((end, scores) for end, scores in self._logprobs.items() if end in spans)
        self._argmax = {end: token_id for end, token_id in self._argmax.items() if end in spans}
        self.num_bytes = sum(map(_num_candidate_bytes, self._logprobs.values()))

    def clear(self) -> None:
        """Drop all of them."""
        self._logprobs.clear()
        self._argmax.clear()
        self.num_bytes = 0


class LeafScores(NamedTuple):
    """The scores of a fan's leaves, on the CPU: log-probabilities, and whether each is an argmax, `(leaves,)` each."""

    logprobs: npt.NDArray[np.float64]
    are_argmax: npt.NDArray[np.bool_]

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self.logprobs.nbytes + self.are_argmax.nbytes


class LeafPool:
    """The most recently used scores of the leaves of fans, under a bound of bytes of their own."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._scores: OrderedDict[Fan, LeafScores] = OrderedDict()

    def get(self, fan: Fan) -> LeafScores | None:
        """Return the scores of a fan's leaves, if they are here."""
        found = self._scores.get(fan)
        if found is not None:
            self._scores.move_to_end(fan)
        return found

    def put(self, fan: Fan, scores: LeafScores) -> None:
        """Keep the scores of a fan's leaves, dropping those of the least recently used fans over the bound."""
        self.take(fan)
        self._scores[fan] = scores
        self.num_bytes += scores.num_bytes
        while self.num_bytes > self.max_bytes:
            self.take(next(iter(self._scores)))

    def take(self, fan: Fan) -> LeafScores | None:
        """Remove the scores of a fan's leaves and return them; None if they are not here."""
        found = self._scores.pop(fan, None)
        self.num_bytes -= 0 if found is None else found.num_bytes
        return found

    def retain(self, spans: Container[Span]) -> None:
        """Drop the scores of all other fans, and count anew."""
        self._scores = OrderedDict((fan, scores) for fan, scores in self._scores.items() if fan in spans)
        self.num_bytes = sum(scores.num_bytes for scores in self._scores.values())

    def clear(self) -> None:
        """Drop all of them."""
        self._scores.clear()
        self.num_bytes = 0


def _num_candidate_bytes(scores: Mapping[int, float]) -> int:
    return CANDIDATE_END_BYTES + CANDIDATE_BYTES * len(scores)


def _num_map_key_bytes(key: tuple[TokenIds, Chosen]) -> int:
    token_ids, chosen = key
    return ID_BYTES * (len(token_ids) + len(chosen.rows) + 2 * len(chosen.spans or ()))
