"""The worker that computes each text, and the cost on each worker: the explanations of a call's parts as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from backprompt.engines.layout import Part
from backprompt.inspection.explanation import Actual, Explanation, Named


@dataclass(frozen=True)
class PlacedPart:
    """The texts of one worker, and their cost on it.

    Attributes:
        worker: the number of the worker.
        text_idxs: the indices of its texts.
        explanation: the cost of its texts.

    """

    worker: int
    text_idxs: tuple[int, ...]
    explanation: Explanation


@dataclass(frozen=True)
class PlacedExplanation(Explanation):
    """The cost of evaluating texts with several workers; see `Explanation`.

    Numbers are sums over the workers. A token that two workers compute counts twice, also among `tokens_distinct`.
    Seconds are those of the slowest worker. Missing segments are not listed.

    Attributes:
        parts: the texts of each worker.

    """

    parts: tuple[PlacedPart, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Part], explanations: Sequence[Explanation]) -> PlacedExplanation:
        """Return the explanations of all parts as one."""
        actual = [explained.actual for explained in explanations if explained.actual is not None]
        seconds = [explained.seconds for explained in explanations if explained.seconds is not None]
        saved = [explained.seconds_saved for explained in explanations if explained.seconds_saved is not None]
        is_known = len(seconds) == len(explanations)
        special = {"pass_tokens", "seconds", "seconds_saved", "divergence", "misses", "actual"}
        names = [field.name for field in fields(Explanation) if field.name not in special]
        sums = {name: sum(getattr(explained, name) for explained in explanations) for name in names}
        return cls(
            **sums,
            pass_tokens=tuple(num_tokens for explained in explanations for num_tokens in explained.pass_tokens),
            seconds=max(seconds) if is_known else None,
            seconds_saved=max(saved) if is_known else None,
            divergence=None,
            misses=(),
            actual=_total(actual) if actual else None,
            parts=tuple(
                PlacedPart(part.worker, tuple(part.indices.tolist()), explained)
                for part, explained in zip(parts, explanations, strict=True)
            ),
        )

    def _sentences(self, named: Named) -> list[str]:
        return [*super()._sentences(named), *map(_sentence, self.parts)]


def _sentence(part: PlacedPart) -> str:
    of = part.explanation
    num_held = of.tokens_in_memory + of.tokens_in_host + of.tokens_on_disk
    texts = "1 text" if of.num_texts == 1 else f"{of.num_texts:,} texts"
    return f"Worker {part.worker}: {texts}, {of.tokens_to_compute:,} tokens to compute, {num_held:,} held."


def _total(actual: Sequence[Actual]) -> Actual:
    sums = {field.name: sum(getattr(one, field.name) for one in actual) for field in fields(Actual)}
    return Actual(**{**sums, "seconds": max(one.seconds for one in actual)})
