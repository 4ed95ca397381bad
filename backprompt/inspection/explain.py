"""Explanation of an evaluation, like a database's EXPLAIN: the tokens held, the tokens to compute, and the reasons.

Texts are looked up (evaluation/lookup.py) and planned in a forest of their own, so no span is forwarded or dropped.
With `analyze=True` the texts are evaluated afterwards, and the actual figures stand beside the expected ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import takewhile
from typing import Literal, Protocol, runtime_checkable

from backprompt.arguments import as_bool
from backprompt.bound import one_lm
from backprompt.evaluation.evaluator import Evaluator
from backprompt.evaluation.lookup import where
from backprompt.inspection.explanation import Actual, Divergence, Explanation
from backprompt.inspection.missing import misses, shown_segment
from backprompt.lm import LM
from backprompt.session.stats import Stats
from backprompt.text.checks import listed_texts
from backprompt.text.extents import Extent
from backprompt.text.node import Text
from backprompt.tokens.graph import TokenGraph, TokenIds, common_length, flat


@runtime_checkable
class ExplainsTexts(Protocol):
    """An `LM` that explains the cost of texts in a way of its own."""

    def explained(self, texts: Sequence[Text], *, analyze: bool) -> Explanation:
        """Return the cost of evaluating texts; see `explain`."""


def explain(texts: Text | Iterable[Text], *, analyze: bool = False) -> Explanation:
    """Return the cost of evaluating texts: the tokens held and forwarded, the number of passes, and the reasons.

    No part of the texts is forwarded, loaded or dropped. An `LM` that has evaluated nothing yet checks itself on 12
    tokens, as its first evaluation would do; this check also tells the bytes of a token. The index of a store is read,
    and the store is searched for missing tokens that other models left there.

    Args:
        texts: a text or several of one `LM`.
        analyze: whether to evaluate the texts afterwards and add the actual figures.

    Raises:
        ValueError: there are no texts, or `analyze` is neither True nor False.
        TextTypeError, UnboundTextError: an element is not a text, or has no model.
        MixedModelsError: texts of two different `LM` objects.
        The errors of `evaluate` for texts that cannot be evaluated, also without `analyze`.

    """
    as_bool(analyze, "analyze")
    listed = listed_texts(texts, "explain")
    lm = one_lm(listed)
    lm.check(listed)
    if isinstance(lm, ExplainsTexts):
        return lm.explained(listed, analyze=analyze)
    with lm.session.exclusive():
        explained = _expected(lm, lm.session.current(), listed)
        if not analyze:
            return explained
        before = lm.stats
        lm.evaluate(listed)
        return _with_actual(explained, lm.stats - before, lm.stats.bytes_held)


def _expected(lm: LM, evaluator: Evaluator, texts: Sequence[Text]) -> Explanation:
    """Return the expected cost of evaluating the texts; the lock must be held."""
    encoded = lm.session.encoder.encode(texts)
    extents = lm.session.encoder.extents(texts)
    sketch = evaluator.sketch(encoded)
    num_tokens = {"memory": 0, "host": 0, "disk": 0, "evicted": 0, "absent": 0}
    for span in sketch.forest.spans():
        num_tokens[where(span)] += len(span.token_ids)
    passes = sketch.passes(evaluator.max_tokens_per_forward)
    to_compute = [span for spans in passes for span in spans]
    num_to_compute = sum(len(span.token_ids) for span in to_compute)
    done = lm.stats
    seconds_a_token = done.seconds / done.tokens_computed if done.tokens_computed else None
    num_requested, num_distinct = sum(map(len, encoded)), sum(num_tokens.values())
    return Explanation(
        num_texts=len(texts),
        num_groups=sum(isinstance(token_ids, TokenGraph) for token_ids in encoded),
        tokens_requested=num_requested,
        tokens_distinct=num_distinct,
        tokens_shared=num_requested - num_distinct - _num_shared_special(encoded, extents),
        tokens_in_memory=num_tokens["memory"],
        tokens_in_host=num_tokens["host"],
        tokens_on_disk=num_tokens["disk"],
        tokens_to_compute=num_to_compute,
        tokens_to_recompute=sum(len(span.token_ids) for span in to_compute if span.was_computed),
        pass_tokens=tuple(sum(len(span.token_ids) for span in spans) for spans in passes),
        bytes_needed=num_distinct * evaluator.computation.token_bytes
        + sum(1 for _ in sketch.forest.spans()) * evaluator.executor.snapshot_bytes,
        bytes_held=done.bytes_held,
        budget_bytes=evaluator.memory.max_bytes,
        seconds=None if seconds_a_token is None else seconds_a_token * num_to_compute,
        seconds_saved=None if seconds_a_token is None else seconds_a_token * (num_requested - num_to_compute),
        divergence=_divergence(encoded, extents),
        misses=tuple(misses(evaluator, encoded, extents)),
    )


def _num_shared_special(encoded: Sequence[TokenIds], extents: Sequence[Sequence[Extent]]) -> int:
    """Return the number of special tokens at the beginning of texts that other texts have, too."""
    beginnings = [
        flat(token_ids)[: own[0].num_special if own else len(token_ids)]
        for token_ids, own in zip(encoded, extents, strict=True)
    ]
    distinct = {ids[:stop] for ids in beginnings for stop in range(1, len(ids) + 1)}
    return sum(map(len, beginnings)) - len(distinct)


def _with_actual(explained: Explanation, done: Stats, bytes_held: int) -> Explanation:
    figures = {f.name: getattr(done, f.name) for f in fields(Actual) if f.name != "bytes_held"}
    return Explanation(
        **{f.name: getattr(explained, f.name) for f in fields(Explanation) if f.name != "actual"},
        actual=Actual(**figures, bytes_held=bytes_held),
    )


def _divergence(encoded: Sequence[TokenIds], extents: Sequence[Sequence[Extent]]) -> Divergence | None:
    if any(isinstance(token_ids, TokenGraph) for token_ids in encoded):
        return None
    first = flat(encoded[0])
    token_idx, text_idx = len(first), 0
    for idx, token_ids in enumerate(encoded):
        num_common = common_length(first[:token_idx], flat(token_ids), 0)
        is_longer = not text_idx and len(token_ids) > num_common  # the first text is its beginning
        if num_common < token_idx or is_longer:
            token_idx, text_idx = num_common, idx
    if text_idx == 0:
        return None
    ours, others = extents[0], extents[text_idx]
    pairs = zip(ours, others, strict=False)
    num_common = sum(1 for _ in takewhile(lambda pair: pair[0].segment == pair[1].segment, pairs))
    behind = [own[num_common] for own in (ours, others) if num_common < len(own)]
    cause: Literal["token", "join", "end"] = "token"
    if any(extent.start <= token_idx < extent.start + len(extent.replaced) for extent in behind):
        cause = "join"
    elif token_idx in (len(first), len(encoded[text_idx])):
        cause = "end"
    segment_idx = next((idx for idx, extent in enumerate(others) if token_idx < extent.stop), len(others) - 1)
    segment = others[segment_idx].segment if others else ""  # a text of special tokens only
    return Divergence(text_idx, max(0, segment_idx), shown_segment(segment), token_idx, cause)
