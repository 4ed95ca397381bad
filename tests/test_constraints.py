"""Constraints: completions are in the language, tokens are those of transformers under the same mask, forced ones free.

The reference is transformers' `generate` with a processor that asks a new matcher of llguidance for each token, so it
knows neither our matching nor forced tokens.
"""

import dataclasses
import functools
import itertools
import json
import math
import pickle
import sys

import llguidance
import llguidance.hf
import numpy as np
import pydantic
import pytest
import regex
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import ByT5Tokenizer, LogitsProcessor, LogitsProcessorList

import backprompt
from backprompt import (
    LM,
    GenerationError,
    Grammar,
    JsonSchema,
    MissingDependencyError,
    Regex,
    Text,
    TextTypeError,
    TokenizerError,
    chat,
    classify,
    generate,
)
from backprompt.generation import decoding
from backprompt.tokens.finite import strings_of
from backprompt.tokens.matching import Matching, Vocabulary
from backprompt.tokens.tokenizer import PrivateTokenizer
from comparing import assert_close
from crews import crew_lm, plain_lm
from reference import generated_by_transformers, plain_logits, plain_token_logprobs
from tiny_models import FAMILIES, build
from tiny_tokenizers import TOKENIZERS, byte_level_bpe, unigram, word_piece

PROMPTS = ["The cat sat on the mat.", "Question: What is 12 + 34? Answer:", "Hello there."]
FLAT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
END = 0  # <|endoftext|>

SENTENCE = Regex(" the (cat|dog) was great")
ANSWER = JsonSchema(
    {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
    },
    compact=True,
)


# The reference


def grammar_of(constraint):
    matcher = llguidance.LLMatcher
    if isinstance(constraint, Regex):
        return matcher.grammar_from_regex(constraint.pattern)
    if isinstance(constraint, Grammar):
        return matcher.grammar_from_lark(constraint.lark)
    options = {"whitespace_flexible": False} if constraint.compact else {}
    return matcher.grammar_from_json_schema(constraint.json, overrides=options)


class Reference(LogitsProcessor):
    """Allows what a matcher that has read all tokens from the first on allows; END after END."""

    def __init__(self, tokenizer, constraint, num_prompt_ids):
        self.tokenizer = llguidance.hf.from_tokenizer(tokenizer, eos_token=END)
        self.constraint, self.num_prompt_ids = constraint, num_prompt_ids

    def allowed(self, completion, num_tokens):
        matcher = llguidance.LLMatcher(self.tokenizer, grammar_of(self.constraint), log_level=0)
        allowed = np.zeros(num_tokens, dtype=bool)
        if matcher.try_consume_tokens(list(completion)) == len(completion):
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed[: len(mask)] = mask[:num_tokens]
        return torch.from_numpy(allowed)

    def __call__(self, input_ids, scores):
        completions = input_ids[:, self.num_prompt_ids :].tolist()
        allowed = torch.stack([self.allowed(own, scores.shape[1]) for own in completions])
        return scores.masked_fill(~allowed.to(scores.device), -math.inf)


def expected_tokens(model, tokenizer, text, constraint, **options):
    """What transformers generates under the same mask, token by token; without padding behind the first END."""
    processor = Reference(tokenizer, constraint, len(text.tokens))
    found = generated_by_transformers(
        model, text.tokens, logits_processor=LogitsProcessorList([processor]), eos_token_id=END, **options
    )
    return found[: found.index(END) + 1] if END in found else found


def allowed_along(tokenizer, found, constraint, num_tokens=320):
    """Which tokens were allowed where each token of a completion was chosen, `(tokens, vocab)`."""
    reference = Reference(tokenizer, constraint, 0)
    ids = found.completion_tokens
    return torch.stack([reference.allowed(ids[:stop], num_tokens) for stop in range(len(ids))])


def check_numbers(model, tokenizer, found, constraint):
    num_new = len(found.completion_tokens)
    assert_close(found.completion_logprobs, plain_token_logprobs(model, found.tokens)[-num_new:])
    rows = plain_logits(model, found.tokens)[-num_new - 1 : -1]
    allowed = allowed_along(tokenizer, found, constraint, rows.shape[1])
    among = rows.masked_fill(~allowed, -math.inf).log_softmax(dim=-1)
    chosen = torch.tensor(found.completion_tokens)
    assert_close(found.constrained_logprobs, among.gather(1, chosen[:, None])[:, 0])
    assert (found.constrained_logprobs >= found.completion_logprobs - 1e-4).all()


