"""The choice of kernels for elementwise parts of a private body, by device."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn


def fusion_for(device: torch.device) -> Callable[[nn.Module], int]:
    """Return the function that gives modules of a body fused kernels, and counts them: on CUDA with Triton."""
    if device.type != "cuda":
        return _nothing
    try:
        fuse: Callable[[nn.Module], int] = import_module("backprompt.model.fused").fuse
    except ImportError:
        return _nothing
    return fuse


def _nothing(body: nn.Module) -> int:
    return 0
