"""The meaning of a model's mask at the last position of a call: causal, causal within a window, or unknown.

Masks are functions of positions in transformers. If possible, they are called with positions on the CPU, to avoid
waiting for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

_CAUSAL: Any = causal_mask_function

POSITIONS_AHEAD = 64
"""The number of positions for which a mask is examined at once, for the steps to come."""


class Meaning(NamedTuple):
    """The meaning of a mask.

    Attributes:
        is_known: whether the mask is causal, or causal within a window.
        window: a row sees keys fewer than this many positions back; None: the row sees all keys before it.

    """

    is_known: bool
    window: int | None = None


class Unknown(NamedTuple):
    """A mask that packed attention does not implement; `why`: the message if a layer attends by it."""

    why: str


class Mask:
    """A mask with its meaning in one pass, and the last positions for which the meaning is the same.

    Args:
        mask_function: transformers' function of batch, head, positions of queries and of keys.
        position: the last position of the pass.
        device: the device of the tensors that the function may read.

    """

    def __init__(self, mask_function: Callable[..., Tensor], position: int, device: torch.device) -> None:
        self._mask_function = mask_function
        self._device = device
        self._first, self._stop = position, position + 1
        (self.meaning,) = meanings(mask_function, position, position + 1, device)

    def means_the_same_at(self, position: int) -> bool:
        """Return whether the mask of a call with another last position has the same meaning."""
        if not self._first <= position < self._stop:
            self._first = self._stop = position
            found = meanings(self._mask_function, position, position + POSITIONS_AHEAD, self._device)
            while self._stop < position + len(found) and found[self._stop - position] == self.meaning:
                self._stop += 1
        return self._first <= position < self._stop


def meanings(mask_function: Callable[..., Tensor], first: int, stop: int, device: torch.device) -> list[Meaning]:
    """Return the meaning of a mask for calls with these last positions."""
    if mask_function is _CAUSAL:  # that of most models, asked for in each step of a generation
        return [Meaning(True)] * (stop - first)
    nums = _nums_visible(mask_function, range(first - 1, stop), device)
    # A window shows equally many keys at the last two positions; chunked and look-ahead masks do not.
    found = []
    for position, before, last in zip(range(first, stop), nums[:-1], nums[1:], strict=True):
        if (before, last) == (position, position + 1):
            found.append(Meaning(True))
        elif before is not None and before == last:
            found.append(Meaning(True, last))
        else:
            found.append(Meaning(False))
    return found


def _nums_visible(mask_function: Callable[..., Tensor], positions: range, device: torch.device) -> list[int | None]:
    """Return how many keys a query at each position sees, or None if these are not the last keys up to the position."""
    try:
        visible = visible_keys(mask_function, positions, torch.device("cpu"))
    except RuntimeError:  # the mask reads tensors of its own
        visible = visible_keys(mask_function, positions, device).cpu()
    queries, keys = _indices(positions, torch.device("cpu"))
    nums = visible.sum(dim=1, keepdim=True)
    are_last = (visible == ((keys <= queries) & (keys > queries - nums))).all(dim=1)
    return [num if is_right else None for num, is_right in zip(nums[:, 0].tolist(), are_last.tolist(), strict=True)]


def visible_keys(mask_function: Callable[..., Tensor], positions: range, device: torch.device) -> Tensor:
    """Return which keys the query at each position sees, `(positions, keys)`."""
    zero = torch.zeros((), dtype=torch.long, device=device)
    queries, keys = _indices(positions, device)
    return mask_function(zero, zero, queries, keys).expand(len(positions), keys.shape[1])


def _indices(positions: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions as `(positions, 1)`, and those of keys, one more than a causal mask shows, `(1, keys)`."""
    queries = torch.arange(positions.start, positions.stop, device=device)[:, None]
    return queries, torch.arange(positions.stop + 1, device=device)[None]
