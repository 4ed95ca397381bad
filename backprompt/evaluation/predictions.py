"""Predictions: which rows of hidden states predict the tokens to be scored, and where the scores go.

Keeps, for one scoring, each row once with all that it predicts. A forwarded token's score lies in the block of its
span's states; the score of a *candidate*, a token that may follow a text and is not forwarded, goes to the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.forest.span import Span
from backprompt.logprobs import log_softmax
from backprompt.memory.blocks import States, gather_hidden, states_of

Item = TypeVar("Item")

LOG_SOFTMAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class HeldRow:
    """Where the log-probability of a forwarded token goes."""

    block: States
    row: int


Sink: TypeAlias = "HeldRow | Span"
"""Where a score goes: the row of a forwarded token, or for a candidate the span that it follows."""


@dataclass(frozen=True, slots=True)
class Target:
    """A token to be scored: by which row of the slice, and where the score goes."""

    row_idx: int
    token_id: int
    sink: Sink


@dataclass
class Predictions:
    """Rows of hidden states that predict tokens, each once, with all that they predict."""

    _rows: dict[tuple[States, int], list[tuple[int, Sink]]] = field(default_factory=dict)
    _branched: set[Span] = field(default_factory=set)

    @property
    def num_rows(self) -> int:
        """How many rows predict something."""
        return len(self._rows)

    def add(self, span: Span, first_row: int) -> None:
        """Add the tokens of a computed span from `first_row` on that have no score yet.

        The span's first token is predicted by what it continues. The row before a branching predicts the first tokens
        of all its branches, so they are added together.
        """
        rows = states_of(span)
        is_scored = rows.block.has_scores(rows.start, rows.stop)
        assert span.parent is not None
        if first_row == 0 and not is_scored[0]:
            if not span.parent.token_ids:
                rows.block.note_unpredicted(rows.start)  # a first token, or one behind a junction
            else:
                self.add_branches(span.parent)
        for idx in range(max(1, first_row), len(is_scored)):
            if not is_scored[idx]:
                held_row = HeldRow(rows.block, rows.start + idx)
                self._rows[rows.block, held_row.row - 1] = [(span.token_ids[idx], held_row)]

    def add_candidate(self, end: Span, token_id: int) -> None:
        """Add a token that may follow a computed span and is not forwarded."""
        self._predicted_by(end).append((token_id, end))

    def add_branches(self, parent: Span) -> None:
        """Add the first tokens of all that was forwarded behind a computed span."""
        if parent not in self._branched:
            self._branched.add(parent)
            starts = [(span.token_ids[0], first_row_of(span)) for span in held_children(parent)]
            self._predicted_by(parent).extend(starts)

    def _predicted_by(self, end: Span) -> list[tuple[int, Sink]]:
        """Return what the last row of a span predicts, to be added to."""
        rows = states_of(end)
        return self._rows.setdefault((rows.block, rows.stop - 1), [])

    def slices(self, rows_in_a_slice: int) -> Iterable[tuple[Tensor, list[Target]]]:
        """Yield hidden states `(rows, hidden)` and what they predict."""
        for group in slices(list(self._rows), rows_in_a_slice):
            targets = [
                Target(row_idx, token_id, sink)
                for row_idx, row in enumerate(group)
                for token_id, sink in self._rows[row]
            ]
            yield gather_hidden(group), targets


def picked_scores(logits: Tensor, targets: Sequence[Target]) -> TokenScores:
    """Return, for each target, `log_softmax(logits)[row_idx, token_id]`, and whether it is its row's argmax in float32.

    The targets are sorted by their rows. A few rows at a time: what fits the cache takes a fifth of the time that all
    rows at once take.
    """
    row_idx = torch.tensor([target.row_idx for target in targets], dtype=torch.long)
    token_ids = torch.tensor([target.token_id for target in targets], dtype=torch.long)
    picked, is_argmax = [], []
    num_rows = max(1, LOG_SOFTMAX_BYTES // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], num_rows):
        piece = logits[start : start + num_rows]
        logprobs = log_softmax(piece)
        first, last = torch.searchsorted(row_idx, torch.tensor([start, start + num_rows])).tolist()
        rows, tokens = (row_idx[first:last] - start).to(logits.device), token_ids[first:last].to(logits.device)
        picked.append(logprobs[rows, tokens])
        is_argmax.append(piece.float().argmax(dim=-1)[rows] == tokens)
    return TokenScores(torch.cat(picked), torch.cat(is_argmax))


def write_scores(targets: Sequence[Target], scores: TokenScores) -> dict[Span, dict[int, TokenScore]]:
    """Write the scores of forwarded tokens to where they are held, and return those of candidates."""
    by_block: dict[States, list[tuple[int, int]]] = {}
    candidates: dict[Span, list[int]] = {}
    for idx, target in enumerate(targets):
        if isinstance(target.sink, HeldRow):
            by_block.setdefault(target.sink.block, []).append((idx, target.sink.row))
        else:
            candidates.setdefault(target.sink, []).append(idx)
    for block, pairs in by_block.items():
        indices, block_rows = torch.tensor(pairs).unbind(dim=1)
        chosen = indices.to(scores.logprobs.device)
        block.write_scores(block_rows, scores.logprobs[chosen], scores.is_argmax[chosen])
    if not candidates:
        return {}
    values = list(map(TokenScore, scores.logprobs.tolist(), scores.is_argmax.tolist()))
    return {end: {targets[idx].token_id: values[idx] for idx in indices} for end, indices in candidates.items()}


def write_first_score(span: Span, score: TokenScore) -> None:
    """Write the score of a span's first token to where it is held."""
    row = first_row_of(span)
    row.block.write_score(row.row, score.logprob, score.is_argmax)


