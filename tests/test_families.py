"""What single families need, so that a packed pass computes what their plain call does.

Llama 4 scales queries by rows of the call, RoBERTa counts positions behind its padding id, BART counts rows, and
DeepSeek V3.2 chooses keys. Gemma 4 slices its masks, and Chameleon's head asks for more than hidden states. Last, the
most used families from end to end, a line each.
"""

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    DeepseekV32Config,
    Gemma4TextConfig,
    GlmMoeDsaConfig,
    Llama4TextConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    WhisperConfig,
    WhisperForCausalLM,
)

from backprompt import LM, Text, TextTooLongError, TokenIdError, UnsupportedModelError, evaluate
from backprompt.model.skeleton import decoder_of
from backprompt.training import token_logprobs
from comparing import assert_close, assert_equals_plain
from devices import on_test_device
from families.checks import check
from families.models import CAUSAL, MEDIA, build
from reference import plain_token_logprobs
from test_models import PASS_SIZES, TINY, forest, random_model, short_forest
from tiny_models import MAX_POSITIONS, VOCAB_SIZE

# Positions


def llama4(**changes):
    """One layer of chunked attention, one without positions, whose queries change with every fourth position."""
    sizes = {**TINY, "intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 2, "no_rope_layers": [1, 0]}
    return random_model(Llama4TextConfig(**sizes, floor_scale=4, attn_scale=1.5, **changes))


def roberta(**changes):
    """Positions begin behind the padding id, which is 3."""
    sizes = {**TINY, "pad_token_id": 3, "max_position_embeddings": MAX_POSITIONS + 4}
    return random_model(RobertaConfig(**sizes, is_decoder=True, **changes), RobertaForCausalLM)


def bart():
    """A decoder that hands its table of positions those of the rows of its call, whatever it is given."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    config = BartConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_POSITIONS, **sizes)
    return random_model(config, BartForCausalLM)


POSITIONS = {"llama4": llama4, "roberta": roberta, "bart": bart}


@pytest.mark.parametrize("max_tokens", PASS_SIZES)
@pytest.mark.parametrize("family", POSITIONS)
def test_positions_are_those_of_the_text(family, max_tokens, tokenizer):
    model = POSITIONS[family]()
    texts = forest(LM(model, tokenizer, max_tokens_per_forward=max_tokens))
    evaluate(texts)
    assert_equals_plain(model, texts)


@pytest.mark.parametrize("family", POSITIONS)
def test_gradients_see_positions_of_the_text(family, tokenizer):
    model = POSITIONS[family]()
    ids = torch.arange(10, 34).reshape(2, 12)
    ids[1, :7] = ids[0, :7]
    found = token_logprobs(LM(model, tokenizer), ids).logprobs.detach()
    for row in (0, 1):
        assert_close(found[row, 1:], plain_token_logprobs(model, ids[row].tolist())[1:])


@pytest.mark.parametrize("family", POSITIONS)
def test_a_model_in_host_memory_uses_positions_of_the_text(family, tokenizer):
    """Hooks of accelerate call the forward that a module had when they were put there."""
    plain, model = POSITIONS[family](), POSITIONS[family]()
    for name, part in model.named_modules():
        if name.endswith(("self_attn", "position_embeddings", "embed_positions")):
            cpu_offload(part, torch.device("cpu"))
    texts = forest(LM(model, tokenizer))
    evaluate(texts)
    assert_equals_plain(plain, texts)


def test_a_forward_of_ones_own_where_positions_are_changed_is_refused(tokenizer):
    model = llama4()
    attention = model.model.layers[1].self_attn
    attention.forward = lambda *args, forward=attention.forward, **keywords: forward(*args, **keywords)
    with pytest.raises(UnsupportedModelError, match="Llama4TextAttention of the model has a forward that was replaced"):
        LM(model, tokenizer)


def test_the_padding_id_takes_no_position_and_is_refused(tokenizer):
    lm = LM(roberta(), tokenizer)
    with pytest.raises(TokenIdError, match="Token id 3 is the model's padding, which takes no position"):
        Text.from_tokens((7, 3, 9), lm).logits  # noqa: B018
    with pytest.raises(TokenIdError, match="Token id 3 is the model's padding"):
        token_logprobs(lm, torch.tensor([[7, 3, 9]]))
    assert_equals_plain(roberta(), [Text.from_tokens((7, 9), lm)])


@pytest.mark.parametrize("beyond", [False, True])
def test_positions_end_where_the_table_does(beyond, tokenizer):
    whisper = WhisperConfig(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_target_positions=MAX_POSITIONS,
        pad_token_id=0,
    )
    for model in (roberta(), random_model(whisper, WhisperForCausalLM)):
        lm = LM(model, tokenizer, beyond_trained_length=beyond)
        longest = Text.from_tokens([10] * MAX_POSITIONS, lm)
        assert_equals_plain(model, [longest])
        with pytest.raises(TextTooLongError, match=f"the model has {MAX_POSITIONS} positions: its position embeddings"):
            (longest + "!").logits  # noqa: B018


# Chosen keys

MLA = {
    **TINY,
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1},
    **{"topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "index_n_heads": 2, "index_head_dim": 16},
}


@pytest.mark.parametrize("max_tokens", PASS_SIZES)
@pytest.mark.parametrize("config", [DeepseekV32Config, GlmMoeDsaConfig])
def test_an_indexer_is_right_up_to_the_number_of_keys_that_it_chooses(config, max_tokens, tokenizer):
    model = random_model(config(**MLA, index_topk=20))
    lm = LM(model, tokenizer, max_tokens_per_forward=max_tokens, beyond_trained_length=True)
    texts = [*short_forest(lm), Text.from_tokens(range(10, 30), lm)]
    assert max(len(text.tokens) for text in texts) == 20
    evaluate(texts)
    assert_equals_plain(model, texts)
    with pytest.raises(TextTooLongError, match="the model has 20 positions: in longer texts its indexer chooses 20"):
        (texts[-1] + "!").logits  # noqa: B018


def test_an_indexer_chooses_among_the_tokens_of_all_parts_of_a_group(tokenizer):
    """A group of equally long parts has half as many positions as tokens."""
    lm = LM(random_model(DeepseekV32Config(**MLA, index_topk=20)), tokenizer)
    start, end, part = (Text.from_tokens(range(*ids), lm) for ids in ((10, 14), (20, 22), (30, 37)))
    text = start + (part | part) + end
    assert len(text.tokens) == 20
    assert text.logits.isfinite().all()
    for longer in (text + "!", start + (part | part + "!") + end):
        with pytest.raises(TextTooLongError, match="has 21 tokens, but the model has 20 positions: in longer texts"):
            longer.logits  # noqa: B018
    with pytest.raises(TextTooLongError, match="Ask for at most 0"):
        text.generate(max_new_tokens=1)


# Masks


@pytest.mark.parametrize("max_tokens", PASS_SIZES)
def test_layers_that_share_keys_and_slice_their_masks(max_tokens, tokenizer):
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {**TINY, "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
    config = Gemma4TextConfig(
        **sizes,
        layer_types=kinds,
        num_kv_shared_layers=2,
        sliding_window=8,
        vocab_size_per_layer_input=VOCAB_SIZE,
    )
    model = random_model(config, AutoModelForCausalLM.from_config)
    texts = forest(LM(model, tokenizer, max_tokens_per_forward=max_tokens))
    evaluate(texts)
    assert_equals_plain(model, texts)


# Heads below which lies more than the decoder


@pytest.mark.parametrize("make", [bart, roberta, llama4])
def test_the_users_configuration_stays_as_it_is(make, tokenizer):
    model = make()
    before = [vars(config).copy() for config in (model.config, decoder_of(model).config)]
    Text.from_tokens((7, 9, 11), LM(model, tokenizer)).logits  # noqa: B018
    assert [vars(config) for config in (model.config, decoder_of(model).config)] == before


@pytest.mark.parametrize(("family", "dtype"), [("chameleon", torch.bfloat16), ("mllama", torch.float32)])
def test_logits_of_weights_in_bfloat16(family, dtype, tokenizer):
    """Mllama's are in float32, though no better. Chameleon's head asks the part below for the tokens of images."""
    model = on_test_device(build(family, {**MEDIA, **CAUSAL}[family]).bfloat16())
    texts = forest(LM(model, tokenizer))
    evaluate(texts)
    assert texts[0].logits.dtype == dtype
    assert_equals_plain(model, texts)


# Layers that keep a state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["jamba", "minimax"])
def test_layers_with_a_state_go_by_levels_though_their_weights_do_not_show_it(family, dtype, tokenizer):
    """All weights are 0: what the layers mix is nothing, before the first step of a training."""
    model = on_test_device(build(family, CAUSAL[family]).to(dtype))
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    lm = LM(model, tokenizer)
    texts = [Text.from_tokens((7, 9, 11, *end), lm) for end in ((1, 2, 3), (4, 5, 6))]
    assert_equals_plain(model, texts)
    assert "by levels" in lm.stats.kernel
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    assert_equals_plain(model, texts)


def test_compressed_keys_are_refused_though_the_texts_of_the_probe_are_shorter_than_a_block(tokenizer):
    model = build("deepseek_v4", CAUSAL["deepseek_v4"])
    with pytest.raises(UnsupportedModelError, match="DeepseekV4HCACompressor"):
        Text.from_tokens((7, 9, 11), LM(on_test_device(model), tokenizer)).logits  # noqa: B018


# Classes that take no texts


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("musicgen", "MusicgenForCausalLM does not have a single table of token embeddings"),
        (
            "gemma4_unified_assistant",
            "cannot be called with token ids alone: ValueError: .* shared_kv_states cannot be",
        ),
        ("diffusion_gemma", "returns logits of the shape .* so they are not the logits of next tokens"),
        ("paligemma", "PaliGemmaForConditionalGeneration lets tokens attend to later tokens"),
    ],
)
def test_a_class_that_is_no_causal_model_of_texts_is_refused(family, reason, tokenizer):
    model = on_test_device(build(family, {**MEDIA, **CAUSAL}[family]))
    with pytest.raises(UnsupportedModelError, match=reason):
        Text.from_tokens((7, 9, 11), LM(model, tokenizer)).logits  # noqa: B018


class Flipping(LlamaForCausalLM):
    """One row of a longer call is another, as where the choice of an expert flips with the last bit."""

    def forward(self, input_ids=None, **keywords):
        output = super().forward(input_ids=input_ids, **keywords)
        if input_ids is not None and input_ids.shape[1] > 4:
            output.logits[:, 1] += 1
        return output


def test_one_row_that_differs_is_not_taken_for_later_tokens(tokenizer):
    model = on_test_device(build("llama", CAUSAL["llama"]))
    model.__class__ = Flipping
    with pytest.raises(UnsupportedModelError, match="Flipping gives other logits in a packed pass than in its plain"):
        Text.from_tokens((7, 9, 11), LM(model, tokenizer)).logits  # noqa: B018


def test_later_tokens_are_noticed_in_low_precision(tokenizer):
    model = on_test_device(build("paligemma", MEDIA["paligemma"]).bfloat16())
    with pytest.raises(UnsupportedModelError, match="lets tokens attend to later tokens"):
        Text.from_tokens((7, 9, 11), LM(model, tokenizer)).logits  # noqa: B018


# Most used families, from end to end; `make families` does so with all

MOST_USED = [
    *("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gemma4", "mistral", "mixtral", "phi3"),
    *("gpt_oss", "deepseek_v3", "deepseek_v32", "llama4", "glm4_moe", "olmo2", "smollm3", "gpt2", "gpt_neox", "opt"),
]


@pytest.mark.parametrize("family", MOST_USED)
def test_the_most_used_families_are_right(family, capsys):
    verdict = check(family, CAUSAL[family], is_quick=True)
    with capsys.disabled():
        print(f"\n{verdict.line()}", end="")
    assert verdict.status == "RIGHT"
