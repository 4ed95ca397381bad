"""Attention maps, against the plain call in eager attention; the work that they take; how they are kept."""

import gc
import math

import pytest
import torch
from accelerate import cpu_offload
from adapted_models import UNMARKED, under, with_adapters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_groups import build as build_text
from test_groups import parts_of, segments
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaAttention

from backprompt import LM, StaleRepresentationError, Text, TextTypeError, UnsupportedModelError, evaluate, parallel
from backprompt.attention import maps
from backprompt.model.executor import Executor
from backprompt.model.in_flight import InFlight
from comparing import assert_close
from devices import DEVICE, known_to_torch
from quick import up_to
from reference import ATOL, masked_attention, plain_attention
from tiny_cached_models import build as build_by_levels
from tiny_models import FAMILIES, SLIDING_WINDOW, build

LAW_FAMILIES = ("gpt2", "llama", "mistral_sliding", "gemma2", "gpt_oss")  # grouped heads, window, soft cap, sinks
GROUP_FAMILIES = ("gpt2", "llama", "gemma", "gpt_neox", "mistral_sliding")  # as in test_groups.py
ATOL_HALF = 0.04
"""Eager attention rounds weights to bfloat16, which are 2 ** -8 apart below 1; measured: 0.023."""


@pytest.fixture(scope="module")
def models():
    return {family: build(family) for family in {*LAW_FAMILIES, *GROUP_FAMILIES}}


@pytest.fixture(scope="module")
def model(models):
    return models["llama"]


def text_of(lm, ids=tuple(range(3, 40))):
    """A text of several spans, behind which others stand."""
    beginning, end = Text.from_tokens(ids[:20], lm), Text.from_tokens(ids[20:], lm)
    evaluate([beginning + Text.from_tokens((1, 2), lm), beginning + end])
    return beginning + end


# The plain call


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_map_is_that_of_the_plain_call(family, tokenizer):
    model = build(family)
    text = text_of(LM(model, tokenizer), tuple(range(3, 35)))  # as many as phi3_longrope takes
    found = text.model_repr.attention()
    assert_close(found, plain_attention(model, text.tokens))
    assert found.shape == (2, 4, 32, 32)


def test_what_sinks_take_is_nobodys(models, tokenizer):
    found = text_of(LM(models["gpt_oss"], tokenizer)).model_repr.attention()
    assert float(found.sum(dim=-1).min()) < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype, tokenizer):
    model = build("llama").to(dtype)
    text = text_of(LM(model, tokenizer))
    expected = plain_attention(model, text.tokens)
    if dtype == torch.float64:
        # Transformers takes the softmax in float32 whatever the dtype of the model.
        assert_close(text.model_repr.attention(), expected, atol=1e-6)
    else:
        assert_close(text.model_repr.attention(), expected.float(), atol=ATOL_HALF)


def num_loaded():
    """The number of weights in all layers of attention that do not lie elsewhere."""
    layers = [module for module in gc.get_objects() if type(module) is LlamaAttention]
    return sum(not parameter.is_meta for layer in layers for parameter in layer.parameters())


@known_to_torch
def test_an_offloaded_model_moves_its_weights_back(tokenizer):
    plain = build("llama")
    lm = LM(cpu_offload(build("llama"), DEVICE), tokenizer)
    text = text_of(lm)
    before = num_loaded()
    assert_close(text.model_repr.attention(0), plain_attention(plain, text.tokens)[:1])
    assert num_loaded() == before


def test_segments_under_adapters(tokenizer):
    model = with_adapters("llama", "peft")
    lm = LM(model, tokenizer)
    text = Text.from_tokens((3, 4, 5), lm) + Text.from_tokens((6, 7, 8), lm).with_adapter("a")
    causal_lm = model.get_base_model()
    with under(model, [UNMARKED] * 3 + ["a"] * 3):
        expected = plain_attention(causal_lm, text.tokens)
    assert_close(text.model_repr.attention(rows=[4, 1]), expected[:, :, [4, 1]])
    assert float((expected - plain_attention(causal_lm, text.tokens)).abs().max()) > 1e-3


# The laws

runs = st.lists(st.integers(1, 5), min_size=1, max_size=12).map(tuple)


