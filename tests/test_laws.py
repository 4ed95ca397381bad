"""The promises P1, P2, P3 and P7 as laws, over random trees of texts.

A forest is drawn as a list of texts, each a list of segments from a small alphabet, so that texts share beginnings:

    "The cat" --+-- " sat" --+-- " on"        texts 0 and 1
                |            +-- " down."
                +-- "s"                       text 2, whose join changes tokens
"""

import itertools
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from transformers import PreTrainedModel

from backprompt import LM, Text, evaluate
from comparing import assert_close, assert_equals_plain, num_distinct
from quick import up_to
from reference import plain_ids, plain_logits, plain_token_logprobs
from tiny_models import FAMILIES, build
from tiny_tokenizers import TOKENIZERS

LIMIT = 120  # tokens of the longest text; the tiny models have 128 positions
SEGMENTS = [
    "The cat",
    " sat",
    " on the mat",
    "s",
    "'s",
    " 12",
    "34",
    ", and",
    "\n\n",
    "  ",
    " ",
    "",
    "é",
    "\u0301",
    "🤝🏽",
]
LAW_FAMILIES = ["gpt2", "llama", "gemma2", "gpt_oss", "mistral_sliding", "opt"]

segment = st.sampled_from(SEGMENTS) | st.text(max_size=6) | st.lists(st.integers(0, 319), max_size=4).map(tuple)
PASS_SIZES = st.sampled_from([1, 5, 17, 1000])
TILE_SIZES = st.sampled_from([1, 4, 128])
string_segment = st.sampled_from(SEGMENTS) | st.text(max_size=6)


@st.composite
def forests(draw: st.DrawFn, element: st.SearchStrategy = segment) -> list[list]:
    """Texts as lists of segments; each continues a beginning of an earlier one."""
    texts = [draw(st.lists(element, min_size=1, max_size=4))]
    for _ in range(draw(st.integers(0, 5))):
        earlier = draw(st.sampled_from(texts))
        kept = earlier[: draw(st.integers(0, len(earlier)))]
        texts.append(kept + draw(st.lists(element, max_size=3)))
    return texts


@cache
def family(name: str) -> PreTrainedModel:
    return build(name)


@cache
def tokenizer(name: str):
    return TOKENIZERS[name]()


def small_lm(name: str, tokenizer_name: str, max_tokens: int, tile_tokens: int, **options) -> LM:
    """An LM whose passes and tiles are so small that short texts need many of both."""
    lm = LM(family(name), tokenizer(tokenizer_name), max_tokens_per_forward=max_tokens, **options)
    lm.session.evaluator.computation.tile_tokens = tile_tokens
    return lm


def leaf(segment: str | tuple[int, ...], lm: LM) -> Text:
    return Text(segment, lm) if isinstance(segment, str) else Text.from_tokens(segment, lm)


def compose(segments: list, lm: LM) -> Text:
    return sum((leaf(segment, lm) for segment in segments), Text("", lm))


def usable(texts: list[Text]) -> list[Text]:
    """Texts that a model can be asked about: a token at least, and no more than it has positions."""
    return [text for text in texts if 0 < len(text.tokens) <= LIMIT]


@pytest.mark.parametrize("name", FAMILIES)
@given(segments=forests(), max_tokens=PASS_SIZES, tile_tokens=TILE_SIZES)
@settings(max_examples=up_to(8))
@example(segments=[["The cat", " sat"], ["The cat", "s"]], max_tokens=3, tile_tokens=1)
def test_p1_same_numbers_as_the_plain_call(name: str, segments: list[list], max_tokens: int, tile_tokens: int) -> None:
    model = family(name)
    lm = small_lm(name, "byte_level_bpe", max_tokens, tile_tokens)
    limit = 32 if name == "phi3_longrope" else LIMIT
    texts = [text for text in usable([compose(s, lm) for s in segments]) if len(text.tokens) <= limit]
    evaluate(texts)
    assert_equals_plain(model, texts)


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@given(segments=forests(string_segment))
def test_p1_ids_are_those_of_the_whole_string(tokenizer_name: str, segments: list[list[str]]) -> None:
    private = tokenizer(tokenizer_name)
    lm = LM(family("llama"), private)
    texts = [compose(s, lm) for s in segments]
    lm.session.encoder.encode(texts)
    for text in texts:
        assert text.tokens == tuple(plain_ids(private, text.string))


