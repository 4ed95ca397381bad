"""Missing segments: the segments of texts with tokens that are held nowhere, each with a reason."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, TypeAlias

from backprompt.evaluation.archive import MIN_TOKENS, Archive
from backprompt.evaluation.evaluator import Evaluator
from backprompt.evaluation.lookup import Aside, Piece, Sketch, positions_of, where
from backprompt.evaluation.span_keys import Root
from backprompt.forest.forest import Forest
from backprompt.text.extents import Extent
from backprompt.text.segments import Adapted, Leaf, shown
from backprompt.tokens.graph import TokenIds, flat

Reason: TypeAlias = Literal["evicted", "join", "other model", "elsewhere", "too short", "never computed"]

MIN_ELSEWHERE_TOKENS = 3
"""A shorter segment may stand behind other tokens by chance, so finding it there explains nothing."""

MAX_BEGINNINGS = 64
"""The store is searched for entries of other models by at most this many different beginnings of texts."""

NUM_BEGINNING_TOKENS = 4

_NOWHERE = ("evicted", "absent")


@dataclass(frozen=True)
class Miss:
    """A segment with tokens that are held nowhere.

    Attributes:
        text_idx: the idx of the first text that has the segment.
        segment_idx: its place among the strings and runs of token ids of that text, in written order.
        segment: its contents, without the middle if they are long.
        start, stop: its tokens in `text.tokens`.
        num_missing: the number of its tokens that are held nowhere; a common beginning of segments counts in each.
        num_texts: the number of texts that share it.
        reason: "evicted": dropped because of the memory budget. "join": the text before it is held by itself, but
            joining this segment changes that text's tokens. "other model": the store has it under other weights,
            another dtype, tokenizer or exactness. "elsewhere": the same tokens are held behind other tokens, or at
            another position. "never computed": it was never computed, as far as is known. "too short": the same, or
            it was too short to be stored by itself.
        why: the reason as a sentence, with numbers.

    """

    text_idx: int
    segment_idx: int
    segment: str
    start: int
    stop: int
    num_missing: int
    num_texts: int
    reason: Reason
    why: str


def misses(evaluator: Evaluator, encoded: Sequence[TokenIds], extents: Sequence[Sequence[Extent]]) -> Iterator[Miss]:
    """Yield the segments of texts with tokens that are held nowhere, with the reason; changes nothing."""
    segments = _missing_segments(evaluator.sketch(encoded), encoded, extents)
    if not segments:
        return
    asides = dict.fromkeys(aside for segment in segments if (aside := segment.aside) is not None)
    alone = evaluator.sketch(encoded, asides)
    elsewhere = positions_of(
        evaluator.forest,
        (segment.token_ids for segment in segments if len(segment.token_ids) >= MIN_ELSEWHERE_TOKENS),
    )
    others = [] if evaluator.archive is None else _under_other_roots(evaluator.archive, segments, encoded)
    for segment in segments:
        reason, why = _reason(segment, alone, elsewhere, others)
        if reason == "never computed" and evaluator.archive is not None and evaluator.archive.drops(segment.num_run):
            reason, why = "too short", f"never computed, or not stored: runs of fewer than {MIN_TOKENS} tokens are not"
        yield Miss(
            text_idx=segment.text_idx,
            segment_idx=segment.segment_idx,
            segment=shown_segment(segment.extent.segment),
            start=segment.extent.start,
            stop=segment.extent.stop,
            num_missing=segment.num_missing,
            num_texts=len(segment.text_indices),
            reason=reason,
            why=why,
        )


@dataclass
class _Segment:
    """A segment with missing tokens, in the first text that has it."""

    text_idx: int
    segment_idx: int
    extent: Extent
    token_ids: tuple[int, ...]
    position: int
    missing: list[Piece]
    num_run: int  # the missing tokens of the whole text, which would be stored together
    text_indices: set[int] = field(default_factory=set)

    @property
    def num_missing(self) -> int:
        return _num_tokens(self.missing)

    @property
    def num_evicted(self) -> int:
        return _num_tokens(piece for piece in self.missing if piece.where == "evicted")

    @property
    def aside(self) -> Aside | None:
        """The tokens that the text before the segment has at the join by itself, if the join changed them."""
        extent = self.extent
        return Aside(self.text_idx, extent.start, extent.replaced) if extent.replaced else None


def _num_tokens(pieces: Iterable[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)


def _missing_segments(
    sketch: Sketch, encoded: Sequence[TokenIds], extents: Sequence[Sequence[Extent]]
) -> list[_Segment]:
    """Return the segments with tokens that are held nowhere, shared segments once."""
    found: dict[tuple[Any, ...], _Segment] = {}
    for text_idx, (inserted, token_ids) in enumerate(zip(sketch.texts, encoded, strict=True)):
        spans = sketch.forest.in_order(inserted)
        starts = [0, *accumulate(len(span.token_ids) for span in spans)]
        for segment_idx, extent in enumerate(extents[text_idx]):
            if extent.start == extent.stop:
                continue
            first, last = bisect_right(starts, extent.start) - 1, bisect_right(starts, extent.stop - 1) - 1
            begins, ends = (spans[first], extent.start - starts[first]), (spans[last], extent.stop - starts[last])
            key = (extent.segment, begins, ends)
            if key not in found:
                held = (
                    Piece(max(extent.start, starts[idx]), min(extent.stop, starts[idx + 1]), where(spans[idx]))
                    for idx in range(first, last + 1)
                )
                found[key] = _Segment(
                    text_idx,
                    segment_idx,
                    extent,
                    flat(token_ids)[extent.start : extent.stop],
                    position=begins[0].position + begins[1],
                    missing=[piece for piece in held if piece.where in _NOWHERE],
                    num_run=sum(len(span.token_ids) for span in spans if where(span) in _NOWHERE),
                )
            found[key].text_indices.add(text_idx)
    return [segment for segment in found.values() if segment.missing]


def _under_other_roots(
    archive: Archive, segments: Sequence[_Segment], encoded: Sequence[TokenIds]
) -> list[tuple[str, dict[int, list[Piece]]]]:
    """Return, for each other root, its differences in words, and the pieces that the store has under it, by text."""
    texts = list(dict.fromkeys(segment.text_idx for segment in segments))
    beginnings = dict.fromkeys(flat(encoded[idx])[:NUM_BEGINNING_TOKENS] for idx in texts)
    roots = dict.fromkeys(root for ids in list(beginnings)[:MAX_BEGINNINGS] for root in archive.others(ids))
    found = []
    for root in roots:
        sketch = Sketch(Forest(), [encoded[idx] for idx in texts], archive.under(root))
        pieces = {idx: sketch.pieces(inserted) for idx, inserted in zip(texts, sketch.texts, strict=True)}
        found.append((_differing(root, archive.root), pieces))
    return found


def _reason(
    segment: _Segment,
    alone: Sketch,
    elsewhere: Mapping[tuple[int, ...], int],
    others: Sequence[tuple[str, Mapping[int, Sequence[Piece]]]],
) -> tuple[Reason, str]:
    extent = segment.extent
    if segment.num_evicted:
        return "evicted", f"{segment.num_evicted} of them were computed, and dropped over the budget"
    if segment.aside is not None and alone.has(segment.aside):
        return "join", (
            f"the join changed token {extent.start}: the text before it is held by itself, but ends in "
            f"{list(extent.replaced)} then"
        )
    for difference, pieces in others:
        if any(p.where == "disk" and p.start <= segment.missing[0].start < p.stop for p in pieces[segment.text_idx]):
            return "other model", f"the store has it under {difference}"
    position = elsewhere.get(segment.token_ids)
    if position is not None:
        here = "the same position" if position == segment.position else f"position {position}, not {segment.position},"
        return "elsewhere", f"the same tokens are held at {here} behind other ones"
    return "never computed", "never computed, as far as is known"


def _differing(other: Root, own: Root) -> str:
    """Return the differences between two roots, in words."""
    differences = []
    if other.model != own.model:
        differences.append(f"other weights ({other.model[:8]}..., not {own.model[:8]}...)")
    if other.dtype != own.dtype:
        differences.append(f"another dtype ({other.dtype}, not {own.dtype})")
    if other.tokenizer != own.tokenizer:
        differences.append("another tokenizer")
    if other.exactness != own.exactness:
        differences.append(f"another exactness ({other.exactness}, not {own.exactness})")
    return " and ".join(differences)


def shown_segment(segment: Leaf | Adapted) -> str:
    """Return a segment as it is written, without the middle of a long one."""
    string = shown([segment])
    return string if len(string) <= 40 else f"{string[:20]}...{string[-17:]}"