def indices(num_items):
    return st.none() | st.lists(st.integers(-num_items, num_items - 1), min_size=1, max_size=4)


def spans(num_tokens):
    bound = st.integers(0, num_tokens)
    span = st.tuples(bound, bound).map(lambda pair: slice(*sorted(pair)))
    return st.lists(span, min_size=1, max_size=4)


def part_of(whole, layers, heads, rows):
    """Part of a whole map, by plain indexing."""
    for axis, chosen in enumerate((layers, heads, rows)):
        whole = whole if chosen is None else whole.index_select(axis, torch.tensor(chosen) % whole.shape[axis])
    return whole


def draw_part(data, model_repr, whole):
    """A drawn part of a map, as the library has it and as the whole map has it."""
    num_layers, num_heads, num_tokens, _ = whole.shape
    layers, heads, rows = (data.draw(indices(size)) for size in (num_layers, num_heads, num_tokens))
    over = data.draw(st.none() | spans(num_tokens))
    expected = part_of(whole, layers, heads, rows)
    if over is not None:
        expected = torch.stack([expected[..., span].sum(dim=-1) for span in over], dim=-1)
    return model_repr.attention(layers, heads, rows, over=over), expected


@pytest.mark.parametrize("family", LAW_FAMILIES)
@settings(max_examples=up_to(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), texts=st.lists(st.lists(runs, min_size=1, max_size=3), min_size=1, max_size=3))
def test_any_part_of_any_text_is_that_of_the_plain_call(family, data, texts, models, tokenizer, monkeypatch):
    """However texts share spans, in passes of any size, within any budget, in slices of any size."""
    monkeypatch.setattr(maps, "WEIGHTS_BYTES", data.draw(st.sampled_from([1, 500, 16 << 20])))
    lm = LM(
        models[family],
        tokenizer,
        max_tokens_per_forward=data.draw(st.sampled_from([3, 1024])),
        memory_bytes=data.draw(st.sampled_from([None, 0, 20_000])),
        host_memory_bytes=data.draw(st.sampled_from([0, 20_000])),
    )
    joined = [Text("", lm).join(Text.from_tokens(run, lm) for run in runs_of_text) for runs_of_text in texts]
    for text, model_repr in zip(joined, evaluate(joined), strict=True):
        assert_close(*draw_part(data, model_repr, plain_attention(models[family], text.tokens)))


@pytest.mark.parametrize("family", GROUP_FAMILIES)
@settings(max_examples=up_to(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), drawn=st.lists(segments, min_size=1, max_size=4))
def test_any_nested_groups_have_the_map_of_the_declared_mask(family, data, drawn, models, tokenizer):
    lm = LM(models[family], tokenizer, max_tokens_per_forward=data.draw(st.sampled_from([3, 1024])))
    text = build_text(lm, drawn)
    if text.tokens:
        assert_close(*draw_part(data, text.model_repr, masked_attention(models[family], parts_of(text))))


def test_equal_branches_have_a_share_each(model, tokenizer):
    lm = LM(model, tokenizer)
    branch = Text.from_tokens((4, 5), lm)
    text = Text.from_tokens((1, 2, 3), lm) + (branch | branch) + Text.from_tokens((8, 9), lm)
    found = text.model_repr.attention(rows=-1)
    assert_close(found, masked_attention(model, parts_of(text))[:, :, -1:])
    torch.testing.assert_close(found[..., 3:5], found[..., 5:7], rtol=0, atol=0)


@pytest.mark.parametrize("positions", ["shared", "sequential"])
def test_a_text_sees_frozen_and_other_branches_before_it(positions, model, tokenizer):
    lm = LM(model, tokenizer)
    context, a, b, q = (Text.from_tokens(run, lm) for run in [(1, 2), (3, 4, 5), (6,), (7, 8)])
    text = context + parallel([a, b.frozen(), a + b], positions=positions) + q
    found = text.model_repr.attention()
    assert_close(found, masked_attention(model, parts_of(text)))
    assert bool((found[:, :, -1] > 0).all())


# The work