@given(segments=forests(), joins=st.sampled_from(["exact", "split"]), data=st.data())
@settings(max_examples=up_to(40))
def test_p2_order_and_size_of_passes_and_what_was_cached_do_not_matter(
    segments: list[list], joins: str, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(LAW_FAMILIES))
    reference = LM(family(name), tokenizer("llama3_bpe"), joins=joins)
    expected = {
        tuple(s): (text.model_repr.all_logits(), text.token_logprobs)
        for s in segments
        if usable([text := compose(s, reference)])
    }
    lm = small_lm(name, "llama3_bpe", data.draw(st.integers(1, 40)), data.draw(TILE_SIZES), joins=joins)
    order = data.draw(st.permutations([s for s in segments if tuple(s) in expected]))
    num_first = data.draw(st.integers(0, len(order)))
    evaluate([compose(s, lm) for s in order[:num_first]])
    evaluate([compose(s, lm) for s in order])
    for s in order:
        text = compose(s, lm)
        all_logits, token_logprobs = expected[tuple(s)]
        assert_close(text.model_repr.all_logits(), all_logits)
        assert_close(text.token_logprobs, token_logprobs)


@given(pieces=st.lists(segment, min_size=1, max_size=6), data=st.data())
def test_p2_grouping_of_plus_does_not_matter(pieces: list, data: st.DataObject) -> None:
    lm = LM(family("gpt2"), tokenizer("byte_level_bpe"))
    leaves = [leaf(piece, lm) for piece in pieces]
    while len(leaves) > 1:
        idx = data.draw(st.integers(0, len(leaves) - 2))
        leaves[idx : idx + 2] = [leaves[idx] + leaves[idx + 1]]
    regrouped, in_order = leaves[0], compose(pieces, lm)
    assert (regrouped, hash(regrouped)) == (in_order, hash(in_order))
    for text in usable([regrouped]):
        key = text().key
        before = lm.stats
        assert in_order().key == key
        assert (lm.stats - before).tokens_computed == 0


@given(segments=forests(), max_tokens=st.sampled_from([1, 7, 1000]), data=st.data())
def test_p3_each_distinct_token_is_forwarded_once(segments: list[list], max_tokens: int, data: st.DataObject) -> None:
    lm = LM(family("llama"), tokenizer("byte_level_bpe"), max_tokens_per_forward=max_tokens)
    forwarded: list[int] = []
    forward = lm.session.evaluator.executor.forward
    with lm.session.exclusive():
        lm.session.evaluator.computation.probe_once()
    lm.session.evaluator.executor.forward = lambda pass_: forwarded.append(pass_.num_tokens) or forward(pass_)
    texts = usable([compose(s, lm) for s in segments])
    split_at = data.draw(st.integers(0, len(texts)))
    for part in (texts[:split_at], texts, texts):
        evaluate(part)
    assert sum(forwarded) == num_distinct(texts) == lm.stats.tokens_computed
    assert all(0 < num_tokens <= max_tokens for num_tokens in forwarded)
    assert len(forwarded) == lm.stats.forward_passes


def test_p4_branches_share_what_they_have_in_common() -> None:
    lm = LM(family("llama"), tokenizer("byte_level_bpe"))
    context = Text("The cat sat on the mat, and the other cat didn't.", lm)
    texts = [context + shot + end for shot, end in itertools.product((" One.", " Two."), (" yes", " no", " maybe"))]
    evaluate(texts)
    config = lm.model.config
    head_dim = config.hidden_size // config.num_attention_heads
    floats = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim + config.hidden_size
    assert lm.stats.bytes_held == pytest.approx(4 * floats * num_distinct(texts), rel=0.05)


