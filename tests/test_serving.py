"""A model behind HTTP: the real client of OpenAI and lm-evaluation-harness get what the library gives."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI and uvicorn: pip install 'backprompt-lm[serve]'")

import httpx
import openai
import pydantic

import backprompt.serving.app
from backprompt import LM, JsonSchema, Regex, Text, chat, classify
from backprompt.cli import main
from backprompt.serving.answers import completion
from backprompt.serving.app import make_app
from backprompt.serving.bodies import CompletionBody
from backprompt.serving.limits import BodyLimit, Limits
from backprompt.serving.spelling import bytes_named
from backprompt.session.sharing import cancellation
from reference import plain_greedy
from served import served
from tiny_models import build
from tiny_tokenizers import byte_level_bpe, llama3_bpe, sentencepiece_bpe
from waiting import wait_until

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPT = "The cat sat on the"
MEMORY_TOKENS = 3_000
TOKEN_BYTES = 646
LIMITS = Limits(max_body_bytes=20_000, max_tokens=600, max_requests=64)


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


def tokenizer():
    made = byte_level_bpe()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def reference(model):
    return LM(model, tokenizer())


@pytest.fixture(scope="module")
def lm(model):
    return LM(model, tokenizer(), memory_bytes=MEMORY_TOKENS * TOKEN_BYTES)


@pytest.fixture(scope="module")
def address(lm):
    with served(make_app(lm, "tiny", api_key="secret", limits=LIMITS)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client:
        yield client


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 6, "temperature": 0, **options})


def greedy(reference, prompt=PROMPT, num=6, **options):
    return Text(prompt, reference).generate(max_new_tokens=num, **options)


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


# Answers


def test_completions_are_those_of_generate(client, reference):
    found = complete(client, [PROMPT, "Question: What is"])
    expected = [greedy(reference), greedy(reference, "Question: What is")]
    assert [choice.text for choice in found.choices] == [text.completion for text in expected]
    assert [choice.index for choice in found.choices] == [0, 1]
    assert {choice.finish_reason for choice in found.choices} == {"length"}
    num_prompt = sum(len(text.prompt.tokens) for text in expected)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (num_prompt, 12)
    ids = [list(Text(PROMPT, reference).tokens)]
    assert complete(client, ids).choices[0].text == complete(client, ids[0]).choices[0].text == expected[0].completion


def test_samples_stop_and_seed(client, reference):
    options = {"n": 3, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    found = [choice.text for choice in complete(client, **options).choices]
    expected = Text(PROMPT, reference).generate(max_new_tokens=6, do_sample=True, top_k=0, **options)
    assert found == [text.completion for text in expected]
    assert len(set(found)) > 1
    whole = greedy(reference).completion
    stopped = complete(client, stop=[whole[2:4]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(whole[2:4])], "stop")
    assert [choice.text for choice in complete(client, n=2).choices] == [whole] * 2


def test_echo_and_logprobs(client, lm, reference):
    found = complete(client, echo=True, logprobs=2, max_tokens=3).choices[0]
    text = greedy(reference, num=3)
    assert found.text == PROMPT + text.completion
    logprobs = reference.token_logprobs([text])[0].tolist()
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(logprobs[1:], abs=1e-4)
    assert len(found.logprobs.tokens) == len(text.tokens)
    for own, top in zip(found.logprobs.token_logprobs[-3:], found.logprobs.top_logprobs[-3:], strict=True):
        assert own == max(top.values())  # greedy, to the bit
    without = complete(client, logprobs=0, max_tokens=3).choices[0].logprobs
    assert without.token_logprobs == pytest.approx(logprobs[-3:], abs=1e-4)
    assert without.top_logprobs is None
    only = complete(client, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert only.text == PROMPT
    assert only.logprobs.token_logprobs[1:] == pytest.approx(logprobs[1:-3], abs=1e-4)


@pytest.mark.parametrize("made", [byte_level_bpe, llama3_bpe, sentencepiece_bpe])
def test_the_names_of_tokens_are_those_of_a_text(model, made):
    """Decoded alone, words lose the space before them, and parts of characters are all the same."""
    lm, body = LM(model, made()), {"prompt": "The cat, 日本 é sat", "max_tokens": 0, "echo": True, "logprobs": 3}
    (choice,) = completion(lm, CompletionBody(**body), Limits(), "tiny")["choices"]
    found = choice["logprobs"]
    special = lm.tokenizer.all_special_tokens
    spelled = b"".join(bytes_named(name) for name in found["tokens"] if name not in special)
    assert spelled.decode().strip() == choice["text"]
    for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if name not in special and not name.startswith("bytes:"):
            assert choice["text"][offset:].lstrip().startswith(name.lstrip())
    assert any(name.startswith("bytes:") for name in found["tokens"])
    assert all(len(top) >= 3 for top in found["top_logprobs"] if top is not None)


def test_streams_are_the_same_text(client, reference):
    chunks = list(complete(client, stream=True, echo=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == PROMPT + greedy(reference).completion
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 6


def test_streams_give_the_samples_of_whole_answers(client, reference):
    ids = list(Text(PROMPT, reference).tokens)
    for prompt, n in [([PROMPT, "Question: What is", PROMPT], 2), ([ids, ids], 1)]:
        options = {"n": n, "temperature": 0.9, "seed": 1}
        whole = [choice.text for choice in complete(client, prompt, **options).choices]
        texts = [""] * len(whole)
        for chunk in complete(client, prompt, stream=True, **options):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == whole
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_null_means_the_default(address, path):
    """Also for names of OpenAI that this server takes with their neutral values only."""
    names = ["n", "temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "logprobs", "stream", "user", "model"]
    names += ["stream_options", "best_of", "suffix", "frequency_penalty", "presence_penalty", "logit_bias"]
    names += ["response_format", "guided_regex", "guided_json"]
    names += ["echo"] if path == "completions" else ["max_completion_tokens", "top_logprobs", "tools", "tool_choice"]
    body = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "The cat?"}]}
    nulls = dict.fromkeys(names)

    def answered(**options):
        found = httpx.post(f"{address}/v1/{path}", json={**body, **options}, headers={"Authorization": "Bearer secret"})
        assert found.status_code == 200, found.text
        return found

    assert answered(**{**nulls, "seed": 7}).json()["choices"] == answered(seed=7).json()["choices"]
    streamed = {"stream": True, "stream_options": {"include_usage": None}, "max_tokens": 3}
    assert "usage" not in answered(**{**nulls, **streamed}).text


def test_an_event_is_one_line_for_every_client(address):
    prompt = "a\u2028b\x85c\x0bd 日本"
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "stream": True}
    with httpx.stream(
        "POST", f"{address}/v1/completions", json=body, headers={"Authorization": "Bearer secret"}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert json.loads(lines[0][6:])["choices"][0]["text"] == prompt
    assert len(lines) == 3


def test_conversations(client, reference):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The cat?"}]
    expected = chat(reference, messages).generate(max_new_tokens=5)
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 5}
    found = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0]
    assert found.message.content == expected.completion
    assert [one.logprob for one in found.logprobs.content] == pytest.approx(
        expected.completion_logprobs.tolist(), abs=1e-4
    )
    assert all(one.logprob == one.top_logprobs[0].logprob for one in found.logprobs.content)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.completion
    assert chunks[-1].choices[0].finish_reason == "length"
    del options["max_tokens"]
    room = 128 - len(expected.prompt.tokens)
    assert client.chat.completions.create(**options).usage.completion_tokens == room


FILM = {
    "type": "object",
    "properties": {"verdict": {"enum": ["good", "bad", "日本"]}},
    "required": ["verdict"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, JsonSchema({"type": "object"})),
        ({"response_format": schema_format(FILM)}, JsonSchema(FILM)),
        ({"response_format": {"type": "text"}}, None),
        ({"extra_body": {"guided_regex": "(yes|no), [0-9]{3}"}}, Regex("(yes|no), [0-9]{3}")),
        ({"extra_body": {"guided_json": FILM}}, JsonSchema(FILM)),
    ],
)
def test_constrained_answers(client, reference, options, constraint, stream):
    messages = [{"role": "user", "content": "The cat?"}]
    expected = chat(reference, messages).generate(max_new_tokens=30, constraint=constraint)
    found = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=30, temperature=0, stream=stream, **options
    )
    if stream:
        choices = [chunk.choices[0] for chunk in found]
        string = "".join(choice.delta.content or "" for choice in choices)
        reason = choices[-1].finish_reason
    else:
        string, reason = found.choices[0].message.content, found.choices[0].finish_reason
    assert string == expected.completion
    assert reason == ("stop" if expected.finish_reason == "constraint" else "length")
    if isinstance(constraint, Regex):
        assert re.fullmatch(constraint.pattern, string)


class Film(pydantic.BaseModel):
    verdict: Literal["good", "bad"]


def test_the_client_reads_the_model_that_it_asked_for(client):
    """The client makes the schema itself; sampling keeps the model from writing white space for ever."""
    found = client.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "The cat?"}], max_tokens=80, seed=1, response_format=Film
    ).choices[0]
    assert found.finish_reason == "stop"
    assert found.message.parsed.verdict in ("good", "bad")


def test_a_server_without_llguidance_says_so(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.InternalServerError, match="pip install llguidance"):
        complete(client, extra_body={"guided_regex": "a server without it"})


@pytest.mark.parametrize("num_top", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"echo": True},
        {"temperature": 0.9, "seed": 3, "max_tokens": 30},
        {"extra_body": {"guided_regex": "(日本|é)+x[a-z]{4}"}, "max_tokens": 40},
        {"echo": True, "max_tokens": 0},
    ],
)
def test_log_probabilities_of_streams_are_those_of_whole_answers(client, lm, options, num_top):
    check_streamed_logprobs(client, lm, options, num_top)


def test_tokens_that_a_stop_string_cuts_off_are_not_told(client, lm):
    """Though they are decided on before the stop string is complete; nor is its beginning given where it goes on."""
    options = {
        "temperature": 0.9,
        "seed": 3,
        "max_tokens": 30,
        "extra_body": {"guided_regex": "(the|question|answer| cat| sat){12}"},
    }
    string = complete(client, **options).choices[0].text
    for start in range(20):
        stop = string[start : start + 5]
        found = check_streamed_logprobs(client, lm, {**options, "stop": [stop, string[start + 1 : start + 3] + "!"]}, 0)
        assert found == string[: string.index(stop)]


def check_streamed_logprobs(client, lm, options, num_top):
    """Check a stream's log-probabilities, and return its string."""
    whole = complete(client, logprobs=num_top, **options).choices[0]
    found = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    string, before = "", lm.stats
    for chunk in complete(client, logprobs=num_top, stream=True, **options):
        (choice,) = chunk.choices
        string += choice.text
        if choice.logprobs is not None:
            for name, values in choice.logprobs.model_dump().items():
                found[name] += values or []
    assert (lm.stats - before).model_calls <= len(whole.logprobs.tokens)  # none for the log-probabilities
    assert string == whole.text
    expected = whole.logprobs.model_dump()
    for name in ("tokens", "text_offset"):
        assert found[name] == expected[name]
    assert found["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-4)
    assert len(found["top_logprobs"]) == (len(whole.logprobs.tokens) if num_top else 0)
    for own, other in zip(found["top_logprobs"], expected["top_logprobs"] or [], strict=True):
        assert own == (None if other is None else pytest.approx(other, abs=1e-4))
    return string


def test_log_probabilities_of_streamed_conversations(client):
    options = {"model": "tiny", "messages": [{"role": "user", "content": "The cat?"}], "temperature": 0}
    options |= {"max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    expected = client.chat.completions.create(**options).choices[0].logprobs.content
    chunks = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**options, stream=True)]
    found = [one for logprobs in chunks if logprobs is not None for one in logprobs.content]
    assert [one.token for one in found] == [one.token for one in expected]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-4)
    assert [len(one.top_logprobs) for one in found] == [len(one.top_logprobs) for one in expected]


