"""The archive: what connects a forest with a store of representations.

Before spans are forwarded it looks in the store for what stands at their positions: states first, which is all that
results are read off; then the keys and values of what must be continued. After a pass it writes new spans. An entry
begins behind the last position that is stored already, so short spans go with what continues them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from backprompt.cache import Block, BlockRows, KeysValues, States, gather, keys_values_of, states_of
from backprompt.errors import NoStoreError
from backprompt.identity import extend_key
from backprompt.plan import missing_spans
from backprompt.radix import Forest, Span
from backprompt.store.base import Entry, Header, Run, Store

logger = logging.getLogger(__name__)

MIN_TOKENS = 16
"""Runs of fewer tokens are not stored unless asked for: computing them again costs less than writing and reading."""

_Kind: TypeAlias = Literal["rows", "states"]


@dataclass(frozen=True)
class Root:
    """What all keys are built on, and what it stands for."""

    key: bytes
    model: str
    tokenizer: str
    dtype: str


class Archive:
    """Loads spans from a store and saves them there.

    Args:
        store: where to.
        root: called at first use, as it hashes the model's weights.
        decode: from token ids to text.
        device: where loaded tensors go.

    """

    def __init__(
        self,
        store: Store,
        root: Callable[[], Root],
        decode: Callable[[Sequence[int]], str],
        device: torch.device,
    ) -> None:
        self._store = store
        self._make_root = root
        self._root: Root | None = None
        self._decode = decode
        self._device = device
        self._can_write = True

    def load(self, forest: Forest, ends: Iterable[Span], *, with_keys: bool) -> tuple[list[Block], int]:
        """Let the spans on the way to `ends` hold what the store has of them.

        Returns the blocks that were made, and of how many tokens something was loaded.
        """
        ends = list(ends)
        reader = _Reader(self._store, self._key_of, self._device)
        for kind in ("states", "rows"):
            missing = missing_spans(ends, with_keys=with_keys)
            # States of what holds none; keys and values of what holds states, as the others were not found just now.
            self._load(kind, forest, [span for span in missing if (span.states is None) == (kind == "states")], reader)
        return reader.blocks, reader.num_tokens

    def save_new(self, spans: Iterable[Span]) -> None:
        """Store those of computed spans that are worth it, if the store is to be filled without being asked."""
        if self._store.persist != "always" or not self._can_write:
            return
        for span in spans:
            run = _unstored(span)
            if sum(len(part.token_ids) for part in run) >= MIN_TOKENS:
                self._save(run)

    def save(self, end: Span) -> None:
        """Store all of a text that holds its keys and values.

        Raises:
            NoStoreError: the store takes nothing.
            OSError: it cannot be written.

        """
        if self._store.persist == "never":
            raise NoStoreError(f'{self._store!r} was opened with persist="never". Open it with "explicit" or "always".')
        run = _unstored(end)
        if run:
            self._put(run)

    def _load(self, kind: _Kind, forest: Forest, spans: Sequence[Span], reader: _Reader) -> None:
        absent: set[Span] = set()
        for span in spans:
            assert span.parent is not None
            if span.parent in absent or not self._load_span(kind, forest, span, reader):
                absent.add(span)
                span.is_stored = False  # or not any more

    def _load_span(self, kind: _Kind, forest: Forest, span: Span, reader: _Reader) -> bool:
        """Return whether all of the span could be loaded; it is split where only a beginning could."""
        while True:
            found = reader.find(span)
            block = None if found is None else reader.read(kind, found)
            if found is None or block is None:
                return False
            is_whole = found.num_tokens == len(span.token_ids)
            loaded = span if is_whole else forest.split(span, found.num_tokens)
            setattr(loaded, kind, BlockRows(block, 0, found.num_tokens))
            loaded.is_stored = True
            if is_whole:
                return True

    def _save(self, run: list[Span]) -> None:
        try:
            self._put(run)
        except OSError as error:
            self._can_write = False
            logger.warning(
                "%r cannot be written to (%s). Evaluation goes on; nothing more is stored in this process.",
                self._store,
                error,
            )

    def _put(self, run: list[Span]) -> None:
        root = self._known_root()
        parent = run[0].parent
        assert parent is not None
        token_ids = tuple(token_id for span in run for token_id in span.token_ids)
        header = Header(
            start=self._key_of(parent).hex(),
            end=self._key_of(run[-1]).hex(),
            position=run[0].position,
            token_ids=token_ids,
            text=self._decode(token_ids),
            model=root.model,
            tokenizer=root.tokenizer,
            dtype=root.dtype,
        )
        states = [states_of(span) for span in run]
        rows = [keys_values_of(span) for span in run]
        tensors = {
            "hidden": gather(states, lambda block: block.hidden, dim=0),
            "logprobs": gather(states, lambda block: block.logprobs, dim=0),
            "has_logprobs": gather(states, lambda block: block.has_logprobs, dim=0),
        }
        for layer_idx in range(len(rows[0].block.keys)):
            tensors[f"keys.{layer_idx}"] = gather(rows, lambda block, i=layer_idx: block.keys[i], dim=1)  # type: ignore[misc]
            tensors[f"values.{layer_idx}"] = gather(rows, lambda block, i=layer_idx: block.values[i], dim=1)  # type: ignore[misc]
        self._store.put(Entry(header, tensors))
        for span in run:
            span.is_stored = True

    def _known_root(self) -> Root:
        if self._root is None:
            self._root = self._make_root()
        return self._root

    def _key_of(self, span: Span) -> bytes:
        """Return the key of everything up to the span's last token."""
        unknown: list[Span] = []
        ancestor: Span | None = span
        while ancestor is not None and ancestor.key is None and ancestor.parent is not None:
            unknown.append(ancestor)
            ancestor = ancestor.parent
        assert ancestor is not None
        key = self._known_root().key if ancestor.key is None else ancestor.key
        for below in reversed(unknown):
            key = below.key = extend_key(key, below.position, below.token_ids)
        return key


