"""Adapters by segment: the plain model's numbers with the adapter on for some tokens, each distinct token once."""

import html
import pickle

import peft
import pytest
import torch
from adapted_models import NAMES, UNMARKED, activate, content_of, deactivate, under, with_adapters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import backprompt as bp
from backprompt import LM, AdapterError, Text, evaluate
from backprompt.generation.continued import ContinuedText, continue_as
from backprompt.model.adapters import outputs_under
from backprompt.store import MemoryStore
from backprompt.text.segments import Adapted
from backprompt.tokens.adapted import MAX_EMBEDDINGS
from comparing import assert_close, num_distinct_ids
from quick import up_to
from reference import (
    masked_logits,
    masked_token_logprobs,
    plain_greedy,
    plain_logits,
    plain_token_logprobs,
    token_logprobs_of,
)
from tiny_models import FAMILIES, OTHERS
from tiny_tokenizers import byte_level_bpe, llama3_bpe, sentencepiece_bpe, unigram

LAW_FAMILIES = ("gpt2", "llama", "gpt_neox", "mistral_sliding")
KINDS = ("peft", "mixin")


@pytest.fixture(scope="module")
def models():
    return {(family, kind): with_adapters(family, kind) for family in LAW_FAMILIES for kind in KINDS}


@pytest.fixture
def model(models):
    model = models["llama", "peft"]
    activate(model, ())
    return model


@pytest.fixture
def lm(model, tokenizer):
    return LM(model, tokenizer)


# The law

ids = st.lists(st.integers(1, 3), max_size=4).map(tuple)
marks = st.sampled_from([UNMARKED, UNMARKED, None, *NAMES])
runs = st.tuples(ids, marks)


def groups_of(inner):
    return st.tuples(
        st.lists(st.tuples(st.lists(inner, max_size=3), st.booleans()), max_size=3),
        st.sampled_from(["shared", "sequential"]),
        st.sampled_from([UNMARKED, UNMARKED, UNMARKED, "a"]),
    )


segments = st.recursive(runs, groups_of, max_leaves=6)
"""Token ids of a small alphabet, each run under an adapter or none; groups of such, some of them under one adapter."""


def build(lm, given_segments, *, are_marked=True):
    """The text of these segments; not `are_marked`: without any adapter."""
    text = Text("", lm)
    for segment in given_segments:
        if len(segment) == 3:
            branches, positions, mark = segment
            texts = [build(lm, inner, are_marked=are_marked) for inner, _ in branches]
            frozen = [of.frozen() if is_frozen else of for of, (_, is_frozen) in zip(texts, branches, strict=True)]
            part = bp.parallel(frozen, positions=positions)
        else:
            run, mark = segment
            part = Text.from_tokens(run, lm)
        text += part.with_adapter(mark) if are_marked and mark != UNMARKED else part
    return text


def written(given_segments, outer=UNMARKED):
    """The tokens of these segments in written order, each with its mark."""
    for segment in given_segments:
        if len(segment) == 3:
            for inner, _ in segment[0]:
                yield from written(inner, segment[2] if outer == UNMARKED else outer)
        else:
            yield from ((token_id, segment[1] if outer == UNMARKED else outer) for token_id in segment[0])


def assert_as_reference(model, text, plain_text, tokens):
    """A text is as the plain model under the declared mask, with each token's adapter on for the token alone."""
    assert text.tokens == plain_text.tokens == tuple(token_id for token_id, _ in tokens)
    (encoded,) = text.lm.session.encoder.encode([plain_text])
    parts = (encoded,) if isinstance(encoded, tuple) else encoded.parts
    with under(model, [mark for _, mark in tokens]) as plain:
        logprobs, logits = masked_token_logprobs(plain, parts), masked_logits(plain, parts)
    assert_close(text.token_logprobs, logprobs)
    assert_close(text().all_logits(), logits)
    if isinstance(parts[-1], tuple):
        assert_close(text.logits, logits[-1])
    return logprobs


