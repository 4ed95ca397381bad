"""From texts to token ids: by default those of the whole string, whatever the places where it was put together."""

import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

import backprompt as bp
from backprompt import LM, Text
from backprompt.text.node import Segment
from backprompt.tokens.encoder import Encoder
from backprompt.tokens.tokenizer import PrivateTokenizer
from comparing import num_distinct
from tiny_models import build
from tiny_tokenizers import TOKENIZERS, TRAINING_LINES, byte_level_bpe, llama3_bpe, sentencepiece_bpe

# https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/tokenizer.json
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def with_parts(normalizer: Any = None, pre_tokenizer: Any = None, added_token: Any = None) -> PreTrainedTokenizerFast:
    """byte_level_bpe with another normalizer or pre-tokenizer, or one token more."""
    tokenizer = byte_level_bpe()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    if added_token is not None:
        tokenizer.add_tokens([added_token])
    return tokenizer


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def starcoder_like() -> PreTrainedTokenizerFast:
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    return with_parts(pre_tokenizer=pre_tokenizers.Sequence([digits, byte_level]))


CUTTABLE = {
    "byte_level_bpe": byte_level_bpe,
    "llama3_bpe": llama3_bpe,
    "qwen2_like": lambda: with_parts(normalizers.NFC(), split_by(_QWEN2_PATTERN)),
    "starcoder_like": starcoder_like,
    "added word": lambda: with_parts(added_token=AddedToken("cat")),
    "added single word": lambda: with_parts(added_token=AddedToken("the", single_word=True)),
    # Every string gets a space in front, and so does what follows a special token.
    "prefix space": lambda: with_parts(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "added mark": lambda: with_parts(added_token=AddedToken("<x>", lstrip=True, rstrip=True)),
}
NOT_CUTTABLE = {
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": TOKENIZERS["unigram"],
    "added words": lambda: with_parts(added_token=AddedToken("the cat")),
    "added word with its space": lambda: with_parts(added_token=AddedToken(" cat")),
    "swallows a space before": lambda: with_parts(added_token=AddedToken("cat", lstrip=True)),
    "swallows a space behind": lambda: with_parts(added_token=AddedToken("the", rstrip=True)),
    "unknown pattern": lambda: with_parts(pre_tokenizer=split_by(r"\w+ \w+")),
    "lower case": lambda: with_parts(normalizers.Lowercase()),
}
BUILDERS = {**CUTTABLE, **NOT_CUTTABLE}


class CharacterTokenizer(PreTrainedTokenizer):
    """Written in Python: a token a character, <s> in front, and none for what it does not know."""

    def __init__(self) -> None:
        self._ids = {character: idx for idx, character in enumerate(["<s>", "<unk>", *"abcdefghijklm ,."])}
        super().__init__(bos_token="<s>", unk_token="<unk>", special_tokens_pattern="bos")

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 1)

    def _convert_id_to_token(self, index: int) -> str:
        return dict(enumerate(self._ids)).get(index, "<unk>")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


# Without a backend; the first appends no second </s>, the second puts a second <s> in front.
IN_PYTHON = {"byt5": ByT5Tokenizer, "characters": CharacterTokenizer}

# Frequent beginnings and ends of test strings, and the messages of both libraries about them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:A text begins with:UserWarning"),
    pytest.mark.filterwarnings("ignore:This sequence already has </s>:UserWarning"),
]

FRAGMENTS = [
    *("'s", "'ll", "don't", " I'd've ", " can'T", "the", " cat", " a b c ", "the cat", "Kenobi", "re", "fund", "x"),
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "▁", ", ", "...", "1", "234", " 56"),
    *("é", "e\u0301", "\u0301", "\u200d", "\U0001f468\u200d\U0001f469", "👍🏽", "🏽", "🇫🇷", "東京は", " 日", "\ufffd"),
    *("<s>", "</s>", "<unk>", "<|endoftext|>", "<|begin_of_text|>", "<x>", " <x> "),
]
fragments = st.sampled_from(FRAGMENTS) | st.sampled_from(TRAINING_LINES) | st.text(max_size=4)
strings = st.lists(fragments, max_size=6).map("".join)
token_ids = st.lists(st.integers(0, 319), min_size=1, max_size=4).map(tuple)


