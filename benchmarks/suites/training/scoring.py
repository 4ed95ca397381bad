"""Scores without gradients: by backprompt, and by the plain padded batch as trl computes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backprompt.training import token_logprobs
from benchmarks.suites.training.batches import Batch, Done

ROWS_AT_A_TIME = 8
"""The plain batch goes through the model so many rows at a time: trl's default."""


def by_backprompt(model: nn.Module, batch: Batch) -> Done:
    """Log-probabilities of the completions, `(rows, kept)`."""
    scores = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.num_kept)
    return Done(scores.logprobs, scores.account.tokens_forwarded)


@torch.no_grad()
def by_plain_batch(model: nn.Module, batch: Batch) -> Done:
    """The same, some rows at a time."""
    parts = zip(batch.input_ids.split(ROWS_AT_A_TIME), batch.attention_mask.split(ROWS_AT_A_TIME), strict=True)
    found = [selected_logprobs(model, ids, mask, batch.num_kept) for ids, mask in parts]
    return Done(torch.cat(found), batch.num_padded)


def selected_logprobs(model: nn.Module, ids: Tensor, mask: Tensor, num_kept: int) -> Tensor:
    """What `GRPOTrainer._get_per_token_logps_and_entropies` returns, without its temperature; 0 at padding."""
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=num_kept + 1)
    logits = output.logits[:, :-1]
    selected = logits.gather(-1, ids[:, -num_kept:, None])[..., 0]
    logprobs: Tensor = selected - torch.stack([row.logsumexp(dim=-1) for row in logits])
    return logprobs * mask[:, -num_kept:]