def test_scores(client, reference):
    prompts, completions = [PROMPT, "Question:"], ["a mat", "12 + 34"]
    found = client.post("/score", body={"prompts": prompts, "completions": completions}, cast_to=httpx.Response).json()
    expected = classify.log_probs(prompts, completions, reference)
    for own, rows in zip(found["data"], expected, strict=True):
        assert own["logprobs"] == pytest.approx([sum(row) for row in rows], abs=1e-4)
        assert [len(row) for row in own["token_logprobs"]] == [len(row) for row in rows]


def test_a_body_in_many_parts_is_counted_once():
    """A client that sends a byte at a time costs the server no more than others do."""
    counted, seen = [], []

    class Part(bytes):
        def __len__(self):
            counted.append(self)
            return super().__len__()

    parts = iter([{"body": Part(b"x"), "more_body": idx < 49} for idx in range(50)])

    async def receive():
        return {"type": "http.request", **next(parts)}

    async def app(scope, receive, send):
        seen.append((await receive())["body"])

    asyncio.run(BodyLimit(app, Limits())({"type": "http", "headers": []}, receive, None))
    assert seen == [b"x" * 50]
    assert len(counted) == 50


def test_models_and_health(client, address):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "requests": 0}


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.*json_object"),
        ({"response_format": {"type": "json_schema"}}, r"response_format.*json_schema: Field required"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, r"schema: Field required"),
        ({"response_format": {"type": "text", "strict": True}}, "strict is no field"),
        ({"response_format": schema_format({"type": "foo"})}, "(?s)llguidance refuses.*Invalid type: foo"),
        ({"response_format": schema_format({"not": {}}), "stream": True}, "the keywords not are not supported"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format and guided_regex"),
        ({"guided_regex": "("}, "unclosed group"),
        ({"guided_json": "{}"}, "guided_json"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias is not supported"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"nonsense": 1}, "nonsense is no field"),
        ({"temperature": -1.0}, "temperature"),
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": [10**6]}, "10000"),
        ({"prompt": ""}, "token"),
        ({"prompt": "word " * 60}, "128"),
        ({"max_tokens": 0}, "nothing to answer"),
        ({"stream": True, "prompt": "word " * 60}, "128"),
        ({"prompt": None}, "prompt: Field required"),
        ({"nonsense": None}, "nonsense is no field"),
    ],
)
def test_requests_that_cannot_be_answered(client, address, options, message):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, **options}
    found = httpx.post(f"{address}/v1/completions", json=body, headers={"Authorization": "Bearer secret"})
    assert found.status_code == 400, found.text
    assert re.search(message, found.json()["error"]["message"]), found.text
    assert found.json()["error"]["type"] == "invalid_request_error"
    wait_until(lambda: httpx.get(f"{address}/health").json()["requests"] == 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": }', "The body is no JSON: Expecting value at character 11."),
        (b'{"prompt": "a"', "The body is no JSON: Expecting ',' delimiter at character 14."),
        (b'{"prompt": "\xff"}', "The body cannot be read. Send JSON in UTF-8."),
        (b"[1]", "Send an object of JSON, as Content-Type: application/json."),
        (b"", "Send an object of JSON, as Content-Type: application/json."),
    ],
)
def test_bodies_that_cannot_be_read(address, content, message):
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    found = httpx.post(f"{address}/v1/completions", content=content, headers=headers)
    assert (found.status_code, found.json()["error"]["message"]) == (400, message)
    assert found.json()["error"]["param"] is None


