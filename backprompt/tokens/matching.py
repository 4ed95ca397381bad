"""Matching: the tokens that may follow a continuation under a constraint.

llguidance (https://github.com/guidance-ai/llguidance) compiles languages and says which tokens may follow. Only this
file and finite.py call llguidance. If a language leaves only one string, llguidance allows only the tokens that the
tokenizer encodes that string to. The end of a continuation is decided here: an end token may follow where the language
may end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from backprompt.errors import GenerationError, MissingDependencyError, TokenizerError
from backprompt.tokens.constraints import Constraint, Grammar, JsonSchema, Regex
from backprompt.tokens.tokenizer import PrivateTokenizer
from backprompt.visible import shortened

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Allowed: TypeAlias = npt.NDArray[np.bool_]
"""Which tokens may follow, `(vocab,)`."""

NUM_KEPT = 16
"""The number of continuations of a text for which the allowed tokens are kept, one bit for each token."""

_SPECIAL = b"\xff"
"""The first byte of a special token's name in llguidance: no string in UTF-8 has this byte."""


class Vocabulary:
    """The tokens of a tokenizer, as llguidance takes them.

    Args:
        tokenizer: the tokenizer of the vocabulary.

    Raises:
        MissingDependencyError: llguidance is not installed.
        TokenizerError: llguidance does not know which strings the tokens stand for.

    """

    def __init__(self, tokenizer: PrivateTokenizer) -> None:
        library = guidance()
        if tokenizer.whole is None:
            raise TokenizerError(
                "A constraint needs the string of each token, which only a fast tokenizer of transformers gives "
                "(one with a backend of the package tokenizers). This one is written in Python: load its fast version."
            )
        spelled = _spelled_tokens(tokenizer.whole)
        self.num_tokens = len(spelled)
        added = tokenizer.whole.get_added_tokens_decoder().items()
        self._special_ids = frozenset(token_id for token_id, token in added if token.special)
        self.tokenizer: LLTokenizer = library.LLTokenizer(
            library.TokenizerWrapper(_Tokens(spelled, self._special_ids, tokenizer.encoder_of_plain_strings()))
        )

    @classmethod
    def of(cls, tokenizer: PrivateTokenizer) -> Vocabulary:
        """Return the vocabulary of a tokenizer. It is made once for each; 50,000 tokens take a second."""
        found = _vocabularies.get(tokenizer)
        if found is None:
            found = _vocabularies[tokenizer] = cls(tokenizer)
        return found

    def is_special(self, token_id: int) -> bool:
        """Return whether an id stands for no string: it is that of a special token, or unknown to the tokenizer."""
        return token_id >= self.num_tokens or token_id in self._special_ids

    def language(self, constraint: Constraint) -> Language:
        """Return the compiled form of a constraint.

        Raises:
            GenerationError: llguidance refuses the constraint; the message has the reason.

        """
        return Language(constraint, self, compiled(constraint, self.tokenizer))


_vocabularies: WeakKeyDictionary[PrivateTokenizer, Vocabulary] = WeakKeyDictionary()


@dataclass(frozen=True)
class Language:
    """A constraint compiled for a vocabulary.

    Attributes:
        constraint: the constraint as given.
        vocabulary: the tokens.
        beginning: the matcher before the first token; only copies of it take tokens.

    """

    constraint: Constraint
    vocabulary: Vocabulary
    beginning: LLMatcher


