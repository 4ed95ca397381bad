"""Conversations: the template's own string, each message a segment, and nothing computed twice as they go on."""

import contextlib
import warnings
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import backprompt as bp
from backprompt import LM, GeneratedText, Text, TextTypeError, TokenizerError, chat, evaluate
from backprompt.generation.continued import continue_as
from tiny_models import build
from tiny_tokenizers import TOKENIZERS, byte_level_bpe, sentencepiece_bpe

# As models on the Hugging Face hub have them; BOS stands for the first string of some of each kind.
CHAT_TEMPLATES = {
    "Llama 3": (
        "{% for message in messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
        " + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = BOS + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "ChatML": (
        "{{ BOS }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "Zephyr": (
        "{{ BOS }}{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "Gemma": (
        "{{ BOS }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "Mistral": (
        "{{ BOS }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
}
IN_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def eos_bpe() -> PreTrainedTokenizerFast:
    """As Llama 3's, but it appends an end token, too."""
    tokenizer = TOKENIZERS["llama3_bpe"]()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|begin_of_text|>", "<|end_of_text|>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>", special_tokens=list(ids.items())
    )
    return tokenizer


CHATTING = {**TOKENIZERS, "eos_bpe": eos_bpe, "byt5": ByT5Tokenizer}


@cache
def an_lm(name: str, add_special_tokens: bool = True) -> LM:
    tokenizer = CHATTING[name]()
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    return LM(build("gpt2"), tokenizer, add_special_tokens=add_special_tokens)


QUESTION = {"role": "user", "content": "Where is the cat?"}
MESSAGES = [{"role": "system", "content": "Be kind."}, QUESTION]


strings = st.lists(
    st.sampled_from(["a cat", " the", "re", "\n", "  ", "é", "<s>", "</s>", "<|begin_of_text|>", "assistant", "日"]),
    max_size=4,
).map("".join)


@st.composite
def contents(draw):
    """A string, and the same as a text, cut or in one piece, or as a list of strings and texts."""
    pieces = draw(st.lists(strings, min_size=1, max_size=3))
    texts = [Text(piece) if draw(st.booleans()) else piece for piece in pieces]
    kind = draw(st.sampled_from(["str", "Text", "list"]))
    content = {"str": "".join(pieces), "Text": sum(map(Text, pieces), Text("")), "list": texts}[kind]
    return "".join(pieces), content


# The tokens of the plain call


@pytest.mark.parametrize("name", CHATTING)
@pytest.mark.parametrize("bos", [True, False], ids=["BOS", "no BOS"])
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@settings(max_examples=6)
@given(drawn=st.lists(contents(), min_size=1, max_size=3), add_generation_prompt=st.booleans())
@example(drawn=[("Hi", "Hi")], add_generation_prompt=True)
@example(drawn=[("<s>a ", Text("<s>") + "a "), ("x</s>", ["x", Text("</s>")])], add_generation_prompt=False)
def test_its_tokens_are_those_of_apply_chat_template(template, bos, name, drawn, add_generation_prompt):
    roles = ["user", "assistant", "user"]
    options = {"chat_template": CHAT_TEMPLATES[template].replace("BOS", "bos_token" if bos else "''")}
    options["add_generation_prompt"] = add_generation_prompt
    plain = [{"role": role, "content": string} for role, (string, _) in zip(roles, drawn, strict=False)]
    messages = [{"role": role, "content": content} for role, (_, content) in zip(roles, drawn, strict=False)]
    for add_special_tokens in (True, False):
        lm = an_lm(name, add_special_tokens)
        expected = lm.tokenizer.apply_chat_template(plain, return_dict=False, **options)
        text = chat(lm, messages, **options)
        assert text.tokens == tuple(expected)
        assert text.string == lm.tokenizer.apply_chat_template(plain, tokenize=False, **options)


