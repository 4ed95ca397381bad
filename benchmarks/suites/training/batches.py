"""Batches as trainers of groups have them: prompts, completions of drawn lengths behind them, padding on the right."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

PROMPT_TOKENS = 256
COMPLETION_TOKENS = (64, 256)
"""The shortest and the longest completion."""


@dataclass(frozen=True)
class Batch:
    """A padded batch, and how many of its last columns are scored."""

    input_ids: Tensor
    attention_mask: Tensor
    num_kept: int

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_padded(self) -> int:
        """Tokens that the plain padded batch forwards, padding included."""
        return self.input_ids.numel()


@dataclass(frozen=True)
class Done:
    """The result of some work on a batch: numbers that other ways find, too, and the tokens that were forwarded."""

    numbers: Tensor
    tokens_forwarded: int


def group(num_rows: int, vocabulary: int, seed: int = 0) -> Batch:
    """Completions of one prompt, of lengths drawn evenly; the longest one is there."""
    drawn = random.Random(seed)
    lengths = [COMPLETION_TOKENS[1], *(drawn.randint(*COMPLETION_TOKENS) for _ in range(num_rows - 1))]
    (prompt,) = _ids(1, PROMPT_TOKENS, vocabulary, seed)
    return _padded([prompt] * num_rows, lengths, vocabulary, seed)


def nothing_shared(num_rows: int, vocabulary: int, seed: int = 0) -> Batch:
    """As many prompts as rows, and completions of one length: no padding, and nothing to share."""
    prompts = _ids(num_rows, PROMPT_TOKENS, vocabulary, seed)
    prompts[:, 0] = torch.arange(num_rows)
    return _padded(list(prompts), [sum(COMPLETION_TOKENS) // 2] * num_rows, vocabulary, seed)


def _padded(prompts: list[Tensor], lengths: list[int], vocabulary: int, seed: int) -> Batch:
    num_kept = max(lengths)
    completions = _ids(len(lengths), num_kept, vocabulary, seed + 1)
    completions[:, 0] = torch.arange(len(lengths))  # from their first token on, completions differ
    are_real = torch.arange(num_kept) < torch.tensor(lengths)[:, None]
    prompt_mask = torch.ones((len(prompts), PROMPT_TOKENS), dtype=torch.int64)
    return Batch(
        input_ids=torch.cat([torch.stack(prompts), completions.where(are_real, 0)], dim=1),
        attention_mask=torch.cat([prompt_mask, are_real.to(torch.int64)], dim=1),
        num_kept=num_kept,
    )


def _ids(num_rows: int, num_tokens: int, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (num_rows, num_tokens), generator=generator)
