"""Every family of models gives the numbers of its plain call, or is refused by an error that names the reason.

Each model of tiny_models evaluates the same forest, in one pass and in many, and every row of it is compared with the
plain call. Then the edges: low precision, windows, positions a model was not made for, heads, refusals, adapters,
compiled models, and caches handed to `model(...)` and `model.generate(...)`.
"""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    ModernBertDecoderConfig,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from backprompt import LM, Text, TextTooLongError, TokenIdError, UnsupportedModelError, evaluate
from backprompt.model import families
from backprompt.training import token_logprobs
from comparing import assert_close, assert_equals_plain, num_distinct
from devices import on_test_device
from reference import ids_for, plain_ids, plain_logits
from tiny_models import FAMILIES, LONGROPE_ORIGINAL_POSITIONS, MAX_POSITIONS, OTHERS, SLIDING_WINDOW, VOCAB_SIZE
from tiny_tokenizers import byte_level_bpe

TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Of families that tiny_models does not build."""

PASS_SIZES = [None, 16]  # one pass for all of a forest; and many, in which spans are cut and tiles are split


def random_model(config, build=AutoModelForCausalLM.from_config):
    """A model of this configuration whose weights are as far from their constructor's as those of tiny_models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return on_test_device(model.eval())


def config_like(family, **changes):
    """The configuration of a family of tiny_models, with changes."""
    config = FAMILIES[family]().config
    for name, value in changes.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


def forest(lm):
    """Fifteen texts of 21 to 83 tokens, four deep; one shares nothing, one ends where others branch.

    question --+-- Kenobi --+-- mat --+-- Yes
               |            |         +-- No, never
               |            |         +-- !
               |            +-- it -- (the same three)
               +-- The cat sat on -- (the same two, and their three)
               +-- The
    """
    root = Text("Question: What is 12 + 34? Hello there. ", lm)
    leaves = [
        root + branch + twig + leaf
        for branch in ("General Kenobi! You are a bold one...", "The cat sat on")
        for twig in (" the mat, and the other cat didn't.", " it")
        for leaf in (" Yes", " No, never", "!")
    ]
    return [root, *leaves, root + "The", Text("One alone: the film was great, about 3.14% of the ending wasn't.", lm)]


def short_forest(lm):
    """Eight texts of 7 to 16 tokens, for a model whose positions change their meaning at 32."""
    root = Text("Question: 12", lm)
    leaves = [root + twig + leaf for twig in (" cats", " + 3") for leaf in (" sat", " on", "?")]
    return [root, *leaves, Text("One alone.", lm)]


def forest_for(family, lm):
    return short_forest(lm) if family == "phi3_longrope" else forest(lm)


def assert_is_as_plain(model, tokenizer, texts, atol=None):
    """All results of a text are those of the plain call on its string."""
    evaluate(texts)
    assert [text.tokens for text in texts] == [tuple(plain_ids(tokenizer, text.string)) for text in texts]
    assert_equals_plain(model, texts, atol)


# Families and precision


@pytest.mark.parametrize("max_tokens", PASS_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_its_plain_call(family, max_tokens, tokenizer):
    model = FAMILIES[family]()
    lm = LM(model, tokenizer, max_tokens_per_forward=max_tokens)
    texts = forest_for(family, lm)
    assert_is_as_plain(model, tokenizer, texts)

    assert lm.stats.tokens_computed == num_distinct(texts)  # every beginning that a text has, once
    assert lm.stats.forward_passes >= (1 if max_tokens is None else num_distinct(texts) / max_tokens)


@pytest.mark.parametrize("max_tokens", PASS_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_low_precision_equals_the_plain_call_of_the_same_dtype(family, dtype, max_tokens, tokenizer):
    """And it is no further from the float32 model than the plain call is.

    gpt_oss uses all of its experts here: in low precision the plain call's own choice between two that are nearly
    equal flips with the last bit, and then logits differ by more than 1.
    """
    changes = {"num_experts_per_tok": 4} if family == "gpt_oss" else {}
    exact = random_model(config_like(family, **changes))
    model = random_model(config_like(family, **changes)).to(dtype)
    texts = forest(LM(model, tokenizer, max_tokens_per_forward=max_tokens))
    assert_is_as_plain(model, tokenizer, texts)

    ours, plain = [], []
    for text in texts:
        truth = plain_logits(exact, text.tokens)
        ours.append((text.model_repr.all_logits().cpu() - truth).square().mean())
        plain.append((plain_logits(model, text.tokens) - truth).square().mean())
    assert torch.stack(ours).mean().sqrt() < 1.2 * torch.stack(plain).mean().sqrt()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "mistral_sliding"])