@pytest.mark.parametrize("name", ["unigram", "eos_bpe"])
def test_a_conversation_is_evaluated_as_the_plain_call_does(name):
    lm, options = an_lm(name), {"chat_template": CHAT_TEMPLATES["ChatML"].replace("BOS", "''")}
    text = chat(lm, [QUESTION], **options)
    ids = lm.tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False, **options)
    assert bp.verify(text).passed
    assert text.tokens == tuple(ids) == chat(lm, [QUESTION], **options).generate(max_new_tokens=1).tokens[:-1]


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
    with pytest.raises(TextTypeError, match="content of type int; give a str, a Text, or a list of them"):
        chat(lm, [{"role": "user", "content": 3}])
    with pytest.raises(TextTypeError, match=r"messages\[0\]\['content'\]\[1\] must be a str, a Text or a dict"):
        chat(lm, [{"role": "user", "content": ["a", 3]}])
    for kind in ("image", "image_url", "input_audio", "video"):
        with pytest.raises(TextTypeError, match=rf"\[0\]\['content'\]\[0\] is of type '{kind}'.* Give text only"):
            chat(lm, [{"role": "user", "content": [{"type": kind, kind: "http://a.b/c"}]}])
    lm.tokenizer.chat_template = "{{ raise_exception('Only users speak here.') }}"
    with pytest.raises(TokenizerError, match="Only users speak here"):
        chat(lm, MESSAGES)
    lm.tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        chat(lm, MESSAGES)


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_short_replies_stand_where_the_template_writes_them(lm, trim):
    """Also replies whose string occurs in the role's name or in the question."""
    lm.tokenizer.chat_template = TEMPLATE.replace(" | trim", trim)
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    for character in ("a", "s", "e", " "):
        (token_id,) = lm.session.completion_ids([character])[0][:1]
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


# The last message left open


def test_the_last_message_goes_on(lm):
    begun = [*MESSAGES, {"role": "assistant", "content": "It is on"}]
    text = chat(lm, begun, continue_final_message=True)
    assert text.string == lm.tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert text.segments[-1] == "<assistant>It is on"
    with pytest.raises(TokenizerError, match="continue_final_message continues the last one"):
        chat(lm, begun, continue_final_message=True, add_generation_prompt=True)
    documents = Text("mat", lm) | "sofa"
    grouped = chat(lm, [*MESSAGES, {"role": "assistant", "content": "a " + documents}], continue_final_message=True)
    assert grouped.segments[-3:] == ("<assistant>", "a ", *documents.segments)


def test_a_reply_goes_on_behind_its_ids(lm):
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    bias = [[[40], 1e4], [[end], 2e4]]
    reply = chat(lm, MESSAGES).generate(
        max_new_tokens=8, sequence_bias=bias, min_new_tokens=2, eos_token_id=end, suppress_tokens=None
    )
    assert reply.completion_tokens == (40, 40, end)
    messages = [*MESSAGES, {"role": "assistant", "content": reply}]
    assert chat(lm, messages, continue_final_message=True).tokens == reply.tokens[:-1]
    assert chat(lm, messages).tokens[: len(reply.tokens)] == reply.tokens


# Options


@pytest.mark.parametrize("option", ["tokenize", "return_dict", "return_tensors", "padding", "sanitize_control_tokens"])
def test_what_is_done_with_the_string_is_not_for_the_caller_to_say(lm, option):
    with pytest.raises(TokenizerError, match=rf"takes no {option}, .* chat\(lm, messages\).tokens are the ids"):
        chat(lm, MESSAGES, **{option: True})


def test_a_template_given_with_the_messages(lm):
    lm.tokenizer.chat_template = None
    assert chat(lm, MESSAGES, chat_template="{{ name }}: {{ messages[1].content }}", name="it").string == (
        "it: Where is the cat?"
    )


# Contents that are not one string


def test_documents_that_do_not_see_each_other_in_a_message(lm):
    """system - <user>Read: -+- Cats sleep. -+- What now?<|end|> - <assistant>
    +- Dogs run.   -+
    """
    documents = Text("Cats sleep.", lm) | Text("Dogs run.", lm) + Text.from_tokens([7], lm)
    content = ["Read:\n", documents, Text("\n") + "What now?"]
    messages = [MESSAGES[0], {"role": "user", "content": content}]
    text = chat(lm, messages)
    header, behind = Text("<system>Be kind.<|end|>\n", lm, add_special_tokens=False), "<|end|>\n"
    assert text == header + "<user>Read:\n" + documents + "\n" + "What now?" + behind + "<assistant>"
    frozen = chat(lm, [{"role": "user", "content": documents.frozen()}])
    expected = Text("<user>", lm, add_special_tokens=False) + documents.frozen() + behind + "<assistant>"
    assert frozen == expected
    assert evaluate([text, frozen])[0].logits.isfinite().all()


