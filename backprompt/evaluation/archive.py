"""The archive: the connection between a forest and a store of representations.

Before spans are forwarded, the archive looks in the store for the entries at their positions (memory/visit.py). After a
pass the archive writes new spans. An entry begins behind the last stored position, so a short span is written together
with a child. A fan is neither loaded nor written, so it may stand only where no rows behind its prompt would be either.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from backprompt.errors import EntryTooLargeError, StaleRepresentationError
from backprompt.evaluation.entries import Finder, Reader, chain, is_sound, root_of
from backprompt.evaluation.span_keys import Root, SpanKeys
from backprompt.forest.fan import Fan
from backprompt.forest.forest import Forest
from backprompt.forest.span import NOTHING, Junction, Kind, Span
from backprompt.memory.blocks import Block, BlockRows, gather_each, keys_values_of, states_of
from backprompt.memory.layout import Layout
from backprompt.memory.snapshots import snapshot_of
from backprompt.memory.tier import Tier
from backprompt.memory.visit import Visit
from backprompt.store.base import Entry, Header, Store
from backprompt.store.precision import encode
from backprompt.store.schema import SNAPSHOT

logger = logging.getLogger(__name__)

MIN_TOKENS = 16
"""Shorter runs of tokens are stored only on request, or as parents of stored spans.

