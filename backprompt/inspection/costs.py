"""The cost of weights in fewer bits, or of another dtype: distances from full weights, bytes and seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backprompt.inspection.gaps import gaps_of
from backprompt.lm import LM
from backprompt.model import skeleton
from backprompt.session.representation import ModelRepr
from backprompt.text.node import Text

ROUNDS = 2
"""The number of times that both models compute the texts, in turns; the shortest time of each counts."""


@dataclass(frozen=True)
class Cost:
    """The distance of a model from the one with full weights, and the bytes and seconds of both; `str()` is a summary.

    Attributes:
        num_tokens: tokens of the texts that were compared; shared tokens count in each text.
        gap: the largest difference of log-probabilities at tokens that matter, nats; see `NodeDrift`.
        largest_gap, mean_gap: the largest and the mean difference over all tokens of the vocabulary.
        argmax_flips: the number of tokens behind which the most probable tokens differ.
        weight_bytes, full_weight_bytes: the bytes of the weights, including copies that are packed for kernels.
        seconds, full_seconds: the time for all texts in a new `LM`, each distinct token once: on the CPU processor time
            summed over all threads, elsewhere elapsed time.

    """

    num_tokens: int
    gap: float
    largest_gap: float
    mean_gap: float
    argmax_flips: int
    weight_bytes: int
    full_weight_bytes: int
    seconds: float
    full_seconds: float

    def __str__(self) -> str:
        return (
            f"Against the full weights: {self.weight_bytes / self.full_weight_bytes:.0%} of the bytes "
            f"({self.weight_bytes:,} of {self.full_weight_bytes:,}), {self.seconds / self.full_seconds:.0%} of the "
            f"seconds. Log-probabilities of the texts' tokens and of likely ones lie at most {self.gap:.2g} nats "
            f"apart; over all tokens the largest gap is {self.largest_gap:.2g}, the mean {self.mean_gap:.2g}. Behind "
            f"{self.argmax_flips:,} of {self.num_tokens:,} tokens another token is the most probable."
        )


def check_against(lm: LM, full: object) -> None:
    """Raise TypeError or ValueError if `full` cannot be compared with."""
    if not isinstance(full, LM):
        raise TypeError(f"against must be an LM with the full weights, not {type(full).__name__}.")
    sizes = [one.session.evaluator.executor.vocab_size for one in (lm, full)]
    tokenizers = [one.session.private_tokenizer.fingerprint() for one in (lm, full)]
    if sizes[0] != sizes[1] or tokenizers[0] != tokenizers[1]:
        raise ValueError(
            "against must be an LM with the same tokenizer and vocabulary. Load the same model with full weights."
        )


def cost_of(lm: LM, full: LM, reprs: Sequence[ModelRepr]) -> Cost:
    """Compare computed texts with the plain calls of the full weights, and measure both."""
    plain = skeleton.plain_copy(full.session.causal_lm)
    gaps = [gaps_of(model_repr, plain) for model_repr in reprs]
    num_tokens = sum(len(gap.mean) for gap in gaps)
    token_ids = [model_repr.input_ids.tolist() for model_repr in reprs]
    seconds = _seconds((lm, full), token_ids)
    return Cost(
        num_tokens=num_tokens,
        gap=max(float(gap.likely.max()) for gap in gaps),
        largest_gap=max(float(gap.largest.max()) for gap in gaps),
        mean_gap=sum(float(gap.mean.sum()) for gap in gaps) / num_tokens,
        argmax_flips=sum(int(gap.is_flipped.sum()) for gap in gaps),
        weight_bytes=_bytes(lm),
        full_weight_bytes=_bytes(full),
        seconds=seconds[0],
        full_seconds=seconds[1],
    )


def _bytes(lm: LM) -> int:
    return lm.stats.weight_bytes + lm.stats.packed_weight_bytes


def _seconds(lms: Iterable[LM], token_ids: Sequence[Sequence[int]]) -> list[float]:
    """Return the shortest time of each model for all texts, without a store, held results, and the first use."""
    fresh = [_fresh(lm) for lm in lms]
    times: list[list[float]] = [[] for _ in fresh]
    for round_idx in range(ROUNDS + 1):
        for lm, taken in zip(fresh, times, strict=True):
            lm.clear()
            texts = [Text.from_tokens(ids, lm) for ids in token_ids]
            clock = time.process_time if lm.session.evaluator.executor.device.type == "cpu" else time.perf_counter
            started = clock()
            lm.evaluate(texts, show_progress_bar=False)
            if round_idx:  # the first round includes work that is done once for a model
                taken.append(clock() - started)
    return list(map(min, times))


def _fresh(lm: LM) -> LM:
    options = lm.session.options
    return LM(
        lm.session.model,
        lm.session.tokenizer,
        max_tokens_per_forward=options.max_tokens_per_forward,
        beyond_trained_length=options.beyond_trained_length,
        pack_weights=options.pack_weights,
    )
