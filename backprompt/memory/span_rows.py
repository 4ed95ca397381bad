"""Rows of many spans together: blocks become smaller or fewer, and rows move between tiers of memory.

A block with unused rows is made smaller in place (`compact`). Moved rows go to new blocks, the rows of one block to one
block (`moved`). A tensor has an overhead of some hundred bytes, so many small blocks are joined (`joined`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from backprompt.forest.span import Span
from backprompt.memory.blocks import SMALL_TENSOR_BYTES, Block, BlockRows
from backprompt.memory.location import Location

SpanRows: TypeAlias = "dict[Span, BlockRows[Any]]"
"""The places of spans' rows of one kind."""


def compact(rows: Mapping[Span, BlockRows[Any]]) -> SpanRows:
    """Remove all rows but these from their blocks; return the new places of the spans' rows that have moved."""
    compacted = {}
    for block, group in _by_block(rows).items():
        if sum(part.stop - part.start for part in group.values()) < block.num_rows:
            block.keep(_pieces(group))
            compacted.update(_one_after_the_other(group, block))
    return compacted


def joined(rows: Mapping[Span, BlockRows[Any]]) -> SpanRows:
    """Join small blocks until the result is not small; return the new places of the spans' rows.

    `rows` must be all rows of these blocks that are in use.
    """
    found: SpanRows = {}
    groups = {block: group for block, group in _by_block(rows).items() if block.is_small}
    for blocks in _portions(groups):
        first, *others = blocks
        start = 0
        for block in blocks:
            found |= {span: BlockRows(first, start + at.start, start + at.stop) for span, at in groups[block].items()}
            start += block.num_rows
        first.append(others)
        for other in others:
            other.keep([])  # references may remain until all are joined
    return found


def moved(rows: Mapping[Span, BlockRows[Any]], location: Location) -> SpanRows:
    """Copy spans' rows to a location and return their new places. The rows of one block move to one block.

    Junctions have no rows, before and after.
    """
    copies = {span: part for span, part in rows.items() if not span.token_ids}
    for block, group in _by_block(rows).items():
        copies.update(_one_after_the_other(group, block.copied(_pieces(group), location)))
    return copies


def _by_block(rows: Mapping[Span, BlockRows[Any]]) -> dict[Block, SpanRows]:
    """Group spans' rows by block, each group ordered by row."""
    groups: dict[Block, SpanRows] = {}
    with_tokens = [(span, part) for span, part in rows.items() if span.token_ids]
    for span, part in sorted(with_tokens, key=lambda item: item[1].start):
        groups.setdefault(part.block, {})[span] = part
    return groups


def _pieces(group: SpanRows) -> list[slice]:
    """Return the rows of one block as slices, adjacent rows as one slice."""
    pieces: list[slice] = []
    for part in group.values():
        if pieces and pieces[-1].stop == part.start:
            pieces[-1] = slice(pieces[-1].start, part.stop)
        else:
            pieces.append(slice(part.start, part.stop))
    return pieces


def _one_after_the_other(group: SpanRows, block: Block) -> SpanRows:
    """Return the places of rows that were put into `block` one after the other."""
    rows, start = {}, 0
    for span, part in group.items():
        stop = start + part.stop - part.start
        rows[span] = BlockRows(block, start, stop)
        start = stop
    return rows


def _portions(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Yield groups of two or more blocks that are not small together; only the last group may be small."""
    portion: list[Block] = []
    num_bytes = 0
    for block in blocks:
        portion.append(block)
        num_bytes += block.tensor_bytes
        if num_bytes >= SMALL_TENSOR_BYTES:
            yield portion
            portion, num_bytes = [], 0
    if len(portion) > 1:
        yield portion