def test_a_warning_names_the_line_that_caused_it():
    lm = LM(build("gpt2"), BUILDERS["llama3_bpe"]())
    bos = lm.tokenizer.bos_token
    for text in (Text(f"{bos}a", lm), Text(f"{bos}b", lm) + "c"):
        with pytest.warns(UserWarning, match="stands there twice") as caught:
            bp.evaluate(text)
        assert [warning.filename for warning in caught] == [__file__]


@st.composite
def cut_strings(draw) -> list[str]:
    """A string in pieces, cut anywhere: also inside words, emoji and pairs of spaces, and twice at one place."""
    string = draw(strings)
    cuts = sorted(draw(st.lists(st.integers(0, len(string)), max_size=5)))
    return [string[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(string)], strict=True)]


parts = cut_strings() | token_ids.map(lambda ids: [ids])
segment_lists = st.lists(parts, max_size=4).map(lambda drawn: [*chain(*drawn)])


# Expected ids, by hand


@cache
def plain(name: str) -> PreTrainedTokenizerFast:
    return {**BUILDERS, **IN_PYTHON}[name]()


@cache
def continuing(name: str) -> Tokenizer:
    """The tokenizer without its dummy prefix space."""
    backend = Tokenizer.from_str(plain(name).backend_tokenizer.to_str())
    if name == "sentencepiece_bpe":
        backend.normalizer = normalizers.Replace(" ", "▁")
    if name == "unigram":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    if name == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def string_ids(name: str, string: str, is_continuation: bool) -> list[int]:
    if is_continuation:
        return list(continuing(name).encode(string, add_special_tokens=False).ids)
    return plain(name)(string, add_special_tokens=False)["input_ids"]


def reference_ids(name: str, segments: Sequence[Segment], joins: str = "exact") -> tuple[int, ...]:
    """Strings side by side as one string (under "split": apart), later ones as continuations, special tokens."""
    runs: list[str | tuple[int, ...]] = []
    for segment in filter(len, segments):
        if joins == "exact" and runs and isinstance(runs[-1], str) and isinstance(segment, str):
            runs[-1] += segment
        else:
            runs.append(segment)
    ids: list[int] = []
    for idx, run in enumerate(runs):
        ids += string_ids(name, run, is_continuation=idx > 0) if isinstance(run, str) else run
    if runs and not isinstance(runs[0], str):
        return tuple(ids)
    bos = [plain(name).bos_token_id] if name in ("llama3_bpe", "sentencepiece_bpe") else []
    eos = [plain(name).eos_token_id] if name == "unigram" and all(isinstance(run, str) for run in runs) else []
    return tuple(bos + ids + eos)


@cache
def lm(name: str, **options: Any) -> LM:
    """An LM whose tokenizer no test changes."""
    return LM(_model(), plain(name), **options)


@cache
def _model():
    return build("gpt2")


def text_of(segments: Sequence[Segment], lm: LM) -> Text:
    texts = [Text(part, lm) if isinstance(part, str) else Text.from_tokens(part, lm) for part in segments]
    return sum(texts, Text("", lm))


# joins="exact"


@pytest.mark.parametrize("name", [*BUILDERS, *IN_PYTHON])
@given(pieces=cut_strings())
@example(pieces=["hello there<|endoftext|>", "you"])
@example(pieces=["\U0001f468", "\u200d", "\U0001f469", "e", "\u0301", " ", " x"])
@example(pieces=["", ""])
@example(pieces=["<|begin_of_text|>the", "<s>"])
@example(pieces=["<", "s>the", " cat</", "s>"])
@example(pieces=["the</s>", "</s>"])
@example(pieces=["<s>"])
@example(pieces=["</s>"])
def test_tokens_are_those_of_the_whole_string(name, pieces):
    """Also for strings that begin or end with special tokens that the tokenizer adds, too."""
    string, tokenizer = "".join(pieces), plain(name)
    text = text_of(pieces, lm(name))
    assert text.tokens == tuple(tokenizer(string)["input_ids"])
    bare = Text("", lm(name), add_special_tokens=False) + text
    assert bare.tokens == tuple(tokenizer(string, add_special_tokens=False)["input_ids"])
    assert bare.string == string


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    pool=st.lists(strings | token_ids, min_size=1, max_size=5),
    choices=st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=8),
    random=st.randoms(use_true_random=False),
)
def test_texts_that_share_beginnings_are_encoded_together_in_any_order(name, pool, choices, random):
    """/- pool[0] - pool[1]
    pool[2] -
            \\- pool[2] ...
    """
    texts = [text_of([pool[choice % len(pool)] for choice in path], lm(name)) for path in choices]
    expected = [reference_ids(name, text.segments) for text in texts]
    for _ in range(2):
        encoder = Encoder(PRIVATE[name], "exact", add_special_tokens=True)
        assert encoder.encode(texts) == expected
        shuffled = random.sample(range(len(texts)), len(texts))
        texts, expected = [texts[idx] for idx in shuffled], [expected[idx] for idx in shuffled]


