"""Weights that change between steps: no probe for new numbers in the same parts, no hash where none is needed."""

import peft
import pytest
import torch
from torch import nn

from backprompt import LM, MemoryBudgetError, Text
from backprompt.evaluation import computation
from backprompt.model import weights
from backprompt.session import fingerprint
from backprompt.training import token_logprobs
from comparing import assert_equals_plain
from devices import DEVICE
from tiny_models import build


@pytest.fixture
def probed(monkeypatch):
    """The models that were probed, one entry a time."""
    found, probe = [], computation.probe
    monkeypatch.setattr(computation, "probe", lambda model, executor: found.append(model) or probe(model, executor))
    return found


@pytest.fixture
def hashed(monkeypatch):
    """The models that were hashed, one entry a time."""
    found = []
    for module in (weights, fingerprint):
        monkeypatch.setattr(module, "content_hash", lambda model: found.append(model) or str(len(found)))
    return found


def check(lm: LM) -> None:
    text = Text("The cat sat", lm) + " on the mat"
    assert_equals_plain(lm.model, [text, text + " and slept"])


def step(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def test_new_numbers_are_not_probed_again(probed, hashed, tokenizer):
    lm = LM(
        build("llama"), tokenizer, memory_bytes=20_000, host_memory_bytes=0
    )  # the budget needs what the probe found
    for _ in range(3):
        check(lm)
        step(lm.model)
    with torch.no_grad():
        lm.model.lm_head.weight.data.mul_(2)
    check(lm)
    assert len(probed) == 1
    assert hashed == []


def test_the_bytes_of_a_token_are_known_without_a_probe(probed, tokenizer):
    lm = LM(build("llama"), tokenizer, memory_bytes=2_000, host_memory_bytes=0)
    check(lm)
    step(lm.model)
    with pytest.raises(MemoryBudgetError):
        Text("The cat sat on the mat and slept", lm).pin()
    assert len(probed) == 1


def parameter_replaced(model):
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight * 0.5)


def numbers_moved(model):
    layer = model.model.layers[0].mlp
    layer.up_proj.weight.data = layer.up_proj.weight.data * 0.5


def module_replaced(model):
    model.model.layers[1].mlp.act_fn = nn.GELU()


@pytest.mark.parametrize("change", [parameter_replaced, numbers_moved, module_replaced])
def test_other_parts_are_probed_again(change, probed, tokenizer):
    lm = LM(build("llama"), tokenizer)
    check(lm)
    step(lm.model)
    change(lm.model)
    check(lm)
    assert len(probed) == 2
    step(lm.model)
    check(lm)
    assert len(probed) == 2


def test_parts_that_changed_before_their_first_use_are_probed(probed, tokenizer):
    lm = LM(build("llama"), tokenizer)
    step(lm.model)
    check(lm)
    assert len(probed) == 1


def test_each_state_of_adapters_is_probed_once(probed, tokenizer):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config).to(DEVICE)
    for _ in range(3):  # steps of a trainer: the policy, and as its reference the model without the adapter
        ids = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
        policy = token_logprobs(model, ids).logprobs
        with model.disable_adapter():
            reference = token_logprobs(model, ids).logprobs
            expected = build("llama")(input_ids=ids).logits.log_softmax(-1)[0, [0, 1, 2], ids[0, 1:]]
            torch.testing.assert_close(reference[0, 1:], expected, rtol=0, atol=5e-5)
        assert (policy - reference).abs().max() > 0.01
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.mul_(1.1)
    assert len(probed) == 2
    model.base_model.merge_adapter()
    token_logprobs(model, ids)
    assert len(probed) == 3


def test_refresh_compares_unless_told_not_to(probed, hashed, tokenizer):
    lm = LM(build("llama"), tokenizer)
    check(lm)
    assert lm.stats.bytes_held
    lm.refresh(compare=False)
    assert lm.stats.bytes_held == 0
    assert hashed == []
    check(lm)
    assert len(probed) == 1
    lm.refresh()
    assert len(hashed) == 1
    check(lm)
    assert len(probed) == 2  # a setting of a module may have changed
    with pytest.raises(ValueError, match="compare must be True or False"):
        lm.refresh(compare=1)


def test_a_write_that_no_look_sees_counts_after_a_refresh(tokenizer):
    lm = LM(build("llama"), tokenizer)
    check(lm)
    lm.model.model.embed_tokens.weight.data[tokenizer("The cat")["input_ids"]] *= 2
    lm.refresh(compare=False)
    check(lm)


def test_a_changed_fingerprint_after_a_refresh_without_comparing(tokenizer):
    lm = LM(build("llama"), tokenizer)
    before = lm.fingerprint
    lm.refresh(compare=False)
    assert lm.fingerprint == before
    lm.model.model.embed_tokens.weight.data[5, 5] += 1
    lm.refresh(compare=False)
    assert lm.fingerprint != before