def _texts(lm):
    strings = st.sampled_from(["a", "b c", " d ", "\n"])
    plain = strings.map(lambda string: Text(string, lm))
    tokens = st.sampled_from([(40,), (41, 42)]).map(lambda ids: Text.from_tokens(ids, lm))
    groups = st.lists(plain | tokens, min_size=2, max_size=3).map(bp.parallel)
    return st.lists(strings | plain | tokens | groups, min_size=1, max_size=4)


@pytest.mark.filterwarnings("ignore:The chat template is not prefix-stable")
@pytest.mark.parametrize("template", [*CHAT_TEMPLATES.values(), TEMPLATE, FORGETFUL])
@settings(max_examples=20)
@given(drawn=st.data())
def test_its_string_is_the_templates_whatever_stands_in_it(template, drawn):
    lm, roles = an_lm("llama3_bpe"), ["user", "assistant", "user"]
    contents = [drawn.draw(_texts(lm)) for _ in roles]
    options = {"chat_template": template.replace("BOS", "bos_token"), "add_generation_prompt": True}
    joined = [sum(parts, Text("", lm)) for parts in contents]
    plain = [{"role": role, "content": text.string} for role, text in zip(roles, joined, strict=True)]
    messages = [{"role": role, "content": parts} for role, parts in zip(roles, contents, strict=True)]
    expected = lm.tokenizer.apply_chat_template(plain, tokenize=False, **options)
    is_stripped = "trim" in template and any(text.string != text.string.strip() for text in joined)
    has_groups = any(not isinstance(segment, str) for text in joined for segment in text.segments)
    if has_groups and (is_stripped or template == FORGETFUL):
        with contextlib.suppress(TokenizerError):  # the template may strip the string or leave the text out
            assert chat(lm, messages, **options).string == expected
        return
    text = chat(lm, messages, **options)
    assert text.string == expected
    for kept in (tuple, bp.text.segments.Group):
        given_ones = [part for text in joined for part in text.segments if isinstance(part, kept)]
        assert [part for part in text.segments if isinstance(part, kept)] == given_ones


def test_a_text_is_the_segments_that_it_has_and_a_reply_what_was_added(lm):
    reply = chat(lm, MESSAGES).generate(max_new_tokens=3, seed=1, temperature=2.0)
    chosen = (Text("a", lm) + "b").select(["yes", "no"])
    ids = Text.from_tokens([40, 41], lm)
    content = [Text("one, ") + "two: ", ids, reply, " and ", chosen]
    text = chat(lm, [{"role": "user", "content": content}])
    assert text.segments[:6] == (*("<user>", "one, ", "two: ", (40, 41), reply.completion_tokens, " and "),)
    assert text.segments[6:] == (chosen.completion_tokens, "<|end|>\n", "<assistant>")
    with pytest.raises(bp.MixedModelsError):
        chat(lm, [{"role": "user", "content": Text("a", LM(build("gpt2"), byte_level_bpe()))}])


# Replies and their end tokens


def chatml():
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|other_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATES["ChatML"].replace("BOS", "''")
    return LM(build("gpt2", vocab_size=len(tokenizer)), tokenizer)