PRIVATE = {name: PrivateTokenizer(builder()) for name, builder in BUILDERS.items()}


def word_level() -> PreTrainedTokenizerFast:
    """With the words out of order, and two kinds of added tokens that take turns."""
    words = [f"word{idx * 7 % 500}" for idx in range(500)]
    backend = Tokenizer(models.WordLevel({word: idx for idx, word in enumerate(words)}, unk_token="word0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for idx in range(6):
        token = AddedToken(f"<{idx}>", lstrip=idx % 3 == 0, single_word=idx % 2 == 0)
        tokenizer.add_tokens([token], special_tokens=idx % 2 == 1)
    return tokenizer


ALL_MODELS = {**TOKENIZERS, "word_level": word_level}


@pytest.mark.parametrize("name", {**BUILDERS, **ALL_MODELS})
def test_a_private_tokenizer_is_the_whole_of_it(name):
    """Around one model: its parts, and every token added, but not the padding and truncation of the last call."""
    tokenizer = {**BUILDERS, **ALL_MODELS}[name]()
    expected = json.loads(tokenizer.backend_tokenizer.to_str())
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding()
    private = PrivateTokenizer(tokenizer)
    assert json.loads(private.whole.to_str()) == expected
    continuing = json.loads(private.continuing.to_str())
    edited = {"normalizer", "pre_tokenizer", "post_processor"}
    assert {key for key in expected if continuing[key] != expected[key]} <= edited


FINGERPRINTS = """
import json
from backprompt.tokens.tokenizer import PrivateTokenizer
from test_tokens import ALL_MODELS
print(json.dumps({name: PrivateTokenizer(build()).fingerprint() for name, build in ALL_MODELS.items()}))
"""


def test_fingerprints_are_the_same_in_another_process():
    """Whose hashes of strings, and so the orders of vocabularies in memory, are others."""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "PYTHONHASHSEED": "1234"}
    command = [sys.executable, "-c", FINGERPRINTS]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    expected = {name: PrivateTokenizer(build()).fingerprint() for name, build in ALL_MODELS.items()}
    assert len(set(expected.values())) == 5
    assert json.loads(printed.splitlines()[-1]) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@given(pieces=cut_strings())
def test_without_special_tokens(name, pieces):
    string = "".join(pieces)
    tokens = text_of(pieces, lm(name, add_special_tokens=False)).tokens
    assert tokens == tuple(plain(name)(string, add_special_tokens=False)["input_ids"])


# Where a string can be cut


@pytest.mark.parametrize("name", CUTTABLE)
@given(
    start=strings, between=st.sampled_from(["e c", "the cat", "x y z", ": c", "4 c"]), end=strings, extension=strings
)
@example(start="", between="e c", end="<|endoftext|>x", extension="")
@example(start="", between="e c", end="<x> c", extension="")
def test_a_cut_changes_no_ids_whatever_follows(name, start, between, end, extension):
    private, string = PRIVATE[name], start + between + end
    cut = private.cut(string)
    assert cut > len(start)
    string += extension
    for is_continuation in (False, True):
        (whole,) = private.encode([string], is_continuation=is_continuation)
        (left,) = private.encode([string[:cut]], is_continuation=is_continuation)
        (right,) = private.encode([string[cut:]], is_continuation=is_continuation)
        assert whole == left + right


def test_no_cut_behind_a_token_that_swallows_the_space():
    assert PRIVATE["added mark"].cut("<x> cat") == 0 < PRIVATE["byte_level_bpe"].cut("<x> cat")
    normalized = AddedToken("x\u037e", rstrip=True, normalized=True)  # "x;" in NFC
    greek = with_parts(normalizers.NFC(), added_token=normalized)
    assert PrivateTokenizer(greek).cut("x; cat") == 0


@pytest.mark.parametrize("name", NOT_CUTTABLE)
def test_some_tokenizers_are_never_cut(name):
    assert [PRIVATE[name].cut(line) for line in TRAINING_LINES] == [0] * len(TRAINING_LINES)
    assert PRIVATE[name].cut("the cat sat on the mat") == 0


@pytest.mark.parametrize("name", CUTTABLE)
def test_encoding_leaves_passes_each_character_about_once(name):
    """1,000 leaves on 200 branches of one long prefix: 20 million characters in all their strings."""
    context = Text("a long context with words in it; " * 600, lm(name))
    branches = [context + f"and branch {branch_idx} of all of them " for branch_idx in range(200)]
    leaves = [f"has leaf {leaf_idx} on it" for leaf_idx in range(5)]
    distinct_strings = [context.string, *(branch.segments[-1] for branch in branches), *leaves * len(branches)]
    counting = CountingTokenizer(BUILDERS[name]())
    texts = [branch + leaf for branch in branches for leaf in leaves]
    Encoder(counting, "exact", add_special_tokens=True).encode(texts)
    assert len(context.string) < counting.num_characters <= 1.5 * sum(map(len, distinct_strings))


@pytest.mark.parametrize("name", CUTTABLE)
def test_completions_that_prompts_share_are_encoded_once(name):
    prompts = [f"the film was great.\nLabel {idx}:" for idx in range(10)]
    completions = [f" {letter} cat" for letter in "abcdefgh"]
    counting = CountingTokenizer(BUILDERS[name]())
    texts = [text + completion for text in map(Text, prompts) for completion in completions]
    Encoder(counting, "exact", add_special_tokens=True).encode(texts)
    assert counting.num_characters <= len("".join(prompts + completions))


class CountingTokenizer(PrivateTokenizer):
    num_characters = 0

    def encode(self, strings: Sequence[str], *, is_continuation: bool) -> list[tuple[int, ...]]:
        self.num_characters += sum(map(len, strings))
        return super().encode(strings, is_continuation=is_continuation)


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called, in Python or in C."""
    num_calls = 0

    def count(frame, event, argument):
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return num_calls


def peak_bytes_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cost", [calls_of, peak_bytes_of])
@pytest.mark.parametrize("segment", ["words and words ", "12, 3. "], ids=["cut", "nowhere to cut"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_chain_twice_as_long_costs_twice_as_much(name, segment, cost):
    encoder = Encoder(PRIVATE[name], "exact", add_special_tokens=True)
    short, long = (text_of([segment] * num_segments, lm(name)) for num_segments in (500, 1000))
    assert cost(lambda: encoder.encode([long])) < 2.5 * cost(lambda: encoder.encode([short]))


@pytest.mark.parametrize(
    "ask", [lambda lm, texts: lm.session.encoder.encode(texts), LM.evaluate], ids=["encode", "evaluate"]
)
def test_results_do_not_get_lost_when_an_equal_text_dies_meanwhile(ask, monkeypatch):
    """They are remembered for as long as a text lives; another thread may drop it at any moment."""
    asked = LM(_model(), byte_level_bpe())
    equal = [Text("remembered", asked)]
    assert equal[0].logits.isfinite().all()
    encode = asked.session.encoder.tokenizer.encode

    def encode_and_drop(strings, *, is_continuation):
        equal.clear()
        return encode(strings, is_continuation=is_continuation)

    monkeypatch.setattr(asked.session.encoder.tokenizer, "encode", encode_and_drop)
    assert len(ask(asked, [Text("remembered", asked), Text("new", asked)])) == 2
    assert equal == []


# Hard boundaries


@pytest.mark.parametrize("name", [*TOKENIZERS, "prefix space"])
@given(segments=segment_lists)
def test_token_ids_stay_as_they_are_and_strings_behind_them_are_continuations(name, segments):
    assert text_of(segments, lm(name)).tokens == reference_ids(name, segments)


@pytest.mark.parametrize("joins", ["exact", "split"])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(segments=segment_lists)
def test_a_beginning_has_its_ids_of_the_text_with_more_ids(name, joins, segments):
    model = lm(name, joins=joins)
    text = text_of(segments, model)
    followed = text + Text.from_tokens([5], model)
    assert model.session.encoder.encode_beginnings([text]) == [followed.tokens[:-1]]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ref_and_und_make_refund(name):
    """SentencePiece would put a dummy space before "und"."""
    ref = Text.from_tokens(string_ids(name, "ref", is_continuation=False), lm(name))
    assert plain(name).decode((ref + "und").tokens) == "refund"
    assert (ref + "und").string == "refund"
    assert (ref + " und").string == "ref und"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_around_ids(name):
    tokenizer, ids = plain(name), Text.from_tokens([7, 8], lm(name))
    assert ids.tokens == (ids + "").tokens == (Text("") + ids).tokens == (7, 8)
    assert (ids + "a").tokens == (7, 8, *string_ids(name, "a", is_continuation=True))
    with_eos = tuple(tokenizer("a")["input_ids"])
    assert (Text("a") + ids).tokens == (*with_eos[: -1 if name == "unigram" else None], 7, 8)


@pytest.mark.parametrize("name", ["llama3_bpe", "sentencepiece_bpe"])
def test_a_second_bos_is_warned_of(name):
    """The plain call puts one before a string that has one; `add_special_tokens=False` does not."""
    bos, tokenizer = plain(name).bos_token, plain(name)
    string = bos + "a cat"
    for cut in range(len(string)):
        an_lm = LM(_model(), tokenizer)
        with pytest.warns(UserWarning, match=f"begins with {re.escape(repr(bos))}, which the tokenizer also puts"):
            assert (Text(string[:cut], an_lm) + string[cut:]).tokens == tuple(tokenizer(string)["input_ids"])
        bare = Text(string[:cut], an_lm, add_special_tokens=False) + string[cut:]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert bare.tokens == tuple(tokenizer(string, add_special_tokens=False)["input_ids"])
            assert bare.tokens.count(tokenizer.bos_token_id) == 1
            assert ("a" + bare).tokens == ("a" + Text(string, an_lm)).tokens
            assert (bare + Text.from_tokens([7], an_lm)).tokens == (*bare.tokens, 7)
            assert (bare + Text.from_tokens([7], an_lm)).string.startswith(string)


@pytest.mark.parametrize("name", ["llama3_bpe", "sentencepiece_bpe", "unigram"])
def test_texts_of_one_string_with_and_without_special_tokens_are_told_apart(name):
    texts = [Text("the cat", lm(name)), Text("the cat", lm(name), add_special_tokens=False)]
    first, second = (text.tokens for text in texts)
    assert first == tuple(plain(name)("the cat")["input_ids"]) != second
    assert bp.explain(texts).tokens_distinct == num_distinct(texts)
    nodes = [data for _, data in bp.to_networkx(texts).nodes(data=True)]
    assert sum(node["num_own_tokens"] for node in nodes) == num_distinct(texts)
    assert len(nodes) == (1 if name == "unigram" else 2)  # which only appends something, as a longer text would
    verification = bp.verify(texts)
    assert verification.passed
    assert verification.num_tokens == len(first) + len(second)
    assert [[t.token_id for t in text.show(top=0).tokens] for text in texts] == [list(first), list(second)]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(string=st.sampled_from(["👍🏽 refund", "Zoë's", " two  spaces ", *TRAINING_LINES]), data=st.data())
@example(string="東👍", data=None)
def test_the_string_of_ids_is_what_they_decode_to_however_they_are_cut(name, string, data):
    """Also between the bytes of one character, as generating token by token does."""
    ids = string_ids(name, string, is_continuation=False)
    every_one = list(range(1, len(ids)))
    cuts = every_one if data is None else sorted(data.draw(st.sets(st.sampled_from([0, *every_one]), max_size=4)))
    segments = [tuple(ids[start:stop]) for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert text_of(segments, lm(name)).string == plain(name).decode(ids)


@pytest.mark.parametrize("name", ["byte_level_bpe", "llama3_bpe", "sentencepiece_bpe"])
@given(start=strings, middle=strings.filter(len), end=strings)
@example(start="\ufffd", middle="\ufffd", end="\ufffd")
@example(start="ref", middle=" ", end="und")
def test_ids_between_strings_add_their_own_string(name, start, middle, end):
    """Tokenizers that read back what they wrote; unigram loses characters."""
    ids = tuple(string_ids(name, middle, is_continuation=bool(start)))
    if name == "sentencepiece_bpe":
        middle = middle.replace("▁", " ")  # its own mark for a space
    assert text_of([start, ids, end], lm(name)).string == start + middle + end


# joins="split", joins="error", joins()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(segments=segment_lists)
def test_split_encodes_every_segment_on_its_own(name, segments):
    assert text_of(segments, lm(name, joins="split")).tokens == reference_ids(name, segments, joins="split")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(segments=segment_lists)
@example(segments=["x ", " ", "y"])
def test_error_refuses_exactly_what_exact_and_split_encode_differently(name, segments):
    exact, split = reference_ids(name, segments), reference_ids(name, segments, joins="split")
    text = text_of(segments, lm(name, joins="error"))
    if exact == split:
        assert text.tokens == exact
    else:
        first = text.joins()[0].segment_idx
        with pytest.raises(bp.JoinError, match=f"segment {first}: ") as raised:
            _ = text.tokens
        assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(segments=segment_lists)
@example(segments=["x ", " ", "y"])
def test_joins_names_each_place_where_tokens_change(name, segments):
    """None if the ids are those of "split": in "x " + " " + "y" the "y" takes apart what the spaces had become."""
    text = text_of(segments, lm(name))
    joins, expected = text.joins(), changed_joins(name, text.segments)
    assert [(join.segment_idx, join.left, join.right) for join in joins] == [place[:3] for place in expected]
    assert (joins == []) is (reference_ids(name, segments) == reference_ids(name, segments, joins="split"))
    for join, (*_, apart, joined) in zip(joins, expected, strict=True):
        taken, given = list(join.split_tokens), list(join.joined_tokens)
        starts = [start for start in range(len(apart) + 1) if apart[start : start + len(taken)] == taken]
        assert joined in [apart[:start] + given + apart[start + len(taken) :] for start in starts]
        assert taken[:1] != given[:1]
        assert taken[-1:] != given[-1:]


def changed_joins(name: str, segments: Sequence[Segment]) -> list[tuple[int, str, str, list[int], list[int]]]:
    """By hand, in each run of strings whose ids are not those of "split": where a string changes the ids so far.

    Returns the index of the join, the strings that meet there, and their ids apart and joined.
    """
    changed = []
    for is_string, group in groupby(enumerate(segments), key=lambda numbered: isinstance(numbered[1], str)):
        if not is_string:
            continue
        (start, so_far), *rest = group
        ids = split_ids = string_ids(name, so_far, is_continuation=start > 0)
        places = []
        for idx, string in rest:
            right = string_ids(name, string, is_continuation=True)
            joined = string_ids(name, so_far + string, is_continuation=start > 0)
            if joined != ids + right:
                places.append((idx, so_far, string, ids + right, joined))
            so_far, ids, split_ids = so_far + string, joined, split_ids + right
        changed += places if ids != split_ids else []
    return changed


def test_an_error_shows_the_join_and_its_tokens():
    text = Text("the sea", lm("byte_level_bpe", joins="error")) + "t"
    a, t, at = map(plain("byte_level_bpe").convert_tokens_to_ids, ["a", "t", "at"])
    assert text.joins() == [bp.Join(1, "the sea", "t", (a, t), (at,))]
    with pytest.raises(bp.JoinError, match=rf"1: \.\.\.'the sea' \+ 't': tokens \[{a}, {t}\] become \[{at}\]"):
        _ = text.tokens


@pytest.mark.parametrize("unknown", ["<unk>", "<s>", None])
def test_a_tokenizer_that_does_not_know_latin_letters(unknown):
    """Special tokens are found with a known string: an unknown character is a special token, or no token at all."""
    words = {token: idx for idx, token in enumerate(["<s>", "</s>", "<unk>", "日", "本"])}
    backend = Tokenizer(models.WordLevel(words, unk_token=unknown) if unknown else models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    options = {} if unknown is None else {"unk_token": unknown}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)
    a_text = Text("日", LM(_model(), tokenizer))
    assert (a_text + "本").tokens == tuple(tokenizer("日本")["input_ids"]) == (0, 3, 4, 1)
    assert (a_text + Text.from_tokens([4], a_text.lm)).tokens == (0, 3, 4)
    assert Text("a", a_text.lm).tokens == tuple(tokenizer("a")["input_ids"])


# Tokenizers without a backend


@pytest.mark.parametrize("name", IN_PYTHON)
@given(pieces=cut_strings(), ids=st.lists(st.integers(3, 9), max_size=2).map(tuple))
@example(pieces=["a</", "s>", "b"], ids=())
@example(pieces=["a<", "s>", "b"], ids=(5,))
def test_extents_of_a_tokenizer_in_python(name, pieces, ids):
    """A join is changed where the text before it has other ids alone."""
    tokenizer, text = plain(name), text_of([*pieces, ids], lm(name))
    (extents,) = lm(name).extents([text])
    assert [extent.segment for extent in extents] == list(text.segments)
    tokens = text.tokens
    covered = [token for extent in extents for token in tokens[extent.start : extent.stop]]
    assert covered == (list(tokens) if extents else [])
    so_far, joins = "", []
    for idx, (segment, extent) in enumerate(zip(text.segments, extents, strict=True)):
        if not isinstance(segment, str):
            assert tokens[extent.start : extent.stop] == ids
            continue
        left, joined = (tokenizer(s, add_special_tokens=False)["input_ids"] for s in (so_far, so_far + segment))
        is_changed = joined[: len(left)] != left
        assert extent.is_join_changed is is_changed
        joins += [(idx, so_far, segment)] if is_changed else []
        so_far += segment
    assert [(join.segment_idx, join.left, join.right) for join in text.joins()] == joins
    strict = text_of([*pieces, ids], lm(name, joins="error"))
    if joins:
        with pytest.raises(bp.JoinError, match=f"segment {joins[0][0]}: "):
            _ = strict.tokens
    else:
        assert strict.tokens == tokens


def test_what_a_changed_join_replaces_in_python():
    text = Text("a<", lm("characters")) + "s>b"
    a, less, bos, b = 2, 1, 0, 3
    assert text.tokens == (bos, a, bos, b)
    assert text.joins() == [bp.Join(1, "a<", "s>b", (less,), (bos, b))]
    (_, extent) = lm("characters").extents([text])[0]
    assert (extent.start, extent.replaced) == (2, (less,))


def test_looking_at_texts_of_a_tokenizer_in_python():
    """All that tells tokens apart by segments."""
    text = Text("abc", lm("characters")) + " de" + Text.from_tokens([5, 6], lm("characters"))
    assert bp.verify([text, Text("abc", text.lm)]).passed
    assert [node.stop - node.start for node in bp.verify(text).nodes] == [4, 3, 2]
    assert bp.explain([text, Text("abc", text.lm) + "d"]).tokens_distinct == 10
    assert [token.begins_segment for token in text.show().tokens].count(True) == 3
    assert [data["num_tokens"] for _, data in bp.to_networkx(text).nodes(data=True)] == [4, 3, 2]
    assert text.draw().source.count("label=") >= 3


def test_a_tokenizer_in_python_encodes_no_continuations():
    ids = Text.from_tokens([3, 4], lm("characters"))
    assert ((Text("ab") + ids).tokens, (Text("ab") + ids).string) == ((0, 2, 3, 3, 4), "abbc")
    for ask in (
        lambda: (ids + "a").tokens,
        lambda: (ids + "a").logits,
        lambda: (ids + "a" + "b").joins(),
        lambda: bp.verify(ids + "a"),
        lambda: lm("characters").extents([(Text("a") | "b") + ids + "a"]),
        lambda: (Text("a", lm("characters", joins="split")) + "b").tokens,
    ):
        with pytest.raises(bp.TokenizerError, match="CharacterTokenizer has no `tokenizers` backend"):
            ask()
    assert Text("ab", lm("characters", joins="split")).tokens == (0, 2, 3)


# Refusals


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_lone_surrogate_is_refused_before_anything_is_computed(name):
    asked, before = lm(name), lm(name).stats
    good, bad = Text("good", asked), Text("some good words and \ud83d", asked) + "\ude00"
    with pytest.raises(bp.TokenizerError, match=f"at character {bad.string.index(chr(0xD83D))}"):
        bp.evaluate([good, bad])
    assert (asked.stats - before).tokens_computed == 0


@pytest.mark.parametrize("token_ids", [[-1], [1 << 40]], ids=str)
def test_ids_that_no_tokenizer_has_cannot_be_decoded(token_ids):
    with pytest.raises((bp.TokenIdError, bp.TokenizerError)):
        _ = Text.from_tokens(token_ids, lm("byte_level_bpe")).string


def test_a_tokenizer_that_cannot_be_copied_is_refused():
    tokenizer = CharacterTokenizer()
    tokenizer.lock = threading.Lock()
    with pytest.raises(bp.TokenizerError, match=r"CharacterTokenizer cannot be copied \(TypeError.*__deepcopy__"):
        LM(_model(), tokenizer)


# The user's tokenizer is left as found, and looked at


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_is_left_as_found(name):
    """Padding on the left and truncation, which are states of a tokenizer, reach no text and stay as they are."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side = tokenizer.eos_token, "left", "left"
    tokenizer(["a b c d e f"], truncation=True, padding="max_length", max_length=4)
    before = (tokenizer.backend_tokenizer.to_str(), dict(vars(tokenizer)), tokenizer.init_kwargs.copy())
    assert '"max_length":4' in before[0]
    text = Text("a longer text than ", LM(_model(), tokenizer)) + "four tokens"
    assert text.tokens == tuple(plain(name)(text.string)["input_ids"])
    assert text.logits.isfinite().all()
    assert text.joins() == (Text("a longer text than ", lm(name)) + "four tokens").joins()
    assert (text + Text.from_tokens([5], text.lm)).string.startswith(text.string)
    assert (tokenizer.backend_tokenizer.to_str(), dict(vars(tokenizer)), tokenizer.init_kwargs) == before


def test_another_thread_may_truncate_with_the_tokenizer_meanwhile():
    tokenizer, num_calls, stopped, wrong = byte_level_bpe(), 0, threading.Event(), []
    tokenizer.pad_token = tokenizer.eos_token
    strings = ["a long string for a thread to work on while others work too"] * 20

    def truncate() -> None:
        nonlocal num_calls
        while not stopped.is_set():
            truncated = tokenizer(strings, truncation=True, padding="max_length", max_length=3)["input_ids"]
            wrong.extend(ids for ids in truncated if len(ids) != 3)
            num_calls += 1

    thread = threading.Thread(target=truncate)
    thread.start()
    try:
        for idx in range(300):
            if idx % 50 == 0:
                asked = LM(_model(), tokenizer)
            text = Text(f"text {idx} is not truncated", asked) + " by anybody"
            assert text.tokens == tuple(plain("byte_level_bpe")(text.string)["input_ids"])
    finally:
        stopped.set()
        thread.join()
    assert num_calls > 5
    assert wrong == []


def without_merge(tokenizer: PreTrainedTokenizerFast, *merge: str) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(kept) for kept in model["merges"] if tuple(kept) != merge]
    assert len(merges) == len(model["merges"]) - 1
    tokenizer.backend_tokenizer.model = models.BPE(vocab=model["vocab"], merges=merges)