def num_passes(tokenizer, found, constraint, max_new_tokens):
    """One for the prompt, and one for each token that had an alternative, with the forced tokens behind it."""
    is_forced = [int(row.sum()) == 1 and not row[END] for row in allowed_along(tokenizer, found, constraint)]
    passes, done = 1, 1
    while done < len(found.completion_tokens):
        run = 0
        while done + run < min(len(is_forced), max_new_tokens - 1) and is_forced[done + run]:
            run += 1
        done += run + 1
        passes += 1
    return passes


def count(lm, text, **options):
    lm.clear()
    before = lm.stats
    found = text.generate(**options)
    return found, lm.stats - before


# Random languages, of which Python knows what belongs to them

WORDS = st.sampled_from(["a", "the", " cat", " dog", "é", "12", "46", "\n", " great", "x"])


@st.composite
def patterns(draw, depth=2):
    kind = draw(st.sampled_from(["word", "class", "many", "either", "both"])) if depth else "word"
    if kind == "word":
        return draw(WORDS)
    if kind == "class":
        return draw(st.sampled_from(["[a-f]", "[0-9]", "[^a-z]", "[ t]"]))
    inner = patterns(depth=depth - 1)
    if kind == "many":
        return f"({draw(inner)}){draw(st.sampled_from(['?', '*', '+', '{2,3}']))}"
    left, right = draw(inner), draw(inner)
    return f"({left}|{right})" if kind == "either" else left + right


SCHEMAS = st.sampled_from(
    [
        {"type": "integer"},
        {"enum": ["yes", "no", 3, None]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        json.loads(ANSWER.json),
    ]
)
CONSTRAINTS = st.one_of(
    patterns().map(Regex), SCHEMAS.map(lambda schema: JsonSchema(schema, compact=True)), SCHEMAS.map(JsonSchema)
)


def check_is_in_the_language(found, constraint):
    completion = found.completion
    is_whole = found.finish_reason in ("eos", "constraint")
    assert is_whole or found.finish_reason in ("length", "stop")
    if isinstance(constraint, Regex):
        shown = completion if is_whole else completion.rstrip("\N{REPLACEMENT CHARACTER}")  # may end within a character
        assert regex.fullmatch(constraint.pattern, shown, partial=not is_whole), (constraint, completion)
    elif is_whole:
        value, schema = json.loads(completion), json.loads(constraint.json)
        if schema.get("type") == "integer":
            assert isinstance(value, int)
        elif "enum" in schema:
            assert value in schema["enum"]
        elif schema.get("type") == "array":
            assert 1 <= len(value) <= 3
            assert all(isinstance(element, bool) for element in value)
        else:
            assert list(value) == ["answer", "sure"]
            assert value["answer"] in ("yes", "no")
        if constraint.compact:
            assert completion == json.dumps(value, separators=(",", ":"))


@FLAT
@given(
    family=st.sampled_from(["gpt2", "llama", "mistral_sliding"]),
    constraint=CONSTRAINTS,
    options=st.sampled_from([{}, {"prompt_lookup_num_tokens": 4}, {"repetition_penalty": 1.5}, {"num_beams": 3}]),
    max_new_tokens=st.sampled_from([1, 4, 16]),
)
def test_tokens_are_those_of_transformers_under_the_same_mask(tokenizer, family, constraint, options, max_new_tokens):
    model = FAMILIES[family]()
    lm = LM(model, tokenizer)
    text = Text(PROMPTS[0], lm)
    found, done = count(lm, text, max_new_tokens=max_new_tokens, constraint=constraint, eos_token_id=END, **options)
    theirs = {name: value for name, value in options.items() if name != "prompt_lookup_num_tokens"}
    assert found.completion_tokens == expected_tokens(
        model, tokenizer, text, constraint, max_new_tokens=max_new_tokens, **theirs
    )
    check_is_in_the_language(found, constraint)
    check_numbers(model, tokenizer, found, constraint)
    num_new = len(found.completion_tokens)
    if options in ({}, {"repetition_penalty": 1.5}):
        assert done.tokens_computed == len(text.tokens) + num_new - 1
        assert done.forward_passes == num_passes(tokenizer, found, constraint, max_new_tokens)
    assert not lm.session.evaluator.holders.ends()


@FLAT
@given(
    constraint=CONSTRAINTS,
    options=st.sampled_from(
        [
            {},
            {"do_sample": True, "seed": 3},
            {"temperature": 0.7, "top_k": 3, "seed": 4},
            {"top_p": 0.5, "seed": 5},
            {"num_beams": 3},
            {"do_sample": True, "seed": 6, "prompt_lookup_num_tokens": 3},
        ]
    ),
    stop=st.sampled_from([None, "cat", ["4", "e"]]),
    eos_token_id=st.sampled_from([None, END]),
)
def test_what_is_chosen_does_not_depend_on_forced_tokens(lm, monkeypatch, constraint, options, stop, eos_token_id):
    options = {"max_new_tokens": 12, "stop": stop, "eos_token_id": eos_token_id, **options}
    text = Text(PROMPTS[1], lm)
    try:
        found, ahead = count(lm, text, constraint=constraint, **options)
    except GenerationError:
        with pytest.raises(GenerationError, match=r"no token can come first.*only the empty string"):
            text.generate(constraint=constraint, **options)
        assert eos_token_id is None
        return
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "MAX_FORCED", 0)
        patch.setattr("backprompt.generation.beams.MAX_FORCED", 0)
        one_by_one, plainly = count(lm, text, constraint=constraint, **options)
    check_is_in_the_language(found, constraint)
    assert found.completion_tokens == one_by_one.completion_tokens
    assert found.completion == one_by_one.completion
    assert found.finish_reason == one_by_one.finish_reason
    assert_close(found.completion_logprobs, one_by_one.completion_logprobs)
    assert_close(found.constrained_logprobs, one_by_one.constrained_logprobs)
    assert ahead.forward_passes <= plainly.forward_passes
    assert found.finish_reason != ("constraint" if eos_token_id == END else "eos")


