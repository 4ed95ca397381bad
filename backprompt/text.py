"""The node: a text, composed with `+`.

A `Text` is immutable and holds no tensors. It is a leaf with one segment (a string, or a tuple of token ids), or
two texts side by side. `+` only builds: it tokenizes nothing and computes nothing.

    Text("a") + "b" + "c"          ((a b) c)
    Text("a") + (Text("b") + "c")  (a (b c))

Both are one text: equality and hash look at the flattened segments and at the `LM`. The hash is kept incrementally,
as a polynomial over the hashes of the segments, so it is associative and costs O(1) a `+`:
`hash(x + y) = hash(x) * BASE ** segments(y) + hash(y)`. Walks use an explicit stack, so depth never matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias

from backprompt.errors import MixedModelsError, TextTypeError, UnboundTextError

if TYPE_CHECKING:
    import torch

    from backprompt.lm import LM
    from backprompt.representation import ModelRepr, Pin
    from backprompt.tokens import Join

Segment: TypeAlias = "str | tuple[int, ...]"
"""What a leaf holds: a string, or token ids that are taken as they are."""

_PRIME = (1 << 61) - 1
_BASE = 0x1A2B3C4D5E6F789
_REPR_CHARACTERS = 60

_EAGER: ContextVar[bool] = ContextVar("backprompt_eager", default=False)


@contextmanager
def eager() -> Iterator[None]:
    """Evaluate each text as it is built, for as long as the context lasts.

    Texts without a model and texts of zero tokens are left alone. The setting is a context variable: other threads
    and tasks do not see it.
    """
    token = _EAGER.set(True)
    try:
        yield
    finally:
        _EAGER.reset(token)


class Text:
    """A text that a language model can be asked about; composed with `+`.

    Args:
        string: the text. An empty string is allowed and adds nothing.
        lm: the `LM` that evaluates it, or a `(model, tokenizer)` tuple. Without one, the text takes the `LM` of the
            first text that it is joined with.

    Raises:
        TextTypeError: `string` is not a `str`.

    """

    __slots__ = ("__weakref__", "_hash", "_left", "_lm", "_num_segments", "_right", "_segment")

    _lm: LM | None
    _left: Text | None
    _right: Text | None
    _segment: Segment
    _num_segments: int
    _hash: int

    def __init__(self, string: str, lm: LM | tuple[Any, Any] | None = None) -> None:
        if not isinstance(string, str):
            raise TextTypeError(
                f"Text() takes a str, not {type(string).__name__}: {_shorten(repr(string))}. "
                "Convert it with str(...) first; for token ids use Text.from_tokens(ids, lm)."
            )
        self._init_leaf(string, _as_lm(lm))

    @classmethod
    def from_tokens(cls, token_ids: Iterable[int], lm: LM | tuple[Any, Any]) -> Text:
        """Return a text of one segment made of token ids, which are never re-tokenized.

        Such a segment is a hard boundary: what follows it is encoded as a continuation (no special tokens, no dummy
        prefix space). Its string is what decoding adds to what stands before it.

        Raises:
            TextTypeError: an element is not an `int`.

        """
        segment = tuple(token_ids)
        for token_id in segment:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise TextTypeError(
                    f"Text.from_tokens takes ints, not {type(token_id).__name__}: {token_id!r}. "
                    "A tensor or an array of ids becomes ints with .tolist()."
                )
        text = cls.__new__(cls)
        text._init_leaf(segment, _as_lm(lm))
        return text

    def _init_leaf(self, segment: Segment, lm: LM | None) -> None:
        self._segment = segment
        self._left = self._right = None
        self._lm = lm
        self._num_segments = 1 if segment else 0
        self._hash = hash(segment) % _PRIME if segment else 0
        if _EAGER.get():
            self._evaluate_eagerly()

    # Composing

    def __add__(self, other: Text | str) -> Text:
        return _concatenate(self, _as_text(other, "+"))

    def __radd__(self, other: Text | str) -> Text:
        if isinstance(other, int) and other == 0:
            raise TextTypeError("sum() of texts needs a text to start from: sum(texts, Text('')).")
        return _concatenate(_as_text(other, "+"), self)

    def join(self, texts: Iterable[Text | str]) -> Text:
        """Return the texts with this one between each two of them, as `str.join` does."""
        joined: Text | None = None
        for item in texts:
            text = _as_text(item, "join")
            joined = text if joined is None else _concatenate(_concatenate(joined, self), text)
        return Text("", self._lm) if joined is None else _concatenate(Text("", self._lm), joined)

    # Reading, without a model

    @property
    def lm(self) -> LM | None:
        """The `LM` that this text is bound to, or None."""
        return self._lm

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The leaves from left to right: strings and tuples of token ids, empty ones left out."""
        return tuple(self._walk_segments())

    @property
    def string(self) -> str:
        """The whole string. A segment of token ids contributes what decoding it adds to what stands before it."""
        strings = [segment for segment in self._walk_segments() if isinstance(segment, str)]
        if len(strings) == self._num_segments:
            return "".join(strings)
        return self._require_lm("the string of token ids").string(self)

    def __str__(self) -> str:
        return self.string

    def __repr__(self) -> str:
        parts = (s if isinstance(s, str) else f"<{len(s)} token ids>" for s in self._walk_segments())
        return f"Text({_shorten(repr(''.join(parts)))})"

    def __hash__(self) -> int:
        return hash((self._hash, self._num_segments, id(self._lm)))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Text):
            return NotImplemented
        if self._lm is not other._lm or self._num_segments != other._num_segments or self._hash != other._hash:
            return False
        return all(a == b for a, b in zip(self._walk_segments(), other._walk_segments(), strict=True))

    def __copy__(self) -> Text:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Text:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_segments, (self.segments, self._lm)

    def _walk_segments(self) -> Iterator[Segment]:
        stack = [self]
        while stack:
            text = stack.pop()
            if text._left is not None and text._right is not None:
                stack += (text._right, text._left)
            elif text._segment:
                yield text._segment

    # Asking the model

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids that the model sees, special tokens included. Needs a tokenizer, not a forward pass."""
        return self._require_lm("token ids").tokens(self)

    def joins(self) -> list[Join]:
        """Return every join whose tokens differ from those of its two sides encoded apart."""
        return self._require_lm("joins").joins(self)

    @property
    def model_repr(self) -> ModelRepr:
        """The model's representation of this text, computed now if it is not cached."""
        return self._require_lm("a representation").evaluate([self])[0]

    def __call__(self) -> ModelRepr:
        """Evaluate now and return the `ModelRepr`."""
        return self.model_repr

    @property
    def logits(self) -> torch.Tensor:
        """Next-token logits, shape `(vocab,)`, in the model's dtype."""
        return self.model_repr.logits

    @property
    def token_logprobs(self) -> torch.Tensor:
        """Log-probability of each token given those before it, `(tokens,)`, nats, float32; nan for the first."""
        return self.model_repr.token_logprobs

    def pin(self) -> Pin:
        """Evaluate now, and hold all of the representation until `.release()` or the end of a `with` block.

        Raises:
            MemoryBudgetError: the pinned texts together do not fit the `LM`'s `memory_bytes`.

        """
        return self._require_lm("a representation").pin(self)

    def save(self) -> None:
        """Write the representation to the `LM`'s store, whatever its size, computing it if need be.

        Raises:
            NoStoreError: the `LM` was made without `store=`.
            OSError: the store cannot be written to.

        """
        self._require_lm("a representation").save(self)

    def _require_lm(self, what: str) -> LM:
        if self._lm is None:
            raise UnboundTextError(
                f"{self!r} has no model, and {what} cannot be had without one. "
                "Build it with Text(string, lm), or join it with a text that has an LM."
            )
        return self._lm

    def _evaluate_eagerly(self) -> None:
        if self._lm is not None and self._lm.tokens(self):
            self._lm.evaluate([self])


