"""The distance of a text's log-probabilities from those of a plain call, row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backprompt.model.probe import differences
from backprompt.session.representation import ModelRepr

LIKELY = 1e-3
"""A token matters if its probability is at least this, in the plain call or here."""

_SLICE_BYTES = 64 << 20


@dataclass(frozen=True)
class Gaps:
    """The distance of each row of a text from the plain call's row.

    Attributes:
        likely: the largest absolute difference at tokens that matter, `(tokens,)`, float64, nats.
        largest, mean: the largest and the mean over the vocabulary, `(tokens,)`. Infinite instead of NaN.
        is_flipped: whether the most probable tokens differ, `(tokens,)`.

    """

    likely: Tensor
    largest: Tensor
    mean: Tensor
    is_flipped: Tensor


def gaps_of(model_repr: ModelRepr, plain: nn.Module) -> Gaps:
    """Compare all rows, a few at a time: the rows of a whole text are large."""
    input_ids = model_repr.input_ids
    plain_logits = plain(input_ids=input_ids[None]).logits[0]  # (tokens, vocab)
    likely, largest, mean, is_flipped = [], [], [], []
    expected = [torch.full((1,), torch.nan, dtype=torch.float64)]  # token_logprobs; nothing predicts the first
    num_rows = max(1, _SLICE_BYTES // (8 * plain_logits.shape[1]))
    for start in range(0, len(input_ids), num_rows):
        plain_rows = plain_logits[start : start + num_rows].cpu()
        # On the CPU: not every device has float64, which adds no rounding of its own.
        theirs = plain_rows.double().log_softmax(dim=-1)
        ours = model_repr.all_logits(start, start + num_rows).cpu().double().log_softmax(dim=-1)
        gaps = differences(ours, theirs)
        least = theirs.amax(dim=-1, keepdim=True).clamp(max=math.log(LIKELY))
        matters = (theirs >= least) | (ours >= least) | gaps.isinf()  # comparing with NaN is never true
        likely.append(gaps.where(matters, 0.0).amax(dim=-1))
        largest.append(gaps.amax(dim=-1))
        mean.append(gaps.mean(dim=-1))
        is_flipped.append(ours.argmax(dim=-1) != theirs.argmax(dim=-1))
        following = input_ids[start + 1 : start + num_rows + 1].cpu()
        expected.append(theirs[: len(following)].gather(1, following[:, None])[:, 0])
    scored = differences(model_repr.token_logprobs.cpu().double(), torch.cat(expected))
    scored[0] = 0.0
    return Gaps(
        torch.maximum(torch.cat(likely), scored),
        torch.maximum(torch.cat(largest), scored),
        torch.cat(mean),
        torch.cat(is_flipped),
    )