def test_float64_equals_the_plain_call(family, tokenizer):
    model = FAMILIES[family]().double()
    texts = forest(LM(model, tokenizer, max_tokens_per_forward=16))
    assert_is_as_plain(model, tokenizer, texts)


def test_a_model_whose_own_attention_rounds_to_float32_is_not_refused_in_float64(tokenizer):
    """Gemma 2's plain softmax is float32 whatever its dtype; ours is float64. Measured: 7e-7 apart."""
    model = FAMILIES["gemma2"]().double()
    assert_is_as_plain(model, tokenizer, forest(LM(model, tokenizer)), atol=1e-5)


# Windows and positions


@pytest.mark.parametrize("max_tokens", PASS_SIZES)
@pytest.mark.parametrize("family", ["mistral_sliding", "gemma2"])
@pytest.mark.parametrize("window", [1, 2, SLIDING_WINDOW, 30, 1000])
def test_sliding_windows_count_positions_of_the_text(family, window, max_tokens, tokenizer):
    """Texts of 3 to 83 tokens: shorter than the window, as long as it, and many times as long."""
    model = random_model(config_like(family, sliding_window=window))
    lm = LM(model, tokenizer, max_tokens_per_forward=max_tokens)
    texts = [*forest(lm), Text("it", lm), Text("The cat", lm), Text("The cat", lm) + " sat", Text("The", lm) + "re"]
    assert_is_as_plain(model, tokenizer, texts)


def test_a_window_matters_to_the_sliding_family(tokenizer):
    """Else the test above would show nothing: with and without the window, the plain logits differ clearly."""
    with_window = random_model(config_like("mistral_sliding"))
    without = random_model(config_like("mistral_sliding", sliding_window=None))
    ids = plain_ids(tokenizer, "Question: What is 12 + 34? Hello there.")
    assert (plain_logits(with_window, ids)[-1] - plain_logits(without, ids)[-1]).abs().max() > 0.1


def rotary_scaled_by_length(kind):
    """A model whose rotary frequencies depend on the longest position of the call, and its original length."""
    if kind == "longrope":
        return FAMILIES["phi3_longrope"](), LONGROPE_ORIGINAL_POSITIONS
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    return random_model(config_like("llama", rope_parameters=rope, max_position_embeddings=32)), 32


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_scaling_by_length_is_right_up_to_the_original_length_and_refused_beyond(kind, tokenizer):
    model, original = rotary_scaled_by_length(kind)
    lm = LM(model, tokenizer, beyond_trained_length=True, max_tokens_per_forward=16)
    ids = plain_ids(tokenizer, "Question: What is 12 + 34? Hello there. General Kenobi! You are a bold one...")
    within = Text.from_tokens(ids[:original], lm)
    beyond = Text.from_tokens(ids[: original + 1], lm)
    assert_is_as_plain(model, tokenizer, short_forest(lm))
    logits = plain_logits(model, within.tokens)
    assert_close(within.model_repr.all_logits(), logits)

    message = rf"33 tokens.* {original} positions.*{kind} rotary scaling.*Shorten the text by 1\."
    with pytest.raises(TextTooLongError, match=message):
        evaluate([within, beyond])
    # Why: a longer position in a call changes the rows before it.
    assert (plain_logits(model, beyond.tokens)[:-1] - logits).abs().max() > 1e-2