# Examples


def test_forced_tokens_share_a_pass(lm, tokenizer):
    """` the (cat|dog) was great`: two tokens are chosen, "c" or "d" among them, and all others are forced."""
    text = Text(PROMPTS[0], lm)
    found, done = count(lm, text, max_new_tokens=30, constraint=SENTENCE)
    assert found.completion in (" the cat was great", " the dog was great")
    assert found.finish_reason == "constraint"
    num_choices = int((allowed_along(tokenizer, found, SENTENCE).sum(dim=-1) > 1).sum())
    assert done.forward_passes <= 2 + num_choices < len(found.completion_tokens)
    assert done.tokens_computed == len(text.tokens) + len(found.completion_tokens) - 1
    assert lm.stats.bytes_held == done.tokens_computed * lm.session.evaluator.executor.token_bytes


def test_beams_share_forced_tokens_too(lm, model, tokenizer):
    text = Text(PROMPTS[0], lm)
    options = {"max_new_tokens": 40, "num_beams": 3}
    found, done = count(lm, text, constraint=ANSWER, eos_token_id=END, **options)
    assert found.completion_tokens == expected_tokens(model, tokenizer, text, ANSWER, **options)
    assert found.finish_reason == "eos"
    assert done.forward_passes < len(found.completion_tokens) / 2
    both = text.generate(constraint=ANSWER, n=2, **options)
    assert len({one.completion for one in both}) == 2
    assert all(one.finish_reason == "constraint" for one in both)
    assert all(json.loads(one.completion)["answer"] in ("yes", "no") for one in both)


def test_more_beams_than_strings(lm):
    """All strings are found, and the search ends, with an end token and without."""
    text, small = Text(PROMPTS[0], lm), Regex(" dog|a{2,3}")
    for options, reason in (({"eos_token_id": END}, "eos"), ({}, "constraint")):
        found = text.generate(max_new_tokens=10, constraint=small, num_beams=4, n=4, **options)
        ended = [one for one in found if one.finish_reason == reason]
        assert {one.completion for one in ended} <= {" dog", "aa", "aaa"}
        assert len(ended) >= 2
        assert ended[0] is found[0]


