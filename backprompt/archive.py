"""The archive: what connects a forest with a store of representations.

Before spans are forwarded it looks in the store for what stands at their positions (visit.py). After a pass it writes
new spans. An entry begins behind the last position that is stored already, so short spans go with what continues them.

Entries of every store pass here on their way to a model, so here they are compared with what it computes: one that says
of itself what cannot be is reported, set aside, and computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from backprompt.blocks import (
    STATES,
    Block,
    BlockRows,
    KeysValues,
    Layout,
    States,
    gather_each,
    keys_values_of,
    states_of,
    token_axis,
)
from backprompt.errors import DamagedEntryError, EntryTooLargeError, StaleRepresentationError, StoreVersionError
from backprompt.forest import Forest
from backprompt.identity import extend_key, gap_key, group_key, root_key
from backprompt.radix import NOTHING, Junction, Kind, Span
from backprompt.store.base import Entry, Header, Store
from backprompt.store.precision import decode, encode, parts_of
from backprompt.store.schema import TensorSpec, check_header, check_tensors
from backprompt.tier import Tier
from backprompt.visit import Visit

logger = logging.getLogger(__name__)

MIN_TOKENS = 16
"""Runs of fewer tokens are not stored unless they are asked for, or something that is stored stands on them.

Measured (benchmarks/README.md): from about 4 tokens on, writing and reading take no longer than computing once more;
but what is stored is often never read again.
"""


@dataclass(frozen=True)
class Root:
    """What all keys are built on, and what it stands for."""

    key: bytes
    model: str
    tokenizer: str
    dtype: str
    exactness: str


@dataclass(frozen=True)
class Loaded:
    """The ends of the texts that there was room for, and the tokens whose states were loaded."""

    served: list[Span]
    num_tokens: int


class Archive:
    """Loads spans from a store and saves them there.

    Args:
        store: where to.
        root: called at first use, as it hashes the model's weights.
        has_changed: whether the weights are others than those of the root. Then nothing is stored.
        decode: from token ids to text.
        device: where loaded tensors go.

    """

    def __init__(
        self,
        store: Store,
        root: Callable[[], Root],
        has_changed: Callable[[], bool],
        decode: Callable[[Sequence[int]], str],
        device: torch.device,
    ) -> None:
        self._store = store
        self._make_root = root
        self._has_changed = has_changed
        self._root: Root | None = None
        self._decode = decode
        self._device = device
        self._can_read = self._can_write = True
        self._has_warned = False

    def load(
        self, forest: Forest, ends: Sequence[Span], room: int, memory: Tier, layout: Layout, *, with_keys_values: bool
    ) -> Loaded:
        """Let the spans on the way to `ends` hold what the store has of them, and count it; spans may be split.

        It ends when `room` bytes and a span have come; but at least one text gets all that there is of it. An entry
        that is not of this `layout` is damaged.
        """
        finder, reader = self._finder(), _Reader(self._store, layout, self._device)
        num_tokens = 0

        def bring(kind: Kind, span: Span) -> bool:
            nonlocal num_tokens
            for block in self._load_span(kind, forest, span, finder, reader):
                memory.add([block])
                visit.room -= block.num_bytes
                num_tokens += block.num_rows if kind == "states" else 0
            return span.holds(kind)

        visit = Visit(room, bring)
        served = list(ends)
        if self._can_read:
            try:
                served = visit.serve(ends, with_keys_values=with_keys_values)
                for span in visit.absent:
                    span.is_stored = False  # or not any more
            except OSError as error:
                self._note_unreadable(error)
        return Loaded(served, num_tokens)

    def num_stored(self, span: Span) -> int:
        """Return of how many of a span's first tokens the store's index says that it has them; loads nothing."""
        if not self._can_read:
            return 0
        try:
            found = self._finder().find(span)
        except OSError as error:
            self._note_unreadable(error)
            return 0
        return 0 if found is None else found.num_tokens

    def others(self, beginning: Sequence[int]) -> list[Root]:
        """Return what else than this archive's root texts stand on that are stored and whose first tokens are these."""
        if not self._can_read:
            return []
        try:
            found = [
                _root_of(header)
                for header in self._store.list(self._decode(beginning).rstrip("\N{REPLACEMENT CHARACTER}"))
                if _is_sound(header)
                if header.position == 0 and header.token_ids[: len(beginning)] == tuple(beginning)
            ]
        except OSError as error:
            self._note_unreadable(error)
            return []
        return [root for root in dict.fromkeys(found) if root.key != self._known_root().key]

    def under(self, root: Root) -> Archive:
        """Return an archive of the same store whose keys are built on another root."""
        return Archive(self._store, lambda: root, self._has_changed, self._decode, self._device)

    @property
    def root(self) -> Root:
        """What its keys are built on; the first use hashes the model's weights."""
        return self._known_root()

    def drops(self, num_tokens: int) -> bool:
        """Return whether a run of so many tokens is too short for a store that is filled without being asked."""
        return self._store.persist == "always" and num_tokens < MIN_TOKENS

    def save_new(self, spans: Iterable[Span]) -> None:
        """Store those of computed spans that are worth it, if the store is to be filled without being asked."""
        if self._store.persist != "always" or not self._can_write or self._has_changed():
            return
        for span in spans:
            run = _unstored(span)
            if self._can_write and sum(len(part.token_ids) for part in run) >= MIN_TOKENS:
                self._save(span)

    def save(self, end: Span) -> None:
        """Store all of a text that holds its keys and values.

        Raises:
            OSError: it cannot be written.
            StaleRepresentationError: the weights have changed since it was computed.

        """
        if self._has_changed():
            raise StaleRepresentationError(
                "The model's weights have changed while a text was to be stored, so it is not. Save it again."
            )
        finder = self._finder()
        spans = [span for span in end.closure() if span.token_ids]
        for span in spans:  # asked for anew: others may have deleted entries
            assert span.parent is not None
            may_be_there = span.begins_chain or span.parent.is_stored
            span.is_stored = may_be_there and finder.name_of(span) is not None
        self._put_text(end)

    def _load_span(self, kind: Kind, forest: Forest, span: Span, finder: _Finder, reader: _Reader) -> Iterator[Block]:
        """Load what the span does not hold, and yield it; the span is split where only a beginning can be loaded."""
        if isinstance(span, Junction):
            span.move(kind, NOTHING, "device")
            return
        while not span.holds(kind):
            found = finder.find(span)
            read = None if found is None else reader.read(kind, found, self._known_root())
            if found is None or read is None:
                return
            loaded = span if found.num_tokens == len(span.token_ids) else forest.split(span, found.num_tokens)
            with forest.changing():
                loaded.error = max(loaded.error if loaded.is_held() else 0.0, read.error)
                loaded.move(kind, BlockRows(read.block, 0, found.num_tokens), "device")
                loaded.is_stored = True
                loaded.loaded_in = forest.stamp()
            yield read.block

    def _note_unreadable(self, error: OSError) -> None:
        self._can_read = False
        logger.warning("%r cannot be read (%s). Evaluation goes on without it.", self._store, error)

    def _save(self, span: Span) -> None:
        try:
            self._put_text(span)
        except EntryTooLargeError as error:
            if not self._has_warned:
                logger.warning("%s Evaluation goes on; what does not fit is not stored.", error)
                self._has_warned = True
        except OSError as error:
            self._can_write = False
            logger.warning(
                "%r cannot be written to (%s). Evaluation goes on; nothing more is stored in this process.",
                self._store,
                error,
            )

    def _put_text(self, end: Span) -> None:
        """Store what is not stored of a text: branches before what stands behind their group, of whatever length."""
        spans = [span for span in end.closure() if span.token_ids]
        continued = {span.parent for span in spans if not span.begins_chain}
        finder = self._finder()
        for span in spans:
            if span not in continued:
                self._put_chain(span, finder)

    def _put_chain(self, end: Span, finder: _Finder) -> None:
        """Store what is not stored on the way to `end`, after making sure of what it goes behind."""
        while run := _unstored(end):
            names = {before: finder.name_of(before) for before in _right_before(run[0])}
            missing = [before for before, name in names.items() if name is None]
            for before in missing:
                before.is_stored = False  # others have deleted it
            if not missing:
                self._put(run, tuple(dict.fromkeys(name for name in names.values() if name is not None)))
            elif run[0].begins_chain or any(not before.is_held(with_keys_values=True) for before in missing):
                return  # of no use without it

    def _put(self, run: list[Span], behind: tuple[str, ...]) -> None:
        root = self._known_root()
        token_ids = tuple(token_id for span in run for token_id in span.token_ids)
        rows = ([states_of(span) for span in run], [keys_values_of(span) for span in run])
        tensors = {name: tensor.cpu() for of_kind in rows for name, tensor in gather_each(of_kind)}
        error, dtypes = max(span.error for span in run[-1].closure()), {}
        if self._store.dtype is not None:
            encoded = encode(tensors, self._store.dtype)
            tensors, dtypes, error = encoded.tensors, encoded.dtypes, max(error, encoded.error)
        header = Header(
            start=self._start_of(run[0]).hex(),
            end=self._key_of(run[-1]).hex(),
            position=run[0].position,
            token_ids=token_ids,
            text=self._decode(token_ids),
            model=root.model,
            tokenizer=root.tokenizer,
            dtype=root.dtype,
            exactness=root.exactness,
            error=error,
            dtypes=dtypes,
            behind=behind,
        )
        self._store.put(Entry(header, tensors))
        for span in run:
            span.is_stored = True

    def _finder(self) -> _Finder:
        return _Finder(self._store, self._start_of)

    def _known_root(self) -> Root:
        if self._root is None:
            self._root = self._make_root()
        return self._root

    def _key_of(self, span: Span) -> bytes:
        """Return the key of everything up to the span's last token."""
        if span.parent is None:
            return self._known_root().key
        for part in span.closure(known=_Keyed()):
            assert part.parent is not None
            before = self._key_of(part.parent) if part.parent.key is None else part.parent.key
            if isinstance(part, Junction):
                branches = [
                    (self._key_of(end), is_frozen)
                    for (end, is_frozen), repeats in part.branches.items()
                    for _ in range(repeats)
                ]
                part.key = group_key(before, branches, part.position)
            else:
                part.key = extend_key(before, part.position, part.token_ids)
        assert span.key is not None
        return span.key

    def _start_of(self, span: Span) -> bytes:
        """Return the key at which an entry begins that begins with this span."""
        assert span.parent is not None
        before = self._key_of(span.parent)
        return before if span.position == span.parent.stop else gap_key(before, span.position)


