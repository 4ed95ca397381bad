"""Verifying: the figures are those of a comparison written out here, and drift that a test has made is found."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from test_lookup import CONTEXT

import backprompt as bp
from backprompt import LM, DriftError, StaleRepresentationError, Text, evaluate, verify
from backprompt.inspection import verify as verify_module
from backprompt.model import skeleton
from backprompt.store import MemoryStore
from comparing import assert_close
from reference import plain_logits, plain_token_logprobs
from tiny_models import FAMILIES
from tiny_tokenizers import TOKENIZERS


def questions(lm):
    context = Text(CONTEXT, lm)
    return [context + f" What is {n} + {n}?" + answer for n in range(3) for answer in (" Yes.", " No.")]


def held_states(lm):
    return [span.states for span in lm.session.evaluator.forest.spans() if span.states is not None]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_figures_are_those_of_the_plain_call(family, tokenizer):
    """Compared once more, text by text, with the slow reference."""
    model = FAMILIES[family]()
    texts = questions(LM(model, tokenizer))
    verified = verify(texts)
    rows, likely, scored = [], [], []
    for text in texts:
        ours, theirs = text().all_logits().double(), plain_logits(model, text.tokens).double()
        rows.append((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs())
        is_likely = (ours.softmax(-1) >= 1e-3) | (theirs.softmax(-1) >= 1e-3)
        likely.append(rows[-1][is_likely | (theirs == theirs.amax(-1, keepdim=True))])
        scored.append((text.token_logprobs - plain_token_logprobs(model, text.tokens))[1:].abs())
    together = torch.cat(rows)
    expected = max(float(together.max()), float(torch.cat(scored).max()))
    assert verified.largest_gap == pytest.approx(expected, rel=1e-3)
    expected = max(float(torch.cat(likely).max()), float(torch.cat(scored).max()))
    assert verified.gap == pytest.approx(expected, rel=1e-3)
    assert verified.gap <= verified.largest_gap
    assert verified.mean_gap == pytest.approx(float(together.mean()), rel=1e-3)
    assert verified.num_tokens == sum(len(text.tokens) for text in texts)
    assert (verified.num_texts, verified.num_given, verified.num_groups) == (6, 6, 0)
    assert verified.argmax_flips == 0
    assert verified.passed
    assert verified.dtype == "torch.float32"
    assert 0 < verified.largest_gap < 1e-4
    assert verified.tolerance == 1e-3
    assert verify(texts, tolerance=0.5).tolerance == 0.5


def test_weights_that_change_meanwhile_are_no_drift(tokenizer, monkeypatch):
    model = FAMILIES["gpt2"]()
    texts = questions(LM(model, tokenizer))
    compare, num_compared = verify_module.gaps_of, []

    def change_at_the_end(model_repr, plain):
        num_compared.append(1)
        gaps = compare(model_repr, plain)
        if len(num_compared) == len(texts):
            with torch.no_grad():
                model.lm_head.weight.mul_(2)
        return gaps

    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "gaps_of", change_at_the_end)
        with pytest.raises(StaleRepresentationError):
            verify(texts)
    assert verify(texts).passed


def test_drift_is_found_and_raised(model, tokenizer):
    """A hidden state that is not what the model computes, as if a cache had mixed two prompts."""
    lm = LM(model, tokenizer)
    texts = questions(lm)
    evaluate(texts)
    assert verify(texts, raise_on_drift=True).passed
    (segment,) = [e for e in lm.extents(texts[2:3])[0] if e.segment == " What is 1 + 1?"]
    end = lm.session.evaluator.forest.insert(texts[2].tokens[: segment.stop])
    end.states.block.hidden[end.states.stop - 1] += 3.0
    verified = verify(texts)
    assert not verified.passed
    assert (verified.worst.text_idx, verified.worst.segment, verified.worst.num_texts) == (2, "' What is 1 + 1?'", 2)
    assert verified.argmax_flips > 0
    assert [node for node in verified.nodes if node.gap > verified.tolerance] == [verified.worst]
    with pytest.raises(DriftError, match=r"texts\[2\], segment 1 \(' What is 1 \+ 1\?'\)"):
        verify(texts, raise_on_drift=True)
    assert str(verified).startswith("NOT the same as the plain call")
    assert verify(texts, tolerance=1e6, raise_on_drift=True).passed


def test_a_wrong_log_probability_is_found(model, tokenizer):
    """Log-probabilities are held beside hidden states, and may be wrong though these are right."""
    lm = LM(model, tokenizer)
    text = questions(lm)[0]
    expected = plain_token_logprobs(model, text.tokens)
    assert_close(text.token_logprobs, expected)
    states = held_states(lm)[0]
    states.block.logprobs[states.stop - 1] += 0.25
    verified = verify(text)
    assert verified.gap == verified.largest_gap == pytest.approx(0.25, abs=1e-3)
    assert not verified.passed
    assert verified.mean_gap < 1e-4


def test_what_was_stored_in_fewer_bits(model, tokenizer):
    store = MemoryStore(dtype="int8")
    evaluate(Text(CONTEXT, LM(model, tokenizer, store=store)))
    exact = verify(questions(LM(model, tokenizer)))
    verified = verify(questions(LM(model, tokenizer, store=store)))
    assert verified.stored_error > 0 == exact.stored_error
    assert verified.largest_gap > 100 * exact.largest_gap
    assert "came from a store in fewer bits" in str(verified)


def test_a_sample_is_drawn_by_its_seed(model, tokenizer):
    texts = questions(LM(model, tokenizer))
    drawn = {frozenset(node.text_idx for node in verify(texts, sample=1, seed=seed).nodes) for seed in range(8)}
    assert len(drawn) > 1
    verified = verify(texts, sample=2, seed=3)
    assert verified == verify(texts, sample=2, seed=3)
    assert (verified.num_texts, verified.num_given) == (2, 6)
    assert "2 of 6 texts" in str(verified)
    assert verify(texts, sample=100).num_texts == 6


def test_texts_with_groups_are_left_out(model, tokenizer):
    lm = LM(model, tokenizer)
    group = Text("a", lm) + (Text("b") | "c") + "d"
    frozen = Text("a", lm) + Text("b", lm).frozen() + "c"
    verified = verify([group, *questions(lm), frozen])
    assert (verified.num_texts, verified.num_given, verified.num_groups) == (6, 8, 2)
    assert verified.nodes[0].text_idx == 1
    assert "Left out: 2 texts with groups" in str(verified)
    with pytest.raises(bp.GroupError, match="all of the 1 texts"):
        verify(group)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_have_their_tolerance(tokenizer, dtype):
    model = FAMILIES["llama"]().to(dtype)
    verified = verify(questions(LM(model, tokenizer)))
    assert verified.dtype == str(dtype)
    assert verified.passed
    assert (verified.largest_gap < 1e-12) == (dtype is torch.float64)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def verify_against(monkeypatch, texts, change):
    """Verify against a plain call of a changed model."""
    evaluate(texts)  # the `LM` checks itself against the model as it is
    make_plain = skeleton.plain_copy

    def plain_copy(model):
        plain = make_plain(model)
        change(plain)
        return plain

    with monkeypatch.context() as patch:
        patch.setattr(skeleton, "plain_copy", plain_copy)
        return verify(texts)


def scale_logits(factor):
    def scaled(module, arguments, output):
        output.logits = output.logits * factor
        return output

    return lambda plain: plain.register_forward_hook(scaled)


def change_norms(plain):
    for module in plain.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 1e5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_differs_fails_in_every_dtype(tokenizer, dtype, monkeypatch):
    """The tolerance does not grow with the logits, which are as large here as those of real models."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.lm_head.weight *= 4
    lm = LM(model.to(dtype), tokenizer)
    texts = questions(lm)
    assert verify(texts).passed
    for change in (scale_logits(0.9), change_norms):
        verified = verify_against(monkeypatch, texts, change)
        assert not verified.passed, verified


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_fails(tokenizer, dtype, monkeypatch):
    """In one row of one text, behind others that are the same."""

    def spoil(module, arguments, output):
        output.logits[0, 3] = torch.nan
        return output

    texts = questions(LM(FAMILIES["llama"]().to(dtype), tokenizer))
    verified = verify_against(monkeypatch, texts, lambda plain: plain.register_forward_hook(spoil))
    assert verified.gap == verified.largest_gap == torch.inf
    assert not verified.passed
    figures = json.loads(json.dumps(verified.to_dict(), allow_nan=False))
    assert (figures["gap"], figures["passed"]) == (None, False)
    assert None in [node["largest_gap"] for node in figures["nodes"]]
    assert verified.worst.start <= 3 < verified.worst.stop


