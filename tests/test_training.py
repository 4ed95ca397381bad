"""Scores of trainers' padded batches without gradients: the plain call's, row by row, each distinct token once."""

import copy
import gc
import io
import weakref
from dataclasses import replace
from functools import cache, partialmethod
from types import MethodType

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from training_batches import NUM_IDS, Batch, Plain, batches, group, ungrouped

import backprompt.training.models
from backprompt import LM, Text
from backprompt.errors import NonFiniteError, TextTooLongError, TokenIdError, UnsupportedModelError
from backprompt.model.linear import training_failure
from backprompt.training import token_logprobs
from comparing import assert_close
from devices import DEVICE, known_to_torch
from quick import up_to
from reference import ATOL
from tiny_models import build

LAW_FAMILIES = ["gpt2", "llama", "gemma2", "gpt_oss", "mistral_sliding", "opt"]
RESULTS = ["logprobs", "entropies", "top_logprobs", "top_ids", "given_logprobs"]


@cache
def family(name: str):
    return build(name)


@cache
def bytes_of_a_token(tokenizer) -> int:
    session = LM(family("llama"), tokenizer).session
    with session.exclusive():
        return session.current().computation.token_bytes


def given_ids(batch: Batch, k: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, NUM_IDS, (len(batch.rows), batch.num_kept, k), generator=generator)
    scored = torch.zeros(ids.shape[:2], dtype=torch.bool)
    for row, column, *_ in batch.targets():
        scored[row, column] = True
    ids[~scored] = -100  # anything may stand at padding
    return ids.to(DEVICE)


def assert_is_plain(found, model, batch: Batch, temperature: float = 1.0) -> None:
    """All that was asked for is the plain call's."""
    plain = Plain(model, batch, temperature)
    assert_close(found.logprobs, plain.logprobs())
    if found.entropies is not None:
        assert_close(found.entropies, plain.entropies())
    if found.top_logprobs is not None:
        assert_close(found.top_logprobs, plain.top_logprobs(found.top_logprobs.shape[2]))
        assert_close(plain.logprobs_at(found.top_ids), found.top_logprobs)
    if found.given_logprobs is not None:
        assert_close(found.given_logprobs, plain.logprobs_at(given_ids(batch, found.given_logprobs.shape[2])))


# Laws


@pytest.mark.parametrize("name", LAW_FAMILIES)
@given(batch=batches(), pad=st.sampled_from([0, -100, 10**6]), max_tokens=st.sampled_from([None, 1, 7]))
@settings(max_examples=up_to(12))
def test_log_probabilities_are_those_of_the_plain_call(name, batch, pad, max_tokens):
    ids, mask = batch.tensors(pad)
    found = token_logprobs(family(name), ids, mask, batch.kept, max_tokens_per_forward=max_tokens)
    assert_is_plain(found, family(name), batch)
    assert [getattr(found, result) for result in RESULTS[1:]] == [None] * 4
    account = found.account
    assert account.tokens_given == sum(map(len, batch.rows))
    assert account.tokens_distinct == len(batch.distinct())
    assert account.tokens_forwarded == len(batch.forwarded())


@pytest.mark.parametrize("name", LAW_FAMILIES)
@given(
    batch=batches(),
    temperature=st.sampled_from([1.0, 0.7, 2]),
    entropy=st.booleans(),
    top_k=st.sampled_from([None, 1, 5, NUM_IDS]),
    with_given=st.booleans(),
    max_tokens=st.sampled_from([None, 1, 7]),
)
@settings(max_examples=up_to(12))
def test_distributions_are_those_of_the_plain_call(
    name, batch, temperature, entropy, top_k, with_given, max_tokens, tokenizer
):
    ids, mask = batch.tensors()
    lm = LM(family(name), tokenizer, max_tokens_per_forward=max_tokens)
    options = {"temperature": temperature, "entropy": entropy, "top_k": top_k}
    token_ids = given_ids(batch) if with_given else None
    found = token_logprobs(lm, ids, mask, batch.kept, token_ids=token_ids, **options)
    assert_is_plain(found, family(name), batch, temperature)
    present = [getattr(found, result) is not None for result in RESULTS]
    assert present == [True, entropy, top_k is not None, top_k is not None, with_given]
    assert found.account.tokens_forwarded == lm.stats.tokens_computed == len(batch.forwarded())
    assert lm.stats.logit_rows == len(batch.predicting())