def _concatenate(left: Text, right: Text) -> Text:
    """Return `left + right`; raises MixedModelsError where the two are bound to different models."""
    lm = left._lm
    if lm is None:
        lm = right._lm
    elif right._lm is not None and right._lm is not lm:
        raise MixedModelsError(
            f"{left!r} and {right!r} belong to two different LM objects, whose representations never mix. "
            "Build both with one LM; a (model, tokenizer) tuple finds the same LM each time."
        )
    if right._num_segments == 0 and left._lm is lm:
        return left
    if left._num_segments == 0 and right._lm is lm:
        return right
    text = Text.__new__(Text)
    text._segment = ""
    text._left, text._right, text._lm = left, right, lm
    text._num_segments = left._num_segments + right._num_segments
    shift = _BASE if right._num_segments == 1 else pow(_BASE, right._num_segments, _PRIME)
    text._hash = (left._hash * shift + right._hash) % _PRIME
    if _EAGER.get():
        text._evaluate_eagerly()
    return text


def _from_segments(segments: Sequence[Segment], lm: LM | None) -> Text:
    """Rebuild a text, as unpickling does."""
    text = Text("", lm)
    for segment in segments:
        leaf = Text.__new__(Text)
        leaf._init_leaf(segment, lm)
        text = _concatenate(text, leaf)
    return text


def _as_text(value: object, operation: str) -> Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, str):
        return Text(value)
    raise TextTypeError(
        f"{operation} takes a Text or a str, not {type(value).__name__}: {_shorten(repr(value))}. "
        "Convert it with str(...) first."
    )


def _as_lm(lm: LM | tuple[Any, Any] | None) -> LM | None:
    if lm is None:
        return None
    from backprompt.lm import LM, shared_lm  # the node knows no model until it is given one

    if isinstance(lm, LM):
        return lm
    if isinstance(lm, tuple) and len(lm) == 2:
        return shared_lm(*lm)
    raise TextTypeError(f"A text is bound to an LM or to a (model, tokenizer) tuple, not to {type(lm).__name__}.")


def _shorten(string: str, limit: int = _REPR_CHARACTERS) -> str:
    """Return `string` with its middle left out where it is longer than `limit` characters."""
    if len(string) <= limit:
        return string
    return f"{string[: limit // 2]}...{string[-limit // 2 :]}"
