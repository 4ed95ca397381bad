"""Threads that wait for an `LM` are answered together: each with its own numbers, in few passes."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from backprompt import LM, Grammar, JsonSchema, Regex, Text, classify, evaluate, generate
from backprompt.errors import EmptyTextError, GenerationError, NonFiniteError, TextTooLongError, TokenIdError
from backprompt.generation import run
from comparing import assert_close, num_distinct_ids
from reference import plain_greedy, plain_logits, plain_token_logprobs
from tiny_models import build
from tiny_tokenizers import byte_level_bpe
from waiting import all_at_once, wait_until

PROMPT = "Question: What is 12 + 34? Answer:"
TOKEN_BYTES = 646


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


@pytest.fixture
def lm(model):
    return LM(model, byte_level_bpe())


def work_of(lm, before):
    return lm.stats - before


def test_waiting_texts_are_one_forest(lm, model):
    texts = [Text(PROMPT, lm) + f" {idx}" for idx in range(16)]
    before = lm.stats
    found = all_at_once(lm, [lambda text=text: lm.token_logprobs([text])[0] for text in texts])
    done = work_of(lm, before)
    assert done.model_calls == 1
    assert done.tokens_computed == num_distinct_ids([text.tokens[:-1] for text in texts])
    for text, logprobs in zip(texts, found, strict=True):
        assert_close(logprobs, plain_token_logprobs(model, text.tokens))


def test_waiting_logits_are_read_ahead(lm, model):
    texts = [Text(PROMPT, lm) + f" {idx}" for idx in range(16)]
    before = lm.stats
    found = all_at_once(lm, [lambda text=text: text.logits for text in texts])
    done = work_of(lm, before)
    assert done.model_calls == 1
    assert done.tokens_computed == num_distinct_ids([text.tokens for text in texts])
    assert done.logit_rows == len(texts)
    for text, logits in zip(texts, found, strict=True):
        assert_close(logits, plain_logits(model, text.tokens)[-1])


def test_steps_of_streams_are_one_pass(lm, model):
    prompts = [Text(f"{PROMPT} {idx}", lm) for idx in range(16)]
    streams = [prompt.stream(max_new_tokens=12) for prompt in prompts]
    before = lm.stats
    found = all_at_once(lm, [lambda stream=stream: list(stream) for stream in streams])
    assert all(map(all, found))
    # 12 at best: the prompts, and 11 tokens behind them. A thread may come late for a pass, and joins the next one.
    assert 12 <= work_of(lm, before).model_calls <= 24
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.text.completion_tokens == plain_greedy(model, prompt.tokens, 12)


def test_equal_streams_share_their_rows(lm, model):
    streams = [Text(PROMPT, lm).stream(max_new_tokens=8) for _ in range(4)]
    before = lm.stats
    all_at_once(lm, [lambda stream=stream: list(stream) for stream in streams])
    done = work_of(lm, before)
    assert done.model_calls <= 16
    assert done.tokens_computed == len(streams[0].text.tokens) - 1
    expected = plain_greedy(model, streams[0].text.prompt.tokens, 8)
    assert [stream.text.completion_tokens for stream in streams] == [expected] * 4


def test_threads_with_different_constraints_share_passes(lm, model):
    """Each gets the tokens and numbers that it gets alone; streams and whole answers, with a constraint or without."""
    alone = LM(model, byte_level_bpe())
    constraints = [
        Regex("[a-z]{4}( [a-z]{4}){2}"),
        Regex("(yes|no), [0-9]{5}"),
        Regex("[^a-z]{12}"),
        JsonSchema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
        Grammar('start: sum\nsum: /[0-9]+/ | sum "+" sum'),
        None,
    ]
    asked = [(f"{PROMPT} {idx // 6}", constraint) for idx, constraint in enumerate(constraints * 2)]

    def generated(lm, prompt, constraint):
        return Text(prompt, lm).generate(max_new_tokens=12, constraint=constraint)

    def streamed(lm, prompt, constraint):
        stream = Text(prompt, lm).stream(max_new_tokens=12, constraint=constraint)
        assert "".join(stream) == stream.text.completion
        return stream.text

    ways = [generated if idx % 3 else streamed for idx in range(len(asked))]
    before = alone.stats
    expected = [way(alone, *given) for way, given in zip(ways, asked, strict=True)]
    num_alone = work_of(alone, before).model_calls
    before = lm.stats
    found = all_at_once(
        lm, [lambda way=way, given=given: way(lm, *given) for way, given in zip(ways, asked, strict=True)]
    )
    assert work_of(lm, before).model_calls <= min(24, num_alone / 2)  # 12 where no thread comes late
    assert len({one.completion for one in expected}) >= len(constraints)
    for own, other in zip(found, expected, strict=True):
        assert not isinstance(own, BaseException), own
        assert (own.completion_tokens, own.finish_reason) == (other.completion_tokens, other.finish_reason)
        assert_close(own.completion_logprobs, other.completion_logprobs)
        assert_close(own.constrained_logprobs, other.constrained_logprobs)
    assert not lm.session.evaluator.holders.ends()


def test_an_error_hits_its_own_thread_alone(lm, model):
    long = Text("word " * 300, lm)
    good = [Text(f"{PROMPT} {idx}", lm) for idx in range(6)]
    before = lm.stats
    work = [
        *(lambda text=text: lm.token_logprobs([text])[0] for text in good),
        lambda: lm.token_logprobs([long]),
        lambda: lm.token_logprobs([good[0]], [good[1]]),
        lambda: long.logits,
        lambda: Text("", lm).logits,
        lambda: lm.next_token_logprobs([good[0]], [[10**6]]),
    ]
    found = all_at_once(lm, work)
    assert work_of(lm, before).model_calls == 1
    for text, logprobs in zip(good, found, strict=False):
        assert_close(logprobs, plain_token_logprobs(model, text.tokens))
    kinds = [type(error) for error in found[len(good) :]]
    assert kinds[:3] == [TextTooLongError, ValueError, TextTooLongError]
    assert issubclass(kinds[3], EmptyTextError)
    assert kinds[4] is TokenIdError


def test_a_number_that_is_not_finite_hits_its_own_thread_alone(model):
    broken, tokenizer = build("gpt2"), byte_level_bpe()
    with torch.no_grad():
        broken.transformer.wte.weight[tokenizer.encode("?")[0]] = torch.nan
    broken.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    lm = LM(broken, tokenizer)
    good, bad = [Text(f"The cat {idx}", lm) for idx in range(6)], Text("Who? The cat", lm)
    found = all_at_once(lm, [lambda text=text: text.logits for text in [*good[:3], bad, *good[3:]]])
    assert isinstance(found.pop(3), NonFiniteError)
    for text, logits in zip(good, found, strict=True):
        assert_close(logits, plain_logits(broken, text.tokens)[-1])

    def streamed(text):
        return text.generate(max_new_tokens=5).completion_tokens

    found = all_at_once(lm, [lambda text=text: streamed(text) for text in [*good[:3], bad, *good[3:]]])
    assert isinstance(found.pop(3), NonFiniteError)
    assert not lm.session.evaluator.holders.ends()
    for text, completion in zip(good, found, strict=True):
        assert completion == plain_greedy(broken, text.tokens, 5)


class Mixed:
    """Calls of all kinds with what each of them gives; some fail."""

    def __init__(self, lm, model, seed):
        self.lm, self.model = lm, model
        self._random = random.Random(seed)

    def text(self):
        words = ["cat", "dog", " sat", " on", " the", " mat", "?", " 12"]
        parts = [self._random.choice(words) for _ in range(self._random.randint(1, 8))]
        return Text(self._random.choice(["", PROMPT, "The "]), self.lm) + "".join(parts)

    def draw(self):
        """Return a function, and one that checks its result or its error."""
        kind = self._random.choice(
            [
                "logprobs",
                "logits",
                "evaluate",
                "proba",
                "generate",
                "sample",
                "constrained",
                "stream",
                "beams",
                "top",
                "next",
                "long",
            ]
        )
        return getattr(self, kind)()

    def logprobs(self):
        texts = [self.text() for _ in range(self._random.randint(1, 3))]
        return lambda: self.lm.token_logprobs(texts), lambda found: [
            assert_close(one, plain_token_logprobs(self.model, text.tokens))
            for one, text in zip(found, texts, strict=True)
        ]

    def logits(self):
        text = self.text()
        return lambda: text.logits, lambda found: assert_close(found, plain_logits(self.model, text.tokens)[-1])

    def evaluate(self):
        texts = [self.text() for _ in range(3)]
        return lambda: [one.token_logprobs for one in evaluate(texts)], lambda found: [
            assert_close(one, plain_token_logprobs(self.model, text.tokens))
            for one, text in zip(found, texts, strict=True)
        ]

    def proba(self):
        prompts = [self.text(), self.text()]
        other = LM(self.model, byte_level_bpe())
        plain = [prompt.string for prompt in prompts]
        return lambda: classify.predict_proba(
            prompts, ["a mat", "a hat", "it"], self.lm
        ), lambda found: torch.testing.assert_close(
            torch.as_tensor(found),
            torch.as_tensor(
                classify.predict_proba([Text(one, other) for one in plain], ["a mat", "a hat", "it"], other)
            ),
            atol=1e-4,
            rtol=1e-3,
        )

    def generate(self):
        text, num = self.text(), self._random.randint(1, 6)

        def check(found):
            assert found.completion_tokens == plain_greedy(self.model, text.tokens, num)

        return lambda: text.generate(max_new_tokens=num), check

    def sample(self):
        text, seed = self.text(), self._random.randint(0, 9)
        options = {"max_new_tokens": 5, "seed": seed, "top_k": 7, "n": 2}

        def check(found):
            other = LM(self.model, byte_level_bpe())
            expected = Text(text.string, other).generate(**options)
            assert [one.completion_tokens for one in found] == [one.completion_tokens for one in expected]

        return lambda: text.generate(**options), check

    def constrained(self):
        text, num = self.text(), self._random.randint(2, 6)
        options = {"max_new_tokens": 6, "constraint": Regex(f"[a-z]{{{num}}}, [0-9]{{{num}}}")}

        def check(found):
            other = LM(self.model, byte_level_bpe())
            expected = Text(text.string, other).generate(**options)
            assert found.completion_tokens == expected.completion_tokens
            assert_close(found.constrained_logprobs, expected.constrained_logprobs)

        return lambda: text.generate(**options), check

    def stream(self):
        text = self.text()
        stream = text.stream(max_new_tokens=7)

        def check(_):
            assert stream.text.completion_tokens == plain_greedy(self.model, text.tokens, 7)

        return lambda: list(stream), check

    def beams(self):
        text = self.text()

        def check(found):
            other = LM(self.model, byte_level_bpe())
            expected = Text(text.string, other).generate(max_new_tokens=3, num_beams=2)
            assert found.completion_tokens == expected.completion_tokens

        return lambda: text.generate(max_new_tokens=3, num_beams=2), check

    def top(self):
        text = self.text()

        def check(found):
            expected = plain_logits(self.model, text.tokens).log_softmax(-1)[:-1].max(-1).values
            assert_close(found.logprobs[1:, 0], expected)

        return lambda: self.lm.top_logprobs([text], 2), check

    def next(self):
        text = self.text()

        def check(found):
            assert_close(found[0], plain_logits(self.model, text.tokens)[-1].log_softmax(-1)[[3, 5]])

        return lambda: self.lm.next_token_logprobs([text], [[3, 5]]), check

    def long(self):
        text = self.text() + " word" * 200

        def check(found):
            assert isinstance(found, (TextTooLongError, GenerationError)), found

        ways = [lambda: text.logits, lambda: text.generate(max_new_tokens=3), lambda: self.lm.token_logprobs([text])]
        return self._random.choice(ways), check


@pytest.mark.parametrize("memory_tokens", [None, 400])
@pytest.mark.parametrize("seed", range(4))
def test_mixed_calls_of_many_threads(model, seed, memory_tokens):
    memory = (
        {} if memory_tokens is None else {"memory_bytes": memory_tokens * TOKEN_BYTES, "max_tokens_per_forward": 64}
    )
    lm = LM(model, byte_level_bpe(), **memory)
    mixed = Mixed(lm, model, seed)
    for _ in range(2):
        calls = [mixed.draw() for _ in range(16)]
        found = all_at_once(lm, [work for work, _ in calls])
        for (_, check), result in zip(calls, found, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, (TextTooLongError, GenerationError)):
                raise result
            check(result)
        assert not lm.session.line.places
        assert not lm.session.evaluator.holders.ends()
        if memory_tokens is not None:
            assert lm.stats.bytes_held <= memory_tokens * TOKEN_BYTES


def test_a_call_goes_behind_those_that_came_before(lm):
    """Without that, a thread in a loop would be answered alone each time, and its calls would meet no others."""
    order = []

    def loop():
        for idx in range(3):
            lm.token_logprobs([Text(f"loop {idx}", lm)])
            order.append("loop")

    def quick():
        lm.tokens(Text("a", lm))
        order.append("quick")

    all_at_once(lm, [loop, quick, quick])
    assert order.index("quick") < 2
    assert order[-1] == "loop"


def test_an_interrupt_of_the_thread_that_answers_loses_nobodys_call(lm, model, monkeypatch):
    """The thread that came first is interrupted in the pass for all; the others are answered without it."""
    texts = [Text(f"{PROMPT} {idx}", lm) for idx in range(5)]
    streams = [Text(f"The cat {idx}", lm).stream(max_new_tokens=6) for idx in range(5)]
    for stream in streams:
        next(stream)
    for method, work in [
        ("compute", [lambda text=text: lm.token_logprobs([text])[0] for text in texts]),
        ("step", [lambda stream=stream: list(stream) for stream in streams]),
        ("logits", [lambda text=text: (text + " more").logits for text in texts]),
    ]:
        executor = lm.session.evaluator.executor
        plain = getattr(executor, method)
        interrupted = []

        def interrupt(*args, plain=plain, interrupted=interrupted, **kwargs):
            found = plain(*args, **kwargs)
            if not interrupted:
                interrupted.append(threading.current_thread())
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(executor, method, interrupt)
        found = all_at_once(lm, work)
        monkeypatch.setattr(executor, method, plain)
        assert sum(isinstance(one, KeyboardInterrupt) for one in found) == len(interrupted) == 1, method
        if method == "compute":
            for text, one in zip(texts, found, strict=True):
                if not isinstance(one, KeyboardInterrupt):
                    assert_close(one, plain_token_logprobs(model, text.tokens))
    for stream in streams:
        completion = stream.text.completion_tokens
        assert completion == plain_greedy(model, stream.text.prompt.tokens, len(completion))
    assert sum(len(stream.text.completion_tokens) == 6 for stream in streams) >= 4
    wait_until(lambda: not lm.session.line.places)


def test_a_step_that_was_cut_short_behind_the_pass_is_done_once_more(lm, model, monkeypatch):
    """The tokens are in their spans already, but the threads of the streams do not know."""
    streams = [Text(f"The cat {idx}", lm).stream(max_new_tokens=8) for idx in range(4)]
    for stream in streams:
        next(stream), next(stream)
    readout = lm.session.evaluator.readout
    plain, interrupted = readout.logits_after, []

    def interrupt(*args):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(readout, "logits_after", interrupt)
    found = all_at_once(lm, [lambda stream=stream: list(stream) for stream in streams])
    assert sum(isinstance(one, KeyboardInterrupt) for one in found) == 1
    completions = [stream.text.completion_tokens for stream in streams]
    for stream, completion in zip(streams, completions, strict=True):
        assert completion == plain_greedy(model, stream.text.prompt.tokens, len(completion))
    assert sum(len(completion) == 8 for completion in completions) == 4 or sum(map(len, completions)) >= 24


def test_a_caller_without_company_waits_for_nobody(lm, monkeypatch):
    monkeypatch.setattr(lm.session, "answer_together", None)
    text = Text(PROMPT, lm)
    assert lm.token_logprobs([text])[0].shape == (len(text.tokens),)
    with lm.session.exclusive():
        assert text.generate(max_new_tokens=2).completion_tokens


def test_a_result_keeps_those_of_other_threads_out_of_memory(lm):
    small, large = Text("The cat", lm), [Text(f"{PROMPT} {idx}", lm) for idx in range(8)]
    found = all_at_once(lm, [lambda: lm.token_logprobs([small])[0], lambda: lm.token_logprobs(large)[0]])
    assert found[0].untyped_storage().nbytes() == found[0].nbytes


def test_a_stream_may_be_closed_while_its_first_step_is_done(lm, monkeypatch):
    """Once between the pass and the thread's turn, once in the middle of the pass."""
    streams = [Text(f"The cat {idx}", lm).stream(max_new_tokens=5) for idx in range(2)]
    with ThreadPoolExecutor() as threads:
        with lm.session.line.lock:
            pieces = [threads.submit(list, stream) for stream in streams]
            wait_until(lambda: len(lm.session.line.places) == 2)
            lm.session.answer_together(list(lm.session.line.places))
            streams[0].close()
        assert pieces[0].result(60) == []
        assert "".join(pieces[1].result(60)) == streams[1].text.completion

        stream, executor = Text(PROMPT, lm).stream(max_new_tokens=5), lm.session.evaluator.executor
        plain, closing = executor.compute, []

        def compute(*args, **kwargs):
            closing.append(threads.submit(stream.close))
            wait_until(lambda: lm.session.line.places)
            return plain(*args, **kwargs)

        monkeypatch.setattr(executor, "compute", compute)
        list(stream)
        closing[0].result(60)
    assert len(stream.text.completion_tokens) == 1
    assert not lm.session.evaluator.holders.ends()


def test_steps_are_done_together_for_no_more_texts_than_one_call_has(lm, model, monkeypatch):
    """All logits of a step are there at once, so their number is bounded."""
    nums = []

    def counted(evaluator, runs, plain=run.advance):
        found = plain(evaluator, runs)
        nums.append(sum(len(own.rows) for own in found))
        return found

    monkeypatch.setattr(run, "advance", counted)
    monkeypatch.setattr(run, "MAX_LIVE_TEXTS", 4)
    prompts = [[Text(f"The cat {idx}", lm), Text(f"The dog {idx}", lm)] for idx in range(6)]
    found = all_at_once(lm, [lambda own=own: generate(own, max_new_tokens=4) for own in prompts])
    assert max(nums) == 4
    for texts in found:
        for text in texts:
            assert text.completion_tokens == plain_greedy(model, text.prompt.tokens, 4)
