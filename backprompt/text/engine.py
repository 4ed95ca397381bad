"""Engine: the requests of a bound text to its model, and access to functions outside this folder by name.

A `Text` knows no model, no generation and no drawing; a bound text asks its engine. A factory makes an engine of a
model and a tokenizer. The functions behind `text.generate`, `text.draw` and the like lie in modules that import `Text`.
The package's root registers the factory and the functions here by name; each is imported on its first call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from backprompt.errors import TextTypeError
from backprompt.text.extents import Join
from backprompt.visible import abbreviated

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache

AnyText = TypeVar("AnyText", contravariant=True)

Result: TypeAlias = Literal["logits", "token_logprobs"]
"""The results that a text can request from its engine by name, without the whole representation."""

FACTORY = "engine"
"""The registered name of the factory that makes an engine of a model and a tokenizer."""


class Representation(Protocol):
    """A model's representation of one text; for an `LM`, a `ModelRepr`, whose documentation applies."""

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the text."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids in written order, `(tokens,)`."""

    @property
    def key(self) -> str:
        """SHA-256, as hex, that names the representation by content."""

    @property
    def stored_error(self) -> float:
        """The largest relative error from storage at reduced precision."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole representation."""

    @property
    def logits(self) -> Tensor:
        """Next-token logits, `(vocab,)`."""

    @property
    def token_logprobs(self) -> Tensor:
        """Log-probability of each token given the tokens that it sees, `(tokens,)`, nats."""

    @property
    def hidden_states(self) -> Tensor:
        """Final hidden states, `(tokens, hidden)`."""

    def all_logits(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the logits after each of the tokens `start..stop`, `(tokens, vocab)`."""

    def attention(
        self,
        layers: int | slice | Iterable[int] | None = None,
        heads: int | Iterable[int] | None = None,
        rows: int | slice | Iterable[int] | None = None,
        *,
        over: Iterable[Any] | None = None,
    ) -> Tensor:
        """Return attention weights, `(layers, heads, rows, keys)`, or summed over spans of keys."""

    def past_key_values(self) -> DynamicCache:
        """Return a fresh copy of all keys and values."""


class Pinned(Protocol):
    """A representation that stays in memory until release; for an `LM`, a `Pin`."""

    def __enter__(self) -> Pinned: ...
    def __exit__(self, *exception: object) -> None: ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the budget that only this pin takes."""

    def release(self) -> None:
        """Release the representation."""


class TextStream(Iterator[str], Protocol):
    """The continuation of one text, piece by piece; see `Stream`."""

    def __enter__(self) -> TextStream: ...
    def __exit__(self, *exception: object) -> None: ...

    @property
    def text(self) -> Any:
        """The prompt and the tokens added so far."""

    def close(self) -> None:
        """Stop the stream."""


class Shown(Protocol):
    """A text with coloured tokens; see `ShownText`."""

    tokens: tuple[Any, ...]

    def ansi(self, *, is_dark: bool | None = None) -> str:
        """Return the text with terminal escape sequences for colours."""

    def plain(self) -> str:
        """Return the text with marks before improbable tokens."""


@runtime_checkable
class Engine(Protocol[AnyText]):
    """The requests of a bound text."""

    def string(self, text: AnyText) -> str:
        """Return the string of a text with segments of token ids."""

    def tokens(self, text: AnyText) -> tuple[int, ...]:
        """Return the token ids of a text."""

    def joins(self, text: AnyText) -> list[Join]:
        """Return the joins of a text that change tokens."""

    def representation(self, text: AnyText) -> Representation:
        """Return the representation of a text; a representation that is not in memory is computed."""

    def result(self, text: AnyText, name: Result) -> Tensor:
        """Return a result of the representation of a text."""

    def evaluate(self, texts: Iterable[AnyText]) -> Sequence[Representation]:
        """Return the representations of texts; missing ones are computed together."""

    def pin(self, text: AnyText) -> Pinned:
        """Evaluate a text and keep its whole representation in memory until release."""

    def save(self, text: AnyText) -> None:
        """Write the representation of a text to a store."""


def as_engine(given: Any) -> Engine[Any]:
    """Return an engine; for a `(model, tokenizer)` tuple, return the engine that all such tuples share.

    Raises:
        TextTypeError: the value is neither an engine nor such a tuple.
        All errors that the factory raises for the model and the tokenizer.

    """
    engine: Engine[Any] = given
    if _is_engine(given.__class__):
        return engine
    if isinstance(given, tuple) and len(given) == 2:
        engine = outside(FACTORY)(*given)
        return engine
    raise TextTypeError(
        "The model must be an LM or a (model, tokenizer) tuple, not "
        f"{type(given).__name__}: {abbreviated(given)}. backprompt.load(name) makes an LM."
    )


@lru_cache(maxsize=64)  # a check against a protocol looks at all of its methods
def _is_engine(kind: type) -> bool:
    return issubclass(kind, Engine)


Function = Callable[..., Any]

_finders: dict[str, Callable[[], Function]] = {}


def register(name: str, find: Callable[[], Function]) -> None:
    """Let `outside(name)` return the function that `find()` returns."""
    _finders[name] = find


def outside(name: str) -> Function:
    """Return the registered function of this name, imported on first use."""
    return _finders[name]()
