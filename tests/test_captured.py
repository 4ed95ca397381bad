"""Captured steps of generations give the tokens of plain ones; on the CPU a function does again what is recorded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="there is no wheel of triton for this platform")

from backprompt import LM, Text, generate
from backprompt.attention.tiles import Tile
from backprompt.attention.triton import Launch, TritonAttention
from backprompt.memory.placing import place
from backprompt.model import executor
from backprompt.model.recording import Output, Recording
from backprompt.model.steps import CapturedSteps
from comparing import assert_close
from reference import plain_greedy, plain_token_logprobs
from tiny_models import FAMILIES

LAUNCH = Launch(Tile(rows=16, keys=64, warps=4, stages=2), 4, 1)


def record(compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
    """What a CUDA graph does: the tensors of the first output are filled anew."""
    plain = compute()
    finish(plain)
    output = compute()

    def replay() -> None:
        new = compute()
        for old, tensor in zip(tensors_of(output), tensors_of(new), strict=True):
            old.copy_(tensor)
        finish(output)

    return Recording(plain, output, replay)


def tensors_of(output: Output) -> list[torch.Tensor]:
    return [output.hidden, output.is_finite, *output.keys_values.in_order()]


def capture(patch: pytest.MonkeyPatch, record: Any = record, attention: Callable[[], Any] | None = None) -> None:
    """Let models capture the steps of generations on the CPU."""

    def captured(body: torch.nn.Module, attention: Any) -> CapturedSteps:
        return CapturedSteps(attention, [*body.parameters(), *body.buffers()], record, place)

    make = attention or (lambda: TritonAttention(LAUNCH, device_types={"cpu"}))
    patch.setattr(executor, "attention_for", lambda device: make())
    patch.setattr(executor, "captured_steps", captured)


def counts_of(lm: LM) -> dict[str, int]:
    return dict(lm.session.evaluator.executor.steps.counts)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral_sliding"])
def test_captured_steps_give_the_tokens_of_plain_ones(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of several lengths in a bucket with spare rows; what they leave is what evaluating leaves."""
    capture(monkeypatch)
    model = FAMILIES[name]()
    lm = LM(model, tokenizer)
    texts = [Text(prompt, lm) for prompt in ("The cat sat on the", "A", "The cat sat on the mat and")]
    found = generate(texts, max_new_tokens=12)
    counts = counts_of(lm)
    assert counts["recorded"] >= 1
    assert counts["replayed"] > counts["eager"]
    for text in found:
        assert text.completion_tokens == plain_greedy(model, text.prompt.tokens, 12)
        assert_close(text.token_logprobs, plain_token_logprobs(model, text.tokens))