@given(batch=batches(), temperature=st.sampled_from([1.0, 2.0]), share=st.sampled_from([0.3, 0.6]), data=st.data())
@settings(max_examples=up_to(25))
def test_results_are_the_same_whatever_is_held(batch, temperature, share, data, tokenizer):
    """Rows are dropped within the call, moved to the second pool or not, or were computed before."""
    model = family("llama")
    token_bytes = bytes_of_a_token(tokenizer)
    budget = int(share * len(batch.forwarded())) * token_bytes
    host = data.draw(st.sampled_from([0, budget, 10 * budget]))
    max_tokens = data.draw(st.integers(1, 9))
    lm = LM(model, tokenizer, memory_bytes=budget, host_memory_bytes=host, max_tokens_per_forward=max_tokens)
    ids, mask = batch.tensors()
    for num_calls in (1, 2):
        found = token_logprobs(lm, ids, mask, batch.kept, temperature=temperature, top_k=2, entropy=True)
        assert_is_plain(found, model, batch, temperature)
        assert lm.stats.logit_rows == num_calls * len(batch.predicting())
    assert_is_plain(token_logprobs(lm, ids, mask, batch.kept), model, batch)


@given(batch=batches(), data=st.data())
@settings(max_examples=up_to(25))
def test_order_of_rows_and_the_side_of_padding_do_not_matter(batch, data):
    ids, mask = batch.tensors()
    found = token_logprobs(family("gpt2"), ids, mask, temperature=2.0)
    order = data.draw(st.permutations(range(len(batch.rows))))
    flush = Batch([batch.rows[row] for row in order], [0] * len(order), batch.width, None)
    moved = token_logprobs(family("gpt2"), *flush.tensors(), temperature=2.0)
    for place, row in enumerate(order):
        left, length = batch.left[row], len(batch.rows[row])
        assert_close(moved.logprobs[place, :length], found.logprobs[row, left : left + length])


# Work


def test_scores_that_an_lm_keeps_are_not_computed_again(tokenizer):
    lm, batch = LM(family("llama"), tokenizer), group(4, 20, 6)
    ids, mask = batch.tensors()
    first = token_logprobs(lm, ids, mask, 6)
    assert first.account.tokens_forwarded == lm.stats.tokens_computed == 20 + 4 * 5
    assert lm.stats.logit_rows == 1 + 4 * 5
    before = lm.stats
    again = token_logprobs(lm, ids, mask, 6)
    assert_close(again.logprobs, first.logprobs, atol=0)
    work = lm.stats - before
    assert (again.account.tokens_forwarded, work.tokens_computed, work.logit_rows) == (0, 0, 0)
    lm.token_logprobs([Text.from_tokens(own, lm) for own in batch.rows], [20] * 4)  # texts share what rows have left
    work = lm.stats - before
    assert (work.tokens_computed, work.logit_rows) == (0, 0)


def test_rows_of_a_model_are_not_held_between_calls():
    model, (ids, mask) = build("llama"), group(4, 20, 6).tensors()
    for options in ({}, {"entropy": True}):
        for _ in range(2):
            found = token_logprobs(model, ids, mask, 6, **options)
            assert found.account.tokens_forwarded == 20 + 4 * 5
            lm = backprompt.training.models.scorer_of(model, None).lm
            assert (lm.stats.bytes_held, lm.stats.result_bytes_held, lm.stats.host_bytes_held) == (0, 0, 0)


