"""Calls for asyncio: the results of the plain calls, in shared passes; a cancelled task leaves nothing behind."""

import asyncio
import gc

import pytest

from backprompt import LM, Text
from backprompt.errors import TextTooLongError
from comparing import assert_close
from reference import plain_greedy, plain_logits, plain_token_logprobs
from tiny_models import build
from tiny_tokenizers import byte_level_bpe
from waiting import wait_until


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


@pytest.fixture
def lm(model):
    return LM(model, byte_level_bpe())


async def waiting(lm, num):
    """Return once so many calls wait for the lock, which the caller holds."""
    for _ in range(20_000):
        if len(lm.session.line.places) >= num:
            return
        await asyncio.sleep(0.001)
    raise AssertionError("they never came")


def test_tasks_get_what_the_plain_calls_give_in_one_pass(lm, model):
    prompts = [Text(f"The cat sat on mat {idx}", lm) for idx in range(12)]

    async def main():
        with lm.session.line.lock:
            calls = [
                *(asyncio.create_task(lm.aevaluate([text])) for text in prompts[:4]),
                *(asyncio.create_task(lm.atoken_logprobs([text], [1])) for text in prompts[4:8]),
                asyncio.create_task(lm.aevaluate([Text("word " * 300, lm)])),
            ]
            await waiting(lm, len(calls))
        found = await asyncio.gather(*calls, return_exceptions=True)
        pieces = [piece async for piece in lm.astream(prompts[8], max_new_tokens=5)]
        return found, "".join(pieces), await lm.agenerate(prompts[9:11], max_new_tokens=3)

    before = lm.stats
    found, streamed, generated = asyncio.run(main())
    assert isinstance(found.pop(), TextTooLongError)
    for text, (one,) in zip(prompts, found, strict=False):
        expected = plain_token_logprobs(model, text.tokens)
        assert_close(one, expected[1:]) if text in prompts[4:8] else assert_close(
            one.logits, plain_logits(model, text.tokens)[-1]
        )
    assert streamed == prompts[8].generate(max_new_tokens=5).completion
    for text, one in zip(prompts[9:11], generated, strict=True):
        assert one.completion_tokens == plain_greedy(model, text.tokens, 3)
    assert (lm.stats - before).model_calls <= 1 + 5 + 3


def test_a_cancelled_task_computes_nothing_and_holds_nothing(lm):
    kept, dropped = Text("The cat sat", lm), Text("Question: What is 12 + 34?", lm)
    lm.evaluate([Text("The", lm)])

    async def main():
        with lm.session.line.lock:
            calls = [asyncio.create_task(lm.aevaluate([kept])), asyncio.create_task(lm.aevaluate([dropped]))]
            calls.append(asyncio.create_task(lm.agenerate(dropped, max_new_tokens=8)))
            await waiting(lm, 3)
            for call in calls[1:]:
                call.cancel()
            found = await asyncio.gather(*calls[1:], return_exceptions=True)
            assert all(isinstance(error, asyncio.CancelledError) for error in found)
        await calls[0]

    before = lm.stats
    asyncio.run(main())
    wait_until(lambda: not lm.session.line.places)
    assert (lm.stats - before).tokens_computed == len(kept.tokens) - 1
    assert not lm.session.evaluator.holders.ends()


def test_a_cancelled_stream_lets_go_of_its_text(lm, model):
    prompt = Text("The cat sat", lm)
    stream = lm.astream(prompt, max_new_tokens=50)

    async def main():
        pieces = []

        async def read():
            async for piece in stream:
                pieces.append(piece)

        task = asyncio.create_task(read())
        while len(pieces) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_until(lambda: not lm.session.evaluator.holders.ends())
    completion = stream.text.completion_tokens
    assert 3 <= len(completion) < 50
    assert completion == plain_greedy(model, prompt.tokens, len(completion))
    assert stream.text.finish_reason == "interrupted"


def test_a_stream_is_closed_by_its_context(lm):
    async def main():
        async with lm.astream(Text("The cat", lm), max_new_tokens=50) as stream:
            with pytest.raises(RuntimeError, match="has not begun"):
                _ = stream.text
            await anext(stream)
            assert lm.session.evaluator.holders.ends()
        assert not lm.session.evaluator.holders.ends()

    asyncio.run(main())
    gc.collect()
