"""Comparison with the plain call: the distance of computed results from those of the model itself, by segment.

The plain call runs a private copy of the model in transformers: one text per call, in eval mode, without a cache.
"""

from __future__ import annotations

import html
import math
import random
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from backprompt.arguments import as_bool, as_int, as_number
from backprompt.bound import one_lm
from backprompt.errors import DriftError, GroupError
from backprompt.inspection.costs import Cost, check_against, cost_of
from backprompt.inspection.explanation import BY_INDEX, Named
from backprompt.inspection.gaps import Gaps, gaps_of
from backprompt.inspection.missing import shown_segment
from backprompt.model import skeleton
from backprompt.model.quantized import compared_as, multiplies_in_tf32
from backprompt.progress import Bar, check_show, is_wanted
from backprompt.session.representation import check_current
from backprompt.text.checks import listed_texts
from backprompt.text.extents import Extent
from backprompt.text.node import Text
from backprompt.text.segments import Adapted, Group
from backprompt.visible import beginning

if TYPE_CHECKING:
    from backprompt.lm import LM

MIN_TEXTS_FOR_A_BAR = 5

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""The largest gap that passes, nats, at tokens that matter; measured: docs/design/exactness.md.

In float64 many models still take their softmax in float32.
"""

MAX_SHOWN = 8
"""The printed account names at most this many segments, those with the largest gaps first."""


@dataclass(frozen=True)
class NodeDrift:
    """The distance of the distributions behind a segment's tokens from those of the plain call.

    Attributes:
        text_idx: the idx of the first given text that has the segment.
        segment_idx: its place among the strings and runs of token ids of that text, in written order.
        segment: its contents, without the middle if they are long.
        start, stop: its tokens in `text.tokens`.
        num_texts: the number of texts in which it was compared; the figures are over all of them.
        gap: the largest absolute difference of log-probabilities, nats, over the segment's own tokens and the likely
            tokens behind each of them: the most probable one, and all with a probability of at least 0.001.
        largest_gap, mean_gap: the largest and the mean difference over all tokens of the vocabulary.
        argmax_flips: the number of its tokens behind which the most probable tokens differ.

    """

    text_idx: int
    segment_idx: int
    segment: str
    start: int
    stop: int
    num_texts: int
    gap: float
    largest_gap: float
    mean_gap: float
    argmax_flips: int


@dataclass(frozen=True)
class Verification:
    """The distance of texts from the model's plain call; `str()` and notebooks show sentences and a table.

    Attributes:
        num_texts: the number of texts that were compared.
        num_given: the number of texts that were given; texts beyond the sample were not compared.
        num_groups: the number of given texts with groups, frozen segments or adapters by segment, left out because no
            plain call computes them.
        num_tokens: tokens of the texts that were compared; shared tokens count in each text.
        gap: the largest absolute difference of log-probabilities at tokens that matter, nats; see `NodeDrift`. Infinite
            if one is not a number.
        largest_gap, mean_gap: the largest and the mean difference over all tokens.
        argmax_flips: the number of tokens behind which the most probable tokens differ.
        dtype: the dtype that the model computes in, such as "torch.float32".
        tolerance: the largest `gap` that passes, nats.
        tf32: whether torch multiplies float32 matrices in TF32 on the model's device, so that the plain call itself is
            inexact.
        stored_error: the largest relative error of results read back from a store in fewer bits; 0 without any.
        is_coarse: whether layers round their inputs to 8 bits or compute in 16, so that the plain call itself depends
            on the last bit; the default tolerance is then that of bfloat16.
        cost: the cost of fewer bits, if `against` was given; else None.
        nodes: each segment, in the order of the texts; shared segments once.

    """

    num_texts: int
    num_given: int
    num_groups: int
    num_tokens: int
    gap: float
    largest_gap: float
    mean_gap: float
    argmax_flips: int
    dtype: str
    tolerance: float
    tf32: bool
    stored_error: float
    is_coarse: bool
    cost: Cost | None
    nodes: tuple[NodeDrift, ...]

    @property
    def passed(self) -> bool:
        """Whether the gap at tokens that matter is within the tolerance."""
        return self.gap <= self.tolerance

    @property
    def worst(self) -> NodeDrift:
        """The segment with the largest gap at tokens that matter."""
        return max(self.nodes, key=lambda node: node.gap)

    @property
    def advice(self) -> str:
        """Advice about a gap that is too large."""
        if self._is_due_to_tf32:
            return _TF32
        if self.is_coarse:
            return _COARSE
        return (
            "If weights were changed in place, call lm.refresh(). Otherwise backprompt has a bug, or the model "
            "mixes tokens outside attention."
        )

    @property
    def _is_due_to_tf32(self) -> bool:
        return self.tf32 and self.gap > TOLERANCE[torch.float32]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as dicts, lists, strings and numbers, such as JSON takes; None for infinity."""
        figures = {**asdict(self), "nodes": [_finite(asdict(node)) for node in self.nodes], "passed": self.passed}
        return _finite(figures)

    def __str__(self) -> str:
        return self.in_lines()

    def in_lines(self, named: Named = BY_INDEX, width: int = 80) -> str:
        """Return the sentences and the table in lines of at most `width` characters; `named` names texts by index."""
        rows = [_SHORT_HEAD, *self._rows(named)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
        widths[0] = min(widths[0], width - sum(widths[1:]) - 2 * len(widths[1:]))
        table = (
            "  ".join([beginning(row[0], widths[0]).ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        )
        return "\n".join([*(textwrap.fill(sentence, width) for sentence in self._sentences()), "", *table])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _HEAD)
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self._rows())
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        sentences = "<br>".join(html.escape(sentence) for sentence in self._sentences())
        return f"<p>{sentences}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _sentences(self) -> Iterator[str]:
        verdict = "The same as the plain call" if self.passed else "NOT the same as the plain call"
        yield (
            f"{verdict}: log-probabilities of the texts' tokens and of likely ones lie at most {self.gap:.2g} nats "
            f"apart, and {self.tolerance:.2g} are tolerated in {self.dtype}."
        )
        yield (
            f"Over all tokens, however improbable, the largest gap is {self.largest_gap:.2g} nats, the mean "
            f"{self.mean_gap:.2g}."
        )
        yield (
            f"Compared: {self.num_texts:,} of {self.num_given:,} texts, {self.num_tokens:,} tokens. The most "
            f"probable next token differs at {self.argmax_flips:,} of them."
        )
        if self._is_due_to_tf32:
            yield _TF32
        if self.num_groups:
            yield (
                f"Left out: {self.num_groups:,} texts with groups, frozen segments or adapters by segment, which no "
                "plain call computes."
            )
        if self.is_coarse and not self.passed:
            yield _COARSE
        if self.cost is not None:
            yield str(self.cost)
        if self.stored_error:
            yield f"Some results came from a store in fewer bits, with a relative error of {self.stored_error:.2g}."

    def _rows(self, named: Named = BY_INDEX) -> list[tuple[str, ...]]:
        """Return a row for each of the segments with the largest gaps."""
        worst = sorted(self.nodes, key=lambda node: node.gap, reverse=True)[:MAX_SHOWN]
        return [
            (
                f"{named(node.text_idx)}, segment {node.segment_idx} {node.segment}",
                f"{node.stop - node.start:,}",
                f"{node.gap:.2g}",
                f"{node.largest_gap:.2g}",
                f"{node.mean_gap:.2g}",
                f"{node.argmax_flips:,}",
            )
            for node in worst
        ]


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: None if figure == math.inf else figure for name, figure in figures.items()}


