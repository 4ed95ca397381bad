"""The one-launch attention against a softmax written out; on the CPU Triton's interpreter runs the kernels."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="there is no wheel of triton for this platform")

from backprompt import LM, Text, evaluate
from backprompt.attention import launches
from backprompt.attention import triton as one_launch
from backprompt.attention.base import Scoring
from backprompt.attention.calls import CallsAttention
from backprompt.attention.choice import attention_for
from backprompt.attention.launches import Launcher
from backprompt.attention.shapes import Launch, Shape, launch_for
from backprompt.attention.tables import Cut, Segments, Work
from backprompt.attention.tiles import Tile, tiles_for
from backprompt.attention.triton import OneLaunch, TritonAttention, reason_against
from backprompt.forest.plan import KeySegment
from backprompt.memory.blocks import KeysValues
from backprompt.model import executor
from comparing import assert_equals_plain
from packed import Ids, Layers, attend_by_hand, batches_of_texts, check_close, draw, passes_over
from quick import up_to
from tiny_models import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tile(rows=16, keys=16, warps=4, stages=2)
"""So small that short texts need several tiles and pieces."""


def launch_of(*, split: bool) -> Launch:
    """With `split`, each piece of keys has a program of its own."""
    return Launch(SMALL, programs_a_processor=1e9, least_pieces=1 if split else 1_000_000)


def attention_of(*, split: bool = False) -> TritonAttention:
    """An attention that serves here."""
    return TritonAttention(launch_of(split=split), device_types={DEVICE})


def sinks_of(heads: int) -> torch.Tensor:
    return torch.linspace(-1, 3, heads)


scorings = st.builds(
    Scoring,
    scaling=st.just(0.4),
    window=st.sampled_from([None, None, 1, 2, 7, 100]),
    softcap=st.sampled_from([None, None, 0.7]),
    sinks=st.booleans(),
)


@given(
    batches=st.builds(batches_of_texts, seed=st.integers(0, 2**32 - 1), num_texts=st.integers(1, 8)),
    scoring_of_layer=st.tuples(scorings, scorings),
    shape=st.sampled_from([(4, 4, 16), (4, 2, 20), (5, 1, 16), (6, 1, 8), (7, 1, 12), (20, 1, 8), (2, 2, 80)]),
    dtype=st.sampled_from(DTYPES),
    tile_tokens=st.sampled_from([1, 5, 128]),
    max_tokens=st.sampled_from([1000, 50, 6]),
    split=st.booleans(),
)
@settings(max_examples=up_to(12))
def test_every_row_attends_to_what_leads_to_it_within_the_window(
    batches: tuple[list[Ids], ...],
    scoring_of_layer: tuple[Scoring, Scoring],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    tile_tokens: int,
    max_tokens: int,
    split: bool,
) -> None:
    heads, kv_heads, head_dim = shape
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    layers = Layers((ids for batch in batches for ids in batch), head_dim, dtype, DEVICE, **sizes)
    attention = attention_of(split=split)
    for pass_, names in passes_over(batches, layers, tile_tokens, max_tokens):
        prepared = attention.prepare(pass_)
        for layer_idx, scoring in enumerate(scoring_of_layer):
            scoring = replace(scoring, sinks=sinks_of(heads).to(DEVICE) if scoring.sinks else None)
            output = prepared.attend(layer_idx, *layers.rows(layer_idx, names), scoring)
            assert attention.name == "triton"
            assert output.dtype == dtype
            check_close((output,), (layers.expected(layer_idx, names, scoring),), dtype)


# Segments by hand


def attend(
    segments: list[KeySegment],
    positions: list[int],
    *,
    split: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output for two heads of 16 numbers, and queries, keys and values of the rows."""
    rows = [draw(2, len(positions), 16, seed).to(DEVICE, dtype) for seed in range(3)]
    forest = OneLaunch(Segments.of(segments, positions))
    return forest.attend(0, *rows, Scoring(0.4), launch_of(split=split)), rows


