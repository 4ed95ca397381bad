"""VllmLM on a real vLLM, made once for this file. Skipped without vLLM, which needs an environment: `make vllm`."""

from importlib.util import find_spec

import pytest
import torch

import backprompt as bp
from backprompt import LM, Regex, Text, classify
from backprompt.engines.vllm import VllmLM
from backprompt.engines.vllm_requests import imported_vllm
from backprompt.errors import GenerationError, MissingDependencyError, UnsupportedModelError
from engine_contract import LABELS, PROMPTS, EngineContract
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

pytestmark = pytest.mark.filterwarnings("default")  # vLLM warns of uses of its own

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm")

BLOCK = 32
LONG = "The cat sat on the mat, and the other cat sat on the other mat. They say that the dog"
"""Longer than a block of the prefix cache."""


def vllm_gpt2():
    """A tiny GPT-2 whose heads are as wide as vLLM's kernels for the CPU ask for."""
    return build("gpt2", n_embd=64, n_head=2), byte_level_bpe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    for part in vllm_gpt2():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        with VllmLM(folder, dtype="float32", enforce_eager=True) as lm:
            yield lm


@pytest.fixture(scope="module")
def plain():
    return LM(*vllm_gpt2())


@needs_vllm
class TestVllmLM(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls):
        return LM(*vllm_gpt2())

    def texts(self, lm):
        """Texts of all kinds that vLLM takes: those without groups and frozen segments."""
        return [
            *(Text(prompt, lm) for prompt in PROMPTS),
            Text(PROMPTS[1], lm),
            Text.from_tokens([5, 6, 7, 8], lm),
            Text(LONG, lm),
            Text(LONG, lm) + " barks",
            Text(LONG, lm) + " barks at",
        ]

    def test_representations(self, engine, plain):
        ours, theirs = engine.evaluate(self.texts(engine)), plain.evaluate(self.texts(plain))
        for own, its in zip(ours, theirs, strict=True):
            assert own.input_ids.tolist() == its.input_ids.tolist()
            torch.testing.assert_close(own.token_logprobs, its.token_logprobs, rtol=1e-4, atol=1e-5, equal_nan=True)
        for ask in (
            lambda: ours[0].logits,
            lambda: ours[0].hidden_states,
            lambda: ours[0].all_logits(),
            lambda: ours[0].past_key_values(),
            lambda: ours[0].key,
        ):
            with pytest.raises(UnsupportedModelError, match="vLLM gives no"):
                ask()

    def test_texts_ask_for_their_own(self, engine, plain):
        for ours, theirs in zip(self.texts(engine), self.texts(plain), strict=True):
            torch.testing.assert_close(ours.token_logprobs, theirs.token_logprobs, rtol=1e-4, atol=1e-5, equal_nan=True)

    def test_the_gap_to_full_attention(self, engine):
        with pytest.raises(UnsupportedModelError):
            bp.independence_gap([Text("They say", engine) + (Text("a", engine) | "b") + " and so on"])

    def test_results_read_are_copies(self, engine):
        text = Text(PROMPTS[0], engine)
        first = text.model_repr
        first.token_logprobs.zero_()
        assert first.token_logprobs[1:].max() < 0

    def test_distributions(self, engine, plain):
        ours, theirs = self.both(engine, plain, lambda lm: lm.top_logprobs(self.texts(lm), 3))
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        with pytest.raises(UnsupportedModelError, match="no entropies"):
            engine.entropies(self.texts(engine))
        with pytest.raises(ValueError, match="max_logprobs=21"):
            engine.top_logprobs(self.texts(engine), 21)
        with pytest.raises(UnsupportedModelError, match="at temperature 1"):
            engine.top_logprobs(self.texts(engine), 3, temperature=2.0)

    @pytest.mark.parametrize(
        "options",
        [{}, {"stop": " cat"}, {"stop": ["it", " th"], "include_stop": True}, {"repetition_penalty": 1.3}],
        ids=["greedy", "stop", "stops", "penalty"],
    )
    def test_generation(self, engine, plain, options):
        EngineContract.test_generation(self, engine, plain, options)

    def test_streams(self, engine):
        options = {"max_new_tokens": 8, "seed": 5, "temperature": 1.2}
        generated = bp.generate(Text(PROMPTS[0], engine), **options)
        with Text(PROMPTS[0], engine).stream(**options) as stream:
            first = next(stream)
            engine.token_logprobs([Text(PROMPTS[1], engine)])  # which steps the engine, too
            assert first + "".join(stream) == generated.completion
            assert stream.text.tokens == generated.tokens
        stopped = Text(PROMPTS[1], engine).stream(max_new_tokens=8)
        next(stopped)
        stopped.close()
        assert stopped.text.finish_reason == "interrupted"

    def test_pins_and_places(self, engine):
        text = Text(PROMPTS[0], engine)
        for ask in (text.pin, text.save, lambda: engine.look_up([text]), lambda: engine.fingerprint):
            with pytest.raises(UnsupportedModelError, match="vLLM gives no"):
                ask()

    def test_explanations(self, engine):
        with pytest.raises(UnsupportedModelError, match="vLLM gives no account"):
            bp.explain([Text(PROMPTS[0], engine)])

    def test_no_token_follows_a_group(self, engine):
        text = Text("a", engine) | "b"
        for ask in (lambda: text.model_repr, lambda: engine.token_logprobs([text]), lambda: (text + "c").model_repr):
            with pytest.raises(UnsupportedModelError, match="cannot have groups"):
                ask()