_TF32 = (
    "torch multiplies float32 matrices in TF32, with 11 bits of each factor, so the plain call itself may be as far "
    'from exact numbers. Verify with torch.set_float32_matmul_precision("highest").'
)

_COARSE = (
    "Layers of the model round their inputs to fewer bits, so a difference in the last bit may round to other "
    "numbers. Plain calls of other lengths differ, too. If this matters, quantize only the weights."
)

_HEAD = ("segment", "tokens", "gap", "largest gap", "mean gap", "argmax flips")
_SHORT_HEAD = ("segment", "tokens", "gap", "largest", "mean", "flips")


def verify(
    texts: Text | Iterable[Text],
    *,
    sample: int | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    against: LM | None = None,
    raise_on_drift: bool = False,
    show_progress_bar: bool | None = None,
) -> Verification:
    """Evaluate texts, compare all their log-probabilities with the plain call's, and return the gaps.

    The plain call forwards every token of every text compared, one text per call. Texts with groups, frozen segments or
    adapters by segment are left out, as no plain call computes them; the result counts them.

    Args:
        texts: a text or several of one `LM`.
        sample: the number of texts to compare, drawn at random; by default all.
        seed: the seed of the random choice; the same seed chooses the same texts.
        tolerance: the largest gap in log-probability that passes, nats, among the texts' own tokens and tokens with a
            probability of at least 0.001. The default depends on the dtype: 1e-5 in float64, 0.001 in float32, 0.1 in
            float16, and 0.5 in bfloat16.
        against: an `LM` with the full weights of the same model, to measure the cost of fewer bits:
            `Verification.cost`. The tolerance applies only to the distance from the model's own plain call, so fewer
            bits are not drift.
        raise_on_drift: raise if a gap is larger.
        show_progress_bar: whether to show a bar; by default only on a terminal, for at least 5 compared texts.

    Raises:
        DriftError: with `raise_on_drift`: a gap is larger than the tolerance; the message names the segment.
        TypeError: `tolerance` is not a number, or `against` is not an `LM`.
        ValueError: there are no texts; `sample` is not an int of at least 1, or `seed` not one of at least 0;
            `tolerance` is negative, infinite, or missing for a dtype without a default; another argument is neither
            True nor False; `against` has another tokenizer or vocabulary.
        GroupError: all of the texts have groups, frozen segments or adapters by segment.
        TextTypeError, UnboundTextError: an element is not a text, or has no model.
        MixedModelsError: texts of two different `LM` objects.
        The errors of `evaluate`.

    """
    given = listed_texts(texts, "verify")
    lm = one_lm(given)
    if sample is not None:
        sample = as_int(sample, "sample", at_least=1)
    if tolerance is not None:
        tolerance = as_number(tolerance, "tolerance", bounds=(0, math.inf))
    seed = as_int(seed, "seed", at_least=0)
    as_bool(raise_on_drift, "raise_on_drift")
    check_show(show_progress_bar)
    indices = [
        idx for idx, text in enumerate(given) if not any(isinstance(part, (Group, Adapted)) for part in text.segments)
    ]
    if not indices:
        raise GroupError(
            "verify compares with plain calls, which cannot compute groups, frozen segments or adapters by "
            f"segment, and all of the {len(given)} texts have some. Verify texts without them: their segments are "
            "computed by the same passes."
        )
    num_groups = len(given) - len(indices)
    if sample is not None and sample < len(indices):
        indices = sorted(random.Random(seed).sample(indices, sample))
    lm.check(given[idx] for idx in indices)
    if against is not None:
        check_against(lm, against)
    is_shown = is_wanted(show_progress_bar, is_long=len(indices) >= MIN_TEXTS_FOR_A_BAR)
    with Bar(total=len(indices), desc="plain calls", disable=not is_shown) as bar:
        verification = _compare(lm, given, indices, tolerance, num_groups, bar, against)
    if raise_on_drift and not verification.passed:
        node = verification.worst
        raise DriftError(
            f"Log-probabilities lie {verification.gap:.2g} nats from the plain call's, more than the "
            f"{verification.tolerance:.2g} tolerated in {verification.dtype}: behind texts[{node.text_idx}], segment "
            f"{node.segment_idx} ({node.segment}). {verification.advice}"
        )
    return verification


