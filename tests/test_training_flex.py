"""FlexAttention over a trie: its mask, its call, and when it serves.

On the CPU torch refuses FlexAttention where a gradient is wanted, though the parts of its compiler that need no device
find one. With that check off, the numbers and gradients of the very call that CUDA compiles are tested here.
"""

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_gradients import check, family, gradients, in_training, recomputing
from test_training_trie import CPU, in_order, random_trie, visible_in
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import flex_attention as torch_flex
from training_batches import group

from backprompt.attention.base import Scoring
from backprompt.training import attention, flex, token_logprobs
from backprompt.training.attention import TrieAttention
from backprompt.training.trie import Trie
from packed import attend_by_hand
from tiny_models import build


@pytest.fixture
def graphs(monkeypatch):
    """FlexAttention comes first on the CPU, too; the graphs that torch has compiled for it, which run as they are."""
    made, real = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    monkeypatch.setitem(attention.ORDER, "cpu", ("flex", "fast"))
    flex.choose.cache_clear()
    yield made
    flex.choose.cache_clear()
    torch._dynamo.reset()


# The mask


def blocks_of(num_blocks, indices):
    dense = np.zeros(indices.shape[2:], dtype=bool)
    for row, num in enumerate(num_blocks[0, 0].tolist()):
        dense[row, indices[0, 0, row, :num]] = True
    return dense


def in_blocks(visible, reduce):
    """Of each block of 4 rows and 4 keys; tokens that are not there see nothing."""
    padded = np.pad(visible, (0, -len(visible) % 4))
    num = len(padded) // 4
    return reduce(padded.reshape(num, 4, num, 4), axis=(1, 3))


@given(st.integers(0, 1000), st.sampled_from([None, 1, 5, 20]))
def test_the_table_of_blocks_and_the_mask_say_what_is_visible(seed, window):
    trie = random_trie(random.Random(seed))
    visible = visible_in(trie, window).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", 4)
        mask = flex.block_mask(trie, window, CPU)
    tokens = torch.arange(len(visible))
    assert np.array_equal(mask.mask_mod(None, None, tokens[:, None], tokens), visible)
    every, some = in_blocks(visible, np.all), in_blocks(visible, np.any)
    asks = blocks_of(mask.kv_num_blocks, mask.kv_indices)
    whole = blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert np.array_equal(whole, every)
    assert not (asks & whole).any()
    assert not (some & ~asks & ~whole).any()
    if window is None:
        assert np.array_equal(asks | whole, some)
    assert np.array_equal(blocks_of(mask.q_num_blocks, mask.q_indices), asks.T)
    assert np.array_equal(blocks_of(mask.full_q_num_blocks, mask.full_q_indices), whole.T)


def test_a_group_leaves_most_blocks_out():
    """Of 16 rows of 2 blocks behind 2 blocks, each row sees the beginning and itself."""
    trie = Trie.of(in_order([[0] * 256 + [row] * 256 for row in range(1, 17)]))
    mask = flex.block_mask(trie, None, CPU)
    assert mask.full_kv_num_blocks.sum() == 1 + 16 * (2 * 2 + 1)
    assert mask.kv_num_blocks.sum() == 2 + 16 * 2


# The call


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_and_its_gradients_are_those_written_out(window, softcap, has_sinks):
    for seed in range(3):
        check_attention(random_trie(random.Random(seed)), 4, 2, torch.float64, window, softcap, has_sinks)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (3, 1)])
def test_other_heads_and_values_of_another_size_than_keys(heads, kv_heads):
    for value_dim in (16, 8):
        trie = random_trie(random.Random(heads))
        check_attention(trie, heads, kv_heads, torch.float32, None, None, False, value_dim=value_dim)


def check_attention(trie, heads, kv_heads, dtype, window, softcap, has_sinks, device=CPU, value_dim=16):
    generator = torch.Generator().manual_seed(heads)

    def draw(*shape):
        return torch.randn(shape, dtype=dtype, generator=generator).to(device)

    sizes = ((heads, 16), (kv_heads, 16), (kv_heads, value_dim))
    leaves = [draw(len(trie.until), *size).requires_grad_() for size in sizes]  # the layout of models
    leaves += [draw(heads).requires_grad_()] if has_sinks else []
    query, key, value = (leaf.transpose(0, 1) for leaf in leaves[:3])
    scoring = Scoring(0.3, window, softcap, leaves[3] if has_sinks else None)
    attended = TrieAttention(trie, device)
    found = attended.attend(query, key, value, scoring)
    assert attended.name == "flex"
    expected, _ = attend_by_hand(query, key, value, scoring, visible_in(trie, window).to(device))
    upstream = draw(*found.shape)
    ours = torch.autograd.grad(found, leaves, upstream)
    theirs = torch.autograd.grad(expected.to(dtype), leaves, upstream)
    for own, by_hand in zip((found, *ours), (expected.to(dtype), *theirs), strict=True):
        assert (own - by_hand).norm() <= torch.finfo(dtype).eps * (30 * by_hand.norm() + 200)  # some are 0


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    ("name", "use_reentrant"),
    [("llama", False), ("llama", True), ("gemma2", None), ("mistral_sliding", False), ("gpt_oss", None)],
)
def test_gradients_of_models(name, use_reentrant, monkeypatch):
    """The first choice may be made within a part, or a layer, that the backward computes again."""
    names, attend = set(), TrieAttention.attend

    def noted(self, *args):
        attended = attend(self, *args)
        names.add(self.name)
        return attended

    monkeypatch.setattr(TrieAttention, "attend", noted)
    model = family(name)
    if use_reentrant is not None:
        model = recomputing(in_training(build(name)), use_reentrant)
        model.enable_input_require_grads()
    check(model, group(4, 14, 5), 0.7, ("entropy",), max_tokens_per_forward=24)
    check(model, group(4, 14, 5), 0.7)
    assert names == {"flex"}


