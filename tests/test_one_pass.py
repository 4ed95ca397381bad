"""Texts and steps of generations of all kinds that wait at the same time are forwarded in one pass."""

import pytest

from backprompt import LM, Text, generate
from backprompt.generation.decoding import Decoding
from backprompt.generation.run import Run
from backprompt.generation.stops import StopStrings
from comparing import assert_close
from reference import plain_token_logprobs
from tiny_models import build
from tiny_tokenizers import byte_level_bpe
from waiting import all_at_once

PROMPT = "Question: What is 12 + 34? Answer:"


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


@pytest.fixture
def lm(model):
    return LM(model, byte_level_bpe())


def runs_with(lm, options):
    """Return a function that begins to continue a prompt."""
    stops = StopStrings(None, lm.tokenizer)
    decoding = Decoding(lm.session.causal_lm, lm.tokenizer, max_new_tokens=6, stops=stops, seed=5, given=options)
    return lambda prompt: Run(lm, [Text(prompt, lm)], decoding)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_texts_and_steps_that_wait_are_one_pass(lm, model, options):
    """A step each of three generations, begun before or not, with texts to be scored and read."""
    alone = LM(model, byte_level_bpe())
    prompts = [f"{PROMPT} {idx} {idx} {idx}" for idx in range(3)]
    expected = generate([Text(prompt, alone) for prompt in prompts], max_new_tokens=6, **options)
    for num_steps in (0, 1, 3):
        lm.clear()
        begun = runs_with(lm, options)
        runs = [begun(prompt) for prompt in prompts]
        for own in runs:
            for _ in range(num_steps):
                own.step()
        texts = [Text(f"The cat {num_steps} {idx}", lm) for idx in range(3)]
        before = lm.stats
        work = [lambda text=text: lm.token_logprobs([text])[0] for text in texts]
        found = all_at_once(lm, [*(own.step for own in runs), *work, lambda text=texts[0]: lm.evaluate([text])])
        assert (lm.stats - before).model_calls == 1
        for text, logprobs in zip(texts, found[3:], strict=False):
            assert_close(logprobs, plain_token_logprobs(model, text.tokens))
        for own, text in zip(runs, expected, strict=True):
            while own.step():
                pass
            ((one,),) = own.found()
            assert tuple(choice.token_id for choice in one.choices) == tuple(text.completion_tokens)
    assert not lm.session.evaluator.holders.ends()


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_steps_of_all_kinds_are_one_pass(lm, model, num_steps):
    """Of beams, look-ahead, and samples, each with what it gives alone."""
    alone = LM(model, byte_level_bpe())
    kinds = [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "length_penalty": 2.0},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True},
    ]
    prompts = [f"{PROMPT} {idx} {idx}" for idx in range(len(kinds))]
    runs, others = (
        [runs_with(own, options)(prompt) for options, prompt in zip(kinds, prompts, strict=True)] for own in (lm, alone)
    )
    for own in runs:
        for _ in range(num_steps):
            own.step()
    before = lm.stats
    assert set(map(type, all_at_once(lm, [own.step for own in runs]))) == {bool}
    assert (lm.stats - before).model_calls == 1
    for own, other in zip(runs, others, strict=True):
        for one in (own, other):
            while one.step():
                pass
        assert [choice.token_id for choice in own.found()[0][0].choices] == [
            choice.token_id for choice in other.found()[0][0].choices
        ]
    assert not lm.session.evaluator.holders.ends()


@pytest.mark.parametrize("memory_tokens", [40, 90])
def test_a_pass_that_does_not_fit_the_budget_is_computed_in_parts(model, memory_tokens):
    """The rows that were computed ahead may be dropped before the step takes them; then they are computed again."""
    lm = LM(model, byte_level_bpe(), memory_bytes=memory_tokens * 646, max_tokens_per_forward=32)
    alone = LM(model, byte_level_bpe())
    prompts = [f"{PROMPT} {idx}" for idx in range(3)]
    kinds = [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}]
    texts = [Text(f"The cat {idx} sat on the mat and" * 2, lm) for idx in range(4)]

    def generated(lm, prompt, options):
        return tuple(Text(prompt, lm).generate(max_new_tokens=6, **options).completion_tokens)

    given = list(zip(prompts, kinds, strict=True))
    expected = [generated(alone, *own) for own in given]
    found = all_at_once(
        lm,
        [
            *(lambda own=own: generated(lm, *own) for own in given),
            *(lambda text=text: lm.token_logprobs([text])[0] for text in texts),
        ],
    )
    assert found[:3] == expected
    for text, logprobs in zip(texts, found[3:], strict=True):
        assert_close(logprobs, plain_token_logprobs(model, text.tokens))
    assert lm.stats.bytes_held <= memory_tokens * 646
    assert not lm.session.evaluator.holders.ends()


def test_a_store_gets_continuations_when_they_end(model, tmp_path, monkeypatch):
    """So their steps are not forwarded along with texts, which are offered to it at once."""
    lm = LM(model, byte_level_bpe(), store=tmp_path / "prompts.bp")
    own = runs_with(lm, {})(PROMPT)
    archive = lm.session.evaluator.archive
    offered, plain = [], archive.save_new

    def save_new(spans):
        offered.extend(spans := list(spans))
        plain(spans)

    monkeypatch.setattr(archive, "save_new", save_new)
    for idx in range(3):
        text = Text(f"The cat {idx}", lm)
        found = all_at_once(lm, [own.step, lambda text=text: lm.token_logprobs([text])[0]])
        assert_close(found[1], plain_token_logprobs(model, text.tokens))
    (prompt,) = own.prompts
    assert offered
    assert not any(span.position >= len(prompt) for span in offered)
    own.close()
    assert any(span.position >= len(prompt) for span in offered)
