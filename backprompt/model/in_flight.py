"""The state of one forward call of a model's body: what its masks and layers have left so far; and what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from backprompt.attention.base import PreparedAttention, StandingAttention
from backprompt.attention.copies import Copies
from backprompt.errors import UnsupportedModelError
from backprompt.memory.blocks import KeysValues
from backprompt.model.masks import Mask

Way: TypeAlias = Literal["replayed", "recorded", "plain"]
"""How a step of a generation was computed: by a graph, by the first run of one, or without."""


@dataclass
class InFlight:
    """The tensors and markers of one forward call, collected layer by layer.

    Attributes:
        attention: attends.
        copies: copies keys and values, and looks for numbers that are not finite.
        max_position: the last position of the call.
        keys, values: those of each layer.
        masks: the masks that the model has made.
        least_unseen: the least last position at which a layer would be refused for a window that no mask shows; None if
            there is none.

    """

    attention: PreparedAttention | StandingAttention
    copies: Copies
    max_position: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    least_unseen: int | None = None
    _markers: list[Tensor] = field(default_factory=list)

    def add_layer(self, key: Tensor, value: Tensor) -> int:
        """Note the keys and values of the next layer, and return its idx."""
        self.keys.append(key)
        self.values.append(value)
        return len(self.keys) - 1

    def add_mask(self, mask_function: Callable[..., Tensor], device: torch.device) -> Mask:
        """Note a mask."""
        self.masks.append(Mask(mask_function, self.max_position, device))
        self._markers.append(torch.zeros(len(self._markers), device=device))
        return self.masks[-1]

    @property
    def marker(self) -> Tensor:
        """What stands for the last mask."""
        return self._markers[-1]

    def window_of(self, marker: Tensor | None, model_name: str) -> int | None:
        """Return the window of the mask for which a marker stands."""
        for own, mask in zip(self._markers, self.masks, strict=True):
            if marker is own or _is_copied(marker, own):
                return mask.meaning.window
        raise UnsupportedModelError(
            f"{model_name} makes its attention mask without transformers' mask interface, so what it hides is unknown. "
            "Use a family that does (GPT-2, Llama, Qwen, Mistral, Gemma, GPT-NeoX, OPT, Phi, OLMo ...)."
        )

    def note_window(self, window: int) -> None:
        """Note that a layer asks for a window of which its mask shows nothing."""
        self.least_unseen = window if self.least_unseen is None else min(window, self.least_unseen)

    def means_the_same_at(self, position: int) -> bool:
        """Return whether a call with another last position would go the same way."""
        is_seen = self.least_unseen is None or position < self.least_unseen
        return is_seen and all(mask.means_the_same_at(position) for mask in self.masks)


@dataclass(frozen=True)
class Forwarded:
    """The output of a pass: keys and values, final hidden states `(tokens, hidden)`, and whether all was finite.

    `are_placed`: whether keys, values and hidden states were copied to their places, see `Executor.step`. `way`: of a
    step.
    """

    keys_values: KeysValues
    hidden: Tensor
    is_finite: bool
    are_placed: bool = False
    way: Way = "plain"


def _is_copied(marker: Tensor | None, own: Tensor) -> bool:
    """Return whether a layer on another device was handed a copy of a marker; markers differ in their lengths."""
    return marker is not None and marker.shape == own.shape and marker.device != own.device