class Matching:
    """Tells which tokens may follow a text's continuation in a language; each call may name another continuation.

    Args:
        language: the language.
        num_tokens: the number of tokens that the model predicts.
        end_ids: the tokens that end a text. An end token that stands for a string may end the text where the language
            ends with that string.

    """

    def __init__(self, language: Language, num_tokens: int, end_ids: Iterable[int]) -> None:
        self.language = language
        self._num_tokens = num_tokens
        is_special = language.vocabulary.is_special
        self._end_ids = [token_id for token_id in end_ids if token_id < num_tokens]
        self._special_ends = [token_id for token_id in self._end_ids if is_special(token_id)]
        self._matcher = language.beginning.deep_copy()
        self._taken: tuple[int, ...] = ()  # the ids that the matcher has taken
        self._seen: dict[tuple[int, ...], npt.NDArray[np.uint8]] = {}

    def check_begins(self) -> None:
        """Raise GenerationError if no token may come first."""
        if not self.allowed(()).any():
            raise GenerationError(
                f"With {named(self.language.constraint)} no token can come first: the language has no string, no "
                "string that this tokenizer can write, or only the empty string while the model has no end token. Use "
                "another constraint."
            )

    def allowed(self, completion: tuple[int, ...]) -> Allowed:
        """Return which tokens may follow a continuation, `(vocab,)`; none if the continuation is outside the language.

        Only end tokens may follow an end token.
        """
        packed = self._seen.get(completion)
        if packed is None:
            if len(self._seen) == NUM_KEPT:
                del self._seen[next(iter(self._seen))]
            packed = self._seen[completion] = np.packbits(self._found(completion))
        return np.unpackbits(packed, count=self._num_tokens).view(np.bool_)

    def is_over(self, completion: tuple[int, ...]) -> bool:
        """Return whether a continuation is in the language and no token may follow, not even an end token."""
        if self._special_ends:  # a special end token may follow
            return False
        return not self.allowed(completion).any() and self._go_to(completion) and bool(self._matcher.is_accepting())

    def forced(self, completion: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """Return the tokens that must follow a continuation, up to the first place where there is a choice.

        End tokens are left out, and so is a token behind which none may follow.
        """
        tokens: tuple[int, ...] = ()
        while len(tokens) < max_tokens:
            token_ids = np.flatnonzero(self.allowed(completion + tokens))
            if len(token_ids) != 1 or (token_id := int(token_ids[0])) in self._end_ids:
                break
            if self.is_over((*completion, *tokens, token_id)):
                break
            tokens += (token_id,)
        return tokens

    def possible(self, completion: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Return the longest beginning of `tokens` that may follow a continuation."""
        for num, token_id in enumerate(tokens):
            if not self.allowed(completion + tokens[:num])[token_id]:
                return tokens[:num]
        return tokens

    def _found(self, completion: tuple[int, ...]) -> Allowed:
        allowed = np.zeros(self._num_tokens, dtype=bool)
        if completion and completion[-1] in self._end_ids:
            allowed[self._end_ids] = True
            return allowed
        if not self._go_to(completion):
            return allowed
        mask = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            self._give_up()
            return allowed
        num_tokens = min(self._num_tokens, self.language.vocabulary.num_tokens)
        allowed[:num_tokens] = mask[:num_tokens]
        for token_id in filter(allowed.__getitem__, self._end_ids):
            allowed[token_id] = self._may_end_with(token_id)
        if self._matcher.is_accepting():
            allowed[self._special_ends] = True
        return allowed

    def _go_to(self, completion: tuple[int, ...]) -> bool:
        """Move the matcher behind a continuation; return False if the continuation is outside the language."""
        num_common = len(self._taken)
        if completion[:num_common] != self._taken:
            pairs = enumerate(zip(completion, self._taken, strict=False))
            shorter = min(len(completion), num_common)
            num_common = next((num for num, (new, old) in pairs if new != old), shorter)
            self._matcher.rollback(len(self._taken) - num_common)
            self._taken = completion[:num_common]
        more = list(completion[num_common:])
        if any(token_id >= self.language.vocabulary.num_tokens for token_id in more):
            return False
        self._taken = completion[: num_common + (self._matcher.try_consume_tokens(more) if more else 0)]
        return len(self._taken) == len(completion)

    def _may_end_with(self, token_id: int) -> bool:
        """Return whether the language may end with this token, one of those that may follow."""
        self._matcher.consume_token(token_id)
        may_end = bool(self._matcher.is_accepting())
        self._matcher.rollback(1)
        return may_end

    def _give_up(self) -> None:
        """Start with a new matcher: after an error a matcher takes no more tokens."""
        failed, self._matcher, self._taken = self._matcher, self.language.beginning.deep_copy(), ()
        check_ends_here(failed, self.language.constraint)


class _Tokens:
    """The tokens of a tokenizer and its way of encoding, for llguidance; with an end token of its own.

    llguidance's own reader of tokenizers treats every added token that looks like `<think>` as a special token.

    llguidance must be able to write every string. So a byte without a token gets one here, with an id above that of the
    end token. Such a token is never generated, because masks are cut off before these ids.

    Args:
        spelled: the string of each token, in UTF-8; a token may be a part of a character.
        special_ids: the tokens that stand for no string; a grammar refers to them by name.
        encoder: encodes strings within a text; names of special tokens are encoded as ordinary characters.

    """

    bos_token_id = None

    def __init__(self, spelled: Sequence[bytes], special_ids: Collection[int], encoder: Backend) -> None:
        self.eos_token_id = len(spelled)  # the options of a text say which tokens end it
        named = [_SPECIAL + token if idx in special_ids else token for idx, token in enumerate(spelled)]
        known = {token for idx, token in enumerate(spelled) if idx not in special_ids}
        no_tokens = [byte for byte in map(bytes, ([idx] for idx in range(256))) if byte not in known]
        self.tokens = [*named, _SPECIAL + b"<end>", *no_tokens]
        self.special_token_ids = [*special_ids, self.eos_token_id]
        self._encoder = encoder
        self._ids = {token: idx for idx, token in enumerate(self.tokens) if token}
        self._longest = max(map(len, self._ids))

    def __call__(self, string: str) -> list[int]:
        ids: list[int] = self._encoder.encode(string, add_special_tokens=False).ids
        is_exact = b"".join(self.tokens[idx] for idx in ids) == string.encode()
        return ids if is_exact else self._split(string.encode())

    def _split(self, string: bytes) -> list[int]:
        """Return the fewest tokens that spell a string that the tokenizer would change, with added bytes if needed."""
        best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]  # numbers of added bytes and of tokens; start, id
        for stop in range(1, len(string) + 1):
            ends = [(start, self._ids.get(string[start:stop])) for start in range(max(0, stop - self._longest), stop)]
            best.append(
                min(
                    (best[start][0] + (idx > self.eos_token_id), best[start][1] + 1, start, idx)
                    for start, idx in ends
                    if idx is not None
                )
            )
        found, stop = [], len(string)
        while stop:
            found.append(best[stop][3])
            stop = best[stop][2]
        return found[::-1]


def _spelled_tokens(backend: Backend) -> list[bytes]:
    """Return the string of each token as it stands behind other tokens, in UTF-8.

    Raises:
        TokenizerError: llguidance does not support the tokenizer.

    """
    if isinstance(backend.decoder, (decoders.Metaspace, decoders.WordPiece)):
        return _decoded_alone(backend)
    try:
        reader = guidance().LLTokenizer(backend.to_str(), slices=[])
    except ValueError as error:
        raise TokenizerError(
            f"llguidance cannot use this tokenizer for a constraint ({error}). Use a model with a byte-level BPE, "
            "SentencePiece or WordPiece tokenizer."
        ) from error
    known = set(backend.get_vocab(with_added_tokens=True).values())
    spelled = [reader.decode_bytes([token_id]) if token_id in known else b"" for token_id in range(1 + max(known))]
    for token_id, token in backend.get_added_tokens_decoder().items():
        spelled[token_id] = token.content.encode()
    return spelled


def _decoded_alone(backend: Backend) -> list[bytes]:
    """Return the string of each token for a decoder of whole characters that looks at one token at a time.

    Such a decoder treats only the first token of a text in another way, so each token is decoded behind another one.
    """
    tokens = backend.get_vocab(with_added_tokens=True)
    spelled = [b""] * (1 + max(tokens.values()))
    for token, token_id in tokens.items():
        spelled[token_id] = backend.decoder.decode(["a", token]).removeprefix("a").encode()
    return spelled


def compiled(constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
    """Return the matcher of a constraint before the first token.

    Raises:
        GenerationError: llguidance refuses the constraint.

    """
    library = guidance()
    matcher: LLMatcher = library.LLMatcher(tokenizer, _grammar(constraint, library), log_level=0)
    if matcher.is_error():
        raise GenerationError(f"llguidance refuses {named(constraint)}: {_in_our_words(matcher.get_error().strip())}")
    return matcher


def _in_our_words(reason: str) -> str:
    """Return why llguidance refuses a constraint, with our advice in place of advice about llguidance's options."""
    if reason.startswith("oneOf constraints are not supported"):
        return (
            "oneOf is supported only where its schemas exclude each other, as those of different types do. Write anyOf "
            "in its place; then a value may be valid under several of the schemas."
        )
    if unknown := re.fullmatch(r"Unimplemented keys: \[(.*)\]", reason):
        keywords = unknown[1].replace('"', "")
        return f"the keywords {keywords} are not supported. Leave them out, and check them on the finished value."
    if reason.startswith("Unknown format:"):
        return f"{reason}. Leave the format out, or write a pattern in its place."
    return reason


def _grammar(constraint: Constraint, library: Any) -> str:
    """Return a constraint in the form that llguidance takes."""
    found: str
    if isinstance(constraint, Regex):
        found = library.LLMatcher.grammar_from_regex(constraint.pattern)
    elif isinstance(constraint, JsonSchema):
        options = {"whitespace_flexible": False} if constraint.compact else {}
        found = library.LLMatcher.grammar_from_json_schema(constraint.json, overrides=options)
    else:
        assert isinstance(constraint, Grammar), constraint
        found = library.LLMatcher.grammar_from_lark(constraint.lark)
    return found


def guidance() -> Any:
    """Return llguidance, or raise MissingDependencyError."""
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependencyError("Constraints need llguidance: pip install llguidance") from error
    return llguidance


def check_ends_here(failed: LLMatcher, constraint: Constraint) -> None:
    """Raise GenerationError unless a matcher failed only because no token may follow, as in an empty language."""
    reason = failed.get_error().strip().partition("\n")[0]
    if not reason.startswith("NoExtension"):
        raise GenerationError(f"llguidance gives up on {named(constraint)}: {reason}. Make the language simpler.")


def named(constraint: Constraint) -> str:
    """Return a constraint for a message."""
    return f"the constraint {shortened(repr(constraint), 120)}"
