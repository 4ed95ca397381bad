"""Generation: the tokens of transformers, each distinct token computed once, few spans, any budget."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backprompt import (
    LM,
    GeneratedText,
    GenerationError,
    GroupError,
    StaleRepresentationError,
    Text,
    TextTooLongError,
    TextTypeError,
    classify,
    eager,
    evaluate,
    generate,
)
from backprompt.attention.calls import PreparedCalls
from backprompt.generation.run import Run
from backprompt.memory.location import Location
from comparing import assert_close, num_distinct_ids
from devices import DEVICE
from reference import generated_by_transformers, plain_greedy, plain_logits, plain_token_logprobs
from threads import in_threads
from tiny_models import FAMILIES, MAX_POSITIONS
from tiny_tokenizers import byte_level_bpe, sentencepiece_bpe

PROMPTS = ["The cat sat on the", "General Kenobi, who was there, says", "Question: What is 12 + 34? Answer:", "The cat"]
NEW = 12
FLAT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


# Greedy decoding


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_those_of_transformers(family, tokenizer):
    model = FAMILIES[family]()
    lm = LM(model, tokenizer)
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    num_new = NEW if family != "phi3_longrope" else 4  # of 32 positions
    for text, found in zip(texts, generate(texts, max_new_tokens=num_new), strict=True):
        assert found.completion_tokens == generated_by_transformers(model, text.tokens, max_new_tokens=num_new)
        assert found.tokens == text.tokens + found.completion_tokens
        assert found.finish_reason == "length"
        expected = plain_token_logprobs(model, found.tokens)
        assert_close(found.completion_logprobs, expected[-num_new:])
        assert_close(found.token_logprobs, expected)
        assert_close(found.logits, plain_logits(model, found.tokens)[-1])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"suppress_tokens": list(range(0, 320, 3))},
        {"encoder_repetition_penalty": 1.5},
        {"min_new_tokens": 7, "eos_token_id": list(range(0, 320, 2))},
        {"eos_token_id": list(range(0, 320, 4))},
        {"forced_eos_token_id": 9},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 11},
        {"sequence_bias": [[[17], 20.0]], "eos_token_id": 17},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "eos_token_id": [8, 9]},
    ],
    ids=lambda options: ",".join(options),
)
def test_decoding_rules_are_those_of_transformers(lm, model, options):
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    for text, found in zip(texts, generate(texts, max_new_tokens=NEW, **options), strict=True):
        assert found.completion_tokens == generated_by_transformers(model, text.tokens, max_new_tokens=NEW, **options)
        ended = found.completion_tokens[-1] in torch.tensor(options.get("eos_token_id", [])).flatten().tolist()
        assert found.finish_reason == ("eos" if ended else "length")


def test_what_the_models_own_configuration_says_counts(tokenizer):
    """But for sampling, which must be asked for."""
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    text = Text(PROMPTS[0], lm)
    plain = text.generate(max_new_tokens=NEW).completion_tokens
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3)
    assert text.generate(max_new_tokens=NEW).completion_tokens == plain
    model.generation_config.update(eos_token_id=plain[3])
    found = text.generate(max_new_tokens=NEW)
    assert found.completion_tokens == plain[: plain.index(plain[3]) + 1]
    assert found.finish_reason == "eos"


def test_texts_with_groups_are_continued(lm):
    text = Text("See ", lm) + (Text("the cat") | "the mat there") + " and"
    found = text.generate(max_new_tokens=6)
    for token_id, logprob in zip(found.completion_tokens, found.completion_logprobs, strict=True):
        assert token_id == int(text.logits.argmax())
        assert_close(logprob, text.logits.log_softmax(dim=-1)[token_id])
        text += Text.from_tokens([token_id], lm)
    assert text.tokens == found.tokens


# Sampling


def test_samples_are_reproducible_and_do_not_depend_on_what_else_is_generated(lm):
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    together = generate(texts, max_new_tokens=8, n=3, do_sample=True, seed=7)
    assert [len(row) for row in together] == [3] * 4
    assert len({found.completion_tokens for found in together[0]}) == 3
    lm.clear()
    alone = generate(texts[2], max_new_tokens=8, n=3, do_sample=True, seed=7)
    assert [found.completion_tokens for found in alone] == [found.completion_tokens for found in together[2]]
    assert texts[2].generate(max_new_tokens=8, temperature=1.0, seed=7) == alone[0]
    assert generate(texts[2], max_new_tokens=8, n=3, do_sample=True, seed=8) != alone
    assert texts[0].generate(max_new_tokens=8, do_sample=True) != texts[0].generate(max_new_tokens=8, do_sample=True)


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"temperature": 0.5, "top_k": 0}, {"top_k": 5}, {"top_p": 0.5, "top_k": 0}], ids=str
)
def test_samples_have_the_exact_distribution(tokenizer, options):
    """4,000 samples of a token: the total variation distance to the exact distribution is that of chance."""
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    text = Text(PROMPTS[0], lm)
    samples = generate(text, max_new_tokens=1, n=4000, do_sample=True, seed=0, show_progress_bar=False, **options)
    counts = torch.bincount(torch.tensor([found.completion_tokens[0] for found in samples]), minlength=320)
    logits = plain_logits(model, text.tokens)[-1] / options.get("temperature", 1.0)
    exact = logits.softmax(dim=-1)
    if options.get("top_k"):
        exact = torch.where(logits >= logits.topk(options["top_k"]).values[-1], exact, 0)
    if "top_p" in options:
        ordered, order = exact.sort(descending=True)
        exact[order[ordered.cumsum(0) - ordered >= options["top_p"]]] = 0
    exact /= exact.sum()
    assert counts[exact == 0].sum() == 0
    distance = (counts / 4000 - exact).abs().sum() / 2
    expected = (exact * (1 - exact) / 4000).sqrt().sum() * 0.4  # of 4,000 exact draws: sqrt(2 / pi) / 2 sigmas each
    assert distance < 1.5 * expected


def test_a_text_that_is_there_twice_is_sampled_twice(lm):
    text, other = Text(PROMPTS[0], lm), Text(PROMPTS[1], lm)
    options = {"max_new_tokens": 8, "do_sample": True, "seed": 3}
    first, _, second = generate([text, other, text], **options)
    assert [first, second] == generate(text, n=2, **options)
    assert first != second


def test_the_random_state_is_left_as_found(lm):
    state = torch.random.get_rng_state()
    Text("The cat", lm).generate(max_new_tokens=4, do_sample=True)
    assert torch.equal(torch.random.get_rng_state(), state)


# Work


def test_each_distinct_token_is_computed_once_in_a_pass_a_step(lm):
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    found = generate(texts, max_new_tokens=NEW)
    assert lm.stats.tokens_computed == num_distinct_ids([text.tokens[:-1] for text in found])  # no last token is needed
    assert lm.stats.forward_passes == NEW  # the prompts, and all but the last of the new ones
    before = lm.stats
    assert generate(texts, max_new_tokens=NEW) == found
    evaluate([found[0] + " and", Text.from_tokens((*found[1].tokens, 5), lm)])
    more = [found[0].tokens + (lm.stats and (found[0] + " and").tokens[-1:]), (*found[1].tokens, 5)]
    expected = num_distinct_ids([text.tokens[:-1] for text in found] + more) - before.tokens_computed
    assert (lm.stats - before).tokens_computed == expected


def test_samples_of_one_prompt_share_it_and_nothing_is_held_twice(lm):
    prompt = Text(PROMPTS[2] * 2, lm)
    found = generate(prompt, max_new_tokens=20, n=16, do_sample=True, seed=1, show_progress_bar=False)
    distinct = num_distinct_ids([text.tokens[:-1] for text in found])
    assert lm.stats.tokens_computed == distinct
    assert lm.stats.bytes_held == distinct * lm.session.evaluator.executor.token_bytes


def test_shorter_continuations_of_one_prompt_hold_nothing_twice(lm):
    text = Text(PROMPTS[0], lm)
    whole = text.generate(max_new_tokens=40)
    for num_new in (35, 20, 30, 40):
        assert text.generate(max_new_tokens=num_new).tokens == whole.tokens[: len(text.tokens) + num_new]
        evaluate(Text.from_tokens(whole.tokens[: len(text.tokens) + num_new // 2], lm))
    assert lm.stats.tokens_computed == len(whole.tokens) - 1
    assert lm.stats.bytes_held == lm.stats.tokens_computed * lm.session.evaluator.executor.token_bytes


def test_what_is_evaluated_between_steps_leaves_nothing_behind(model, tokenizer):
    """The evaluated text is exactly the forwarded part of a stream, so no other span absorbs it."""
    lm = LM(model, tokenizer, memory_bytes=60 * 646)
    for prompt in PROMPTS * 2:
        stream = Text(prompt, lm).stream(max_new_tokens=NEW)
        for _ in range(5):
            stream.run.step()
        evaluate(Text.from_tokens(stream.text.tokens[:-1], lm))
        stream.run.step()
        stream.close()
        assert lm.stats.bytes_held <= 60 * 646


@pytest.mark.parametrize(("name", "which"), [("make_room", 1), ("extend", 4)])
def test_an_error_within_a_step_leaves_pins_as_they_were(lm, monkeypatch, name, which):
    growth = lm.session.evaluator.continuations.growth
    method, num_calls = getattr(growth, name), 0

    def fail(*args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == which:
            raise MemoryError
        return method(*args)

    monkeypatch.setattr(growth, name, fail)
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    with pytest.raises(MemoryError):
        generate(texts, max_new_tokens=NEW)
    assert not lm.session.evaluator.holders.ends()
    for text, found in zip(texts, generate(texts, max_new_tokens=NEW), strict=True):
        assert found.completion_tokens == plain_greedy(lm.model, text.tokens, NEW)


def test_a_continuation_is_few_spans(lm):
    """Later tokens attend to a continuation in a few calls, however many steps it took."""
    found = Text(PROMPTS[0], lm).generate(max_new_tokens=60)
    end = lm.session.evaluator.forest.insert(found.tokens[:-1])
    assert len(end.path()) == 2
    assert len({id(span.keys_values.block) for span in end.path()}) == 2


@pytest.mark.skipif(DEVICE.type == "cuda", reason="one launch a layer serves there, without calls")
def test_a_step_is_a_few_kernel_calls_however_many_texts_grow(lm, monkeypatch):
    num_calls = []
    attend = PreparedCalls.attend

    def count(self, layer_idx, query, key, value, scoring):
        num_calls.append(len(self._calls(query, scoring.window)))
        return attend(self, layer_idx, query, key, value, scoring)

    monkeypatch.setattr(PreparedCalls, "attend", count)
    generate([Text(f"The cat number {idx} sat on", lm) for idx in range(20)], max_new_tokens=25)
    assert max(num_calls[2:]) <= 5  # after the first pass, of two layers


def test_room_that_nobody_has_used_yet_may_hold_anything(lm, monkeypatch):
    """A key that is nan and masked would make the rows nan that do not see it."""
    empty = Location.empty
    monkeypatch.setattr(
        Location, "empty", lambda self, shape, dtype: empty(self, shape, dtype).fill_(float("nan")), raising=True
    )
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    for text, found in zip(texts, generate(texts, max_new_tokens=NEW), strict=True):
        assert found.completion_tokens == plain_greedy(lm.model, text.tokens, NEW)


def test_a_text_that_is_cut_while_it_grows_keeps_no_others_rows(lm):
    prompt = Text("The cat sat on the", lm)
    streams = [(prompt + f" mat {idx}").stream(max_new_tokens=20) for idx in range(6)]
    run = Run(lm, [prompt + f" mat {idx}" for idx in range(8)], streams[0].run.decoding)
    for _ in range(12):
        run.step()
    cut = run.results()[3][0]
    evaluate(cut.prompt + Text.from_tokens(cut.completion_tokens[:5], lm))
    while run.step():
        pass
    distinct = num_distinct_ids([row[0].tokens[:-1] for row in run.results()])
    assert lm.stats.bytes_held == distinct * lm.session.evaluator.executor.token_bytes


@pytest.mark.parametrize(
    "options", [{}, {"prompt_lookup_num_tokens": 5}, {"num_beams": 3}, {"do_sample": True, "seed": 1}], ids=str
)
def test_what_is_known_of_chosen_tokens_is_kept(lm, options):
    """Reading log-probabilities afterwards takes rows of the prompt, and none of what was generated."""
    text = Text("The cat sat. The dog sat. The cat", lm)
    found = text.generate(max_new_tokens=20, **options)
    before = lm.stats
    logprobs = found.token_logprobs
    assert (lm.stats - before).logit_rows <= len(text.tokens)
    assert_close(logprobs, plain_token_logprobs(lm.model, found.tokens))


def test_finished_texts_leave_the_batch_and_waiting_ones_join(lm, model, monkeypatch):
    monkeypatch.setattr("backprompt.generation.run.MAX_LIVE_TEXTS", 2)
    texts = [Text(f"{number} cats sat on the", lm) for number in range(5)]
    options = {"max_new_tokens": 10, "eos_token_id": list(range(0, 320, 5))}
    sizes = []
    executor = lm.session.evaluator.executor
    forward = executor.forward
    monkeypatch.setattr(executor, "forward", lambda *args: sizes.append(args[0].num_tokens) or forward(*args))
    for text, found in zip(texts, generate(texts, **options), strict=True):
        assert found.completion_tokens == generated_by_transformers(model, text.tokens, **options)
    steps = [len(found.completion_tokens) for found in generate(texts, **options)]
    assert len(set(steps)) > 1
    assert len(sizes) < sum(steps)


@pytest.mark.parametrize("memory_tokens", [0, 25, 60])
def test_any_budget(model, tokenizer, memory_tokens):
    lm = LM(model, tokenizer, memory_bytes=memory_tokens * 646)
    texts = [Text(f"{number} cats sat on the mat and", lm) for number in range(6)]
    for text, found in zip(texts, generate(texts, max_new_tokens=NEW, show_progress_bar=False), strict=True):
        assert found.completion_tokens == plain_greedy(model, text.tokens, NEW)
    assert lm.stats.bytes_held <= memory_tokens * 646


def test_what_is_generated_is_stored(model, tokenizer, tmp_path):
    first = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    found = Text(PROMPTS[0], first).generate(max_new_tokens=40)
    lm = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    assert Text(PROMPTS[0], lm).generate(max_new_tokens=40).completion_tokens == found.completion_tokens
    assert lm.stats.tokens_computed + lm.stats.tokens_loaded <= len(found.tokens)
    lm = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    text = Text.from_tokens((*found.tokens, 5), lm)
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])
    assert lm.stats.tokens_computed == 2  # the last one generated, and the new one


# Streams


@pytest.mark.parametrize("make_tokenizer", [byte_level_bpe, sentencepiece_bpe])
def test_pieces_are_the_completion(model, make_tokenizer):
    """Tokens of random bytes, many of them parts of characters."""
    lm = LM(model, make_tokenizer())
    for seed in range(5):
        stream = Text(PROMPTS[seed % 4], lm).stream(max_new_tokens=20, temperature=2.0, seed=seed)
        pieces = list(stream)
        assert "".join(pieces) == stream.text.completion
        assert all(pieces)
        assert stream.text.finish_reason == "length"


def test_a_stopped_stream_keeps_what_was_generated(lm):
    text = Text(PROMPTS[0], lm)
    expected = text.generate(max_new_tokens=10)
    lm.clear()
    before = lm.stats
    with text.stream(max_new_tokens=10) as stream:
        for _ in range(3):
            next(stream)
    assert stream.text.finish_reason == "interrupted"
    num_new = len(stream.text.completion_tokens)
    assert stream.text.completion_tokens == expected.completion_tokens[:num_new]
    evaluate(stream.text)
    assert (lm.stats - before).tokens_computed == len(stream.text.tokens)
    assert lm.stats.bytes_held == len(stream.text.tokens) * lm.session.evaluator.executor.token_bytes
    assert not lm.session.evaluator.holders.ends()


@FLAT
@given(data=st.data())
def test_whatever_happens_between_steps(model, tokenizer, data):
    """Beginnings and continuations of what is being generated are evaluated, everything is dropped, others generate."""
    lm = LM(model, tokenizer, memory_bytes=data.draw(st.sampled_from([20, 60, 10_000])) * 646)
    texts = [Text(prompt, lm) for prompt in (PROMPTS[0], PROMPTS[3])]
    streams = [text.stream(max_new_tokens=NEW) for text in texts]
    for _ in range(NEW):
        stream = streams[data.draw(st.integers(0, 1))]
        match data.draw(st.sampled_from(["step", "step", "beginning", "branch", "clear", "generate", "pin"])):
            case "step":
                next(stream, None)
            case "beginning":
                ids = stream.text.tokens
                evaluate(Text.from_tokens(ids[: data.draw(st.integers(1, len(ids)))], lm))
            case "branch":
                ids = stream.text.tokens
                cut = data.draw(st.integers(1, len(ids)))
                text = Text.from_tokens(
                    (*ids[:cut], *data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))), lm
                )
                assert_close(text.logits, plain_logits(model, text.tokens)[-1])
            case "clear":
                lm.clear()
            case "generate":
                texts[1].generate(max_new_tokens=3)
            case "pin" if lm.stats.bytes_held < 20 * 646:
                stream.text.pin().release()
    for text, stream in zip(texts, streams, strict=True):
        list(stream)
        assert stream.text.completion_tokens == plain_greedy(model, text.tokens, NEW)
        expected = plain_token_logprobs(model, stream.text.tokens)
        assert_close(stream.text.token_logprobs, expected)
    assert not lm.session.evaluator.holders.ends()
    assert lm.stats.tokens_reused >= 0
    gc.disable()  # blocks must not wait for it
    try:
        lm.clear()
        assert lm.stats.bytes_held == 0
    finally:
        gc.enable()


def test_a_stream_that_nobody_keeps_holds_nothing(model, tokenizer):
    """The stream is not closed; the next computation releases its rows."""
    lm = LM(model, tokenizer, memory_bytes=0)
    stream = Text(PROMPTS[0], lm).stream(max_new_tokens=NEW)
    next(stream)
    assert lm.stats.bytes_held > 0
    del stream
    gc.collect()
    evaluate(Text("The", lm))
    assert lm.stats.bytes_held == 0
    assert not lm.session.evaluator.holders.ends()


def test_a_stream_overtakes_another_of_the_same_text(lm, model):
    text = Text(PROMPTS[0], lm)
    behind, ahead = text.stream(max_new_tokens=NEW), text.stream(max_new_tokens=NEW)
    for _ in range(3):
        behind.run.step()
    for _ in range(7):
        ahead.run.step()
    spans = set(lm.session.evaluator.forest.spans())
    assert behind.run.ends | ahead.run.ends <= spans
    behind.close()
    list(ahead)
    assert ahead.text.completion_tokens == plain_greedy(model, text.tokens, NEW)
    assert lm.stats.tokens_computed == len(ahead.text.tokens) - 1
    assert not lm.session.evaluator.holders.ends()


def test_threads_generate_beside_each_other(lm, model):
    def work(idx):
        text = Text(PROMPTS[idx % 4], lm)
        assert text.generate(max_new_tokens=NEW).completion_tokens == plain_greedy(model, text.tokens, NEW)

    in_threads(8, work)


# The text


def test_a_generated_text_joins_to_a_plain_one(lm):
    prompt = Text(PROMPTS[0], lm)
    found = prompt.generate(max_new_tokens=4)
    assert isinstance(found, GeneratedText)
    assert found.prompt is prompt
    for joined in (found + "", found + " more", "See: " + found, Text("", lm) + found, Text("").join([found])):
        assert type(joined) is Text
    assert found == prompt + Text.from_tokens(found.completion_tokens, lm)
    assert hash(found) == hash(found + "")
    assert found.string == prompt.string + found.completion
    again = (found + "!").generate(max_new_tokens=2)
    assert again.tokens[: len(found.tokens)] == found.tokens


def test_a_prompt_may_end_within_a_character(lm):
    ids = Text("a€b", lm).tokens
    assert len(ids) > 3
    prompt = Text.from_tokens(ids[:2], lm)
    found = prompt.generate(max_new_tokens=1, sequence_bias=[[[ids[2]], 1e4]])
    assert prompt.string.endswith("\N{REPLACEMENT CHARACTER}")
    assert found.string.endswith(found.completion)


def test_eager_mode_evaluates_the_result_and_nothing_else(lm):
    text = Text(PROMPTS[0], lm)
    with eager():
        found = text.generate(max_new_tokens=10)
        pieces = list(text.stream(max_new_tokens=10))
    assert "".join(pieces) == found.completion
    assert lm.stats.tokens_computed <= len(found.tokens)


def test_a_closed_stream_does_not_go_on(lm):
    stream = Text(PROMPTS[0], lm).stream(max_new_tokens=NEW)
    stream.close()
    assert list(stream) == []
    assert lm.stats.forward_passes == 0


def test_special_tokens_are_left_out_of_the_string(tokenizer):
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    end = lm.tokenizer.eos_token_id
    found = Text(PROMPTS[0], lm).generate(max_new_tokens=4, sequence_bias=[[[end], 1e4]], eos_token_id=end)
    assert (found.completion_tokens, found.completion, found.finish_reason) == ((end,), "", "eos")


# Errors, before anything runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, not 0"),
        ({"n": 0}, "n must be an int of at least 1"),
        ({"n": 2}, "Greedy decoding gives one continuation, not 2"),
        ({"temperature": 0.5, "do_sample": False}, "temperature is for sampling, but do_sample is False"),
        ({"temperatur": 0.5}, "no option 'temperatur'"),
        ({"max_length": 9}, "takes no max_length: use max_new_tokens"),
        ({"num_return_sequences": 2}, "use n="),
        ({"assistant_early_exit": 1}, "not assisted generation"),
        ({"guidance_scale": 1.5}, "classifier-free guidance"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": -1.0}, "top_p"),
        ({"token_healing": True}, "token healing"),
        ({"output_attentions": True}, "takes no output_attentions"),
        ({"penalty_alpha": 0.5}, "takes no penalty_alpha: it is for contrastive search"),
        ({"num_beam_groups": 2}, "takes no num_beam_groups"),
        ({"max_new_tokens": True}, "max_new_tokens must be an int of at least 1, not True"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an int of at least 1, not 2.0"),
        ({"n": True}, "n must be an int of at least 1, not True"),
        ({"seed": "x"}, "seed must be an int of at least 0, not 'x'"),
        ({"seed": -1}, "seed must be an int of at least 0, not -1"),
        ({"seed": True}, "seed must be an int"),
        ({"do_sample": "yes"}, "do_sample must be True or False, not 'yes'"),
        ({"temperature": True}, "temperature must be a finite number of at least 0, not True"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"top_p": 2}, "top_p must be a finite number from 0 to 1, not 2"),
        ({"top_p": float("nan")}, "top_p must be a finite number"),
        ({"eta_cutoff": 5.0}, "eta_cutoff must be a finite number from 0 to 1"),
        ({"top_k": True}, "top_k must be an int of at least 0"),
        ({"num_beams": "3"}, "num_beams must be an int of at least 1, not '3'"),
        ({"num_beams": 2, "length_penalty": "x"}, "length_penalty must be a finite number, not 'x'"),
        ({"num_beams": 2, "early_stopping": "banana"}, 'True, False or "never"'),
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens must be an int of at least 1"),
        ({"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": "x"}, "max_matching_ngram_size must be an int"),
        ({"eos_token_id": []}, "eos_token_id must be token ids"),
        ({"eos_token_id": 10**9}, "eos_token_id has the id 1000000000, but the model's ids are 0 to 319"),
        ({"eos_token_id": [1, True]}, "an id of eos_token_id must be an int"),
        ({"suppress_tokens": [400]}, "suppress_tokens has the id 400"),
        ({"max_time": "x"}, "max_time must be a finite number of at least 0"),
        ({"sequence_bias": [[[400], 1.0]]}, "transformers refuses these options"),
        ({"exponential_decay_length_penalty": 3}, "transformers refuses these options"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(lm, options, message):
    with pytest.raises(GenerationError, match=message):
        generate([Text("The cat", lm)], **{"max_new_tokens": 3, **options})
    assert lm.stats.forward_passes == 0


def test_numbers_of_any_kind_are_options(lm):
    text = Text(PROMPTS[0], lm)
    options = {"max_new_tokens": 4, "temperature": 2.0, "top_k": 50, "seed": 3, "eos_token_id": [9]}
    others = {
        "max_new_tokens": np.int64(4),
        "temperature": 2,
        "top_k": np.int32(50),
        "seed": np.int64(3),
        "eos_token_id": np.array([9]),
    }
    assert text.generate(**others, n=np.int64(1)) == text.generate(**options, n=1)


def test_a_bar_is_shown_or_not(lm):
    with pytest.raises(ValueError, match="show_progress_bar must be True or False, not 'no'"):
        generate(Text("The cat", lm), max_new_tokens=2, show_progress_bar="no")
    with pytest.raises(ValueError, match="show_progress_bar must be True or False, not 0"):
        evaluate(Text("The cat", lm), show_progress_bar=0)
    assert lm.stats.forward_passes == 0


def test_texts_that_cannot_be_continued(lm):
    long = Text.from_tokens([5] * (MAX_POSITIONS - 3), lm)
    with pytest.raises(TextTooLongError, match="Ask for at most 3, or shorten the text"):
        generate([Text("The cat", lm), long], max_new_tokens=4)
    with pytest.raises(GroupError, match="ends in a group"):
        (Text("See ", lm) + (Text("a") | "b")).generate(max_new_tokens=4)
    with pytest.raises(TextTypeError, match=r"texts\[1\] is a str"):
        generate([Text("a", lm), "b"], max_new_tokens=4)
    assert lm.stats.forward_passes == 0
    assert generate([], max_new_tokens=4) == []
    assert len(long.generate(max_new_tokens=3).completion_tokens) == 3


def in_place(weight):
    weight[0, 0] += 0.5


def through_data(weight):
    weight.data.mul_(1.5)  # the numbers alone tell


@pytest.mark.parametrize(
    ("change", "message"), [(in_place, "since this continuation was begun"), (through_data, "while they were used")]
)
def test_changed_weights_are_noticed(change, message, tokenizer):
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    stream = Text(PROMPTS[0], lm).stream(max_new_tokens=5)
    next(stream)
    before = stream.text.completion_tokens
    with torch.no_grad():
        change(model.transformer.h[1].mlp.c_fc.weight)
    with pytest.raises(StaleRepresentationError, match=message):
        stream.run.step()
    assert stream.text.completion_tokens == before
    assert lm.stats.bytes_held == 0
    again, fresh = (Text(PROMPTS[0], used).generate(max_new_tokens=5) for used in (lm, LM(model, tokenizer)))
    assert again.completion_tokens == fresh.completion_tokens


def test_an_interrupted_batch_keeps_its_nodes(lm, monkeypatch):
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    texts[0].generate(max_new_tokens=NEW)  # is there when the others are interrupted
    executor = lm.session.evaluator.executor
    forward, num_passes = executor.forward, 0

    def interrupt(*args):
        nonlocal num_passes
        num_passes += 1
        if num_passes == 6:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(executor, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(texts, max_new_tokens=NEW)
    done = lm.stats.tokens_computed
    assert not lm.session.evaluator.holders.ends()
    found = generate(texts, max_new_tokens=NEW)
    assert lm.stats.tokens_computed == num_distinct_ids([text.tokens[:-1] for text in found])
    assert done > 0


# A choice among options


def test_select_is_classification(lm):
    prompt = Text(PROMPTS[0], lm)
    options = ["mat", "mat and the cat", "46"]
    for aggregate in classify.AGGREGATES:
        found = prompt.select(options, aggregate=aggregate)
        expected = classify.predict_proba(prompt, options, aggregate=aggregate)
        assert found.probabilities == dict(zip(options, expected.tolist(), strict=True))
        assert found.option == options[expected.argmax()]
        assert found.aggregate == aggregate
        assert f"selected {found.option!r} by the {aggregate}" in repr(found)
    found = prompt.select(iter(options))
    assert found.aggregate == "mean"
    assert found.probabilities == prompt.select(options, aggregate="mean").probabilities
    assert found.completion_tokens == lm.session.completion_ids([" " + found.option])[0]
    assert found.string == prompt.string + " " + found.option
    assert type(found + ".") is Text
    assert prompt.select(options, end_of_prompt="", prior=[0, 0, 1]).string == prompt.string + "46"
    found = prompt.select(["46", "hello there"])
    before = lm.stats
    evaluate(found)
    assert (lm.stats - before).tokens_computed == 1  # the last one, which scoring does not need
