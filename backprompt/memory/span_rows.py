"""Rows of many spans together: blocks become smaller or fewer, and rows move from one tier of memory to another.

A block of which only some rows are still referred to is made smaller in place (`compact`). Rows that move go from
blocks to new blocks, those of one block to one block (`moved`). A tensor costs some hundred bytes besides its numbers,
so small blocks become one where they are many (`joined`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from backprompt.forest.span import Span
from backprompt.memory.blocks import SMALL_TENSOR_BYTES, Block, BlockRows, Location

SpanRows: TypeAlias = "dict[Span, BlockRows[Any]]"
"""Where spans' rows of one kind lie."""


def compact(rows: Mapping[Span, BlockRows[Any]]) -> SpanRows:
    """Make the blocks smaller of which these are not all rows; return where the spans' rows lie then."""
    compacted = {}
    for block, group in _by_block(rows).items():
        if sum(part.stop - part.start for part in group.values()) < block.num_rows:
            block.keep(_pieces(group))
            compacted.update(_one_after_the_other(group, block))
    return compacted


def joined(rows: Mapping[Span, BlockRows[Any]]) -> SpanRows:
    """Let small blocks become one, as many as it takes for that one not to be small; return where spans' rows lie then.

    `rows` are all that anything refers to of these blocks.
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
            other.keep([])  # it may be referred to until all are joined
    return found


def moved(rows: Mapping[Span, BlockRows[Any]], location: Location) -> SpanRows:
    """Copy spans' rows to a location; return where they lie there. What comes from one block goes to one block.

    Junctions have none, here as there.
    """
    copies = {span: part for span, part in rows.items() if not span.token_ids}
    for block, group in _by_block(rows).items():
        copies.update(_one_after_the_other(group, block.copied(_pieces(group), location)))
    return copies


def _by_block(rows: Mapping[Span, BlockRows[Any]]) -> dict[Block, SpanRows]:
    """Group spans' rows by their blocks, and order each group by its rows."""
    groups: dict[Block, SpanRows] = {}
    with_tokens = [(span, part) for span, part in rows.items() if span.token_ids]
    for span, part in sorted(with_tokens, key=lambda item: item[1].start):
        groups.setdefault(part.block, {})[span] = part
    return groups


def _pieces(group: SpanRows) -> list[slice]:
    """Return the rows of one block, neighbours as one slice."""
    pieces: list[slice] = []
    for part in group.values():
        if pieces and pieces[-1].stop == part.start:
            pieces[-1] = slice(pieces[-1].start, part.stop)
        else:
            pieces.append(slice(part.start, part.stop))
    return pieces


def _one_after_the_other(group: SpanRows, block: Block) -> SpanRows:
    """Return where rows lie that were put into `block` one after the other."""
    rows, start = {}, 0
    for span, part in group.items():
        stop = start + part.stop - part.start
        rows[span] = BlockRows(block, start, stop)
        start = stop
    return rows


def _portions(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Yield two and more blocks at a time that are not small together; the last ones may be."""
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
