"""Errors for outputs that are not finite. They name the text, and the cause if the weights or the dtype show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backprompt.errors import NonFiniteError
from backprompt.model.skeleton import head_dtype
from backprompt.model.spread import named_numbers

TOKENS_SHOWN = 24
"""The largest number of a text's last tokens in a message."""


def states_error(
    model: nn.Module, hidden: Tensor, token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> NonFiniteError:
    """Return the error for the final hidden state at the end of `token_ids`, `(hidden,)`, or for its attention."""
    if bool(hidden.isfinite().all()):
        what = "attention queries or keys of NaN or infinity"
    else:
        what = "NaN hidden states" if bool(hidden.isnan().any()) else "infinite hidden states"
    return NonFiniteError(f"{_returned(model, what, token_ids, decode)} {_why(model)}")


def logits_error(
    model: nn.Module, logits: Tensor, token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> NonFiniteError:
    """Return the error for logits behind `token_ids`, `(vocab,)`, that are not a distribution."""
    if bool((logits == -torch.inf).all()):
        what = "-inf for every logit, so that every token has probability 0,"
        why = _why(model, "Check its output head, and the code that masks its logits.", is_minus_inf_fine=False)
    else:
        what, why = "NaN logits" if bool(logits.isnan().any()) else "logits of +inf", _why(model)
    return NonFiniteError(f"{_returned(model, what, token_ids, decode)} {why}")


def _returned(model: nn.Module, what: str, token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    last = decode(token_ids[-TOKENS_SHOWN:])
    shown = repr(f"…{last}" if len(token_ids) > TOKENS_SHOWN else last)
    num = f"{len(token_ids)} token{'s' if len(token_ids) > 1 else ''}"
    return f"{type(model).__name__} returned {what} at the end of {shown} ({num})."


def _why(model: nn.Module, otherwise: str = "", *, is_minus_inf_fine: bool = True) -> str:
    """Return the reason. With `is_minus_inf_fine`, -inf in the output head's bias is no reason: it masks a token."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    bias = getattr(head, "bias", None)
    name_of_bias = next((name for name, parameter in model.named_parameters() if parameter is bias), None)
    for name, parameter in named_numbers(model):
        values = parameter if parameter.element_size() > 1 else parameter.float()  # 8-bit types lack some operations
        is_fine = values.isfinite()
        if name == name_of_bias and is_minus_inf_fine:
            is_fine |= values == -torch.inf
        if not bool(is_fine.all()):
            what = "NaN" if bool(values.isnan().any()) else "infinity"
            return f"Its weight {name!r} has {what}. Check the checkpoint and the training of the model."
    dtype = head_dtype(model)
    if dtype == torch.float16:
        return (
            "Its weights are finite, so numbers grew beyond the largest of float16, 65,504. Load it in bfloat16 or "
            'float32 instead: dtype="bfloat16".'
        )
    return otherwise or (
        f"Its weights are finite, so numbers grew beyond the largest of {dtype}, or were divided by 0. Check how its "
        "weights were made."
    )
