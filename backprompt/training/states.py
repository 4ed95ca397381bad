"""Final hidden states of padded batches, each distinct token forwarded and sent backward once, in the trainer's shape.

This is for code with a head of its own, which continues from the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from backprompt.model import skeleton
from backprompt.model.levels import check_packed
from backprompt.training.body import hidden_states as states_of_trie
from backprompt.training.models import scorer_of
from backprompt.training.results import Account
from backprompt.training.rows import PaddedRows
from backprompt.training.scores import check_lengths
from backprompt.training.trie import Ints, Trie, sort_order
from backprompt.transfers import on_device


@dataclass(frozen=True)
class RowStates:
    """The final hidden states of a batch, on the device of `input_ids`.

    Attributes:
        hidden: the `last_hidden_state` of the model's body, `(rows, columns, hidden)`; 0 at padding.
        account: the numbers of tokens.

    """

    hidden: Tensor
    account: Account


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> RowStates:
    """Return the final hidden states of a padded batch, with each distinct token forwarded once.

    If gradients are on, the states have an autograd graph down to the model's own parameters, and each distinct token
    goes backward once. The model runs in its own mode and under the caller's autocast.

    Args:
        model: a causal LM of transformers, adapters included.
        input_ids, attention_mask: the batch; see `token_logprobs`.

    Raises:
        TypeError, ValueError: a value is not as described; the message names it.
        TokenIdError: the model has no such token id.
        TextTooLongError: a row has more tokens than the model has positions.
        UnsupportedModelError: the model cannot be evaluated exactly, or dropout is active in it.

    """
    session = scorer_of(model, None, requires_grad=True).lm.session
    with session.exclusive():
        session.current().computation.probe_once()
        check_packed(session.evaluator.executor.levels, "Hidden states of a batch")
        rows = PaddedRows.of(input_ids, attention_mask, 0, session.limits.model.num_embeddings)
        session.limits.model.check_placeholders(rows.token_ids.tolist())
        check_lengths(session.limits, rows, num_unused=0)
    causal = skeleton.unwrap(model)
    if not len(rows.token_ids):
        return RowStates(_zeros(causal, rows), Account(0, 0, 0))
    ids = rows.split()
    order = sort_order(ids)
    trie = Trie.of([ids[row] for row in order])
    nodes = np.concatenate([trie.nodes[idx] for idx in np.argsort(order)])
    states = states_of_trie(causal, trie, np.arange(len(trie.token_ids)), is_recomputed=False)
    flat = states.new_zeros((rows.num_rows * rows.num_columns, states.shape[1]))
    filled = flat.index_copy(0, on_device(_places(rows), states.device), states[on_device(nodes, states.device)])
    account = Account(len(rows.token_ids), len(trie.token_ids), len(trie.token_ids))
    return RowStates(filled.view(rows.num_rows, rows.num_columns, -1).to(rows.device), account)


def _zeros(causal: nn.Module, rows: PaddedRows) -> Tensor:
    """Return the states of a batch without real tokens; they have a graph if gradients are on."""
    shape = (rows.num_rows, rows.num_columns, skeleton.hidden_size(causal))
    dtype = skeleton.head_dtype(causal)
    return torch.zeros(shape, dtype=dtype, device=rows.device, requires_grad=torch.is_grad_enabled())


def _places(rows: PaddedRows) -> Ints:
    """Return the index of each real token in a flattened `(rows, columns)`, row after row."""
    numbers = np.repeat(np.arange(rows.num_rows), rows.lengths)
    columns = rows.first_columns[numbers] + np.arange(len(numbers)) - rows.offsets[numbers]
    places: Ints = numbers * rows.num_columns + columns
    return places
