"""backprompt and its rivals on a GPU: what scores a work, what continues prompts, and the linear layers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from backprompt import Text, generate
from benchmarks.suites.gpu.rigs import Rig
from benchmarks.suites.gpu.works import Asked, Ids

PADDED_TOKENS = 32_768
"""Tokens of a padded batch, padding included."""
MAX_PADDED_BATCHES = 16
"""Of more batches a sample of so many is run, and their seconds stand for all tokens."""
RECIPE_ROWS = 128
"""Rows of a batch behind a cache that was made once."""
LIMIT_ROWS = 8192
"""Rows at which the linear layers alone are measured."""
PASS_TOKENS = 512
"""Tokens of a row of the plain pass whose memory is measured."""


def backprompt_scores(rig: Rig, work: Sequence[Asked]) -> list[Tensor]:
    """The log-probabilities of each completion's tokens; composing, planning and scoring included."""
    texts, starts = [], []
    for asked in work:
        prompt = Text("", rig.lm)
        for part in asked.parts:
            prompt = prompt + Text.from_tokens(part, rig.lm)
        texts += [prompt + Text.from_tokens(completion, rig.lm) for completion in asked.completions]
        starts += [sum(map(len, asked.parts))] * len(asked.completions)
    return rig.lm.token_logprobs(texts, starts)


class Padded:
    """Every text by itself: left-padded batches, sorted by length; `share`: of all tokens, those that are run."""

    def __init__(self, rig: Rig, work: Sequence[Asked]) -> None:
        self._rig = rig
        texts = [(asked.prompt, completion) for asked in work for completion in asked.completions]
        rows = sorted(((idx, prompt + end, len(end)) for idx, (prompt, end) in enumerate(texts)), key=_length)
        batches = list(_batches(rows))
        self._batches = batches[:: -(-len(batches) // MAX_PADDED_BATCHES)]
        self.share = sum(map(_num_padded, self._batches)) / sum(map(_num_padded, batches))

    @torch.no_grad()
    def run(self, num_batches: int | None = None) -> dict[int, float]:
        """Score the sampled batches, or the first of them: the sum of each completion, by the number of its text."""
        found: dict[int, float] = {}
        for batch in self._batches[:num_batches]:
            ids, mask = _left_padded([row for _, row, _ in batch], self._rig.device)
            most = max(num for _, _, num in batch)
            logits = self._rig.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=_positions(mask),
                logits_to_keep=most + 1,
                use_cache=False,
            ).logits
            scores = _scores(logits, ids[:, -most:])
            sums = [scores[place, most - num :].sum() for place, (_, _, num) in enumerate(batch)]
            found |= zip([idx for idx, _, _ in batch], torch.stack(sums).tolist(), strict=True)
        return found


@torch.no_grad()
def recipe(rig: Rig, work: Sequence[Asked]) -> None:
    """The documented cache, batched: the first shared part is forwarded once and repeated for batches of the rest."""
    for shared, group in groupby(work, key=lambda asked: asked.parts[0] if len(asked.parts) > 1 else []):
        cache = DynamicCache()
        if shared:
            rig.model(input_ids=torch.tensor([shared], device=rig.device), past_key_values=cache, logits_to_keep=1)
        rows = [
            (asked.prompt[len(shared) :] + completion, len(completion))
            for asked in group
            for completion in asked.completions
        ]
        for start in range(0, len(rows), RECIPE_ROWS):
            _run_behind(rig, cache, len(shared), rows[start : start + RECIPE_ROWS])


def _run_behind(rig: Rig, cache: DynamicCache, num_cached: int, rows: Sequence[tuple[Ids, int]]) -> None:
    own = DynamicCache()
    for layer_idx, layer in enumerate(cache.layers):
        repeated = [tensor.expand(len(rows), -1, -1, -1) for tensor in (layer.keys, layer.values)]
        own.update(*repeated, layer_idx)
    ids, own_mask = _left_padded([row for row, _ in rows], rig.device)
    mask = torch.cat([own_mask.new_ones(len(rows), num_cached), own_mask], dim=1)
    most = max(num for _, num in rows)
    logits = rig.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=_positions(mask)[:, num_cached:],
        past_key_values=own,
        logits_to_keep=most + 1,
    ).logits
    _scores(logits, ids[:, -most:]).sum(dim=1).cpu()


def backprompt_continues(rig: Rig, prompts: Sequence[Ids], num_shared: int, num_new: int) -> None:
    """Greedy continuations of prompts whose first tokens are shared."""
    shared = Text.from_tokens(prompts[0][:num_shared], rig.lm)
    texts = [shared + Text.from_tokens(ids[num_shared:], rig.lm) for ids in prompts]
    generate(texts, max_new_tokens=num_new, show_progress_bar=False)


def transformers_continues(rig: Rig, prompts: Sequence[Ids], num_new: int) -> None:
    """`model.generate` on a batch of prompts of one length."""
    ids = torch.tensor(prompts, device=rig.device)
    options = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}
    rig.model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def transformers_continues_batch(rig: Rig, prompts: Sequence[Ids], num_new: int) -> None:
    """`model.generate_batch`: transformers' continuous batching, which shares beginnings by pages.

    Raises:
        RuntimeError: not all prompts were continued.

    """
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = rig.model.generate_batch([list(ids) for ids in prompts], generation_config=config, progress_bar=False)
    if len(found) != len(prompts) or any(len(output.generated_tokens) != num_new for output in found.values()):
        raise RuntimeError("generate_batch did not continue all prompts.")


@torch.no_grad()
def linear_seconds(rig: Rig, num_rows: int) -> float:
    """The linear layers of the model's body alone, on so many rows: no program that forwards these is faster."""
    layers = [layer for layer in rig.model.base_model.modules() if type(layer).__name__ in ("Linear", "Conv1D")]
    rounds = max(1, round(num_rows / LIMIT_ROWS))
    rows = min(num_rows, LIMIT_ROWS)
    inputs = {
        size: torch.randn(rows, size, device=rig.device, dtype=rig.shape.dtype)
        for size in set(map(_num_inputs, layers))
    }

    def run() -> None:
        for layer in layers:
            for _ in range(rounds):
                layer(inputs[_num_inputs(layer)])

    run()
    return min(rig.seconds_of(run) for _ in range(3)) * num_rows / (rounds * rows)


@torch.no_grad()
def plain_pass(rig: Rig, num_tokens: int) -> None:
    """A forward pass of the plain model's body on about so many tokens, without a cache."""
    row = min(PASS_TOKENS, num_tokens)
    ids = torch.zeros((-(-num_tokens // row), row), dtype=torch.int64, device=rig.device)
    rig.model.base_model(input_ids=ids, use_cache=False)


def _num_inputs(layer: nn.Module) -> int:
    return int(layer.weight.shape[0 if type(layer).__name__ == "Conv1D" else 1])


Row = tuple[int, Ids, int]
"""The number of a text, its ids, and how many of them are scored."""


def _length(row: Row) -> int:
    return len(row[1])


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    start = 0
    while start < len(rows):
        longest = _length(rows[min(start + 64, len(rows) - 1)])
        stop = start + max(1, PADDED_TOKENS // longest)
        yield rows[start:stop]
        start = stop


def _num_padded(batch: Sequence[Row]) -> int:
    return len(batch) * max(map(_length, batch))


def _left_padded(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def _scores(logits: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities of the last ids, from the logits before each and behind the last."""
    return torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[..., None])[..., 0]