def test_texts_with_constraints_of_their_own(lm):
    texts = [Text(prompt, lm) for prompt in (*PROMPTS, PROMPTS[0])]
    constraints = [SENTENCE, None, ANSWER, Regex("[0-9]{3}")]
    options = {"max_new_tokens": 30, "eos_token_id": END}
    found = generate(texts, constraint=constraints, **options)
    assert [one.finish_reason for one in found] == ["eos", "length", "eos", "eos"]
    for text, constraint, one in zip(texts, constraints, found, strict=True):
        alone = text.generate(constraint=constraint, **options)
        assert alone.completion_tokens == one.completion_tokens
        assert_close(alone.constrained_logprobs, one.constrained_logprobs)
    assert torch.equal(found[1].constrained_logprobs, found[1].completion_logprobs)
    sampled = generate(texts, constraint=constraints, n=2, do_sample=True, seed=1, **options)
    for text, constraint, row in zip(texts[:3], constraints[:3], sampled[:3], strict=True):
        alone = text.generate(constraint=constraint, n=2, do_sample=True, seed=1, **options)
        assert [one.completion_tokens for one in row] == [one.completion_tokens for one in alone]
    assert all(regex.fullmatch("[0-9]{3}", one.completion) for one in sampled[3])


def test_one_constraint_for_all_texts(lm):
    found = generate([Text(prompt, lm) for prompt in PROMPTS], max_new_tokens=30, constraint=ANSWER)
    assert all(set(json.loads(one.completion)) == {"answer", "sure"} for one in found)


def test_a_grammar_that_counts_brackets(lm):
    grammar = Grammar('start: "(" start ")" | "x"')
    found = Text(PROMPTS[0], lm).generate(max_new_tokens=60, constraint=grammar, do_sample=True, seed=2)
    opening, closing = found.completion.split("x") if "x" in found.completion else (found.completion, "")
    assert set(opening) <= {"("}
    assert closing == ")" * len(opening) or found.finish_reason == "length"


def test_the_end_token_may_follow_where_the_language_may_end(lm, model):
    """With a huge bias towards END the text ends as soon as it may: after two characters."""
    text = Text(PROMPTS[0], lm)
    options = {"max_new_tokens": 20, "eos_token_id": END, "sequence_bias": {(END,): 1000.0}}
    found = text.generate(constraint=Regex("[a-c]{2}[a-z]*"), **options)
    assert found.finish_reason == "eos"
    assert len(found.completion) >= 2
    assert regex.fullmatch("[a-c]{2}", found.completion[:2])
    assert text.generate(constraint=Regex("[a-z]*"), **options).completion_tokens == (END,)


def test_an_end_token_that_is_text_ends_only_what_the_language_ends_with(lm, tokenizer):
    (end,) = tokenizer.encode("!")
    text = Text(PROMPTS[0], lm)
    options = {"max_new_tokens": 20, "eos_token_id": end, "sequence_bias": {(end,): 1000.0}}
    found = text.generate(constraint=Regex("a[b!]{3}"), **options)
    assert (found.finish_reason, found.completion[-1], len(found.completion)) == ("eos", "!", 4)
    with pytest.raises(GenerationError, match=r"none may follow"):
        text.generate(constraint=Regex("a!b"), **options)


def test_no_end_within_max_new_tokens(lm):
    found = Text(PROMPTS[0], lm).generate(max_new_tokens=3, constraint=ANSWER, eos_token_id=END)
    assert found.finish_reason == "length"
    assert '{"answer":"yes","sure":true}'.startswith(found.completion) or found.completion.startswith('{"answer')


def test_streams(lm):
    stream = Text(PROMPTS[0], lm).stream(max_new_tokens=30, constraint=SENTENCE)
    assert "".join(stream) == stream.text.completion
    assert regex.fullmatch(SENTENCE.pattern, stream.text.completion)
    assert stream.text.constrained_logprobs.shape == stream.text.completion_logprobs.shape


def test_replies_of_a_chat(model, tokenizer):
    own = byte_level_bpe()
    own.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    own.chat_template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    lm = LM(model, own)
    messages = [{"role": "user", "content": "Is it great?"}]
    reply = chat(lm, messages).generate(max_new_tokens=30, constraint=ANSWER, eos_token_id=END)
    value = json.loads(reply.completion)
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "Sure?"}]
    before = lm.stats
    again = chat(lm, messages).generate(max_new_tokens=30, constraint=ANSWER, eos_token_id=END)
    assert (lm.stats - before).tokens_computed < len(again.tokens)
    assert set(json.loads(again.completion)) == set(value) == {"answer", "sure"}