@pytest.mark.parametrize("split", [False, True])
def test_rows_that_see_nothing_get_zeros(split: bool) -> None:
    """Rows 0..20, of which only the last five have a segment."""
    output, _ = attend([KeySegment.own(15, 20, 15)], list(range(20)), split=split)
    assert output[:15].eq(0).all()
    assert output[15:].ne(0).all()


@pytest.mark.parametrize("times", [1, 3])
def test_keys_that_count_several_times(times: int) -> None:
    block = KeysValues.of([draw(2, 40, 16, 7).contiguous().to(DEVICE)], [draw(2, 40, 16, 8).contiguous().to(DEVICE)])
    segments = [KeySegment.own(0, 3, 40), KeySegment(0, 3, block, 1, 39, 1, times=times)]
    output, (query, key, value) = attend(segments, [40, 41, 42])
    keys, values = block.layer(0, slice(1, 39))
    visible = torch.cat([torch.ones(3, 38 * times), torch.ones(3, 3).tril()], dim=1).bool().to(DEVICE)
    keys, values = (torch.cat([*[a] * times, b], dim=1) for a, b in ((keys, key), (values, value)))
    check_close((output,), attend_by_hand(query, keys, values, Scoring(0.4), visible)[:1], torch.float32)


def test_blocks_of_more_than_2_to_the_31_numbers() -> None:
    """The first head and the last rows of the second are over 2 ** 31 numbers apart; the pages between stay unused."""
    num_keys = (1 << 31) // 16 + 100
    tensors = [torch.empty((2, num_keys, 16), dtype=torch.float16, device=DEVICE) for _ in range(2)]
    for seed, tensor in enumerate(tensors):
        tensor[:, -30:] = draw(2, 30, 16, seed).to(DEVICE)
    block = KeysValues.of(tensors[:1], tensors[1:])
    segments = [KeySegment.own(0, 2, 30), KeySegment(0, 2, block, num_keys - 30, num_keys, 0)]
    output, (query, key, value) = attend(segments, [30, 31], dtype=torch.float16)
    visible = torch.cat([torch.ones(2, 30), torch.ones(2, 2).tril()], dim=1).bool().to(DEVICE)
    keys, values = (torch.cat([a[:, -30:], b], dim=1) for a, b in zip(tensors, (key, value), strict=True))
    check_close((output,), attend_by_hand(query, keys, values, Scoring(0.4), visible)[:1], torch.float16)


# The tables


def work_of(segments: list[KeySegment], positions: list[int], window: int | None = None, **cut: Any) -> Work:
    sizes = {"tile_rows": 16, "piece_keys": 16, "shares": 1.0, "least_pieces": 1_000_000}
    return Work.of(Segments.of(segments, positions), Cut(**{**sizes, **cut}), window)


def test_keys_behind_the_rows_of_a_tile_are_not_read() -> None:
    """A causal run of 64 rows: tiles of 16 rows see 1, 2, 3 and 4 pieces of 16 keys; the longest list comes first."""
    work = work_of([KeySegment.own(0, 64, 0)], list(range(64)))
    assert [tuple(row) for row in work.programs[:, :2]] == [(48, 64), (32, 48), (16, 32), (0, 16)]
    assert [last - first for first, last in work.programs[:, 2:4]] == [4, 3, 2, 1]


def test_keys_outside_the_window_are_not_read() -> None:
    """16 rows behind 100 keys at positions 0 to 99, under a window of 20: positions 81 to 99, in two pieces."""
    segments = [KeySegment.own(0, 16, 100), KeySegment(0, 16, object(), 0, 100, 0)]
    work = work_of(segments, list(range(100, 116)), window=20)
    assert work.pieces[:, :3].tolist() == [[-1, 0, 16], [0, 81, 16], [0, 97, 3]]
    assert len(work_of(segments, list(range(100, 116))).pieces) == 1 + 7