@pytest.mark.parametrize("ends", [[], ["<|im_end|>"], ["<|im_end|>"] * 2, ["<|other_end|>"]], ids="-".join)
@pytest.mark.parametrize("rest", ["", "you"])
@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("has_more", [True, False])
def test_a_quoted_reply_brings_no_end_token_along(ends, rest, role, has_more):
    lm = chatml()
    ids = [*lm.session.completion_ids(["hello"])[0], *map(lm.tokenizer.convert_tokens_to_ids, ends)]
    reply = continue_as(GeneratedText, chat(lm, [QUESTION]), ids, lm, rest)
    contents = [[reply], [reply, " there"], ["You said: ", reply, ". Why?"], [{"type": "text", "text": reply}]]
    for content in contents[: 3 if role == "user" else 4]:
        plain = "".join(part if isinstance(part, str) else reply.completion for part in content)
        messages = [[QUESTION, {"role": role, "content": c}, *([QUESTION] * has_more)] for c in (content, plain)]
        if isinstance(content[0], dict):
            lm.tokenizer.chat_template = IN_PARTS
        assert chat(lm, messages[0]).string == chat(lm, messages[1]).string
    lm.tokenizer.chat_template = chatml().tokenizer.chat_template
    if not rest:
        messages = [[QUESTION, {"role": "assistant", "content": c}] for c in (reply, reply.completion)]
        assert chat(lm, messages[0]).string == chat(lm, messages[1]).string


def test_a_rest_behind_an_end_token_stays():
    lm = chatml()
    ids = [*lm.session.completion_ids(["hello"])[0], lm.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    reply = continue_as(GeneratedText, chat(lm, [QUESTION]), ids, lm, "you")
    messages = [QUESTION, {"role": "assistant", "content": reply}]
    assert chat(lm, messages).string == reply.string + "<|im_end|>\n"
    assert chat(lm, messages, continue_final_message=True).string == reply.string
    assert reply.string.endswith("hello<|im_end|>you")


def test_the_warning_shows_a_role_and_names_the_callers_line(lm):
    lm.tokenizer.chat_template = FORGETFUL
    said = {"role": "assistant\x1b[31m", "content": "Here."}
    with pytest.warns(UserWarning, match=r"\(assistant\\x1b\[31m\)") as caught:
        chat(lm, [QUESTION, said, QUESTION])
    assert caught[0].filename == __file__


def test_content_in_parts(lm):
    lm.tokenizer.chat_template = IN_PARTS
    parts = [{"type": "text", "text": "Read "}, {"type": "text", "text": "this. "}]
    messages = [MESSAGES[0], {"role": "user", "content": parts}]
    expected = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat(lm, messages).string == expected
    documents = Text("a", lm) | "b"
    mixed = [parts[0], {"type": "text", "text": documents}, "c", Text("d")]
    text = chat(lm, [{"role": "user", "content": mixed}])
    assert text.segments == ("<user>Read ", *documents.segments, "c", "d", "<|end|>\n", "<assistant>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE, "strings and writes the list of messages[0] as Python shows it"),
        (TEMPLATE.replace("m.content | trim", "'x' + m.content"), "refuses these messages: .* give a str"),
    ],
    ids=["shows it", "fails"],
)
def test_content_in_parts_for_a_template_of_strings(lm, template, message):
    lm.tokenizer.chat_template = template.replace(" | trim", "")
    with pytest.raises(TokenizerError, match=message.replace("[", r"\[")):
        chat(lm, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])


ALTERING = {
    "strips": ("m.content | trim", True),
    "repeats": ("m.content + m.content", False),
    "upper case": ("m.content | upper", False),
    "leaves out": ("'nothing'", False),
    "looks at it": ("m.content.split('.')[-1]", True),
    "refuses what is not there": (
        "m.content if m.role == 'system' or 'doc' in m.content else raise_exception('No.')",
        True,
    ),
}


@pytest.mark.parametrize(("written", "has_white_space"), ALTERING.values(), ids=ALTERING)
def test_a_template_that_alters_a_content_is_refused_what_it_cannot_show(lm, written, has_white_space):
    lm.tokenizer.chat_template = TEMPLATE.replace("m.content | trim", written)
    string = " no. doc " if has_white_space else "doc"
    ids = lm.tokenizer(string)["input_ids"]
    for text in (Text(string, lm) | "b", Text.from_tokens(ids, lm), Text(string, lm).frozen()):
        with pytest.raises(TokenizerError, match=r"does not write the content of messages\[1\], .*once and unchanged"):
            chat(lm, [MESSAGES[0], {"role": "user", "content": text}])
    plain = [MESSAGES[0], {"role": "user", "content": string + " x "}]
    as_text = [MESSAGES[0], {"role": "user", "content": Text(string) + " x "}]
    assert chat(lm, as_text).tokens == chat(lm, plain).tokens