@pytest.mark.parametrize("family", LAW_FAMILIES)
@settings(max_examples=up_to(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_segments_under_any_adapters_have_the_numbers_of_the_plain_model(
    family, data, models, tokenizer, monkeypatch
):
    """In any order, packed in any passes, within any budget, and from a store."""
    model, store = models[family, data.draw(st.sampled_from(KINDS))], MemoryStore()
    activate(model, data.draw(st.sampled_from([(), ("a",), ("b", "a")])))
    drawn = data.draw(st.lists(st.lists(segments, min_size=1, max_size=4), min_size=1, max_size=4))
    pass_tokens = data.draw(st.sampled_from([3, 16, 1024]))
    memory_bytes = data.draw(st.sampled_from([None, 0, 5_000, 20_000]))
    host_bytes = data.draw(st.sampled_from([0, 10_000]))
    tile_tokens = data.draw(st.sampled_from([1, 128]))
    monkeypatch.setattr("backprompt.evaluation.archive.MIN_TOKENS", data.draw(st.sampled_from([1, 16])))
    for _ in range(2):
        lm = LM(
            model,
            tokenizer,
            max_tokens_per_forward=pass_tokens,
            memory_bytes=memory_bytes,
            host_memory_bytes=host_bytes,
            store=store,
        )
        lm.session.evaluator.computation.tile_tokens = tile_tokens
        tokens = [list(written(given_segments)) for given_segments in drawn]
        texts = [build(lm, given_segments) for given_segments in drawn]
        plain = [build(lm, given_segments, are_marked=False) for given_segments in drawn]
        whole = [triple for triple in zip(texts, plain, tokens, strict=True) if triple[2]]
        evaluate(data.draw(st.permutations([text for text, _, _ in whole])))
        expected = [assert_as_reference(model, *triple) for triple in whole]
        for scored, logprobs in zip(lm.token_logprobs([text for text, _, _ in whole]), expected, strict=True):
            assert_close(scored, logprobs)
        if data.draw(st.booleans()):
            for text, _, _ in whole:
                text.save()


@settings(max_examples=up_to(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(st.lists(runs, min_size=1, max_size=4), min_size=1, max_size=5),
    active=st.sampled_from([(), ("a",), ("twin",), ("b", "a")]),
    pass_tokens=st.sampled_from([3, 1024]),
)
def test_each_distinct_token_adapter_and_beginning_is_forwarded_once(drawn, active, pass_tokens, models, tokenizer):
    """Equal contents are one adapter, and an adapter that is active is that of tokens without one of their own."""
    model = models["llama", "peft"]
    activate(model, active)
    lm = LM(model, tokenizer, max_tokens_per_forward=pass_tokens)
    texts = [text for text in (build(lm, given_segments) for given_segments in drawn) if text.tokens]
    evaluate(texts)
    rows = [[(token_id, content_of(mark, active)) for token_id, mark in written(given)] for given in drawn]
    assert lm.stats.tokens_computed == num_distinct_ids(rows)
    passes = lm.stats.forward_passes
    evaluate(texts)
    assert lm.stats.forward_passes == passes


# Counted


def runs_of(lm, *runs):
    return [Text.from_tokens(run, lm) for run in runs]


def test_one_pass_serves_the_rows_of_several_adapters(lm, monkeypatch):
    """The context is computed once; each linear layer multiplies all rows once, and an adapter only its own rows."""
    context, question = runs_of(lm, range(50, 70), range(5))
    evaluate(Text.from_tokens([1], lm))  # the probe has run
    before, adapted, whole = lm.stats, [], []
    forward, add = peft.tuners.lora.layer.Linear.forward, outputs_under

    def adapted_rows(layer, names, inputs, outputs):
        adapted.append((*names, len(inputs)))
        return add(layer, names, inputs, outputs)

    def whole_rows(layer, rows):
        whole.append(rows.shape)
        return forward(layer, rows)

    monkeypatch.setattr("backprompt.model.adapters.outputs_under", adapted_rows)
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "forward", whole_rows)
    evaluate([context + question, *(context + question.with_adapter(name) for name in NAMES)])
    done = lm.stats - before
    assert (done.forward_passes, done.tokens_computed) == (1, 20 + 4 * 5)  # "twin" is "a"
    num_layers = 2
    assert sorted(adapted) == sorted([("a", 5)] * 3 * num_layers + [("b", 5)] * 4 * num_layers + [("dora", 5)] * 4)
    assert not whole


def test_adapters_of_equal_content_are_one(model, lm):
    context, question = runs_of(lm, range(50, 70), range(5))
    one, other = context + question.with_adapter("a"), context + question.with_adapter("twin")
    evaluate([one, other])
    assert lm.stats.tokens_computed == 25
    assert one().key == other().key != (context + question)().key
    activate(model, ["twin"])
    assert (context + question)().key == one().key == other().key
    assert (context + question.with_adapter(None))().key != one().key


def test_without_an_active_adapter_no_adapter_is_the_same_as_none_of_its_own(lm, model):
    (run,) = runs_of(lm, range(5))
    assert run.with_adapter(None)().key == run().key
    activate(model, ["b"])
    assert run.with_adapter(None)().key != run().key


# Tokens


def test_a_text_under_one_adapter_is_the_plain_call_with_the_adapter(model):
    """The special tokens are under the adapter, too."""
    tokenizer = llama3_bpe()
    lm = LM(model, tokenizer)
    text = (Text("The quick", lm) + " brown fox").with_adapter("b")
    assert text.tokens == tuple(tokenizer("The quick brown fox")["input_ids"])
    found = text().all_logits(), text.token_logprobs
    activate(model, ["b"])
    expected = plain_logits(model, text.tokens)
    assert_close(found[0], expected)
    assert_close(found[1], token_logprobs_of(expected, text.tokens))


strings = st.lists(
    st.tuples(st.sampled_from(["un", "der", " the", "re", "fund", " ", "x", "1", ""]), marks), min_size=1, max_size=5
)


@pytest.mark.parametrize("make_tokenizer", [byte_level_bpe, llama3_bpe, sentencepiece_bpe, unigram])
@settings(max_examples=up_to(40), deadline=None)
@given(data=st.data())
def test_adapters_change_no_token_and_each_token_is_under_that_of_its_extent(make_tokenizer, data, models):
    drawn, joins = data.draw(strings), data.draw(st.sampled_from(["exact", "split"]))
    model = models["llama", "peft"]
    activate(model, ("b",))
    lm = LM(model, make_tokenizer(), joins=joins)
    text, plain_text = Text("", lm), Text("", lm)
    for string, mark in drawn:
        text += Text(string) if mark == UNMARKED else Text(string).with_adapter(mark)
        plain_text += string
    if not text.tokens:
        return
    marks_of = [None] * len(text.tokens)
    kept = [mark for string, mark in drawn if string]
    for extent, mark in zip(lm.extents([plain_text])[0], kept, strict=True):
        marks_of[extent.start : extent.stop] = [mark] * (extent.stop - extent.start)
    assert_as_reference(model, text, plain_text, list(zip(plain_text.tokens, marks_of, strict=True)))
    assert text.string == plain_text.string


def test_a_token_across_a_join_of_two_adapters_is_noticed_as_at_any_join(model, tokenizer):
    """It is under the adapter of the segment behind the join."""
    lm = LM(model, tokenizer)
    text = Text(" ca", lm) + Text("t").with_adapter("a")
    assert len(text.tokens) == 1
    assert text.joins() == (Text(" ca", lm) + "t").joins() != []
    assert torch.equal(text.logits, Text(" cat", lm).with_adapter("a").logits)
    with pytest.raises(bp.JoinError, match="tokens change"):
        (Text(" ca", LM(model, tokenizer, joins="error")) + Text("t").with_adapter("a")).logits  # noqa: B018
    assert LM(model, tokenizer, joins="error").tokens(Text("the cat") + Text(" sat").with_adapter("a"))


# Texts

texts = st.recursive(
    st.builds(
        lambda string, mark: Text(string) if mark == UNMARKED else Text(string).with_adapter(mark),
        st.sampled_from(["", "a", "b"]),
        marks,
    ),
    lambda inner: st.one_of(
        st.builds(lambda x, y: x + y, inner, inner),
        st.builds(lambda x, y: x | y, inner, inner),
        st.builds(Text.frozen, inner),
        st.builds(Text.with_adapter, inner, st.sampled_from([None, "a"])),
    ),
    max_leaves=6,
)


@settings(max_examples=up_to(80), deadline=None)
@given(x=texts, y=texts)
def test_with_adapter_holds_for_all_parts_of_a_text(x, y):
    for name in ("a", None):
        under_it = x.with_adapter(name)
        assert (x + y).with_adapter(name) == under_it + y.with_adapter(name)
        assert (x | y).with_adapter(name) == (under_it | y.with_adapter(name))
        assert x.frozen().with_adapter(name) == under_it.frozen()
        assert under_it.with_adapter("b").with_adapter(name) == under_it
        assert under_it.string == x.string
        assert pickle.loads(pickle.dumps(under_it)) == under_it
        assert hash(under_it) == hash(x.with_adapter("b").with_adapter(name))
        assert (under_it == x.with_adapter("b")) is not bool(x.segments)


def test_texts_show_their_adapters(lm):
    judged = Text(" question").with_adapter("judge") + Text("?").with_adapter("judge")
    text = "context" + judged + Text.from_tokens([1, 2], lm).with_adapter(None)
    assert repr(judged) == "Text((' question?').with_adapter('judge'))"
    assert repr(text).startswith("Text('context' + (' question?')")
    assert repr(Text.from_tokens([1, 2], lm).with_adapter(None)) == "Text(('<2 token ids>').with_adapter(None))"
    with pytest.raises(bp.TextTypeError, match="name of an adapter or None, not 3"):
        judged.with_adapter(3)


def test_the_own_special_tokens_of_a_text_stay_away_under_an_adapter(model):
    lm = LM(model, llama3_bpe())
    text = Text("The cat", lm, add_special_tokens=False)
    assert text.with_adapter("a").tokens == text.tokens != Text("The cat", lm).with_adapter("a").tokens


# Adapters that are there, and that are not


def test_an_unknown_adapter_is_refused_with_the_names_of_those_there(lm, model, tokenizer):
    text = Text("The cat", lm).with_adapter("judge")
    for ask in (
        lambda: text.logits,
        lambda: text.tokens,
        lambda: bp.generate(text, max_new_tokens=1),
        lambda: bp.explain([text]),
    ):
        with pytest.raises(AdapterError, match="no adapter 'judge': it has 'a', 'b', 'dora', 'twin'"):
            ask()
    assert text.string == "The cat"
    plain = LM(FAMILIES["llama"](), tokenizer)
    with pytest.raises(AdapterError, match=r"no adapter 'a': it has none\. Load it"):
        Text("The cat", plain).with_adapter("a").logits  # noqa: B018
    assert torch.equal(Text("The cat", plain).with_adapter(None).logits, Text("The cat", plain).logits)
    assert plain.stats.tokens_computed == len(Text("The cat", plain).tokens)


def test_adapters_that_come_change_and_go_are_noticed(tokenizer):
    model = with_adapters("llama")
    lm = LM(model, tokenizer)
    context = Text("The cat", lm)
    text = context + Text(" sat").with_adapter("late")
    with pytest.raises(AdapterError, match="no adapter 'late'"):
        text.tokens  # noqa: B018
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    deactivate(model)
    num_tokens = len(text.tokens)  # without a look at the weights before the name was unknown
    first = text.logits
    assert num_tokens == len((context + " sat").tokens)
    assert float((first - (context + " sat").logits).abs().max()) > 1e-3
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["late"].weight
    with torch.no_grad():
        weight.mul_(2)
    assert float((text.logits - first).abs().max()) > 1e-3
    second = text.logits
    with under(model, [UNMARKED] * len(context.tokens) + ["late"] * (num_tokens - len(context.tokens))) as plain:
        assert_close(second, plain_logits(plain, text.tokens)[-1])
    model.delete_adapter("late")
    deactivate(model)
    with pytest.raises(AdapterError, match="no adapter 'late'"):
        text.logits  # noqa: B018


REFUSED = {
    "IA3": (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "Linear of peft.tuners.ia3.layer"),
    "embedding": (peft.LoraConfig(target_modules=["embed_tokens"]), "Embedding of peft.tuners.lora.layer"),
    "head": (peft.LoraConfig(target_modules=["lm_head"]), "lm_head, outside the body"),
    "whole module": (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "ModulesToSaveWrapper"),
    "tokens": (peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]), "TrainableTokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_adapters_are_refused_by_name_and_serve_the_whole_model(kind, tokenizer):
    config, reason = REFUSED[kind]
    model = peft.get_peft_model(FAMILIES["llama"](), config, "it").eval()
    lm = LM(model, tokenizer)
    text = Text("The cat", lm)
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])
    with pytest.raises(AdapterError, match=f"adapter 'it' cannot be that of a segment: it changes .*{reason}"):
        text.with_adapter("it").logits  # noqa: B018
    with pytest.raises(AdapterError, match=f"beside the active adapter 'it': it changes .*{reason}"):
        text.with_adapter(None).logits  # noqa: B018
    model.base_model.disable_adapter_layers()
    with pytest.raises(AdapterError, match=f"adapter 'it' cannot be that of a segment: it changes .*{reason}"):
        text.with_adapter("it").logits  # noqa: B018
    assert torch.equal(text.with_adapter(None).logits, text.logits)


