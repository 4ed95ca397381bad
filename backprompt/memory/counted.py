"""Blocks that are counted while they live: running totals of their bytes and of the number of small ones.

Each block is known by a weak reference, which is kept with the block's numbers. When a block is freed, its reference
goes to a queue. The numbers of the queued blocks are subtracted before a total is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from weakref import ref

from backprompt.memory.blocks import Block


class _Counted(NamedTuple):
    num_bytes: int
    is_small: bool


class CountedBlocks:
    """A set of blocks that does not keep its blocks alive."""

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self._counted: dict[ref[Block], _Counted] = {}
        self._freed: deque[ref[Block]] = deque()
        self._num_bytes = self._num_small = 0
        self.count(blocks)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        self._subtract_freed()
        return self._num_bytes

    @property
    def num_small(self) -> int:
        """The number of blocks of small tensors."""
        self._subtract_freed()
        return self._num_small

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks that are alive."""
        return iter([block for found in list(self._counted) if (block := found()) is not None])

    def __contains__(self, block: Block) -> bool:
        return ref(block) in self._counted

    def count(self, blocks: Iterable[Block]) -> None:
        """Count blocks as they are now: new ones, and those that have become larger or smaller."""
        for block in blocks:
            found = ref(block, self._freed.append)
            before = self._counted.get(found)
            if before is not None:
                self._subtract(before)
            else:
                self._counted[found] = _Counted(0, is_small=False)
            now = _Counted(block.num_bytes, block.is_small)
            self._num_bytes += now.num_bytes
            self._num_small += now.is_small
            self._counted[found] = now  # under the first reference, since its callback will be called

    def _subtract_freed(self) -> None:
        while self._freed:
            counted = self._counted.pop(self._freed.popleft(), None)
            if counted is not None:
                self._subtract(counted)

    def _subtract(self, counted: _Counted) -> None:
        self._num_bytes -= counted.num_bytes
        self._num_small -= counted.is_small
