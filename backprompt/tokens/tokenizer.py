"""A private copy of the user's tokenizer, and facts about it.

Whole strings are encoded exactly as the user's tokenizer does. Composing texts also needs two operations that the
tokenizer's interface lacks: encoding a string as a *continuation* (no special tokens, no dummy prefix space), and
finding a place to cut a string so that its halves, encoded apart, give the ids of the whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from backprompt.arguments import check_encodable
from backprompt.errors import TokenIdError, TokenizerError

# Splitting patterns in which no alternative matches a visible character followed by a space, no alternative looks
# behind, and a run of letters takes at most one space, the one before it. So " " between a visible ASCII character and
# an ASCII letter is always a boundary.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_CUTTABLE_PATTERNS = frozenset({_GPT2_PATTERN, _LLAMA3_PATTERN, _QWEN2_PATTERN})
_VISIBLE = frozenset(map(chr, range(ord("!"), ord("~") + 1)))

_SAMPLE = "It's 7 o'clock:  Zoë's naïve   “test”\n\n#42 , don't\tre-fund 1234567 🤝🏽 日本 x"
"""A string whose ids reveal changes of a tokenizer; it exercises many rules and merges."""


class EncodesStrings(Protocol):
    """The operations on a tokenizer that encoding needs."""

    encodes_continuations: bool

    def encode(self, strings: Sequence[str], *, is_continuation: bool) -> list[tuple[int, ...]]:
        """Return the ids of each string, without special tokens."""
        ...

    def special_ids_around(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the special tokens before and behind a string with these ids (without special tokens)."""
        ...

    def cut(self, string: str, start: int = 0) -> int:
        """Return a place from `start` on at which a cut does not change the string's ids, or 0."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the string of the ids."""
        ...