def test_rows_without_a_common_beginning_are_forwarded_whole():
    batch = ungrouped(group(4, 20, 6))
    found = token_logprobs(family("llama"), *batch.tensors(), 6)
    assert found.account.tokens_given == found.account.tokens_distinct == 4 * 26
    assert found.account.tokens_forwarded == 4 * 25
    assert_is_plain(found, family("llama"), batch)


def test_the_head_is_applied_in_slices(tokenizer, monkeypatch):
    batch, lm = group(4, 20, 6), LM(family("llama"), tokenizer)
    token_logprobs(lm, *Batch([(5, 6)], [0], 2, None).tensors())  # the probe applies the head, too
    executor, sizes = lm.session.evaluator.executor, []
    apply = executor.logits
    monkeypatch.setattr(executor, "logits", lambda hidden: sizes.append(len(hidden)) or apply(hidden))
    monkeypatch.setattr(type(executor), "rows_in_a_slice", 8)
    found = token_logprobs(lm, *batch.tensors(), 6, entropy=True)
    assert sizes == [8, 8, 5]
    assert_is_plain(found, family("llama"), batch)


def test_batches_without_targets_compute_nothing():
    for batch in (Batch([], [], 0, None), Batch([(), (5,)], [0, 1], 3, None), Batch([(5, 6, 7)], [0], 6, 3)):
        found = token_logprobs(family("llama"), *batch.tensors(), batch.kept, top_k=2, entropy=True)
        assert found.account.tokens_forwarded == 0
        assert found.logprobs.shape == found.entropies.shape == (len(batch.rows), batch.num_kept)
        assert found.top_ids.shape == (len(batch.rows), batch.num_kept, 2)
        assert not found.logprobs.any()


# Tensors


def test_results_are_float32_on_the_device_of_the_batch():
    batch = group(2, 4, 3)
    for dtype in (torch.float64, torch.bfloat16):
        model = build("llama").to(dtype)
        ids, mask = (tensor.cpu() for tensor in batch.tensors())
        found = token_logprobs(
            model, ids, mask, 3, temperature=0.9, entropy=True, top_k=2, token_ids=given_ids(batch).cpu()
        )
        tensors = {result: getattr(found, result) for result in RESULTS}
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            name: torch.int64 if name == "top_ids" else torch.float32 for name in RESULTS
        }
        assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
        assert not any(tensor.requires_grad for tensor in tensors.values())
        expected = Plain(model, batch, 0.9)
        torch.testing.assert_close(found.logprobs, expected.logprobs(), rtol=0, atol=ATOL.get(dtype, 1e-5) + 1e-6)
    assert token_logprobs(family("llama"), *batch.tensors()).logprobs.device.type == DEVICE.type


def test_rows_that_nothing_predicts_are_zero_and_not_nan():
    found = token_logprobs(
        family("llama"), *Batch([(5, 6), (), (7,)], [1, 0, 0], 3, None).tensors(), entropy=True, top_k=1
    )
    for tensor in (found.logprobs, found.entropies, found.top_logprobs[..., 0]):
        assert tensor.ne(0).tolist() == [[False, False, True], [False] * 3, [False] * 3]


def test_masked_logits_have_no_part_in_entropies():
    model = build("opt")
    model.lm_head.bias = nn.Parameter(torch.zeros(NUM_IDS, device=DEVICE))
    with torch.no_grad():
        model.lm_head.bias[:300] = -torch.inf
    batch = Batch([(1, 2, 310), (1, 2, 5)], [0, 0], 3, None)
    found = token_logprobs(model, *batch.tensors(), entropy=True)
    plain = Plain(model, batch)
    assert_close(found.entropies, plain.entropies())
    assert found.logprobs.isneginf().tolist() == [[False, True, False], [False, True, True]]


# The model


