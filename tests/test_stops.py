"""Stop strings: looked for in what is generated, left out, and never streamed, however the string falls into tokens."""

from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from backprompt import LM, GenerationError, Text, TextTypeError, TokenizerError, chat, generate
from backprompt.generation.continued import ContinuedText, continue_as
from backprompt.generation.stops import Cut, StopStrings
from backprompt.tokens.decoded import Decoder
from backprompt.tokens.tokenizer import added
from reference import generated_by_transformers
from tiny_models import FAMILIES, build
from tiny_tokenizers import TOKENIZERS, byte_level_bpe, llama3_bpe, sentencepiece_bpe, unigram

NEW = 12
PROMPTS = ["The cat sat on the", "Question:\n", "naïve 東京 ", "The cat the cat the"]
WAYS = {
    "greedy": {},
    "sampled": {"temperature": 2.0, "seed": 1, "top_k": 0},
    "ahead": {"prompt_lookup_num_tokens": 5},
}


@pytest.fixture(scope="module")
def lms():
    return {name: LM(FAMILIES["gpt2"](), make()) for name, make in TOKENIZERS.items()}


@pytest.fixture
def lm(lms):
    return lms["byte_level_bpe"]


def theirs(lm, text, **options):
    return generated_by_transformers(lm.model, text.tokens, tokenizer=lm.tokenizer, **options)


def forced(lm, string):
    """Options with which the model generates these tokens and no others, in this order."""
    ids = lm.session.private_tokenizer.encode([string], is_continuation=True)[0]
    biases = [[[token_id], 1e4] for token_id in ids[:1]]
    biases += [[list(ids[:stop]), 1e4 * 10**stop] for stop in range(2, len(ids) + 1)]
    return {"max_new_tokens": len(ids), "sequence_bias": biases}


def cut_by_hand(whole, stops, include_stop):
    """The kept part of a completion, and the tokens it took: the first complete stop string counts, the longest."""
    for num in range(1, len(whole.completion_tokens) + 1):
        string = continue_as(ContinuedText, whole.prompt, whole.completion_tokens[:num], whole.lm).completion
        ends = [(string.index(stop) + len(stop), -len(stop)) for stop in stops if stop in string]
        if ends:
            end, minus_length = min(ends)
            return string[: end if include_stop else end + minus_length], num
    return whole.completion, len(whole.completion_tokens)


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_a_completion_is_cut_at_the_first_stop_string(lms, data):
    lm = lms[data.draw(st.sampled_from(list(lms)))]
    text = Text(data.draw(st.sampled_from(PROMPTS)), lm)
    options = {"max_new_tokens": NEW, **WAYS[data.draw(st.sampled_from(list(WAYS)))]}
    if "seed" in options:
        options["seed"] = data.draw(st.integers(0, 50))
    whole = text.generate(**options)
    stops = []
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(0, len(whole.completion) - 1)))
        stops.append(whole.completion[start : start + data.draw(st.integers(1, 4))] or "x")
    stops = [stop for stop in stops if "\N{REPLACEMENT CHARACTER}" not in stop] or ["zz"]
    include_stop = data.draw(st.booleans())
    options |= {"stop": stops, "include_stop": include_stop}
    expected, num_tokens = cut_by_hand(whole, stops, include_stop)

    found = text.generate(**options)
    assert found.completion == expected
    assert found.finish_reason == ("stop" if any(stop in whole.completion for stop in stops) else "length")
    num_kept = len(found.completion_tokens)
    assert num_tokens - max(map(len, stops)) - 4 <= num_kept <= num_tokens
    assert found.completion_tokens == whole.completion_tokens[:num_kept]
    assert torch.equal(found.completion_logprobs, whole.completion_logprobs[:num_kept])
    rest = found.completion[len(continue_as(ContinuedText, text, found.completion_tokens, lm).completion) :]
    assert found == text + Text.from_tokens(found.completion_tokens, lm) + rest
    if not set(found.completion_tokens) & set(lm.tokenizer.all_special_ids):  # they stand in the string
        assert found.string == text.string + found.completion

    with text.stream(**options) as stream:
        so_far = ""
        for piece in stream:
            so_far += piece
            assert expected.startswith(so_far)
    assert so_far == expected
    assert stream.text == found


