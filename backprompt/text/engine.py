"""Engine: what a bound text may ask of its model, and how the node reaches the parts of the package that read it.

A `Text` knows no model, no generation and no drawing. A text that is bound to an engine asks the engine. A pair of a
model and a tokenizer becomes an engine by a factory, and the functions behind `text.generate`, `text.draw` and the like
stand outside the node; the package's root registers all of them here by name, and each is imported when it is first
called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from backprompt.errors import TextTypeError
from backprompt.text.extents import Join
from backprompt.visible import abbreviated

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache

AnyText = TypeVar("AnyText", contravariant=True)

FACTORY = "engine"
"""The name under which the factory is registered that makes an engine of a model and a tokenizer."""


class Representation(Protocol):
    """A model's representation of one text; of an `LM`, a `ModelRepr`, whose documentation holds."""

    @property
    def num_tokens(self) -> int:
        """How many tokens the text has."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids in written order, `(tokens,)`."""

    @property
    def key(self) -> str:
        """The SHA-256, as hex, that names the representation by content."""

    @property
    def stored_error(self) -> float:
        """The largest relative error that a store in fewer bits left."""

    @property
    def num_bytes(self) -> int:
        """Bytes that all of it takes."""

    @property
    def logits(self) -> Tensor:
        """Next-token logits, `(vocab,)`."""

    @property
    def token_logprobs(self) -> Tensor:
        """Log-probability of each token given those it sees, `(tokens,)`, nats."""

    @property
    def hidden_states(self) -> Tensor:
        """Final hidden states, `(tokens, hidden)`."""

    def all_logits(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the logits after each of the tokens `start..stop`, `(tokens, vocab)`."""

    def past_key_values(self) -> DynamicCache:
        """Return a fresh copy of all keys and values."""


class Pinned(Protocol):
    """Holds a representation until it is released; of an `LM`, a `Pin`."""

    def __enter__(self) -> Pinned: ...
    def __exit__(self, *exception: object) -> None: ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the budget that the pin takes alone."""

    def release(self) -> None:
        """Let go."""


class TextStream(Iterator[str], Protocol):
    """The continuation of one text, piece by piece; see `Stream`."""

    def __enter__(self) -> TextStream: ...
    def __exit__(self, *exception: object) -> None: ...

    @property
    def text(self) -> Any:
        """The prompt and the tokens added so far."""

    def close(self) -> None:
        """Stop."""


class Shown(Protocol):
    """A text with coloured tokens; see `ShownText`."""

    tokens: tuple[Any, ...]

    def ansi(self) -> str:
        """Return the text with the escape sequences that terminals take for colours."""

    def plain(self) -> str:
        """Return the text with marks before improbable tokens."""


@runtime_checkable
class Engine(Protocol[AnyText]):
    """What a bound text may ask."""

    def string(self, text: AnyText) -> str:
        """Return the string of a text with segments of token ids."""

    def tokens(self, text: AnyText) -> tuple[int, ...]:
        """Return the token ids of a text."""

    def joins(self, text: AnyText) -> list[Join]:
        """Return the joins of a text that change tokens."""

    def representation(self, text: AnyText) -> Representation:
        """Return the representation of a text, computed if it is not held."""

    def evaluate(self, texts: Iterable[AnyText]) -> Sequence[Representation]:
        """Compute the representations that are missing, all together."""

    def pin(self, text: AnyText) -> Pinned:
        """Evaluate a text and hold all of it until it is released."""

    def save(self, text: AnyText) -> None:
        """Write the representation of a text to a store."""


def as_engine(given: Any) -> Engine[Any]:
    """Return an engine; of a `(model, tokenizer)` tuple the one that all such tuples share.

    Raises:
        TextTypeError: it is neither.
        What the factory raises for the model and the tokenizer.

    """
    engine: Engine[Any] = given
    if _is_engine(given.__class__):
        return engine
    if isinstance(given, tuple) and len(given) == 2:
        engine = outside(FACTORY)(*given)
        return engine
    raise TextTypeError(
        "The model is given as an LM or a (model, tokenizer) tuple, not as "
        f"{type(given).__name__}: {abbreviated(given)}. backprompt.load(name) makes an LM."
    )


@lru_cache(maxsize=64)  # a protocol looks at all of its methods each time
def _is_engine(kind: type) -> bool:
    return issubclass(kind, Engine)


Function = Callable[..., Any]

_finders: dict[str, Callable[[], Function]] = {}


def register(name: str, find: Callable[[], Function]) -> None:
    """Let `outside(name)` return the function that `find()` returns."""
    _finders[name] = find


def outside(name: str) -> Function:
    """Return the registered function of this name, imported now if it was not."""
    return _finders[name]()
