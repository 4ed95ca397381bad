"""Layers of peft in a model: the adapters that they have, and the adapters that they add in the plain call."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn

Layer: TypeAlias = Any
"""A layer of peft, of any kind."""


def is_of_peft(module: nn.Module) -> bool:
    """Return whether a module adds something to another module, or replaces it, under the name of an adapter."""
    return hasattr(module, "_get_available_adapters") and hasattr(module, "merged_adapters")


def adapters_in(layer: Layer) -> list[str]:
    """Return the adapters that have weights in a layer of peft."""
    return sorted(layer._get_available_adapters())


def active_in(layer: Layer) -> list[str]:
    """Return the adapters that a layer of peft adds in the model's plain call."""
    available = layer._get_available_adapters()
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in available]


def is_active(model: nn.Module, name: str) -> bool:
    """Return whether a layer adds an adapter in the model's plain call."""
    return any(name in active_in(module) for module in model.modules() if is_of_peft(module))