# Compilation


def test_one_compilation_serves_tries_of_any_size_and_scores_of_any_number(graphs):
    drawn = random.Random(0)
    for num_tokens in (300, 400, 129, 700):
        scoring = Scoring(drawn.random(), None, 1 + drawn.random())
        tensors = [torch.randn((num_tokens, 2, 16), requires_grad=True).transpose(0, 1) for _ in range(3)]
        attended = TrieAttention(Trie.of([np.arange(num_tokens)]), CPU)
        attended.attend(*tensors, scoring).sum().backward()
        assert attended.name == "flex"
    assert len(graphs) == 2  # one is for a single block: the comparison was over such a trie, too


@pytest.mark.usefixtures("graphs")
def test_where_torch_stops_compiling_the_calls_serve():
    attended = TrieAttention(Trie.of([np.arange(300)]), CPU)
    tensors = [torch.randn((300, 2, 16)).transpose(0, 1) for _ in range(3)]
    names, found = [], []
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            tensors[len(names) % 3] = tensors[len(names) % 3].contiguous()
            found.append(attended.attend(*tensors, Scoring(0.3)))
            names.append(attended.name)
    assert names[-1] == "flash_cpu (flex failed: torch has compiled it too often)"
    torch.testing.assert_close(found[-1], found[0], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("graphs")
def test_nothing_is_left_of_a_trie(monkeypatch):
    left = []

    def noted(*arguments):
        mask = flex.block_mask(*arguments)
        left.append(weakref.ref(mask))
        return mask

    monkeypatch.setattr(attention, "block_mask", noted)
    trie = Trie.of([np.arange(300)])
    tensors = [torch.randn((2, 300, 16), requires_grad=True) for _ in range(3)]
    left += [weakref.ref(trie), weakref.ref(tensors[0])]
    TrieAttention(trie, CPU).attend(*tensors, Scoring(0.3)).sum().backward()
    del trie, tensors
    gc.collect()
    assert [reference() for reference in left] == [None] * 3


# When it does not serve


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [("off", "flex was off by"), ("failing", "flex failed: no compiler"), ("switched off", "flex failed: torch.comp")],
)
def test_a_call_that_is_wrong_does_not_serve(wrong, reason, monkeypatch, caplog):
    right = flex.compiled()

    def off(*arguments):
        output, lse = right(*arguments)
        return output * 1.001, lse

    def failing(*_):
        raise RuntimeError("no compiler\nmore of it")

    calls = {"off": off, "failing": failing, "switched off": right}
    monkeypatch.setattr(flex, "compiled", lambda: calls[wrong])
    trie = random_trie(random.Random(0))
    tensors = [torch.randn((2, len(trie.until), 16), requires_grad=True) for _ in range(3)]
    attended = TrieAttention(trie, CPU)
    is_off = torch._dynamo.config.patch(disable=wrong == "switched off")
    with caplog.at_level("INFO", logger="backprompt"), is_off:
        for _ in range(2):
            found = attended.attend(*tensors, Scoring(0.3))
    assert attended.name.startswith(f"flash_cpu ({reason}")
    assert "more of it" not in attended.name
    if wrong != "switched off":  # which holds for this thread, at this time
        assert len(caplog.records) == 1
        assert reason in caplog.text
    expected, _ = attend_by_hand(*tensors, Scoring(0.3), visible_in(trie, None))
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("graphs")
def test_memory_that_runs_out_says_nothing_about_the_call(monkeypatch):
    def greedy(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(flex, "compiled", lambda: greedy)
    tensors = [torch.randn((2, 3, 16)) for _ in range(3)]
    with pytest.raises(torch.OutOfMemoryError):
        TrieAttention(Trie.of([np.arange(3)]), CPU).attend(*tensors, Scoring(0.3))
    with pytest.raises(torch.OutOfMemoryError):
        TrieAttention(Trie.of([np.arange(3)]), CPU).attend(*tensors, Scoring(0.3))  # the choice is not kept


# The real thing


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_on_cuda(window, softcap, has_sinks):
    for seed, (heads, kv_heads) in enumerate([(4, 4), (4, 2), (3, 1)] * 2):
        trie = random_trie(random.Random(seed))
        check_attention(trie, heads, kv_heads, torch.float32, window, softcap, has_sinks, torch.device("cuda"))


@pytest.mark.cuda
def test_on_cuda_in_half_precision_and_with_values_of_another_size():
    device = torch.device("cuda")
    for dtype, value_dim in ((torch.bfloat16, 64), (torch.float16, 32)):
        choice = flex.choose(flex.Kind(device, dtype, 8, 2, 64, value_dim, False, False, False))
        assert choice.reason == ""


@pytest.mark.cuda
def test_gradients_of_a_model_on_cuda():
    """The same as by the calls, in float32."""
    model = build("llama", hidden_size=64, head_dim=16).cuda()
    batch = group(8, 150, 40)
    ids, mask = (tensor.cuda() for tensor in batch.tensors())
    found = []
    for order in (("flex",), ()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(attention.ORDER, "cuda", order)
            scores = token_logprobs(model, ids, mask, 40, requires_grad=True)
        scores.logprobs.sum().backward()
        found.append((scores.logprobs.detach(), gradients(model)))
    (ours, own_gradients), (theirs, other_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for name, gradient in other_gradients.items():
        assert (own_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm()