def _root_of(header: Header) -> Root:
    key = root_key(model=header.model, dtype=header.dtype, tokenizer=header.tokenizer, exactness=header.exactness)
    return Root(key, header.model, header.tokenizer, header.dtype, header.exactness)


class _Keyed:
    """All spans whose key is known."""

    def __contains__(self, span: object) -> bool:
        return isinstance(span, Span) and span.key is not None


@dataclass(frozen=True)
class _Found:
    """Rows `first..first + num_tokens` of an entry are said to be a beginning of a span."""

    name: str
    first: int
    num_tokens: int
    token_ids: tuple[int, ...]  # that the entry must begin with for this to be true
    position: int  # of the first of them
    start: bytes  # and the key that it must begin at


class _Finder:
    """Asks the store's index."""

    def __init__(self, store: Store, start_of: Callable[[Span], bytes]) -> None:
        self._store = store
        self._start_of = start_of

    def find(self, span: Span) -> _Found | None:
        """Return the longest stored beginning of the span: of an entry that begins with it, or runs through to it."""
        first, between = span, 0
        token_ids = span.token_ids
        while True:
            start = self._start_of(first)
            match = self._store.longest(start.hex(), token_ids)
            num_common = 0 if match is None else min(match.num_tokens, len(token_ids))
            if match is not None and num_common > between:
                return _Found(match.name, between, num_common - between, token_ids[:num_common], first.position, start)
            assert first.parent is not None
            if first.begins_chain or not first.parent.is_stored:
                return None  # no entry runs through what is not stored
            first = first.parent
            between += len(first.token_ids)
            token_ids = first.token_ids + token_ids

    def name_of(self, span: Span) -> str | None:
        """Return the name of the entry that has the last token of a span; None if there is none any more."""
        found = self.find(span)
        is_whole = found is not None and found.num_tokens == len(span.token_ids)
        return found.name if found is not None and is_whole and self._store.contains(found.name) else None


