"""Work whose first run on a GPU shows faults that neither the CPU nor Triton's interpreter can show."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from backprompt import LM, Text, evaluate, generate
from backprompt.forest.forest import Forest
from backprompt.forest.passes import missing_spans
from backprompt.forest.plan import plan_pass
from backprompt.memory import growth
from comparing import assert_close, assert_equals_plain
from reference import generated_by_transformers, plain_attention, plain_greedy, plain_logits
from tiny_models import FAMILIES

pytestmark = pytest.mark.cuda

FAMILIES_ON_CUDA = ("gpt2", "llama", "gemma2", "gpt_oss", "mistral_sliding")
PROMPTS = ("The cat sat on", "A", "The cat sat and")
ATOL = 1e-3  # that of reference.py was measured on the CPU


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mistral_sliding"])
def test_a_pass_in_inference_mode_waits_for_nothing(name: str, tokenizer: Any) -> None:
    """The whole body, its attention and its copies; the host waits only when it reads whether all is finite."""
    lm = LM(FAMILIES[name]().cuda(), tokenizer)
    text = Text("The cat sat on the mat", lm)
    evaluate([text])
    executor, forest = lm.session.evaluator.executor, Forest()
    ends = [forest.insert((*text.tokens, last)) for last in (5, 6)]
    pass_ = plan_pass(missing_spans(ends), 128)
    with torch.no_grad():
        executor.forward(pass_)
        with no_waits():
            forwarded = executor.forward(pass_)
    assert forwarded.is_finite
    tensors = [forwarded.hidden, *forwarded.keys_values.tensors.values()]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)
    assert all(tensor.device == executor.device for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES_ON_CUDA)
def test_cuda_takes_its_own_kernels(name: str, dtype: torch.dtype, tokenizer: Any) -> None:
    """Attention by one launch a layer, not for a reason that only a log tells."""
    lm = LM(FAMILIES[name]().to("cuda", dtype), tokenizer)
    evaluate([Text(prompt, lm) for prompt in PROMPTS])
    assert lm.stats.kernel == "triton"
    assert lm.session.evaluator.executor.levels is None


@pytest.mark.parametrize("name", FAMILIES_ON_CUDA)
def test_texts_that_grow_part_and_are_absorbed(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of one prompt part and outgrow their room, and then are continued by others; all equal the plain call."""
    monkeypatch.setattr(growth, "ROWS_AT_A_TIME", 3)
    model = FAMILIES[name]().cuda()
    lm = LM(model, tokenizer)
    prompts = [Text(prompt, lm) for prompt in PROMPTS]
    found = generate(prompts * 3, max_new_tokens=20, temperature=1.5, seed=1)
    more = generate(found, max_new_tokens=4)
    for text in more:
        assert text.completion_tokens == plain_greedy(model, text.prompt.tokens, 4)
    assert_equals_plain(model, [*found, *more], atol=ATOL)


@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams(num_beams: int, tokenizer: Any) -> None:
    """Of texts with different numbers of tokens, side by side."""
    model = FAMILIES["llama"]().cuda()
    lm = LM(model, tokenizer)
    for text in generate([Text(prompt, lm) for prompt in PROMPTS], max_new_tokens=8, num_beams=num_beams):
        expected = generated_by_transformers(model, text.prompt.tokens, max_new_tokens=8, num_beams=num_beams)
        assert text.completion_tokens == expected


def test_look_ahead(tokenizer: Any) -> None:
    model = FAMILIES["gpt2"]().cuda()
    lm = LM(model, tokenizer)
    prompt = Text("The cat sat on the mat. The cat sat on the", lm)
    (found,) = generate([prompt], max_new_tokens=20, prompt_lookup_num_tokens=4)
    assert found.completion_tokens == plain_greedy(model, prompt.tokens, 20)


def test_samples_are_the_same_with_graphs_and_without(tokenizer: Any) -> None:
    model = FAMILIES["llama"]().cuda()
    lms = [LM(model, tokenizer) for _ in range(2)]
    lms[1].session.evaluator.executor.steps = None
    options = {"max_new_tokens": 30, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3}
    found, expected = (
        [text.completion_tokens for text in generate([Text(prompt, lm) for prompt in PROMPTS], **options)] for lm in lms
    )
    assert found == expected
    assert lms[0].stats.steps_recorded > 0


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_captured_step_waits_only_for_its_report(name: str, options: dict[str, Any], tokenizer: Any) -> None:
    """The wait for an event is none that torch notes."""
    model = FAMILIES[name]().cuda()
    lms = [LM(model, tokenizer) for _ in range(2)]
    lms[1].session.evaluator.executor.steps = None
    stream = Text("The cat", lms[0]).stream(max_new_tokens=30, **options)
    for _ in range(10):
        stream.run.step()
    with no_waits():
        stream.run.step()
    list(stream)
    assert (
        stream.text.completion_tokens
        == Text("The cat", lms[1]).generate(max_new_tokens=30, **options).completion_tokens
    )
    assert lms[0].session.evaluator.executor.steps.counts["taken"] > 10


def test_a_changed_weight_is_noticed(tokenizer: Any) -> None:
    """By its version, and by a sample where it keeps its version; the look reads elements on the device."""
    model = FAMILIES["llama"]().cuda()
    lm = LM(model, tokenizer)
    text = Text("The cat sat on", lm)
    weight = model.model.layers[0].mlp.up_proj.weight
    for write in (lambda: weight.data.mul_(1.5), lambda: weight.detach().add_(0.1)):
        before = text.logits.cpu()
        write()
        assert not torch.equal(text.logits.cpu(), before)
        assert_close(text.logits, plain_logits(model, text.tokens)[-1], atol=ATOL)


def test_log_probabilities_read_again_are_those_of_the_device(tokenizer: Any) -> None:
    lm = LM(FAMILIES["gpt2"]().cuda(), tokenizer)
    text = Text("The cat", lm) + " sat on the mat"
    first, again = text.token_logprobs, text.token_logprobs
    assert first.is_cuda
    assert torch.equal(first.nan_to_num(), again.nan_to_num())
    again.zero_()
    assert torch.equal(first.nan_to_num(), text.token_logprobs.nan_to_num())


def test_an_attention_map(tokenizer: Any) -> None:
    model = FAMILIES["llama"]().cuda()
    text = Text("The cat sat on the mat", LM(model, tokenizer))
    assert_close(text.model_repr.attention(), plain_attention(model, text.tokens), atol=ATOL)


def test_a_gate_of_more_than_2_to_the_31_numbers() -> None:
    """Behind a launch for few numbers, whose kernel counts in 32 bits."""
    fused = pytest.importorskip("backprompt.model.fused")
    num_rows = (1 << 19) + 1
    if torch.cuda.mem_get_info()[0] < 4 * num_rows * 4096 * 2:
        pytest.skip("needs 17 GB")
    for size in (3, num_rows):
        gates = torch.full((size, 4096), 2.0, device="cuda", dtype=torch.bfloat16)
        gates[-1] = -1.0
        found = fused.silu_product(gates, gates)
        assert_close(found[-1].float(), torch.full((4096,), 0.2689), atol=2e-3)
        assert_close(found[0].float(), torch.full((4096,), 3.5232), atol=2e-2)
