"""Tiny random language models, one a family, whose logits show wrong maths.

Every parameter is moved far from what its constructor gave it: norms are not one, biases and attention sinks
are not zero, and the matrices are large enough for two contexts to differ clearly in their logits. Sizes that
often coincide are kept apart where the family allows it (gemma, qwen3 and gpt_oss: head_dim x heads is not
hidden_size). All are float32, on the CPU, in eval mode, and take at most 128 positions.

    model = build("llama")            # or FAMILIES["llama"](), the same
    model = build("llama", seed=1)    # other weights
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from devices import on_test_device

MAX_POSITIONS = 128
VOCAB_SIZE = 320
SLIDING_WINDOW = 8  # of mistral_sliding: most texts of the tests are longer
LONGROPE_ORIGINAL_POSITIONS = 32  # of phi3_longrope: a call that goes beyond uses other rotary frequencies

# Added to each parameter, as standard deviations. A matrix of 0.2 keeps the scale of its 32 inputs.
_MATRIX_STD = 0.2
_VECTOR_STD = 0.3  # norm weights, biases, sinks


def build(name: str, vocab_size: int = VOCAB_SIZE, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """A new model of the family `name`; the same name, sizes and seed give the same weights."""
    config = _CONFIGS[name](vocab_size)
    config.update(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model_class(config)(config)
        _move_parameters(model)
    return on_test_device(model.eval())


def _model_class(config: PreTrainedConfig) -> Callable[[PreTrainedConfig], PreTrainedModel]:
    return T5ForConditionalGeneration if config.is_encoder_decoder else AutoModelForCausalLM.from_config


@torch.no_grad()
def _move_parameters(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        std = _MATRIX_STD if parameter.ndim > 1 else _VECTOR_STD
        parameter.add_(torch.randn_like(parameter) * std)


# The names that most configurations use. No token ends a text or pads it, so generation never stops early and
# no row of the embedding is special.
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_COMMON = {**_SIZES, **_SPECIAL_TOKENS, "max_position_embeddings": MAX_POSITIONS}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}


def _gpt2(vocab_size: int) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=MAX_POSITIONS, **_SPECIAL_TOKENS
    )


def _llama(vocab_size: int) -> PreTrainedConfig:
    return LlamaConfig(vocab_size=vocab_size, **_GROUPED)


def _qwen2(vocab_size: int) -> PreTrainedConfig:
    return Qwen2Config(vocab_size=vocab_size, **_GROUPED)


def _qwen3(vocab_size: int) -> PreTrainedConfig:
    return Qwen3Config(vocab_size=vocab_size, head_dim=16, **_GROUPED)


def _mistral(vocab_size: int) -> PreTrainedConfig:
    return MistralConfig(vocab_size=vocab_size, sliding_window=None, **_GROUPED)


def _gemma(vocab_size: int) -> PreTrainedConfig:
    return GemmaConfig(vocab_size=vocab_size, head_dim=16, **{**_COMMON, "num_key_value_heads": 1})


def _gpt_neox(vocab_size: int) -> PreTrainedConfig:
    return GPTNeoXConfig(vocab_size=vocab_size, rotary_pct=0.5, **_COMMON)


def _opt(vocab_size: int) -> PreTrainedConfig:
    sizes = {name: value for name, value in _COMMON.items() if name != "intermediate_size"}
    return OPTConfig(vocab_size=vocab_size, ffn_dim=64, word_embed_proj_dim=32, **sizes)


def _phi(vocab_size: int) -> PreTrainedConfig:
    return PhiConfig(vocab_size=vocab_size, **_COMMON)


def _olmo2(vocab_size: int) -> PreTrainedConfig:
    return Olmo2Config(vocab_size=vocab_size, **_GROUPED)


def _gemma2(vocab_size: int) -> PreTrainedConfig:
    """Caps low enough to bend the scores of this model; a sliding layer whose window nothing leaves."""
    return Gemma2Config(
        vocab_size=vocab_size,
        head_dim=16,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=2 * MAX_POSITIONS,
        **_GROUPED,
    )


def _granite(vocab_size: int) -> PreTrainedConfig:
    return GraniteConfig(
        vocab_size=vocab_size,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        attention_multiplier=0.5,
        logits_scaling=0.6,
        **_GROUPED,
    )


def _cohere(vocab_size: int) -> PreTrainedConfig:
    return CohereConfig(vocab_size=vocab_size, logit_scale=0.7, **_GROUPED)


def _gpt_oss(vocab_size: int) -> PreTrainedConfig:
    """Sinks and experts; yarn's rotary scaling, the same for every length; a window nothing leaves."""
    return GptOssConfig(
        vocab_size=vocab_size,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=2 * MAX_POSITIONS,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": MAX_POSITIONS // 4,
            "truncate": False,
        },
        **_GROUPED,
    )


def _mistral_sliding(vocab_size: int) -> PreTrainedConfig:
    return MistralConfig(vocab_size=vocab_size, sliding_window=SLIDING_WINDOW, **_GROUPED)


def _phi3_longrope(vocab_size: int) -> PreTrainedConfig:
    return Phi3Config(
        vocab_size=vocab_size,
        original_max_position_embeddings=LONGROPE_ORIGINAL_POSITIONS,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "factor": MAX_POSITIONS / LONGROPE_ORIGINAL_POSITIONS,
            "short_factor": [1.0, 1.1, 1.3, 1.6],  # one a pair of rotary dimensions
            "long_factor": [1.5, 2.0, 3.0, 4.0],
        },
        **_GROUPED,
    )


def _mamba(vocab_size: int) -> PreTrainedConfig:
    return MambaConfig(vocab_size=vocab_size, hidden_size=32, state_size=8, num_hidden_layers=2, **_SPECIAL_TOKENS)


def _t5(vocab_size: int) -> PreTrainedConfig:
    return T5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,  # the decoder's input is shifted by it
    )


def _bloom(vocab_size: int) -> PreTrainedConfig:
    return BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=4, **_SPECIAL_TOKENS)


def _falcon(vocab_size: int) -> PreTrainedConfig:
    return FalconConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        **_SPECIAL_TOKENS,
    )


_ATTENTION_INTERFACE_CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma": _gemma,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "phi": _phi,
    "olmo2": _olmo2,
    "gemma2": _gemma2,
    "granite": _granite,
    "cohere": _cohere,
    "gpt_oss": _gpt_oss,
    "mistral_sliding": _mistral_sliding,
    "phi3_longrope": _phi3_longrope,
}
_OTHER_CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "mamba": _mamba,
    "t5": _t5,
    "bloom": _bloom,
    "falcon": _falcon,
}
_CONFIGS = {**_ATTENTION_INTERFACE_CONFIGS, **_OTHER_CONFIGS}

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    name: partial(build, name) for name in _ATTENTION_INTERFACE_CONFIGS
}
"""Name -> builder(vocab_size, seed): decoders whose layers call transformers' attention interface."""

OTHERS: dict[str, Callable[..., PreTrainedModel]] = {name: partial(build, name) for name in _OTHER_CONFIGS}
"""Name -> builder: no attention (mamba), an encoder too (t5, which needs decoder_input_ids), or attention
that does not go through that interface (bloom with ALiBi, falcon)."""