@dataclass(frozen=True)
class _Found:
    """Rows `start..start + num_tokens` of an entry are a beginning of a span."""

    name: str
    start: int
    num_tokens: int


class _Reader:
    """One visit to the store: each question asked once, each entry read once."""

    def __init__(self, store: Store, key_of: Callable[[Span], bytes], device: torch.device) -> None:
        self.blocks: list[Block] = []
        self.num_tokens = 0
        self._store = store
        self._key_of = key_of
        self._device = device
        self._runs: dict[tuple[bytes, int], Sequence[Run]] = {}
        self._entries: dict[tuple[str, _Kind], Entry | None] = {}

    def find(self, span: Span) -> _Found | None:
        """Return the longest stored beginning of the span: of an entry that begins with it, or runs through to it."""
        between: tuple[int, ...] = ()
        first = span
        best: _Found | None = None
        while first.parent is not None:
            for run in self._starting_at(self._key_of(first.parent), first.token_ids[0]):
                if run.token_ids[: len(between)] == between:
                    num_tokens = _num_common(run.token_ids, len(between), span.token_ids)
                    if num_tokens > (best.num_tokens if best is not None else 0):
                        best = _Found(run.name, len(between), num_tokens)
            if best is not None:
                return best
            first = first.parent
            between = first.token_ids + between
        return None

    def read(self, kind: _Kind, found: _Found) -> Block | None:
        """Return these rows as a block of their own; None if the entry turns out to be damaged or gone."""
        entry = self._entry(found.name, kind)
        if entry is None:
            return None
        rows = slice(found.start, found.start + found.num_tokens)

        def cut(name: str, dim: int) -> torch.Tensor:
            tensor = entry.tensors[name].narrow(dim, rows.start, found.num_tokens)
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device).copy_(tensor)

        block: Block
        if kind == "states":
            block = States(cut("hidden", 0), cut("logprobs", 0), entry.tensors["has_logprobs"][rows].clone())
            self.num_tokens += found.num_tokens
        else:
            num_layers = sum(name.startswith("keys.") for name in entry.tensors)
            layers = range(num_layers)
            block = KeysValues([cut(f"keys.{i}", 1) for i in layers], [cut(f"values.{i}", 1) for i in layers])
        self.blocks.append(block)
        return block

    def _entry(self, name: str, kind: _Kind) -> Entry | None:
        if (name, kind) not in self._entries:
            if kind == "states":
                self._entries[name, kind] = self._store.get(name, ("hidden", "logprobs", "has_logprobs"))
            else:
                self._entries[name, kind] = self._store.get(name)
        return self._entries[name, kind]

    def _starting_at(self, key: bytes, token_id: int) -> Sequence[Run]:
        if (key, token_id) not in self._runs:
            self._runs[key, token_id] = self._store.starting_at(key.hex(), token_id)
        return self._runs[key, token_id]


def _unstored(span: Span) -> list[Span]:
    """Return what is not stored on the way to the span, it included."""
    path = span.path()
    return path[next((idx for idx, part in enumerate(path) if not part.is_stored), len(path)) :]


def _num_common(run_ids: tuple[int, ...], offset: int, span_ids: tuple[int, ...]) -> int:
    num_common = 0
    for idx, token_id in enumerate(span_ids):
        if offset + idx == len(run_ids) or run_ids[offset + idx] != token_id:
            break
        num_common += 1
    return num_common