def test_few_rows_with_many_keys_are_shared_by_programs() -> None:
    """A row behind 1600 keys: 101 pieces, in four programs; each piece in exactly one."""
    segments = [KeySegment.own(0, 1, 1600), KeySegment(0, 1, object(), 0, 1600, 0)]
    work = work_of(segments, [1600], shares=4, least_pieces=2)
    ranges = sorted(tuple(row) for row in work.programs[:, 2:4].tolist())
    assert [stop - start for start, stop in ranges] == [33, 34, 34]
    assert [idx for first, last in ranges for idx in range(first, last)] == list(range(101))
    assert work.joins.tolist() == [[0, 1, 0, len(ranges)]]
    assert sorted(work.programs[:, 4]) == list(range(len(ranges))) == list(range(work.num_slots))


def test_pieces_that_all_rows_of_a_tile_see() -> None:
    """Rows 0..40 behind 20 keys, and rows 16..40 behind 16 more: of tiles of 16 rows, pieces of 16 keys."""
    segments = [KeySegment(0, 40, object(), 0, 20, 0), KeySegment(16, 40, object(), 0, 16, 20)]
    segments.append(KeySegment.own(0, 40, 36))
    pieces = work_of(segments, list(range(36, 76))).pieces
    assert pieces[:, [0, 1, 2, 6]].tolist() == [
        *[[0, 0, 16, 2], [0, 16, 4, 0], [-1, 0, 16, 1]],
        *[[0, 0, 16, 2], [0, 16, 4, 0], [1, 0, 16, 2], [-1, 0, 16, 1], [-1, 16, 16, 1]],
        *[[0, 0, 16, 2], [0, 16, 4, 0], [1, 0, 16, 2], [-1, 0, 16, 1], [-1, 16, 16, 1], [-1, 32, 8, 1]],
    ]


def test_the_tile_follows_the_plan() -> None:
    """Few rows, and many rows of which each has keys of its own, take the tile for few rows."""
    shape = Shape(torch.device("cpu"), torch.bfloat16, 12, 12, 64)
    many, few = tiles_for(64, 2)

    def tile_of(segments: list[KeySegment], num_rows: int) -> Tile:
        return launch_for(shape, Segments.of(segments, range(num_rows))).tile

    assert tile_of([KeySegment.own(0, 40, 0)], 40) == few
    assert tile_of([KeySegment.own(0, 4000, 0)], 4000) == many
    block = object()
    apart = [KeySegment(row, row + 1, block, 500 * row, 500 * row + 500, 0) for row in range(1000)]
    assert tile_of(apart, 1000) == few
    assert tile_of([KeySegment(0, 1000, block, 0, 500, 0)], 1000) == many


# Launches, and which attention serves


@pytest.mark.parametrize(("split", "launches"), [(False, [2, 0]), (True, [2, 2])])
def test_a_layer_is_one_launch_or_two_with_shared_rows(
    monkeypatch: pytest.MonkeyPatch, split: bool, launches: list[int]
) -> None:
    """A pass of several tiles over keys in two blocks, in two layers."""
    batches = [[(1, 2, 3), (4, 5)], [(1, 2, 3, *range(40)), (4, 5, 6), (4, 5, 7)]]
    layers = Layers((ids for batch in batches for ids in batch), 8, torch.float32, DEVICE)
    *_, (pass_, names) = passes_over(batches, layers, tile_tokens=8, max_tokens=1000)
    attention = attention_of(split=split)
    attention.prepare(pass_).attend(0, *layers.rows(0, names), Scoring(0.4))  # compares the kernel first
    launched = []
    launch = Launcher.launch

    def count(launcher: Launcher, *args: Any) -> None:
        launched.append(launcher.kernel)
        launch(launcher, *args)

    monkeypatch.setattr(Launcher, "launch", count)
    prepared = attention.prepare(pass_)
    for layer_idx in (0, 1):
        prepared.attend(layer_idx, *layers.rows(layer_idx, names), Scoring(0.4))
    assert [launched.count(kernel) for kernel in (one_launch.attend_kernel, one_launch.join_kernel)] == launches