class Speller:
    """Decodes ids with a tokenizer of transformers, and leaves out ids that the tokenizer lacks.

    A model may have more embeddings than its tokenizer has tokens. A `tokenizers` backend leaves such ids out by
    itself; tokenizers in Python decode them to arbitrary strings, or raise.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._has_backend = isinstance(getattr(tokenizer, "backend_tokenizer", None), Backend)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the string of ids, including special tokens, without cleanup."""
        decoded: str = self._tokenizer.decode(
            self.known(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return decoded

    def known(self, token_ids: Iterable[int]) -> list[int]:
        """Return the ids without those that a tokenizer in Python lacks."""
        return [token_id for token_id in token_ids if not self.lacks(token_id)]

    def lacks(self, token_id: int) -> bool:
        """Return whether a tokenizer in Python lacks this id; False for a backend."""
        if self._has_backend or token_id < getattr(self._tokenizer, "vocab_size", 0):
            return False
        return token_id not in self._other_ids

    @cached_property
    def _other_ids(self) -> frozenset[int]:
        """Ids of added tokens and of others not counted by `vocab_size`."""
        return frozenset(self._tokenizer.get_vocab().values())


def _copied(tokenizer: Any) -> Any:
    try:
        return copy.deepcopy(tokenizer)
    except Exception as error:  # from the class's own code, or from an object that it holds
        raise TokenizerError(
            f"{type(tokenizer).__name__} cannot be copied ({type(error).__name__}: {error}), but texts are encoded "
            "with a private copy. The tokenizer probably holds a module, a lock or an open file: give its class a "
            "method __deepcopy__, or a __getstate__ that leaves this object out."
        ) from error


class PrivateTokenizer:
    """A copy of `tokenizer` that no other code changes or locks.

    Attributes:
        encodes_continuations: whether strings can be encoded as continuations of other text. A tokenizer written in
            Python, without a `tokenizers` backend, cannot do so.
        whole: the copy of the backend, or None.
        continuing: the copy that encodes continuations, or None.

    Raises:
        TokenizerError: `tokenizer` is not a tokenizer of transformers, or cannot be copied.

    """

    def __init__(self, tokenizer: Any) -> None:
        if not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise TokenizerError(
                f"An LM needs a tokenizer of transformers, not {type(tokenizer).__name__}. "
                "Load one with AutoTokenizer.from_pretrained(...)."
            )
        self._original = tokenizer
        self._fingerprint: str | None = None
        self._private: Any = _copied(tokenizer)
        self._speller = Speller(self._private)
        words = _sample_words(tokenizer)
        self._state = _quick_state(tokenizer, words)
        self._looked_at = _to_look_at(tokenizer, words)
        self._seen = _quick_state(tokenizer, self._looked_at)
        self.whole: Backend | None = None
        self._backend: Backend | None = None
        self.continuing: Backend | None = None
        backend = getattr(self._private, "backend_tokenizer", None)
        if isinstance(backend, Backend):
            self.whole = _make_backend(backend, tokenizer, is_continuation=False)
            self.continuing = _make_backend(backend, tokenizer, is_continuation=True)
            if list(self.whole.encode(_SAMPLE, add_special_tokens=False).ids) == self._call([_SAMPLE])[0]:
                self._backend = self.whole  # else the tokenizer changes ids outside its backend
        self.encodes_continuations = self.continuing is not None
        self._before_cuts = frozenset() if self._backend is None else _characters_before_cuts(self._backend)
        self._special_ids = self._special_ids_around_a_string()

    def encode(self, strings: Sequence[str], *, is_continuation: bool) -> list[tuple[int, ...]]:
        """Return the ids of each string, without special tokens around the string.

        Raises:
            TokenizerError: a string holds a lone surrogate, or is a continuation for a tokenizer without a backend.

        """
        for string in strings:
            check_encodable(string, "A string")
        backend = self.continuing if is_continuation else self._backend
        if backend is not None:
            return [tuple(encoding.ids) for encoding in backend.encode_batch_fast(strings, add_special_tokens=False)]
        if is_continuation:
            raise TokenizerError(
                f"{type(self._original).__name__} has no `tokenizers` backend, so it encodes only whole strings from "
                "the beginning of a text. A string behind token ids or a group, a segment under joins='split', or a "
                "completion without a space before it needs a tokenizer with a backend. Use the fast version of the "
                "tokenizer, or end_of_prompt=' ', or give the string as ids: "
                "Text.from_tokens(tokenizer(string, add_special_tokens=False).input_ids, lm)."
            )
        return [tuple(ids) for ids in self._call(list(strings))]

    def special_ids_around(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the special tokens before and behind a string with these ids (without special tokens).

        A backend puts the same tokens around every string. A tokenizer in Python may look at the ids first: ByT5's
        tokenizer appends no second end token.

        Raises:
            TokenizerError: the tokenizer changes the string's own tokens.

        """
        if self.whole is not None or not ids or not hasattr(self._private, "build_inputs_with_special_tokens"):
            return self._special_ids
        with_special = tuple(self._private.build_inputs_with_special_tokens(list(ids)))
        return self._around(ids, with_special, (len(self._special_ids[0]), *range(len(with_special) + 1)))

    def cut(self, string: str, start: int = 0) -> int:
        """Return the last place from `start` on at which a cut changes no id, whatever follows `string`; or 0.

        The ids of the whole are those of `string[:cut]` followed by those of `string[cut:]`. Such a place is a space
        between a visible ASCII character and an ASCII letter, for byte-level BPE with one of the known splitting
        patterns.
        """
        if not self._before_cuts:
            return 0
        end = len(string) - 1
        while (end := string.rfind(" ", max(start, 1), end)) > 0:
            after = string[end + 1]
            if string[end - 1] in self._before_cuts and after.isascii() and after.isalpha():
                return end
        return 0

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the string of `token_ids`, including special tokens, without cleanup; see `Speller`.

        Raises:
            TokenIdError: an id is negative or beyond all vocabularies.

        """
        for token_id in token_ids:
            if not 0 <= token_id < 1 << 32:
                raise TokenIdError(f"{token_id} is not a token id. Token ids are whole numbers from 0 to 2**32 - 1.")
        return self._speller.decode(token_ids)

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        """The strings that stand for one token each and need no space behind them.

        These are the special tokens, and added tokens that are not words, such as `<think>`. An added token that ends
        in a letter or a digit is separated from the next word like any word.
        """
        is_split = getattr(self._private, "split_special_tokens", False)
        special = self._private.all_special_tokens
        added: Iterable[str] = getattr(
            self._private, "get_added_vocab", tuple
        )()  # mistral_common's method returns no strings
        return tuple(
            token for token in added if token and (not is_split if token in special else not token[-1].isalnum())
        )

    def encoder_of_plain_strings(self) -> Backend:
        """Return a new backend that encodes continuations, and the names of special tokens as ordinary characters."""
        assert self.whole is not None, "a tokenizer in Python has no backend"
        backend = _make_backend(self.whole, self._private, is_continuation=True)
        backend.encode_special_tokens = True
        return backend

    def has_changed(self) -> bool:
        """Return whether the user's tokenizer differs from this copy, as far as a quick check can tell."""
        return _quick_state(self._original, self._looked_at) != self._seen

    def fingerprint(self) -> str:
        """Return the SHA-256, as hex, of everything that determines ids."""
        if self._fingerprint is None:
            if self.whole is not None:
                described = self.whole.to_str()
            else:  # the vocabulary and the settings that transformers saves
                settings = repr(sorted(self._private.init_kwargs.items()))
                described = json.dumps({"vocab": self._private.get_vocab(), "init": settings}, sort_keys=True)
            self._fingerprint = hashlib.sha256("\0".join([described, repr(self._state)]).encode()).hexdigest()
        return self._fingerprint

    def _call(self, strings: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._private(strings, add_special_tokens=False)["input_ids"]
        return encoded

    def _special_ids_around_a_string(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the special tokens before and behind a string that has none of its own."""
        string, ids = self._known_string()
        with_special: list[int] = self._private([string])["input_ids"][0]
        return self._around(ids, tuple(with_special), range(len(with_special) + 1))

    def _known_string(self) -> tuple[str, tuple[int, ...]]:
        """Return a string and its ids without any special token, such as that of an unknown character."""
        special = set(getattr(self._private, "all_special_ids", ()))

        def is_known(ids: tuple[int, ...]) -> bool:
            return bool(ids) and special.isdisjoint(ids)

        ids = tuple(self._call(["a"])[0])
        if is_known(ids):
            return "a", ids
        encoded = ((token, tuple(self._call([token])[0])) for token in self._private.get_vocab())
        return next((known for known in encoded if is_known(known[1])), ("a", ids))

    def _around(
        self, ids: tuple[int, ...], with_special: tuple[int, ...], starts: Iterable[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids before and behind `ids`, which begin at one of `starts`."""
        for start in starts:
            if with_special[start : start + len(ids)] == ids:
                return with_special[:start], with_special[start + len(ids) :]
        raise TokenizerError(
            f"{type(self._original).__name__} changes a string's own tokens when it adds special tokens, so it cannot "
            "compose texts. Pass add_special_tokens=False to the LM, and write the special tokens into the text."
        )


def _make_backend(original: Backend, tokenizer: Any, *, is_continuation: bool) -> Backend:
    """Return a backend around the same model, without padding and truncation.

    The model, with its vocabulary and merges, is shared: reading a large one takes a second.
    """
    description = _describe_parts(original)
    if is_continuation:
        description["normalizer"] = _without_prepend(description["normalizer"])
        description["pre_tokenizer"] = _without_dummy_prefix(description["pre_tokenizer"])
        description["post_processor"] = None
    backend = Backend.from_str(json.dumps(description))
    backend.model = original.model
    backend.add_tokens([token for _, token in sorted(original.get_added_tokens_decoder().items())])
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return backend


def _describe_parts(backend: Backend) -> dict[str, Any]:
    """Return the backend's parts as JSON, with an empty model."""
    shell = Backend(models.BPE())
    shell.normalizer = backend.normalizer
    shell.pre_tokenizer = backend.pre_tokenizer
    shell.post_processor = backend.post_processor
    shell.decoder = backend.decoder
    description: dict[str, Any] = json.loads(shell.to_str())
    return description


def _without_prepend(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer that does not put the dummy prefix space of SentencePiece before a string."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] == "Sequence":
        kept = [_without_prepend(part) for part in normalizer["normalizers"]]
        return {**normalizer, "normalizers": [part for part in kept if part is not None]}
    return normalizer


def _without_dummy_prefix(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if pre_tokenizer is None:
        return None
    if pre_tokenizer["type"] == "Sequence":
        return {**pre_tokenizer, "pretokenizers": [_without_dummy_prefix(p) for p in pre_tokenizer["pretokenizers"]]}
    if pre_tokenizer["type"] == "Metaspace":
        return {**pre_tokenizer, "prepend_scheme": "never"}
    if pre_tokenizer["type"] == "ByteLevel":
        return {**pre_tokenizer, "add_prefix_space": False}
    return pre_tokenizer


def _characters_before_cuts(backend: Backend) -> frozenset[str]:
    """Return the characters behind which a space before an ASCII letter is provably a boundary of this tokenizer."""
    if not _is_cuttable(backend):
        return frozenset()
    swallowing = [token.content for token in backend.get_added_tokens_decoder().values() if token.rstrip]
    normalized = [] if backend.normalizer is None else map(backend.normalizer.normalize_str, swallowing)
    return _VISIBLE - {content[-1] for content in (*swallowing, *normalized)}


def _is_cuttable(backend: Backend) -> bool:
    """Return whether a space between two ASCII letters is provably a boundary of this tokenizer.

    A space behind another visible character is one, too, unless an added token that ends with it takes the space.
    """
    model, description = backend.model, _describe_parts(backend)
    if not isinstance(model, models.BPE) or model.dropout:
        return False
    normalizer = description["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # NFC never composes across a space
        return False
    added_tokens = backend.get_added_tokens_decoder().values()
    return _splits_at_spaces(description["pre_tokenizer"]) and all(map(_leaves_spaces, added_tokens))


def _splits_at_spaces(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    splits = False
    for part in parts:
        if part["type"] == "ByteLevel":
            splits |= part["use_regex"]
        elif part["type"] == "Split":
            is_known = part["pattern"].get("Regex") in _CUTTABLE_PATTERNS
            if not is_known or part["behavior"] != "Isolated" or part["invert"]:
                return False
            splits = True
        elif part["type"] != "Digits":  # "Digits" only cuts around digits
            return False
    return splits


def _leaves_spaces(token: AddedToken) -> bool:
    """Return whether an added token cannot contain a space, or swallow a space between two letters."""
    content = token.content
    swallows = (token.lstrip and content[:1].isalpha()) or (token.rstrip and content[-1:].isalpha())
    return not swallows and not any(character.isspace() for character in content)


def _sample_words(tokenizer: Any) -> list[str]:
    """Return the sample as the tokenizer's model gets it: normalized and split into words."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        return []
    normalized = _SAMPLE if backend.normalizer is None else backend.normalizer.normalize_str(_SAMPLE)
    if backend.pre_tokenizer is None:
        return [normalized]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]


def _to_look_at(tokenizer: Any, words: list[str]) -> list[str]:
    """Return the part of the words that the quick check encodes: for BPE the words with merged tokens, as one word.

    Only a new token can change the ids of a word without merges, and a new token changes the size of the vocabulary.
    """
    if not words or not isinstance(model := tokenizer.backend_tokenizer.model, models.BPE):
        return words
    return ["".join([word for word in words if len(model.tokenize(word)) < len(word)] or words)]


def _quick_state(tokenizer: Any, words: list[str]) -> tuple[object, ...]:
    """Return a cheap summary: settings, sizes, and the ids of a sample, which a changed rule or merge alters.

    The sample goes directly to the backend's model, since another thread may be reconfiguring the backend.
    """
    parts: list[object] = [
        type(tokenizer).__qualname__,
        len(tokenizer),
        getattr(tokenizer, "split_special_tokens", False),
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Backend):
        components = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        parts += [None if part is None else part.__getstate__() for part in components]
        model = backend.model
        for word in words:
            parts += map(_id_of, model.tokenize(word))
    else:
        parts.append(tuple(tokenizer(_SAMPLE)["input_ids"]))
    return tuple(parts)


_id_of = operator.attrgetter("id")


def added(before: str, after: str) -> str:
    """Return the part of `after` from its first difference to `before` on."""
    if after.startswith(before):
        return after[len(before) :]
    return after[next(idx for idx, pair in enumerate(zip(before, after + "\0", strict=False)) if pair[0] != pair[1]) :]
