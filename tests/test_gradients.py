"""Scores of padded batches with gradients: values and every parameter's gradient are the plain call's, row by row."""

import copy
import gc
import warnings
import weakref
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_batches import NUM_IDS, Batch, batches, group, ungrouped

from backprompt import LM
from backprompt.errors import TextTooLongError, UnsupportedModelError
from backprompt.model.linear import TrainedLinear
from backprompt.training import body, head, hidden_states, token_logprobs
from backprompt.training.attention import TrieAttention
from comparing import assert_close
from devices import DEVICE, known_to_torch
from quick import up_to
from tiny_models import build

pytestmark = known_to_torch
FAMILIES = ["gpt2", "llama", "qwen3", "gemma2", "mistral_sliding", "gpt_oss"]
OF_OWN = 1e-5
"""How far a gradient may be from the plain one, as norms, relative to the plain one's norm."""
OF_ALL = 4 * torch.finfo(torch.float32).eps
"""The same relative to the norm of all gradients, on top.

Some gradients are 0 in exact arithmetic: those of a bias of keys; those of queries and keys where rows see one key, or
keys with one value. Both ways find rounding there, some bits of numbers as large as the other gradients.
"""


@cache
def family(name: str):
    return build(name)


class Loss:
    """A loss on all results of a batch, with random weights; the plain one is summed row by row."""

    def __init__(self, batch: Batch, seed: int = 0, k: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = len(batch.rows), batch.num_kept
        self.of_logprobs, self.of_entropies = (torch.randn(shape, generator=generator) for _ in range(2))
        self.of_top, self.of_given = (torch.randn((*shape, k), generator=generator) for _ in range(2))
        self.given_ids = torch.randint(0, NUM_IDS, (*shape, k), generator=generator)
        self.k = k

    def of(self, found) -> torch.Tensor:
        weighed = [(self.of_logprobs, found.logprobs), (self.of_entropies, found.entropies)]
        weighed += [(self.of_top, found.top_logprobs), (self.of_given, found.given_logprobs)]
        return sum((weights.to(DEVICE) * values).sum() for weights, values in weighed if values is not None)

    def plain(self, model, batch: Batch, temperature: float, asked) -> torch.Tensor:
        """Backward row by row; returns the log-probabilities, `(rows, kept)`."""
        values = torch.zeros(self.of_logprobs.shape)
        for row, ids in enumerate(batch.rows):
            targets = [target for target in batch.targets() if target[0] == row]
            if not targets:
                continue
            logits = model(input_ids=torch.tensor([ids], device=DEVICE)).logits[0].cpu()
            logprobs = (logits.float() / temperature).log_softmax(dim=-1)
            loss = 0.0
            for _, column, before, token_id in targets:
                own = logprobs[len(before) - 1]
                values[row, column] = own[token_id].detach()
                loss = loss + self.of_logprobs[row, column] * own[token_id]
                if "entropy" in asked:
                    loss = loss - self.of_entropies[row, column] * (own.exp() * own).sum()
                if "top_k" in asked:
                    loss = loss + (self.of_top[row, column] * own.topk(self.k).values).sum()
                if "token_ids" in asked:
                    loss = loss + (self.of_given[row, column] * own[self.given_ids[row, column]]).sum()
            loss.backward()
        return values


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of all parameters, which are forgotten."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() >= expected.keys()
    assert not any(gradient.any() for name, gradient in found.items() if name not in expected)
    whole = torch.stack([gradient.norm() for gradient in expected.values()] or [torch.zeros(())]).norm()
    for name, gradient in expected.items():
        gap = (found[name] - gradient).norm()
        assert gap <= OF_OWN * gradient.norm() + OF_ALL * whole, f"{name}: {gap} of {gradient.norm()}"


def check(model, batch: Batch, temperature: float = 1.0, asked=(), plain_model=None, **options):
    """Compare one call and its backward with the plain calls; return the results."""
    loss = Loss(batch)
    values = loss.plain(plain_model or model, batch, temperature, asked)
    expected = gradients(plain_model or model)
    every = {"entropy": True, "top_k": loss.k, "token_ids": loss.given_ids.to(DEVICE)}
    chosen = {name: every[name] for name in asked}
    found = token_logprobs(
        model, *batch.tensors(), batch.kept, temperature=temperature, requires_grad=True, **chosen, **options
    )
    assert_close(found.logprobs.detach(), values)
    loss.of(found).backward()
    assert_same_gradients(gradients(model), expected)
    return found


# Laws


@pytest.mark.parametrize("name", FAMILIES)
@given(
    batch=batches(),
    temperature=st.sampled_from([1.0, 0.7]),
    asked=st.sets(st.sampled_from(["entropy", "top_k", "token_ids"])),
    max_tokens=st.sampled_from([None, 1, 9]),
)
@settings(max_examples=up_to(12))
def test_gradients_are_those_of_the_plain_calls(name, batch, temperature, asked, max_tokens):
    found = check(family(name), batch, temperature, asked, max_tokens_per_forward=max_tokens)
    account = found.account
    assert account.tokens_given == sum(map(len, batch.rows))
    assert account.tokens_distinct == len(batch.distinct())
    if max_tokens is None:
        assert account.tokens_forwarded == len(batch.forwarded())
    else:
        assert account.tokens_forwarded >= len(batch.forwarded())


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral_sliding"])
@given(batch=batches(), pad=st.sampled_from([0, -100]))
@settings(max_examples=up_to(10))
def test_hidden_states_are_those_of_the_plain_calls(name, batch, pad):
    model = family(name)
    weights = torch.randn((len(batch.rows), batch.width, 32), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = torch.zeros_like(weights)
    for row, (ids, left) in enumerate(zip(batch.rows, batch.left, strict=True)):
        if ids:
            states = model.get_decoder()(torch.tensor([ids], device=DEVICE)).last_hidden_state[0]
            (states * weights[row, left : left + len(ids)]).sum().backward()
            expected[row, left : left + len(ids)] = states.detach()
    plain = gradients(model)
    found = hidden_states(model, *batch.tensors(pad))
    assert_close(found.hidden.detach(), expected)
    assert found.account.tokens_forwarded == len(batch.distinct())
    (found.hidden * weights).sum().backward()  # of padding alone, too
    assert_same_gradients(gradients(model), plain)


@pytest.mark.parametrize("name", ["granite", "cohere", "opt", "gpt_neox", "phi", "gemma", "olmo2"])
def test_other_families(name):
    check(build(name), group(3, 12, 6), 0.7, ("entropy",))


def test_layers_with_and_without_a_window():
    config = build("gemma2").config
    config.sliding_window = 5
    model = type(build("gemma2"))(config).eval()
    check(model, group(3, 12, 6), 0.7, ("entropy",))
    check(model, group(3, 12, 6), max_tokens_per_forward=20)


def test_the_same_whether_an_lm_or_its_model_is_given(tokenizer):
    model = build("llama")
    batch = group(3, 9, 4)
    found = token_logprobs(LM(model, tokenizer, max_tokens_per_forward=16), *batch.tensors(), 4, requires_grad=True)
    found.logprobs.sum().backward()
    by_lm = gradients(model)
    assert found.account.tokens_forwarded == 9 + 3 * 3 + 9  # two parts
    token_logprobs(model, *batch.tensors(), 4, requires_grad=True).logprobs.sum().backward()
    assert_same_gradients(gradients(model), by_lm)


# Adapters, and gradient checkpointing


def with_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of GPT-2's transposed layers
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)


def recomputing(model, use_reentrant: bool):
    """The model with gradient checkpointing on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name is deprecated, and the new one is not there in transformers 5.0
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def in_training(model):
    """Training mode without dropout, as trainers have it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mistral_sliding"])
@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients_of_a_model_in_training(name, has_lora, use_reentrant, monkeypatch):
    """With gradient checkpointing each layer is computed twice, and the attention of its own part with it."""
    model = in_training(with_lora(build(name)) if has_lora else build(name))
    if use_reentrant is not None:
        recomputing(model, use_reentrant)
        model.enable_input_require_grads()
    num_attended, attend = [], TrieAttention.attend
    monkeypatch.setattr(TrieAttention, "attend", lambda *args: num_attended.append(1) or attend(*args))
    batch = group(4, 14, 5)
    found = check(model, batch, 0.7, ("entropy",))
    assert len(num_attended) == (2 if use_reentrant is None else 4)  # of two layers
    assert found.account.tokens_forwarded == 14 + 4 * 4
    num_attended.clear()
    check(model, batch, 0.7, ("entropy",), max_tokens_per_forward=24)
    assert len(num_attended) == (8 if use_reentrant is None else 12)  # two parts, each of them twice in any case
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(("lora_" in name) == has_lora for name in trained)


def test_tied_embeddings_get_both_gradients():
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    check(model, group(3, 6, 4))


def test_an_adapter_that_is_switched_off():
    """As trainers do for the reference model."""
    model = in_training(with_lora(build("llama")))
    batch, base = group(3, 6, 4), build("llama")
    with model.disable_adapter():
        found = token_logprobs(model, *batch.tensors(), 4, requires_grad=True).logprobs
    expected = token_logprobs(base, *batch.tensors(), 4).logprobs
    assert_close(found.detach(), expected)
    assert (token_logprobs(model, *batch.tensors(), 4, requires_grad=True).logprobs - expected).abs().max() > 0.01


# Work and memory


@pytest.fixture
def embedded(monkeypatch):
    """The number of tokens in each call of an embedding of tokens."""
    sizes, forward = [], nn.Embedding.forward

    def counted(self, ids):
        if self.num_embeddings == NUM_IDS:
            sizes.append(ids.numel())
        return forward(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", counted)
    return sizes


def test_each_distinct_token_is_forwarded_once(embedded):
    model, batch = build("llama"), group(5, 20, 6)
    token_logprobs(model, *Batch([(5, 6)], [0], 2, None).tensors())  # the probe embeds tokens, too
    embedded.clear()
    found = token_logprobs(model, *batch.tensors(), 6, requires_grad=True)
    assert embedded == [20 + 5 * 5]
    found.logprobs.sum().backward()
    assert embedded == [20 + 5 * 5]
    embedded.clear()
    token_logprobs(model, *ungrouped(batch).tensors(), 6, requires_grad=True)
    assert embedded == [5 * 25]


def test_parts_are_computed_again_one_after_the_other(embedded):
    model, batch = build("llama"), group(6, 20, 6)
    token_logprobs(model, *Batch([(5, 6)], [0], 2, None).tensors(), max_tokens_per_forward=30)
    embedded.clear()
    found = token_logprobs(model, *batch.tensors(), 6, requires_grad=True, max_tokens_per_forward=30)
    assert embedded == [20 + 2 * 5] * 3
    assert found.account.tokens_forwarded == 90
    assert found.account.tokens_distinct == 20 + 6 * 6
    found.logprobs.sum().backward()
    assert embedded == [20 + 2 * 5] * 6


def saved_bytes(run) -> int:
    """The bytes that a forward holds until its backward, but for parameters."""
    sizes = {}

    def note(tensor):
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def test_a_budget_bounds_what_is_held():
    model, batch = build("llama"), group(6, 20, 6)

    def run(max_tokens):
        token_logprobs(model, *batch.tensors(), 6, requires_grad=True, max_tokens_per_forward=max_tokens)

    assert saved_bytes(lambda: run(30)) < 0.5 * saved_bytes(lambda: run(None))


@pytest.mark.parametrize(("held_bytes", "num_calls"), [(0, 8), (4 * NUM_IDS * 8, 7), (1 << 30, 4)])
def test_the_head_is_applied_in_slices(held_bytes, num_calls, monkeypatch):
    """Slices beyond the bytes that are held are computed again in the backward."""
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * NUM_IDS * 8)
    monkeypatch.setattr(head, "HELD_BYTES", held_bytes)
    model, sizes = build("llama"), []
    plain_model = copy.deepcopy(model)
    token_logprobs(model, *Batch([(5, 6)], [0], 2, None).tensors())  # the probe applies the head, too
    for layer in (nn.Linear, TrainedLinear):

        def counted(self, rows, forward=layer.forward):
            if self.weight is model.lm_head.weight:
                sizes.append(rows.shape[-2])
            return forward(self, rows)

        monkeypatch.setattr(layer, "forward", counted)
    check(model, group(5, 20, 6), 0.7, ("entropy", "top_k", "token_ids"), plain_model)
    assert sizes[:4] == [8, 8, 8, 2]  # 1 + 5 * 5 rows
    assert len(sizes) == num_calls


def test_nothing_is_left_of_a_call_when_its_results_are_gone(monkeypatch):
    bodies, make = [], body.skeleton.make_trained_body

    def noted(*args):
        made = make(*args)
        bodies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(body.skeleton, "make_trained_body", noted)
    model = recomputing(in_training(build("llama")), use_reentrant=False)
    gc.collect()
    gc.disable()
    try:
        found = token_logprobs(model, *group(3, 9, 4).tensors(), 4, requires_grad=True, max_tokens_per_forward=16)
        found.logprobs.sum().backward()
        del found
        assert len(bodies) == 2
        assert [reference() for reference in bodies] == [None, None]
    finally:
        gc.enable()


# The user's model, and the caller's torch settings


def test_the_users_model_is_left_as_it_was():
    model = in_training(build("llama"))
    before = copy.deepcopy(model.config.to_dict()), [module.training for module in model.modules()]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    token_logprobs(model, *group(3, 9, 4).tensors(), 4, requires_grad=True, entropy=True).logprobs.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.config.to_dict(), [module.training for module in model.modules()]) == before
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_autocast_holds(monkeypatch):
    """The results are as far from the plain call under autocast as bfloat16 is from float32."""
    model, batch, dtypes = build("llama"), group(3, 9, 4), []
    exact = token_logprobs(model, *batch.tensors(), 4, requires_grad=True)
    forward = body.TrieAttention.attend

    def noted(self, *args):
        attended = forward(self, *args)
        dtypes.append(attended.dtype)
        return attended

    monkeypatch.setattr(body.TrieAttention, "attend", noted)
    with torch.autocast(DEVICE.type, torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = token_logprobs(model, *batch.tensors(), 4, requires_grad=True)
    found.logprobs.sum().backward()
    assert dtypes == [torch.bfloat16] * 2
    assert 1e-4 < (found.logprobs - exact.logprobs).abs().max() < 0.3
    lower = gradients(model)
    exact.logprobs.sum().backward()
    for name, gradient in gradients(model).items():
        assert (lower[name] - gradient).norm() < 0.1 * gradient.norm()


def test_numbers_that_are_not_finite_are_returned():
    """As the plain call does: a trainer that scales its loss looks at them itself."""
    model, batch = build("llama"), group(2, 5, 3)
    token_logprobs(model, *batch.tensors(), 3)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    found = token_logprobs(model, *batch.tensors(), 3, requires_grad=True)
    assert found.logprobs.isnan().all()


@pytest.mark.parametrize("has_lora", [False, True])
def test_batches_without_targets_have_a_graph_too(has_lora):
    model = with_lora(build("llama")) if has_lora else build("llama")  # the head of which is frozen
    for batch in (Batch([], [], 0, None), Batch([(), (5,)], [0, 1], 3, None), Batch([(5, 6, 7)], [0], 6, 3)):
        found = token_logprobs(model, *batch.tensors(), batch.kept, requires_grad=True, entropy=True, top_k=2)
        assert found.account.tokens_forwarded == 0
        assert not found.logprobs.any()
        (found.logprobs.sum() + found.entropies.sum() + found.top_logprobs.sum()).backward()
        assert not any(gradient.any() for gradient in gradients(model).values())


def test_losses_may_read_a_part_of_the_results():
    model, batch = build("llama"), group(3, 9, 4)
    found = token_logprobs(model, *batch.tensors(), 4, requires_grad=True, entropy=True)
    found.logprobs[1, 2].backward()
    some = gradients(model)
    model(input_ids=torch.tensor([batch.rows[1]], device=DEVICE)).logits[0, 10].log_softmax(-1)[
        batch.rows[1][11]
    ].backward()
    assert_same_gradients(some, gradients(model))


# Errors


def test_what_has_no_gradients_is_refused(tokenizer):
    model, (ids, mask) = build("llama"), group(2, 4, 3).tensors()
    for context in (torch.no_grad(), torch.inference_mode()):
        with (
            context,
            pytest.raises(ValueError, match=r"requires_grad=True makes an autograd graph.*torch\.is_grad_enabled\(\)"),
        ):
            token_logprobs(model, ids, mask, requires_grad=True)
    with pytest.raises(ValueError, match="requires_grad must be True or False"):
        token_logprobs(model, ids, mask, requires_grad=1)
    long = torch.zeros((1, 130), dtype=torch.int64, device=DEVICE)
    with pytest.raises(TextTooLongError, match="Row 0 of input_ids has 130 tokens"):
        token_logprobs(model, long, requires_grad=True)
    dropping = build("gpt2").train()
    for given_model in (dropping, LM(dropping, tokenizer)):
        with pytest.raises(UnsupportedModelError, match=r"drops with probability 0\.1.*model\.eval\(\)"):
            token_logprobs(given_model, ids, mask, requires_grad=True)
    token_logprobs(dropping.eval(), ids, mask, requires_grad=True)


def test_a_model_whose_code_computes_something_else_is_refused():
    """The probe sees the difference, before the first pass with gradients, too."""
    model, (ids, mask) = build("llama"), group(2, 4, 3).tensors()
    own = model.forward

    def halved(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    model.forward = halved
    for call in (partial(token_logprobs, requires_grad=True), hidden_states):
        with pytest.raises(UnsupportedModelError, match="differ"):
            call(model, ids, mask)


def test_models_that_cannot_be_packed_are_refused():
    peft = pytest.importorskip("peft")
    prompted = peft.get_peft_model(build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids, mask = group(2, 4, 3).tensors()
    for model, match in ((build("mamba"), "Gradients need packed attention"), (prompted, "virtual tokens")):
        with pytest.raises(UnsupportedModelError, match=match):
            token_logprobs(model, ids, mask, requires_grad=True)
    hooked = build("llama")
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"forward hook on its module 'model\.layers\.0'"):
        token_logprobs(hooked, ids, mask, requires_grad=True)


def test_a_model_behind_distributed_data_parallel_is_refused():
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = build("llama")
    ids, mask = group(2, 4, 3).tensors()
    with pytest.raises(UnsupportedModelError, match=r"averages gradients only after a call of its own forward"):
        token_logprobs(wrapped, ids, mask, requires_grad=True)
    token_logprobs(wrapped, ids, mask)
