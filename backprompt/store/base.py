"""The contract of a store of representations.

An entry is what one run of tokens looks like behind all that stands before it. Keys belong to positions:
`start` names everything before the first token, `end` everything up to the last, so the two name the entry. Another
process that cuts the same text elsewhere finds it all the same: it asks for what starts at the key that it has
reached, takes the longest common beginning of the token ids (an entry's first rows are valid alone, attention is
causal), and goes on from there.

What every implementation promises:

- *Atomic*: after `put` returns, every reader sees the whole entry; before, or if it fails or the process dies, nothing.
- *Immutable*: a name stands for one content, so putting it again changes nothing that a reader sees, and whoever has
  got an entry may keep it, whatever is deleted meanwhile.
- *Honest*: `get` returns what was put, bit by bit, or None. What is damaged is reported, set aside, and then absent.
  Whoever can write to a store can put wrong numbers of the right shapes into it; an `LM` refuses all else (schema.py).
- *Shared*: any number of threads may use one store at once, and processes one folder or bucket.

Nothing in it needs a file system: names are short strings, entries are bytes with a small header, and the only question
besides get and put is "what begins like this at this key?", so a remote object store can stand behind it.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from backprompt.arguments import as_choice, as_list
from backprompt.errors import TextTypeError, TokenIdError
from backprompt.store.precision import StoredDtype


@dataclass(frozen=True)
class Header:
    """What an entry stands for.

    Attributes:
        start: key of everything before the first token, hex.
        end: key of everything up to the last token, hex.
        position: of the first token in its text.
        token_ids: the truth about what was computed.
        behind: the names of the entries that have the token before the first, or each branch's last one if that is a
            group; none for the first tokens of a text.
        text: what they decode to; for people who search.
        model: fingerprint of the weights, the configuration and the adapters.
        tokenizer: its fingerprint.
        dtype: of the computation, such as "torch.float32".
        exactness: "exact", or the dtype that its store stores in fewer bits: what the entry was computed on may have
            been read from there, too.
        error: what that cost: see `Encoded.error`; the largest of this entry's and of what it was computed on.
        dtypes: what "keys", "values" and "hidden" were before they were stored in fewer bits; else empty.

    """

    start: str
    end: str
    position: int
    token_ids: tuple[int, ...]
    text: str
    model: str
    tokenizer: str
    dtype: str
    exactness: str = "exact"
    error: float = 0.0
    dtypes: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What `get`, `contains` and `delete` take."""
        return f"{self.start}-{self.end}"


@dataclass(frozen=True)
class Match:
    """What a lookup finds: an entry, and how many of its first tokens are those that were asked for."""

    name: str
    num_tokens: int


@dataclass(frozen=True)
class Entry:
    """A header and tensors by name, such as "keys.0"; rows of tokens are the second axis of keys and values."""

    header: Header
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


Persist: TypeAlias = Literal["always", "explicit", "never"]
PERSIST: tuple[Persist, ...] = ("always", "explicit", "never")

StoreType = TypeVar("StoreType", bound="Store")


MAX_INT = (1 << 63) - 1
"""Of token ids and positions: what keys and SQLite have room for."""


class Store(ABC):
    """Representations by key. See the top of this file for what is promised.

    Every method raises a TypeError for what is not of the type that it takes, a string that cannot be encoded is a
    TokenizerError, and a token id that is not from 0 to 2**63 - 1 a TokenIdError.

    Attributes:
        persist: what an `LM` puts into it: "always" all that is worth it, "explicit" what `text.save()` names,
            "never" nothing, so that it is only read. Reading is automatic.
        dtype: how an `LM` stores keys, values and hidden states: None as computed, or in fewer bits (precision.py).
            It is part of the keys, so that an `LM` that did not ask for fewer bits never reads them.

    """

    persist: Persist
    dtype: StoredDtype | None = None

    @abstractmethod
    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry, on the CPU, with only these of its tensors if given; None if there is none.

        Its tensors belong to the caller. Names in `tensors` that the entry does not have are left out.
        """

    @abstractmethod
    def put(self, entry: Entry) -> None:
        """Store the entry.

        Raises:
            EntryTooLargeError: it does not fit the store at all.
            OSError: it cannot be written (no space, no permission); then all of it is visible, or nothing.

        """

    @abstractmethod
    def contains(self, name: str) -> bool:
        """Return whether `get` would find it, without looking whether it is damaged."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the entry; one that is not there is no error."""

    def set_aside(self, name: str, reason: str) -> None:
        """Take away an entry that turned out to be damaged, so that it can be put again; by default it is deleted.

        Args:
            name: of the entry.
            reason: what is wrong with it, which was reported already.

        """
        self.delete(name)

    @abstractmethod
    def longest(self, start: str, token_ids: Sequence[int]) -> Match | None:
        """Return the entry at this key that has the longest common beginning with `token_ids`; None if none has one.

        A hint: whoever gets the entry compares its header with what was asked for.
        """

    @abstractmethod
    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Yield the headers of all entries whose text begins so; those put or deleted meanwhile may be among them."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections; a second call does nothing."""

    def __enter__(self: StoreType) -> StoreType:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_persist(persist: Persist) -> Persist:
    """Return `persist`.

    Raises:
        ValueError: it is none of `PERSIST`.

    """
    return as_choice(persist, "persist", PERSIST)


def check_name(name: object) -> None:
    """Raise TextTypeError for what is no string. A string that is no entry's name is the name of none."""
    if not isinstance(name, str):
        raise TextTypeError(f"An entry's name must be a string, not {type(name).__name__}: {str(name)[:60]!r}.")


def as_token_ids(given: Any) -> tuple[int, ...]:
    """Return token ids as a tuple.

    Raises:
        TextTypeError: it is no sequence of whole numbers.
        TokenIdError: one is not from 0 to 2**63 - 1.

    """
    needed = "token_ids must be a sequence of whole numbers"
    listed = as_list(given, needed)
    try:
        ids = tuple(map(operator.index, listed))
    except TypeError as error:
        raise TextTypeError(f"{needed}: {error}.") from error
    if ids and not 0 <= min(ids) <= max(ids) <= MAX_INT:
        odd = next(token_id for token_id in ids if not 0 <= token_id <= MAX_INT)
        raise TokenIdError(f"token_ids must be numbers from 0 to 2**63 - 1, not {odd}.")
    return ids


def num_common(some: Sequence[int], others: Sequence[int]) -> int:
    """Return how many items two sequences have in common from the beginning."""
    pairs = zip(some, others, strict=False)
    return next((idx for idx, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