def test_a_model_that_goes_by_levels_refuses_adapters_by_segment(tokenizer):
    """Its active adapters are on as ever."""
    model = peft.get_peft_model(OTHERS["falcon"](), peft.LoraConfig(target_modules=["query_key_value"]), "it").eval()
    lm = LM(model, tokenizer)
    text = Text("The cat", lm)
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"cannot have adapters: Falcon.* is forwarded by levels"):
            (text + Text(" sat").with_adapter(None)).logits  # noqa: B018
        assert_close(text.logits, plain_logits(model, text.tokens)[-1])


def test_a_merged_adapter_is_refused(tokenizer):
    model = with_adapters("llama")
    activate(model, ["a"])
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"The adapter 'a' is merged into .*unmerge_adapter"):
        Text("The cat", LM(model, tokenizer)).with_adapter("b").logits  # noqa: B018


def test_an_id_that_no_model_has_is_no_token_under_an_adapter(lm):
    (run,) = runs_of(lm, [1])
    number = lm.session.evaluator.executor.adapters.number_of("a")
    for token_id in (1 << 20, MAX_EMBEDDINGS, -1, (number + 1) * MAX_EMBEDDINGS):
        with pytest.raises(bp.TokenIdError, match=f"token id {token_id} "):
            (run.with_adapter("a") + Text.from_tokens([token_id], lm)).logits  # noqa: B018