def test_what_stands_in_the_prompt_does_not_count(lm):
    """Except for transformers' own option, which searches the prompt and keeps the stop string."""
    text = Text("Answer:\n", lm)
    options = forced(lm, "\n\n\n\n")
    options["sequence_bias"] = options["sequence_bias"][:1]
    for stop, num in (("\n", 0), ("\n\n", 0), ("\n\n\n", 0), ("\n" * 5, 4)):
        assert text.generate(**options, stop=stop).completion == "\n" * num
    found = text.generate(**options, stop="\n\n", include_stop=True)
    assert (found.completion, len(found.completion_tokens), found.finish_reason) == ("\n\n", 2, "stop")
    assert text.generate(**options, stop=":\n").finish_reason == "length"
    own = text.generate(**options, stop_strings=["\n\n"])
    assert (own.completion, own.finish_reason) == ("\n", "stop")
    assert own.completion_tokens == theirs(lm, text, **options, stop_strings=["\n\n"])
    assert text.generate(**options, stop="\n", stop_strings=["\n\n\n"]).completion == ""


def test_transformers_own_stop_strings_in_the_models_configuration_count(tokenizer):
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    text = Text(PROMPTS[0], lm)
    stop = text.generate(max_new_tokens=NEW).completion[4:6]
    model.generation_config.stop_strings = [stop]
    found = text.generate(max_new_tokens=NEW)
    assert (found.completion_tokens, found.finish_reason) == (theirs(lm, text, max_new_tokens=NEW), "stop")
    assert stop in found.completion


def test_a_stop_string_ends_where_that_of_transformers_does(lm):
    for num_beams in (1, 3):
        text = Text(PROMPTS[0], lm)
        whole = text.generate(max_new_tokens=NEW, num_beams=num_beams)
        stop = lm.tokenizer.decode(whole.completion_tokens[6:8])
        options = {"max_new_tokens": NEW, "num_beams": num_beams}
        expected = theirs(lm, text, **options, stop_strings=[stop])
        found = text.generate(**options, stop=stop, include_stop=True)
        assert (found.completion_tokens, found.finish_reason) == (expected, "stop")
        left_out = text.generate(**options, stop=stop)
        assert left_out.completion + stop == found.completion
        assert left_out.finish_reason == "stop"
        assert found.completion_tokens[: len(left_out.completion_tokens)] == left_out.completion_tokens


def test_a_stop_string_within_tokens(lm):
    """Of " cat", " the", " mat" the tokens before the one stay in which the stop string begins."""
    prompt, string = Text("The", lm), " cat the mat"
    options = forced(lm, string)
    whole = prompt.generate(**options)
    assert whole.completion == string
    found = prompt.generate(**options, stop="e mat")
    assert found.completion == " cat th"
    kept = found.completion_tokens
    assert kept == whole.completion_tokens[: len(kept)]
    assert lm.tokenizer.decode(kept) == " cat"
    assert found.segments == ("The", kept, " th")
    assert found.tokens == prompt.tokens + kept + lm.session.private_tokenizer.encode([" th"], is_continuation=True)[0]
    assert (found + "e mat").tokens == whole.tokens
    computed = lm.stats.tokens_computed
    _ = (found + "e").logits
    assert lm.stats.tokens_computed == computed  # keys and values of what was cut off are kept


def test_the_first_to_be_complete_counts_and_of_several_the_longest(lm):
    prompt = Text("The", lm)
    options = forced(lm, " cat the mat")
    complete = partial(prompt.generate, **options)
    assert complete(stop=["at the m", "t t"]).completion == " ca"
    assert complete(stop=["t t", "at t", "the"]).completion == " c"
    assert complete(stop=["t t", "at t", "the"], include_stop=True).completion == " cat t"
    assert lm.tokenizer.decode(prompt.generate(**options).completion_tokens[:1]) == " cat"
    assert complete(stop=["cat", "a"]).completion == " c"  # within one token, too
    assert complete(stop={"zz", "mat"}).completion == " cat the "
    assert complete(stop=[]).completion == complete(stop=None).completion == " cat the mat"


