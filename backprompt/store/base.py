"""The contract of a store of representations.

An entry is the representation of one run of tokens behind a given text. Keys belong to positions: `start` is the key of
all tokens before the first one, `end` the key of all tokens up to the last one. The two keys name the entry. Another
process that cuts the same text elsewhere still finds the entry: the process looks up entries that start at the key that
it has reached, takes the longest common prefix of the token ids, and continues behind this prefix. The first rows of an
entry are valid without the others, since attention is causal.

Every implementation promises:

- *Atomic*: after `put` returns, every reader sees the whole entry. Before that, or if `put` fails or the process dies,
  no reader sees any part of it.
- *Immutable*: a name stands for one content. Putting an entry again changes nothing for readers. A reader may keep an
  entry that is deleted later.
- *Honest*: `get` returns the stored entry, bit by bit, or None. A damaged entry is reported, set aside, then absent.
  A hostile writer can store wrong numbers of the right shapes; an `LM` refuses all other wrong entries (schema.py).
- *Shared*: any number of threads may use one store at once. Any number of processes may use one folder or bucket.

The contract needs no file system: names are short strings, entries are bytes with a small header, and the only queries
besides get and put concern "the entries at this key that begin with these token ids" (`longest`, and `goes_on`, which
a store may leave out). So a remote object store can implement the contract.
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
    """The identity of an entry.

    Attributes:
        start: key of all tokens before the first one, hex.
        end: key of all tokens up to the last one, hex.
        position: the position of the first token in its text.
        token_ids: the token ids that were computed.
        behind: the name of the entry that holds the token before the first one; behind a group, the names of the
            entries that hold each branch's last token. Empty for the first tokens of a text.
        text: the decoded token ids, for searching.
        model: fingerprint of the weights, the configuration and the adapters.
        tokenizer: fingerprint of the tokenizer.
        dtype: the dtype of the computation, such as "torch.float32".
        exactness: "exact", or the reduced dtype of its store. With a reduced dtype, the entry may have been computed
            from results that were read at that precision.
        error: the error from reduced precision (`Encoded.error`): the largest of this entry and of the entries before
            it.
        dtypes: the dtypes of "keys", "values" and "hidden" before storage at reduced precision; else empty.

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
        """The name for `get`, `contains` and `delete`."""
        return f"{self.start}-{self.end}"


@dataclass(frozen=True)
class Match:
    """The result of a lookup: an entry, and the number of its first tokens that equal the requested ones."""

    name: str
    num_tokens: int


@dataclass(frozen=True)
class Entry:
    """A header, and tensors by name, such as "keys.0"; the second axis of keys and values counts tokens."""

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
"""The largest token id and position that keys and SQLite can hold."""


class Store(ABC):
    """A store of representations by key. The module's docstring has the promises.

    Every method raises a TypeError for a value of a wrong type, a TokenizerError for a string that cannot be encoded,
    and a TokenIdError for a token id that is not from 0 to 2**63 - 1.

    Attributes:
        persist: the results that an `LM` stores. "always": all results that are worth their space; "explicit": the
            results of `text.save()`; "never": none. The store is read in all three cases.
        dtype: the precision at which an `LM` stores keys, values and hidden states: None as computed, or reduced
            (precision.py). The dtype is part of the keys, so entries of reduced precision are read only by an `LM`
            whose store has the same dtype.

    """

    persist: Persist
    dtype: StoredDtype | None = None

    @abstractmethod
    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry, on the CPU, with all of its tensors or only the given ones; None if it does not exist.

        Its tensors belong to the caller. Names in `tensors` that the entry does not have are ignored.
        """

    def get_beginning(self, name: str, num_rows: int, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry with all rows of its tensors, or with only the first `num_rows`; see `get`.

        Args:
            name: the name of the entry.
            num_rows: the number of first rows to return, one row for each token. A store may return all rows if more
                rows cost nothing.
            tensors: the names of the tensors, by default all.

        """
        return self.get(name, tensors)

    @abstractmethod
    def put(self, entry: Entry) -> None:
        """Store the entry.

        Raises:
            EntryTooLargeError: the entry is larger than the whole store may be.
            OSError: the entry cannot be written (no space, no permission); readers see the whole entry or none of it.

        """

    @abstractmethod
    def contains(self, name: str) -> bool:
        """Return whether `get` would find the entry, without a check for damage."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the entry; a missing entry is no error."""

    def set_aside(self, name: str, reason: str) -> None:
        """Remove an entry that is damaged, so that it can be put again; by default it is deleted.

        Args:
            name: the name of the entry.
            reason: the damage, which was reported already.

        """
        self.delete(name)

    @abstractmethod
    def longest(self, start: str, token_ids: Sequence[int]) -> Match | None:
        """Return the entry at this key with the longest common prefix with `token_ids`; None if none shares a token.

        The result is a hint: the caller must compare the header of the entry with the request.
        """

    def goes_on(self, start: str, token_ids: Sequence[int]) -> bool:
        """Return whether an entry at this key may begin with `token_ids` and have more tokens.

        An `LM` asks this of prompts. If no entry goes on behind a prompt, an `LM` need not look up each completion of
        the prompt. The answer True is always allowed, and is the default; the results are the same, and take longer. A
        subclass that finds more entries by `longest` than its base class must find them here, too.
        """
        return True

    @abstractmethod
    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Yield the headers of all entries whose text begins with `text_prefix`.

        Entries that are put or deleted during the iteration may be included.
        """

    @abstractmethod
    def close(self) -> None:
        """Release files and connections; a second call does nothing."""

    def __enter__(self: StoreType) -> StoreType:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_persist(persist: Persist) -> Persist:
    """Return `persist`.

    Raises:
        ValueError: `persist` is not one of `PERSIST`.

    """
    return as_choice(persist, "persist", PERSIST)


def check_name(name: object) -> None:
    """Raise TextTypeError if the name is not a string. A string that is no entry's name is allowed."""
    if not isinstance(name, str):
        raise TextTypeError(f"An entry's name must be a string, not {type(name).__name__}: {str(name)[:60]!r}.")


def as_token_ids(given: Any) -> tuple[int, ...]:
    """Return token ids as a tuple.

    Raises:
        TextTypeError: the value is not a sequence of whole numbers.
        TokenIdError: an id is not from 0 to 2**63 - 1.

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
    """Return the length of the common prefix of two sequences."""
    pairs = zip(some, others, strict=False)
    return next((idx for idx, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