def _compare(
    lm: LM,
    given: Sequence[Text],
    indices: Sequence[int],
    tolerance: float | None,
    num_groups: int,
    bar: Any,
    against: LM | None,
) -> Verification:
    texts = [given[idx] for idx in indices]
    drifts = _Drifts()
    with lm.session.exclusive():
        reprs = lm.evaluate(texts)
        plain = skeleton.plain_copy(skeleton.unwrap(lm.session.model))
        dtype = skeleton.computed_dtype(plain)
        if tolerance is None:
            if dtype not in TOLERANCE:
                raise ValueError(
                    f"There is no default tolerance for {dtype}. Give one: verify(texts, tolerance=...), in nats."
                )
            tolerance = TOLERANCE[compared_as(plain, dtype)]
        is_coarse = compared_as(plain, dtype) != dtype
        for idx, text, model_repr, extents in zip(indices, texts, reprs, lm.extents(texts), strict=True):
            drifts.add(idx, text, extents, gaps_of(model_repr, plain))
            bar.update()
        check_current(reprs[0])  # weights that changed meanwhile are not drift
        stored_error = max(model_repr.stored_error for model_repr in reprs)
        cost = None if against is None else cost_of(lm, against, reprs)
    nodes = drifts.nodes()
    num_tokens = sum(gaps.num_rows for gaps in drifts.by_key.values())
    return Verification(
        num_texts=len(texts),
        num_given=len(given),
        num_groups=num_groups,
        num_tokens=num_tokens,
        gap=max(node.gap for node in nodes),
        largest_gap=max(node.largest_gap for node in nodes),
        mean_gap=sum(sums.sum_of_means for sums in drifts.by_key.values()) / num_tokens,
        argmax_flips=sum(node.argmax_flips for node in nodes),
        dtype=str(dtype),
        tolerance=tolerance,
        tf32=multiplies_in_tf32(lm.session.evaluator.executor.device, dtype),
        stored_error=stored_error,
        is_coarse=is_coarse,
        cost=cost,
        nodes=nodes,
    )


