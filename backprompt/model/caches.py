"""Caches of transformers made of a text's keys and values, for models whose own caches have the same form."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from backprompt.errors import UnsupportedModelError
from backprompt.memory.blocks import KeysValues
from backprompt.model import skeleton
from backprompt.model.cache_form import KEYS_VALUES_NAMES
from backprompt.model.limits import limits_of

Form = list[tuple[int, int, int]]
"""For each layer, the number of heads and the sizes of a key and a value."""


def form_of_cache(model: nn.Module, device: torch.device) -> Form | None:
    """Return the form of the cache that a plain call on one token makes; None if it holds no keys and values."""
    placeholders = limits_of(model).placeholders
    usual = next(token_id for token_id in range(len(placeholders) + 1) if token_id not in placeholders)
    ids = torch.tensor([[usual]], device=device)
    output = skeleton.plain_copy(model)(input_ids=ids, use_cache=True)
    cache: Any = next((output[name] for name in KEYS_VALUES_NAMES if name in output), None)
    try:
        return [(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]
    except (AttributeError, TypeError, IndexError):  # no layers, or layers that keep something else
        return None


def dynamic_cache(model_name: str, config: Any, form: Form | None, keys_values: KeysValues) -> DynamicCache:
    """Return a cache for `model(..., past_key_values=...)` with all rows of a block.

    Raises:
        UnsupportedModelError: the model's own cache has another form.

    """
    layers = [keys_values.layer(layer_idx, slice(None)) for layer_idx in range(keys_values.num_layers)]
    if form != [(key.shape[0], key.shape[-1], value.shape[-1]) for key, value in layers]:
        raise UnsupportedModelError(
            f"The cache of {model_name} does not hold the keys and values that attention reads, but compressed ones "
            "or those of fewer layers or heads. So past_key_values() cannot make a cache for this model. Read logits "
            "and log-probabilities from the text, or continue the text with text.generate(...)."
        )
    cache = DynamicCache(config=config)
    for layer_idx, (key, value) in enumerate(layers):
        cache.update(key[None], value[None], layer_idx)
    return cache
