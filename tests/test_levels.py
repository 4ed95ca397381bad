"""Models whose attention cannot be packed go by levels: the promises P1 to P4 as laws, and what differs.

Every number is compared with the plain call. A token is forwarded once, except for states that were not kept: those are
counted.
"""

import gc
from functools import cache
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from backprompt import LM, AdapterError, Text, UnsupportedModelError, evaluate
from backprompt.classify import log_probs
from backprompt.evaluation import computation as computation_module
from backprompt.forest.fan import Fan
from backprompt.model import levels as levels_module
from backprompt.model import skeleton
from backprompt.model.cache_form import Body
from backprompt.training import token_logprobs
from comparing import assert_close, assert_equals_plain, num_distinct
from devices import DEVICE
from quick import up_to
from reference import ids_for, plain_greedy, plain_logits, plain_token_logprobs
from tiny_cached_models import ALL, KEYS_AND_VALUES, ONE_AT_A_TIME, STATES, build
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe

ids = st.lists(st.integers(3, 9), max_size=7).map(tuple)


@st.composite
def forests(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Texts as ids; each continues a beginning of an earlier one, which may end within a span."""
    texts = [draw(ids.filter(bool))]
    for _ in range(draw(st.integers(1, 5))):
        earlier = draw(st.sampled_from(texts))
        texts.append((earlier[: draw(st.integers(0, len(earlier)))] + draw(ids)) or earlier)
    return texts


@cache
def model_of(name: str) -> PreTrainedModel:
    return build(name)


@cache
def tokenizer():
    return byte_level_bpe()


def lm_of(name: str, **options) -> LM:
    return LM(model_of(name), tokenizer(), **options)


def probe(lm: LM) -> None:
    with lm.session.exclusive():
        lm.session.evaluator.computation.probe_once()


def texts_of(forest: list[tuple[int, ...]], lm: LM) -> list[Text]:
    return [Text.from_tokens(text, lm) for text in forest]


def assert_p1(lm: LM, texts: list[Text]) -> None:
    assert_equals_plain(lm.model, texts)
    for text in texts:
        assert_close(text.token_logprobs, plain_token_logprobs(lm.model, text.tokens))


@pytest.mark.parametrize("name", ALL)
@given(forest=forests(), max_tokens=st.sampled_from([2, 5, 1000]), data=st.data())
@settings(max_examples=up_to(5), deadline=None)
def test_p1_p2_p3_same_numbers_in_any_order_and_each_token_once(name, forest, max_tokens, data):
    lm = lm_of(name, max_tokens_per_forward=max_tokens)
    texts = texts_of(forest, lm)
    order = data.draw(st.permutations(texts))
    split_at = data.draw(st.integers(0, len(order)))
    for part in (order[:split_at], order, texts):
        evaluate(part)
    assert_p1(lm, texts)
    stats = lm.stats
    assert stats.tokens_computed - stats.tokens_recomputed == num_distinct(texts)
    if name in KEYS_AND_VALUES:
        assert stats.tokens_recomputed == 0
    lm.clear()
    evaluate(texts)
    assert_p1(lm, texts)


@pytest.mark.parametrize("name", KEYS_AND_VALUES)
def test_p4_bytes_are_those_of_distinct_tokens(name):
    lm = lm_of(name)
    texts = texts_of([(5, 6, 7, 8, *end) for end in ((1, 2), (1, 3), (4,))], lm)
    evaluate(texts)
    assert lm.stats.bytes_held == pytest.approx(
        num_distinct(texts) * lm.session.evaluator.computation.token_bytes, rel=0.05
    )


@pytest.mark.parametrize("name", ALL)
def test_calls_take_all_spans_of_a_depth(name):
    """A trunk of 4 tokens and 8 branches of 3: a call for the trunk, and one for all branches or for each depth."""
    lm = lm_of(name)
    texts = texts_of([(5, 6, 7, 8, first, 2, 3) for first in range(10, 18)], lm)
    probe(lm)
    before = lm.stats
    evaluate(texts)
    done = lm.stats - before
    assert (done.forward_passes, done.tokens_computed) == (1, 4 + 8 * 3)
    assert done.model_calls == 1 + (8 if name == "rwkv" else 3 if name in ONE_AT_A_TIME else 1)
    assert ("a token a call" in lm.stats.kernel) == (name in ONE_AT_A_TIME)


@pytest.mark.parametrize("name", ALL)
def test_generation_continues_caches_a_token_a_call(name):
    lm = lm_of(name)
    prompts = texts_of([(5, 6, 7, 8), (5, 6, 9), (4, 4, 4, 4, 4, 4)], lm)
    evaluate(prompts)
    before = lm.stats
    made = [prompt.generate(max_new_tokens=5) for prompt in prompts]
    done = lm.stats - before
    for prompt, found in zip(prompts, made, strict=True):
        assert tuple(found.completion_tokens) == plain_greedy(lm.model, prompt.tokens, 5)
    assert done.tokens_recomputed == 0
    assert done.tokens_computed <= 5 * len(prompts)
    assert_p1(lm, made)
    samples = prompts[0].generate(max_new_tokens=3, n=3, do_sample=True, temperature=1.5, seed=1)
    assert_p1(lm, list(samples))


@pytest.mark.parametrize("name", ["bloom", "lfm2", "mamba"])
def test_beams_and_looked_up_tokens_continue_caches(name):
    lm = lm_of(name)
    prompt = Text.from_tokens((5, 6, 7, 5, 6), lm)
    expected = plain_greedy(lm.model, prompt.tokens, 6)
    assert prompt.generate(max_new_tokens=6, prompt_lookup_num_tokens=2).completion_tokens == expected
    beams = prompt.generate(max_new_tokens=4, num_beams=3, n=2)
    assert_p1(lm, list(beams))
    assert lm.stats.tokens_recomputed <= 2 * len(prompt.tokens)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral_sliding", "phi"])
def test_models_that_can_be_packed_may_go_by_levels(name, monkeypatch):
    """Windows, sinks, soft caps and rotations are the model's own; a layer with a window keeps all keys."""
    monkeypatch.setattr(skeleton, "why_not_packed", lambda model: "It could be.")
    lm = LM(FAMILIES[name](), tokenizer(), max_tokens_per_forward=7)
    texts = texts_of([tuple(range(3, 33)), (*range(3, 23), 1, 2), (*range(3, 23), 9, *range(40, 50))], lm)
    assert_p1(lm, texts)
    assert "by levels" in lm.stats.kernel
    assert lm.stats.tokens_computed == num_distinct(texts)
    made = texts[1].generate(max_new_tokens=4)
    assert made.completion_tokens == plain_greedy(lm.model, texts[1].tokens, 4)


@pytest.mark.parametrize("name", ["mpt", "lfm2", "mamba"])
def test_completions_are_laid_out_as_fans_and_continued_as_texts(name):
    lm = lm_of(name)
    prompts = [Text("The cat sat on", lm), Text("A dog sat", lm)]
    completions = [" the mat now", " the dog", " a mat now"]
    found = log_probs(prompts, completions)
    assert sum(isinstance(span, Fan) for span in lm.session.evaluator.forest.spans()) == len(prompts)
    for prompt, of_prompt in zip(prompts, found, strict=True):
        for completion, scores in zip(completions, of_prompt, strict=True):
            expected = plain_token_logprobs(lm.model, (prompt + completion).tokens)[len(prompt.tokens) :]
            assert_close(torch.tensor(scores, dtype=expected.dtype), expected)
    assert lm.stats.tokens_recomputed == 0
    assert_p1(lm, [prompt + completion + " and more" for prompt in prompts for completion in completions])


@pytest.mark.parametrize("name", ["lfm2", "mamba", "qwen3_next"])
def test_a_text_that_ends_within_a_span_is_computed_from_the_last_snapshot(name):
    lm = lm_of(name)
    whole, within = (Text.from_tokens(text, lm) for text in ((5, 6, 7, 8, 9, 10, 11), (5, 6, 7, 8, 3, 4)))
    evaluate(whole)
    before = lm.stats
    evaluate(within)
    done = lm.stats - before
    assert (done.tokens_computed, done.tokens_recomputed) == (2 + 4, 4)  # 5 6 7 8 once more, for the states behind it
    before = lm.stats
    other = Text.from_tokens((5, 6, 7, 8, 1), lm)
    evaluate(other)
    assert (lm.stats - before).tokens_computed == 1  # the states are kept now
    assert_p1(lm, [whole, within, other])


@pytest.mark.parametrize("name", ["bamba", "rwkv"])
def test_snapshots_that_take_too_much_are_not_kept(name, monkeypatch):
    monkeypatch.setattr(levels_module, "MAX_SNAPSHOT_BYTES", 1)
    monkeypatch.setattr(levels_module, "free_bytes", lambda device: 4)
    lm = lm_of(name)
    texts = texts_of([(5, 6, 7, *end) for end in ((1, 2), (3,))], lm)
    evaluate(texts)
    more = [text + Text.from_tokens((4, 4), lm) for text in texts]
    evaluate(more)
    assert lm.stats.tokens_computed - lm.stats.tokens_recomputed == num_distinct([*texts, *more])
    assert lm.stats.tokens_recomputed > 0
    assert_p1(lm, [*texts, *more])


def test_snapshots_within_a_pinned_text_stay_within_the_budget():
    lm = lm_of("mamba", memory_bytes=7_000)  # a snapshot is 6,144 bytes
    pin = lm.pin(Text.from_tokens((5, 6, 7, 8), lm))
    for num_common in (1, 2, 3, 2):
        text = Text.from_tokens((*(5, 6, 7, 8)[:num_common], 20), lm)
        evaluate(text)
        assert lm.stats.bytes_held <= 7_000
        assert_p1(lm, [text])
    pin.release()


def test_copies_of_the_model_are_freed():
    """The body that was tried in a packed pass, and all of it once the weights have changed."""
    model = build("bloom")

    def num_bodies() -> int:
        gc.collect()
        return sum(type(found) is type(model.transformer) for found in gc.get_objects())

    before = num_bodies()
    lm = LM(model, tokenizer(), pack_weights=DEVICE.type == "cpu")
    text = Text.from_tokens((5, 6, 7), lm)
    held = lm.representation(text)
    assert num_bodies() == before + 1
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    evaluate(text)
    assert num_bodies() == before + 1
    assert held.num_tokens == 3
    assert_p1(lm, [text])


@pytest.mark.parametrize("name", ALL)
def test_past_key_values_are_right_or_refused(name):
    lm = lm_of(name)
    text = Text.from_tokens((5, 6, 7, 8), lm)
    following = (9, 10, 11)
    try:
        cache = text.model_repr.past_key_values()
    except UnsupportedModelError:
        assert name in {"bamba", "jamba", "mamba", "mamba2", "rwkv"}
        return
    assert isinstance(cache, DynamicCache)
    with torch.no_grad():
        logits = lm.model(input_ids=ids_for(lm.model, following), past_key_values=cache).logits[0]
    assert_close(logits, plain_logits(lm.model, (*text.tokens, *following))[-3:])


@pytest.mark.parametrize("name", ["bloom", "mamba2"])
def test_groups_are_refused_before_anything_runs(name):
    lm = lm_of(name)
    probe(lm)
    text = Text("The", lm) + (Text(" cat", lm) | Text(" dog", lm)) + " sat"
    with pytest.raises(UnsupportedModelError, match="Groups and frozen segments need packed attention"):
        evaluate(text)
    assert lm.stats.model_calls == 0


@pytest.mark.parametrize("name", ["bloom", "mamba2"])
def test_training_is_refused(name):
    model = build(name)
    given = torch.tensor([[5, 6, 7]])
    with pytest.raises(UnsupportedModelError, match="Gradients need packed attention"):
        token_logprobs(model, given, torch.ones_like(given), requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["jamba", "lfm2", "qwen3_next", "gptj"])
def test_low_precision_and_small_weights_find_the_same_way(name, dtype):
    """The probe must not take rounding for a proof that states are seen."""
    lm = LM(build(name, dtype, scale=0.05), tokenizer())
    texts = texts_of([(5, 6, 7, 8, 1, 2, 3), (5, 6, 7, 8, 4, 5, 6)], lm)
    evaluate(texts)
    if name in ONE_AT_A_TIME:
        assert "a token a call" in lm.stats.kernel
    assert_equals_plain(lm.model, texts)


@pytest.mark.parametrize("name", ["gptj", "lfm2"])
def test_new_weights_are_not_probed_again(name, monkeypatch):
    model = build(name)
    lm = LM(model, tokenizer())
    text = Text.from_tokens((5, 6, 7), lm)
    assert_p1(lm, [text])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    monkeypatch.setattr(computation_module, "probe", lambda model, executor: pytest.fail("probed again"))
    assert_p1(lm, [text])
    assert "by levels" in lm.stats.kernel


class Counting(nn.Module):
    """A body of a running sum of embeddings; its cache is a dict with heads on the axis of texts, and two counters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 4)

    def forward(self, input_ids, state=None, use_cache=True):
        rows = self.embed(input_ids)  # (texts, tokens, 4)
        keys = torch.cat([rows, rows + 1], dim=2).unflatten(2, (2, 4)).movedim(2, 1).flatten(0, 1)
        if state is None:
            state = {"keys": keys[:, :0], "sums": [rows[:, :0].sum(dim=1)], "seen": 0, "seen too": torch.tensor(0)}
        assert state["seen"] == state["seen too"] == state["keys"].shape[1]
        sums = state["sums"][0][:, None] + rows.cumsum(dim=1)
        keys = torch.cat([state["keys"], keys], dim=1)
        seen = state["seen"] + rows.shape[1]
        state = {"keys": keys, "sums": [sums[:, -1]], "seen": seen, "seen too": torch.tensor(seen), "name": "constant"}
        return SimpleNamespace(
            last_hidden_state=sums + keys.unflatten(0, (-1, 2)).sum(dim=(1, 2))[:, None], state=state
        )


@torch.no_grad()
def test_any_cache_of_tensors_is_taken_apart_and_put_together():
    body = Body(Counting(), torch.device("cpu"))
    form = body.form(3)
    (keys,), (sums,) = form.rows, form.states
    assert (keys.path, keys.batch_axis, keys.token_axis, keys.num_each) == (("keys",), 0, 1, 2)
    assert (sums.path, sums.batch_axis, sums.shape) == (("sums", 0), 0, (1, 4))
    _, cache = body.call([[1, 2, 3], [4, 5, 6]], None)
    rows, snapshots = form.rows_of(cache, 3), form.snapshots_of(cache)
    assert [tensor.shape for tensor in rows] == [(2, 2, 3, 4)]
    swapped = form.built([tensor.flip(0) for tensor in rows], snapshots.flip(0), 3)
    found, _ = body.call([[7, 8], [9, 1]], swapped, 3)
    expected, _ = body.call([[4, 5, 6, 7, 8], [1, 2, 3, 9, 1]], None)
    assert_close(found, expected[:, 3:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state | {"window": state["keys"][:, -3:]}, "states of other sizes"),
        (lambda state: state | {"square": state["seen"] ** 2}, "does not count tokens"),
        (lambda state: state | {"shared": torch.ones(7)}, "all texts of a batch share"),
        (lambda state: None, "an empty cache"),
    ],
)
@torch.no_grad()
def test_other_caches_are_refused_by_name(change, reason):
    class Other(Counting):
        def forward(self, input_ids, state=None, use_cache=True):
            found = super().forward(input_ids, state, use_cache)
            found.state = change(found.state)
            return found

    with pytest.raises(UnsupportedModelError, match=reason):
        Body(Other(), torch.device("cpu")).form(3)


@pytest.mark.parametrize(("name", "layer"), [("bloom", "query_key_value"), ("mamba2", "in_proj")])
def test_active_adapters_take_part_and_those_of_segments_are_refused(name, layer):
    config = peft.LoraConfig(target_modules=[layer], r=2, init_lora_weights=False)
    model = peft.get_peft_model(build(name), config).eval()
    lm = LM(model, tokenizer())
    text = Text.from_tokens((5, 6, 7), lm)
    assert_close(text.model_repr.all_logits(), plain_logits(model, text.tokens))
    assert float((plain_logits(model_of(name), text.tokens)[-1] - text.logits.cpu()).abs().max()) > 0.01
    with pytest.raises(AdapterError, match="by levels"):
        evaluate(text + Text(" cat", lm).with_adapter(None))


@pytest.mark.parametrize("name", STATES)
def test_states_of_one_text_are_of_no_other(name):
    """Other tokens in the branches of other texts change no number."""
    lm = lm_of(name)
    first, second = texts_of([(5, 6, 7, 8, 1, 2), (5, 6, 7, 3, 3)], lm)
    evaluate([first, second])
    alone = lm_of(name)
    expected = Text.from_tokens(first.tokens, alone).model_repr.hidden_states
    assert_close(first.model_repr.hidden_states, expected)
