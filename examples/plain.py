"""The baseline of the examples: plain calls of transformers, one text at a time or in padded batches.

Nothing here uses backprompt. Logits are computed only for the rows that are needed, if the model's forward call has
`logits_to_keep`. Everything runs in inference mode, as a user who knows transformers would write it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def next_token_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """The logits after the last token, (vocab,)."""
    return model(input_ids=_row(model, token_ids), **_keep(model, 1)).logits[0, -1]


@torch.inference_mode()
def token_logprobs(model: Any, token_ids: Sequence[int]) -> Tensor:
    """The log-probability of each token but the first, (tokens - 1,), nats."""
    input_ids = _row(model, token_ids)
    logprobs = model(input_ids=input_ids).logits[0, :-1].float().log_softmax(dim=-1)
    return logprobs.gather(1, input_ids[0, 1:, None])[:, 0]


@dataclass(frozen=True)
class Continuation:
    """A text whose tokens from `start` on are to be scored."""

    token_ids: tuple[int, ...]
    start: int


def sorted_batches(texts: Sequence[Continuation], batch_size: int) -> list[list[Continuation]]:
    """The texts by length, cut into batches: as little padding as batches of this size can have."""
    by_length = sorted(texts, key=lambda text: len(text.token_ids))
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


@torch.inference_mode()
def score_batch(model: Any, batch: Sequence[Continuation]) -> Tensor:
    """Log-probability, in nats, of each text's tokens from its `start` on, (batch,); one right-padded forward pass."""
    longest = max(len(text.token_ids) for text in batch)
    first = min(text.start for text in batch) - 1  # the row that predicts the first token to be scored
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    is_scored = torch.zeros(len(batch), longest - 1 - first, dtype=torch.bool)
    for row, text in enumerate(batch):
        input_ids[row, : len(text.token_ids)] = torch.tensor(text.token_ids)
        attention_mask[row, : len(text.token_ids)] = 1
        is_scored[row, text.start - 1 - first : len(text.token_ids) - 1 - first] = True
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    keep = _keep(model, longest - first)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **keep).logits
    logprobs = logits[:, first - longest : -1].float().log_softmax(dim=-1)  # (batch, rows, vocab)
    scored = logprobs.gather(2, input_ids[:, first + 1 :, None])[..., 0]  # (batch, rows)
    return scored.masked_fill(~is_scored.to(scored.device), 0.0).sum(dim=1)


@dataclass(frozen=True)
class Estimate:
    """The estimated seconds of all batches, from the few that were run."""

    seconds: float
    seconds_run: float
    batches_run: int
    batches: int


def estimate_seconds(model: Any, batches: Sequence[Sequence[Continuation]], batches_run: int) -> Estimate:
    """Time `batches_run` of the batches, evenly spaced from the shortest to the longest, after one to warm up.

    The other batches are assumed to take the same time per token, padding included.
    """
    batches_run = min(batches_run, len(batches))
    chosen = [batches[(2 * idx + 1) * len(batches) // (2 * batches_run)] for idx in range(batches_run)]
    score_batch(model, chosen[0])
    begin = time.perf_counter()
    for batch in chosen:
        score_batch(model, batch)
    seconds_run = time.perf_counter() - begin
    seconds = seconds_run * _num_tokens(batches) / _num_tokens(chosen)
    return Estimate(seconds, seconds_run, batches_run, len(batches))


def _num_tokens(batches: Sequence[Sequence[Continuation]]) -> int:
    """Tokens forwarded, padding included."""
    return sum(len(batch) * max(len(text.token_ids) for text in batch) for batch in batches)


def _row(model: Any, token_ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(token_ids)], device=model.device)


def _keep(model: Any, num_rows: int) -> dict[str, int]:
    """The argument that restricts logits to the last rows, for a model that takes it."""
    return {"logits_to_keep": num_rows} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
