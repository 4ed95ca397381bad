"""Matching: the tokens with which a continuation may go on in the language of a constraint.

llguidance (https://github.com/guidance-ai/llguidance) compiles languages and says which tokens may follow; all that is
known of it is here. Where a language leaves one string only, it allows the tokens by which the tokenizer writes that
string, and no others. The end of a continuation is decided here: an end token may follow where the language may end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from backprompt.errors import GenerationError, MissingDependencyError, TokenizerError
from backprompt.tokens.constraints import Constraint, Grammar, JsonSchema, Regex
from backprompt.tokens.tokenizer import PrivateTokenizer
from backprompt.visible import shortened

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Allowed: TypeAlias = npt.NDArray[np.bool_]
"""Which tokens may follow, `(vocab,)`."""

NUM_KEPT = 256
"""The number of continuations of a text for which the allowed tokens are remembered."""

_END = "<|end of the language|>"


class Vocabulary:
    """The tokens of a tokenizer, as llguidance takes them.

    Args:
        tokenizer: of the vocabulary.

    Raises:
        MissingDependencyError: llguidance is not installed.
        TokenizerError: llguidance does not know which strings the tokens stand for.

    """

    def __init__(self, tokenizer: PrivateTokenizer) -> None:
        guidance = _guidance()
        if tokenizer.whole is None:
            raise TokenizerError(
                "A constraint needs a tokenizer with a backend of the package tokenizers, as the fast tokenizers of "
                "transformers have, to know the string of each token. This one is written in Python."
            )
        description = json.loads(tokenizer.whole.to_str())
        self.num_tokens = 1 + max(tokenizer.whole.get_vocab(with_added_tokens=True).values())
        # llguidance needs an end token of its own; which ids end a text is for the options of each text to say.
        end = {"id": self.num_tokens, "content": _END, "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        description["added_tokens"] = [*(description.get("added_tokens") or ()), {**end, **flags}]
        try:
            self.tokenizer: LLTokenizer = guidance.LLTokenizer(json.dumps(description), eos_token=[self.num_tokens])
        except ValueError as error:
            raise TokenizerError(
                f"llguidance cannot use this tokenizer for a constraint ({error}). It takes byte-level BPE, and "
                "SentencePiece tokenizers with byte fallback."
            ) from error

    @classmethod
    def of(cls, tokenizer: PrivateTokenizer) -> Vocabulary:
        """Return the vocabulary of a tokenizer, made once: that takes a second for 50,000 tokens."""
        found = _vocabularies.get(tokenizer)
        if found is None:
            found = _vocabularies[tokenizer] = cls(tokenizer)
        return found

    def is_special(self, token_id: int) -> bool:
        """Return whether an id stands for no string: that of a special token, or one that the tokenizer lacks."""
        return token_id >= self.num_tokens or bool(self.tokenizer.is_special_token(token_id))

    def language(self, constraint: Constraint) -> Language:
        """Return a constraint, compiled.

        Raises:
            GenerationError: llguidance refuses it; the message has the reason.

        """
        return Language(constraint, self, _compiled(constraint, self.tokenizer))


_vocabularies: WeakKeyDictionary[PrivateTokenizer, Vocabulary] = WeakKeyDictionary()


@dataclass(frozen=True)
class Language:
    """A constraint compiled for a vocabulary.

    Attributes:
        constraint: as it was given.
        vocabulary: the tokens.
        beginning: the matcher before the first token; only copies of it take tokens.

    """

    constraint: Constraint
    vocabulary: Vocabulary
    beginning: LLMatcher


class Matching:
    """The place of one text's continuation, or of several in turn, in a language.

    Args:
        language: the language.
        num_tokens: the number of tokens that the model predicts.
        end_ids: the tokens that end a text. One that stands for a string may end the text where the language ends with
            that string.

    """

    def __init__(self, language: Language, num_tokens: int, end_ids: Iterable[int]) -> None:
        self.language = language
        self._num_tokens = num_tokens
        is_special = language.vocabulary.is_special
        self._end_ids = [token_id for token_id in end_ids if token_id < num_tokens]
        self._special_ends = [token_id for token_id in self._end_ids if is_special(token_id)]
        self._matcher = language.beginning.deep_copy()
        self._taken: tuple[int, ...] = ()  # the ids that the matcher has taken
        self._seen: dict[tuple[int, ...], Allowed] = {}

    def check_begins(self) -> None:
        """Raise GenerationError if no token may come first."""
        if not self.allowed(()).any():
            raise GenerationError(
                f"With {_named(self.language.constraint)} no token can come first: it has no string, none that this "
                "tokenizer can write, or only the empty one and the model no end token."
            )

    def allowed(self, completion: tuple[int, ...]) -> Allowed:
        """Return which tokens may follow a continuation, `(vocab,)`; none may where it has left the language.

        Only end tokens may follow an end token.
        """
        found = self._seen.get(completion)
        if found is None:
            while len(self._seen) >= NUM_KEPT:
                del self._seen[next(iter(self._seen))]
            found = self._seen[completion] = self._found(completion)
        return found

    def is_over(self, completion: tuple[int, ...]) -> bool:
        """Return whether a continuation is in the language and nothing may follow, an end token included."""
        if self._special_ends:  # one of them may follow
            return False
        return not self.allowed(completion).any() and self._go_to(completion) and bool(self._matcher.is_accepting())

    def forced(self, completion: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """Return the tokens that follow a continuation with no other choice, without an end token."""
        tokens: tuple[int, ...] = ()
        while len(tokens) < max_tokens:
            token_ids = np.flatnonzero(self.allowed(completion + tokens))
            if len(token_ids) != 1 or int(token_ids[0]) in self._end_ids:
                break
            tokens += (int(token_ids[0]),)
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
        """Let the matcher take a continuation in; return False if that is none of the language."""
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
        """Return whether the language may end with a token, which may follow."""
        self._matcher.consume_token(token_id)
        may_end = bool(self._matcher.is_accepting())
        self._matcher.rollback(1)
        return may_end

    def _give_up(self) -> None:
        """Begin again with another matcher: after an error this one takes nothing more."""
        failed, self._matcher, self._taken = self._matcher, self.language.beginning.deep_copy(), ()
        _check_ends_here(failed, self.language.constraint)


def _compiled(constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
    guidance = _guidance()
    matcher: LLMatcher = guidance.LLMatcher(tokenizer, _grammar(constraint, guidance), log_level=0)
    if matcher.is_error():
        raise GenerationError(f"llguidance refuses {_named(constraint)}: {matcher.get_error().strip()}")
    return matcher


def _grammar(constraint: Constraint, guidance: Any) -> str:
    """Return a constraint as llguidance writes it."""
    found: str
    if isinstance(constraint, Regex):
        found = guidance.LLMatcher.grammar_from_regex(constraint.pattern)
    elif isinstance(constraint, JsonSchema):
        options = {"whitespace_flexible": False} if constraint.compact else {}
        found = guidance.LLMatcher.grammar_from_json_schema(constraint.json, overrides=options)
    else:
        assert isinstance(constraint, Grammar), constraint
        found = guidance.LLMatcher.grammar_from_lark(constraint.lark)
    return found


def _guidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependencyError("Constraints need llguidance: pip install llguidance") from error
    return llguidance


def _check_ends_here(failed: LLMatcher, constraint: Constraint) -> None:
    """Raise GenerationError unless a matcher failed because nothing may follow, such as a language that is empty."""
    reason = failed.get_error().strip().partition("\n")[0]
    if not reason.startswith("NoExtension"):
        raise GenerationError(f"llguidance gives up on {_named(constraint)}: {reason}. Make the language simpler.")


def _named(constraint: Constraint) -> str:
    return f"the constraint {shortened(repr(constraint), 120)}"


# Finite languages


def strings_of(constraint: Constraint, *, max_strings: int, max_bytes: int) -> list[str]:
    """Return all strings of a finite language, in the order of their bytes.

    The language is walked byte by byte, by the same rules by which it constrains a continuation.

    Args:
        constraint: the language.
        max_strings: the largest number of strings.
        max_bytes: the largest number of bytes of a string, in UTF-8.

    Raises:
        MissingDependencyError: llguidance is not installed.
        GenerationError: llguidance refuses the constraint.
        ValueError: the language is not finite, or larger.

    """
    strings: list[str] = []
    waiting = [(b"", _compiled(constraint, _bytes()))]  # beginnings to look at, and the matcher one byte before
    while waiting:
        path, before = waiting.pop()
        matcher = before.deep_copy()
        if path:
            matcher.consume_token(path[-1])
        following = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:256]
        if matcher.is_error():
            _check_ends_here(matcher, constraint)
            continue
        strings += [path.decode()] if matcher.is_accepting() else []
        if len(strings) > max_strings or len(path) > max_bytes:
            raise ValueError(
                f"Of {_named(constraint)} there are more than {max_strings:,} strings, or one has more than "
                f"{max_bytes:,} bytes, or there is no end of them. Give a finite and smaller language, such as "
                "[0-9]{1,2} in place of [0-9]+."
            )
        waiting += [(path + bytes([byte]), matcher) for byte in reversed(np.flatnonzero(following).tolist())]
    return strings


class _Bytes:
    """A tokenizer of llguidance whose tokens are the 256 bytes, and an end token."""

    eos_token_id = 256
    bos_token_id = None
    tokens: Sequence[bytes] = [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]
    special_token_ids = (256,)

    def __call__(self, string: bytes) -> list[int]:
        return list(string)


def _bytes() -> LLTokenizer:
    guidance = _guidance()
    tokenizer: LLTokenizer = guidance.LLTokenizer(guidance.TokenizerWrapper(_Bytes()))
    return tokenizer