def test_ids_of_large_vocabularies_are_no_tokens_under_adapters(tokenizer):
    """More than a million embeddings, as for vocabularies of many languages or of items."""
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=(1 << 20) + 8, tie_word_embeddings=True, **sizes)).eval()
    lm = LM(model, tokenizer)
    ids = (5, (1 << 20) + 7, 9)
    text = Text.from_tokens(ids, lm)
    assert text.tokens == ids
    assert_close(text.logits, plain_logits(model, ids)[-1])
    assert_close(text.token_logprobs, plain_token_logprobs(model, ids))


def test_an_activated_lora_is_as_peft_computes_it(tokenizer):
    """From its invocation tokens on, as the segment says: peft finds them in the whole call."""
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8]
    )
    model = peft.get_peft_model(FAMILIES["llama"](), config, "judge").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                moved = torch.linspace(-0.3, 0.3, parameter.numel(), device=parameter.device)
                parameter.add_(moved.view(parameter.shape))
    with pytest.raises(bp.UnsupportedModelError, match=r"activated LoRA.*disable_adapter_layers.*with_adapter"):
        LM(model, tokenizer)
    ids = [*range(20, 40), 7, 8, 1, 2, 3]
    expected = plain_logits(model, ids)
    model.base_model.disable_adapter_layers()
    lm = LM(model, tokenizer)
    context, invoked = runs_of(lm, ids[:20], ids[20:])
    text = context + invoked.with_adapter("judge")
    assert_close(text().all_logits(), expected)
    assert float((expected[-1] - (context + invoked).logits.cpu()).abs().max()) > 1e-2


