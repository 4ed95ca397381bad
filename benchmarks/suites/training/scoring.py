"""Scores without gradients: by backprompt, and by the plain padded batch as trl computes it."""

from __future__ import annotations

import torch
from torch import nn

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
    """The same, by `GRPOTrainer._get_per_token_logps_and_entropies`, without its temperature."""
    parts = zip(batch.input_ids.split(ROWS_AT_A_TIME), batch.attention_mask.split(ROWS_AT_A_TIME), strict=True)
    found = []
    for ids, mask in parts:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=batch.num_kept + 1).logits[
            :, :-1
        ]
        targets = ids[:, -batch.num_kept :]
        selected = logits.gather(-1, targets[..., None])[..., 0]
        found.append(selected - torch.stack([row.logsumexp(dim=-1) for row in logits]))
    return Done(torch.cat(found) * batch.attention_mask[:, -batch.num_kept :], batch.num_padded)
