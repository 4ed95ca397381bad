"""Forward and backward: by backprompt, and by the padded batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backprompt.training import token_logprobs
from benchmarks.suites.training.batches import Batch, Done
from benchmarks.suites.training.scoring import ROWS_AT_A_TIME, LogprobsOf


def by_backprompt(model: nn.Module, batch: Batch) -> Done:
    """The gradient of a loss on the completions: the whole batch as one forest."""
    model.zero_grad()
    scores = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.num_kept, requires_grad=True)
    _loss(scores.logprobs).backward()
    return Done(_numbers(model, scores.logprobs), scores.account.tokens_forwarded)


def by_rows(logprobs_of: LogprobsOf, model: nn.Module, batch: Batch) -> Done:
    """The same by the padded batch, a few rows at a time: gradients add up as a trainer's do over its micro-batches."""
    model.zero_grad()
    found = []
    for ids, mask in zip(
        batch.input_ids.split(ROWS_AT_A_TIME), batch.attention_mask.split(ROWS_AT_A_TIME), strict=True
    ):
        logprobs = logprobs_of(model, ids, mask, batch.num_kept)
        _loss(logprobs).backward()
        found.append(logprobs.detach())
    return Done(_numbers(model, torch.cat(found)), batch.num_padded)


def _loss(logprobs: Tensor) -> Tensor:
    """A loss that weighs tokens by their columns, so that no two columns of a row have one gradient."""
    return (logprobs * torch.linspace(0.5, 1.5, logprobs.shape[1], device=logprobs.device)).sum() / 1000


def _numbers(model: nn.Module, logprobs: Tensor) -> Tensor:
    """Log-probabilities, and the norm of each parameter's gradient relative to the largest one; forgets gradients."""
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    stacked = torch.stack(norms)
    return torch.cat([logprobs.detach().flatten(), stacked / stacked.max()])