def test_a_conversation_without_a_content(client):
    user, options = {"role": "user", "content": "The cat?"}, {"model": "tiny", "max_tokens": 4, "temperature": 0}

    def answer(content):
        messages = [user, {"role": "assistant", "content": content}, user]
        return client.chat.completions.create(messages=messages, **options)

    assert answer(None).usage.prompt_tokens == answer("").usage.prompt_tokens < answer("None").usage.prompt_tokens
    assert answer(None).choices[0].message.content == answer("").choices[0].message.content
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\] has the role 'user', and null as content"):
        client.chat.completions.create(messages=[{**user, "content": None}], **options)


def test_what_is_not_there(client, address):
    with pytest.raises(openai.NotFoundError, match="There is no model 'other'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.embeddings.create(model="tiny", input="a")


def test_keys(address):
    for key in ("wrong", "secre", "secrets", "süß"):
        found = httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
    for scheme, status in [("bearer", 200), ("BEARER", 200), ("Basic", 401), ("Bearer2", 401)]:
        found = httpx.get(f"{address}/v1/models", headers={"Authorization": f"{scheme} secret"})
        assert found.status_code == status
    assert httpx.get(f"{address}/v1/models", headers={"Authorization": "secret"}).status_code == 401
    assert httpx.post(f"{address}/v1/completions", content=b"x" * 30_000).status_code == 401


def test_limits_of_a_request(client, address):
    with pytest.raises(openai.APIStatusError, match="600") as raised:
        complete(client, [PROMPT] * 8, max_tokens=100)
    assert (raised.value.status_code, raised.value.code) == (413, "too_many_tokens")
    with pytest.raises(openai.APIStatusError, match="20,000 bytes") as raised:
        complete(client, "x" * 20_000)
    assert (raised.value.status_code, raised.value.code) == (413, "body_too_large")
    in_chunks = iter([b"x" * 10_000] * 3)  # without a content-length
    found = httpx.post(f"{address}/v1/completions", content=in_chunks, headers={"Authorization": "Bearer secret"})
    assert found.status_code == 413


@pytest.fixture
def slow_address(lm):
    """The address of a server that waits for clients for a moment only."""
    with served(make_app(lm, "tiny", limits=Limits(client_seconds=0.3)), client_seconds=0.3) as address:
        yield address


@contextlib.contextmanager
def connected(address):
    """Yield a socket that is connected to a server, and that takes little before it is read."""
    url = httpx.URL(address)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        connection.connect((url.host, url.port))
        yield connection


def trickle(address, head, more):
    """Send `more` byte by byte while the server listens; return its answer."""
    with connected(address) as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):
            for byte in more:
                connection.sendall(bytes([byte]))
                assert httpx.get(f"{address}/health").json()["requests"] == 0  # others are served
        found = bytearray()
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(4096):
                found += chunk
        return bytes(found)


