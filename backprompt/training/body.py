"""A model's body over tries of tokens, with gradients: the user's parameters, our attention.

Each trie has a private copy of the body, which shares all parameters. So gradients reach the user's parameters, and a
layer that the backward computes again (gradient checkpointing) always finds the attention of its own trie. The copy
keeps the modes of the user's model: a model in training mode recomputes layers if gradient checkpointing is on. The
caller's autocast applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from backprompt.errors import UnsupportedModelError
from backprompt.model import skeleton, spread
from backprompt.model.in_flight import Masks, no_layers_error, run_body
from backprompt.model.linear import speed_up_trained
from backprompt.training.attention import TrieAttention
from backprompt.training.trie import Ints, Trie
from backprompt.transfers import on_device

_NAME = "backprompt-trie"
_ATTRIBUTE = "_backprompt_call"
"""The attribute of a private copy's configurations that holds the copy's call."""


@dataclass(kw_only=True)
class _Call(Masks):
    """The forward call of one trie, and the recomputations of its layers."""

    attention: TrieAttention
    device: torch.device
    has_attended: bool = False


def hidden_states(model: nn.Module, trie: Trie, wanted: Ints, *, is_recomputed: bool) -> Tensor:
    """Return the final hidden states of some tokens of a trie, `(wanted, hidden)`.

    Args:
        model: a causal LM that `skeleton.check_supported` allows.
        trie: the tokens that go through the model's body.
        wanted: the indices of the wanted tokens.
        is_recomputed: whether the backward computes the whole call again, so that no part of it is held until then.

    """
    if spread.is_spread(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is offloaded or spread over devices by accelerate, so the gradients of its "
            "weights have no common device. Load it onto one device, or score it without gradients."
        )
    device = spread.head_device(model)
    call = _Call(
        model_name=type(model).__name__,
        max_position=int(trie.positions.max()),
        attention=TrieAttention(trie, device),
        device=device,
    )
    body = skeleton.make_trained_body(model, _NAME)
    speed_up_trained(body)
    for config in skeleton.configs_of(body):
        setattr(config, _ATTRIBUTE, call)
    inputs = on_device(np.stack([trie.token_ids, trie.positions]), device)
    rows = on_device(wanted, device)

    def run() -> Tensor:
        call.masks.clear()
        hidden = run_body(body, inputs)
        if not call.has_attended:
            raise no_layers_error(call.model_name)
        return hidden[rows]

    if not is_recomputed:
        return run()
    hidden: Tensor = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    return hidden


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """Attend over the trie of a private copy; transformers' attention interface."""
    call: _Call = getattr(module.config, _ATTRIBUTE)
    call.has_attended = True
    scoring = call.scoring(query, attention_mask, **keywords)
    return call.attention.attend(query.squeeze(0), key.squeeze(0), value.squeeze(0), scoring)[None], None


def _mark_mask(*, config: Any, mask_function: Callable[..., Tensor], use_vmap: bool = False, **_: object) -> Tensor:
    """Return a marker for a mask; transformers' mask interface."""
    call: _Call = getattr(config, _ATTRIBUTE)
    return call.mark(mask_function, use_vmap, call.device)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _mark_mask)
