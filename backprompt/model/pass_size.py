"""The default of the largest number of tokens in a pass."""

from __future__ import annotations

import torch
from torch import nn

from backprompt.memory.budget import free_bytes

TOKENS = {"cpu": 1024, "mps": 2048}
"""Larger passes take more activation memory and are no faster: on the CPU 512 to 1,024 tokens measured best."""

CUDA_TOKENS = range(2048, 32768 + 1)
"""On CUDA a pass costs launches and a synchronisation, so few large passes serve best, as far as memory allows."""

CUDA_SHARE = 1 / 16
"""The share of the free memory of a CUDA device that the activations of a pass may take."""

LIVE_ACTIVATIONS = 4
"""The activations that are alive at a time, as multiples of the widest layer's input and output together.

Examples are a gate, the numbers that it gates, their product, and residuals.
"""


def tokens_per_forward(body: nn.Module, device: torch.device) -> int:
    """Return the largest number of tokens in a pass of a model's body on a device."""
    if device.type != "cuda":
        return TOKENS.get(device.type, 1024)
    fitting = int(free_bytes(device) * CUDA_SHARE) // activation_bytes(body)
    return max(CUDA_TOKENS[0], min(CUDA_TOKENS[-1], fitting))


def activation_bytes(body: nn.Module) -> int:
    """Return an estimate of the bytes that activations of one token take at a time."""
    embeddings = {id(module.weight) for module in body.modules() if isinstance(module, nn.Embedding)}
    matrices = [weight for weight in body.parameters() if weight.ndim > 1 and id(weight) not in embeddings]
    widths = [sum(weight.shape[-2:]) * weight.element_size() for weight in matrices]
    return LIVE_ACTIVATIONS * max(widths, default=1)
