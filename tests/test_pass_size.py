"""The largest number of tokens in a pass by default, and what a mask is asked."""

import pytest
import torch

from backprompt import LM, Text
from backprompt.model import masks, pass_size
from comparing import assert_equals_plain
from tiny_models import build


@pytest.mark.parametrize(("name", "widest"), [("gpt2", 32 + 4 * 32), ("llama", 32 + 64), ("gpt_oss", 32 + 2 * 64)])
def test_activations_are_those_of_the_widest_layer(name, widest):
    model = build(name)
    assert pass_size.activation_bytes(model.base_model) == 4 * widest * 4
    assert pass_size.activation_bytes(model.base_model.bfloat16()) == 4 * widest * 2


@pytest.mark.parametrize(("free", "tokens"), [(10**6, 2048), (100 * 10**6, 100 * 10**6 // 16 // 1536), (10**11, 32768)])
def test_on_cuda_a_pass_takes_a_share_of_the_free_memory(free, tokens, monkeypatch):
    monkeypatch.setattr(pass_size, "free_bytes", lambda device: free)
    body = build("llama").base_model
    assert pass_size.tokens_per_forward(body, torch.device("cuda")) == tokens
    assert pass_size.tokens_per_forward(body, torch.device("cpu")) == 1024


def test_the_caller_decides(model, tokenizer):
    assert LM(model, tokenizer).session.evaluator.max_tokens_per_forward == 1024
    assert LM(model, tokenizer, max_tokens_per_forward=7).session.evaluator.max_tokens_per_forward == 7


def test_a_mask_that_looks_into_tensors_of_the_device_is_asked_there(tokenizer, monkeypatch):
    """As a chunked mask does, which knows the padding of each row."""
    asked = []
    visible = masks.visible_keys

    def only_there(mask_function, positions, device):
        asked.append(positions)
        if asked.count(positions) % 2:
            raise RuntimeError("Expected all tensors to be on the same device")
        return visible(mask_function, positions, device)

    monkeypatch.setattr(masks, "visible_keys", only_there)
    model = build("mistral_sliding")
    assert_equals_plain(model, [Text("The cat sat on the mat, and the dog did not.", LM(model, tokenizer))])
    assert asked
