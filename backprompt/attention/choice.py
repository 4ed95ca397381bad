"""The choice of an attention for a device."""

from __future__ import annotations

import logging
from importlib import import_module

import torch

from backprompt.attention.base import ForestAttention
from backprompt.attention.calls import CallsAttention

logger = logging.getLogger(__name__)


def attention_for(device: torch.device) -> ForestAttention:
    """Return the one-launch attention for CUDA where Triton is installed, else the calls of the plan."""
    if device.type != "cuda":
        return CallsAttention()
    try:
        attention: ForestAttention = import_module("backprompt.attention.triton").TritonAttention()
    except ImportError as error:
        return CallsAttention(reason=f"no triton: {error}")
    return attention
