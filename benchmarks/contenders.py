"""Ways to do the same work: the log-probabilities of every completion's tokens after its prompt.

Each contender gives one list of floats a completion, prompt by prompt. The rivals are set up as well as their users
would: tokens prepared outside of the clock, no gradients, logits for the last rows only where the call can do that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text
from benchmarks.plots import Contender, Look
from benchmarks.workloads import Prompt, Workload

Scores = list[list[float]]

PADDED_BATCH_TOKENS = 1024
"""Padded tokens of a batch: of 512, 1,024, 2,048 and 4,096 the fastest on two cores."""
CAPPR_BATCH_PROMPTS = 8
CAPPR_HELD_TOKENS = 16_384
"""Tokens whose keys and values CAPPr's batch of prompts holds at most, repeated for each completion: 1.2 GB."""
PADDED_BATCHES_RUN = 12
"""Of more batches than these a sample is timed; the table says so."""


@dataclass(frozen=True)
class Done:
    """A rival's result: scores (empty for texts that it left out), and the fraction of the work done."""

    scores: Scores
    fraction: float = 1.0


BACKPROMPT = Contender("backprompt", Look("#d55e00", "o"))
DENSE_FORWARD = Contender("dense forward", Look("#0072b2", "x", style="--"))


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt's parts and of its completions; both end at token boundaries by construction."""

    parts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token_id for part in self.parts for token_id in part)


def encode(tokenizer: PreTrainedTokenizerFast, workload: Workload) -> list[EncodedPrompt]:
    def ids(string: str) -> tuple[int, ...]:
        return tuple(tokenizer(string)["input_ids"])

    return [EncodedPrompt(tuple(map(ids, p.parts)), tuple(map(ids, p.completions))) for p in workload.prompts]


# backprompt


def compose(lm: LM, prompt: Prompt) -> tuple[Text, list[Text]]:
    """The prompt, and the prompt before each of its completions."""
    text = Text("", lm)
    for part in prompt.parts:
        text = text + part
    return text, [text + completion for completion in prompt.completions]


def compose_all(lm: LM, workload: Workload) -> list[Text]:
    return [text for prompt in workload.prompts for text in compose(lm, prompt)[1]]


def with_backprompt(lm: LM, workload: Workload) -> Scores:
    """Compose and score in one call; composing, encoding and planning are on the clock."""
    composed = [compose(lm, prompt) for prompt in workload.prompts]
    texts = [text for _, completed in composed for text in completed]
    starts = [prompt for prompt, completed in composed for _ in completed]
    return [logprobs.tolist() for logprobs in lm.token_logprobs(texts, starts)]


# Rivals


@dataclass(frozen=True)
class Rival(Contender):
    """Another way to do the work, in this process."""

    heading: str  # of its column in tables
    run: Callable[[GPT2LMHeadModel, list[EncodedPrompt]], Done]
    copies_for_each_text: bool = False  # keys and values; not run on many texts, whose copies would not fit