def two_longropes():
    """A model whose kinds of layers have other original lengths, the shorter one the second."""

    def rope(original):
        lengths = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.5, 2.0, 3.0, 4.0]}
        return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original, **lengths}

    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16, "head_dim": 8}
    ropes = {"full_attention": rope(64), "sliding_attention": rope(32)}
    return random_model(Gemma3TextConfig(**TINY, **kinds, rope_parameters=ropes))


def dynamic(original, max_positions):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": original}
    return random_model(config_like("llama", rope_parameters=rope, max_position_embeddings=max_positions))


@pytest.mark.parametrize(
    ("make", "longest"),
    [(two_longropes, 32), (lambda: dynamic(64, 32), 32), (lambda: dynamic(16, 32), 32)],
    ids=["two longropes", "dynamic, original above", "dynamic, original below"],
)
def test_the_length_from_which_rotary_scaling_changes_is_the_one_that_its_code_reads(make, longest, tokenizer):
    model = make()
    lm = LM(model, tokenizer, max_tokens_per_forward=7)
    assert_equals_plain(model, [Text.from_tokens(list(range(5, 5 + length)), lm) for length in (longest - 3, longest)])
    with pytest.raises(TextTooLongError, match=rf"{longest} positions.*rotary scaling.*Shorten the text by 1\."):
        evaluate(Text.from_tokens(list(range(5, 6 + longest)), lm))