def test_special_tokens_stand_in_no_stop_string_but_may_be_one():
    tokenizer = llama3_bpe()
    ids = partial(tokenizer.encode, add_special_tokens=False)
    end = tokenizer.eos_token_id
    given = [*ids("The ca"), end, *ids("t sat")]
    cut = lambda *stops, **more: StopStrings(stops, tokenizer, **more).cut(ids("See"), given)  # noqa: E731
    num_before = len(ids("The ca"))
    assert cut("<|end_of_text|>") == Cut(num_before, "")
    assert cut("<|end_of_text|>", include_stop=True) == Cut(num_before + 1, "")
    assert cut("of_text") is None
    assert cut("cat sat").rest == " " or cut("cat sat").num_tokens < num_before
    assert cut("a<|end_of_text|>t ").num_tokens < num_before
    assert cut("cat<|end_of_text|>") is None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_a_stop_string_may_begin_with_is_held_back(name):
    stops = StopStrings(["\n\n", "the end"], TOKENIZERS[name]())
    for string, expected in (
        ("a\n", "a"),
        ("a\nt", "a\n"),
        ("in the en", "in "),
        ("in the ant", "in the an"),
        ("", ""),
    ):
        assert stops.decided(string) == expected
    assert StopStrings(["\n\n"], TOKENIZERS[name](), include_stop=True).decided("a\n") == "a\n"
    end = TOKENIZERS[name]().eos_token
    assert StopStrings([f"a{end}b c"], TOKENIZERS[name]()).decided("cab ") == "c"
    assert StopStrings([f"a{end}b c"], TOKENIZERS[name]()).decided("ca" + end[:2]) == "c"


def test_a_space_that_sentencepiece_drops_counts_as_generated(lms):
    lm = lms["sentencepiece_bpe"]
    prompt = Text("the", lm)
    options = {"max_new_tokens": 2, "sequence_bias": [[[lm.tokenizer.convert_tokens_to_ids("▁the")], 1e4]]}
    assert prompt.generate(**options).completion == " the the"
    assert prompt.generate(**options, stop=" t").completion == ""
    assert prompt.generate(**options, stop=" t", include_stop=True).completion == " t"