def test_a_body_that_comes_slowly_is_refused(slow_address):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n"
    found = trickle(slow_address, head, b"x" * 400)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in found.lower()
    assert json.loads(found.split(b"\r\n\r\n")[1])["error"]["code"] == "body_too_slow"


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_a_head_that_comes_slowly_is_given_up(slow_address, before):
    """The first head of a connection, and a later one."""
    found = trickle(slow_address, before + b"GET /health HTTP/1.1\r\n", b"Long: " + b"x" * 400)
    assert found.count(b"HTTP/1.1 200 ") == bool(before)


def test_a_client_that_reads_slowly_is_given_up(lm, slow_address, monkeypatch):
    async def endless(*_):
        while True:
            await asyncio.sleep(0)
            yield b"data: " + b"x" * 10_000 + b"\n\n"

    monkeypatch.setattr(backprompt.serving.app, "events", endless)
    body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": 50}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
    with connected(slow_address) as connection:
        connection.sendall(head + str(len(body)).encode() + b"\r\n\r\n" + body)
        wait_until(lambda: httpx.get(f"{slow_address}/health").json()["requests"] == 1)
        wait_until(lambda: httpx.get(f"{slow_address}/health").json()["requests"] == 0)
        wait_until(lambda: not lm.session.evaluator.holders.ends())


