"""Passes by levels: for a model whose attention cannot be packed, but whose `forward` takes a cache.

The tokens of a pass are forwarded in several calls of the model's own body. In each call, all texts have the same
number of tokens before it and take the same number of tokens, so there is neither padding nor a mask. Spans that begin
at the same depth advance together by the length of the shortest. Each span continues a copy of the cache of the span
before it.

    pass    a a a a --+-- b b b --+-- c c          calls    a a a a
                      |           +-- d d                   b b b | e e e    behind a copy of the cache of aaaa
                      +-- e e e e e                         c c | d d | e e  behind copies of three caches

A cache is built of rows of keys and values, and of snapshots of states (cache_form.py). Both are kept in the blocks of
spans. If a span is split because another text ends within it, the upper part has no snapshot. Such a snapshot is
computed again from the last one before it.

Some models use their states only if a call has a single token. Their spans advance by one token in each call
(`Way.takes_several`). The beginning of a text is one call, together with other beginnings of the same length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from backprompt.attention.base import Scoring
from backprompt.attention.copies import all_finite
from backprompt.errors import UnsupportedModelError
from backprompt.forest.fan import Fan
from backprompt.forest.plan import Pass
from backprompt.forest.span import Span
from backprompt.memory.blocks import BlockRows, KeysValues, keys_values_of, layer_names
from backprompt.memory.budget import free_bytes
from backprompt.memory.snapshots import KeysValuesAndSnapshots, snapshot_of
from backprompt.model.cache_form import KEYS_VALUES_NAMES, Body, CacheForm
from backprompt.model.forwarded import Forwarded, Work

MAX_CACHE_BYTES = 256 << 20
"""The largest number of bytes for the caches of a call, unless the cache of a single text is larger."""

MAX_SNAPSHOT_BYTES = 1 << 30
"""The largest number of bytes for the snapshots that one pass leaves, or a share of the free bytes if that is more.