@dataclass
class _Sums:
    """The figures of a segment so far."""

    text_idx: int
    segment_idx: int
    extent: Extent
    num_texts: int = 0
    num_rows: int = 0
    likely: float = 0.0
    largest: float = 0.0
    sum_of_means: float = 0.0
    num_flips: int = 0


class _Drifts:
    """Gaps by segment; segments that texts share are one."""

    def __init__(self) -> None:
        self.by_key: dict[tuple[Any, ...], _Sums] = {}

    def add(self, text_idx: int, text: Text, extents: Sequence[Extent], gaps: Gaps) -> None:
        token_ids = text.tokens
        for segment_idx, extent in enumerate(extents or [Extent("", 0, len(token_ids))]):  # special tokens only
            if extent.start == extent.stop:
                continue
            key = (extent.segment, extent.start, token_ids[: extent.stop])
            sums = self.by_key.setdefault(key, _Sums(text_idx, segment_idx, extent))
            rows = slice(extent.start, extent.stop)
            sums.num_texts += 1
            sums.num_rows += extent.stop - extent.start
            sums.likely = max(sums.likely, float(gaps.likely[rows].max()))
            sums.largest = max(sums.largest, float(gaps.largest[rows].max()))
            sums.sum_of_means += float(gaps.mean[rows].sum())
            sums.num_flips += int(gaps.is_flipped[rows].sum())

    def nodes(self) -> tuple[NodeDrift, ...]:
        return tuple(
            NodeDrift(
                text_idx=sums.text_idx,
                segment_idx=sums.segment_idx,
                segment=shown_segment(sums.extent.segment),
                start=sums.extent.start,
                stop=sums.extent.stop,
                num_texts=sums.num_texts,
                gap=sums.likely,
                largest_gap=sums.largest,
                mean_gap=sums.sum_of_means / sums.num_rows,
                argmax_flips=sums.num_flips,
            )
            for sums in self.by_key.values()
        )