def pass_of(num_texts: int) -> tuple[Any, list[torch.Tensor]]:
    """A pass over texts of two tokens, and the queries, keys and values of its rows."""
    texts = [(idx, 7) for idx in range(num_texts)]
    layers = Layers(texts, 8, torch.float32, DEVICE)
    ((pass_, names),) = passes_over([texts], layers, tile_tokens=8, max_tokens=1000)
    return pass_, layers.rows(0, names)


@pytest.mark.parametrize("is_hooked", [False, True])
def test_a_kernel_is_looked_up_once_for_all_arguments_of_a_kind(
    is_hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second launch calls the compiled kernel, with addresses; another alignment or stride is another kind.

    Triton describes launches only for the hooks of a profiler.
    """
    calls: list[tuple[str, tuple[object, ...]]] = []
    chain = launches.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(chain, "calls", [lambda metadata: None] if is_hooked else [])
    active = SimpleNamespace(get_current_stream=lambda device: device + 90)
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=active))

    def recorded(name: str, result: object) -> Any:
        class Recorder:
            function, packed_metadata = "function", "packed"

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
                assert grid[0] == 7
                assert is_hooked or name == "kernel"
                return lambda *args, **_: (calls.append((name, args)), result)[1]

            def run(self, *args: object) -> None:
                assert args[:9] == (7, 1, 1, 90, "function", "packed", None, None, None)
                assert not is_hooked
                calls.append((name, args[9:]))

        return Recorder()

    launcher = Launcher(recorded("kernel", recorded("compiled", None)), {"A": 1, "B": False}, {"num_warps": 4})
    tensor = torch.zeros(64)
    launcher.launch(7, [tensor], [32], [0.5])
    launcher.launch(7, [tensor[16:]], [64], [1.5])
    assert calls == [("kernel", (tensor, 32, 0.5)), ("compiled", (tensor[16:].data_ptr(), 64, 1.5, 1, False))]
    for tensors, sizes, others in (
        ([tensor[1:]], [32], [0.5]),
        ([tensor], [1], [0.5]),
        ([tensor], [17], [0.5]),
        ([tensor], [1 << 31], [0.5]),
        ([tensor], [32], [1 << 31]),
    ):
        calls.clear()
        launcher.launch(7, tensors, sizes, others)
        assert [name for name, _ in calls] == ["kernel"]


@pytest.mark.cuda
def test_a_pass_waits_for_nothing() -> None:
    attention = TritonAttention()
    passes = [pass_of(40), pass_of(50)]
    attention.prepare(passes[0][0]).attend(0, *passes[0][1], Scoring(0.4))  # compares the kernel first
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention.prepare(passes[1][0]).attend(0, *passes[1][1], Scoring(0.4))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_passes_of_other_sizes_compile_nothing_new() -> None:
    """Few rows and many take a tile each, and each tile is compiled once."""
    attention = TritonAttention()
    compiled, tiles = [], []
    for num_texts in (16, 300, 17, 40, 111, 301, 450):
        pass_, rows = pass_of(num_texts)
        tiles.append(attention.launch_for(Shape.of(*rows[:2]), Segments.of(pass_.segments, pass_.positions)).tile)
        attention.prepare(pass_).attend(0, *rows, Scoring(0.4))
        compiled.append(sum(len(caches[0]) for caches in one_launch.attend_kernel.device_caches.values()))
    assert set(tiles[:2]) == set(tiles)
    assert len(set(tiles)) == 2
    assert len(set(compiled[1:])) == 1


@pytest.fixture
def nothing_compared() -> Iterator[None]:
    caches = reason_against, one_launch.launchers
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


class Failing:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        raise RuntimeError("no compiler\nand more")


class Idle:
    """Leaves the output and the partial results as they were found: zeros, or worse, of which numpy would warn."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: torch.Tensor, **_: object) -> None:
            for written in (args[3], *args[5:7]):
                written.zero_()

        return launch


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.parametrize(
    ("kernel", "reason"), [(Failing(), "(triton failed: no compiler)"), (Idle(), "(triton was off by ")]
)
def test_the_calls_serve_where_the_kernel_fails(monkeypatch: pytest.MonkeyPatch, kernel: Any, reason: str) -> None:
    monkeypatch.setattr(one_launch, "attend_kernel", kernel)
    layers = Layers([(1, 2, 3)], 8, torch.float32, DEVICE)
    ((pass_, names),) = passes_over([[(1, 2, 3)]], layers, tile_tokens=8, max_tokens=1000)
    attention = attention_of()
    output = attention.prepare(pass_).attend(0, *layers.rows(0, names), Scoring(0.4))
    check_close((output,), (layers.expected(0, names, Scoring(0.4)),), torch.float32)
    assert reason in attention.name


@pytest.mark.parametrize(
    ("dtype", "value_dim", "device_types", "reason"),
    [
        (torch.float64, 8, {DEVICE}, "(triton is not used for torch.float64)"),
        (torch.float32, 6, {DEVICE}, "(keys and values differ in size)"),
        (torch.float32, 8, {"xpu"}, f"(triton is not used on {DEVICE})"),
    ],
)
def test_the_calls_serve_where_the_kernel_does_not(
    dtype: torch.dtype, value_dim: int, device_types: set[str], reason: str
) -> None:
    layers = Layers([(1, 2, 3)], value_dim, dtype, DEVICE)
    ((pass_, names),) = passes_over([[(1, 2, 3)]], layers, tile_tokens=8, max_tokens=1000)
    attention = TritonAttention(device_types=device_types)
    output = attention.prepare(pass_).attend(0, *layers.rows(0, names), Scoring(0.4))
    check_close((output,), (layers.expected(0, names, Scoring(0.4)),), dtype)
    assert reason in attention.name


@pytest.mark.parametrize(("head_dim", "kernel"), [(256, "triton"), (257, "heads of more than 256 numbers)")])
def test_the_calls_serve_for_large_heads(head_dim: int, kernel: str) -> None:
    layers = Layers([(1, 2, 3)], head_dim, torch.float32, DEVICE, head_dim=head_dim)
    ((pass_, names),) = passes_over([[(1, 2, 3)]], layers, tile_tokens=8, max_tokens=1000)
    attention = TritonAttention(device_types={DEVICE})
    output = attention.prepare(pass_).attend(0, *layers.rows(0, names), Scoring(0.1))
    check_close((output,), (layers.expected(0, names, Scoring(0.1)),), torch.float32)
    assert attention.name.endswith(kernel)


def test_the_choice_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(attention_for(torch.device("cpu")), CallsAttention)
    assert isinstance(attention_for(torch.device("cuda")), TritonAttention)
    monkeypatch.setitem(sys.modules, "backprompt.attention.triton", None)
    attention = attention_for(torch.device("cuda"))
    assert isinstance(attention, CallsAttention)
    attention.kernel_for(*[torch.zeros(1, 1, 8)] * 3)
    assert attention.name.endswith("(no triton: import of backprompt.attention.triton halted; None in sys.modules)")


# Whole models


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "mistral_sliding"])
def test_models_give_the_numbers_of_the_plain_call(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts in two evaluations and small passes; the second reads the blocks of the first."""
    monkeypatch.setattr(executor, "attention_for", lambda device: TritonAttention(device_types={DEVICE}))
    model = FAMILIES[name]().to(DEVICE)
    lm = LM(model, tokenizer, max_tokens_per_forward=20)
    stem = Text("The cat sat on the mat", lm)
    texts = [stem, stem + " and sat", stem + " 12" + " 34", Text("é", lm)]
    evaluate(texts[:1])
    evaluate(texts)
    assert lm.stats.kernel == "triton"
    assert_equals_plain(model, texts)