def disable_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_active_dropout_is_refused():
    model, (ids, mask) = build("gpt2"), group(2, 3, 2).tensors()
    expected = token_logprobs(model, ids, mask).logprobs
    with pytest.raises(UnsupportedModelError, match=r"'transformer.drop' drops with probability 0\.1.*model\.eval\(\)"):
        token_logprobs(model.train(), ids, mask)
    assert_close(token_logprobs(disable_dropout(model), ids, mask).logprobs, expected, atol=0)
    assert model.training
    llama = build("llama").train()
    token_logprobs(llama, ids, mask)
    for name in ("attention_dropout", "hidden_dropout", "residual_dropout"):
        setattr(llama.model.layers[1].self_attn, name, 0.25)
        with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.self_attn' drops with probability 0\.25"):
            token_logprobs(llama, ids, mask)
        setattr(llama.model.layers[1].self_attn, name, 0.0)
    llama.model.layers[1].self_attn.attention_dropout = 0.25
    token_logprobs(llama.eval(), ids, mask)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("residual_dropout", 0.1, r"drops with probability 0\.1"),
        ("resid_pdrop", 0.1, r"drops with probability 0\.1"),
        ("router_jitter_noise", 0.01, r"adds noise \(router_jitter_noise = 0\.01\)"),
        ("dropout", 0, None),
        ("has_dropout", True, None),
    ],
)
def test_randomness_in_an_attribute_is_refused_too(name, value, words):
    """Starcoder2 and Doge drop with a number of their own, and Mixtral's and PhiMoE's routers add noise."""
    model, (ids, mask) = build("llama").train(), group(2, 3, 2).tensors()
    setattr(model.model.layers[0], name, value)
    for requires_grad in (False, True):
        if words is None:
            token_logprobs(model, ids, mask, requires_grad=requires_grad)
        else:
            with pytest.raises(UnsupportedModelError, match=rf"'model\.layers\.0' {words}"):
                token_logprobs(model, ids, mask, requires_grad=requires_grad)


@known_to_torch
def test_a_step_of_training_changes_the_numbers():
    model, batch = build("llama"), replace(group(3, 6, 4), kept=None)
    before = token_logprobs(model, *batch.tensors()).logprobs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=batch.tensors()[0]).logits.sum().backward()
    optimizer.step()
    found = token_logprobs(model, *batch.tensors())
    assert_is_plain(found, model, batch)
    assert (found.logprobs - before).abs().max() > 0.01


def test_a_model_keeps_its_lm(monkeypatch):
    made = []
    monkeypatch.setattr(LM, "__init__", partialmethod(_noting, made, LM.__init__))
    model, other, (ids, mask) = build("llama"), build("llama", seed=1), group(2, 3, 2).tensors()
    for _ in range(2):
        token_logprobs(model, ids, mask)
        token_logprobs(other, ids, mask)
    assert len(made) == 2
    passes = []
    for max_tokens in (None, 3, None):  # trainers give another one with each batch
        before = made[0].stats
        token_logprobs(model, ids, mask, max_tokens_per_forward=max_tokens)
        passes.append((made[0].stats - before).forward_passes)
    assert (len(made), passes) == (2, [1, 2, 1])
    assert_close(token_logprobs(copy.copy(model), ids, mask).logprobs, token_logprobs(model, ids, mask).logprobs)


def test_a_models_lm_takes_its_share_of_the_memory_that_is_free_at_the_call(monkeypatch):
    model, batch = build("llama"), group(4, 20, 6)
    memory = backprompt.training.models.scorer_of(model, None).lm.session.evaluator.memory
    for budget in (100_000, 10_000, 50_000):
        monkeypatch.setattr(backprompt.training.models, "default_bytes", lambda model, budget=budget: budget)
        assert_is_plain(token_logprobs(model, *batch.tensors(), 6, max_tokens_per_forward=8), model, batch)
        assert memory.max_bytes == budget


def _noting(self, made: list, init, *args, **options) -> None:
    made.append(self)
    init(self, *args, **options)


def test_copies_and_pickles_of_a_model_have_no_lm():
    model, (ids, mask) = build("llama"), group(2, 3, 2).tensors()
    expected = token_logprobs(model, ids, mask).logprobs
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    for made in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            made.lm_head.weight.mul_(2)
        assert (token_logprobs(made, ids, mask).logprobs - expected).abs().max() > 0.01
    assert_close(token_logprobs(model, ids, mask).logprobs, expected, atol=0)
    assert set(model.state_dict()) == set(build("llama").state_dict())


