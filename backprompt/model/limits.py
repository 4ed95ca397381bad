"""The limits that a model sets for texts: the ids that it embeds and scores, and the number of positions or tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from backprompt.errors import TokenIdError
from backprompt.model import families
from backprompt.model.skeleton import decoder_of, vocab_size

_NUM_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
"""The fields of configurations with the number of positions that a model was made for."""

_MEDIA = ("image", "video", "audio", "speech", "vision")


@dataclass(frozen=True)
class Limits:
    """The limits that a model sets for texts.

    Attributes:
        num_embeddings: the number of token ids that the model embeds and scores; ids must be below it.
        max_tokens: the number of positions that the model was made for, or None if it does not say.
        why_hard: the reason why texts cannot exceed `max_tokens`; None if they can, at the caller's risk.
        placeholders: token ids that stand for images or sounds, or take no position.
        padding: the placeholder that takes no position.
        counts_tokens: whether `max_tokens` limits tokens instead of positions, because keys are chosen among all tokens
            that a token sees. A text with groups has more tokens than positions.

    """

    num_embeddings: int
    max_tokens: int | None
    why_hard: str | None
    placeholders: frozenset[int] = frozenset()
    padding: int | None = None
    counts_tokens: bool = False

    def check_placeholders(self, token_ids: Iterable[int]) -> None:
        """Raise TokenIdError if a token stands for an image or a sound, or takes no position."""
        if self.placeholders and not self.placeholders.isdisjoint(token_ids):
            found = min(self.placeholders.intersection(token_ids))
            if found == self.padding:
                raise TokenIdError(
                    f"Token id {found} is the model's padding, which takes no position in the plain call. Remove "
                    "the token from the text."
                )
            raise TokenIdError(
                f"Token id {found} stands for an image, a video or a sound, which the model puts in its place. Only "
                "texts without such tokens can be evaluated: remove the token."
            )


def limits_of(model: nn.Module) -> Limits:
    """Return the limits on ids and positions."""
    decoder = decoder_of(model)
    assert decoder is not None, "check_supported refuses a model without one"
    config: Any = decoder.config
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    num_embeddings = min(embeddings.shape[0], vocab_size(model))  # a head may score fewer
    max_tokens: int | None = next(
        (getattr(config, name) for name in _NUM_POSITIONS if (getattr(config, name, None) or 0) > 0), None
    )
    padding = families.padding_id(decoder)
    placeholders = _placeholders(model)
    if padding is not None:
        placeholders |= {padding}
        max_tokens = None if max_tokens is None else max_tokens - padding - 1
    hard = [
        (int(length), f"its {kind} rotary scaling changes all positions of a call with a longer text")
        for kind, length in (_scaled_from(rope, max_tokens) for rope in _rope_parameters(config))
        if length is not None
    ]
    num_chosen = families.num_chosen_keys(decoder)
    if num_chosen is not None:
        hard.append((num_chosen, f"in longer texts its indexer chooses {num_chosen} keys for each token"))
    is_rotary = any("rotary" in type(module).__name__.lower() for module in model.modules())
    why_hard = None if is_rotary else "its position embeddings are learned, one for each position"
    if hard:
        max_tokens, why_hard = min(hard)  # kinds of layers may differ
    return Limits(num_embeddings, max_tokens, why_hard, placeholders, padding, num_chosen is not None)


def _scaled_from(rope: dict[str, Any], max_tokens: int | None) -> tuple[str, int | None]:
    """Return the kind of rotary scaling, and the length beyond which it depends on the largest position of a call."""
    kind = str(rope.get("rope_type", "default"))
    if "dynamic" in kind:  # transformers' code does not read the original length
        return kind, max_tokens
    return kind, rope.get("original_max_position_embeddings") or max_tokens if kind == "longrope" else None


def _placeholders(model: nn.Module) -> frozenset[int]:
    """Return the token ids that a model of texts and other media replaces by embeddings of images or sounds.

    In a call without images or sounds, some classes embed such ids like other ids, and some do not.
    """
    config: Any = model.config
    if config.get_text_config() is config:
        return frozenset()
    names = [f"{kind}_token_{suffix}" for kind in _MEDIA for suffix in ("id", "index")]
    found = {getattr(config, name, None) for name in names}
    offsets = [getattr(getattr(config, f"{kind}_config", None), "vocab_offset", None) for kind in _MEDIA]
    lowest = min((offset for offset in offsets if offset is not None), default=None)
    if lowest is not None:  # from here on the embedding has rows for other media
        found |= set(range(lowest, model.get_input_embeddings().weight.shape[0]))  # type: ignore[operator]
    return frozenset(token_id for token_id in found if isinstance(token_id, int))


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters; models with several kinds of layers have one set per kind."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (value for value in parameters.values() if isinstance(value, dict))