def test_more_embeddings_than_tokens(tokenizer):
    """Ids that the tokenizer lacks are never allowed, and may be end tokens."""
    model = build("gpt2", vocab_size=400)
    lm = LM(model, tokenizer)
    text = Text(PROMPTS[0], lm)
    found = text.generate(max_new_tokens=30, constraint=SENTENCE, eos_token_id=399)
    assert found.finish_reason == "eos"
    assert found.completion_tokens[-1] == 399
    assert regex.fullmatch(SENTENCE.pattern, found.completion)


# Tokenizers

FAMILIES_OF_TOKENS = {**TOKENIZERS, "word_piece": word_piece}
PARTS = ["the", " the", "cats?", "(a|bc|n)", " (two|th|ending)", "[a-e]", " ?", "東?", "X", "(is|was)", "\\.", "n't"]


@functools.cache
def tokenizer_of(name):
    return FAMILIES_OF_TOKENS[name]()


@functools.cache
def vocabulary_of(name):
    return Vocabulary(PrivateTokenizer(tokenizer_of(name)))


@pytest.mark.parametrize("name", FAMILIES_OF_TOKENS)
def test_families_of_tokenizers(name, model):
    """The string that the tokens add to the prompt's is in the language, whatever the tokens are made of."""
    lm = LM(model, FAMILIES_OF_TOKENS[name]())
    text = Text("The cat sat", lm)
    patterns = [" the (cat|dog)", "the end", "[a-z東]{4}", "cats( and more){2}"]
    if name not in ("unigram", "word_piece"):  # which have no token for some of these characters
        patterns += ["東é[a-z]{3} ?\n", "  two  spaces"]
    for pattern in patterns:
        for options in ({}, {"do_sample": True, "seed": 1}, {"num_beams": 2}):
            found = text.generate(max_new_tokens=40, constraint=Regex(pattern), **options)
            assert found.finish_reason == "constraint"
            assert regex.fullmatch(pattern, found.completion), (pattern, found.completion)