def test_adapters_in_float32_on_a_model_in_bfloat16(tokenizer):
    model = with_adapters("llama").to(torch.bfloat16)
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            parameter.data = parameter.data.float()
    lm = LM(model, tokenizer)
    text = Text("The cat", lm) + Text(" sat on").with_adapter("a") + Text(" the mat").with_adapter("dora")
    tokens = list(zip(text.tokens, _marks(text, [UNMARKED, "a", "dora"]), strict=True))
    found = text().all_logits()
    with under(model, [mark for _, mark in tokens]) as plain:
        assert_close(found, plain_logits(plain, text.tokens))


def _marks(text, of_segments):
    (extents,) = text.lm.extents([text])
    return [mark for extent, mark in zip(extents, of_segments, strict=True) for _ in range(extent.start, extent.stop)]


# Generating and classifying


def greedy_under(model, text, of_segments, num_tokens):
    """The plain greedy tokens behind a text; each is under the adapter of the last segment."""
    ids, marks = list(text.tokens), _marks(text, of_segments)
    for _ in range(num_tokens):
        with under(model, marks) as plain:
            ids += plain_greedy(plain, ids, 1)
        marks.append(of_segments[-1])
    return tuple(ids[len(text.tokens) :])


def test_generated_tokens_are_under_the_adapter_of_the_last_segment(lm, model):
    context = Text("The cat sat", lm)
    prompts = [context + " on", *(context + Text(" on").with_adapter(name) for name in ("a", "b", "dora", None))]
    of_segments = [[UNMARKED, UNMARKED], *([UNMARKED, name] for name in ("a", "b", "dora", None))]
    expected = [greedy_under(model, text, marks, 6) for text, marks in zip(prompts, of_segments, strict=True)]
    assert len(set(expected)) > 2
    before = lm.stats
    found = bp.generate(prompts, max_new_tokens=6)
    assert [text.completion_tokens for text in found] == expected
    done = lm.stats - before
    assert done.tokens_computed == len(context.tokens) + 4 * (1 + 5)  # "None" is the text without an adapter
    assert done.steps_plain == 5  # steps in place
    for text, marks, prompt in zip(found, of_segments, prompts, strict=True):
        assert text == prompt + text.completion_text
        all_marks = _marks(text, [*marks, marks[-1]])
        with under(model, all_marks) as plain:
            logits = plain_logits(plain, text.tokens)
        assert_close(text.logits, logits[-1])
        assert_close(text.completion_logprobs, token_logprobs_of(logits, text.tokens)[len(prompt.tokens) :])
        assert "".join(prompt.stream(max_new_tokens=6)) == text.completion
    assert repr(found[1].completion_text).endswith(".with_adapter('a'))")


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True, "seed": 1}])
def test_each_way_of_generating_gives_the_same_alone_and_with_others(options, lm, model, tokenizer):
    prompts = [Text("The cat sat the cat", lm).with_adapter(name) for name in ("a", "b", None)]
    together = bp.generate(prompts, max_new_tokens=5, **options)
    alone = []
    for name in ("a", "b", None):
        activate(model, [] if name is None else [name])
        text = Text("The cat sat the cat", LM(model, tokenizer))
        alone.append(bp.generate(text, max_new_tokens=5, **options).completion_tokens)
    assert [text.completion_tokens for text in together] == alone
    assert len(set(alone)) > 1


