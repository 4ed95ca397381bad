"""The output head on CUDA with a padded copy of its weight, if the vocabulary has an unfavourable size.

In half precision, cuBLAS has fast kernels only for rows of outputs whose addresses are aligned: for a vocabulary of
50,257 tokens (GPT-2) the product took 7 times as long as for 50,304. The measurements are in `docs/design/model.md`,
"Matrix products".
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from backprompt.model.linear import Linears, is_plain

DTYPES = frozenset({torch.bfloat16, torch.float16})

ALIGNED = 8
"""Vocabularies whose size is a multiple of this number have fast kernels."""

PADDED = 64
"""The number of rows of the copy is a multiple of this number."""

LARGEST_SHARE = 1 / 3
"""The copy is made if it takes at most this share of the bytes of the model's weights."""


class PaddedLinear(nn.Module):
    """Replaces a linear layer in a private copy of a model: same parameters, same results up to rounding.

    The results are a view of a larger tensor.
    """

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias  # read by some models
        self.in_features, self.out_features = like.in_features, like.out_features
        self._padded_weight = _padded(like.weight)
        self._padded_bias = None if like.bias is None else _padded(like.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., inputs)` -> `(..., outputs)`."""
        return nn.functional.linear(rows, self._padded_weight, self._padded_bias)[..., : self.out_features]

    @property
    def num_bytes(self) -> int:
        """The bytes of the copy."""
        return self._padded_weight.nbytes + (0 if self._padded_bias is None else self._padded_bias.nbytes)


def pad_head(head: nn.Module, model: nn.Module, linears: Linears, device_types: Collection[str] = ("cuda",)) -> Linears:
    """Give a private head a padded copy of its weight, if the copy is faster and small compared with the model.

    Args:
        head: a private copy of the model around no decoder.
        model: the user's model, which is only read.
        linears: how linear layers are multiplied.
        device_types: the types of devices on which a copy is faster.

    Returns:
        `linears`, with the copy's name and bytes added.

    """
    weight = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    if weight is None or not _is_worth_padding(weight, model, device_types):
        return linears
    for module in list(head.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight is weight and "forward" not in vars(child):
                padded = PaddedLinear(child)
                setattr(module, name, padded)
                num_bytes = linears.packed_bytes + padded.num_bytes
                return replace(linears, name=f"{linears.name}, padded head", packed_bytes=num_bytes)
    return linears


def _is_worth_padding(weight: Tensor, model: nn.Module, device_types: Collection[str]) -> bool:
    return (
        is_plain(weight, device_types)
        and weight.dtype in DTYPES
        and len(weight) % ALIGNED != 0
        and weight.nbytes <= LARGEST_SHARE * sum(parameter.nbytes for parameter in model.parameters())
    )


def _padded(given: Tensor) -> Tensor:
    """Return a copy with rows of zeros at the end."""
    num_rows = -(-len(given) // PADDED) * PADDED
    padded = given.new_zeros((num_rows, *given.shape[1:]), requires_grad=False)
    padded[: len(given)] = given.detach()
    return padded