@pytest.mark.parametrize("name", FAMILIES_OF_TOKENS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
def test_allowed_tokens_spell_the_language_and_none_is_missed_at_a_dead_end(name, data, parts):
    """A random walk along a finite language: strings by the decoder of transformers, behind a prompt."""
    private, strings = tokenizer_of(name), strings_of(Regex("".join(parts)))
    before = private.encode("the cat", add_special_tokens=False)
    matching = Matching(vocabulary_of(name).language(Regex("".join(parts))), 320, [])
    completion = ()

    def spelled(token_ids):
        string = private.decode([*before, *token_ids], clean_up_tokenization_spaces=False)
        return string[len("the cat") :].rstrip("\N{REPLACEMENT CHARACTER}")

    def is_possible(token_id):
        return any(string.startswith(spelled((*completion, token_id))) for string in strings)

    while (allowed := np.flatnonzero(matching.allowed(completion)).tolist()) and len(completion) < 20:
        assert all(map(is_possible, allowed))
        completion += (data.draw(st.sampled_from(allowed)),)
    if not allowed and not matching.is_over(completion):
        others = set(range(len(private))) - set(private.all_special_ids)
        assert not any(map(is_possible, others)), (parts, spelled(completion))


def test_tokenizers_that_the_library_cannot_take(model):
    made = unigram()
    made.backend_tokenizer.decoder = decoders.BPEDecoder()
    text = Text("The cat", LM(model, made))
    with pytest.raises(TokenizerError, match=r"(?s)llguidance cannot use.*BPEDecoder.*byte-level BPE"):
        text.generate(max_new_tokens=3, constraint=SENTENCE)
    with pytest.raises(GenerationError, match=r"no token for the next character"):
        Text("The cat", LM(model, unigram())).generate(max_new_tokens=5, constraint=Regex("a€"))
    with pytest.raises(TokenizerError, match=r"backend of the package tokenizers"):
        Text("The cat", LM(build("gpt2", vocab_size=400), ByT5Tokenizer())).generate(
            max_new_tokens=3, constraint=SENTENCE
        )


def test_names_of_special_tokens_are_strings_like_others(lm, tokenizer):
    """Only a grammar can ask for the special token itself, without quotes."""
    text = Text("The cat sat", lm)
    found = text.generate(max_new_tokens=30, constraint=Regex(r"a<\|endoftext\|>b"))
    assert (found.finish_reason, END in found.completion_tokens) == ("constraint", False)
    assert found.completion == "a<|endoftext|>b"
    named = text.generate(max_new_tokens=30, constraint=Grammar('start: "a" <|endoftext|> "b"'))
    assert [tokenizer.decode(token_id) for token_id in named.completion_tokens] == ["a", "<|endoftext|>", "b"]


def test_a_changed_tokenizer_is_noticed():
    own = byte_level_bpe()
    lm = LM(build("gpt2", vocab_size=330), own)
    text = Text("The cat sat", lm)
    first = text.generate(max_new_tokens=20, constraint=Regex("<yes>"))
    own.add_tokens(["<yes>"])
    second = text.generate(max_new_tokens=20, constraint=Regex("<yes>"))
    assert first.completion == second.completion == "<yes>"
    assert len(first.completion_tokens) > len(second.completion_tokens) == 1


# Errors


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Regex("("), r"(?s)llguidance refuses the constraint Regex.*unclosed group"),
        (Regex("a(?=b)"), r"(?s)refuses.*look-around"),
        (JsonSchema({"type": "foo"}), r"Invalid type: foo"),
        (JsonSchema({"not": {}, "contains": {}}), r"keywords (not, contains|contains, not) are not supported. Leave"),
        (JsonSchema({"oneOf": [{"minimum": 3}, {"maximum": 5}]}), r"exclude each other.*Write anyOf in its place"),
        (JsonSchema({"type": "string", "format": "card"}), r"Unknown format: card. Leave the format out, or write a"),
        (Grammar("begin: 'a'"), r"llguidance refuses the constraint Grammar"),
        (Regex("[a&&b]"), r"no token can come first: the language has no string"),
        (Regex(""), r"no token can come first"),
    ],
)
def test_constraints_that_cannot_be_met(lm, constraint, message):
    before = lm.stats
    with pytest.raises(GenerationError, match=message):
        Text("The cat", lm).generate(max_new_tokens=3, constraint=constraint)
    assert (lm.stats - before).tokens_computed == 0


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("[a-z]+", r"must be a Regex, a JsonSchema or a Grammar, not str: '\[a-z\]\+'"),
        ({"type": "string"}, r"Wrap it: JsonSchema\(\.\.\.\)"),
        ([SENTENCE, "x"], r"constraint\[1\] must be a Regex"),
    ],
)
def test_what_is_no_constraint(lm, constraint, message):
    texts = [Text("The cat", lm), Text("The dog", lm)]
    with pytest.raises(TextTypeError, match=message):
        generate(texts, max_new_tokens=3, constraint=constraint)
    with pytest.raises(GenerationError, match=r"The list has 1 constraint for 2 texts"):
        generate(texts, max_new_tokens=3, constraint=[SENTENCE])


def test_options_that_exclude_all_that_is_allowed(lm, tokenizer):
    (a,) = tokenizer.encode("a")
    with pytest.raises(GenerationError, match=r"A constraint excludes every token that it does not allow"):
        Text("The cat", lm).generate(max_new_tokens=3, constraint=Regex("a+"), suppress_tokens=[a])


def test_without_llguidance_it_is_said_how_to_get_it(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"pip install llguidance$"):
        Text("The cat", lm).generate(max_new_tokens=3, constraint=SENTENCE)


# What a constraint is


class Person(pydantic.BaseModel):
    name: str
    age: int


@dataclasses.dataclass
class Place:
    city: str