def test_completions_are_under_the_adapter_of_the_end_of_their_prompt(lm, model):
    context, completions = Text("The cat sat", lm), [" on the mat", " there", " in the ending"]
    prompts = [context + " now", *(context + Text(" now").with_adapter(name) for name in ("a", "dora", "twin"))]
    before = lm.stats
    found = bp.classify.log_probs(prompts, completions, lm)
    num_behind = sum(len(lm.tokens(Text(string, lm))) - 1 for string in completions)
    num_computed = (lm.stats - before).tokens_computed
    expected = []
    for prompt, mark in zip(prompts, (UNMARKED, "a", "dora", "twin"), strict=True):
        for string in completions:
            ids = (*prompt.tokens, *lm.tokens(Text(string, lm)))
            marks = _marks(prompt, [UNMARKED, mark])
            marks += [mark] * (len(ids) - len(marks))
            with under(model, marks) as plain:
                expected.append(token_logprobs_of(plain_logits(plain, ids), ids)[len(prompt.tokens) :].tolist())
    for row, own in zip([row for rows in found for row in rows], expected, strict=True):
        assert row == pytest.approx(own, abs=5e-5)
    assert num_computed <= len(context.tokens) + 3 * (len(prompts[0].tokens) - len(context.tokens) + num_behind)
    best = bp.classify.predict(prompts, completions, lm)
    assert best == bp.classify.predict(prompts, completions, lm, search="best-first")
    chosen = prompts[1].select(completions)
    assert chosen.option == best[1]
    assert repr(chosen.completion_text).endswith(".with_adapter('a'))")