def test_only_the_chosen_rows_are_forwarded_up_to_the_last_chosen_layer(model, tokenizer, monkeypatch):
    lm = LM(model, tokenizer)
    text = text_of(lm)
    representation = text.model_repr
    layers = []
    add_layer = InFlight.add_layer
    monkeypatch.setattr(
        InFlight, "add_layer", lambda self, key, value: layers.append(key.shape[1]) or add_layer(self, key, value)
    )
    for chosen, rows, expected in ((0, [-1, 5], [2]), (1, [7], [1, 1]), (None, slice(3), [3, 3])):
        before = lm.stats
        representation.attention(chosen, rows=rows)
        work = lm.stats - before
        assert (work.tokens_computed, work.tokens_recomputed, work.tokens_reused) == (expected[0], expected[0], 0)
        assert (work.forward_passes, work.logit_rows) == (1, 0)
        assert layers == expected
        layers.clear()


def test_many_rows_are_forwarded_in_passes_of_the_usual_size(model, tokenizer):
    lm = LM(model, tokenizer, max_tokens_per_forward=10)
    text = text_of(lm)
    before = lm.stats
    found = text.model_repr.attention()
    assert (lm.stats - before).forward_passes == math.ceil(37 / 10)
    assert_close(found, plain_attention(model, text.tokens))