def test_schemas_of_types(lm, monkeypatch):
    assert json.loads(JsonSchema(Person).json)["required"] == ["name", "age"]
    assert json.loads(JsonSchema(Place).json)["required"] == ["city"]
    assert json.loads(JsonSchema(list[int]).json) == {"type": "array", "items": {"type": "integer"}}
    assert JsonSchema(pydantic.TypeAdapter(list[int])) == JsonSchema(list[int])
    with pytest.raises(TextTypeError, match=r"takes a dict.*not str: '\{\}'.*json\.loads"):
        JsonSchema("{}")
    with pytest.raises(TextTypeError, match=r"cannot be written as JSON"):
        JsonSchema({"enum": [{1}]})
    with pytest.raises(TextTypeError, match=r"pydantic has no JSON schema"):
        JsonSchema(LM)
    with pytest.raises(TextTypeError, match=r"The pattern of a Regex must be a string"):
        Regex(3)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(MissingDependencyError, match=r"pip install pydantic"):
        JsonSchema(Place)
    assert JsonSchema(Person) == JsonSchema(Person.model_json_schema())  # a model brings its schema along


def test_names_that_are_no_keywords_are_ignored(lm):
    schema = {"type": "string", "enum": ["a"], "minItem": 2, "x-note": "mine"}
    assert Text("One", lm).generate(max_new_tokens=5, constraint=JsonSchema(schema)).completion == '"a"'


def test_a_model_of_pydantic_reads_what_was_generated(lm):
    found = Text("The cat", lm).generate(
        max_new_tokens=60, constraint=JsonSchema(Person, compact=True), sequence_bias={(3,): 2.0}, eos_token_id=END
    )
    if found.finish_reason == "eos":
        assert Person.model_validate_json(found.completion)
    assert found.completion.startswith('{"name":"')


def test_constraints_are_compared_by_content_and_travel():
    for constraint in (SENTENCE, ANSWER, Grammar("start: 'a'")):
        assert pickle.loads(pickle.dumps(constraint)) == constraint
        assert hash(pickle.loads(pickle.dumps(constraint))) == hash(constraint)
    assert JsonSchema({"a": 1}) != JsonSchema({"a": 1}, compact=True)


def test_workers_follow_constraints():
    engine, plain = crew_lm(num_workers=2), plain_lm()
    constraints = [SENTENCE, ANSWER, None]

    def found(lm):
        texts = [Text(prompt, lm) for prompt in PROMPTS]
        sampled = generate(texts, max_new_tokens=20, constraint=constraints, n=2, do_sample=True, seed=1)
        beams = generate(texts, max_new_tokens=20, constraint=ANSWER, num_beams=2)
        stream = texts[0].stream(max_new_tokens=20, constraint=SENTENCE)
        assert "".join(stream) == stream.text.completion
        return [*itertools.chain(*sampled), *beams, stream.text]

    language = Regex("(very )?(great|bold)")
    assert Text(PROMPTS[0], engine).probability_of(language) == pytest.approx(
        Text(PROMPTS[0], plain).probability_of(language), rel=1e-5
    )
    for ours, theirs in zip(found(engine), found(plain), strict=True):
        assert ours.completion_tokens == theirs.completion_tokens
        assert ours.finish_reason == theirs.finish_reason
        assert_close(ours.constrained_logprobs, theirs.constrained_logprobs)


# Finite languages


def finite(pattern):
    return strings_of(Regex(pattern))


def test_the_strings_of_a_language():
    assert finite("yes|no") == ["no", "yes"]
    assert finite("(a|b)?c{0,2}") == ["", "a", "ac", "acc", "b", "bc", "bcc", "c", "cc"]
    assert finite("é|日本|[ü-þ]") == ["é", "ü", "ý", "þ", "日本"]
    assert finite("[a&&b]") == []
    assert len(finite("[0-9]{3}")) == 1000
    assert strings_of(JsonSchema({"enum": ["a", 1]})) == ['"a"', "1"]
    assert strings_of(Grammar('start: "x" D | "y" "z"?\nD: /[a&&b]/')) == ["y", "yz"]  # no string begins with x
    for pattern in ("a*", "(ab)*c", "[0-9]{5}", "a{1001}", "[^a]"):
        with pytest.raises(ValueError, match=r"more than 10,000 strings.*1,000 bytes"):
            finite(pattern)


@settings(max_examples=30, deadline=None)
@given(pattern=patterns())
def test_the_strings_of_a_random_language_match_it(pattern):
    try:
        strings = strings_of(Regex(pattern), max_strings=300, max_bytes=40)
    except ValueError:
        assert "*" in pattern or "+" in pattern or "^" in pattern or "{" in pattern or "[" in pattern
        return
    assert len(set(strings)) == len(strings)
    assert all(regex.fullmatch(pattern, string) for string in strings)