def test_p5_building_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(family("gpt2"), tokenizer("byte_level_bpe"))
    calls: list[str] = []
    monkeypatch.setattr(lm.session.encoder, "encode", lambda texts: calls.append("encode"))
    monkeypatch.setattr(lm.session.evaluator, "evaluate", lambda texts: calls.append("evaluate"))
    texts = [Text("Hello", lm) + " there" + name for name in (" Senator", " General")]
    assert len(set(texts)) == 2
    assert not calls


class AnyOrder(RuleBasedStateMachine):
    """P2 and P7: build, evaluate, clear and change weights in any order; the numbers stay the plain call's."""

    texts = Bundle("texts")

    @initialize(name=st.sampled_from(LAW_FAMILIES), max_tokens=st.sampled_from([3, 20, 1000]))
    def load(self, name: str, max_tokens: int) -> None:
        self.model = build(name)
        self.lm = LM(self.model, tokenizer("byte_level_bpe"), max_tokens_per_forward=max_tokens)
        self.generator = torch.Generator().manual_seed(0)

    @rule(target=texts, piece=st.sampled_from(SEGMENTS[:10]) | st.just((5, 9)))
    def begin(self, piece: str | tuple[int, ...]) -> Text:
        return leaf(piece, self.lm)

    @rule(target=texts, left=texts, right=texts)
    def join(self, left: Text, right: Text) -> Text:
        return left + right

    @rule(texts=st.lists(texts, max_size=4))
    def evaluate_many(self, texts: list[Text]) -> None:
        texts = usable(texts)
        for text, model_repr in zip(texts, evaluate(texts), strict=True):
            assert model_repr.input_ids.tolist() == list(text.tokens)
        before = self.lm.stats
        evaluate(texts)
        assert (self.lm.stats - before).tokens_computed == 0

    @rule(text=texts)
    def read_logprobs(self, text: Text) -> None:
        for usable_text in usable([text]):
            assert_close(usable_text.token_logprobs, plain_token_logprobs(self.model, text.tokens))

    @rule(text=texts, data=st.data())
    def read_logits(self, text: Text, data: st.DataObject) -> None:
        for usable_text in usable([text]):
            start = data.draw(st.integers(0, len(text.tokens) - 1))
            expected = plain_logits(self.model, text.tokens)
            assert_close(usable_text.logits, expected[-1])
            assert_close(usable_text.model_repr.all_logits(start), expected[start:])

    @rule()
    def clear(self) -> None:
        self.lm.clear()
        assert (self.lm.stats.bytes_held, self.lm.stats.result_bytes_held) == (0, 0)

    @rule(text=texts, how=st.sampled_from(["in place", "through .data", "replaced"]), data=st.data())
    def change_a_weight(self, text: Text, how: str, data: st.DataObject) -> None:
        self.read_logprobs(text)
        self.perturb(how, data)
        self.read_logprobs(text)

    def perturb(self, how: str, data: st.DataObject) -> None:
        module_name, name = data.draw(st.sampled_from(self.weight_names())).rsplit(".", 1)
        module = self.model.get_submodule(module_name)
        weight = getattr(module, name)
        noise = (torch.randn(weight.shape, generator=self.generator) * 0.05).to(weight.device)
        with torch.no_grad():
            if how == "in place":
                weight += noise
            elif how == "through .data":
                weight.data = weight + noise
            else:
                setattr(module, name, torch.nn.Parameter(weight + noise))

    def weight_names(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if ".layers." in name or ".h." in name]

    @invariant()
    def only_computed_spans_are_kept(self) -> None:
        if hasattr(self, "lm"):
            assert all(span.states is not None for span in self.lm.session.evaluator.forest.spans())


AnyOrder.TestCase.settings = settings(max_examples=up_to(25), stateful_step_count=20, deadline=None)
TestAnyOrder = AnyOrder.TestCase
