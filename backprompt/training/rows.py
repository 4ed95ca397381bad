"""Padded rows: a batch of token ids as trainers have it, and its tokens that are to be scored.

    columns      0    1    2    3    4    5    6        the last `num_kept` = 4 columns are kept
    row 0        .    .   17    5 |  8    9    .        tokens 17 5 8 9, first column 2; targets 8 and 9
    row 1       17    5    6    2 |  8    .    .        tokens 17 5 6 2 8;               target 8
    row 2        .    .    .    . |  .    .    .        no tokens, no targets

The real tokens of all rows are kept as one flat array, row after row, in the host's memory. A *target* is a real token
in a kept column with a real token before it in its row: the token before the target predicts the target. Results of
targets are flat, too, and are scattered to `(rows, kept)` on the trainer's device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.arguments import as_int
from backprompt.errors import TokenIdError
from backprompt.evaluation.predictions import ranges
from backprompt.transfers import on_device

Ints: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """The real tokens of a padded batch.

    Attributes:
        token_ids: the real tokens, row after row, `(tokens,)`.
        offsets: where the tokens of each row start, and the end of the last row, `(rows + 1,)`.
        first_columns: the column of each row's first real token, `(rows,)`; 0 for a row without one.
        num_columns: the width of the batch.
        num_kept: the number of last columns that are scored.
        device: the device of the batch and of its results.

    """

    token_ids: Ints
    offsets: Ints
    first_columns: Ints
    num_columns: int
    num_kept: int
    device: torch.device

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor | None, logits_to_keep: int | None, num_embeddings: int
    ) -> PaddedRows:
        """Return the rows of a batch; ids and mask come to the host in one transfer.

        Args:
            input_ids: `(rows, columns)`, integers; any number where the mask is 0.
            attention_mask: `(rows, columns)`, 1 for real tokens and 0 for padding, of any dtype; None for no padding.
                The real tokens of a row stand together, with padding on either side or on both. A row may be padding
                throughout.
            logits_to_keep: how many of the last columns are scored; None for all.
            num_embeddings: real token ids must be below this number.

        Raises:
            TypeError: a value is not a tensor, or `input_ids` are not integers.
            ValueError: the shapes or devices do not agree, the mask has other values than 0 and 1, or 0 between ones,
                or there are fewer than `logits_to_keep` columns.
            TokenIdError: the model has no such token id.

        """
        _check_batch(input_ids, attention_mask)
        num_rows, num_columns = input_ids.shape
        num_kept = num_columns if logits_to_keep is None else as_int(logits_to_keep, "logits_to_keep", at_least=0)
        if num_kept > num_columns:
            raise ValueError(
                f"logits_to_keep is {num_kept}, but input_ids has {num_columns} columns. Give the number of columns of "
                "the completions, or None to score all columns."
            )
        ids, mask = _on_host(input_ids, attention_mask)
        first_columns = mask.argmax(axis=1) if num_columns else np.zeros(num_rows, dtype=np.int64)
        _check_holes(mask, first_columns)
        _check_ids(ids, mask, num_embeddings)
        offsets = np.append(0, np.cumsum(mask.sum(axis=1)))
        return cls(ids[mask], offsets, first_columns, num_columns, num_kept, input_ids.device)

    @property
    def num_rows(self) -> int:
        """The number of rows, including rows without tokens."""
        return len(self.first_columns)

    @property
    def lengths(self) -> Ints:
        """The number of real tokens of each row, `(rows,)`."""
        return np.diff(self.offsets)

    @cached_property
    def starts(self) -> Ints:
        """The number of tokens of each row before its first target, `(rows,)`: all its tokens if it has no target."""
        first_kept = self.num_columns - self.num_kept - self.first_columns
        starts: Ints = np.minimum(np.maximum(first_kept, 1), self.lengths)
        return starts

    @cached_property
    def targets(self) -> Ints:
        """The index of each target in `token_ids`, row after row, `(targets,)`; the token before predicts it."""
        return ranges(self.offsets[:-1] + self.starts, self.offsets[1:])

    @cached_property
    def places(self) -> Ints:
        """The index of each target's results in a flattened `(rows, kept)`, `(targets,)`."""
        num_before = self.num_columns - self.num_kept
        rows = np.repeat(np.arange(self.num_rows), self.lengths - self.starts)
        columns = self.first_columns[rows] + self.targets - self.offsets[rows]
        places: Ints = rows * self.num_kept + columns - num_before
        return places

    def ids_of(self, row: int) -> tuple[int, ...]:
        """Return the real tokens of a row."""
        return tuple(self.token_ids[self.offsets[row] : self.offsets[row + 1]].tolist())

    def split(self) -> list[Ints]:
        """Return the real tokens of each row."""
        return np.split(self.token_ids, self.offsets[1:-1]) if self.num_rows else []

    def of_targets(self, values: Tensor, name: str) -> Tensor:
        """Return the values of the targets, `(targets, ...)`, from values for all kept columns.

        Args:
            values: `(rows, kept, ...)`.
            name: the name of the argument, for errors.

        Raises:
            ValueError: the shape is wrong.

        """
        needed = (self.num_rows, self.num_kept)
        if tuple(values.shape[:2]) != needed:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, but must begin with {needed}: the rows of input_ids, and "
                "the kept columns."
            )
        return values.flatten(0, 1)[on_device(self.places, values.device)]

    def scattered(self, values: Tensor) -> Tensor:
        """Return results of targets in the shape and on the device of the batch; gradients flow through.

        Args:
            values: `(targets, ...)`, on any device.

        Returns:
            `(rows, kept, ...)`, 0 in places without a target.

        """
        values = values.to(self.device)
        flat = values.new_zeros((self.num_rows * self.num_kept, *values.shape[1:]))
        whole = flat.index_copy(0, on_device(self.places, self.device), values)
        return whole.view(self.num_rows, self.num_kept, *values.shape[1:])


