"""Entries of a store for spans: finding the entry of a span, and reading its rows as blocks.

Entries of every store pass here on their way to a model, so they are compared here with the model: an entry with an
impossible header or tensors is reported, set aside, and computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from backprompt.errors import DamagedEntryError, StoreVersionError
from backprompt.evaluation.span_keys import Root, SpanKeys
from backprompt.forest.keys import root_key
from backprompt.forest.span import Kind, Span
from backprompt.memory.blocks import STATE_TENSORS, Block, KeysValues, States, token_axis
from backprompt.memory.layout import Layout
from backprompt.memory.snapshots import KeysValuesAndSnapshots
from backprompt.store.base import Entry, Header, Store
from backprompt.store.precision import decode, parts_of
from backprompt.store.schema import SNAPSHOT, TensorSpec, check_header, check_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A find in the index: rows `first..first + num_tokens` of an entry should be the first rows of a span."""

    name: str
    first: int
    num_tokens: int
    token_ids: tuple[int, ...]  # the ids that the entry must begin with for this to be true
    position: int  # of the first of these ids
    start: bytes  # the key that the entry must begin at


@dataclass(frozen=True)
class Read:
    """Rows from an entry, and the error of storing them in reduced precision."""

    block: Block
    error: float


class Finder:
    """Finds entries in the store's index."""

    def __init__(self, store: Store, keys: SpanKeys) -> None:
        self._store = store
        self._keys = keys

    def find(self, span: Span) -> Found | None:
        """Return the longest stored beginning of the span, in an entry that begins with the span or before it."""
        first, between = span, 0
        token_ids = tuple(span.token_ids)
        while True:
            start = self._keys.start_of(first)
            match = self._store.longest(start.hex(), token_ids)
            num_common = 0 if match is None else min(match.num_tokens, len(token_ids))
            if match is not None and num_common > between:
                return Found(match.name, between, num_common - between, token_ids[:num_common], first.position, start)
            assert first.parent is not None
            if first.begins_chain or not first.parent.is_stored:
                return None  # no entry runs through an unstored span
            first = first.parent
            between += len(first.token_ids)
            token_ids = (*first.token_ids, *token_ids)

    def goes_on(self, end: Span) -> bool:
        """Return whether `find` may find an entry for a span right behind the text that ends here."""
        if self._store.goes_on(self._keys.key_of(end).hex(), ()):
            return True
        token_ids: tuple[int, ...] = ()
        for span in chain(end):
            if not span.is_stored:
                return False  # no entry runs through an unstored span
            token_ids = (*span.token_ids, *token_ids)
            if self._store.goes_on(self._keys.start_of(span).hex(), token_ids):
                return True
        return False

    def name_of(self, span: Span) -> str | None:
        """Return the name of the entry that has the last token of a span; None if the store has no such entry."""
        found = self.find(span)
        is_whole = found is not None and found.num_tokens == len(span.token_ids)
        return found.name if found is not None and is_whole and self._store.contains(found.name) else None


