"""Scores without gradients: by backprompt, by the plain padded batch, and by the padded batch with TRL's own head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from backprompt.training import token_logprobs
from benchmarks.suites.training.batches import Batch, Done

ROWS_AT_A_TIME = 8
"""The padded batch goes through the model so many rows at a time: TRL's default."""

LogprobsOf: TypeAlias = "Callable[[nn.Module, Tensor, Tensor, int], Tensor]"
"""From model, ids, mask and the number of kept columns to log-probabilities, `(rows, kept)`."""


def by_backprompt(model: nn.Module, batch: Batch) -> Done:
    """Log-probabilities of the completions, `(rows, kept)`."""
    scores = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.num_kept)
    return Done(scores.logprobs, scores.account.tokens_forwarded)


@torch.no_grad()
def by_rows(logprobs_of: LogprobsOf, model: nn.Module, batch: Batch) -> Done:
    """The same by the padded batch, some rows at a time."""
    parts = zip(batch.input_ids.split(ROWS_AT_A_TIME), batch.attention_mask.split(ROWS_AT_A_TIME), strict=True)
    found = [logprobs_of(model, ids, mask, batch.num_kept) for ids, mask in parts]
    return Done(torch.cat(found), batch.num_padded)


def selected_logprobs(model: nn.Module, ids: Tensor, mask: Tensor, num_kept: int) -> Tensor:
    """The log-probabilities by the model's own call, with the head on the kept columns alone; 0 at padding."""
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=num_kept + 1)
    logits = output.logits[:, :-1]
    selected = logits.gather(-1, ids[:, -num_kept:, None])[..., 0]
    logprobs: Tensor = selected - torch.stack([row.logsumexp(dim=-1) for row in logits])
    return logprobs * mask[:, -num_kept:]


def trl_logprobs(model: nn.Module, ids: Tensor, mask: Tensor, num_kept: int) -> Tensor:
    """The same by the fused head that TRL's trainers put on their model; on the CPU it scores all columns."""
    from trl.trainer.utils import add_fused_lm_head  # with TRL, no other suite needs it

    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-num_kept] = -100
    add_fused_lm_head(model)
    try:
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    finally:
        del model.forward
    logprobs: Tensor = output.log_probs[:, -num_kept:]
    return logprobs
