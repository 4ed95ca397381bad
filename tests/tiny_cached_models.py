"""Tiny random models whose attention cannot be packed, but whose `forward` takes a cache.

    model = build("bloom")    # the same name gives the same weights

`KEYS_AND_VALUES`: a row a token is all that their caches keep. `STATES`: recurrent or convolution states as well, or
nothing else. Of these, `ONE_AT_A_TIME` see their states only where a single token goes behind them.
"""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RwkvConfig,
)

from devices import on_test_device
from tiny_models import MAX_POSITIONS, VOCAB_SIZE

_NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_NO_SPECIAL}
_GROUPED = {
    **_SIZES,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}

KEYS_AND_VALUES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bloom": lambda: BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, **_NO_SPECIAL),
    "falcon": lambda: FalconConfig(**_SIZES, alibi=True),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        **_NO_SPECIAL,
    ),
    "gptj": lambda: GPTJConfig(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=MAX_POSITIONS, **_NO_SPECIAL
    ),
    "mpt": lambda: MptConfig(
        vocab_size=VOCAB_SIZE, d_model=32, n_layers=2, n_heads=4, max_seq_len=MAX_POSITIONS, **_NO_SPECIAL
    ),
}

STATES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bamba": lambda: BambaConfig(
        **_GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=16,
    ),
    "jamba": lambda: JambaConfig(
        **_GROUPED,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "lfm2": lambda: Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"], conv_L_cache=3),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, state_size=8, num_hidden_layers=2, **_NO_SPECIAL
    ),
    "mamba2": lambda: Mamba2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=16,
        time_step_limit=(0.1, 0.5),  # which transformers leaves out for a single token behind a cache
        **_NO_SPECIAL,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **_GROUPED,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "rwkv": lambda: RwkvConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, context_length=MAX_POSITIONS, **_NO_SPECIAL
    ),
}

ONE_AT_A_TIME = frozenset({"jamba", "mamba"})

ALL = (*KEYS_AND_VALUES, *STATES)


def build(name: str, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> PreTrainedModel:
    """A new model; its parameters are moved far from what its constructor gave them, by `scale` as far as usual."""
    config = (KEYS_AND_VALUES | STATES)[name]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.3) * scale)
    model = on_test_device(model.eval().to(dtype))
    if name == "rwkv":  # its first call in eval mode counts as a change of its weights
        with torch.no_grad():
            model(input_ids=torch.tensor([[5]], device=model.device))
    return model
