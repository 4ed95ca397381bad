"""TextSession: texts and their token ids, independent of the place where results are computed.

A session knows a tokenizer, the limits of a model, and the ids of texts. Subclasses decide where results are computed:
a `Session` computes them itself; other subclasses send the ids to other processes. Functions for scores need only
`scoring` and `distributions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from backprompt.arguments import as_list
from backprompt.errors import UnboundTextError
from backprompt.evaluation.behind import Behind
from backprompt.evaluation.counters import Counters
from backprompt.evaluation.distributions import Asked, Distributions
from backprompt.evaluation.reading import Wanted
from backprompt.evaluation.scoring import ScoredTexts, num_positions_to_score
from backprompt.forest.span import Span
from backprompt.session.limits import TextLimits, check_has_last_token
from backprompt.session.options import Options
from backprompt.session.sharing import Answer, Call
from backprompt.text.checks import engine_of
from backprompt.text.node import Text
from backprompt.tokens.encoder import Encoder
from backprompt.tokens.graph import TokenIds, num_positions
from backprompt.tokens.tokenizer import PrivateTokenizer


class ScoresTexts(Protocol):
    """Scores of texts that are given as token ids; see `evaluation/scoring.py`."""

    def token_scores(
        self, texts: Iterable[TokenIds], starts: Iterable[int], ends: Sequence[Span | None]
    ) -> ScoredTexts:
        """Return the scores of each text's tokens from its start on; `ends`: the ends of computed texts, else None."""

    def scored(self, wanted: Sequence[Wanted]) -> ScoredTexts:
        """Return the scores of the wanted tokens of texts, and of tokens that may follow them."""

    def behind(self, prompts: Sequence[Behind]) -> ScoredTexts:
        """Return the scores of completions behind prompts."""


