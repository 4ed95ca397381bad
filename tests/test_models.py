"""Every family of models gives the numbers of its plain call, or is refused by an error that names the reason.

Each model of tiny_models evaluates the same forest, in one pass and in many, and every row of it is compared with the
plain call. Then the edges: windows, positions a model was not made for, low precision, heads, wrappers, and caches
handed to `model(...)` and `model.generate(...)`.
"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    Qwen2MoeConfig,
)

from backprompt import LM, Text, TextTooLongError, evaluate
from reference import plain_ids, plain_logits, plain_token_logprobs
from tiny_models import FAMILIES, LONGROPE_ORIGINAL_POSITIONS, MAX_POSITIONS, SLIDING_WINDOW, VOCAB_SIZE
from tiny_tokenizers import byte_level_bpe

ATOL = {
    # The same products summed in another order. Largest gap measured over all families: 1.0e-5, logits up to 10.
    torch.float32: 5e-5,
    # Measured: 5e-15. The log-probabilities are float32 on both sides, from logits that differ by less.
    torch.float64: 1e-12,
    # Eight bits: logits of 4 to 8 are 2 ** -5 apart, and each layer rounds a residual that differs already. Measured
    # over the models below: 0.16; the float32 model is as far from the plain call as from ours, which is tested too.
    torch.bfloat16: 0.3,
    # Eleven bits, an eighth of the above. Measured: 0.018.
    torch.float16: 0.04,
}

PASS_SIZES = [None, 16]  # one pass for all of a forest; and many, in which spans are cut and tiles are split


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_bpe()


def random_model(config):
    """A model of this configuration whose weights are as far from their constructor's as those of tiny_models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


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
    """Eight texts of 7 to 16 tokens: what fits a model whose positions change their meaning at 32."""
    root = Text("Question: 12", lm)
    leaves = [root + twig + leaf for twig in (" cats", " + 3") for leaf in (" sat", " on", "?")]
    return [root, *leaves, Text("One alone.", lm)]


def forest_for(family, lm):
    return short_forest(lm) if family == "phi3_longrope" else forest(lm)


def assert_equals_plain(model, tokenizer, texts, atol):
    """All that a text says of itself is what the plain call says of its string."""
    evaluate(texts)
    for text in texts:
        ids = plain_ids(tokenizer, text.string)
        assert text.tokens == tuple(ids)
        logits = plain_logits(model, ids)
        close = {"rtol": 0, "atol": atol, "msg": lambda gap, text=text: f"{text!r}: {gap}"}
        torch.testing.assert_close(text.logits, logits[-1], **close)
        torch.testing.assert_close(text.model_repr.all_logits(), logits, **close)
        logprobs = plain_token_logprobs(model, ids)
        torch.testing.assert_close(text.token_logprobs, logprobs, equal_nan=True, **{**close, "atol": max(atol, 5e-5)})


# Families and precision


@pytest.mark.parametrize("max_tokens", PASS_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_its_plain_call(family, max_tokens, tokenizer):
    model = FAMILIES[family]()
    lm = LM(model, tokenizer, max_tokens_per_forward=max_tokens)
    texts = forest_for(family, lm)
    assert_equals_plain(model, tokenizer, texts, ATOL[torch.float32])

    distinct = {text.tokens[:end] for text in texts for end in range(1, len(text.tokens) + 1)}
    assert lm.stats.tokens_computed == len(distinct)  # every beginning that a text has, once
    assert lm.stats.forward_passes >= (1 if max_tokens is None else len(distinct) / max_tokens)


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
    assert_equals_plain(model, tokenizer, texts, ATOL[dtype])

    ours, plain = [], []
    for text in texts:
        truth = plain_logits(exact, text.tokens)
        ours.append((text.model_repr.all_logits() - truth).square().mean())
        plain.append((plain_logits(model, text.tokens) - truth).square().mean())
    assert torch.stack(ours).mean().sqrt() < 1.2 * torch.stack(plain).mean().sqrt()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "mistral_sliding"])
def test_float64_equals_the_plain_call(family, tokenizer):
    model = FAMILIES[family]().double()
    texts = forest(LM(model, tokenizer, max_tokens_per_forward=16))
    assert_equals_plain(model, tokenizer, texts, ATOL[torch.float64])


def test_a_model_whose_own_attention_rounds_to_float32_in_float64_is_not_refused(tokenizer):
    """Gemma 2's plain softmax is float32 whatever its dtype; ours is float64, and closer to the truth."""
    model = FAMILIES["gemma2"]().double()
    assert_equals_plain(model, tokenizer, forest(LM(model, tokenizer)), atol=1e-5)


# Windows and positions


@pytest.mark.parametrize("max_tokens", PASS_SIZES)
@pytest.mark.parametrize("family", ["mistral_sliding", "gemma2"])
@pytest.mark.parametrize("window", [1, 2, SLIDING_WINDOW, 30, 1000])
def test_sliding_windows_count_positions_of_the_text(family, window, max_tokens, tokenizer):
    """Texts of 3 to 83 tokens: shorter than the window, as long as it, and many times as long."""
    model = random_model(config_like(family, sliding_window=window))
    lm = LM(model, tokenizer, max_tokens_per_forward=max_tokens)
    texts = [*forest(lm), Text("it", lm), Text("The cat", lm), Text("The cat", lm) + " sat", Text("The", lm) + "re"]
    assert_equals_plain(model, tokenizer, texts, ATOL[torch.float32])


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
    longest = Text.from_tokens(ids[:original], lm)
    assert_close_rows(model, [longest, *short_forest(lm)])

    too_long = Text.from_tokens(ids[: original + 1], lm)
    message = rf"33 tokens.* {original} positions.*{kind} rotary scaling.*Shorten the text by 1\."
    with pytest.raises(TextTooLongError, match=message):
        evaluate([longest, too_long])
    # Why: the first row alone is another one in a call that has a longer position.
    gap = plain_logits(model, too_long.tokens)[0] - plain_logits(model, longest.tokens)[0]
    assert gap.abs().max() > 1e-2 or kind == "dynamic"  # a first position is not rotated, whatever the frequencies
    gap = plain_logits(model, too_long.tokens)[20] - plain_logits(model, longest.tokens)[20]
    assert gap.abs().max() > 1e-2


def assert_close_rows(model, texts):
    """For texts of token ids, which no string can be asked for."""
    for text in texts:
        logits = text.model_repr.all_logits()
        torch.testing.assert_close(logits, plain_logits(model, text.tokens), rtol=0, atol=ATOL[torch.float32])


# Experts, heads


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        Qwen2MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=32
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_mixtures_of_experts_equal_their_plain_call(config, tokenizer):
    model = random_model(tiny(config))
    texts = forest(LM(model, tokenizer, max_tokens_per_forward=16))
    assert_equals_plain(model, tokenizer, texts, ATOL[torch.float32])


def tiny(config):
    """The configuration with the sizes of tiny_models, in place."""
    config.update(
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_POSITIONS,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
    )
    return config