Measured (benchmarks/README.md): from about 4 tokens on, writing and reading take no longer than computing once more;
but many stored entries are never read again.
"""


@dataclass(frozen=True)
class Loaded:
    """The ends of the texts that fitted into memory, and the number of tokens whose states were loaded."""

    served: list[Span]
    num_tokens: int


class Archive:
    """Loads spans from a store and saves them there.

    Args:
        store: the store.
        root: returns the root of all keys; called at first use, because it hashes the model's weights.
        has_changed: whether the weights differ from those of the root. If they do, no row is stored.
        decode: from token ids to text.

    """

    def __init__(
        self,
        store: Store,
        root: Callable[[], Root],
        has_changed: Callable[[], bool],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._store = store
        self._keys = SpanKeys(root)
        self._has_changed = has_changed
        self._decode = decode
        self._can_read = self._can_write = True
        self._has_warned = False

    def load(
        self, forest: Forest, ends: Sequence[Span], room: int, memory: Tier, layout: Layout, *, with_keys_values: bool
    ) -> Loaded:
        """Load the stored rows of the spans on the way to `ends`, and count them; spans may be split.

        Loading ends once more than `room` bytes are loaded, but at least one text gets all its stored rows. An entry
        with another layout than `layout` counts as damaged.
        """
        finder, reader = Finder(self._store, self._keys), Reader(self._store, layout)
        num_tokens = 0

        def bring(kind: Kind, span: Span) -> bool:
            nonlocal num_tokens
            for block in self._load_span(kind, forest, span, finder, reader):
                memory.add([block])
                visit.room -= block.num_bytes
                num_tokens += block.num_rows if kind == "states" else 0
            memory.note([span])
            return span.holds(kind)

        visit = Visit(room, bring)
        served = list(ends)
        if self._can_read:
            try:
                served = visit.serve(ends, with_keys_values=with_keys_values)
                for span in visit.absent:
                    span.is_stored = False  # perhaps it was, and others have deleted the entry
            except OSError as error:
                self._note_unreadable(error)
        return Loaded(served, num_tokens)

    def stored_parts(self, forest: Forest, span: Span) -> Iterator[Span]:
        """Cut a span where `load` would, by the store's index, and yield the stored parts; no row is loaded."""
        part: Span | None = None
        while part is not span and (num_tokens := self._num_stored(span)):
            part = span if num_tokens == len(span.token_ids) else forest.split(span, num_tokens)
            part.is_stored = True
            yield part

    def in_the_way(self, forest: Forest, fans: Iterable[Fan]) -> list[Fan]:
        """Return the fans in whose place spans would be loaded from the store, or written to it without a request.

        The spans of prompts are cut where `load` would cut them.
        """
        is_there: dict[Span, bool] = {}
        found: list[Fan] = []
        for fan in fans:
            end = fan.parent
            assert end is not None
            self._look_up(forest, end, is_there)
            if self._may_go_on(end) or self._writes_behind(end, fan.shape.max_rows):
                found.append(fan)
        return found

    def _look_up(self, forest: Forest, end: Span, is_there: dict[Span, bool]) -> None:
        """Mark the stored spans of a text; add to `is_there` whether each of its spans is held or stored."""
        for span in end.closure(known=is_there):
            is_reached = all(parent.parent is None or is_there[parent] for parent in span.parents)
            if is_reached and span.token_ids and not span.is_held(with_keys_values=True):
                is_reached = span in self.stored_parts(forest, span)
            is_there[span] = is_reached

    def _may_go_on(self, end: Span) -> bool:
        """Return whether `load` may find rows right behind the text that ends here."""
        if not self._can_read:
            return False
        try:
            return Finder(self._store, self._keys).goes_on(end)
        except OSError as error:
            self._note_unreadable(error)
            return False

    def _writes_behind(self, end: Span, num_rows: int) -> bool:
        """Return whether `save_new` may write a run of so many tokens behind a text, with the text's unstored end.

        Other texts may write a beginning of that end before, and an end that is forwarded is written itself if it is
        long enough.
        """
        if self._store.persist != "always" or not self._can_write:
            return False
        is_forwarded = not end.is_held(with_keys_values=True, in_host=True)
        ends = itertools.accumulate(len(span.token_ids) for span in reversed(_unstored(end)))
        unstored = [0, *(num for num in ends if num < MIN_TOKENS or not is_forwarded)]
        return max(unstored) + num_rows >= MIN_TOKENS

    def _num_stored(self, span: Span) -> int:
        """Return the number of a span's first tokens that are in the store's index."""
        if not self._can_read:
            return 0
        try:
            found = Finder(self._store, self._keys).find(span)
        except OSError as error:
            self._note_unreadable(error)
            return 0
        return 0 if found is None else found.num_tokens

    def others(self, beginning: Sequence[int]) -> list[Root]:
        """Return the roots, other than this archive's, of stored texts that begin with these tokens."""
        if not self._can_read:
            return []
        try:
            found = [
                root_of(header)
                for header in self._store.list(self._decode(beginning).rstrip("\N{REPLACEMENT CHARACTER}"))
                if is_sound(header)
                if header.position == 0 and header.token_ids[: len(beginning)] == tuple(beginning)
            ]
        except OSError as error:
            self._note_unreadable(error)
            return []
        return [root for root in dict.fromkeys(found) if root.key != self._keys.root.key]

    def under(self, root: Root) -> Archive:
        """Return an archive of the same store whose keys are built on another root."""
        return Archive(self._store, lambda: root, self._has_changed, self._decode)

    @property
    def root(self) -> Root:
        """The root of the archive's keys; the first use hashes the model's weights."""
        return self._keys.root

    def drops(self, num_tokens: int) -> bool:
        """Return whether a run of `num_tokens` tokens is too short to be stored without a request."""
        return self._store.persist == "always" and num_tokens < MIN_TOKENS

    def save_new(self, spans: Iterable[Span]) -> None:
        """Store computed spans that are long enough, if the store is filled without a request."""
        if self._store.persist != "always" or not self._can_write or self._has_changed():
            return
        for span in spans:
            run = [] if isinstance(span, Fan) else _unstored(span)
            if self._can_write and sum(len(part.token_ids) for part in run) >= MIN_TOKENS:
                self._save(span)

    def save(self, end: Span) -> None:
        """Store all of a text that holds its keys and values.

        Raises:
            OSError: the text cannot be written.
            StaleRepresentationError: the weights have changed since the text was computed.

        """
        if self._has_changed():
            raise StaleRepresentationError(
                "The model's weights have changed while a text was being stored, so the text was not stored. Save "
                "it again."
            )
        finder = Finder(self._store, self._keys)
        spans = [span for span in end.closure() if span.token_ids]
        for span in spans:  # the index is read again: others may have deleted entries
            assert span.parent is not None
            may_be_there = span.begins_chain or span.parent.is_stored
            span.is_stored = may_be_there and finder.name_of(span) is not None
        self._put_text(end)

    def _load_span(self, kind: Kind, forest: Forest, span: Span, finder: Finder, reader: Reader) -> Iterator[Block]:
        """Load the missing rows of a span, and yield them; the span is split where only a beginning can be loaded."""
        if isinstance(span, Junction):
            with forest.changing():
                span.move(kind, NOTHING, "device")
            return
        if isinstance(span, Fan):
            return
        while not span.holds(kind):
            found = finder.find(span)
            read = None if found is None else reader.read(kind, found, self._keys.root)
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
        logger.warning("%r cannot be read (%s). Evaluation goes on without this entry.", self._store, error)

    def _save(self, span: Span) -> None:
        try:
            self._put_text(span)
        except EntryTooLargeError as error:
            if not self._has_warned:
                logger.warning("%s Evaluation goes on; entries that do not fit are not stored.", error)
                self._has_warned = True
        except OSError as error:
            self._can_write = False
            logger.warning(
                "%r cannot be written to (%s). Evaluation goes on; nothing more is stored in this process.",
                self._store,
                error,
            )

    def _put_text(self, end: Span) -> None:
        """Store the unstored spans of a text, of any length: branches before the spans behind their group."""
        spans = [span for span in end.closure() if span.token_ids]
        continued = {span.parent for span in spans if not span.begins_chain}
        finder = Finder(self._store, self._keys)
        for span in spans:
            if span not in continued:
                self._put_chain(span, finder)

    def _put_chain(self, end: Span, finder: Finder) -> None:
        """Store the unstored spans on the way to `end`, after checking that the entries before them exist."""
        while run := _unstored(end):
            names = {before: finder.name_of(before) for before in _right_before(run[0])}
            missing = [before for before, name in names.items() if name is None]
            for before in missing:
                before.is_stored = False  # others have deleted the entry
            if not missing:
                self._put(run, tuple(dict.fromkeys(name for name in names.values() if name is not None)))
            elif run[0].begins_chain or any(not before.is_held(with_keys_values=True) for before in missing):
                return  # the run is of no use without the missing spans

    def _put(self, run: list[Span], behind: tuple[str, ...]) -> None:
        root = self._keys.root
        token_ids = tuple(token_id for span in run for token_id in span.token_ids)
        rows = ([states_of(span) for span in run], [keys_values_of(span) for span in run])
        tensors = {name: tensor.cpu() for of_kind in rows for name, tensor in gather_each(of_kind)}
        error, dtypes = max(span.error for span in run[-1].closure()), {}
        if self._store.dtype is not None:
            encoded = encode(tensors, self._store.dtype)
            tensors, dtypes, error = encoded.tensors, encoded.dtypes, max(error, encoded.error)
        snapshot = snapshot_of(run[-1])
        if snapshot is not None:
            tensors[SNAPSHOT] = snapshot.cpu()
        header = Header(
            start=self._keys.start_of(run[0]).hex(),
            end=self._keys.key_of(run[-1]).hex(),
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
    """Return the unstored spans on the way to this span, itself included, as far back as one entry may reach."""
    return list(itertools.takewhile(lambda part: not part.is_stored, chain(span)))[::-1]