class TextSession(ABC):
    """The texts of one model: their token ids, limits and scores.

    Attributes:
        tokenizer: the user's tokenizer; never changed.
        options: checked options.
        counters: the work that was done since the session began.
        encoder: turns texts into token ids.
        num_workers: the number of workers that share a call. Callers that cut long work into slices make each slice
            this many times larger.

    """

    tokenizer: Any
    options: Options
    counters: Counters
    encoder: Encoder
    num_workers: int = 1

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the lock; all results inside are of one state of the weights."""

    def answer(self, call: Call[Answer]) -> Answer:
        """Return the answer to a call; a session that computes passes itself answers other threads' calls with it."""
        with self.exclusive():
            return call.finish()

    @abstractmethod
    def current(self, *, with_weights: bool = True, with_numbers: bool = True) -> Any:
        """Check for changed weights and a changed tokenizer; the lock must be held."""

    @property
    @abstractmethod
    def private_tokenizer(self) -> PrivateTokenizer:
        """The copy of the tokenizer that encodes and decodes."""

    @property
    @abstractmethod
    def causal_lm(self) -> Any:
        """The causal LM inside all wrappers of the model, or one like it without weights."""

    @property
    @abstractmethod
    def limits(self) -> TextLimits:
        """The limits for texts that can be evaluated."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of tokens that the output head predicts."""

    @property
    @abstractmethod
    def scoring(self) -> ScoresTexts:
        """Scores texts; the lock must be held, and `current` called before."""

    @abstractmethod
    def distributions(self, wanted: Sequence[Wanted], asked: Asked) -> Distributions:
        """Return the requested results of the distributions that predict tokens; the lock must be held."""

    @abstractmethod
    def computed_ends(self, texts: Sequence[Text]) -> list[Span | None]:
        """Return the end of each text whose states are in memory here, else None; the lock must be held."""

    # Texts and their ids

    def own_texts(self, texts: Iterable[Text]) -> list[Text]:
        """Return texts of this session as a list.

        Raises:
            TextTypeError: an element is not a `Text`, or `texts` cannot be iterated.
            UnboundTextError: a text has no model, or the model of another session.

        """
        listed = as_list(texts, "an LM takes several Texts in a list")
        own: object = None  # an engine of this session, which most texts share
        for idx, text in enumerate(listed):
            if own is not None and isinstance(text, Text) and text.lm is own:
                continue
            if session_of(text, idx) is not self:
                raise UnboundTextError(
                    f"texts[{idx}], {text!r}, belongs to another LM: use backprompt.evaluate(texts)."
                )
            own = text.lm
        return listed

    def prompt_ids(self, texts: Iterable[Text]) -> list[TokenIds]:
        """Return the ids of texts as if more text followed: without the special tokens that end a whole string.

        Raises:
            GroupError: a text ends in a group, so no single token stands before the next one.

        """
        texts = self.own_texts(texts)
        with self.exclusive():
            self.current()
            found = self.encoder.encode_beginnings(texts)
            for text, token_ids in zip(texts, found, strict=True):
                check_has_last_token(text, token_ids)
            return found

    def ids_to_continue(self, texts: Sequence[Text], max_new_tokens: int) -> list[TokenIds]:
        """Return the ids of texts to be continued, and count them as requested.

        Raises:
            TextTooLongError: there is no room for `max_new_tokens`.
            GroupError, and the errors of `evaluate` for texts that cannot be evaluated.

        """
        texts = self.own_texts(texts)
        with self.exclusive():
            prompts = self.prompt_ids(texts)
            for text, token_ids in zip(texts, prompts, strict=True):
                self.limits.check(text, token_ids)
                self.limits.check_room(text, token_ids, max_new_tokens)
            self.counters.tokens_requested += sum(map(len, prompts))
            return prompts

    def checked_ids(
        self, texts: Sequence[Text], starts: Sequence[int] = (), *, is_scoring: bool = False
    ) -> list[TokenIds]:
        """Return the token ids of texts, checked and counted as requested; the lock must be held.

        `is_scoring`: the texts are only scored, from `starts` on.
        """
        self.current()
        encoded = self.encoder.encode(texts)
        for text, token_ids, start in zip(texts, encoded, starts, strict=False):
            if not 0 <= start <= len(token_ids):
                raise ValueError(
                    f"{text!r} has {len(token_ids)} tokens, so its start must be between 0 and {len(token_ids)}, "
                    f"not {start}."
                )
        if is_scoring:
            lengths = list(map(num_positions_to_score, encoded, starts))
        else:
            lengths = list(map(num_positions, encoded))
        self.limits.check_all(texts, encoded, lengths)
        self.counters.tokens_requested += sum(map(len, encoded))
        return encoded

    def check(self, texts: Iterable[Text]) -> None:
        """Raise the errors of `evaluate` for texts that cannot be evaluated; no token is computed."""
        texts = self.own_texts(texts)
        with self.exclusive():
            self.current()
            for text, token_ids in zip(texts, self.encoder.encode(texts), strict=True):
                self.limits.check(text, token_ids)

    # Strings

    def completion_ids(self, strings: Sequence[str], *, is_continuation: bool = False) -> list[tuple[int, ...]]:
        """Return the ids of each string, encoded separately and without special tokens; see classify/completions.py."""
        with self.exclusive():
            self.current()
            return self.private_tokenizer.encode(strings, is_continuation=is_continuation) if strings else []

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The strings of one token each that need no space behind them: special and added tokens like <think>."""
        with self.exclusive():
            self.current()
            return self.private_tokenizer.added_tokens

    @property
    def needs_space_between(self) -> bool:
        """Whether "a b" is encoded like "a" and " b", and not like "a" and "b" (as with SentencePiece)."""
        both, first, second = self.completion_ids(["a b", "a", "b"])
        return both != first + second


def session_of(text: object, idx: int) -> TextSession:
    """Return the session of an element of `texts`.

    Raises:
        TextTypeError: the element is not a `Text`.
        UnboundTextError: the text has no model, or a model that is not an `LM`.

    """
    engine = engine_of(text, idx)
    session = getattr(engine, "session", None)
    if not isinstance(session, TextSession):
        raise UnboundTextError(
            f"texts[{idx}], {text!r}, is bound to {type(engine).__name__}, which is not an LM. "
            "Bind the text to an LM: Text(string, lm)."
        )
    return session