def first_scores(spans: Sequence[Span]) -> list[TokenScore]:
    """Return the scores of spans' first tokens; two transfers a block, however many spans."""
    by_block: dict[States, list[int]] = {}
    for idx, span in enumerate(spans):
        by_block.setdefault(states_of(span).block, []).append(idx)
    found: dict[int, TokenScore] = {}
    for block, indices in by_block.items():
        logprobs, is_argmax = block.scores([states_of(spans[idx]).start for idx in indices])
        found.update(zip(indices, map(TokenScore, logprobs, is_argmax), strict=True))
    return [found[idx] for idx in range(len(spans))]


def is_scored(span: Span, first_row: int = 0) -> bool:
    """Return whether all tokens of a computed span from `first_row` on have their scores."""
    rows = states_of(span)
    return rows.block.is_scored(rows.start + first_row, rows.stop)


def unscored(rows: Sequence[HeldRow]) -> list[HeldRow]:
    """Return those of the rows whose tokens have no score yet."""
    by_block: dict[States, list[HeldRow]] = {}
    for row in rows:
        by_block.setdefault(row.block, []).append(row)
    found: list[HeldRow] = []
    for block, own in by_block.items():
        are_scored = block.has_logprobs[[row.row for row in own]].tolist()
        found += [row for row, is_scored in zip(own, are_scored, strict=True) if not is_scored]
    return found


def has_first_score(span: Span) -> bool:
    """Return whether the first token of a computed span has its score."""
    rows = states_of(span)
    return rows.block.has_score(rows.start)


def first_row_of(span: Span) -> HeldRow:
    """Return where the score of a computed span's first token is held."""
    rows = states_of(span)
    return HeldRow(rows.block, rows.start)


def last_row_of(span: Span) -> HeldRow:
    """Return where the score of a computed span's last token is held."""
    rows = states_of(span)
    return HeldRow(rows.block, rows.stop - 1)


def held_children(end: Span) -> list[Span]:
    """Return the spans that continue this one and hold their states, junctions left out."""
    return [child for child in end.children.values() if child.token_ids and child.is_held()]


def held_child(end: Span, token_id: int) -> Span | None:
    """Return the span that directly continues this one with a token, if its states are held."""
    child = end.children.get(token_id)
    return child if child is not None and child.is_held() else None


def slices(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Yield so many of the items at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