def test_improbable_tokens_do_not_count(model, tokenizer, monkeypatch):
    """They are in the largest gap only."""

    def change(module, arguments, output):
        output.logits.scatter_add_(
            -1, output.logits.argmin(-1, keepdim=True), torch.full(output.logits.shape[:-1], -1.0)[..., None]
        )
        return output

    sharp = FAMILIES["llama"]()
    with torch.no_grad():
        sharp.lm_head.weight *= 8
    lm = LM(sharp, tokenizer)
    verified = verify_against(monkeypatch, questions(lm), lambda plain: plain.register_forward_hook(change))
    assert verified.largest_gap > 0.9
    assert verified.passed


def test_special_tokens_only(model):
    verified = verify(Text("", LM(model, TOKENIZERS["llama3_bpe"]())))
    assert verified.num_tokens == 1
    assert verified.passed


def test_the_model_is_left_as_it_was(tokenizer, caplog):
    """In training mode, with its configuration and the held spans."""
    model = FAMILIES["gpt2"]().train()
    model.config.use_cache = True
    lm = LM(model, tokenizer)
    texts = questions(lm)
    evaluate(texts)
    before = lm.stats
    with caplog.at_level(logging.WARNING):
        assert verify(texts).passed
    assert model.training
    assert model.config.use_cache
    after = lm.stats
    assert (after.tokens_computed, after.bytes_held) == (before.tokens_computed, before.bytes_held)
    assert not caplog.records


