"""The state of one forward call of a model's body: its masks, and its keys and values so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backprompt.attention.base import PreparedAttention, Scoring, StandingAttention
from backprompt.attention.copies import Copies
from backprompt.errors import UnsupportedModelError
from backprompt.model.families import are_all_keys
from backprompt.model.masks import Mask, Unknown

# Keywords that models pass along and packed attention can ignore. Other keywords that are not None are refused by name.
_MEANINGLESS_KEYWORDS = frozenset(
    {
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


_FIRST_MARKER = 1 << 40
"""One axis of a marker has at least this size, which no tensor of numbers has."""


def is_about_marker(error: Exception) -> bool:
    """Return whether an error names a size of a marker: some code has used the marker as a mask of numbers."""
    return any(size in str(error) for size in (str(_FIRST_MARKER)[:-3], "tensor a (0)", "tensor b (0)"))


@dataclass(kw_only=True)
class Masks:
    """The masks of one forward call, and the scoring of its layers.

    Attributes:
        model_name: for messages.
        max_position: the last position of the call.
        masks: the masks that the model has made; for a mask that packed attention does not implement, the reason.
        least_unseen: the smallest last position at which a layer would be refused for a window that its mask does not
            show; None if there is none.

    """

    model_name: str
    max_position: int
    masks: list[Mask | Unknown] = field(default_factory=list)
    least_unseen: int | None = None

    def mark(self, mask_function: Callable[..., Tensor], use_vmap: bool, device: torch.device) -> Tensor:
        """Return a marker for a mask.

        The shape of the marker is its number, because a layer that is recomputed may get a copy. Models slice masks,
        so a marker has the four axes of a mask. Some models make a mask that no layer uses. So a mask that is neither
        causal nor causal within a window is refused only when a layer attends by it.
        """
        self.masks.append(self._mask_of(mask_function, use_vmap, device))
        return torch.empty((1, 1, 0, _FIRST_MARKER + len(self.masks) - 1), device=device)

    def _mask_of(self, mask_function: Callable[..., Tensor], use_vmap: bool, device: torch.device) -> Mask | Unknown:
        try:
            mask = None if use_vmap else Mask(mask_function, self.max_position, device)
            if mask is not None and mask.meaning.is_known:
                return mask
        except IndexError:
            return Unknown(
                f"{self.model_name} masks attention by the row numbers of the call, so its texts cannot share a pass."
            )
        return Unknown(
            f"{self.model_name} masks attention in a way that is neither causal nor a sliding window (for texts of "
            f"{self.max_position + 1} tokens), which packed evaluation does not implement. Shorter texts may work."
        )

    def scoring(
        self,
        query: Tensor,
        marker: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **keywords: object,
    ) -> Scoring:
        """Return the scoring of a layer, from the arguments that it passes to transformers' attention interface.

        Raises:
            UnsupportedModelError: packed attention does not implement a keyword, or the mask is unknown.

        """
        self._refuse_unknown(keywords, dropout, is_causal)
        window = self._window_of(marker)
        if window is None and sliding_window is not None:
            self.least_unseen = sliding_window if self.least_unseen is None else min(sliding_window, self.least_unseen)
        if self.least_unseen is not None and self.max_position >= self.least_unseen:
            raise UnsupportedModelError(
                f"{self.model_name} asks its attention for a sliding window of {sliding_window} positions, but its "
                "mask shows no such window. Keep texts within the window."
            )
        return Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap, s_aux)

    def means_the_same_at(self, position: int) -> bool:
        """Return whether a call with another last position would have the same masks and windows."""
        is_seen = self.least_unseen is None or position < self.least_unseen
        return is_seen and all(isinstance(mask, Unknown) or mask.means_the_same_at(position) for mask in self.masks)

    def _window_of(self, marker: Tensor | None) -> int | None:
        """Return the window of the mask for which a marker stands."""
        if marker is not None and marker.ndim == 4 and marker.shape[3] >= _FIRST_MARKER:
            mask = self.masks[marker.shape[3] - _FIRST_MARKER]
            if isinstance(mask, Unknown):
                raise UnsupportedModelError(mask.why)
            return mask.meaning.window
        raise UnsupportedModelError(
            f"{self.model_name} makes its attention mask without transformers' mask interface, so the keys that the "
            "mask hides are unknown. Use a family that does (GPT-2, Llama, Qwen, Mistral, Gemma, GPT-NeoX, OPT, Phi, "
            "OLMo ...)."
        )

    def _refuse_unknown(self, keywords: Mapping[str, object], dropout: float, is_causal: bool | None) -> None:
        unknown = [
            name
            for name, value in keywords.items()
            if value is not None and name not in _MEANINGLESS_KEYWORDS and not are_all_keys(value)
        ]
        if dropout:
            unknown.append("dropout")
        if is_causal is False:
            unknown.append("is_causal=False")
        if unknown:
            raise UnsupportedModelError(
                f"{self.model_name} passes {', '.join(unknown)} to its attention, which packed attention does not "
                "implement; ignoring it would give other numbers."
            )


@dataclass(kw_only=True)
class InFlight(Masks):
    """The tensors and markers of one forward call, collected layer by layer.

    Attributes:
        attention: the attention of the pass.
        copies: copies keys and values, and looks for numbers that are not finite.
        keys, values: the keys and values of each layer so far.

    """

    attention: PreparedAttention | StandingAttention
    copies: Copies
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add_layer(self, key: Tensor, value: Tensor) -> int:
        """Note the keys and values of the next layer, and return its idx."""
        self.keys.append(key)
        self.values.append(value)
        return len(self.keys) - 1


def run_body(body: nn.Module, inputs: Tensor) -> Tensor:
    """Run a model's body on packed tokens; return the final hidden states, `(tokens, hidden)`.

    `inputs`: token ids and positions, `(2, tokens)`.
    """
    token_ids, positions = inputs[:1], inputs[1:]  # (1, tokens)
    output: Any = body(
        input_ids=token_ids, position_ids=positions, attention_mask=torch.ones_like(token_ids), use_cache=False
    )
    hidden: Tensor = output.last_hidden_state.squeeze(0)
    return hidden


def no_layers_error(model_name: str) -> UnsupportedModelError:
    """Return the error for a model of which no layer has called our attention."""
    return UnsupportedModelError(
        f"{model_name} does not go through transformers' attention interface, so its attention cannot be "
        "packed. Use a family that does (GPT-2, Llama, Qwen, Mistral, Gemma, GPT-NeoX, OPT, Phi, OLMo ...)."
    )