def test_a_conversation_keeps_the_adapters_of_its_texts_or_says_so(model, tokenizer):
    template = "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content{} }}}}|{{% endfor %}}"
    template += "{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
    question = {"role": "user", "content": "The cat"}

    def adapters_of(content, change=""):
        lm.tokenizer.chat_template = template.format(change)
        text = bp.chat(lm, [question, {"role": "assistant", "content": content}])
        return [segment.adapter for segment in text.segments if isinstance(segment, Adapted)]

    lm = LM(model, tokenizer)
    reply = continue_as(ContinuedText, Text("The cat", lm).with_adapter("a"), lm.tokens(Text(" Sat", lm)), lm)
    judged = Text("Sat", lm).with_adapter("b")
    assert adapters_of(reply) == ["a"]
    assert adapters_of([reply, " and ", judged]) == ["a", "b"]
    with pytest.warns(UserWarning, match=r"messages\[1\] differently .* without its adapter"):
        assert adapters_of(reply, " | lower") == []
    for content in (judged, [reply, " and on"]):
        with pytest.raises(
            bp.TokenizerError, match=r"does not write the content of messages\[1\], .* or adapters in it"
        ):
            adapters_of(content, " | lower")


def test_other_tokens_and_distributions_of_texts_under_adapters(lm, model):
    text = Text("The cat", lm) + Text(" sat on").with_adapter("b")
    with under(model, _marks(text, [UNMARKED, "b"])) as plain:
        logprobs = plain_logits(plain, text.tokens).log_softmax(dim=-1)
    assert_close(lm.next_token_logprobs([text], [[5, 9]])[0], logprobs[-1, [5, 9]])
    top = lm.top_logprobs([text], 3)
    assert_close(top.logprobs[1:], logprobs[:-1].topk(3, dim=-1).values)
    assert_close(lm.token_logprobs([text], [Text("The cat", lm)])[0], token_logprobs_of(logprobs, text.tokens)[2:])


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (Text(" sat"), "token 2 of the text is under another adapter than that of the start"),
        (Text(" sat").with_adapter("a"), "token 2 of the text is under another adapter than that of the start"),
        (Text(" cat").with_adapter("b"), r"token 2 of the text is \d{1,3} \('.*'\), and .* start is \d{1,3} \('.*'\)"),
    ],
)
def test_a_start_under_other_adapters_is_no_beginning(start, reason, lm):
    text = Text("The cat", lm) + Text(" sat on").with_adapter("b")
    with pytest.raises(ValueError, match=f"is not the beginning of .*: {reason}"):
        lm.token_logprobs([text], [Text("The cat", lm) + start])


