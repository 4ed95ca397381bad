"""Conversations: the template's own string, each message a segment, and nothing computed twice as they go on."""

import warnings

import pytest

from backprompt import LM, Text, TextTypeError, TokenizerError, chat, evaluate
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTION = {"role": "user", "content": "Where is the cat?"}
MESSAGES = [{"role": "system", "content": "Be kind."}, QUESTION]


@pytest.fixture
def lm():
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    return LM(build("gpt2", vocab_size=len(tokenizer)), tokenizer)


def test_a_conversation_is_the_templates_string(lm):
    text = chat(lm, MESSAGES)
    assert text.string == lm.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text.segments == ("<system>Be kind.<|end|>\n", "<user>Where is the cat?<|end|>\n", "<assistant>")
    assert chat(lm, MESSAGES, add_generation_prompt=False).string == text.string.removesuffix("<assistant>")
    assert chat((lm.model, lm.tokenizer), MESSAGES).string == text.string
    answered = [*MESSAGES, {"role": "assistant", "content": "Here."}]
    assert chat(lm, answered).string.endswith("<assistant>Here.<|end|>\n")


def test_generated_answers_stand_there_as_their_ids(lm):
    text = chat(lm, MESSAGES)
    reply = text.generate(max_new_tokens=8, temperature=3.0, seed=2)
    before = lm.stats
    more = chat(lm, [*MESSAGES, {"role": "assistant", "content": reply}, {"role": "user", "content": "And then?"}])
    assert more.tokens[: len(reply.tokens)] == reply.tokens
    evaluate(more)
    assert (lm.stats - before).tokens_computed == len(more.tokens) - len(reply.tokens) + 1  # its last one is new
    assert more.string.endswith("<|end|>\n<user>And then?<|end|>\n<assistant>")


def test_an_end_token_among_the_ids_is_not_written_twice(lm):
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    bias = [[[40], 1e4], [[end], 2e4]]
    reply = chat(lm, MESSAGES).generate(
        max_new_tokens=8, sequence_bias=bias, min_new_tokens=3, eos_token_id=end, suppress_tokens=None
    )
    assert reply.completion_tokens == (40, 40, 40, end)
    more = chat(lm, [*MESSAGES, {"role": "assistant", "content": reply}, QUESTION])
    assert more.tokens.count(end) == 4
    assert more.tokens[: len(reply.tokens)] == reply.tokens


def test_a_template_that_rewrites_turns_is_named(lm):
    lm.tokenizer.chat_template = FORGETFUL
    messages = [QUESTION, {"role": "assistant", "content": "Here."}, QUESTION]
    with pytest.warns(UserWarning, match=r"not prefix-stable: messages up to messages\[1\] \(assistant\)"):
        text = chat(lm, messages)
    assert text.string == lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat(lm, messages[:1])


def test_what_makes_no_sense(lm):
    with pytest.raises(TextTypeError, match="no messages"):
        chat(lm, [])
    with pytest.raises(TextTypeError, match=r"messages\[1\] must be a dict with 'role' and 'content'"):
        chat(lm, [QUESTION, "hello"])
    with pytest.raises(TextTypeError, match="content of type Text"):
        chat(lm, [{"role": "user", "content": Text("a")}])
    lm.tokenizer.chat_template = "{{ raise_exception('Only users speak here.') }}"
    with pytest.raises(TokenizerError, match="Only users speak here"):
        chat(lm, MESSAGES)
    lm.tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        chat(lm, MESSAGES)


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_short_replies_stand_where_the_template_writes_them(lm, trim):
    """Also those that stand in the role's name, or in the question."""
    lm.tokenizer.chat_template = TEMPLATE.replace(" | trim", trim)
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    for character in ("a", "s", "e", " "):
        (token_id,) = lm.completion_ids([character])[0][:1]
        reply = chat(lm, MESSAGES).generate(max_new_tokens=2, sequence_bias=[[[token_id], 1e4]], eos_token_id=end)
        assert reply.completion == 2 * character
        messages = [*MESSAGES, {"role": "assistant", "content": reply}, QUESTION]
        plain = [m if isinstance(m["content"], str) else {**m, "content": reply.completion} for m in messages]
        expected = lm.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        assert chat(lm, messages).string == expected


def test_messages_that_the_template_takes_only_together(lm):
    lm.tokenizer.chat_template = (
        "{% if messages[-1].role == 'system' %}{{ raise_exception('No question.') }}{% endif %}" + TEMPLATE
    )
    text = chat(lm, MESSAGES)
    assert text.string == lm.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def test_messages_without_content(lm):
    lm.tokenizer.chat_template = TEMPLATE.replace("m.content | trim", "m.content or 'calls ' + m.tool")
    text = chat(lm, [QUESTION, {"role": "assistant", "content": None, "tool": "f"}, QUESTION])
    assert "<assistant>calls f<|end|>" in text.string
