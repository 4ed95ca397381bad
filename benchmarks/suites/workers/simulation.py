"""A call on many workers, by the plan that would be carried out and rates that were measured.

A driver encodes and places all texts, and then waits for the slowest part:

    seconds = texts * driver + workers * question + bytes / network + slowest part / rate of a worker
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from backprompt import Text
from backprompt.engines.crew_lm import CrewLM
from backprompt.forest.partition import Rates, cut, flattened, forest_order
from benchmarks import workloads
from benchmarks.measure import seconds_of
from benchmarks.suites.partition import RATES, tree

NUM_WORKERS = (1, 8, 64, 256)
NETWORK_BYTES_A_SECOND = 1.25e9
"""10 Gbit/s, of the driver's machine; assumed, not measured."""
NUM_IDS = 3000
"""Ids below this number are drawn; the tokenizer has some more."""
NUM_TEXTS = 20_000
NUM_QUESTIONS = 50


@dataclass(frozen=True)
class Measures:
    """Rates that were measured on this machine.

    Attributes:
        tokens_a_second: that a worker of one thread computes.
        driver_seconds_a_text: of the driver's processor: placing, packing, and putting results in order.
        seconds_a_question: to ask a worker about a text that it holds, and to read the answer.
        bytes_a_text: of the token ids and the results of a text.

    """

    tokens_a_second: float
    driver_seconds_a_text: float
    seconds_a_question: float
    bytes_a_text: float


@dataclass(frozen=True)
class Line:
    """A call on so many workers.

    Attributes:
        num_texts, num_workers: of the call.
        slowest, driver, moving: seconds of the slowest part, of the driver with its questions, of the network.
        of_distinct: tokens computed in all parts, by the distinct ones.
        faster: than with one worker.

    """

    num_texts: int
    num_workers: int
    slowest: float
    driver: float
    moving: float
    of_distinct: float
    faster: float


def tiny() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """A model that hardly counts: what is left is the driver's work."""
    tokenizer = workloads.make_tokenizer()
    torch.manual_seed(workloads.SEED)
    size: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 1024}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **size)), tokenizer


def measured(lm: CrewLM, tokens_a_second: float, num_texts: int = NUM_TEXTS) -> Measures:
    """Measure the driver of one worker that holds `tiny`; the tokens are those that another one computes."""
    ids = [tuple(token_id % NUM_IDS for token_id in text) for text in tree(num_texts)]
    texts = [Text.from_tokens(own, lm) for own in ids]
    starts = [len(own) - 1 for own in ids]
    lm.token_logprobs(texts[:100], starts[:100])
    started = time.process_time()
    lm.token_logprobs(texts, starts, show_progress_bar=False)
    driver = time.process_time() - started
    num_bytes = sum(map(len, ids)) * 4 + len(ids) * (8 + 8 + 4 + 1)  # ids, offsets; lengths, log-probability, argmax
    asked = sorted(seconds_of(lambda: lm.token_logprobs(texts[:1], starts[:1])) for _ in range(NUM_QUESTIONS))
    return Measures(tokens_a_second, driver / len(texts), asked[len(asked) // 2], num_bytes / len(texts))


def simulated(measures: Measures, num_prompts: int, rates: Rates = RATES) -> list[Line]:
    """Simulate calls of the tree of the suite `partition` on one worker and more."""
    ids, offsets = flattened(tree(num_prompts))
    order, shared = forest_order(ids, offsets)
    lengths = (offsets[1:] - offsets[:-1])[order]
    lines: list[Line] = []
    first = 0.0
    for num_workers in NUM_WORKERS:
        parts = cut(lengths, shared, num_workers, rates=rates)
        slowest = float(parts.costs.max() / rates.linear / measures.tokens_a_second)
        driver = len(order) * measures.driver_seconds_a_text + num_workers * measures.seconds_a_question
        moving = len(order) * measures.bytes_a_text / NETWORK_BYTES_A_SECOND
        seconds = slowest + driver + moving
        first = first or seconds
        of_distinct = float(parts.num_tokens.sum() / parts.num_distinct)
        lines.append(Line(len(order), num_workers, slowest, driver, moving, of_distinct, first / seconds))
    return lines