def test_requests_beyond_the_queue_are_refused(model):
    lm = LM(model, tokenizer())
    app = make_app(lm, "tiny", limits=Limits(max_requests=2))
    with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client:
        with ThreadPoolExecutor(3) as threads, lm.session.line.lock:
            waiting = [threads.submit(complete, client, f"{PROMPT} {idx}") for idx in range(2)]
            wait_until(lambda: httpx.get(f"{address}/health").json()["requests"] == 2)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError, match="2 requests are in work") as raised:
                    complete(client, stream=stream)
            assert raised.value.response.headers["retry-after"] == "1"
            lm.session.line.lock.release()
            try:
                assert all(one.result(60).choices[0].text for one in waiting)
            finally:
                lm.session.line.lock.acquire()
        assert complete(client).choices[0].text


# Many clients


def test_sixty_four_clients_at_once(client, lm, reference, address):
    """Nothing is lost and nothing is mixed up; the passes are shared, and the memory stays within its budget."""
    draw = random.Random(0)

    def prompt_of(idx):
        return f"{draw.choice(['The cat', 'Question: What', 'Review: the'])} {idx}"

    def completed(prompt):
        return complete(client, prompt).choices[0].text

    def streamed(prompt):
        return "".join(chunk.choices[0].text for chunk in complete(client, prompt, stream=True))

    def echoed(prompt):
        return complete(client, prompt, echo=True, logprobs=1, max_tokens=0).choices[0].logprobs.token_logprobs[1:]

    def failed(prompt):
        with pytest.raises(openai.BadRequestError, match="128 positions"):
            complete(client, prompt + " word" * 60)

    ways = [completed, streamed, echoed, failed]
    work = [(ways[idx % 4], prompt_of(idx)) for idx in range(64)]
    expected = {
        completed: lambda prompt: greedy(reference, prompt).completion,
        streamed: lambda prompt: greedy(reference, prompt).completion,
        echoed: lambda prompt: pytest.approx(
            reference.token_logprobs([Text(prompt, reference)])[0][1:].tolist(), abs=1e-4
        ),
        failed: lambda prompt: None,
    }
    before = lm.stats
    with ThreadPoolExecutor(64) as threads, lm.session.line.lock:
        asked = [threads.submit(way, prompt) for way, prompt in work]
        wait_until(lambda: httpx.get(f"{address}/health").json()["requests"] == 64)
        lm.session.line.lock.release()
        try:
            found = [one.result(120) for one in asked]
        finally:
            lm.session.line.lock.acquire()
    assert found == [expected[way](prompt) for way, prompt in work]
    num_alone = 32 * 6 + 16  # passes of the requests one by one
    assert (lm.stats - before).model_calls < num_alone / 4
    assert lm.stats.bytes_held <= MEMORY_TOKENS * TOKEN_BYTES
    wait_until(lambda: httpx.get(f"{address}/health").json()["requests"] == 0)
    assert not lm.session.evaluator.holders.ends()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_generation(lm, address, stream):
    body = {"prompt": PROMPT, "max_tokens": 100, "temperature": 0, "stream": stream}
    before = lm.stats
    with httpx.Client(headers={"Authorization": "Bearer secret"}) as client:
        if stream:
            with client.stream("POST", f"{address}/v1/completions", json=body) as found:
                next(found.iter_lines())
        else:
            with lm.session.line.lock, pytest.raises(httpx.ReadTimeout):
                client.post(f"{address}/v1/completions", json=body, timeout=0.5)
    wait_until(lambda: httpx.get(f"{address}/health").json()["requests"] == 0)
    wait_until(lambda: not lm.session.evaluator.holders.ends() and not lm.session.line.places)
    assert (lm.stats - before).tokens_computed < 100