# Experts, heads


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
        Qwen2MoeConfig(**TINY, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_mixtures_of_experts_equal_their_plain_call(config, tokenizer):
    model = random_model(config)
    texts = forest(LM(model, tokenizer, max_tokens_per_forward=16))
    assert_is_as_plain(model, tokenizer, texts)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_tied_to_the_embedding_and_heads_of_their_own(family, is_tied, tokenizer):
    model = random_model(config_like(family, tie_word_embeddings=is_tied))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
    assert_is_as_plain(model, tokenizer, forest(LM(model, tokenizer)))


# Refused, each by an error that names the reason


@pytest.mark.parametrize(("family", "reason"), [("t5", "T5ForConditionalGeneration is an encoder-decoder")])
def test_other_architectures_are_refused_by_name(family, reason, tokenizer):
    with pytest.raises(UnsupportedModelError, match=reason):
        LM(OTHERS[family](), tokenizer)


HYBRIDS = {
    "jamba": lambda: JambaConfig(
        **{**TINY, "num_hidden_layers": 4},
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **TINY,
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
    "lfm2": lambda: Lfm2Config(**TINY, layer_types=["conv", "full_attention"], conv_L_cache=3),
    # Where attention comes first, keys and values are right, and only the final hidden states are wrong.
    "lfm2, convolution last": lambda: Lfm2Config(**TINY, layer_types=["full_attention", "conv"], conv_L_cache=3),
}


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_hybrids_whose_other_layers_mix_tokens_go_by_levels(hybrid, tokenizer):
    model = random_model(HYBRIDS[hybrid]())
    texts = forest(lm := LM(model, tokenizer))
    assert_is_as_plain(model, tokenizer, texts)
    assert "by levels" in lm.stats.kernel


def as_constructed(config, dtype):
    """A model with its constructor's small weights, whose layers move logits by little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return on_test_device(AutoModelForCausalLM.from_config(config).eval().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hybrid", ["lfm2, convolution last", "qwen3_5"])
def test_hybrids_with_small_weights_are_not_packed_in_low_precision(hybrid, dtype, tokenizer, monkeypatch):
    """Where logits differ by less than such numbers are compared to, the text's rows still depend on other texts."""
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 8}
    qwen = Qwen3_5TextConfig(**TINY, **sizes, layer_types=["linear_attention", "full_attention"])
    model = as_constructed(qwen if hybrid == "qwen3_5" else HYBRIDS[hybrid](), dtype)
    texts = forest(lm := LM(model, tokenizer))
    monkeypatch.setattr(families, "mixing_layers", lambda decoder: [])  # as if nothing told what the layers are
    evaluate(texts)
    assert "by levels" in lm.stats.kernel
    assert_equals_plain(model, texts)


@pytest.mark.parametrize("seed", range(12))
def test_experts_that_flip_with_the_last_bit_do_not_refuse_a_model(seed, tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES["gpt_oss"]().config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model = on_test_device(model.to(torch.bfloat16))
    evaluate(Text("The cat sat on the mat.", LM(model, tokenizer)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_probe_runs_the_model_on_forty_tokens(dtype, tokenizer):
    """One plain call of three texts, and three passes."""
    model = random_model(config_like("llama")).to(dtype)
    calls = []
    embed = type(model.model.embed_tokens).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Embedding, "forward", lambda self, ids: calls.append(ids.numel()) or embed(self, ids))
        evaluate(Text("", LM(model, tokenizer)) + "The")
    assert calls == [27, 4, 12, 12, 1]


def llama4(**changes):
    """Three layers of chunked attention, one of full attention without positions."""
    sizes = {**TINY, "num_hidden_layers": 4, "intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 2}
    return random_model(Llama4TextConfig(**sizes, attention_chunk_size=24, **changes))


def test_chunked_attention_is_right_within_the_chunk_and_refused_beyond(tokenizer):
    model = llama4(attn_temperature_tuning=False)
    lm = LM(model, tokenizer, max_tokens_per_forward=8)
    texts = short_forest(lm)
    assert max(len(text.tokens) for text in texts) < 24
    assert_is_as_plain(model, tokenizer, texts)

    with pytest.raises(UnsupportedModelError, match="neither causal nor a sliding window"):
        evaluate(texts[-1] + " The cat sat on the mat, and the other cat didn't.")
    assert_is_as_plain(model, tokenizer, texts)


def test_a_decoder_under_another_name_is_found(tokenizer):
    """ModernBERT's head is called `decoder`, which is what transformers then takes for its decoder."""
    special = ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
    model = random_model(ModernBertDecoderConfig(**{**TINY, **dict.fromkeys(special, 0)}))
    texts = forest(LM(model, tokenizer, max_tokens_per_forward=16))
    assert_is_as_plain(model, tokenizer, texts)


class BiasedAttention(LlamaAttention):
    """Attention that asks its implementation for a bias a position."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, position_bias=torch.ones(1, device=self.q_proj.weight.device), **kwargs)


def test_a_keyword_that_attention_does_not_implement_is_refused_by_name(tokenizer):
    model = FAMILIES["llama"]()
    model.model.layers[1].self_attn.__class__ = BiasedAttention
    lm = LM(model, tokenizer)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM passes position_bias to its attention"):
        evaluate(Text("The cat", lm))
    assert lm.stats.bytes_held == 0


def on_the_meta_device():
    config = config_like("llama")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def partly_on_the_meta_device():
    model = FAMILIES["llama"]()
    model.model.norm.weight = nn.Parameter(torch.empty(32, device="meta"))
    return model


def hooked_by_others():
    model = FAMILIES["gpt2"]()
    model.transformer.h[1]._hf_hook = object()  # where accelerate has its hooks
    return model


def hooked(register, where):
    model = FAMILIES["llama"]()
    getattr(model.get_submodule(where), register)(lambda *args: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: AutoModel.from_config(config_like("gpt2")), "GPT2Model has no language-model head"),
        (lambda: AutoModel.from_config(config_like("llama")), "LlamaModel has no language-model head"),
        (
            lambda: AutoModelForSequenceClassification.from_config(config_like("llama")),
            "LlamaForSequenceClassification has no language-model head",
        ),
        (lambda: nn.Linear(2, 2), "Linear is not a transformers model"),
        (lambda: "gpt2", r"not str\. To load a model by its name or path, use backprompt\.load"),
        (byte_level_bpe, "An LM wraps a model of transformers, not TokenizersBackend"),
        (on_the_meta_device, "LlamaForCausalLM has parameters on the meta device"),
        (partly_on_the_meta_device, "LlamaForCausalLM has parameters on the meta device"),
        (hooked_by_others, "GPT2LMHeadModel has the hook object of accelerate on its module 'transformer.h.1'"),
        (lambda: hooked("register_forward_hook", "model.layers.1"), "forward hook on its module 'model.layers.1'"),
        (lambda: hooked("register_forward_pre_hook", "lm_head"), "forward hook on its module 'lm_head'"),
        (lambda: hooked("register_forward_hook", ""), "forward hook on its module 'LlamaForCausalLM'"),
    ],
)
def test_what_is_no_whole_causal_model_is_refused_by_name(make, reason, tokenizer):
    with pytest.raises(UnsupportedModelError, match=reason):
        LM(make(), tokenizer)


# Adapters of peft

ADAPTERS = {
    "LoRA": peft.LoraConfig(target_modules=["q_proj", "v_proj"]),
    "DoRA": peft.LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True),
    "LoRA of the embedding and the head": peft.LoraConfig(target_modules=["embed_tokens", "lm_head"]),
    "LoRA and a head of its own": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "LoRA and some embeddings of its own": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 262]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_model_with_an_adapter_equals_its_plain_call(kind, tokenizer):
    model = peft.get_peft_model(FAMILIES["llama"](), ADAPTERS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # the adapter's own, which start as the identity
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape).to(parameter))
    texts = forest(LM(model, tokenizer, max_tokens_per_forward=16))
    assert_is_as_plain(model, tokenizer, texts)
    base = plain_logits(FAMILIES["llama"](), texts[0].tokens)[-1]
    assert (texts[0].logits.cpu() - base).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            "virtual tokens before the prompt.* LoRA",
        ),
        (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            "virtual tokens before the prompt.* LoRA",
        ),
        (
            # The adapter acts on the tokens after its invocation, which the PeftModel looks for in all of `input_ids`.
            peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
            "activated LoRA.* ordinary LoRA",
        ),
    ],
    ids=["prompt tuning", "prefix tuning", "activated LoRA"],
)
def test_adapters_that_look_at_the_whole_call_are_refused(config, reason, tokenizer):
    with pytest.raises(UnsupportedModelError, match=f"The adapter 'default' .*{reason}"):
        LM(peft.get_peft_model(FAMILIES["llama"](), config), tokenizer)


def test_an_adapter_that_scales_others_by_a_run_of_its_own_is_refused(tokenizer, tmp_path):
    for name in ("a", "b"):
        lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(FAMILIES["llama"](), lora).save_pretrained(tmp_path / name)
    adapters = {name: str(tmp_path / name) for name in ("a", "b")}
    base = FAMILIES["llama"]()
    base.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters)
    with pytest.raises(UnsupportedModelError, match=r"The adapter 'default' is an X-LoRA.* ordinary LoRA"):
        LM(peft.get_peft_model(base, config), tokenizer)


def test_a_lora_on_parameters_is_refused(tokenizer):
    base = random_model(MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(UnsupportedModelError, match=r"LoRA on parameters \(target_parameters\).* Merge it"):
        LM(peft.get_peft_model(base, config), tokenizer)


SMALL_ADAPTERS = {
    "trainable tokens, tied": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 262]),
    "adaption prompt": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", SMALL_ADAPTERS)
def test_adapters_that_look_at_linear_layers_find_them_where_onednn_serves(kind, tokenizer, monkeypatch):
    monkeypatch.setattr("backprompt.model.linear.is_faster", lambda: True)
    base = random_model(config_like("llama", tie_word_embeddings=True))
    model = peft.get_peft_model(base, SMALL_ADAPTERS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape).to(parameter))
    lm = LM(model, tokenizer, max_tokens_per_forward=16)
    assert_is_as_plain(model, tokenizer, short_forest(lm))


class Linear8bitLt(nn.Linear):
    """Takes the place of the int8 layer of bitsandbytes, whose first call empties its weight."""

    def forward(self, rows):
        weight, self.weight.CB = self.weight.CB, None
        return nn.functional.linear(rows, weight, self.bias)


def test_int8_layers_of_bitsandbytes_are_refused_before_they_run(tokenizer):
    model = FAMILIES["llama"]()
    layer = model.model.layers[0].mlp.up_proj
    layer.__class__, layer.weight.CB = Linear8bitLt, layer.weight.data
    with pytest.raises(UnsupportedModelError, match=r"int8 layers of bitsandbytes.* without load_in_8bit"):
        LM(model, tokenizer)
    assert layer.weight.CB is not None


def test_an_encoder_is_refused_for_what_it_is(tokenizer):
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = random_model(BertConfig(**sizes, intermediate_size=64), BertLMHeadModel)
    with pytest.raises(UnsupportedModelError, match=r"attend to later tokens, as an encoder does.*is_decoder=True"):
        Text("The cat", LM(model, tokenizer)).logits  # noqa: B018


# Compiled models. Nothing is compiled: the model's own code runs


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()", "its decoder", "a layer", "its method"])
def test_compiled_models_run_as_they_were_written(how, tokenizer):
    plain = FAMILIES["llama"]()
    model = FAMILIES["llama"]()
    if how == "torch.compile(model)":
        model = torch.compile(model, backend=refuse_to_compile)
    elif how == "its method":
        model.forward = torch.compile(model.forward, backend=refuse_to_compile)
    else:
        module = {"model.compile()": model, "its decoder": model.model, "a layer": model.model.layers[0]}[how]
        module.compile(backend=refuse_to_compile)
    texts = forest(LM(model, tokenizer))
    assert_is_as_plain(plain, tokenizer, texts)


def refuse_to_compile(graph, inputs):
    raise AssertionError("compiled")


# Models of texts and other media


def granite_speech():
    """Its outer class embeds the token that stands for a sound as token 0."""
    sizes = {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "dim_head": 16, "conv_kernel_size": 3}
    config = GraniteSpeechConfig(
        text_config=GraniteConfig(**TINY).to_dict(),
        encoder_config={**sizes, "input_dim": 16, "output_dim": 8, "context_size": 20, "max_pos_emb": 32},
        projector_config={
            **{"model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"intermediate_size": 32, "encoder_hidden_size": 32},
        },
        audio_token_index=308,
        has_lora_adapter=False,
    )
    return random_model(config, GraniteSpeechForConditionalGeneration)


def llava():
    """Its outer class embeds the token that stands for an image as any other, where there is no image."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 28, "patch_size": 14}
    text = {"model_type": "llama", **TINY}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=304)
    return random_model(config, LlavaForConditionalGeneration)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_stand_for_an_image_are_evaluated_where_they_are_embedded_as_others(dtype, tokenizer):
    """Before and after weights have changed, when the model is not probed again."""
    model = llava().to(dtype)
    text = Text.from_tokens((7, 304, 9, 11), LM(model, tokenizer))
    assert_equals_plain(model, [text])
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    assert_equals_plain(model, [text])


def test_tokens_that_stand_for_a_sound_are_refused(tokenizer):
    model = granite_speech()
    lm = LM(model, tokenizer)
    texts = [Text.from_tokens(ids, lm) for ids in ((7, 99, 9, 11), (7, 99, 307), (7, 309))]
    evaluate(texts)
    assert_equals_plain(model, texts)
    with pytest.raises(TokenIdError, match="308 stands for an image, a video or a sound"):
        Text.from_tokens((7, 308, 9, 11), lm).logits  # noqa: B018
    with pytest.raises(TokenIdError, match="308 stands for an image, a video or a sound"):
        token_logprobs(lm, torch.tensor([[7, 308, 9, 11]]))
    assert_equals_plain(model, [Text.from_tokens((7, 9), lm)])


OPTIONS = {"greedy": {}, "sampled": {"do_sample": True, "seed": 3, "temperature": 3.0}, "beams": {"num_beams": 3}}


@pytest.mark.parametrize("how", OPTIONS)
def test_generation_chooses_no_token_that_stands_for_a_sound(how, tokenizer):
    """However probable it is: the token's logit is a hundred times the largest otherwise."""
    model = granite_speech()
    text = Text.from_tokens((7, 99, 9, 11), LM(model, tokenizer))
    logits = text.logits
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[308] = head[logits.argmax()] * logits.max().sign() * 100
    assert int(plain_logits(model, text.tokens)[-1].argmax()) == 308
    made = text.generate(max_new_tokens=6, **OPTIONS[how])
    assert len(made.completion_tokens) == 6
    assert 308 not in made.completion_tokens
    if how != "sampled":
        ids = ids_for(model, text.tokens)
        options = {"max_new_tokens": 6, "suppress_tokens": [308], "do_sample": False, **OPTIONS[how]}
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert made.tokens == tuple(expected[0].tolist())


@pytest.mark.parametrize("num_scored", [200, 400])
def test_ids_that_are_not_both_embedded_and_scored_are_refused_and_not_generated(num_scored, tokenizer):
    model = FAMILIES["llama"]()
    model.lm_head = on_test_device(nn.Linear(model.config.hidden_size, num_scored))
    last = min(num_scored, VOCAB_SIZE) - 1
    lm = LM(model, tokenizer)
    text = Text.from_tokens((7, last, 9), lm)
    assert_equals_plain(model, [text])
    with pytest.raises(TokenIdError, match=f"the model's embedding and head have ids 0 to {last}"):
        Text.from_tokens((7, last + 1), lm).token_logprobs  # noqa: B018
    with torch.no_grad():
        model.lm_head.bias[-1] = 100.0  # the most probable in any text, and rounded to less than the tolerance
    made = text.generate(max_new_tokens=4)
    assert_equals_plain(model, [made])
    assert (num_scored - 1 in made.completion_tokens) == (num_scored <= VOCAB_SIZE)


# past_key_values


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_continues_from_past_key_values(family, tokenizer):
    model = FAMILIES[family]()
    lm = LM(model, tokenizer, max_tokens_per_forward=16)
    text = forest_for(family, lm)[1]
    next_ids = plain_ids(tokenizer, " and it")
    with torch.no_grad():
        cache = text.model_repr.past_key_values()
        logits = model(input_ids=ids_for(model, next_ids), past_key_values=cache).logits[0]
    plain = plain_logits(model, [*text.tokens, *next_ids])[-len(next_ids) :]
    assert_close(logits, plain)


def test_a_cache_of_another_form_is_refused(tokenizer):
    """The model's own has compressed keys and values."""
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    model = random_model(DeepseekV3Config(**{**TINY, "num_key_value_heads": 4}, **ranks, first_k_dense_replace=2))
    text = Text("The cat sat on the mat.", LM(model, tokenizer))
    assert_is_as_plain(model, tokenizer, [text])
    with pytest.raises(UnsupportedModelError, match="cache of DeepseekV3ForCausalLM does not hold the keys and values"):
        text.model_repr.past_key_values()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mistral_sliding"])
def test_generation_continues_from_past_key_values_and_changes_nothing(family, tokenizer):
    model = FAMILIES[family]()
    lm = LM(model, tokenizer, max_tokens_per_forward=16)
    texts = forest(lm)
    evaluate(texts)
    held = lm.stats.bytes_held
    for text in (texts[0], texts[1]):
        ids = ids_for(model, [*text.tokens, *plain_ids(tokenizer, " and it")])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
        plain = model.generate(ids, **options)
        cache = text.model_repr.past_key_values()
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), plain)
        assert cache.get_seq_length() == ids.shape[1] + 7  # the cache grew: all but the last token were forwarded
    # A new branch sees the same keys and values as before.
    before = lm.stats
    branch = texts[1] + " and it"
    assert_is_as_plain(model, tokenizer, [*texts, branch])
    assert (lm.stats - before).tokens_computed == len(branch.tokens) - len(texts[1].tokens)
    assert before.bytes_held == held


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mistral_sliding"])
def test_a_text_itself_is_generated_on_from_a_cache_of_all_but_its_last_token(family, tokenizer):
    """Something must be left to forward: given a cache of all its ids, `generate` forwards all of them once more."""
    model = FAMILIES[family]()
    lm = LM(model, tokenizer)
    text = forest(lm)[0]
    evaluate(text)
    before = lm.stats
    ids = ids_for(model, text.tokens)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    cache = Text.from_tokens(text.tokens[:-1], lm).model_repr.past_key_values()
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))
    assert (lm.stats - before).tokens_computed == 0