Snapshots of spans that others continue come first.
"""

SHARE_FOR_SNAPSHOTS = 0.25
"""The share of the free bytes in `MAX_SNAPSHOT_BYTES`."""

Pieces = tuple["BlockRows[KeysValues]", ...]
"""The rows of keys and values of a text from its first token on."""


def check_packed(levels: Levels | None, what: str) -> None:
    """Raise UnsupportedModelError if passes go by levels: `what` needs packed attention."""
    if levels is not None:
        raise UnsupportedModelError(
            f"{what} need packed attention, but this model is evaluated by levels, with its own attention. "
            f"{levels.way.why_not_packed}"
        )


@dataclass(eq=False)
class _Run:
    """Consecutive tokens of a text: those of a span, or those that lead to the end of a span without a snapshot.

    Attributes:
        token_ids: the tokens.
        position: the number of tokens before them.
        before: the run that they continue, if that is part of the same pass.
        pieces: the rows of keys and values of all tokens before; for a held span also the rows of its own tokens.
        own: the rows for the results; None if only a snapshot is needed.
        span: the span whose end is the end of the run; None for a part of a fan.
        snapshot: the states behind the tokens that are done.
        num_done: the number of tokens that are done.

    """

    token_ids: tuple[int, ...]
    position: int
    before: _Run | None
    pieces: Pieces
    own: BlockRows[KeysValues] | None
    span: Span | None
    snapshot: Tensor | None = None
    num_done: int = 0

    @property
    def num_before(self) -> int:
        """The number of tokens of its text that are done."""
        return self.position + self.num_done

    @property
    def num_left(self) -> int:
        """The number of tokens to forward."""
        return len(self.token_ids) - self.num_done

    @property
    def is_ready(self) -> bool:
        """Whether a call can take its next tokens."""
        return self.num_left > 0 and (self.before is None or not self.before.num_left)

    def pieces_before(self) -> Pieces:
        """Return the rows of keys and values of all tokens that are done."""
        if self.own is None:
            return _first_rows(self.pieces, self.num_before)
        return self.pieces if not self.num_done else (*self.pieces, self.own.split(self.num_done)[0])


class _NoAttention:
    """The attention of a generation's steps by levels: nothing is prepared."""

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Raise: the model has its own attention."""
        raise AssertionError(layer_idx)

    def advance(self, rows: Sequence[int] | None = None) -> None:
        """Do nothing: each step is forwarded by levels."""


NO_ATTENTION = _NoAttention()


@dataclass(frozen=True)
class Way:
    """The findings of the probe about calls behind a cache.

    Attributes:
        takes_several: whether a call with several tokens sees all of the cache, as a call with one token does.
        takes_batches: whether a call takes several texts with a token each.
        takes_positions: whether a call is given the positions of the tokens.
        counts_positions: whether a call behind a cache gives the same without positions as with them.
        why_not_packed: the reason why passes go by levels, for messages.

    """

    takes_several: bool
    takes_batches: bool
    takes_positions: bool
    counts_positions: bool
    why_not_packed: str


class Levels:
    """Forwards passes by levels.

    Args:
        body: the model's body, with its own attention.
        form: the form of its cache.
        way: the way to call the body.

    """

    def __init__(self, body: Body, form: CacheForm, way: Way) -> None:
        self.body = body
        self.form = form
        self.way = way
        body.takes_positions = way.takes_positions
        self.names = [name for idx in range(max(1, -(-len(form.rows) // 2))) for name in layer_names(idx)]

    @property
    def name(self) -> str:
        """The way of attending, for `lm.stats`."""
        num_tokens = "" if self.way.takes_several else ", a token a call"
        return f"the model's own, by levels{num_tokens}{'' if self.way.takes_batches else ', a text a call'}"

    def forward(self, pass_: Pass) -> Forwarded:
        """Forward all tokens of a pass.

        Raises:
            CacheError: the model's cache has another form than it had in the probe.

        """
        return _LevelsOfPass(self, pass_).forward()

    def cache_of(self, model_name: str, keys_values: KeysValues, snapshot: Tensor | None) -> DynamicCache:
        """Return a new cache of one text, all rows of a block, and of the snapshot behind them.

        Raises:
            UnsupportedModelError: the model's cache is not a `DynamicCache`, or lacks the snapshot.

        """
        if self.form.empty is None or self.form.name not in KEYS_VALUES_NAMES or not self.form.rows:
            raise UnsupportedModelError(
                f"{model_name} has a cache of its own form, which past_key_values() cannot make. Read logits and "
                "log-probabilities from the text, or continue the text with text.generate(...)."
            )
        if not (self.way.takes_several and self.way.counts_positions):
            raise UnsupportedModelError(
                f"A plain call of {model_name} with several tokens behind a cache gives wrong numbers, so "
                "past_key_values() makes no cache. Continue the text with text.generate(...)."
            )
        if self.form.states and snapshot is None:
            raise UnsupportedModelError(
                f"The states of {model_name} behind this text are not held, because the text was evaluated as the "
                "beginning of a longer text. Continue the text with text.generate(...)."
            )
        rows = BlockRows(keys_values, 0, keys_values.num_rows)
        made = self.built([(rows,)], None if snapshot is None else snapshot[None])
        assert isinstance(made, DynamicCache)
        return made

    def built(self, texts: Sequence[Pieces], snapshots: Tensor | None) -> object:
        """Return a new cache of several texts of one length; `snapshots`: `(texts, bytes)`."""
        num_tokens = sum(piece.stop - piece.start for piece in texts[0])
        rows = [_gathered(texts, name) for name in self.names[: len(self.form.rows)]]
        return self.form.built(rows, snapshots, num_tokens)


class _LevelsOfPass:
    """One pass that is being forwarded.

    Keeps the runs of its spans, the runs that lead to missing snapshots, the rows that are done, and the cache of the
    last call with the runs of its texts.
    """

    def __init__(self, levels: Levels, pass_: Pass) -> None:
        self._levels, self._form = levels, levels.form
        self._pass = pass_
        nothing = torch.empty((1, pass_.num_tokens, 0))  # until the first call shows the shapes
        self._block = KeysValuesAndSnapshots(dict.fromkeys(levels.names, nothing))
        self._hidden: Tensor | None = None
        self._num_calls = 0
        self._cache: object = None
        self._of_cache: list[_Run] = []
        self._runs: list[_Run] = []
        self._again: dict[Span, _Run] = {}

    def forward(self) -> Forwarded:
        """Forward all tokens."""
        self._plan()
        while ready := [run for run in (*self._again.values(), *self._runs) if run.is_ready]:
            self._call(*self._next_call(ready))
        self._take_snapshots()
        self._keep_snapshots()
        assert self._hidden is not None
        are_finite = all_finite([self._hidden, *self._block.tensors.values()])
        num_again = sum(len(run.token_ids) for run in self._again.values())
        restored = {span: run.snapshot.clone() for span, run in self._again.items() if run.snapshot is not None}
        return Forwarded(self._block, self._hidden, are_finite, work=Work(self._num_calls, num_again, restored))

    # Planning

    def _plan(self) -> None:
        """Make the runs of all spans, and the runs that lead to missing snapshots."""
        start = 0
        run_of: dict[Span, _Run] = {}
        for span in self._pass.spans:
            parts = span.unfolded() if isinstance(span, Fan) else (span,)
            for part in parts:
                assert part.parent is not None
                before = run_of.get(part.parent) or self._lost(part.parent)
                own: BlockRows[KeysValues] = BlockRows(self._block, start, start + len(part.token_ids))
                run = _Run(
                    tuple(part.token_ids),
                    part.position,
                    before,
                    self._pieces_up_to(part.parent, run_of),
                    own,
                    None if isinstance(span, Fan) else span,
                    None if before is not None else snapshot_of(part.parent),
                )
                run_of[part] = run
                self._runs.append(run)
                start = own.stop

    def _pieces_up_to(self, span: Span, run_of: Mapping[Span, _Run]) -> Pieces:
        """Return the rows of keys and values of a text that ends with a span."""
        run = run_of.get(span)
        if run is not None:
            assert run.own is not None
            return _joined((*run.pieces, run.own))
        return _joined(keys_values_of(part) for part in span.path())

    def _lost(self, span: Span) -> _Run | None:
        """Return the run that leads to the snapshot behind a held span; None if the snapshot is there."""
        if not self._form.states or span.parent is None or snapshot_of(span) is not None:
            return None
        if span not in self._again:
            path = span.path()
            last = next((part for part in reversed(path) if part in self._again or _has_snapshot(part)), None)
            behind = path[path.index(last) + 1 :] if last is not None else path
            self._again[span] = _Run(
                tuple(token_id for part in behind for token_id in part.token_ids),
                behind[0].position,
                self._again.get(last) if last is not None else None,
                _joined(keys_values_of(part) for part in path),
                None,
                span,
                None if last is None else snapshot_of(last),
            )
        return self._again[span]

    # Calling

    def _next_call(self, ready: Sequence[_Run]) -> tuple[list[_Run], int]:
        """Return the runs of the next call, and the number of tokens that each takes."""
        num_before = min(run.num_before for run in ready)
        group = [run for run in ready if run.num_before == num_before]
        if not self._levels.way.takes_batches:
            group = group[:1]
        if self._levels.way.takes_several:
            num_tokens = min(run.num_left for run in group)
        else:
            num_tokens = 1 if num_before else group[0].num_left
            group = group if num_before else [run for run in group if run.num_left == num_tokens]
        cache_bytes = (num_before + num_tokens) * self._block.row_bytes + self._form.snapshot_bytes
        return group[: max(1, MAX_CACHE_BYTES // max(1, cache_bytes))], num_tokens

    def _call(self, runs: list[_Run], num_tokens: int) -> None:
        """Forward the next tokens of some runs."""
        cache = self._cache_of(runs)
        ids = [run.token_ids[run.num_done : run.num_done + num_tokens] for run in runs]
        num_before = runs[0].num_before
        hidden, cache = self._levels.body.call(ids, cache, num_before)
        self._num_calls += 1
        if self._hidden is None:
            self._make_results(hidden, cache, num_before + num_tokens)
        self._keep(runs, num_tokens, hidden, self._form.rows_of(cache, num_before + num_tokens))
        for run in runs:
            run.num_done += num_tokens
        self._cache, self._of_cache = cache, runs

    def _cache_of(self, runs: list[_Run]) -> object:
        """Return the cache behind which the next tokens of some runs go; None at the beginning."""
        if self._of_cache == runs:
            return self._cache
        self._take_snapshots()
        self._cache, self._of_cache = None, []
        if not runs[0].num_before:
            return self._form.begun()
        snapshots = None
        if self._form.states:
            before = [run.snapshot if run.num_done or run.before is None else run.before.snapshot for run in runs]
            snapshots = torch.stack([snapshot for snapshot in before if snapshot is not None])
        return self._levels.built([run.pieces_before() for run in runs], snapshots)

    def _take_snapshots(self) -> None:
        """Hand the states in the last call's cache to its runs, before the cache is dropped."""
        if self._form.states and self._of_cache:
            for run, snapshot in zip(self._of_cache, self._form.snapshots_of(self._cache), strict=True):
                run.snapshot = snapshot

    def _make_results(self, hidden: Tensor, cache: object, num_tokens: int) -> None:
        """Make the tensors for the results of all rows."""
        num_rows = self._pass.num_tokens
        found = self._form.rows_of(cache, num_tokens)
        for name, rows in zip(self._levels.names, found, strict=False):
            self._block.tensors[name] = rows.new_empty((rows.shape[1], num_rows, rows.shape[3]))
        for name in self._levels.names[len(found) :]:  # a block has keys and values
            self._block.tensors[name] = hidden.new_zeros((1, num_rows, 1))
        self._block.row_bytes = self._block.num_bytes // num_rows
        self._hidden = hidden.new_empty((num_rows, hidden.shape[2]))

    def _keep(self, runs: Sequence[_Run], num_tokens: int, hidden: Tensor, rows: Sequence[Tensor]) -> None:
        """Copy the new rows of a call to their places."""
        kept = [(idx, run.own.start + run.num_done) for idx, run in enumerate(runs) if run.own is not None]
        if not kept:
            return
        assert self._hidden is not None
        texts = torch.tensor([idx for idx, _ in kept], device=hidden.device)
        starts = torch.tensor([start for _, start in kept], device=hidden.device)
        targets = (starts[:, None] + torch.arange(num_tokens, device=hidden.device)).flatten()
        self._hidden[targets] = hidden[texts].flatten(0, 1)
        for name, tensor in zip(self._levels.names, rows, strict=False):
            new = tensor[texts, :, -num_tokens:].movedim(0, 1).flatten(1, 2)  # (heads, texts x tokens, size)
            self._block.tensors[name][:, targets] = new

    def _keep_snapshots(self) -> None:
        """Give the last rows of spans their snapshots, as long as these do not take too many bytes."""
        ended = [run for run in self._runs if run.span is not None and run.snapshot is not None]
        num_bytes = MAX_SNAPSHOT_BYTES
        if len(ended) * self._form.snapshot_bytes > num_bytes:
            num_bytes = max(num_bytes, int(SHARE_FOR_SNAPSHOTS * free_bytes(self._block.tensors["keys.0"].device)))
        room = num_bytes // max(1, self._form.snapshot_bytes)
        for run in sorted(ended, key=lambda run: not (run.span is not None and run.span.children))[:room]:
            assert run.own is not None and run.snapshot is not None
            self._block.snapshots[run.own.stop - 1] = run.snapshot.clone()