class Reader:
    """Reads from the store, and keeps the entry, or beginning of an entry, that was read last for each kind of data."""

    def __init__(self, store: Store, layout: Layout) -> None:
        self._store = store
        self._layout = layout
        self._last: dict[
            Kind, tuple[tuple[str, bytes], Entry | None]
        ] = {}  # spans of one entry come one after the other

    def read(self, kind: Kind, found: Found, root: Root) -> Read | None:
        """Return these rows as a block; None if the entry is gone, is damaged, or is not the one that was found."""
        entry = self._entry(found, kind, root)
        if entry is None:
            return None
        if not _is_what_was_found(entry.header, found):
            logger.warning("The index of %r names a wrong entry; the entry is not used.", self._store)
            return None
        if kind == "states":
            return Read(self._states(entry, found), entry.header.error)
        return Read(self._keys_values(entry, found), entry.header.error)

    def _keys_values(self, entry: Entry, found: Found) -> KeysValues:
        tensors = self._tensors(entry, KeysValues, found)
        if not self._layout.snapshot_bytes:
            return KeysValues(tensors)
        block = KeysValuesAndSnapshots(tensors)
        if SNAPSHOT in entry.tensors and found.first + found.num_tokens == len(entry.header.token_ids):
            snapshot = torch.empty_like(entry.tensors[SNAPSHOT], device=self._layout.rows["keys.0"].device)
            block.snapshots[found.num_tokens - 1] = snapshot.copy_(entry.tensors[SNAPSHOT])
        return block

    def _states(self, entry: Entry, found: Found) -> States:
        is_scored = (
            "is_argmax" in entry.tensors and entry.tensors["logprobs"].dtype == self._layout.rows["logprobs"].dtype
        )
        if not is_scored:  # an entry of another version: its tokens are scored anew when needed
            return States.of(self._rows(entry, "hidden", found))
        return States(self._tensors(entry, States, found))

    def _tensors(self, entry: Entry, block_type: type[Block], found: Found) -> dict[str, torch.Tensor]:
        """Return all tensors of a block."""
        names = [name for name in self._layout.rows if (name in STATE_TENSORS) == (block_type is States)]
        return {name: self._rows(entry, name, found) for name in names}

    def _rows(self, entry: Entry, name: str, found: Found) -> torch.Tensor:
        """Return rows of a tensor in storage of their own, on the device on which a block has this tensor."""
        device = self._layout.rows[name].device
        axis = token_axis(name)
        parts = {
            part: entry.tensors[part].narrow(axis, found.first, found.num_tokens).to(device)
            for part in parts_of(name)
            if part in entry.tensors
        }
        rows = decode(parts, name, entry.header.dtypes)
        is_own = rows.is_contiguous() and rows.untyped_storage().nbytes() == rows.nbytes
        return rows if is_own else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device).copy_(rows)

    def _entry(self, found: Found, kind: Kind, root: Root) -> Entry | None:
        """Return the entry with at least the rows that were found; if read again, up to twice as many as before."""
        place, num_rows = (found.name, found.start), found.first + found.num_tokens
        last_place, entry = self._last.get(kind, (None, None))
        if last_place != place:
            entry = self._checked_entry(found, num_rows, kind, root)
        elif entry is not None and _num_rows(entry) < min(num_rows, len(entry.header.token_ids)):
            twice = min(2 * _num_rows(entry), len(entry.header.token_ids) // 2)
            entry = self._checked_entry(found, max(num_rows, twice), kind, root)
        self._last[kind] = (place, entry)
        return entry

    def _checked_entry(self, found: Found, num_rows: int, kind: Kind, root: Root) -> Entry | None:
        """Return the store's entry of this name, or its beginning, if it fits the model."""
        try:
            entry = self._store.get_beginning(found.name, num_rows, STATE_TENSORS if kind == "states" else None)
            if entry is not None:
                self._check(entry, found, kind, root)
        except StoreVersionError as error:  # only this entry: others may be of the right version
            logger.warning("%s of %r is not used: %s", found.name, self._store, error)
            return None
        except DamagedEntryError as error:
            self._set_aside(found.name, error)
            return None
        return entry

    def _check(self, entry: Entry, found: Found, kind: Kind, root: Root) -> None:
        """Raise DamagedEntryError for an entry that contradicts its name or does not belong to this model."""
        header = entry.header
        check_header(header)
        if header.name != found.name:
            raise DamagedEntryError(f"it is the entry {header.name}")
        if header.start != found.start.hex():
            return  # the entry may be sound: the index is wrong
        if header.position != found.position:
            raise DamagedEntryError(f"its header says that it begins at {header.position}, not at {found.position}")
        if root_of(header) != root:
            raise DamagedEntryError("it belongs to another model")
        if found.first + found.num_tokens <= _num_rows(entry) < len(header.token_ids):
            header = replace(header, token_ids=header.token_ids[: _num_rows(entry)])
        expected = _expected(self._layout, len(header.token_ids))
        specs = {name: TensorSpec.of(tensor) for name, tensor in entry.tensors.items()}
        if kind == "states":
            expected, specs = ({name: of[name] for name in of if name in STATE_TENSORS} for of in (expected, specs))
        check_tensors(header, specs, expected)

    def _set_aside(self, name: str, error: DamagedEntryError) -> None:
        logger.warning(
            "%s of %r is damaged: %s. It is set aside and computed again when needed.", name, self._store, error
        )
        try:
            self._store.set_aside(name, str(error))
        except OSError as failure:  # the entry stays, and is not used
            logger.warning("%s of %r cannot be set aside: %s", name, self._store, failure)


def chain(end: Span) -> Iterator[Span]:
    """Yield the spans that one entry may reach over, back from `end`; none from the root and from a junction."""
    span: Span | None = end if end.token_ids else None
    while span is not None:
        yield span
        span = None if span.begins_chain else span.parent


def _is_what_was_found(header: Header, found: Found) -> bool:
    num_tokens = len(found.token_ids)
    return header.start == found.start.hex() and header.token_ids[:num_tokens] == found.token_ids


def _num_rows(entry: Entry) -> int:
    """Return the number of rows that were read of an entry: all rows, or those at its beginning."""
    logprobs = entry.tensors.get("logprobs")
    return len(entry.header.token_ids) if logprobs is None or not logprobs.ndim else len(logprobs)


def _expected(layout: Layout, num_tokens: int) -> dict[str, TensorSpec]:
    """Return the specs of the tensors of an entry of `num_tokens` tokens."""
    specs = {name: TensorSpec(row.dtype, layout.shape(name, num_tokens)) for name, row in layout.rows.items()}
    return specs | ({SNAPSHOT: TensorSpec(torch.uint8, (layout.snapshot_bytes,))} if layout.snapshot_bytes else {})


def root_of(header: Header) -> Root:
    """Return the root of an entry's keys, as stated by its header."""
    key = root_key(model=header.model, dtype=header.dtype, tokenizer=header.tokenizer, exactness=header.exactness)
    return Root(key, header.model, header.tokenizer, header.dtype, header.exactness)


def is_sound(header: Header) -> bool:
    """Return whether a header is valid."""
    try:
        check_header(header)
    except DamagedEntryError:
        return False
    return True
