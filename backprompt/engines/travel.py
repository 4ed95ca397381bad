"""Token ids and results as they travel between processes: flat arrays, not an object for each text.

Only the graphs of texts with groups travel as objects. Dtypes that numpy lacks (bfloat16) travel as whole numbers of
the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.evaluation.predictions import ranges
from backprompt.evaluation.scores import TokenScores
from backprompt.evaluation.scoring import ScoredTexts
from backprompt.forest.partition import Ints
from backprompt.generation.found import Choice, FinishReason, Found
from backprompt.generation.stops import Cut
from backprompt.text.engine import Engine
from backprompt.text.node import Text, lazily, parallel
from backprompt.tokens.graph import Part, TokenGraph, TokenGroup, TokenIds


@dataclass(frozen=True)
class PackedIds:
    """The token ids of many texts.

    Attributes:
        ids: of all texts without groups, side by side, `(tokens,)`.
        offsets: where each text begins, and the end of the last, `(texts + 1,)`; a text with groups has no ids here.
        graphs: the texts with groups, by their idx.

    """

    ids: npt.NDArray[np.int32]
    offsets: Ints
    graphs: Mapping[int, TokenGraph]

    @classmethod
    def of(cls, texts: Sequence[TokenIds]) -> PackedIds:
        """Return texts as arrays."""
        graphs = {idx: text for idx, text in enumerate(texts) if isinstance(text, TokenGraph)}
        plain = [() if isinstance(text, TokenGraph) else text for text in texts]
        offsets = np.zeros(len(plain) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, plain), dtype=np.int64, count=len(plain)), out=offsets[1:])
        ids = np.fromiter(chain.from_iterable(plain), dtype=np.int32, count=int(offsets[-1]))
        return cls(ids, offsets, graphs)

    def unpacked(self) -> list[TokenIds]:
        """Return the ids of each text."""
        ids, offsets = self.ids.tolist(), self.offsets.tolist()
        pairs = pairwise(offsets)
        return [self.graphs.get(idx) or tuple(ids[first:stop]) for idx, (first, stop) in enumerate(pairs)]


class PackedTensor(NamedTuple):
    """A tensor as an array; `dtype`: the name of the tensor's dtype."""

    array: npt.NDArray[Any]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> PackedTensor:
        """Return a tensor as an array."""
        own = tensor.detach().cpu().contiguous()
        return cls((own.view(torch.int16) if own.dtype == torch.bfloat16 else own).numpy(), str(own.dtype)[6:])

    def unpacked(self) -> Tensor:
        """Return the tensor; a copy, since Ray's arrays cannot be written to."""
        found = torch.from_numpy(np.array(self.array))
        return found.view(torch.bfloat16) if self.dtype == "bfloat16" else found


@dataclass(frozen=True)
class Answer:
    """Results for many texts.

    Attributes:
        arrays: results by name, with the rows of one text after those of another, `(rows, ...)`.
        lengths: the number of rows of each text, `(texts,)`.

    """

    arrays: Mapping[str, PackedTensor]
    lengths: Ints

    @classmethod
    def of(cls, lengths: Sequence[int], **results: Tensor | None) -> Answer:
        """Return the requested results as arrays."""
        arrays = {name: PackedTensor.of(result) for name, result in results.items() if result is not None}
        return cls(arrays, np.array(lengths, dtype=np.int64))

    @classmethod
    def of_scores(cls, scored: ScoredTexts) -> Answer:
        """Return scores as arrays."""
        return cls.of(scored.lengths, logprobs=scored.scores.logprobs, is_argmax=scored.scores.is_argmax)


@dataclass(frozen=True)
class Joined:
    """The results of all parts of a call, in the order of the call's texts; see `Answer`."""

    tensors: Mapping[str, Tensor]
    lengths: Ints

    @classmethod
    def of(cls, parts: Sequence[Ints], answers: Sequence[Answer]) -> Joined:
        """Join the answers to several parts in the order of the texts; `parts`: the indices of each part's texts."""
        order = np.argsort(np.concatenate(parts))
        lengths = np.concatenate([answer.lengths for answer in answers])
        stops = np.cumsum(lengths)
        index = torch.from_numpy(ranges((stops - lengths)[order], stops[order]))
        tensors = {
            name: torch.cat([answer.arrays[name].unpacked() for answer in answers])[index] for name in answers[0].arrays
        }
        return cls(tensors, lengths[order])

    def scores(self) -> ScoredTexts:
        """Return the scores among the results."""
        return ScoredTexts(TokenScores(self.tensors["logprobs"], self.tensors["is_argmax"]), self.lengths.tolist())

    def split(self, name: str) -> tuple[Tensor, ...]:
        """Return a result of each text, as views."""
        return torch.split(self.tensors[name], self.lengths.tolist())


@dataclass(frozen=True)
class PackedFound:
    """Continuations of many texts.

    Attributes:
        token_ids, logprobs, are_argmax, constrained_logprobs: of all chosen tokens, side by side, `(tokens,)`.
        lengths: the number of tokens of each continuation.
        counts: the number of continuations of each text.
        ends: the reason for the end of each continuation, and the part that is kept where a stop string ended it.

    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float64]
    are_argmax: npt.NDArray[np.bool_]
    constrained_logprobs: npt.NDArray[np.float64]
    lengths: Ints
    counts: Ints
    ends: Sequence[tuple[FinishReason, Cut | None]]

    @classmethod
    def of(cls, found: Sequence[Sequence[Found]]) -> PackedFound:
        """Return continuations as arrays."""
        all_found = [one for row in found for one in row]
        choices = [choice for one in all_found for choice in one.choices]
        return cls(
            np.array([choice.token_id for choice in choices], dtype=np.int32),
            np.array([choice.logprob for choice in choices], dtype=np.float64),
            np.array([choice.is_argmax for choice in choices], dtype=np.bool_),
            np.array([choice.constrained_logprob for choice in choices], dtype=np.float64),
            np.array([len(one.choices) for one in all_found], dtype=np.int64),
            np.array(list(map(len, found)), dtype=np.int64),
            [(one.finish_reason, one.cut) for one in all_found],
        )

    def unpacked(self) -> list[list[Found]]:
        """Return the continuations of each text."""
        fields = (self.token_ids, self.logprobs, self.are_argmax, self.constrained_logprobs)
        choices = map(Choice, *(field.tolist() for field in fields))
        all_found = iter(
            [
                Found(tuple(islice(choices, length)), *end)
                for length, end in zip(self.lengths.tolist(), self.ends, strict=True)
            ]
        )
        return [list(islice(all_found, count)) for count in self.counts.tolist()]


def text_of(token_ids: TokenIds, lm: Engine[Text]) -> Text:
    """Return a text that is encoded as these ids."""
    with lazily():
        if isinstance(token_ids, TokenGraph):
            return _text_of_parts(token_ids.parts, lm)
        return Text.from_tokens(token_ids, lm)


def _text_of_parts(parts: Sequence[Part], lm: Engine[Text]) -> Text:
    text = Text("", lm, add_special_tokens=False)
    for part in parts:
        text += _text_of_group(part, lm) if isinstance(part, TokenGroup) else Text.from_tokens(part, lm)
    return text


def _text_of_group(group: TokenGroup, lm: Engine[Text]) -> Text:
    branches = [
        text.frozen() if branch.is_frozen else text
        for branch in group.branches
        for text in [_text_of_parts(branch.parts, lm)]
    ]
    return parallel(branches, positions="sequential" if group.is_sequential else "shared")