def test_a_client_that_goes_away_before_the_first_piece_is_forgotten(lm, address, monkeypatch):
    body = {"prompt": "Nobody asked this", "max_tokens": 50, "stream": True}
    executor = lm.session.evaluator.executor
    plain, cancelled = executor.compute, []

    def compute(*args, **kwargs):
        wait_until(lambda: cancellation.get().is_set, 20)
        cancelled.append(True)
        return plain(*args, **kwargs)

    before = lm.stats
    with httpx.Client(headers={"Authorization": "Bearer secret"}) as client:
        with lm.session.line.lock:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{address}/v1/completions", json=body, timeout=0.5)
            wait_until(lambda: httpx.get(f"{address}/health").json()["requests"] == 0)
        wait_until(lambda: not lm.session.line.places)
        assert lm.stats == before
        monkeypatch.setattr(executor, "compute", compute)
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{address}/v1/completions", json=body, timeout=0.5)
        wait_until(lambda: httpx.get(f"{address}/health").json()["requests"] == 0)
    assert cancelled
    assert (lm.stats - before).model_calls == 1
    assert not lm.session.evaluator.holders.ends()


# Other programs


def test_lm_eval_has_the_results_of_hf(model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'backprompt-lm[lm-eval]'")
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder, tasks = tmp_path / "model", Path(__file__).parent / "lm_eval_tasks"
    model.save_pretrained(folder)
    byte_level_bpe().save_pretrained(folder)
    monkeypatch.chdir(tasks)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    options = {
        "tasks": ["bp_letters"],
        "task_manager": TaskManager(include_path=str(tasks), include_defaults=False),
        "bootstrap_iters": 0,
        "log_samples": True,
        "limit": 6,
    }
    with served(make_app(LM(model, tokenizer()), "tiny")) as address:
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "tiny",
                "base_url": f"{address}/v1/completions",
                "tokenizer": str(folder),
                "tokenizer_backend": "huggingface",
                "max_length": 127,
                "num_concurrent": 4,
            },
            **options,
        )
    expected = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "max_length": 127}, device="cpu", **options
    )
    for own, other in zip(found["samples"]["bp_letters"], expected["samples"]["bp_letters"], strict=True):
        for (logprob, is_greedy), (plain, is_plain_greedy) in zip(
            own["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert logprob == pytest.approx(plain, abs=1e-3)
            assert is_greedy is is_plain_greedy


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_the_command_answers_what_is_in_work_before_it_ends(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    byte_level_bpe().save_pretrained(tmp_path / "model")
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-m", "backprompt", "serve", "--model", tmp_path / "model", "--port", "0", "--name", "tiny"],
        env={**os.environ, "PYTHONPATH": str(root), "BACKPROMPT_API_KEY": "secret"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = None
        for line in process.stderr:
            if found := re.search(r"tiny is served at (http://127.0.0.1:\d+)/v1", line):
                address = found[1]
                break
        assert address is not None
        body = {"prompt": PROMPT, "max_tokens": 100, "temperature": 0, "stream": True}
        pieces = []
        with httpx.stream(
            "POST", f"{address}/v1/completions", json=body, headers={"Authorization": "Bearer secret"}, timeout=60
        ) as answer:
            for line in answer.iter_lines():
                if not pieces:
                    process.send_signal(signal.SIGTERM)
                if line.startswith("data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
            assert line == "" or line == "data: [DONE]"
        text = Text(PROMPT, LM(model, byte_level_bpe()))
        expected = plain_greedy(model, text.tokens, 100)
        assert "".join(pieces) == text.generate(max_new_tokens=100).completion
        assert len(expected) == 100
        process.wait(60)
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port must be between 0 and 65535"),
        (["--api-key", ""], "The key is empty"),
        (["--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_options_that_cannot_be(capsys, arguments, message):
    with contextlib.suppress(SystemExit):
        assert main(["serve", "--model", "nowhere/at-all", *arguments]) == 2
    assert message in capsys.readouterr().err
