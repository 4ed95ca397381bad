"""Tiny configurations, made from the names of their fields.

A field of a known name gets the size of its kind. What names do not tell is in CHANGES, by the type of the model; a
name with a dot belongs to the configuration of a part. Windows and numbers of chosen keys are small, so that texts
show them.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 320
POSITIONS = 256
WINDOW = 16
CHOSEN_KEYS = 48
CHUNK = 128
NUM_HEADS = 4

_NAMES: list[tuple[object, str]] = [
    (VOCAB, "vocab_size vocab_size_per_layer_input backbone_vocab_size decoder_vocab_size"),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_target_positions max_source_positions max_seq_len "
        "context_length max_sequence_length seq_length",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size window_size local_attention attention_window_size "
        "local_attention_window_len keep_window_size rel_extent",
    ),
    (CHOSEN_KEYS, "index_topk indexer_budget"),
    (CHUNK, "attention_chunk_size"),
    # Widths
    (
        32,
        "hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim emb_dim dim_model embedding_dim "
        "projection_dim out_hidden_size hidden_dim mm_hidden_size input_embedding_size output_embedding_size "
        "backbone_hidden_size text_hidden_size output_dim projector_hidden_size width vision_hidden_size "
        "audio_embed_dim adapter_input_size adapter_in_dim adapter_out_dim",
    ),
    (
        64,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff d_ff d_inner "
        "intermediate_size_mlp feed_forward_size ffn_hidden_size shared_expert_intermediate_size mlp_hidden_size "
        "dense_intermediate_size ffn_intermediate_size prefix_dense_intermediate_size mlp_dim",
    ),
    (
        16,
        "moe_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_ffn_hidden_size moe_hidden_size share_expert_dim shared_expert_size moe_latent_size "
        "shared_experts_intermediate_size router_hidden_size kv_lora_rank q_lora_rank o_lora_rank qk_head_dim "
        "global_head_dim shape_embed_dim pronunciation_embed_dim",
    ),
    (
        8,
        "head_dim dim_head attention_head_dim d_kv d_head swa_head_dim kv_channels linear_head_dim qk_nope_head_dim "
        "qk_rope_head_dim swa_rope_head_dim swa_v_head_dim index_head_dim indexer_head_dim "
        "hidden_size_per_layer_input laurel_rank adapter_rank hc_lowrank patch_size",
    ),
    (12, "v_head_dim query_pre_attn_scalar"),
    (4, "rotary_dim index_block_size"),
    # Numbers of parts
    (
        4,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_decoder_layers "
        "num_encoder_layers num_layers_per_stack",
    ),
    (
        NUM_HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "swa_num_attention_heads attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_global_key_value_heads "
        "attention_num_key_value_heads num_query_groups kv_n_heads index_n_heads indexer_n_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k top_k moe_top_k top_k_experts zero_expert_num index_topk_blocks "
        "num_kv_shared_layers",
    ),
    (
        1,
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
        "first_k_dense_replace num_dense_layers moe_layer_start_index indexer_kv_heads indexer_compress_ratio "
        "temporal_patch_size",
    ),
    (0, "num_mtp_layers num_nextn_predict_layers"),
    # Layers with a state
    (8, "mamba_d_state state_size ssm_state_size d_state linear_key_head_dim linear_value_head_dim"),
    (
        4,
        "mamba_d_conv conv_kernel conv_kernel_size linear_conv_kernel_dim short_conv_kernel_size mamba_n_heads "
        "n_mamba_heads mamba_num_heads mamba_dt_rank time_step_rank linear_num_value_heads",
    ),
    (16, "mamba_d_head mamba_head_dim mamba_headdim mamba_chunk_size chunk_size"),
    (1, "mamba_n_groups n_groups mamba_ngroups"),
    (64, "mamba_d_ssm"),
    (32, "lru_width"),
    (2, "linear_num_key_heads"),
    (3, "conv_L_cache"),
    # Factors that are 1, or so far from it that tiny logits are equal
    (3.0, "embedding_multiplier final_logit_softcapping"),
    (2.0, "attn_logit_softcapping"),
    (0.7, "residual_multiplier logit_scale"),
    (0.6, "logits_scaling"),
    (0.5, "attention_multiplier"),
    # Towers for images and sounds, as small as they go
    (32, "image_size force_image_size"),
    (300, "encoder_hash_byte_group_vocab"),
    (50, "shape_vocab_size pronunciation_vocab_size"),
    (True, "use_sliding_window use_qk_norm qk_layernorm is_decoder"),
]
_VALUES = {name: value for value, names in _NAMES for name in names.split()}

_SPECIAL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sep_token_id": 3,
    "cls_token_id": 4,
} | dict.fromkeys(("decoder_start_token_id", "forced_eos_token_id", "forced_bos_token_id"), 5)
"""These ids are None where they may be."""

_STATES = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MEDIA_ROPE = {"text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_GLM_ROPE = {"text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}}

CHANGES: dict[str, dict[str, Any]] = {
    **{
        key: {"pad_token_id": 1}
        for key in [
            "camembert",
            "data2vec-text",
            "roberta",
            "roberta-prelayernorm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "prophetnet",
        ]
    },
    "xmod": {"pad_token_id": 1, "default_language": "en_XX"},
    **dict.fromkeys(["bailing_hybrid", "granitemoehybrid", "kimi_linear"], _STATES),
    **{key: {"layer_types": ["conv", "full_attention"] * 2} for key in ["lfm2", "lfm2_moe"]},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"] * 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2 + ["hybrid"], "num_hidden_layers": 5},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {
        **{"hidden_size": 64, "embedding_dim": 64, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 2},
        **{"chunk_size": 16, "qk_dim_factor": 1.0},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma2": _SLIDING,
    "gemma3n_text": _SHARED,
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "gemma4": {"text_config.pad_token_id": 0},
    "gemma4_unified": {"text_config.pad_token_id": 0},
    "gemma4_assistant": {
        **{"text_config.model_type": "gemma4_text", "text_config.num_kv_shared_layers": 6},
        **{"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    },
    "gemma3n": {
        **{f"text_config.{name}": value for name, value in _SHARED.items()},
        "text_config.vocab_size": VOCAB,
        "text_config.vocab_size_per_layer_input": 313,  # ids from here on are images and sounds
        **{"vision_config.vocab_offset": 313, "vision_config.vocab_size": 3, "vision_config.hidden_size": 32},
        **{"audio_config.vocab_offset": 316, "audio_config.vocab_size": 4},
        **{"image_token_id": 314, "boi_token_id": 290, "eoi_token_id": 314},
        **{"audio_token_id": 317, "boa_token_id": 291, "eoa_token_id": 317},
    },
    "cohere_compass_text": {**_SLIDING, "rope_parameters": dict.fromkeys(_SLIDING["layer_types"], _ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 3.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"num_key_value_heads": 1},
    "dots3_note_text": {
        **{"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 16},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    },
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2},
    "reformer": {
        **{"attn_layers": ["local", "lsh", "local", "lsh"], "axial_pos_shape": (16, 16), "hash_seed": 0},
        **{"axial_pos_embds_dim": (16, 16), "attention_head_size": 8, "local_attn_chunk_length": 16},
        **{"lsh_attn_chunk_length": 16, "num_buckets": 2, "pad_token_id": 0},
    },
    "xlm": {"pad_index": 2, "causal": True, "is_encoder": True, "use_lang_emb": False},
    "blt": {
        **{"use_cache": False, "patch_in_forward": True, "encoder_hash_byte_group_size": [3, 4]},
        "patcher_config.sliding_window": WINDOW,
        **{"encoder_config.hidden_size_global": 32, "decoder_config.hidden_size_global": 32},
    },
    # Images, sounds and texts
    **dict.fromkeys(
        ["qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "hunyuan_vl", "cosmos3_edge"], _MEDIA_ROPE
    ),
    **dict.fromkeys(["glm4v", "glm46v", "glm4v_moe", "glm_ocr"], _GLM_ROPE),
    "chameleon": {
        "vocabulary_map": {"<image>": 310} | {f"IMGIMG{letter}Z": 260 + idx for idx, letter in enumerate("ABCDEFGH")},
        **{"vq_config.base_channels": 32, "vq_config.embed_dim": 32, "vq_config.num_embeddings": 16},
    },
    "emu3": {
        "vocabulary_map": {"<image>": 310, "<|extra_200|>": 311}
        | {f"<|visual token {idx:06}|>": 260 + idx for idx in range(8)},
        "vq_config.base_channels": 32,
    },
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [16, 16],
        "text_config.rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"] * 2},
    "dots3_note": {"vision_config.mlp_layer_types": ["dense"] * 4, "vision_config.per_layer_config": {}},
    "fast_vlm": {"vision_config.hidden_size": 32},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "glm5_next": {"text_config.qk_rope_head_dim": 0, "text_config.head_dim": 0},
    "molmo2": {"vision_config.image_size": [32, 32], "adapter_config.vision_feature_layer": [2, 1]},
    "nemo_speechlm": {"head_config.audio_hidden_size": 32},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "perception_lm": {"vision_config.model_args": {"embed_dim": 32, "img_size": (32, 32), "depth": 2}},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": []},
    "janus": {"vq_config.base_channels": 32},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a type of models."""
    return tiny_of(CONFIG_MAPPING[model_type], CHANGES.get(model_type, {}))