def test_nothing_that_is_held_changes(model, tokenizer):
    lm = LM(model, tokenizer)
    text = text_of(lm)
    held = {
        id(tensor): (tensor, tensor.clone())
        for span in text.lm.session.evaluator.forest.spans()
        for rows in (span.states, span.keys_values)
        if rows is not None and rows.block is not None
        for tensor in rows.block.tensors.values()
    }
    before = lm.stats.bytes_held
    text.model_repr.attention().zero_()
    assert lm.stats.bytes_held == before
    assert len(held) > 4
    for tensor, copy in held.values():
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest result of an operation has."""

    def __init__(self):
        super().__init__()
        self.num_numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.num_numbers = max(self.num_numbers, found.numel())
        return found


def test_a_reduced_map_is_never_made_whole(model, tokenizer, monkeypatch):
    lm = LM(model, tokenizer)
    text = text_of(lm, tuple(i % 50 for i in range(120)))
    monkeypatch.setattr(maps, "WEIGHTS_BYTES", 2 * 4 * 4 * 120)  # two rows of four heads
    with LargestTensor() as whole:
        expected = text.model_repr.attention()
    with LargestTensor() as reduced:
        found = text.model_repr.attention(over=[slice(0, 50), slice(50, 120)])
    assert_close(found, torch.stack([expected[..., :50].sum(dim=-1), expected[..., 50:].sum(dim=-1)], dim=-1))
    assert whole.num_numbers == 2 * 4 * 120 * 120
    assert reduced.num_numbers <= 120 * 120  # which key each row sees


# Kept


def test_the_same_question_again_is_read(model, tokenizer):
    lm = LM(model, tokenizer)
    text = text_of(lm)
    first = text.model_repr.attention([0, 1], 2, rows=[-1], over=[slice(0, 5)])
    computed = lm.stats.tokens_computed
    first_value = first.clone()
    first.zero_()  # a copy
    for again in (text, Text.from_tokens(text.tokens, lm)):
        found = again.model_repr.attention(slice(None), [2], rows=36, over=[range(5)])
        torch.testing.assert_close(found, first_value, rtol=0, atol=0)
    assert lm.stats.tokens_computed == computed
    text.model_repr.attention([1, 0], 2, rows=[-1], over=[slice(0, 5)])
    assert lm.stats.tokens_computed == computed + 1
    lm.clear()
    text.model_repr.attention([0, 1], 2, rows=[-1], over=[slice(0, 5)])
    assert lm.stats.tokens_computed == computed + 2 + len(text.tokens)


def test_the_pool_is_bounded_and_counted(model, tokenizer):
    lm = LM(model, tokenizer)
    text = text_of(lm)
    pool = lm.session.evaluator.pools.attention
    row_bytes = 2 * 4 * 37 * 4 + 40 * (37 + 1)  # the weights, and the ids of text and row
    pool.max_bytes = 3 * row_bytes
    before = lm.stats.result_bytes_held
    for row in range(10):
        text.model_repr.attention(rows=row)
        assert pool.num_bytes == min(3, row + 1) * row_bytes
    assert lm.stats.result_bytes_held - before == 3 * row_bytes
    computed = lm.stats.tokens_computed
    text.model_repr.attention(rows=9)
    assert lm.stats.tokens_computed == computed
    text.model_repr.attention(rows=0)  # the first to go
    assert lm.stats.tokens_computed == computed + 1
    text.model_repr.attention()  # larger than the pool
    assert pool.num_bytes == 3 * row_bytes


def test_changed_weights_are_noticed(tokenizer):
    model = build("llama")
    lm = LM(model, tokenizer)
    text = text_of(lm)
    representation = text.model_repr
    kept = representation.attention(rows=0)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    torch.testing.assert_close(representation.attention(rows=0), kept)  # known, and nothing has looked
    with pytest.raises(StaleRepresentationError):
        representation.attention(rows=1)
    with pytest.raises(StaleRepresentationError):
        representation.attention(rows=0)
    assert_close(text.model_repr.attention(), plain_attention(model, text.tokens))


# Spans


def test_the_segments_of_a_text_are_spans(model, tokenizer):
    lm = LM(model, tokenizer)
    text = Text("The cat sat", lm) + " on the mat." + " It slept."
    (extents,) = lm.extents([text])
    found = text.model_repr.attention(rows=-1, over=extents)
    assert found.shape == (2, 4, 1, 3)
    assert_close(found.sum(dim=-1), torch.ones(2, 4, 1), atol=ATOL[torch.float32])


# Refusals


@pytest.mark.parametrize("family", ["bloom", "falcon", "mpt", "mamba"])
def test_models_by_levels_are_refused(family, tokenizer):
    lm = LM(build_by_levels(family), tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"Attention maps .* by levels"):
        Text.from_tokens((3, 4, 5), lm).model_repr.attention()


def test_layers_with_different_numbers_of_heads_are_no_one_tensor(model, tokenizer, monkeypatch):
    text = text_of(LM(model, tokenizer))
    attend = maps.MapAttention.attend

    def with_half_the_heads(self, layer_idx, query, key, value, scoring):
        if layer_idx == 1:
            query = query[:2]
        return attend(self, layer_idx, query, key, value, scoring)

    monkeypatch.setattr(maps.MapAttention, "attend", with_half_the_heads)
    with pytest.raises(UnsupportedModelError, match=r"different numbers of heads \(2, 4\)"):
        text.model_repr.attention()
    assert text.model_repr.attention(1).shape[1] == 2
    assert text.model_repr.attention(heads=[0, 1]).shape[:2] == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 2}, r"layers must be ints from -2 to 1, not 2"),
        ({"layers": []}, r"layers must name at least one"),
        ({"layers": ["0"]}, r"layers must be ints, not '0'"),
        ({"layers": True}, r"layers must be an int or ints in order"),
        ({"heads": [0, -5]}, r"heads must be ints from -4 to 3, not -5"),
        ({"heads": slice(0, 2)}, r"heads must be an int or ints in order"),
        ({"rows": 37}, r"rows must be ints from -37 to 36, not 37"),
        ({"rows": slice(9, 9)}, r"rows must name at least one"),
        ({"over": []}, r"over must name at least one span"),
        ({"over": slice(0, 3)}, r"over must be spans of tokens in order"),
        ({"over": [slice(0, 9, 2)]}, r"over\[0\] must be a slice or have a start"),
        ({"over": [slice(0, 3), range(30, 38)]}, r"over\[1\] must be .* from 0 to 37"),
        ({"over": [3]}, r"over\[0\] must be a slice or have a start"),
    ],
)
def test_what_is_not_there_is_refused_by_name(arguments, message, model, tokenizer):
    lm = LM(model, tokenizer)
    text = text_of(lm)
    computed = lm.stats.tokens_computed
    with pytest.raises((ValueError, TextTypeError), match=message):
        text.model_repr.attention(**arguments)
    assert lm.stats.tokens_computed == computed


def test_a_window_hides_keys(models, tokenizer):
    found = text_of(LM(models["mistral_sliding"], tokenizer)).model_repr.attention(rows=-1)
    assert not found[..., :-SLIDING_WINDOW].any()
    assert bool((found[..., -SLIDING_WINDOW:] > 0).all())


# Many texts


def several(lm):
    """Texts of several lengths, with common beginnings, a group, and one twice."""
    beginning = Text.from_tokens(tuple(range(3, 15)), lm)
    group = parallel([Text.from_tokens(ids, lm) for ids in ((20, 21), (22,), (23, 24, 25))])
    texts = [beginning + Text.from_tokens(ids, lm) for ids in ((30, 31, 32), (30, 31, 33, 34), (50,))]
    return [*texts, Text.from_tokens((7, 8, 9), lm), beginning + group + Text.from_tokens((40, 41), lm), texts[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_of_many_texts_is_that_of_each(family, tokenizer):
    model = build(family)
    texts, alone = several(LM(model, tokenizer)), several(LM(model, tokenizer))
    if family not in GROUP_FAMILIES:
        texts, alone = texts[:4], alone[:4]
    lm = texts[0].lm
    for options in ({}, {"layers": 0, "heads": [3, 1], "rows": [-1, 0]}, {"rows": -1}):
        for own, other in zip(lm.attention(texts, **options), alone, strict=True):
            assert_close(own, other.model_repr.attention(**options), atol=1e-6)
    spans = [[slice(0, 2), slice(2, None)] for _ in texts]
    for own, other in zip(lm.attention(texts, rows=-2, over=spans), alone, strict=True):
        assert_close(own, other.model_repr.attention(rows=-2, over=spans[0]), atol=1e-6)


@pytest.mark.parametrize(("max_tokens", "num_passes"), [(None, 1), (64, 2), (20, 4), (1, 10)])
def test_the_rows_of_many_texts_share_passes(model, tokenizer, max_tokens, num_passes):
    """Texts of 15, 16, 13, 3 and 20 tokens, two rows each; together they take as many tokens as a pass may have."""
    lm = LM(model, tokenizer, max_tokens_per_forward=max_tokens)
    texts = several(lm)
    evaluate(texts)
    before = lm.stats
    found = lm.attention(texts, rows=[-1, -2])
    done = lm.stats - before
    assert (done.model_calls, done.tokens_computed) == (num_passes, 10)  # two rows of five texts
    before = lm.stats
    found[0].zero_()
    again = lm.attention(iter(texts), rows=iter([-1, -2]))
    assert (lm.stats - before).model_calls == 0
    assert_close(again[0], again[5], atol=0)
    assert_close(found[5], again[5], atol=0)
    assert again[0].sum() > 0


@pytest.mark.parametrize("max_tokens", [None, 64])
def test_many_texts_that_do_not_fit_into_the_memory(model, tokenizer, max_tokens, monkeypatch):
    texts = [Text.from_tokens(tuple(range(idx, idx + 30)), LM(model, tokenizer)) for idx in range(3, 43)]
    lm = LM(model, tokenizer, memory_bytes="60 kB", max_tokens_per_forward=max_tokens)
    own = [Text.from_tokens(text.tokens, lm) for text in texts]
    held, observe = [], Executor.observe

    def noting(self, *args):
        held.append(lm.stats.bytes_held)
        observe(self, *args)

    monkeypatch.setattr(Executor, "observe", noting)
    for found, text in zip(lm.attention(own, rows=-1), texts, strict=True):
        assert_close(found, text.model_repr.attention(rows=-1), atol=1e-6)
    assert max(held) <= 60_000


def test_many_texts_with_errors(model, tokenizer):
    lm = LM(model, tokenizer)
    texts = several(lm)
    assert lm.attention([]) == []
    with pytest.raises(ValueError, match="over has spans for 1 texts, but there are 6"):
        lm.attention(texts, over=[[slice(0, 1)]])
    with pytest.raises(ValueError, match="rows"):
        lm.attention(texts, rows=3)  # one text has three tokens
    with pytest.raises(ValueError, match="heads must be ints"):
        lm.attention(texts, heads=9)
    with pytest.raises(TextTypeError):
        lm.attention(["a"])