@needs_vllm
def test_what_needs_a_model_here_is_refused_by_name(engine):
    text = Text(PROMPTS[0], engine)
    for ask in (
        lambda: engine.model,
        text.draw,
        lambda: bp.verify([text]),
        engine.refresh,
        lambda: text.with_adapter("other").tokens,
    ):
        with pytest.raises(UnsupportedModelError, match="with vLLM"):
            ask()
    with pytest.raises(bp.MixedModelsError):
        text + Text("b", LM(*vllm_gpt2()))


# Scores behind the prefix cache


def completions_of(lm, num_labels=9):
    """Completions of a prompt that end around the ends of blocks; some begin alike for longer than a block."""
    ids = Text(LONG, lm).tokens
    labels = [(*ids[:length], idx) for idx, length in enumerate([0, 1, 1, 2, 5, 5, 40, 40, 41][:num_labels])]
    return [ids[:length] for length in range(BLOCK - 2, BLOCK + 3)], labels


@needs_vllm
@pytest.mark.parametrize("num_before", [0, 1, 2], ids=["empty cache", "asked before", "asked twice"])
def test_scores_are_right_whatever_is_cached(engine, plain, num_before):
    def scores(lm):
        prompts, labels = completions_of(lm)
        prompts = [Text.from_tokens(ids, lm) for ids in prompts]
        texts = [prompt + Text.from_tokens(ids, lm) for prompt in prompts for ids in labels]
        return lm.token_scores(texts, [prompt for prompt in prompts for _ in labels])

    engine.clear()
    for _ in range(num_before):
        scores(engine)
    for own, its in zip(scores(engine), scores(plain), strict=True):
        torch.testing.assert_close(own.logprobs, its.logprobs, rtol=1e-4, atol=1e-5)
        assert own.is_argmax.tolist() == its.is_argmax.tolist()


@needs_vllm
def test_completions_are_scored_behind_the_prefix_cache(engine):
    """Work: the prompt once, and behind it at most a block and the completion for each request."""
    engine.clear()
    prompt = Text(LONG, engine) + LONG[10:60]
    num_tokens = len(prompt.tokens)
    labels = [f"{first} {second}" for first in ("good", "bad", "other") for second in ("film", "cat", "mat", "dog")]
    before = engine.stats
    classify.predict_proba([prompt], labels, engine)
    done = engine.stats - before
    longest = max(len(engine.session.completion_ids([" " + label])[0]) for label in labels)
    assert done.tokens_requested > len(labels) * num_tokens
    assert done.tokens_computed <= num_tokens + len(labels) * (num_tokens % BLOCK + longest)
    assert done.tokens_computed < 0.5 * done.tokens_requested
    assert done.tokens_reused == done.tokens_requested - done.tokens_computed


