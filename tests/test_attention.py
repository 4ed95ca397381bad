"""Packed attention against a softmax written out, in float64, over what each token must see."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backprompt.attention import calls, kernels
from backprompt.attention.base import Scoring
from backprompt.attention.calls import CallsAttention
from backprompt.attention.kernels import ChosenKernel, Kernel, KernelOutput, additive_mask, choose_kernel, clear_kernel
from backprompt.forest import plan
from packed import KERNEL_ATOL, Ids, Layers, attend_by_hand, batches_of_texts, check_close, draw, passes_over

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

# The clear kernel


@pytest.mark.parametrize("dtype", list(KERNEL_ATOL), ids=str)
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("kind", ["causal", "unmasked", "masked"])
def test_the_clear_kernel_is_a_softmax(
    kind: str, heads: int, kv_heads: int, softcap: float | None, dtype: torch.dtype
) -> None:
    rows, keys = 7, 7 if kind == "causal" else 11
    tensors = draw(heads, rows, 8, seed=0), draw(kv_heads, keys, 8, seed=1), draw(kv_heads, keys, 6, seed=2)
    query, key, value = (tensor.to(dtype) for tensor in tensors)
    visible = {
        "causal": torch.ones(rows, keys).tril().bool(),
        "unmasked": torch.ones(rows, keys).bool(),
        "masked": torch.rand(rows, keys, generator=torch.Generator().manual_seed(3)) < 0.6,
    }[kind]
    mask = additive_mask(visible, dtype) if kind == "masked" else None
    result = clear_kernel(query, key, value, 0.4, kind == "causal", mask, softcap=softcap)
    check_close(result, attend_by_hand(query, key, value, Scoring(0.4, softcap=softcap), visible), dtype)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_clear_kernel_is_torchs_attention(is_causal: bool) -> None:
    query, key, value = draw(6, 9, 8, seed=0), draw(2, 9, 8, seed=1), draw(2, 9, 8, seed=2)
    output, _ = clear_kernel(query, key, value, 0.4, is_causal, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=is_causal, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(output, expected[0].transpose(0, 1), atol=KERNEL_ATOL[torch.float32], rtol=0)


def test_a_row_that_sees_nothing_gets_nothing() -> None:
    visible = torch.tensor([[True, False, True], [False, False, False]])
    query, key, value = draw(4, 2, 8, seed=0), draw(2, 3, 8, seed=1), draw(2, 3, 8, seed=2)
    output, lse = clear_kernel(query, key, value, 0.4, False, additive_mask(visible, torch.float32))
    assert output[1].eq(0).all()
    assert lse[1].eq(-math.inf).all()
    check_close((output, lse), attend_by_hand(query, key, value, Scoring(0.4), visible), torch.float32)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.sampled_from(list(KERNEL_ATOL)))
def test_partial_results_join_to_attention_over_all_keys(part_of_key: list[int], dtype: torch.dtype) -> None:
    """Whichever way the keys are dealt out, and in whichever order the parts are joined."""
    num_keys = len(part_of_key)
    tensors = draw(4, 5, 8, seed=0), draw(2, num_keys, 8, seed=1), draw(2, num_keys, 6, seed=2)
    query, key, value = (tensor.to(dtype) for tensor in tensors)
    joined, rows = calls.Joined.empty(query, value), slice(0, 5)
    for i, part in enumerate(dict.fromkeys(part_of_key)):
        keys = [idx for idx, other in enumerate(part_of_key) if other == part]
        partial_result = clear_kernel(query, key[:, keys], value[:, keys], 0.4, False, None)
        (joined.add if i else joined.start_with)(rows, *partial_result)
    result = joined.result(sinks=None), joined.lse
    check_close(result, attend_by_hand(query, key, value, Scoring(0.4)), dtype)


# The fast kernels


def as_gpt2_makes_them(heads: int, rows: int, dim: int, seed: int) -> Tensor:
    """A view of one row of queries, keys and values together, in the middle of more rows."""
    return draw(3 * heads, rows + 5, dim, seed)[heads : 2 * heads, 2 : rows + 2]


LAYOUTS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "interleaved": draw,
    "gpt2": as_gpt2_makes_them,
    "contiguous": lambda heads, rows, dim, seed: draw(heads, rows, dim, seed).contiguous(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(1, 1, 8), (4, 2, 16), (12, 12, 64), (32, 1, 40), (3, 3, 20), (8, 2, 80)]
)
def test_a_fast_kernel_is_the_clear_one(
    heads: int, kv_heads: int, dim: int, layout: str, dtype: torch.dtype, device: str
) -> None:
    name, kernel = kernels.FAST_KERNELS[device]
    chosen = choose_kernel(torch.device(device), dtype, heads, kv_heads, dim)
    if chosen.name != name:
        pytest.skip(f"not used here: {chosen.name}")
    for rows, keys in ((1, 1), (1, 37), (5, 1), (33, 33), (70, 129)):
        drawn = [LAYOUTS[layout](n, m, dim, n + m) for n, m in ((heads, rows), (kv_heads, keys), (kv_heads, keys + 9))]
        query, key, value = (tensor.to(device, dtype) for tensor in drawn)
        value = value[:, 9:]
        visible = torch.rand((rows, keys), generator=torch.Generator().manual_seed(rows)) < 0.5
        visible[:, 0] = True
        for is_causal, mask in ((True, None), (False, None), (False, additive_mask(visible.to(device), dtype))):
            if not is_causal or rows == keys:
                expected = clear_kernel(query, key, value, dim**-0.5, is_causal, mask)
                check_close(kernel(query, key, value, dim**-0.5, is_causal, mask), expected, dtype)


# Which kernel serves


@pytest.fixture
def fast_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[str, Kernel]]]:
    """A table of fast kernels to write to; nothing that was chosen by another table is remembered."""
    table: dict[str, tuple[str, Kernel]] = {}
    monkeypatch.setattr(kernels, "FAST_KERNELS", table)
    choose_kernel.cache_clear()
    yield table
    choose_kernel.cache_clear()


def chosen_name(device: str = "cpu", heads: int = 4, kv_heads: int = 2) -> str:
    chosen = choose_kernel(torch.device(device), torch.float32, heads, kv_heads, 64)
    assert (chosen.kernel is clear_kernel) == chosen.name.startswith("clear")
    return chosen.name


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (9, 3), (8, 1)])
def test_the_fast_kernel_serves_common_sizes_on_the_cpu(heads: int, kv_heads: int) -> None:
    assert chosen_name("cpu", heads, kv_heads) == "flash_cpu"


def call_a_missing_op(*_: Any) -> KernelOutput:
    return torch.ops.aten._an_op_that_is_not_there()


def refuse(*_: Any) -> KernelOutput:
    raise RuntimeError("head size not supported\nException raised from somewhere.cpp")


def refuse_in_silence(*_: Any) -> KernelOutput:
    raise NotImplementedError


def off_when(wanted_kind: str) -> Kernel:
    def kernel(*args: Any) -> KernelOutput:
        output, lse = clear_kernel(*args)
        kind = "causal" if args[4] else "unmasked" if args[5] is None else "masked"
        return output + (1e-3 if kind == wanted_kind else 0), lse

    return kernel


def nan_in_the_last_lse(*args: Any) -> KernelOutput:
    output, lse = clear_kernel(*args)
    return output, lse.index_fill(0, torch.tensor(len(lse) - 1), math.nan)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (call_a_missing_op, "clear (fast failed: '_OpNamespace' 'aten' object has no attribute"),
        (refuse, "clear (fast failed: head size not supported)"),
        (refuse_in_silence, "clear (fast failed: NotImplementedError)"),
        (off_when("causal"), "clear (fast was off by 1.0e-03)"),
        (off_when("unmasked"), "clear (fast was off by 1.0e-03)"),
        (off_when("masked"), "clear (fast was off by 1.0e-03)"),
        (nan_in_the_last_lse, "clear (fast was off by nan)"),
    ],
)
def test_the_clear_kernel_serves_for_one_that_fails_and_says_why(
    fast_kernels: dict[str, tuple[str, Kernel]], kernel: Kernel, reason: str
) -> None:
    fast_kernels["cpu"] = ("fast", kernel)
    assert chosen_name().startswith(reason)


def test_a_kernel_that_agrees_serves_and_other_devices_get_the_clear_one(
    fast_kernels: dict[str, tuple[str, Kernel]],
) -> None:
    fast_kernels["cpu"] = ("fast", lambda *args: clear_kernel(*args))
    assert chosen_name() == "fast"
    assert chosen_name("meta") == "clear"


# A forest in passes


scorings = st.builds(
    Scoring,
    scaling=st.just(0.4),
    window=st.sampled_from([None, 1, 2, 3, 7, 100]),
    softcap=st.sampled_from([None, None, 0.7]),
    sinks=st.none() | st.just(torch.tensor([-1.0, 0.0, 0.5, 3.0])),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(KERNEL_ATOL), ids=str)
@pytest.mark.parametrize("is_clear", [True, False])
@given(
    batches=st.builds(batches_of_texts, seed=st.integers(0, 2**32 - 1), num_texts=st.integers(1, 20)),
    scoring_of_layer=st.tuples(scorings, scorings),
    tile_tokens=st.sampled_from([1, 2, 5, 128]),
    max_tokens=st.sampled_from([1000, 50, 6]),
    chunk_rows=st.sampled_from([1, 3, 512]),
    call_multiplications=st.sampled_from([0, 300, 1_500_000]),
)
def test_every_row_attends_to_what_leads_to_it_within_the_window(
    device: str,
    dtype: torch.dtype,
    is_clear: bool,
    batches: tuple[list[Ids], ...],
    scoring_of_layer: tuple[Scoring, Scoring],
    tile_tokens: int,
    max_tokens: int,
    chunk_rows: int,
    call_multiplications: int,
) -> None:
    attention = CallsAttention(ChosenKernel("clear", clear_kernel) if is_clear else None)
    layers = Layers((ids for batch in batches for ids in batch), 6 if is_clear else 8, dtype, device)
    for pass_, names in passes_over(batches, layers, tile_tokens, max_tokens):
        prepared = attention.prepare(pass_)
        for layer_idx, scoring in enumerate(scoring_of_layer):
            if scoring.sinks is not None:
                scoring = replace(scoring, sinks=scoring.sinks.to(device))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plan, "WINDOW_CHUNK_ROWS", chunk_rows)
                patch.setattr(plan, "CALL_MULTIPLICATIONS", call_multiplications)
                output = prepared.attend(layer_idx, *layers.rows(layer_idx, names), scoring)
            assert output.dtype == dtype
            check_close((output,), (layers.expected(layer_idx, names, scoring),), dtype)


# The keys and values that a pass reads


PROMPT = tuple(range(300))


def attend_last_pass(batches: Sequence[Sequence[Ids]], window: int | None) -> list[tuple[int, int]]:
    """The rows and keys of each kernel call of the last pass over `batches`; nothing it was given is written to."""
    layers = Layers((ids for batch in batches for ids in batch), 8, torch.float32, "cpu")
    pass_, names = list(passes_over(batches, layers, tile_tokens=128, max_tokens=4096))[-1]
    shapes: list[tuple[int, int]] = []

    def kernel(query: Tensor, key: Tensor, *args: Any) -> KernelOutput:
        shapes.append((query.shape[1], key.shape[1]))
        return clear_kernel(query, key, *args)

    rows = layers.rows(1, names)
    blocks = [segment.block for segment in pass_.segments if segment.block is not None]
    given = [*rows, *(tensor for block in blocks for tensor in block.tensors.values())]
    before = [tensor.clone() for tensor in given]
    CallsAttention(ChosenKernel("counting", kernel)).prepare(pass_).attend(1, *rows, Scoring(0.4, window))
    assert all(map(torch.equal, given, before))
    return shapes


def test_a_layer_is_one_kernel_call_for_each_segment_of_keys() -> None:
    """300 (cached) -- 200, with two leaves of one token in one tile."""
    stem = (*PROMPT, *range(200))
    shapes = attend_last_pass([[PROMPT], [(*stem, 1000), (*stem, 2000)]], window=None)
    assert sorted(shapes) == [(2, 2), (2, 200), (200, 200), (202, 300)]


def continued_prompts(num_prompts: int, num_tokens: int) -> list[list[Ids]]:
    """Prompts that share their first token, and each with one more; only those are to be computed."""
    prompts = [(9999, *range(idx * 1000, idx * 1000 + num_tokens)) for idx in range(num_prompts)]
    return [prompts, [(*prompt, 7) for prompt in prompts]]


def test_rows_whose_keys_lie_side_by_side_share_a_call_under_a_mask() -> None:
    shapes = attend_last_pass(continued_prompts(16, 10), window=None)
    assert sorted(shapes) == [(16, 16), (16, 161)]


def test_calls_are_shared_only_where_that_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CALL_MULTIPLICATIONS", 0)
    shapes = attend_last_pass(continued_prompts(16, 10), window=None)
    assert sorted(shapes) == [(1, 10)] * 16 + [(16, 1), (16, 16)]
    monkeypatch.setattr(plan, "CALL_MULTIPLICATIONS", 4 * 8 * 40)  # a call is worth 40 pairs of a row and a key
    shapes = attend_last_pass(continued_prompts(16, 10), window=None)
    assert len(shapes) < 18
    assert sum(rows * keys for rows, keys in shapes) <= 16 * 11 + 16 * 16 + 17 * 40


@pytest.mark.parametrize(("window", "num_keys"), [(1, 0), (2, 1), (7, 6), (302, 300), (999, 300)])
def test_keys_that_no_row_of_a_call_sees_are_not_read(window: int, num_keys: int) -> None:
    """300 (cached) -- 3, the first of which sees `window - 1` of the cached ones."""
    shapes = attend_last_pass([[PROMPT], [(*PROMPT, 7, 8, 9)]], window)
    assert shapes == [(3, 3), (3, num_keys)][: 2 if num_keys else 1]


def test_a_long_run_under_a_window_is_attended_to_in_chunks() -> None:
    assert attend_last_pass([[tuple(range(1300))]], window=10) == [(512, 512), (512, 521), (276, 285)]