def _has_snapshot(span: Span) -> bool:
    return snapshot_of(span) is not None


def _joined(pieces: Iterable[BlockRows[KeysValues]]) -> Pieces:
    """Return ranges of rows, where ranges that directly follow each other are joined to one."""
    found: list[BlockRows[KeysValues]] = []
    for piece in pieces:
        both = found[-1].with_next(piece) if found else None
        if both is not None:
            found[-1] = both
        else:
            found.append(piece)
    return tuple(found)


def _first_rows(pieces: Pieces, num_rows: int) -> Pieces:
    """Return the first `num_rows` rows."""
    found: list[BlockRows[KeysValues]] = []
    for piece in pieces:
        num_own = min(num_rows, piece.stop - piece.start)
        if num_own:
            found.append(piece.split(num_own)[0])
        num_rows -= num_own
    return tuple(found)


def _gathered(texts: Sequence[Pieces], name: str) -> Tensor:
    """Return the rows of the tensor `name` of several texts of one length, `(texts, heads, tokens, size)`."""
    distinct = list(dict.fromkeys(texts))
    found = {
        pieces: torch.cat([piece.block.tensors[name][:, piece.start : piece.stop] for piece in pieces], dim=1)
        for pieces in distinct
    }
    return torch.stack([found[pieces] for pieces in texts])