def test_a_model_is_freed_with_its_lm():
    model = build("llama")
    token_logprobs(model, *group(2, 3, 2).tensors())
    alive = weakref.ref(model), weakref.ref(backprompt.training.models.scorer_of(model, None).lm)
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


@known_to_torch
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_computes_under_autocast_as_with_gradients(name):
    """To the bit: a policy's ratio to its old self is 1 before the first step."""
    model, batch = family(name), group(3, 20, 8)
    options = {"entropy": True, "top_k": 2, "token_ids": given_ids(batch), "temperature": 0.8}
    exact = token_logprobs(model, *batch.tensors(), 8, **options)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = token_logprobs(model, *batch.tensors(), 8, **options)
        with_gradients = token_logprobs(model, *batch.tensors(), 8, requires_grad=True, **options)
        logits = model(input_ids=batch.tensors()[0]).logits[:, 19:-1].float() / 0.8
    plain = logits.log_softmax(-1).gather(2, batch.tensors()[0][:, 20:, None])[..., 0].detach()
    for result in RESULTS:
        assert not getattr(found, result).requires_grad
        assert_close(getattr(found, result), getattr(with_gradients, result).detach(), atol=0)
    assert found.account == with_gradients.account == exact.account
    gap, gap_of_exact = ((own.logprobs - plain).abs().mean() for own in (found, exact))
    assert gap < ATOL[torch.bfloat16] / 4
    assert (found.logprobs - exact.logprobs).abs().max() > 1e-3
    assert gap < 2 * gap_of_exact  # as far from the plain call under autocast as its own rounding is