# Stores and looking


def test_another_process_finds_adapted_texts_in_the_store_and_no_others(store, tokenizer):
    """The same tokens at the same place under another adapter are other entries."""
    model = with_adapters("llama")

    def texts_of(lm):
        context, question = runs_of(lm, range(50, 70), range(20))
        return [context + question.with_adapter(name) for name in ("a", "b", None)]

    found = [text.logits for text in texts_of(LM(model, tokenizer, store=store))]
    lm = LM(with_adapters("llama"), tokenizer, store=store)
    for text, logits in zip(texts_of(lm), found, strict=True):
        assert torch.equal(text.logits, logits)
    assert lm.stats.tokens_computed == 0
    assert [piece.where for piece in lm.look_up([texts_of(lm)[0]])[0]] == ["memory"]
    other = runs_of(lm, range(50, 70), range(20))
    dora = other[0] + other[1].with_adapter("dora")
    found_now = dora.logits
    with under(model, [UNMARKED] * 20 + ["dora"] * 20) as plain:
        assert_close(found_now, plain_logits(plain, dora.tokens)[-1])
    assert lm.stats.tokens_computed == 20


def test_pictures_and_accounts_name_adapters(lm):
    context = Text("The cat", lm)
    texts = [context + Text(" sat").with_adapter("a"), context + Text(" sat").with_adapter(None), context + " sat"]
    graph = bp.to_networkx(texts)
    assert sorted(data["adapter"] or "-" for _, data in graph.nodes(data=True)) == ["-", "-", "-", "a"]
    assert [data["adapter"] for _, data in graph.nodes(data=True)].count("") == 1
    assert [data["string"] for _, data in graph.nodes(data=True)].count(" sat") == 3
    drawn = html.unescape(bp.draw(texts).source).replace("\N{NO-BREAK SPACE}", " ")
    assert "under the adapter a" in drawn
    assert "under no adapter" in drawn
    assert "segment 1 ((' sat').with_adapter(None))" in str(bp.explain(texts))
    num_behind = len(texts[0].tokens) - len(context.tokens)
    assert bp.explain(texts).tokens_distinct == len(context.tokens) + 2 * num_behind  # "None": none is active
    shown = texts[0].show()
    assert "¦[a] " in shown.plain()
    assert "a] " in shown._repr_html_()
    assert "[no adapter]" in texts[1].show().plain()
    with pytest.raises(bp.GroupError, match="adapters by segment"):
        bp.verify(texts[0])
    assert bp.verify(texts).num_groups == 2


def test_the_gap_of_groups_keeps_adapters(lm, model):
    context = Text("The cat", lm)
    text = context + (Text(" sat").with_adapter("a") | Text(" ran")) + Text(" on").with_adapter("b")
    full = context + Text(" sat").with_adapter("a") + " ran" + Text(" on").with_adapter("b")
    terms = full.logits.double().log_softmax(-1), text.logits.double().log_softmax(-1)
    expected = float((terms[0].exp() * (terms[0] - terms[1])).sum())
    assert bp.independence_gap(text).divergences[0] == pytest.approx(expected, abs=1e-4)
