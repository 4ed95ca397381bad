"""The places of the new rows of growing texts: which row of which block each row goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from backprompt.memory.blocks import KeysValues, States


@dataclass(frozen=True)
class Places:
    """The places of the rows of a step.

    Attributes:
        blocks: the blocks that take rows in.
        block_idx, target_rows: for each row, the block and the row there, `(rows,)`.

    """

    blocks: Sequence[tuple[KeysValues, States]]
    block_idx: npt.NDArray[np.int64]
    target_rows: npt.NDArray[np.int64]

    def next_rows(self, kept: Sequence[int]) -> Places:
        """Return the places behind these, for some of the rows."""
        rows = np.array(kept)
        used, block_idx = np.unique(self.block_idx[rows], return_inverse=True)
        return Places([self.blocks[idx] for idx in used], block_idx, self.target_rows[rows] + 1)

    def first_tensors(self) -> list[Tensor]:
        """Return the first tensors of each block: if the rows of a block have moved, these are other tensors."""
        return [block.tensors[block.first_name] for pair in self.blocks for block in pair]

    def addresses(self) -> npt.NDArray[np.int64]:
        """Return the addresses of the tensors of each block.

        For the keys and the values of each layer in turn, then for the hidden states: the address of the first element,
        and the stride between heads in elements, `(blocks, tensors, 2)`.
        """
        found = np.zeros((len(self.blocks), 2 * self.blocks[0][0].num_layers + 1, 2), dtype=np.int64)
        for own, (keys_values, states) in zip(found, self.blocks, strict=True):
            own[:-1] = keys_values.addresses()[:, [0, 2, 1, 2]].reshape(-1, 2)
            own[-1, 0] = states.hidden.data_ptr()
        return found
