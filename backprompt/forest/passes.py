"""The spans to forward, their order, and their passes. Pure Python.

All missing spans that the wanted texts need are laid out depth first in one row of tokens, which is cut into passes. In
that order the descendants of a span are one contiguous slice of the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from backprompt.forest.fan import Fan
from backprompt.forest.forest import Forest, depth_first
from backprompt.forest.span import Span

MIN_CUT_TOKENS = 32
"""A span is cut at the end of a pass only if at least this many of its tokens still fit."""

MIN_REST_TOKENS = 16
"""A cut leaves at least this many tokens of a span, unless passes are tiny. A store keeps a shorter rest only together
with completions, and a fan stores none (evaluation/archive.py)."""


def missing_spans(ends: Iterable[Span], *, with_keys_values: bool = False) -> list[Span]:
    """Return the spans to forward so that `ends` hold their states, depth first; each before its children.

    These are the ends and ancestors without states, and the spans whose keys and values are needed but no longer held.
    `with_keys_values`: the ends must hold keys and values, too.

    Texts without common tokens keep the given order. Of several children of one span, the child with the most tokens to
    compute comes first: it joins the causal run of its parent, and the small children lie side by side behind it.
    """
    wanted: dict[Span, None] = {}  # the ends and all their ancestors
    for end in ends:
        if end.is_held(with_keys_values=with_keys_values):
            continue
        stack = [end]
        while stack:
            span = stack.pop()
            if span not in wanted:
                wanted[span] = None
                stack += span.parents
    children: dict[Span, list[Span]] = {}  # the wanted children of spans that have any
    for span in wanted:
        if span.parent is not None:
            children.setdefault(span.parent, []).append(span)
    root = next((span for span in wanted if span.parent is None), None)
    if root is None:
        return []
    num_missing = _num_missing(root, children)

    def largest_first(span: Span) -> Sequence[Span]:
        following = children.get(span, ())
        # With junctions, keep the given order: the spans behind a junction come before the branches of others.
        if span is root or len(following) < 2 or not all(child.token_ids for child in following):
            return following
        return sorted(following, key=num_missing.__getitem__, reverse=True)

    return list(filter(_is_missing, depth_first(root, largest_first)))


def _num_missing(root: Span, children: Mapping[Span, list[Span]]) -> dict[Span, int]:
    """Return, for each span, the number of tokens to compute in the span and its descendants."""
    top_down = [root]
    for span in top_down:
        top_down += children.get(span, ())
    num_missing = {span: len(span.token_ids) if _is_missing(span) else 0 for span in top_down}
    for span in reversed(top_down):
        if span.parent is not None:
            num_missing[span.parent] += num_missing[span]
    return num_missing


def _is_missing(span: Span) -> bool:
    """Return whether a wanted span must be forwarded."""
    return span.parent is not None and not span.is_held(with_keys_values=True)


def on_the_way(ends: Iterable[Span]) -> set[Span]:
    """Return all `ends` and their ancestors."""
    spans: set[Span] = set()
    for end in ends:
        spans.update(end.closure(known=spans))
    return spans


def num_tokens_of(spans: Iterable[Span]) -> int:
    """Return the number of tokens of the spans."""
    return sum(len(span.token_ids) for span in spans)


def last_uses(passes: Sequence[Sequence[Span]]) -> dict[Span, int]:
    """Return, for each span to which a pass attends, the index of the last such pass."""
    last_uses: dict[Span, int] = {}
    for pass_idx, spans in enumerate(passes):
        stack = [parent for span in spans for parent in span.parents]
        while stack:
            ancestor = stack.pop()
            if last_uses.get(ancestor) != pass_idx:
                last_uses[ancestor] = pass_idx
                stack += ancestor.parents
    return last_uses


def is_cut_off(spans: Sequence[Span]) -> bool:
    """Return whether a parent that a pass needs was dropped since the pass was planned."""
    own = set(spans)
    return any(
        parent.parent is not None and not parent.is_held(with_keys_values=True) and parent not in own
        for span in spans
        for parent in span.parents
    )


def cut_into_passes(forest: Forest, spans: Sequence[Span], max_tokens: int) -> list[tuple[Span, ...]]:
    """Group depth-first `spans` into passes of at most `max_tokens` tokens and about equal size.

    A span that does not fit is split in the forest. Splitting changes no result: the second part sees the first part's
    keys like any ancestor's. A fan is never split: a fan that does not fit begins the next pass.
    """
    num_tokens = num_tokens_of(spans)
    num_passes = -(-num_tokens // max_tokens)
    target = -(-num_tokens // num_passes) if num_passes else 0
    num_rest = MIN_REST_TOKENS if max_tokens >= MIN_CUT_TOKENS + MIN_REST_TOKENS else 0
    passes: list[tuple[Span, ...]] = []
    current: list[Span] = []
    num_current = 0
    for span in spans:
        while num_current + len(span.token_ids) > max_tokens:
            room = 0 if isinstance(span, Fan) else min(target - num_current, len(span.token_ids) - num_rest)
            if room >= MIN_CUT_TOKENS or not current:
                current.append(forest.split(span, room))
            passes.append(tuple(current))
            current, num_current = [], 0
        current.append(span)
        num_current += len(span.token_ids)
        if num_current >= target:
            passes.append(tuple(current))
            current, num_current = [], 0
    if current:
        passes.append(tuple(current))
    return passes
