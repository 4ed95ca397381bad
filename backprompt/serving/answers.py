"""Whole answers to the bodies of requests, as objects of OpenAI's API. All functions here run in a thread."""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backprompt.classify import log_probs
from backprompt.generation.chat import chat
from backprompt.generation.continued import GeneratedText
from backprompt.generation.generate import generate
from backprompt.lm import LM
from backprompt.serving.bodies import ChatBody, CompletionBody, Sampled, ScoreBody
from backprompt.serving.limits import Limits
from backprompt.serving.refusals import Refusal
from backprompt.serving.spelling import Offsets, Spelling, bytes_named
from backprompt.text.node import Text
from backprompt.tokens.graph import TokenIds, num_positions

FINISH = {
    "eos": "stop",
    "stop": "stop",
    "constraint": "stop",
    "length": "length",
    "criteria": "length",
    "interrupted": "length",
}
"""OpenAI's name of each finish reason."""

LEAST_LOGPROB = -1e9
"""The number in place of minus infinity, which JSON lacks."""


@dataclass(frozen=True)
class Asked:
    """The generation that a request asks for.

    Attributes:
        prompts: the texts to continue.
        num_prompt_tokens: the number of tokens of each prompt.
        first_samples: for each prompt, the number of its first sample among the samples of equal prompts.
        max_new_tokens: the largest number of tokens to add to each prompt.
        options: the options of `generate`.

    """

    prompts: Sequence[Text]
    num_prompt_tokens: Sequence[int]
    first_samples: Sequence[int]
    max_new_tokens: int
    options: Mapping[str, Any]


def asked_of_completion(lm: LM, body: CompletionBody, limits: Limits) -> Asked:
    """Return the generation that a request for completions asks for.

    Raises:
        Refusal: the request asks for too many tokens, or for no result.

    """
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    prompts = [Text(prompt, lm) if isinstance(prompt, str) else Text.from_tokens(prompt, lm) for prompt in given]
    if not prompts:
        raise Refusal("prompt is an empty list. Give at least one prompt.", param="prompt")
    if body.max_tokens == 0 and not body.echo:
        raise Refusal(
            "max_tokens is 0, so there is nothing to answer. Ask for tokens, or for echo.", param="max_tokens"
        )
    return _asked(lm, prompts, body, body.max_tokens, limits)


def asked_of_chat(lm: LM, body: ChatBody, limits: Limits) -> Asked:
    """Return the generation that a request for a turn of a conversation asks for; by default as many tokens as fit."""
    prompt = chat(lm, body.conversation)
    num_tokens = body.max_completion_tokens or body.max_tokens
    if num_tokens is None:
        (token_ids,) = lm.session.prompt_ids([prompt])
        room = lm.session.limits.model.max_tokens
        left = limits.max_tokens // body.n - len(token_ids)
        num_tokens = max(1, left if room is None else min(left, room - num_positions(token_ids)))
    return _asked(lm, [prompt], body, num_tokens, limits)


def _asked(lm: LM, prompts: Sequence[Text], body: Sampled, max_new_tokens: int, limits: Limits) -> Asked:
    options = body.options()
    prompt_ids = lm.session.prompt_ids(prompts)
    nums = [len(token_ids) for token_ids in prompt_ids]
    limits.check_tokens(body.n * (sum(nums) + len(nums) * max_new_tokens))
    num_samples: Counter[TokenIds] = Counter()
    first_samples = []
    for token_ids in prompt_ids:
        first_samples.append(num_samples[token_ids])
        num_samples[token_ids] += body.n
    return Asked(prompts, nums, first_samples, max_new_tokens, options)


def completion(lm: LM, body: CompletionBody, limits: Limits, name: str) -> dict[str, Any]:
    """Return the answer to `/v1/completions`."""
    asked = asked_of_completion(lm, body, limits)
    choices: list[dict[str, Any]] = []
    num_new = 0
    for prompt, texts in zip(asked.prompts, generated(asked, body.n), strict=True):
        for text in texts:
            string, reason = prompt.string if body.echo else "", "length"
            if isinstance(text, GeneratedText):
                num_new += len(text.completion_tokens)
                string, reason = string + text.completion, FINISH[text.finish_reason]
            start = 0 if body.echo else prompt
            logprobs = None if body.num_top is None else token_logprobs(lm, text, start, body.num_top)
            choices.append({"index": len(choices), "text": string, "logprobs": logprobs, "finish_reason": reason})
    return {**head("cmpl", "text_completion", name), "choices": choices, "usage": usage(asked, num_new)}


