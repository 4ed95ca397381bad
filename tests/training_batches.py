"""Padded batches as trainers have them, drawn at random, and what the plain call says of their rows, row by row.

Nothing here imports the library.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from transformers import PreTrainedModel

from devices import DEVICE
from reference import plain_logits

NUM_IDS = 320


@dataclass(frozen=True)
class Batch:
    """Rows of real ids, each padded to the same width."""

    rows: Sequence[tuple[int, ...]]
    left: Sequence[int]
    width: int
    kept: int | None

    def tensors(self, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` and `attention_mask`, `(rows, width)`, on the device of the tests."""
        ids = torch.full((len(self.rows), self.width), pad)
        mask = torch.zeros((len(self.rows), self.width), dtype=torch.int64)
        for row, (own, left) in enumerate(zip(self.rows, self.left, strict=True)):
            ids[row, left : left + len(own)] = torch.tensor(own, dtype=torch.int64)
            mask[row, left : left + len(own)] = 1
        return ids.to(DEVICE), mask.to(DEVICE)

    @property
    def num_kept(self) -> int:
        return self.width if self.kept is None else self.kept

    def targets(self) -> list[tuple[int, int, tuple[int, ...], int]]:
        """Of each scored token: its row, its kept column, the ids before it and its own."""
        found = []
        for row, (own, left) in enumerate(zip(self.rows, self.left, strict=True)):
            for idx in range(1, len(own)):
                column = left + idx - (self.width - self.num_kept)
                if column >= 0:
                    found.append((row, column, own[:idx], own[idx]))
        return found

    def forwarded(self) -> set[tuple[int, ...]]:
        """The distinct tokens that must be forwarded, each named by its path."""
        return {ids[:stop] for _, _, ids, _ in self.targets() for stop in range(1, len(ids) + 1)}

    def predicting(self) -> set[tuple[int, ...]]:
        """The distinct rows that predict scored tokens, each named by its path."""
        return {ids for _, _, ids, _ in self.targets()}

    def distinct(self) -> set[tuple[int, ...]]:
        return {own[:stop] for own in self.rows for stop in range(1, len(own) + 1)}


@st.composite
def batches(draw: st.DrawFn, num_ids: int = NUM_IDS) -> Batch:
    """Groups of completions behind prompts, empty ones among them, duplicates, and beginnings of other rows."""
    ids = st.lists(st.integers(0, num_ids - 1), max_size=8).map(tuple)
    rows: list[tuple[int, ...]] = []
    for prompt in draw(st.lists(ids, min_size=1, max_size=3)):
        rows += [prompt + completion for completion in draw(st.lists(ids, min_size=1, max_size=4))]
    for own in draw(st.lists(st.sampled_from(rows), max_size=2)):
        rows.append(own[: draw(st.integers(0, len(own)))])
    rows = draw(st.permutations(rows))
    width = max(map(len, rows)) + draw(st.integers(0, 3))
    left = [draw(st.integers(0, width - len(own))) for own in rows]
    return Batch(rows, left, width, draw(st.none() | st.integers(0, width)))


def group(num_rows: int, num_prompt: int, num_completion: int, seed: int = 0) -> Batch:
    """Completions of one prompt that differ from their first token on."""
    generator = torch.Generator().manual_seed(seed)
    prompt = tuple(torch.randint(0, NUM_IDS, (num_prompt,), generator=generator).tolist())
    tails = torch.randint(0, NUM_IDS, (num_rows, num_completion), generator=generator)
    tails[:, 0] = torch.arange(num_rows)
    rows = [prompt + tuple(tail) for tail in tails.tolist()]
    return Batch(rows, [0] * num_rows, num_prompt + num_completion, num_completion)


def ungrouped(batch: Batch) -> Batch:
    """The same rows without a common beginning."""
    rows = [((own[0] + row) % NUM_IDS, *own[1:]) for row, own in enumerate(batch.rows)]
    return replace(batch, rows=rows)


class Plain:
    """What the plain call says of each row's own tokens, at a temperature; zero where nothing is scored."""

    def __init__(self, model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> None:
        self.shape = (len(batch.rows), batch.num_kept)
        self.targets = batch.targets()
        self.distributions = {}
        for row in dict.fromkeys(row for row, *_ in self.targets):
            logits = plain_logits(model, batch.rows[row]).to(torch.promote_types(model.dtype, torch.float32))
            self.distributions[row] = (logits / temperature).log_softmax(dim=-1)

    def logprobs(self) -> torch.Tensor:
        return self._scattered((), lambda logprobs, row, column, token_id: logprobs[token_id])

    def entropies(self) -> torch.Tensor:
        return self._scattered((), lambda logprobs, *_: torch.special.entr(logprobs.exp()).sum())

    def top_logprobs(self, k: int) -> torch.Tensor:
        return self._scattered((k,), lambda logprobs, *_: logprobs.topk(k).values)

    def logprobs_at(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Of these ids in the place of each token, `(rows, kept, k)`."""
        k = token_ids.shape[2:]
        return self._scattered(k, lambda logprobs, row, column, _: logprobs[token_ids[row, column].cpu()])

    def _scattered(self, shape: tuple[int, ...], read) -> torch.Tensor:
        found = torch.zeros((*self.shape, *shape))
        for row, column, before, token_id in self.targets:
            found[row, column] = read(self.distributions[row][len(before) - 1], row, column, token_id)
        return found