def tiny_of(cls: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    """The tiny configuration of a class, and of its parts."""
    values = _values_of(cls) | {name: value for name, value in changes.items() if "." not in name}
    parts = _parts_of(cls) | {
        name.removesuffix(".model_type"): CONFIG_MAPPING[value]
        for name, value in changes.items()
        if name.endswith(".model_type")
    }
    for name, part in parts.items():
        if name not in values:
            own = {key.removeprefix(f"{name}."): value for key, value in changes.items() if key.startswith(f"{name}.")}
            own.pop("model_type", None)
            values[name] = tiny_of(part, CHANGES.get(part.model_type, {}) | own)
    return cls(**values)


def _parts_of(cls: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """The classes of the parts of a configuration, by name: those of its defaults where it has any."""
    listed = {**(getattr(cls, "sub_configs", None) or {}), **(getattr(cls, "sub_configs_defaults", None) or {})}
    if not listed:
        return {}
    try:
        whole: Any = cls()
    except Exception:  # defaults may contradict each other
        whole = None
    parts = {name: getattr(whole, name, part) for name, part in listed.items()}
    kinds = {name: part if isinstance(part, type) else type(part) for name, part in parts.items()}
    return {name: kind for name, kind in kinds.items() if issubclass(kind, PreTrainedConfig)}


def _values_of(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    hints = {
        name: str(hint) for base in reversed(cls.__mro__) for name, hint in getattr(base, "__annotations__", {}).items()
    }
    parts = _parts_of(cls)
    found: dict[str, Any] = {}
    for name, hint in hints.items():
        default = getattr(cls, name, None)
        if name in parts or (isinstance(default, (list, tuple)) and name in _VALUES):
            continue  # a list has a value a layer: the class knows
        if name in _SPECIAL:
            found[name] = None if "None" in hint else _SPECIAL[name]
        elif name in _VALUES and not (isinstance(_VALUES[name], bool) and not isinstance(default, bool)):
            found[name] = _VALUES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(default, int) and default >= VOCAB:
            found[name] = 300 + sum(map(ord, name)) % 11
    if {"kv_lora_rank", "num_key_value_heads"} <= hints.keys():  # compressed keys have a head each
        found["num_key_value_heads"] = NUM_HEADS
    return found