@needs_vllm
def test_texts_go_in_forest_order(engine):
    """Beginnings that alternate are each computed once, though the cache would otherwise lose them."""
    engine.clear()
    texts = [Text(f"{start} {LONG} {idx}", engine) for idx in range(4) for start in ("In", "They", "Hello")]
    before = engine.stats.tokens_computed
    engine.evaluate(texts)
    num_beginnings = 3 * (len(texts[0].tokens) // BLOCK * BLOCK)
    assert engine.stats.tokens_computed - before <= num_beginnings + len(texts) * BLOCK
    before = engine.stats.tokens_computed
    engine.evaluate(texts)
    assert engine.stats.tokens_computed - before <= len(texts) * BLOCK


@needs_vllm
def test_many_candidates_take_several_requests(engine, plain):
    def scores(lm):
        return lm.next_token_logprobs([Text(PROMPTS[0], lm)], [range(300)])[0]

    torch.testing.assert_close(scores(engine), scores(plain), rtol=1e-4, atol=1e-5)


# Generation


@needs_vllm
def test_samples_are_reproducible_and_their_log_probabilities_the_models_own(engine, plain):
    options = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 3, "n": 3}
    texts = [Text(prompt, engine) for prompt in PROMPTS]
    rows = bp.generate(texts, **options)
    alone = bp.generate(texts[2], **options)
    assert [text.tokens for text in rows[2]] == [text.tokens for text in alone]
    assert len({text.tokens for text in alone}) > 1
    other = bp.generate(texts[2], **{**options, "seed": 4})
    assert [text.tokens for text in other] != [text.tokens for text in alone]
    for text in alone:
        prompt, ids = Text.from_tokens(texts[2].tokens, plain), text.completion_tokens
        (expected,) = plain.token_logprobs([prompt + Text.from_tokens(ids, plain)], [prompt])
        torch.testing.assert_close(text.completion_logprobs, expected, rtol=1e-4, atol=1e-5)


@needs_vllm
def test_end_tokens_and_suppressed_ones(engine, plain):
    def continued(lm):
        text = Text(PROMPTS[0], lm)
        free = bp.generate(text, max_new_tokens=6)
        end = free.completion_tokens[3]
        ended = bp.generate(text, max_new_tokens=6, eos_token_id=end)
        longer = bp.generate(text, max_new_tokens=6, eos_token_id=end, min_new_tokens=5)
        without = bp.generate(text, max_new_tokens=6, suppress_tokens=[end])
        assert end not in without.completion_tokens
        assert ended.finish_reason == "eos"
        return [found.tokens for found in (free, ended, longer, without)]

    assert continued(engine) == continued(plain)


@needs_vllm
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"constraint": Regex("a+")}, "constraint"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"temperature": 3.0}, r"vLLM refuses these options: temperature must be in \[0, 2\]"),
    ],
)
def test_options_that_vllm_lacks_are_refused_by_name(engine, options, said):
    before = engine.stats.tokens_computed
    with pytest.raises(GenerationError, match=said):
        bp.generate(Text(PROMPTS[0], engine), max_new_tokens=3, **options)
    assert engine.stats.tokens_computed == before


# Engines


@needs_vllm
def test_an_engine_that_is_there_already(engine, folder):
    llm = engine.llm
    lm = VllmLM(llm, byte_level_bpe(), joins="split")
    assert classify.predict(PROMPTS, LABELS, lm) == classify.predict(PROMPTS, LABELS, engine)
    lm.close()
    assert Text(PROMPTS[0], engine).model_repr.token_logprobs.shape  # not ended by who did not make it
    with pytest.raises(TypeError, match="dtype"):
        VllmLM(llm, dtype="float32")
    with pytest.raises(TypeError, match=r"vllm\.LLM"):
        VllmLM(7)
    with pytest.raises(ValueError, match="joins"):
        VllmLM(folder, joins="none")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is there")
def test_without_vllm_its_engine_says_how_to_get_it():
    for ask in (imported_vllm, lambda: VllmLM("gpt2")):
        with pytest.raises(MissingDependencyError, match="pip install vllm"):
            ask()