def with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )


CHANGES = {
    "merge": lambda tokenizer: without_merge(tokenizer, "r", "e"),
    "added token": lambda tokenizer: tokenizer.add_tokens(["thing"]),
    "post-processor": with_eos,
    "normalizer": lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    "pre-tokenizer": lambda tokenizer: setattr(
        tokenizer.backend_tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "special tokens as text": lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_tokenizer_is_noticed(change):
    tokenizer = byte_level_bpe()
    text = Text("The thing i", LM(_model(), tokenizer)) + "s red<|endoftext|>"
    tokens, fingerprint = text.tokens, text.lm.fingerprint
    change(tokenizer)
    assert text.tokens == tuple(tokenizer(text.string)["input_ids"]) != tokens
    assert text.lm.fingerprint != fingerprint


def test_refresh_finds_a_change_that_a_quick_look_does_not_see():
    """`refresh` promises to hash every weight and the tokenizer."""
    tokenizer = byte_level_bpe()
    text = Text("the cat", LM(_model(), tokenizer))
    tokens, fingerprint = text.tokens, text.lm.fingerprint
    without_merge(tokenizer, "Ġ", "c")
    text.lm.refresh()
    assert text.tokens == tuple(tokenizer(text.string)["input_ids"]) != tokens
    assert text.lm.fingerprint != fingerprint
