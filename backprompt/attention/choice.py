"""The choice of an attention for a device, and of the way to copy keys and values."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module

import torch

from backprompt.attention.base import ForestAttention
from backprompt.attention.calls import CallsAttention
from backprompt.attention.copies import Copies, PlainCopies

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


def copies_for(device: torch.device) -> Callable[[], Copies]:
    """Return the maker of a pass's copies: one launch for each layer on CUDA with Triton installed, else torch."""
    if device.type != "cuda":
        return PlainCopies
    try:
        copies: Callable[[], Copies] = import_module("backprompt.attention.triton_copies").TritonCopies
    except ImportError:
        return PlainCopies
    return copies
