"""Tiny random models of the configurations, and a tokenizer with a word an id."""

import sys
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

from families.configs import VOCAB, tiny_config

CAUSAL: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The classes that AutoModelForCausalLM gives, by types of models."""

MEDIA: dict[str, str] = {
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}
"""Classes of images, sounds and texts."""

_MAX_PARAMETERS = 130_000_000


def build(model_type: str, class_name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model in float32 and eval mode whose weights are far from those that its constructor gives.

    Raises:
        Exception: transformers cannot make such a model of the tiny configuration.

    """
    cls = getattr(transformers, class_name)
    config: Any = tiny_config(model_type)
    wanted = cls.config_class
    if wanted is not None and not isinstance(config, wanted):
        parts = [getattr(config, "decoder", None), config.get_text_config(decoder=True)]
        config = next((part for part in parts if isinstance(part, wanted)), None) or tiny_config(wanted.model_type)
    _leave_out_timm(sys.modules[cls.__module__])
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in cls(config).parameters())
    if num_parameters > _MAX_PARAMETERS:
        raise ValueError(f"{num_parameters / 1e6:.0f} million parameters are not tiny")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = cls(config)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.3))
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():  # of the routers of experts
                buffer.add_(torch.randn_like(buffer) * 0.3)
    return model.eval()


def _leave_out_timm(module: Any) -> None:
    """Let a module build no towers of timm, which may not be installed: nobody looks at an image."""
    auto = getattr(module, "AutoModel", None)
    if not isinstance(auto, type) or auto is _WithoutTimm:
        return
    _WithoutTimm.auto = auto
    module.AutoModel = _WithoutTimm


class _WithoutTimm:
    auto: Any

    @classmethod
    def from_config(cls, config: Any, **keywords: Any) -> torch.nn.Module:
        if "timm" in str(getattr(config, "model_type", "")) or type(config).__name__ == "Gemma3nVisionConfig":
            return torch.nn.Linear(1, 1)
        return cls.auto.from_config(config, **keywords)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token of id 7 is the string " w7"."""
    backend = Tokenizer(models.WordLevel({f"w{token_id}": token_id for token_id in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def special_ids(config: PreTrainedConfig | dict[str, Any]) -> set[int]:
    """The token ids that a configuration gives a meaning."""
    values: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    found: set[int] = set()
    if "vocab_offset" in values:  # of images or sounds, behind that of the text
        found |= set(range(values["vocab_offset"], values["vocab_offset"] + values["vocab_size"]))
    for name, value in values.items():
        if isinstance(value, dict):
            found |= special_ids(value)
        elif isinstance(name, str) and name.endswith(("_token_id", "_token_index", "_id", "_token_ids")):
            ids = value if isinstance(value, (list, tuple)) else [value]
            found |= {one for one in ids if isinstance(one, int) and 0 <= one < VOCAB}
    return found