@known_to_torch
def test_adapters_in_float32_on_weights_in_half_precision_compute_under_autocast():
    batch, config = group(3, 20, 8), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(build("llama").to(torch.bfloat16), config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = token_logprobs(model, *batch.tensors(), 8)
        with_gradients = token_logprobs(model, *batch.tensors(), 8, requires_grad=True)
    assert_close(found.logprobs, with_gradients.logprobs.detach(), atol=0)


@known_to_torch
def test_an_offloaded_model_is_scored_under_autocast_too():
    model, batch = build("llama"), group(3, 9, 4)
    expected = token_logprobs(model, *batch.tensors(), 4)
    cpu_offload(model, DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = token_logprobs(model, *batch.tensors(), 4)
    assert_close(found.logprobs, expected.logprobs)


@known_to_torch
@pytest.mark.parametrize("max_tokens", [None, 30])
def test_the_first_call_may_stand_in_inference_mode_under_autocast(max_tokens):
    model, batch = build("llama"), group(3, 20, 8)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = token_logprobs(model, *batch.tensors(), 8, max_tokens_per_forward=max_tokens)
        training_failure.cache_clear()
        with torch.inference_mode():
            found = token_logprobs(build("llama"), *batch.tensors(), 8, max_tokens_per_forward=max_tokens)
    assert_close(found.logprobs, expected.logprobs, atol=0)
    token_logprobs(model, *batch.tensors(), 8, requires_grad=True).logprobs.sum().backward()


@known_to_torch
def test_an_lm_shuts_autocast_out(tokenizer):
    batch = group(2, 6, 4)
    for lm in (LM(build("llama").to(torch.bfloat16), tokenizer), LM(family("llama"), tokenizer)):
        expected = token_logprobs(lm, *batch.tensors(), entropy=True)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            found = token_logprobs(lm, *batch.tensors(), entropy=True)
        assert_close(found.logprobs, expected.logprobs, atol=0)
        assert_close(found.entropies, expected.entropies, atol=0)


@known_to_torch
@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_scored_as_with_gradients(dtype, is_autocast):
    model, batch = build("llama").to(dtype), group(3, 20, 8)
    with torch.autocast(DEVICE.type, dtype, enabled=is_autocast):
        found = token_logprobs(model, *batch.tensors(), 8, entropy=True)
        with_gradients = token_logprobs(model, *batch.tensors(), 8, entropy=True, requires_grad=True)
    assert_close(found.logprobs, with_gradients.logprobs.detach(), atol=0)
    assert_close(found.entropies, with_gradients.entropies.detach(), atol=0)


# Errors


def test_input_that_cannot_be_scored_is_refused(tokenizer):
    model, (ids, mask) = family("llama"), group(2, 4, 3).tensors()
    lm = LM(model, tokenizer)

    def refused(error, match, given=model, batch=(ids, mask), **options):
        with pytest.raises(error, match=match):
            token_logprobs(given, *batch, **options)

    refused(TypeError, "must be an LM or a model of transformers, not str", given="gpt2")
    refused(ValueError, "An LM gets this limit", given=lm, max_tokens_per_forward=4)
    refused(ValueError, "max_tokens_per_forward must be an int of at least 1", max_tokens_per_forward=0)
    refused(TokenIdError, "input_ids has 320 in row 0, column 0", batch=(torch.full_like(ids, 320), mask))
    refused(TextTooLongError, r"Row 1 of input_ids has 130 tokens.*Shorten the text by 1", batch=long_rows())
    refused(ValueError, "temperature must be above 0", temperature=0)
    refused(TypeError, "temperature must be a finite number", temperature="high")
    refused(ValueError, "entropy must be True or False", entropy=1)
    refused(ValueError, "top_k must be an int of at least 1", top_k=0)
    refused(ValueError, "top_k is 321, but the model's head has 320 tokens", top_k=321)
    refused(TypeError, "token_ids must be a tensor of integers", token_ids=torch.zeros(2, 7, 1))
    refused(TypeError, "token_ids must be a tensor of integers .* not list", token_ids=[[[1]]])
    refused(ValueError, r"token_ids must have the shape \(rows, kept, k\), not \(2, 7\)", token_ids=ids)
    refused(ValueError, r"must begin with \(2, 7\)", token_ids=ids[:, 1:, None])
    refused(
        TokenIdError,
        "token_ids has 320 in the place of a scored token",
        token_ids=torch.full((2, 7, 1), 320).to(DEVICE),
    )
    refused(TokenIdError, "token_ids has -1 in the place", token_ids=torch.full((2, 7, 1), -1).to(DEVICE))
    batch = replace(group(2, 4, 3), kept=None)
    assert_is_plain(token_logprobs(lm, ids, mask), model, batch)


def long_rows():
    ids = torch.zeros((2, 130), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 129:] = 0  # 129 tokens, of which 128 are forwarded
    return ids.to(DEVICE), mask.to(DEVICE)


def test_a_row_that_is_no_distribution_is_an_error_that_names_its_tokens(tokenizer):
    model, before = build("llama"), torch.tensor([[17, 5]], device=DEVICE)
    with torch.no_grad():
        state = model.model(input_ids=before).last_hidden_state[0, -1]

    def spoil(module, hidden):
        logits = own_forward(hidden)
        return logits.masked_fill(((hidden - state).abs().amax(dim=-1, keepdim=True) < 1e-3), torch.nan)

    own_forward = model.lm_head.forward
    model.lm_head.forward = MethodType(spoil, model.lm_head)
    batch = Batch([(9, 8, 7), (17, 5, 3, 2)], [0, 0], 4, None)
    for options in ({}, {"entropy": True}):
        with pytest.raises(NonFiniteError, match=r"NaN logits at the end of '17 5' \(2 tokens\)"):
            token_logprobs(model, *batch.tensors(), **options)
        lm = LM(model, tokenizer, max_tokens_per_forward=1)
        with pytest.raises(NonFiniteError, match=r"NaN logits at the end of .* \(2 tokens\)"):
            token_logprobs(lm, *batch.tensors(), **options)
        kept = replace(batch, kept=1)  # the row is not asked for
        assert_is_plain(token_logprobs(lm, *kept.tensors(), 1, **options), model, kept)