def test_bytes_are_searched_as_they_come(lms):
    """A line break is a byte token, which the next one could make part of something else."""
    lm = lms["sentencepiece_bpe"]
    newline = lm.tokenizer.convert_tokens_to_ids("<0x0A>")
    found = Text("the", lm).generate(max_new_tokens=3, sequence_bias=[[[newline], 1e4]], stop="\n")
    assert (found.completion, found.completion_tokens, found.finish_reason) == ("", (), "stop")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tokens_one_at_a_time_have_the_string_of_all_of_them(lms, data):
    """Any ids behind any others, also of a tokenizer in Python whose tokens are bytes; the settled string stays."""
    tokenizer = data.draw(st.sampled_from([*(lm.tokenizer for lm in lms.values()), ByT5Tokenizer()]))
    strings = ["a€b", "naïve 東京", "\n", "the cat", "🤝🏽"]
    some = tokenizer.encode(
        "".join(data.draw(st.lists(st.sampled_from(strings), max_size=4))), add_special_tokens=False
    )
    some += data.draw(st.lists(st.integers(3, 250), max_size=6))
    start = data.draw(st.integers(0, len(some)))
    before = tokenizer.decode(some[:start], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    decoder = Decoder(tokenizer)
    decoded = decoder.begin(some[:start])
    for num in range(start + 1, len(some) + 1):
        settled = decoded.settled
        decoded = decoder.with_token(decoded, some[num - 1])
        whole = tokenizer.decode(some[:num], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert decoded.string == added(before, whole)
        assert decoded.settled.startswith(settled)


def test_ids_that_a_tokenizer_in_python_lacks_have_no_string():
    """The embedding has more rows than there are tokens, as some models have."""
    tokenizer = ByT5Tokenizer()
    first = len(tokenizer)
    lm = LM(build("gpt2", vocab_size=first + 8), tokenizer)
    prompt = Text("ab", lm)
    some = [*tokenizer.encode("x€", add_special_tokens=False), tokenizer.convert_tokens_to_ids("<extra_id_7>")]
    ids = [token_id for known in some for token_id in (first, known, first + 7)]
    assert (prompt + Text.from_tokens(ids, lm)).string.removesuffix("</s>") == "abx€<extra_id_7>"
    biased = {"sequence_bias": [[[first + number], 1e4] for number in range(8)]}
    for options in ({}, {"stop": "zq"}):
        found = prompt.generate(max_new_tokens=6, do_sample=True, seed=1, **biased, **options)
        assert found.completion == ""
        assert min(found.completion_tokens) >= first
    assert "".join(prompt.stream(max_new_tokens=6, do_sample=True, seed=1, **biased)) == ""
    shown = (prompt + found.completion_text).show(top=9)
    assert [token.string for token in shown.tokens if token.token_id >= first] == [""] * 6
    decoder = Decoder(tokenizer)
    decoded = decoder.begin([first])
    for token_id in ids:
        decoded = decoder.with_token(decoded, token_id)
    assert decoded.string == "x€<extra_id_7>"


def test_a_character_that_the_prompt_begins_is_generated(lm):
    ids = Text("a€b", lm).tokens
    prompt = Text.from_tokens(ids[:3], lm)
    options = {"max_new_tokens": 2, "sequence_bias": [[[ids[3]], 1e4]]}
    assert prompt.generate(**options).completion.startswith("€")
    assert prompt.generate(**options, stop="€").completion == ""


def test_an_end_token_that_is_a_stop_string_is_left_out(lm):
    end = Text("!", lm).tokens[0]
    options = {"max_new_tokens": 3, "sequence_bias": [[[end], 1e4]], "eos_token_id": end}
    found = Text("The", lm).generate(**options)
    assert (found.completion, found.finish_reason) == ("!", "eos")
    found = Text("The", lm).generate(**options, stop="!")
    assert (found.completion, found.finish_reason) == ("", "stop")


def test_samples_with_stop_strings_do_not_depend_on_what_else_is_generated(lm):
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    options = {"max_new_tokens": NEW, "temperature": 2.0, "seed": 3, "n": 3, "stop": ["e", "a"]}
    together = generate(texts, **options)
    assert together == [generate(text, **options) for text in texts]
    assert {found.finish_reason for row in together for found in row} == {"stop", "length"}
    assert not any(stop in found.completion for row in together for found in row for stop in options["stop"])


def test_a_reply_that_was_cut_stands_in_a_chat_as_it_is(lm, monkeypatch):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(lm.tokenizer, "chat_template", template, raising=False)
    reply = Text("The", lm).generate(**forced(lm, " cat the mat"), stop="e mat")
    conversation = chat(lm, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}])
    assert conversation.string == "[user]Hi\n[assistant] cat th\n"
    assert reply.completion_tokens in conversation.segments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ""}, "stop must be strings that are not empty, not ''"),
        ({"stop": ["a", ""]}, "stop must be strings that are not empty, not ''"),
        ({"stop": [3]}, "stop must be strings that are not empty, not 3"),
        ({"stop": 3}, "stop must be a string or several in a list, not int: 3"),
        ({"stop": b"x"}, "stop must be a string or several in a list, not the bytes"),
        ({"stop": {"a": 1}}, "stop must be a string or several in a list, not a mapping .dict."),
        ({"stop": "\ud83d"}, r"A stop string, '\\ud83d', holds a lone surrogate"),
        ({"stop": "x", "include_stop": "no"}, "include_stop must be True or False, not 'no'"),
        ({"stop_strings": [3]}, "stop_strings must be strings that are not empty, not 3"),
        ({"stop_strings": b"x"}, "stop_strings must be a string or several in a list, not the bytes"),
        ({"stop_strings": ""}, "stop_strings must be strings that are not empty"),
    ],
    ids=str,
)
def test_what_is_no_stop_string(lm, options, message):
    before = lm.stats
    for begin in (Text("The", lm).generate, Text("The", lm).stream):
        with pytest.raises((GenerationError, TextTypeError, TokenizerError), match=message):
            begin(max_new_tokens=3, **options)
    assert lm.stats == before


def test_stop_strings_that_no_token_can_spell_are_refused(lms):
    lm = lms["unigram"]
    text = Text("The cat", lm)
    for option in ("stop", "stop_strings"):
        with pytest.raises(
            GenerationError, match=r"^The stop string '☃' has characters without tokens in the tokenizer's vocabulary"
        ):
            text.generate(max_new_tokens=3, **{option: ["cat", "\u2603"]})
    text.generate(max_new_tokens=3, stop=["cat", lm.tokenizer.unk_token, "a\u0301"[:1]])


@pytest.mark.parametrize("make_tokenizer", [byte_level_bpe, sentencepiece_bpe, llama3_bpe])
def test_bytes_spell_any_stop_string(make_tokenizer):
    assert StopStrings(["☃\r\n", "e\u0301", " ", "\t"], make_tokenizer()).strings


def test_a_stop_string_within_a_token_is_not_refused():
    tokenizer = unigram()
    lm = LM(FAMILIES["gpt2"](), tokenizer)
    piece, token_id = next(item for item in tokenizer.get_vocab().items() if len(item[0]) > 3 and item[0].isalpha())
    options = {"max_new_tokens": 3, "sequence_bias": [[[token_id], 1e4]]}
    found = Text("The cat", lm).generate(**options, stop=piece[1:])
    assert (found.completion, found.completion_tokens, found.finish_reason) == (piece[:1], (), "stop")
