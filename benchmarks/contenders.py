"""Ways to do the same work: the log-probabilities of every completion's tokens after its prompt.

Each contender gives one list of floats a completion, prompt by prompt. The rivals are set up as well as their users
would: tokens prepared outside of the clock, no gradients, logits only where a completion is scored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import LM, Text, evaluate
from benchmarks.workloads import Prompt, Workload

Scores = list[list[float]]

PADDED_BATCH_TOKENS = 4096
"""Padded tokens of a batch; larger ones were not faster on two cores."""
PADDED_BATCHES_RUN = 4
"""Of more batches than these a sample is timed; the table says so."""


@dataclass(frozen=True)
class Done:
    """What a rival did: scores (empty for texts that it left out), and which fraction of the work that is."""

    scores: Scores
    fraction: float = 1.0


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

HELD_TOKENS = 8192
"""With GPT-2's 77 kB a token, what is held stays near what the rivals hold: prompts are done some at a time."""


def compose(lm: LM, prompt: Prompt) -> list[Text]:
    text = Text("", lm)
    for part in prompt.parts:
        text = text + part
    return [text + completion for completion in prompt.completions]


def with_backprompt(lm: LM, workload: Workload, completion_lengths: list[list[int]]) -> Scores:
    """Compose, evaluate and score; composing, encoding and planning are on the clock."""
    scores: Scores = []
    for first, last in _chunks([sum(lengths) for lengths in completion_lengths]):
        texts = [text for prompt in workload.prompts[first:last] for text in compose(lm, prompt)]
        lengths = [length for prompt in completion_lengths[first:last] for length in prompt]
        starts = [found.num_tokens - length for found, length in zip(evaluate(texts), lengths, strict=True)]
        scores += [logprobs.tolist() for logprobs in lm.token_logprobs(texts, starts)]
        if last < len(workload.prompts):
            lm.clear()
    return scores


def _chunks(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Cut a list into ranges whose sizes sum to at most `HELD_TOKENS` each."""
    first, held = 0, 0
    for idx, size in enumerate(sizes):
        if held + size > HELD_TOKENS and idx > first:
            yield first, idx
            first, held = idx, 0
        held += size
    yield first, len(sizes)


# Rivals


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


@torch.no_grad()
def cache_recipe(model: GPT2LMHeadModel, prompts: list[EncodedPrompt]) -> Done:
    """The documented recipe: a cache for what all prompts share, deep-copied for each use."""
    shared = _shared_parts(prompts)
    prefix_cache = DynamicCache()
    prefix = tuple(token_id for part in prompts[0].parts[:shared] for token_id in part)
    if prefix:
        prefix_logits = model(input_ids=torch.tensor([prefix]), past_key_values=prefix_cache, logits_to_keep=1).logits
    scores: Scores = []
    for prompt in prompts:
        cache, logits = copy.deepcopy(prefix_cache), prefix_logits if prefix else None
        rest = tuple(token_id for part in prompt.parts[shared:] for token_id in part)
        if rest:
            logits = model(input_ids=torch.tensor([rest]), past_key_values=cache, logits_to_keep=1).logits
        for completion in prompt.completions:
            scores.append(_continue(model, copy.deepcopy(cache), logits, completion))
    return Done(scores)


@torch.no_grad()
def cappr_way(model: GPT2LMHeadModel, prompts: list[EncodedPrompt]) -> Done:
    """CAPPr's: the shared part cached once; a prompt's cache repeated for a padded batch of its completions."""
    shared = _shared_parts(prompts)
    prefix = tuple(token_id for part in prompts[0].parts[:shared] for token_id in part)
    prefix_cache = DynamicCache()
    if prefix:
        model(input_ids=torch.tensor([prefix]), past_key_values=prefix_cache, logits_to_keep=1)
    scores: Scores = []
    for prompt in prompts:
        cache = copy.deepcopy(prefix_cache)
        rest = prompt.ids[len(prefix) :]
        last = model(input_ids=torch.tensor([rest]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        num_past, width = len(prompt.ids), max(map(len, prompt.completions))
        cache.batch_repeat_interleave(len(prompt.completions))
        ids = torch.tensor([list(c) + [0] * (width - len(c)) for c in prompt.completions])
        mask = torch.tensor([[1] * (num_past + len(c)) + [0] * (width - len(c)) for c in prompt.completions])
        positions = torch.arange(num_past, num_past + width).expand(len(prompt.completions), -1)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        first = last.log_softmax(dim=-1)[ids[:, 0]]  # (completions,)
        following = _logprobs_of(logits[:, :-1], ids[:, 1:])
        for row, completion in enumerate(prompt.completions):
            scores.append([float(first[row]), *following[row, : len(completion) - 1].tolist()])
    return Done(scores)


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
    """Classify by generating: greedy continuations of all prompts, in left-padded batches; it gives no scores."""

    @torch.no_grad()
    def generate(model: GPT2LMHeadModel, prompts: list[EncodedPrompt]) -> Done:
        for batch in _batches_by_length([len(prompt.ids) for prompt in prompts]):
            width = max(len(prompts[idx].ids) for idx in batch)
            padding = [width - len(prompts[idx].ids) for idx in batch]
            model.generate(
                input_ids=torch.tensor([[0] * n + list(prompts[i].ids) for n, i in zip(padding, batch, strict=True)]),
                attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding]),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return Done([[] for prompt in prompts for _ in prompt.completions])

    return generate


RIVALS: dict[str, Callable[[GPT2LMHeadModel, list[EncodedPrompt]], Done]] = {
    "plain padded": plain_padded,
    "cache recipe (deepcopy)": cache_recipe,
    "CAPPr's way": cappr_way,
    "original toy": toy_way,
    "generating 1 token": generating(1),
    "generating 4 tokens": generating(4),
}


def _continue(
    model: GPT2LMHeadModel, cache: DynamicCache, logits: Tensor | None, completion: tuple[int, ...]
) -> list[float]:
    assert logits is not None
    ids = torch.tensor([completion])
    following = model(input_ids=ids, past_key_values=cache).logits[:, :-1]
    return _logprobs_of(torch.cat([logits[:, -1:], following], dim=1), ids)[0].tolist()


def _logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of `ids` (..., tokens) under `logits` (..., tokens, vocab)."""
    return logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


def _shared_parts(prompts: list[EncodedPrompt]) -> int:
    """How many parts all prompts begin with; the last part of a prompt is always its own."""
    shared = 0
    while all(len(p.parts) > shared + 1 and p.parts[shared] == prompts[0].parts[shared] for p in prompts):
        shared += 1
    return shared


def _batches_by_length(lengths: list[int]) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches of about equal padded tokens."""
    order = sorted(range(len(lengths)), key=lambda idx: -lengths[idx])
    while order:
        size = max(1, PADDED_BATCH_TOKENS // lengths[order[0]])
        yield order[:size]
        order = order[size:]
