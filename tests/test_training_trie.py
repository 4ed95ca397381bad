"""The trie of a batch, its parts, and attention over it with gradients, against what each token must see."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backprompt.attention.base import Scoring
from backprompt.attention.kernels import clear_kernel
from backprompt.training import kernels
from backprompt.training.attention import TrieAttention
from backprompt.training.kernels import Pair, choose_pair, clear_backward
from backprompt.training.trie import Trie, cut, num_distinct, sort_order
from comparing import beginnings
from packed import attend_by_hand

CPU = torch.device("cpu")
IDS = st.sampled_from([0, 1, 2, 255, 256, 70_000])  # their bytes are not sorted as they are, little end first
ROWS = st.lists(st.lists(IDS, max_size=7), max_size=8)


def arrays(rows):
    return [np.array(row, dtype=np.int64) for row in rows]


def in_order(rows):
    given_rows = arrays(rows)
    return [given_rows[idx] for idx in sort_order(given_rows)]


# The trie


@given(ROWS)
def test_each_distinct_token_is_there_once(rows):
    ordered = in_order(rows)
    assert [row.tolist() for row in ordered] == sorted(rows)
    trie = Trie.of(ordered)
    assert len(trie.token_ids) == num_distinct(arrays(rows)) == len(beginnings(map(tuple, rows)))
    for row, nodes in zip(ordered, trie.nodes, strict=True):
        assert trie.token_ids[nodes].tolist() == row.tolist()
        assert trie.positions[nodes].tolist() == list(range(len(row)))


@given(ROWS)
def test_a_token_sees_its_own_beginning_and_nothing_else(rows):
    trie = Trie.of(in_order(rows))
    tokens = np.arange(len(trie.until))
    sees = (tokens <= tokens[:, None]) & (tokens[:, None] < trie.until)
    for nodes in trie.nodes:
        for idx, node in enumerate(nodes):
            assert sees[node].nonzero()[0].tolist() == nodes[: idx + 1].tolist()


@given(ROWS)
def test_edges_are_the_runs_between_branches(rows):
    trie = Trie.of(in_order(rows))
    assert [node for edge in trie.edges for node in range(edge.start, edge.stop)] == list(range(len(trie.until)))
    paths = beginnings(map(tuple, rows))
    num_children = {path: sum(other[:-1] == path for other in paths) for path in {*paths, ()}}
    starts = sum(num for path, num in num_children.items() if num != 1 or path == ())
    assert len(trie.edges) == starts


# Parts


@given(ROWS, st.integers(1, 20))
def test_no_cut_is_cheaper(rows, max_tokens):
    """All cuts of few rows are tried."""
    ordered = in_order(rows)
    allowed = max(max_tokens, *map(len, rows), 0)

    def sizes(parts):
        return [len(Trie.of(ordered[part]).token_ids) for part in parts]

    parts = cut(ordered, max_tokens)
    assert [idx for part in parts for idx in range(part.start, part.stop)] == list(range(len(rows)))
    assert all(size <= allowed for size in sizes(parts))
    costs = []
    for chosen in range(2 ** max(len(rows) - 1, 0)):
        bounds = [0, *(idx + 1 for idx in range(len(rows) - 1) if chosen >> idx & 1), len(rows)]
        tried = [slice(*pair) for pair in pairwise(bounds) if pair[0] < pair[1]]
        if all(size <= allowed for size in sizes(tried)):
            costs.append((sum(sizes(tried)), len(tried)))
    assert (sum(sizes(parts)), len(parts)) == min(costs)


def test_a_group_is_cut_where_another_begins():
    groups = [[first, 1, 1, 1, last] for first in (1, 2) for last in range(4)]
    parts = cut(arrays(groups), 9)
    assert parts == [slice(0, 4), slice(4, 8)]  # a greedy cut would hold five rows of the first ten


# Attention


def random_trie(generator, num_ids=3):
    base = [generator.randrange(num_ids) for _ in range(generator.randrange(30))]
    rows = [
        base[: generator.randrange(len(base) + 1)]
        + [generator.randrange(num_ids) for _ in range(generator.randrange(1, 40))]
        for _ in range(generator.randrange(1, 7))
    ]
    return Trie.of(in_order(rows))


def visible_in(trie, window):
    tokens = np.arange(len(trie.until))
    visible = (tokens <= tokens[:, None]) & (tokens[:, None] < trie.until)
    if window is not None:
        visible &= trie.positions[:, None] - trie.positions < window
    return torch.from_numpy(visible)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_and_its_gradients_are_those_written_out(dtype, window, softcap, has_sinks):
    for seed in range(6):
        generator = random.Random(seed)
        torch.manual_seed(seed)
        trie, (heads, kv_heads) = random_trie(generator), generator.choice([(4, 4), (4, 2), (3, 1)])
        sinks = torch.randn(heads, dtype=dtype, requires_grad=True) if has_sinks else None
        scoring = Scoring(0.3, window, softcap, sinks)
        # The layout of models: heads are interleaved in each row.
        leaves = [
            torch.randn((len(trie.until), num, 16), dtype=dtype, requires_grad=True)
            for num in (heads, kv_heads, kv_heads)
        ]
        query, key, value = (leaf.transpose(0, 1) for leaf in leaves)
        attention = TrieAttention(trie, CPU)
        found = attention.attend(query, key, value, scoring)
        expected, _ = attend_by_hand(query, key, value, scoring, visible_in(trie, window))
        upstream = torch.randn_like(found)
        leaves += [] if sinks is None else [sinks]
        gradients = torch.autograd.grad(found, leaves, upstream)
        by_hand = torch.autograd.grad(expected.to(dtype), leaves, upstream)
        for ours, theirs in zip((found, *gradients), (expected.to(dtype), *by_hand), strict=True):
            assert (ours - theirs).norm() <= torch.finfo(dtype).eps * (30 * theirs.norm() + 200)  # some are 0
        assert attention.name == ("flash_cpu" if softcap is None else "clear (soft cap)")


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_autocast_decides_about_the_dtype_and_not_about_the_kernels(softcap):
    trie = random_trie(random.Random(1))
    tensors = [torch.randn((2, len(trie.until), 8), requires_grad=True) for _ in range(3)]
    lower = [tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in tensors]
    expected = TrieAttention(trie, CPU).attend(*lower, Scoring(0.3, softcap=softcap))
    with torch.autocast("cpu", torch.bfloat16):
        found = TrieAttention(trie, CPU).attend(*tensors, Scoring(0.3, softcap=softcap))
        gradients = torch.autograd.grad(found.sum(), tensors)
    assert torch.equal(found, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), lower), strict=True):
        assert torch.equal(ours, theirs.float())


def test_one_call_an_edge_and_no_mask_for_causal_attention(monkeypatch):
    trie = Trie.of(in_order([[0] * 20 + [row] * 5 for row in range(1, 9)]))
    tensors = [torch.randn((2, len(trie.until), 8), requires_grad=True) for _ in range(3)]
    masks = []

    def forward(query, key, value, scaling, is_causal, mask):
        masks.append(mask)
        return clear_kernel(query, key, value, scaling, is_causal, mask)

    monkeypatch.setattr(kernels, "choose_pair", lambda *_: Pair("counted", forward, clear_backward))
    TrieAttention(trie, CPU).attend(*tensors, Scoring(0.3)).sum().backward()
    assert masks == [None] * 9


def test_windows_read_no_keys_that_nobody_sees(monkeypatch):
    """A long row under a short window: rows x keys of all calls grow with the row, not with its square."""
    areas = []

    def forward(query, key, value, scaling, is_causal, mask):
        areas.append(query.shape[1] * key.shape[1])
        return clear_kernel(query, key, value, scaling, is_causal, mask)

    monkeypatch.setattr(kernels, "choose_pair", lambda *_: Pair("counted", forward, clear_backward))
    trie = Trie.of([np.arange(400)])
    tensors = [torch.randn((2, 400, 8)) for _ in range(3)]
    TrieAttention(trie, CPU).attend(*tensors, Scoring(0.3, window=10))
    assert sum(areas) <= 400 * 20


# Kernels


@pytest.fixture
def fresh_choice():
    choose_pair.cache_clear()
    yield
    choose_pair.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_the_callers_settings_do_not_decide():
    tensors = [torch.randn((2, 3, 16), dtype=torch.float64) for _ in range(3)]
    attention = TrieAttention(Trie.of([np.arange(3)]), CPU)
    with torch.device("meta"), torch.inference_mode():
        attention.attend(*tensors, Scoring(0.3))
    assert attention.name == "flash_cpu"


FAST = [
    ("cpu", "flash_cpu", torch.float64),
    ("cpu", "flash_cpu", torch.float32),
    ("cpu", "flash_cpu", torch.bfloat16),
    pytest.param("cuda", "efficient_cuda", torch.bfloat16, marks=pytest.mark.cuda),
]


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize(("device", "name", "dtype"), FAST, ids=str)
def test_the_fast_pair_serves(device, name, dtype):
    chosen = [choose_pair(torch.device(device), dtype, 4, kv_heads, 16).name for kv_heads in (4, 2, 1)]
    assert chosen == [name] * 3


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("wrong", ["off", "missing"])
def test_a_backward_that_is_wrong_is_not_used(wrong, monkeypatch):
    def backward(*args):
        if wrong == "missing":
            raise AttributeError("no such operation")
        grad_query, grad_key, grad_value = clear_backward(*args)
        return grad_query, grad_key * 1.001, grad_value

    monkeypatch.setitem(kernels.FAST_BACKWARDS, "cpu", backward)
    pair = choose_pair(CPU, torch.float32, 4, 2, 16)
    assert pair.backward is clear_backward
    assert pair.name.startswith("clear (flash_cpu was off" if wrong == "off" else "clear (flash_cpu failed: no such")


def test_values_of_another_size_than_keys():
    trie = random_trie(random.Random(0))
    query, key = (torch.randn((2, len(trie.until), 8), dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = torch.randn((2, len(trie.until), 5), dtype=torch.float64, requires_grad=True)
    attention = TrieAttention(trie, CPU)
    found = attention.attend(query, key, value, Scoring(0.3))
    expected, _ = attend_by_hand(query, key, value, Scoring(0.3), visible_in(trie, None))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert attention.name == "clear (keys and values differ in size)"
