"""Scores of padded batches with an autograd graph behind them: each distinct token goes forward and backward once.

Rows are sorted into a trie of their distinct tokens. The trie goes through the body of the user's model as one packed
call, and the hidden states that predict wanted tokens go through its head. Under a budget of tokens the rows are cut
into several tries. The backward then computes the tries again, one after the other, so only one is held at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from backprompt.evaluation.distributions import Asked, Distributions
from backprompt.model import skeleton
from backprompt.model.linear import speed_up_trained
from backprompt.model.spread import head_device
from backprompt.training.body import hidden_states
from backprompt.training.head import Wanted, read_distributions
from backprompt.training.rows import PaddedRows
from backprompt.training.trie import Ints, Trie, cut, sort_order


@dataclass(frozen=True)
class Part:
    """Rows whose distinct tokens go through the model together.

    Attributes:
        trie: the tokens.
        predictors: the tokens that predict targets, `(predictors,)`.
        row_of: for each target of the part, the index of its predictor, `(targets,)`.
        targets: the number of each target of the part among all targets of the batch, `(targets,)`.

    """

    trie: Trie
    predictors: Ints
    row_of: Ints
    targets: Ints


def parts_of(rows: PaddedRows, max_tokens: int | None) -> list[Part]:
    """Return the parts of a batch; the last token of each row predicts nothing and is left out."""
    scored = np.flatnonzero(rows.lengths > rows.starts)
    if not len(scored):
        return []
    of_rows = rows.split()
    ids = [of_rows[row][:-1] for row in scored]
    order = sort_order(ids)
    ordered = [ids[idx] for idx in order]
    pieces = [slice(0, len(ids))] if max_tokens is None else cut(ordered, max_tokens)
    first_targets = np.cumsum([0, *(rows.lengths - rows.starts)])
    parts = []
    for piece in pieces:
        trie = Trie.of(ordered[piece])
        own = [scored[idx] for idx in order[piece]]
        nodes = [nodes[rows.starts[row] - 1 :] for row, nodes in zip(own, trie.nodes, strict=True)]
        predictors, row_of = np.unique(_joined(nodes), return_inverse=True)
        targets = [np.arange(first_targets[row], first_targets[row + 1]) for row in own]
        parts.append(Part(trie, predictors, row_of, _joined(targets)))
    return parts


def distributions(
    model: nn.Module, rows: PaddedRows, asked: Asked, max_tokens: int | None
) -> tuple[Distributions, int]:
    """Return the requested results for a batch's targets, with gradients, and how many tokens went through the model.

    Args:
        model: a causal LM, adapters included, as the caller trains it.
        rows: the batch.
        asked: the results that are read for each target.
        max_tokens: the largest number of tokens in one call of the model's body; None for no limit.

    Raises:
        UnsupportedModelError: the model's attention does something that is not implemented here.

    """
    model = skeleton.unwrap(model)
    parts = parts_of(rows, max_tokens)
    hidden = [_no_states(model)]
    row_of, num_rows = np.empty(len(rows.targets), dtype=np.int64), 0
    for part in parts:
        hidden.append(hidden_states(model, part.trie, part.predictors, is_recomputed=len(parts) > 1))
        row_of[part.targets] = part.row_of + num_rows
        num_rows += len(part.predictors)
    wanted = Wanted(row_of, rows.token_ids[rows.targets], asked)
    private = skeleton.make_head(model)
    speed_up_trained(private)

    def logits_of(states: Tensor) -> Tensor:
        logits: Tensor = private(inputs_embeds=states[None], use_cache=False).logits[0]
        return logits

    found = read_distributions(logits_of, torch.cat(hidden), skeleton.vocab_size(model), wanted)
    return found, sum(len(part.trie.token_ids) for part in parts)


def _no_states(model: nn.Module) -> Tensor:
    """Return zero rows of hidden states: a batch without targets has a graph, too."""
    size, dtype, device = skeleton.hidden_size(model), skeleton.head_dtype(model), head_device(model)
    return torch.zeros((0, size), dtype=dtype, device=device, requires_grad=True)


def _joined(arrays: list[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