class _Reader:
    """Reads from the store, and keeps the entry that it read last."""

    def __init__(self, store: Store, layout: Layout, device: torch.device) -> None:
        self._store = store
        self._layout = layout
        self._device = device
        self._last: dict[
            Kind, tuple[tuple[str, bytes], Entry | None]
        ] = {}  # spans of one entry come one after the other

    def read(self, kind: Kind, found: _Found, root: Root) -> _Read | None:
        """Return these rows as a block; None if the entry is gone, damaged or another one."""
        entry = self._entry(found, kind, root)
        if entry is None:
            return None
        if not _is_what_was_found(entry.header, found):
            logger.warning("The index of %r names another entry than it should; the entry is not used.", self._store)
            return None
        if kind == "states":
            return _Read(self._states(entry, found), entry.header.error)
        return _Read(KeysValues(self._tensors(entry, KeysValues, found)), entry.header.error)

    def _states(self, entry: Entry, found: _Found) -> States:
        is_scored = (
            "is_argmax" in entry.tensors and entry.tensors["logprobs"].dtype == self._layout.rows["logprobs"].dtype
        )
        if not is_scored:  # of another version: its tokens are scored anew when asked for
            return States.of(self._rows(entry, "hidden", found))
        return States(self._tensors(entry, States, found))

    def _tensors(self, entry: Entry, block_type: type[Block], found: _Found) -> dict[str, torch.Tensor]:
        """Return all tensors of a block."""
        names = [name for name in self._layout.rows if (name in STATES) == (block_type is States)]
        return {name: self._rows(entry, name, found) for name in names}

    def _rows(self, entry: Entry, name: str, found: _Found) -> torch.Tensor:
        """Return rows of a tensor where a block has them, in storage of their own."""
        device = "cpu" if name in States.on_host else self._device
        axis = token_axis(name)
        parts = {
            part: entry.tensors[part].narrow(axis, found.first, found.num_tokens).to(device)
            for part in parts_of(name)
            if part in entry.tensors
        }
        rows = decode(parts, name, entry.header.dtypes)
        is_own = rows.is_contiguous() and rows.untyped_storage().nbytes() == rows.nbytes
        return rows if is_own else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device).copy_(rows)

    def _entry(self, found: _Found, kind: Kind, root: Root) -> Entry | None:
        place = (found.name, found.start)
        if kind not in self._last or self._last[kind][0] != place:
            self._last[kind] = (place, self._checked_entry(found, kind, root))
        return self._last[kind][1]

    def _checked_entry(self, found: _Found, kind: Kind, root: Root) -> Entry | None:
        """Return what the store has under this name, if it is what the model computes."""
        try:
            entry = self._store.get(found.name, STATES if kind == "states" else None)
            if entry is not None:
                self._check(entry, found, kind, root)
        except StoreVersionError as error:  # this one entry: others may be of this version
            logger.warning("%s of %r is not used: %s", found.name, self._store, error)
            return None
        except DamagedEntryError as error:
            self._set_aside(found.name, error)
            return None
        return entry

    def _check(self, entry: Entry, found: _Found, kind: Kind, root: Root) -> None:
        """Raise DamagedEntryError for an entry that does not deserve its name, or is not one of this model."""
        header = entry.header
        check_header(header)
        if header.name != found.name:
            raise DamagedEntryError(f"it is the entry {header.name}")
        if header.start != found.start.hex():
            return  # it may be sound: the index is wrong
        if header.position != found.position:
            raise DamagedEntryError(f"it says that it begins at {header.position}, not at {found.position}")
        if _root_of(header) != root:
            raise DamagedEntryError("it is another model's")
        expected = _expected(self._layout, len(header.token_ids))
        specs = {name: TensorSpec.of(tensor) for name, tensor in entry.tensors.items()}
        if kind == "states":
            expected, specs = ({name: of[name] for name in of if name in STATES} for of in (expected, specs))
        check_tensors(header, specs, expected)

    def _set_aside(self, name: str, error: DamagedEntryError) -> None:
        logger.warning(
            "%s of %r is damaged: %s. It is set aside and computed again when needed.", name, self._store, error
        )
        try:
            self._store.set_aside(name, str(error))
        except OSError as failure:  # then it stays, and is not used
            logger.warning("%s of %r cannot be set aside: %s", name, self._store, failure)