@torch.no_grad()
def plain_padded(model: GPT2LMHeadModel, prompts: list[EncodedPrompt]) -> Done:
    """Every text by itself: left-padded batches sorted by length, logits for the last tokens only.

    Of many batches a sample is run, evenly spaced.
    """
    texts = [(prompt.ids + completion, len(completion)) for prompt in prompts for completion in prompt.completions]
    scores: Scores = [[] for _ in texts]
    batches = list(_batches_by_length([len(ids) for ids, _ in texts]))
    stride = -(-len(batches) // PADDED_BATCHES_RUN)
    run = batches[stride // 2 :: stride]
    for batch in run:
        width = max(len(texts[idx][0]) for idx in batch)
        num_scored = max(texts[idx][1] for idx in batch)
        ids = torch.tensor([[0] * (width - len(texts[idx][0])) + list(texts[idx][0]) for idx in batch])
        mask = torch.tensor([[0] * (width - len(texts[idx][0])) + [1] * len(texts[idx][0]) for idx in batch])
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=num_scored + 1, use_cache=False
        ).logits
        logprobs = _logprobs_of(logits[:, :-1], ids[:, -num_scored:])  # (batch, num_scored)
        for row, idx in enumerate(batch):
            scores[idx] = logprobs[row, -texts[idx][1] :].tolist()

    def num_tokens(chosen: list[list[int]]) -> int:
        return sum(len(texts[batch[0]][0]) * len(batch) for batch in chosen)

    return Done(scores, num_tokens(run) / num_tokens(batches))


class _SharedCaches:
    """A cache for each beginning that prompts share, computed once: a longer one from the one before it."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self._model = model
        self._caches: dict[tuple[tuple[int, ...], ...], DynamicCache] = {(): DynamicCache()}

    def copy_of(self, parts: tuple[tuple[int, ...], ...]) -> DynamicCache:
        if parts not in self._caches:
            cache = self.copy_of(parts[:-1])
            self._model(input_ids=torch.tensor([parts[-1]]), past_key_values=cache, logits_to_keep=1)
            self._caches[parts] = cache
        return copy.deepcopy(self._caches[parts])


@torch.no_grad()
def cache_recipe(model: GPT2LMHeadModel, prompts: list[EncodedPrompt]) -> Done:
    """The documented recipe: a cache for shared beginnings, deep-copied for each use; nested where sharing is."""
    caches = _SharedCaches(model)
    scores: Scores = []
    for prompt in prompts:
        cache, rest = caches.copy_of(prompt.parts[:-1]), prompt.parts[-1]
        if len(prompt.completions) == 1:  # one call for both
            (completion,) = prompt.completions
            ids = torch.tensor([rest + completion[:-1]])
            logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=len(completion)).logits
            scores.append(_logprobs_of(logits, torch.tensor([completion]))[0].tolist())
            continue
        first = model(input_ids=torch.tensor([rest]), past_key_values=cache, logits_to_keep=1).logits
        for idx, completion in enumerate(prompt.completions):
            logits = first
            if len(completion) > 1:
                own = cache if idx == len(prompt.completions) - 1 else copy.deepcopy(cache)
                following = model(input_ids=torch.tensor([completion[:-1]]), past_key_values=own).logits
                logits = torch.cat([first, following], dim=1)
            scores.append(_logprobs_of(logits, torch.tensor([completion]))[0].tolist())
    return Done(scores)


@torch.no_grad()
def cappr_way(model: GPT2LMHeadModel, prompts: list[EncodedPrompt]) -> Done:
    """CAPPr's: nested caches of what prompts share; a batch of prompts' caches repeated for all their completions."""
    caches = _SharedCaches(model)
    scores: dict[int, list[list[float]]] = {}
    by_shared: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for idx, prompt in enumerate(prompts):
        by_shared.setdefault(prompt.parts[:-1], []).append(idx)
    for shared, indices in by_shared.items():
        num_shared, num_each = sum(map(len, shared)), len(prompts[indices[0]].completions)
        indices.sort(key=lambda idx: len(prompts[idx].parts[-1]))
        size = max(1, min(CAPPR_BATCH_PROMPTS, CAPPR_HELD_TOKENS // (num_each * len(prompts[indices[-1]].ids))))
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            rests = [prompts[idx].parts[-1] for idx in batch]
            width = max(map(len, rests))
            ids = torch.tensor([[0] * (width - len(rest)) + list(rest) for rest in rests])
            mask = torch.tensor([[1] * num_shared + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests])
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
            cache = caches.copy_of(shared)
            if num_shared:
                cache.batch_repeat_interleave(len(batch))
            first = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions[:, num_shared:],
                past_key_values=cache,
                logits_to_keep=1,
            ).logits  # (prompts, 1, vocab)
            logits = first.repeat_interleave(num_each, dim=0)
            completions = [completion for idx in batch for completion in prompts[idx].completions]
            longest = max(map(len, completions)) - 1
            if longest:
                cache.batch_repeat_interleave(num_each)
                ids = torch.tensor([list(c[:-1]) + [0] * (longest + 1 - len(c)) for c in completions])
                own = torch.tensor([[1] * (len(c) - 1) + [0] * (longest + 1 - len(c)) for c in completions])
                starts = (positions[:, -1:] + 1).repeat_interleave(num_each, dim=0)
                following = model(
                    input_ids=ids,
                    attention_mask=torch.cat([mask.repeat_interleave(num_each, dim=0), own], dim=1),
                    position_ids=starts + torch.arange(longest),
                    past_key_values=cache,
                ).logits
                logits = torch.cat([logits, following], dim=1)
            wanted = torch.tensor([list(c) + [0] * (longest + 1 - len(c)) for c in completions])
            logprobs = _logprobs_of(logits, wanted)
            found = [logprobs[row, : len(c)].tolist() for row, c in enumerate(completions)]
            for row, idx in enumerate(batch):
                scores[idx] = found[row * num_each : (row + 1) * num_each]
    return Done([completion for idx in range(len(prompts)) for completion in scores[idx]])


@torch.no_grad()
def toy_way(model: GPT2LMHeadModel, prompts: list[EncodedPrompt]) -> Done:
    """The original toy's: every node once, by itself, with a copy of all keys and values before it."""
    nodes: dict[tuple[tuple[int, ...], ...], tuple[list[tuple[Tensor, Tensor]], Tensor]] = {}

    def node(parts: tuple[tuple[int, ...], ...]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values of all tokens of the parts, and the logits after each token of the last one."""
        for stop in range(1, len(parts) + 1):
            if parts[:stop] not in nodes:
                past = nodes[parts[: stop - 1]][0] if stop > 1 else []
                cache = DynamicCache()
                for layer_idx, (key, value) in enumerate(past):
                    cache.update(key.clone(), value.clone(), layer_idx)
                logits = model(input_ids=torch.tensor([parts[stop - 1]]), past_key_values=cache).logits[0]
                nodes[parts[:stop]] = [(layer.keys, layer.values) for layer in cache.layers], logits
        return nodes[parts]

    scores: Scores = []
    for prompt in prompts:
        last = node(prompt.parts)[1][-1:]
        for completion in prompt.completions:
            logits = torch.cat([last, node((*prompt.parts, completion))[1][:-1]])
            scores.append(_logprobs_of(logits, torch.tensor(completion)).tolist())
    return Done(scores)


def generating(num_tokens: int) -> Callable[[GPT2LMHeadModel, list[EncodedPrompt]], Done]:
    """Classify by generating greedily, in padded batches that continue a shared cache; it gives no scores."""

    @torch.no_grad()
    def generate(model: GPT2LMHeadModel, prompts: list[EncodedPrompt]) -> Done:
        shared = prompts[0].parts[:-1]
        assert all(prompt.parts[:-1] == shared for prompt in prompts)
        num_shared, caches = sum(map(len, shared)), _SharedCaches(model)
        for batch in _batches_by_length([len(prompt.ids) for prompt in prompts]):
            width = max(len(prompts[idx].ids) for idx in batch)
            rows, masks = [], []
            for idx in batch:
                ids = prompts[idx].ids
                padding = [0] * (width - len(ids))
                rows.append([*ids[:num_shared], *padding, *ids[num_shared:]])
                masks.append([1] * num_shared + padding + [1] * (len(ids) - num_shared))
            cache = caches.copy_of(shared)
            cache.batch_repeat_interleave(len(batch))
            model.generate(
                input_ids=torch.tensor(rows),
                attention_mask=torch.tensor(masks),
                past_key_values=cache,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return Done([[] for prompt in prompts for _ in prompt.completions])

    return generate


PLAIN_PADDED = Rival("plain padded", Look("#8c8c8c", "s"), "plain padded", plain_padded)
CACHE_RECIPE = Rival(
    "cache recipe (deepcopy)", Look("#56b4e9", "^"), "cache recipe", cache_recipe, copies_for_each_text=True
)
CAPPR_WAY = Rival("CAPPr's way", Look("#009e73", "D"), "CAPPr's way", cappr_way)
ORIGINAL_TOY = Rival("original toy", Look("#cc79a7", "v"), "original toy", toy_way, copies_for_each_text=True)
GENERATING_1 = Rival("generating 1 token", Look("#56b4e9", "^"), "generating 1 token", generating(1))
GENERATING_4 = Rival("generating 4 tokens", Look("#cc79a7", "v"), "generating 4 tokens", generating(4))

SCORING_RIVALS = (PLAIN_PADDED, CACHE_RECIPE, CAPPR_WAY, ORIGINAL_TOY)
RIVALS = (*SCORING_RIVALS, GENERATING_1, GENERATING_4)


def _logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of `ids` (..., tokens) under `logits` (..., tokens, vocab)."""
    return logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


def _batches_by_length(lengths: list[int]) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches of about equal padded tokens."""
    order = sorted(range(len(lengths)), key=lambda idx: -lengths[idx])
    while order:
        size = max(1, PADDED_BATCH_TOKENS // lengths[order[0]])
        yield order[:size]
        order = order[size:]