def _check_batch(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise for tensors that are not a batch, without reading their elements."""
    for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(given, Tensor) and not (given is None and name == "attention_mask"):
            raise TypeError(f"{name} must be a tensor (rows, columns), not {type(given).__name__}.")
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids must have the shape (rows, columns), not {tuple(input_ids.shape)}. Pad rows of different "
            "lengths to one width, and give the attention mask."
        )
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be integers, such as torch.int64, not {input_ids.dtype}.")
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, and input_ids {tuple(input_ids.shape)}; both "
            "must have the same shape (rows, columns). For separate masks of a prompt and its completions: "
            "torch.cat([prompt_mask, completion_mask], dim=1)."
        )
    if attention_mask.device != input_ids.device:
        raise ValueError(
            f"input_ids lies on {input_ids.device} and attention_mask on {attention_mask.device}. Move them to one "
            "device."
        )


def _on_host(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return ids, and which of them are real, in the host's memory; the host waits for the device once.

    Raises:
        ValueError: the mask has other values than 0 and 1.

    """
    ids = input_ids.detach().to(torch.int64)
    if attention_mask is None:
        array: Ints = ids.cpu().numpy()
        return array, np.ones(array.shape, dtype=np.bool_)
    mask = attention_mask.detach()
    found = torch.stack([ids, (mask != 0).to(torch.int64), ((mask == 0) | (mask == 1)).to(torch.int64)]).cpu().numpy()
    if not found[2].all():
        row, column = np.argwhere(found[2] == 0)[0].tolist()
        raise ValueError(
            f"attention_mask has {attention_mask[row, column].item()} in row {row}, column {column}; it must have 1 "
            "for real tokens and 0 for padding. For an additive mask, give (mask == 0)."
        )
    return found[0], found[1] != 0


def _check_holes(mask: npt.NDArray[np.bool_], first_columns: Ints) -> None:
    """Raise ValueError for the first row whose real tokens do not stand together."""
    columns = np.arange(mask.shape[1])
    stops = first_columns + mask.sum(axis=1)
    holes = ~mask & (columns > first_columns[:, None]) & (columns < stops[:, None])
    if holes.any():
        row, column = np.argwhere(holes)[0].tolist()
        raise ValueError(
            f"attention_mask has a 0 in row {row}, column {column}, between ones. The real tokens of a row must stand "
            "together, with padding before or behind them; leave tokens that are not scored out of the loss instead."
        )


def _check_ids(ids: Ints, mask: npt.NDArray[np.bool_], num_embeddings: int) -> None:
    """Raise TokenIdError for the first real token that the model does not have."""
    unknown = mask & ((ids < 0) | (ids >= num_embeddings))
    if unknown.any():
        row, column = np.argwhere(unknown)[0].tolist()
        raise TokenIdError(
            f"input_ids has {ids[row, column]} in row {row}, column {column}, where attention_mask is 1, but the "
            f"model's embedding and head have ids 0 to {num_embeddings - 1}. Mask padding with 0, or "
            "model.resize_token_embeddings(...)."
        )