def probability(model, lm, prompt, strings, end=()):
    """The sum over strings, each scored by the plain call behind the prompt's ids."""
    total = 0.0
    for string in strings:
        ids = [*prompt.tokens, *lm.tokenizer.encode(string), *end]
        total += math.exp(plain_token_logprobs(model, ids)[len(prompt.tokens) :].double().sum())
    return total


def test_the_probability_of_a_language(lm, model):
    prompt = Text("The film was", lm)
    language = Regex("((very )?(great|bold)|a cat)")
    strings = [" great", " very great", " bold", " very bold", " a cat"]
    lm.clear()
    before = lm.stats
    found = prompt.probability_of(language)
    assert found == pytest.approx(probability(model, lm, prompt, strings), rel=1e-4)
    done = lm.stats - before
    distinct = {tuple(lm.tokenizer.encode(string)[:stop]) for string in strings for stop in range(1, 9)}
    assert done.tokens_computed < len(prompt.tokens) + len(distinct)
    apart = classify.predict_proba(prompt, strings, aggregate="sum", normalize=False)
    assert found == pytest.approx(float(apart.sum()), rel=1e-5)
    assert classify.probability_of("The film was", language, lm) == pytest.approx(found, rel=1e-6)
    assert prompt.probability_of(language, end_of_prompt="") != pytest.approx(found, rel=1e-3)


def test_what_begins_alike_is_counted_once_unless_it_ends(tokenizer):
    model = build("gpt2")
    model.generation_config.eos_token_id = END
    lm = LM(model, tokenizer)
    prompt = Text("The film was", lm)
    language = Regex("x(yz?)?")
    strings = ["x", "xy", "xyz"]
    found = prompt.probability_of(language, end_of_prompt="")
    assert found == pytest.approx(probability(model, lm, prompt, ["x"]), rel=1e-4)
    ended = prompt.probability_of(language, end_of_prompt="", with_end_token=True)
    assert ended == pytest.approx(probability(model, lm, prompt, strings, [END]), rel=1e-4)
    assert ended < found
    model.generation_config.eos_token_id = [END, END]
    assert prompt.probability_of(language, end_of_prompt="", with_end_token=True) == ended
    optional = prompt.probability_of(Regex("(xy)?"), end_of_prompt="", with_end_token=True)
    assert optional == pytest.approx(probability(model, lm, prompt, ["", "xy"], [END]), rel=1e-4)


@pytest.mark.parametrize(
    ("language", "options", "error", "message"),
    [
        (Regex("a*"), {}, ValueError, r"infinitely many strings"),
        (Regex(" ?(a|b)"), {}, ValueError, r"' a' and 'a' have the same token ids.*With end_of_prompt=''.*' \?'"),
        (Regex("(a|b)?"), {}, ValueError, r"has the empty string"),
        (Regex("[a&&b]"), {}, ValueError, r"no string, or only the empty one"),
        (Regex("a"), {"with_end_token": True}, ValueError, r"has no end token"),
        (Regex("a"), {"with_end_token": "no"}, ValueError, r"with_end_token must be True or False"),
        ("a", {}, TextTypeError, r"language must be a Regex"),
        (Regex("("), {}, GenerationError, r"unclosed group"),
    ],
)
def test_languages_without_a_probability(lm, language, options, error, message):
    with pytest.raises(error, match=message):
        Text("The film was", lm).probability_of(language, **options)


def test_an_optional_space_counts_as_it_is_written(lm, model):
    prompt = Text("The film was", lm)
    found = prompt.probability_of(Regex(" ?(a|b)"), end_of_prompt="")
    assert found == pytest.approx(probability(model, lm, prompt, [" a", " b", "a", "b"]), rel=1e-4)


def test_select_takes_a_finite_constraint(lm):
    prompt = Text("The film was", lm)
    found = prompt.select(Regex("(very )?(great|bold)"))
    listed = prompt.select(["great", "bold", "very great", "very bold"])
    assert found.option == listed.option
    assert found.probabilities == pytest.approx(listed.probabilities)
    with pytest.raises(ValueError, match=r"infinitely many strings"):
        prompt.select(Regex("a+"))


def test_public_names():
    assert {"Grammar", "JsonSchema", "Regex"} <= set(backprompt.__all__)
