"""Copies of keys and values, and whether queries and keys are finite: torch's way and, in the interpreter, Triton's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="there is no wheel of triton for this platform")

from backprompt import LM, NonFiniteError, Text, evaluate
from backprompt.attention import triton_copies
from backprompt.attention.choice import copies_for
from backprompt.attention.copies import Copies, PlainCopies, all_finite
from backprompt.attention.triton_copies import TritonCopies
from comparing import assert_equals_plain
from tiny_models import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 3, 16), (4, 2, 20), (5, 1, 80), (6, 3, 1)]

WAYS = [
    pytest.param(PlainCopies, id="plain"),
    pytest.param(partial(TritonCopies, {DEVICE}), id="triton"),
]


def rows(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, tokens: int = 70) -> list:
    """Queries, keys and values as GPT-2 makes them: views of one tensor."""
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn((tokens, heads + 2 * kv_heads, head_dim), generator=generator).to(DEVICE, dtype)
    return [part.transpose(0, 1) for part in joint.split([heads, kv_heads, kv_heads], dim=1)]


def is_finite(make: Callable[[], Copies], *layers: list, hidden: torch.Tensor | None = None) -> bool:
    copies = make()
    for layer in layers:
        copies.of(*layer)
    if hidden is not None:
        copies.check(hidden)
    return bool(copies.are_finite())


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_copies_are_contiguous_and_equal(make, dtype, shape):
    query, key, value = rows(*shape, dtype)
    for found, given in zip(make().of(query, key, value), (key, value), strict=True):
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == found.nbytes
        assert torch.equal(found, given)


@pytest.mark.parametrize("make", WAYS)
def test_keys_and_values_of_different_sizes(make):
    query, key, _ = rows(4, 2, 16)
    _, _, value = rows(4, 2, 12)
    for found, given in zip(make().of(query, key, value), (key, value), strict=True):
        assert torch.equal(found, given)


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_number_that_is_not_finite_is_noticed_in_queries_and_keys(make, bad, shape):
    assert is_finite(make, rows(*shape), rows(*shape))
    for part in (0, 1):
        for place in ((0, 0, 0), (-1, -1, -1)):
            spoiled = rows(*shape)
            spoiled[part][place] = bad
            assert not is_finite(make, rows(*shape), spoiled, rows(*shape))


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (3, 5000)])
def test_one_number_that_is_not_finite_is_noticed_in_hidden_states(make, dtype, shape):
    hidden = torch.full(shape, torch.finfo(dtype).max, device=DEVICE, dtype=dtype)
    assert is_finite(make, rows(2, 2, 16), hidden=hidden)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in ((0, 0), (-1, -1)):
            spoiled = hidden.clone()
            spoiled[place] = bad
            assert not is_finite(make, rows(2, 2, 16), hidden=spoiled)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_noticed_among_tensors(dtype):
    tensors = [torch.zeros(shape, device=DEVICE, dtype=dtype) for shape in ((3, 1, 2), (0, 4), (5,))]
    assert all_finite(tensors)
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite([*tensors, torch.tensor([[1, bad]], device=DEVICE, dtype=dtype)])


@pytest.mark.parametrize("make", WAYS)
def test_the_largest_numbers_are_finite(make):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = rows(2, 2, 16, dtype)
        for part in layer:
            part.fill_(torch.finfo(dtype).max)
        assert is_finite(make, layer)


def test_the_kernel_serves_where_it_is_said_to():
    query, key, value = rows(4, 2, 20)
    assert triton_copies.serves(query.device, query.dtype, 4, 2, 20)
    copies = TritonCopies({DEVICE})
    copies.of(query, key, value)
    assert not copies.is_plain_used


def test_torch_copies_where_the_kernel_fails(monkeypatch):
    class Failing:
        def __getitem__(self, grid):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(triton_copies, "copy_kernel", Failing())
    triton_copies.serves.cache_clear()
    triton_copies.launcher.cache_clear()
    try:
        spoiled = rows(4, 2, 20)
        spoiled[1][0, 0, 0] = torch.nan
        assert is_finite(partial(TritonCopies, {DEVICE}), rows(4, 2, 20))
        assert not is_finite(partial(TritonCopies, {DEVICE}), spoiled)
    finally:
        triton_copies.serves.cache_clear()
        triton_copies.launcher.cache_clear()


def test_the_choice_for_a_device():
    assert copies_for(torch.device("cpu")) is PlainCopies
    assert copies_for(torch.device("cuda")) is TritonCopies


@pytest.fixture
def in_one_launch(monkeypatch):
    monkeypatch.setattr("backprompt.model.executor.copies_for", lambda device: partial(TritonCopies, {DEVICE}))


@pytest.mark.usefixtures("in_one_launch")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_give_the_numbers_of_the_plain_call(name, tokenizer):
    model = FAMILIES[name]().to(DEVICE)
    text = Text("The cat", LM(model, tokenizer)) + " sat."
    evaluate(text)
    assert_equals_plain(model, [text])


@pytest.mark.usefixtures("in_one_launch")
@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_scores_of_nan_are_an_error(name, tokenizer):
    """For few keys torch's attention returns numbers; the kernel on CUDA gives NaN. The probe comes before."""
    model = FAMILIES["llama"]().to(DEVICE)
    lm = LM(model, tokenizer)
    evaluate(Text("Hello", lm))
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.self_attn.{name}").weight[...] = torch.nan
    text = Text.from_tokens((5, 6, 7), lm)
    with pytest.raises(NonFiniteError, match=r"(queries or keys of NaN or infinity|NaN hidden states) at the end of"):
        text.logits  # noqa: B018