def test_account_as_text_html_and_json(model, tokenizer):
    lm = LM(model, tokenizer)
    verified = verify([Text("Is it <b>?", lm) + " Yes."])
    printed = str(verified)
    assert printed.startswith("The same as the plain call: ")
    assert f"{verified.largest_gap:.2g} nats" in printed
    assert "texts[0], segment 1 ' Yes.'" in printed
    assert "&lt;b&gt;" in verified._repr_html_()
    assert "<b>" not in verified._repr_html_()
    figures = json.loads(json.dumps(verified.to_dict()))
    assert figures["largest_gap"] == verified.largest_gap
    assert figures["passed"] is True
    assert [node["segment"] for node in figures["nodes"]] == ["'Is it <b>?'", "' Yes.'"]


def test_a_progress_bar_shows_where_it_is_asked_for(model, tokenizer, capsys, monkeypatch):
    texts = questions(LM(model, tokenizer))
    verify(texts)
    assert capsys.readouterr().err == ""  # no terminal
    verify(texts[:2], show_progress_bar=True)
    assert "plain calls: 100%" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    verify(texts, show_progress_bar=False)
    verify(texts[:2])
    assert capsys.readouterr().err == ""
    verify(texts)
    assert "plain calls: 100%" in capsys.readouterr().err


def test_what_is_refused(model, tokenizer):
    lm = LM(model, tokenizer)
    text = Text("The cat", lm)
    with pytest.raises(ValueError, match="at least one text"):
        verify([])
    with pytest.raises(ValueError, match="sample must be"):
        verify(text, sample=0)
    with pytest.raises(ValueError, match="tolerance must be"):
        verify(text, tolerance=-1.0)
    with pytest.raises(ValueError, match="tolerance must be"):
        verify(text, tolerance=float("nan"))
    with pytest.raises(bp.TextTypeError, match="verify takes a Text or several in a list, not the str"):
        verify("The cat")
    with pytest.raises(bp.MixedModelsError):
        verify([text, Text("The cat", LM(model, tokenizer))])
    with pytest.raises(bp.TextTooLongError):
        verify(Text("a " * 300, lm))
    assert lm.stats.tokens_computed == 0


# TF32


@pytest.fixture
def products():
    """Torch's setting of matrix products, which stays as it was."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_is_known_by_torchs_setting(products):
    for precision, is_on in (("tf32", True), ("ieee", False)):
        products.fp32_precision = precision
        assert verify_module.multiplies_in_tf32(torch.device("cuda"), torch.float32) is is_on
        assert not verify_module.multiplies_in_tf32(torch.device("cuda"), torch.bfloat16)
        assert not verify_module.multiplies_in_tf32(torch.device("cpu"), torch.float32)


def test_tf32_is_known_by_the_setting_of_older_versions(monkeypatch):
    for is_on in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=is_on))
        assert verify_module.multiplies_in_tf32(torch.device("cuda"), torch.float32) is is_on


@pytest.mark.parametrize("is_on", [True, False])
def test_a_gap_under_tf32_names_it(is_on, tokenizer, monkeypatch):
    monkeypatch.setattr(verify_module, "multiplies_in_tf32", lambda device, dtype: is_on)
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    text = Text("The cat sat", lm)
    assert "TF32" not in str(verify(text))
    assert verify(text).tf32 is is_on
    wrong = verify(text, tolerance=0.0)
    assert "TF32" not in str(wrong)  # a gap of float32's own
    assert "TF32" not in wrong.advice
    far = verify_against(monkeypatch, [text], scale_logits(0.9))
    assert ("TF32" in str(far)) is is_on
    assert ("TF32" in far.advice) is is_on


def test_the_account_fits_80_columns(lm):
    texts = [Text("A segment of many words, whose middle is left out: " * n, lm) + " b" * 9 for n in (1, 2)]
    lines = str(verify(texts)).splitlines()
    assert max(map(len, lines)) <= 80
    start = next(idx for idx, line in enumerate(lines) if line.startswith("segment "))
    assert {len(line) for line in lines[start:]} == {80}