def _is_what_was_found(header: Header, found: _Found) -> bool:
    num_tokens = len(found.token_ids)
    return header.start == found.start.hex() and header.token_ids[:num_tokens] == found.token_ids


def _expected(layout: Layout, num_tokens: int) -> dict[str, TensorSpec]:
    """Return the tensors of an entry of so many tokens."""
    return {name: TensorSpec(row.dtype, layout.shape(name, num_tokens)) for name, row in layout.rows.items()}


def _is_sound(header: Header) -> bool:
    try:
        check_header(header)
    except DamagedEntryError:
        return False
    return True


@dataclass(frozen=True)
class _Read:
    """Rows from an entry, and what storing them in fewer bits cost."""

    block: Block
    error: float


def _right_before(span: Span) -> list[Span]:
    """Return the spans that end right before this one: its parent, or the ends of all branches of a group."""
    found: dict[Span, None] = {}
    stack = list(span.parents)
    while stack:
        before = stack.pop()
        if before.token_ids:
            found[before] = None
        else:
            stack += before.parents
    return list(found)


def _unstored(span: Span) -> list[Span]:
    """Return what is not stored on the way to the span, it included, as far back as one entry may reach."""
    run: list[Span] = []
    part = span
    while not part.is_stored:
        run.append(part)
        if part.begins_chain or part.parent is None:
            break
        part = part.parent
    run.reverse()
    return run