def test_a_word_that_looks_like_a_placeholder(lm):
    ids = Text.from_tokens([40], lm)
    text = chat(lm, [{"role": "user", "content": ["Placeholder0x0y ", ids, " Placeholder1x"]}])
    assert text.segments == ("<user>Placeholder0x0y ", (40,), " Placeholder1x<|end|>\n", "<assistant>")


# Tokenizers that make ids of a conversation


class MistralLike(PreTrainedTokenizerFast):
    """The interface of MistralCommonBackend: no template, and control tokens that no string has."""

    def apply_chat_template(self, conversation, tools=None, continue_final_message=False, **options):
        assert options.pop("tokenize", True), "a string is not what the model was trained on"
        add_generation_prompt, return_dict = (
            options.pop("add_generation_prompt", False),
            options.pop("return_dict", True),
        )
        assert not options
        ends = conversation[-1]["role"] == "assistant" if conversation else None
        if ends is None or ends is not continue_final_message or (ends and add_generation_prompt):
            raise ValueError("Expected last role User.")
        ids = [self.bos_token_id]
        for idx, message in enumerate(conversation):
            content = message["content"]
            string = content if isinstance(content, str) else "".join(part["text"] for part in content)
            own = self(string, add_special_tokens=False)["input_ids"]
            is_open = continue_final_message and idx == len(conversation) - 1
            ids += [318, *own, 319] if message["role"] == "user" else own if is_open else [*own, self.eos_token_id]
        return {"input_ids": ids} if return_dict else ids

    def get_chat_template(self, *args, **kwargs):
        raise NotImplementedError


@pytest.fixture
def mistral_lm():
    tokenizer = sentencepiece_bpe()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return LM(build("gpt2"), MistralLike(tokenizer_object=tokenizer.backend_tokenizer, **special))


def test_a_tokenizer_that_makes_ids_of_a_conversation(mistral_lm):
    tokenizer = mistral_lm.tokenizer
    in_parts = {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "then?"}]}
    messages = [QUESTION, {"role": "assistant", "content": "Here."}, in_parts]
    text = chat(mistral_lm, messages)
    assert text.tokens == tuple(tokenizer.apply_chat_template(messages, return_dict=False))
    first = tuple(tokenizer.apply_chat_template(messages[:1], return_dict=False))
    assert text.segments == (first, text.tokens[len(first) :])
    opened = chat(mistral_lm, messages[:2], continue_final_message=True)
    assert opened.tokens == tuple(tokenizer.apply_chat_template(messages[:2], False, True, return_dict=False))
    assert chat(mistral_lm, [{"role": "user", "content": Text(QUESTION["content"])}]).tokens == first
    with pytest.raises(TokenizerError, match="refuses these messages: Expected last role User"):
        chat(mistral_lm, messages[:2])
    with pytest.raises(TokenizerError, match=r"MistralLike renders a conversation as token ids.* messages\[0\]"):
        chat(mistral_lm, [{"role": "user", "content": Text("a", mistral_lm) | "b"}])


def test_a_reply_stands_as_its_ids_among_those_of_a_conversation(mistral_lm):
    tokenizer = mistral_lm.tokenizer
    letters = [tokenizer.convert_tokens_to_ids(token) for token in ("▁", "t", "h", "e")]
    plain = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert plain != letters
    asked = chat(mistral_lm, [QUESTION])
    for ids in (letters, [*letters, tokenizer.eos_token_id]):
        reply = continue_as(GeneratedText, asked, ids, mistral_lm)
        more = chat(mistral_lm, [QUESTION, {"role": "assistant", "content": reply}, QUESTION])
        eos = () if ids[-1] == tokenizer.eos_token_id else (tokenizer.eos_token_id,)
        assert more.tokens == (*reply.tokens, *eos, *asked.tokens[1:])


def test_a_tokenizer_without_chat_template_or_a_way_of_its_own(lm):
    assert type(lm.tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    lm.tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        chat(lm, MESSAGES)
