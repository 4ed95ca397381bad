"""The contract of an engine: the same numbers as an `LM` of the same model, for all that takes texts."""

import pytest
import torch

import backprompt as bp
from backprompt import Text, classify
from backprompt.classify import Example
from backprompt.errors import EmptyTextError, GenerationError, GroupError, TextTooLongError, TokenIdError
from backprompt.text.engine import Engine
from crews import plain_lm

PROMPTS = [
    "The cat sat on the mat, and",
    "The cat sat on the other cat. It",
    "The film was great. Label:",
    "The film was great, they say. Label:",
    "Question: What is 12 + 34? Answer:",
]
LABELS = ["positive", "negative", "a bold one", "a bold cat"]


class EngineContract:
    """Inherited by the tests of each engine, which give a fixture `engine` of the tiny GPT-2 of `crews.py`."""

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls):
        return plain_lm()

    def both(self, engine, plain, of):
        return of(engine), of(plain)

    def texts(self, lm):
        """Texts of all kinds: shared beginnings, repeats, ids, groups, frozen segments."""
        shared = Text("The cat ", lm)
        return [
            *(Text(prompt, lm) for prompt in PROMPTS),
            Text(PROMPTS[1], lm),
            Text.from_tokens([5, 6, 7, 8], lm),
            Text("They say", lm) + (shared | "the dog") + " and so on",
            shared + Text("Hello there.", lm).frozen() + " General",
            bp.parallel([shared, "on the mat"], positions="sequential") + " it's",
        ]

    def test_it_is_an_engine(self, engine):
        assert isinstance(engine, Engine)

    def test_tokens_strings_joins_and_extents(self, engine, plain):
        for ours, theirs in zip(self.texts(engine), self.texts(plain), strict=True):
            assert ours.tokens == theirs.tokens
            assert ours.string == theirs.string
            assert ours.joins() == theirs.joins()
        assert engine.extents(self.texts(engine)) == plain.extents(self.texts(plain))

    def test_representations(self, engine, plain):
        ours, theirs = engine.evaluate(self.texts(engine)), plain.evaluate(self.texts(plain))
        for own, its in zip(ours, theirs, strict=True):
            assert own.num_tokens == its.num_tokens
            assert own.input_ids.tolist() == its.input_ids.tolist()
            for name in ("logits", "token_logprobs", "hidden_states"):
                torch.testing.assert_close(getattr(own, name), getattr(its, name), rtol=1e-4, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(own.all_logits(1, 3), its.all_logits(1, 3), rtol=1e-4, atol=1e-5)
        assert (ours[0].key, ours[0].num_bytes, ours[0].stored_error) == (
            theirs[0].key,
            theirs[0].num_bytes,
            theirs[0].stored_error,
        )
        cache, its_cache = ours[0].past_key_values(), theirs[0].past_key_values()
        torch.testing.assert_close(cache.layers[1].keys, its_cache.layers[1].keys, rtol=1e-4, atol=1e-5)
        assert len(bp.evaluate(self.texts(engine))) == len(ours)

    def test_texts_ask_for_their_own(self, engine, plain):
        for ours, theirs in zip(self.texts(engine), self.texts(plain), strict=True):
            for name in ("logits", "token_logprobs"):
                torch.testing.assert_close(
                    getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5, equal_nan=True
                )

    def test_results_read_are_copies(self, engine):
        text = Text(PROMPTS[0], engine)
        first = text.model_repr
        first.logits.zero_()
        assert first.logits.abs().max() > 0
        assert text.logits.abs().max() > 0

    def test_scores(self, engine, plain):
        def scores(lm):
            texts = self.texts(lm)
            starts = [0, 2, Text(PROMPTS[2][:8], lm), 1, 0, 3, 1, 0, 0, 0]
            flat = lm.token_scores(texts, starts)
            prompts = [Text.from_tokens(Text(prompt, lm).tokens, lm) for prompt in PROMPTS]
            ends = [Text.from_tokens(ids, lm) for ids in ((5, 6), (5, 7, 8), (9,))]
            shared = lm.token_logprobs([prompt + end for prompt in prompts for end in ends], [2] * 15)
            following = lm.next_token_logprobs([Text(prompt, lm) for prompt in PROMPTS], [[1, 2], [3]] + [[4]] * 3)
            return [of.logprobs for of in flat] + shared + following, [of.is_argmax.tolist() for of in flat]

        (ours, our_argmax), (theirs, their_argmax) = self.both(engine, plain, scores)
        for own, its in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, its, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert our_argmax == their_argmax

    def test_distributions(self, engine, plain):
        ours, theirs = self.both(engine, plain, lambda lm: lm.entropies(self.texts(lm), temperature=0.7))
        torch.testing.assert_close(ours.entropies, theirs.entropies, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert ours.offsets.tolist() == theirs.offsets.tolist()
        ours, theirs = self.both(engine, plain, lambda lm: lm.top_logprobs(self.texts(lm), 3))
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()

    def test_classification(self, engine, plain):
        def found(lm):
            many = classify.predict_proba(PROMPTS, LABELS, lm, discount_completions=0.5, neutral_prompt="N/A")
            one = classify.predict_proba(PROMPTS[0], LABELS, lm)
            return many, one, classify.token_logprobs(PROMPTS, lm)[3][1:]

        ours, theirs = self.both(engine, plain, found)
        for own, its in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(own), torch.tensor(its), rtol=1e-4, atol=1e-6)
        own_labels = [Example(prompt, LABELS[: 2 + idx % 3]) for idx, prompt in enumerate(PROMPTS)]
        for ask in (
            lambda lm: classify.predict(PROMPTS, LABELS, lm),
            lambda lm: classify.predict(PROMPTS, LABELS, lm, search="best-first"),
            lambda lm: classify.predict([self.texts(lm)[idx] for idx in (0, 7, 9)], LABELS, lm),
            lambda lm: classify.predict(own_labels, lm=lm),
        ):
            ours, theirs = self.both(engine, plain, ask)
            assert ours == theirs

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"do_sample": True, "temperature": 1.5, "seed": 3, "n": 3},
            {"num_beams": 3, "n": 2},
            {"stop": " cat", "seed": 1, "temperature": 2.0},
            {"prompt_lookup_num_tokens": 3},
        ],
        ids=["greedy", "samples", "beams", "stop", "lookup"],
    )
    def test_generation(self, engine, plain, options):
        def continued(lm):
            found = bp.generate([Text(prompt, lm) for prompt in [*PROMPTS, PROMPTS[0]]], max_new_tokens=6, **options)
            return [text for row in found for text in (row if isinstance(row, list) else [row])]

        ours, theirs = self.both(engine, plain, continued)
        assert [text.tokens for text in ours] == [text.tokens for text in theirs]
        assert [text.completion for text in ours] == [text.completion for text in theirs]
        assert [text.finish_reason for text in ours] == [text.finish_reason for text in theirs]
        for own, its in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own.completion_logprobs, its.completion_logprobs, rtol=1e-4, atol=1e-5)

    def test_streams(self, engine, plain):
        def pieces(lm):
            with Text(PROMPTS[0], lm).stream(max_new_tokens=8, seed=5, temperature=1.2) as stream:
                return list(stream), stream.text.tokens

        assert pieces(engine) == pieces(plain)
        options = {"max_new_tokens": 8, "seed": 5, "temperature": 1.2}
        samples = [text.completion for text in Text(PROMPTS[0], plain).generate(n=3, **options)]
        assert ["".join(Text(PROMPTS[0], engine).stream(sample_idx=idx, **options)) for idx in range(3)] == samples
        stopped = Text(PROMPTS[1], engine).stream(max_new_tokens=8)
        next(stopped)
        stopped.close()
        assert stopped.text.finish_reason == "interrupted"

    def test_selection_and_colours(self, engine, plain):
        for ask in (
            lambda lm: Text(PROMPTS[2], lm).select(LABELS).option,
            lambda lm: Text(PROMPTS[2], lm).show(top=2).plain(),
        ):
            ours, theirs = self.both(engine, plain, ask)
            assert ours == theirs

    def test_estimator(self, engine, plain):
        pytest.importorskip("sklearn")
        from sklearn.base import clone

        from backprompt.integrations.sklearn import PromptClassifier

        def predicted(lm):
            estimator = clone(PromptClassifier(lm, "{text}. Label:"))
            return estimator.fit(PROMPTS[:4], ["yes", "no", "yes", "no"]).predict_proba(PROMPTS)

        ours, theirs = self.both(engine, plain, predicted)
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-6)

    def test_harness(self, engine, plain):
        pytest.importorskip("lm_eval")
        from lm_eval.api.instance import Instance

        from backprompt.integrations.lm_eval import BackpromptLM

        def answers(lm):
            model = BackpromptLM(lm, max_length=100)  # within the positions of all engines
            scored = [
                Instance("loglikelihood", {}, (prompt, label), idx)
                for idx, prompt in enumerate(PROMPTS)
                for label in (" yes", " no")
            ]
            grown = [
                Instance("generate_until", {}, (prompt, {"max_gen_toks": 4, "until": ["\n"]}), 0) for prompt in PROMPTS
            ]
            rolled = [Instance("loglikelihood_rolling", {}, (prompt * 8,), 0) for prompt in PROMPTS]
            return (
                model.loglikelihood(scored, disable_tqdm=True),
                model.generate_until(grown, disable_tqdm=True),
                model.loglikelihood_rolling(rolled, disable_tqdm=True),
            )

        (ours, our_strings, our_sums), (theirs, their_strings, their_sums) = self.both(engine, plain, answers)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        torch.testing.assert_close(torch.tensor([p for p, _ in ours]), torch.tensor([p for p, _ in theirs]))
        assert our_strings == their_strings
        torch.testing.assert_close(torch.tensor(our_sums), torch.tensor(their_sums))

    def test_the_gap_to_full_attention(self, engine, plain):
        ours, theirs = self.both(engine, plain, lambda lm: bp.independence_gap([self.texts(lm)[idx] for idx in (7, 8)]))
        torch.testing.assert_close(ours.divergences, theirs.divergences, rtol=1e-3, atol=1e-6)
        assert ours.argmax_changed == theirs.argmax_changed

    def test_pins_and_places(self, engine):
        text = Text("Hello there. General Kenobi!", engine)
        with text.pin() as pin:
            assert pin.num_bytes > 0
            (pieces,) = engine.look_up([text])
            assert {piece.where for piece in pieces} == {"memory"}
        pin.release()

    def test_explanations(self, engine):
        texts = [Text("In 2024 there were " + end, engine) for end in ("cats", "dogs", "films")]
        explained = bp.explain(texts, analyze=True)
        assert explained.tokens_requested == sum(len(text.tokens) for text in texts)
        assert explained.actual.tokens_computed == explained.tokens_to_compute > 0
        assert bp.explain(texts).tokens_to_compute == 0
        assert "tokens to compute" in str(explained)

    def test_errors_name_texts_before_anything_is_computed(self, engine):
        before = engine.stats.tokens_computed
        for error, ask in (
            (EmptyTextError, lambda: engine.evaluate([Text("", engine)])),
            (TextTooLongError, lambda: engine.evaluate([Text.from_tokens([5] * 200, engine)])),
            (TokenIdError, lambda: engine.token_logprobs([Text.from_tokens([5, 99_999], engine)])),
            (GroupError, lambda: bp.generate(Text("a", engine) | "b", max_new_tokens=2)),
            (GenerationError, lambda: bp.generate(Text("a", engine), max_new_tokens=2, n=2)),
            (ValueError, lambda: engine.token_logprobs([Text("The cat", engine)], [Text("They say", engine)])),
        ):
            with pytest.raises(error):
                ask()
        assert engine.stats.tokens_computed == before

    def test_no_token_follows_a_group(self, engine):
        with pytest.raises(GroupError):
            (Text("a", engine) | "b").model_repr.logits  # noqa: B018

    def test_nothing_of_no_texts(self, engine):
        assert engine.evaluate([]) == []
        assert bp.generate([], max_new_tokens=3) == []