def chat_completion(lm: LM, body: ChatBody, limits: Limits, name: str) -> dict[str, Any]:
    """Return the answer to `/v1/chat/completions`."""
    asked = asked_of_chat(lm, body, limits)
    choices: list[dict[str, Any]] = []
    num_new = 0
    ((prompt, texts),) = zip(asked.prompts, generated(asked, body.n), strict=True)
    for idx, text in enumerate(texts):
        assert isinstance(text, GeneratedText)
        num_new += len(text.completion_tokens)
        found = None if body.num_top is None else token_logprobs(lm, text, prompt, body.num_top)
        choices.append(
            {
                "index": idx,
                "message": {"role": "assistant", "content": text.completion, "refusal": None},
                "logprobs": by_token(found),
                "finish_reason": FINISH[text.finish_reason],
            }
        )
    return {**head("chatcmpl", "chat.completion", name), "choices": choices, "usage": usage(asked, num_new)}


def scores(lm: LM, body: ScoreBody, limits: Limits, name: str) -> dict[str, Any]:
    """Return the answer to `/v1/score`: log-probabilities of each completion's tokens behind each prompt, in nats."""
    prompt_ids = lm.session.prompt_ids([Text(prompt, lm) for prompt in body.prompts])
    longest = lm.session.completion_ids(body.completions)
    limits.check_tokens(sum(map(len, prompt_ids)) + len(prompt_ids) * sum(map(len, longest)))
    found = log_probs(body.prompts, body.completions, lm, show_progress_bar=False)
    data = [
        {"index": idx, "logprobs": list(map(sum, own)), "token_logprobs": own}
        for idx, own in enumerate([[list(map(_finite, tokens)) for tokens in own] for own in found])
    ]
    return {**head("score", "score", name), "data": data}


def generated(asked: Asked, n: int) -> list[list[Text]]:
    """Return `n` continuations of each prompt; the prompts themselves if no tokens are requested."""
    if asked.max_new_tokens == 0:
        return [[prompt] * n for prompt in asked.prompts]
    options, is_greedy = dict(asked.options), "do_sample" not in asked.options
    found = generate(
        asked.prompts,
        max_new_tokens=asked.max_new_tokens,
        n=1 if is_greedy else n,
        show_progress_bar=False,
        **options,
    )
    return [own * n if is_greedy else [*own] for own in found]  # type: ignore[misc]


def token_logprobs(lm: LM, text: Text, start: Text | int, num_top: int) -> dict[str, Any]:
    """Return the log-probabilities of a text's tokens from a start on, and the most probable tokens at each place."""
    (own,) = lm.token_logprobs([text], [start])
    ids = text.tokens[len(text.tokens) - len(own) :]
    top = lm.top_logprobs([text], num_top, [start]).split()[0] if num_top else None
    tops = [] if top is None else list(zip(*(part.tolist() for part in top), strict=True))
    spelling = Spelling(lm.tokenizer)
    names, offsets = list(map(spelling.name, ids)), Offsets(lm.tokenizer, text.tokens[: -len(own) or None]).of(ids)
    found: dict[str, Any] = {"tokens": names, "text_offset": offsets, "token_logprobs": [], "top_logprobs": None}
    by_place: list[dict[str, float] | None] = []
    for idx, (token_id, logprob) in enumerate(zip(ids, _numbers(own), strict=True)):
        if logprob is None:
            found["token_logprobs"].append(None)
            by_place.append(None)
            continue
        likely = dict(zip(tops[idx][1], map(_finite, tops[idx][0]), strict=True)) if tops else {}
        # The token's own value is taken from the list, to the bit: clients compare it with the largest one.
        found["token_logprobs"].append(likely.get(token_id, logprob))
        named: dict[str, float] = {}
        for other, value in [*likely.items(), (token_id, logprob)]:
            named.setdefault(spelling.name(other), value)
        by_place.append(named)
    if num_top:
        found["top_logprobs"] = by_place
    return found


def _numbers(logprobs: Tensor) -> list[float | None]:
    """Return log-probabilities as numbers of JSON: None for a token without a prediction."""
    return [None if math.isnan(value) else _finite(value) for value in logprobs.tolist()]


def _finite(logprob: float) -> float:
    """Return a log-probability that JSON can write, also for a probability of 0."""
    return max(logprob, LEAST_LOGPROB)


def by_token(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return log-probabilities in the form that answers to `/v1/chat/completions` have; None for None."""
    if found is None:
        return None
    tops: Iterable[Mapping[str, float]] = found["top_logprobs"] or [{}] * len(found["tokens"])

    def one(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(bytes_named(token))}

    content = [
        {**one(token, logprob), "top_logprobs": [one(*pair) for pair in top.items()]}
        for token, logprob, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def head(prefix: str, kind: str, name: str) -> dict[str, Any]:
    """Return the first fields of an answer: id, object, created and model."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def usage(asked: Asked, num_new: int) -> dict[str, int]:
    """Return the numbers of tokens of a request."""
    num_before = sum(asked.num_prompt_tokens)
    return {"prompt_tokens": num_before, "completion_tokens": num_new, "total_tokens": num_before + num_new}
