"""The forest of token spans (span.py): inserting texts, splitting spans, forgetting spans. Pure Python, no tensors.

The forest keeps three things: the root from which all spans are found, the number of the latest evaluation, and whether
a change of several steps was interrupted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager

from backprompt.forest.fan import Fan, Shape
from backprompt.forest.span import (
    FAN,
    KINDS,
    NO_CHILDREN,
    POOLS,
    BranchEnd,
    Inserted,
    Junction,
    JunctionKey,
    Kind,
    Pool,
    Rows,
    Span,
    child_key,
    pass_on_history,
)
from backprompt.tokens.graph import TokenGraph, TokenIds, common_length, fold


class Forest:
    """All spans, under one empty root.

    Args:
        on_unfold: called with each fan that unfolds, and with the spans that take its place.

    Attributes:
        root: the empty span behind which texts begin.
        evaluation: the number of the latest evaluation, counted from 1.
        is_whole: False during a change of several steps, and permanently after an error has interrupted such a change:
            then the forest cannot be trusted, and must be cleared with `clear`.
        next_step: data of the last step of a generation for the next one (evaluation/steps.py). The data refers to
            blocks of rows, so `clear` drops it.

    """

    def __init__(self, on_unfold: Callable[[Fan, Sequence[Span]], None] = lambda fan, spans: None) -> None:
        self.root = Span((), 0, None)
        self._on_unfold = on_unfold
        self.evaluation = 0
        self.is_whole = True
        self.next_step: object = None
        self._is_stamped = True  # whether `evaluation` was used

    def begin_evaluation(self) -> None:
        """Begin a new evaluation. If the latest one has neither computed nor loaded a token, it continues instead.

        So an evaluation is counted once, even if several parts of it call this method.
        """
        if self._is_stamped:
            self.evaluation += 1
            self._is_stamped = False

    def stamp(self) -> int:
        """Return the number of the current evaluation, for a span that it computes or loads."""
        self._is_stamped = True
        return self.evaluation

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark a change of several steps: an error inside leaves the forest not whole.

        An error such as Ctrl-C may come at any line. All code that changes the places, tokens or rows of spans in more
        than one step runs inside this context, and as little other code as possible. At each moment all spans that hold
        data are found from the root, so that `clear` reaches them.
        """
        self.is_whole = False
        yield
        self.is_whole = True

    def insert(self, token_ids: TokenIds | Sequence[int], *, is_end: bool = True) -> Span:
        """Return the span that ends exactly where `token_ids` end, splitting and adding spans as needed.

        If the token ids end in a group, the span is a junction. With `is_end` False, a child may absorb the span later;
        the caller must drop its reference before.
        """
        if isinstance(token_ids, TokenGraph):
            end, _ = fold(token_ids, self.root, self.extend, self._join)
        else:
            end = self.extend(self.root, 0, tuple(token_ids))
        end.is_end |= is_end
        return end

    def in_order(self, text: Inserted) -> list[Span]:
        """Return the spans of a text in written order, a repeated branch repeatedly; junctions are left out."""
        if not isinstance(text.token_ids, TokenGraph):
            return text.end.path()
        spans: list[Span] = []

        def continue_(span: Span, position: int, ids: tuple[int, ...]) -> Span:
            end = self.extend(span, position, ids)  # adds no span: the text was inserted
            chain, above = [], end
            while above is not span:
                assert above.parent is not None
                chain.append(above)
                above = above.parent
            spans.extend(reversed(chain))
            return end

        fold(text.token_ids, self.root, continue_, self._join)
        return spans

    def extend(self, span: Span, position: int, ids: tuple[int, ...]) -> Span:
        """Return the span that ends where `ids` end; they follow `span`, and the first of them is at `position`."""
        num_matched = 0
        while num_matched < len(ids):
            if FAN in span.children:
                self.unfold(span)
            key = child_key(span, position + num_matched, ids[num_matched])
            child = span.children.get(key)
            if child is None:
                child = Span(ids[num_matched:], position + num_matched, span)
                span.add_child(key, child)
                return child
            num_common = common_length(child.token_ids, ids, num_matched)
            if num_common < len(child.token_ids):
                child = self.split(child, num_common)
            span, num_matched = child, num_matched + num_common
        return span

    def _join(self, before: Span, ends: Sequence[BranchEnd], position: int) -> Span:
        """Return the junction behind branches that end at `ends`, each frozen or not."""
        branches = Counter(ends)
        for end, _ in ends:
            end.is_end = True
        self.unfold(before)
        junction = before.junction(ends)
        if junction is None:
            junction = Junction(position, before, branches)
            before.add_child(JunctionKey.of(ends), junction)
        return junction

    def num_computed(self, token_ids: Sequence[int]) -> int:
        """Return the length of the longest beginning of `token_ids` whose keys and values are held.

        No span is split, but fans on the way unfold.
        """
        ids = tuple(token_ids)
        span, num_matched = self.root, 0
        while num_matched < len(ids):
            if FAN in span.children:
                self.unfold(span)
            child = span.children.get(ids[num_matched])
            if child is None or not child.is_held(with_keys_values=True):
                break
            num_common = common_length(child.token_ids, ids, num_matched)
            num_matched += num_common
            if num_common < len(child.token_ids):
                break
            span = child
        return num_matched

    def fan(self, end: Span, shape: Shape) -> Fan | None:
        """Return the fan of a shape behind a text; None if other spans or another fan are behind the text.

        If there are no spans behind the text, the fan is added.
        """
        fan = end.children.get(FAN)
        if isinstance(fan, Fan):
            return fan if fan.shape.completions == shape.completions else None
        if end.children:
            return None
        fan = Fan(shape, end)
        end.add_child(FAN, fan)
        return fan

    def unfold(self, parent: Span) -> None:
        """Replace the fan behind a span, if there is one, by ordinary spans with the same rows; no row is copied."""
        fan = parent.children.get(FAN)
        if not isinstance(fan, Fan):
            return
        spans = fan.unfolded()
        places: list[tuple[Span, Kind, Pool, Rows]] = []
        for kind, pool in itertools.product(KINDS, POOLS):
            rest = fan.rows_in(kind, pool)
            for span in spans if rest is not None else ():
                assert rest is not None
                own, rest = rest.split(len(span.token_ids))
                places.append((span, kind, pool, own))
        with self.changing():
            for span in spans:
                assert span.parent is not None
                assert span.token_ids[0] not in span.parent.children, "a fan is an only child"
                span.parent.add_child(span.token_ids[0], span)
            for span, kind, pool, rows in places:  # each after its parents, and its states first
                span.move(kind, rows, pool)
            self._on_unfold(fan, spans)
            parent.remove_child(FAN)
            fan.drop()

    def unfold_all(self) -> None:
        """Unfold all fans."""
        for span in list(self.spans()):
            self.unfold(span)

    def split(self, span: Span, num_tokens: int) -> Span:
        """Cut `span` after `num_tokens` tokens and return the new upper part; `span` itself becomes the lower part."""
        assert span.parent is not None and 0 < num_tokens < len(span.token_ids), (span, num_tokens)
        upper = Span(tuple(span.token_ids[:num_tokens]), span.position, span.parent)
        pass_on_history(span, upper)
        upper.add_child(span.token_ids[num_tokens], span)
        with self.changing():
            span.parent.add_child(child_key(span.parent, span.position, span.token_ids[0]), upper)
            span.token_ids = span.token_ids[num_tokens:]
            span.position += num_tokens
            span.parent = upper
            span.give(upper, num_tokens)
        return upper

    def absorb(self, chain: Sequence[Span], keys_values: Rows, states: Rows) -> None:
        """Extend the last span of a chain to the start of the chain, and remove the others; the opposite of `split`.

        Args:
            chain: spans that continue each other, the last of which absorbs the others; these have no other children.
            keys_values, states: the new places of its keys and values and of its states.

        """
        first, span = chain[0], chain[-1]
        assert first.parent is not None and all(len(upper.children) == 1 for upper in chain[:-1]), chain
        with self.changing():
            for upper in chain[:-1]:
                upper.drop()
            first.parent.add_child(child_key(first.parent, first.position, first.token_ids[0]), span)
            span.token_ids = tuple(token_id for part in chain for token_id in part.token_ids)
            span.position = first.position
            span.follow(first.parent)
            span.place(keys_values=keys_values, states=states)

    def discard(self, span: Span, held: Container[Span]) -> Span:
        """Remove a span without children at which no text ends, then its ancestors up to the first span that stays.

        A span stays if it has children, is among `held`, or ends a text. A span may be discarded more than once.
        Returns the first span that stays.
        """
        while span.token_ids and span.parent is not None and not (span.children or span in held or span.is_end):
            parent = span.parent
            key = child_key(parent, span.position, span.token_ids[0])
            if parent.children.get(key) is not span:
                return span
            with self.changing():
                span.drop()
                parent.remove_child(key)
            span = parent
        return span

    def prune(self, max_spans: int = 0, max_tokens: int = 0) -> None:
        """Remove spans without rows, until at most `max_spans` of them, with at most `max_tokens` tokens, are left.

        All spans that were never computed are removed. Of the others, the least recently used are removed first. A span
        is removed after its children.
        """
        spans = list(self.spans())
        last_used = {span: span.last_used if span.was_computed else -1 for span in spans if span.is_empty}
        for span in reversed(spans):  # each before its parents
            if span in last_used:
                for parent in span.parents:
                    if parent in last_used:
                        last_used[parent] = max(last_used[parent], last_used[span])
        latest_first = sorted(last_used, key=last_used.__getitem__, reverse=True)  # among equals, parents come first
        remembered = list(itertools.takewhile(lambda span: last_used[span] >= 0, latest_first))
        num_tokens = itertools.accumulate(len(span.token_ids) for span in remembered)
        num_kept = sum(total <= max_tokens for total in itertools.islice(num_tokens, max_spans))
        gone = set(latest_first[num_kept:])
        for left in {span.parent for span in gone if span.parent is not None} - gone:
            left.children = {key: child for key, child in left.children.items() if child not in gone}
        for span in gone:
            span.children = NO_CHILDREN  # else the cycle of parents and children would be freed late

    def clear(self) -> None:
        """Drop the data of every span and remove all spans from the root; the forest is whole again."""
        self.next_step = None
        with self.changing():
            stack = [self.root]  # `spans` reads more than children, and this data may be incomplete
            while stack:
                span = stack.pop()
                stack += span.children.values()
                span.drop()
            self.root.children = NO_CHILDREN

    def spans(self) -> Iterator[Span]:
        """Yield every span below the root depth first, each before its children."""
        spans = depth_first(self.root, lambda span: span.children.values())
        next(spans)
        return spans

    def held_spans(self) -> Iterator[Span]:
        """Yield the spans with rows in either pool, in the order of `spans`.

        All ancestors of such a span have rows, so the search stops at a span without rows.
        """
        spans = depth_first(self.root, lambda span: (child for child in span.children.values() if not child.is_empty))
        next(spans)
        return spans

    def count_empty(self) -> tuple[int, int]:
        """Return the number of spans without rows, and the number of their tokens."""
        num_spans = num_tokens = 0
        stack = [self.root]
        while stack:
            for child in stack.pop().children.values():
                if child.children:
                    stack.append(child)
                if child.is_empty:
                    num_spans += 1
                    num_tokens += len(child.token_ids)
        return num_spans, num_tokens


def depth_first(root: Span, continuations: Callable[[Span], Iterable[Span]]) -> Iterator[Span]:
    """Yield spans from the root on, each after its parents.

    Parents of a junction that were not reached before are moved forward, right before the junction.

    Args:
        root: the first span.
        continuations: the children of a span to visit, in order; all parents of each child must be visited, too.

    """
    done: set[Span] = set()
    stack = [root]
    while stack:
        span = stack.pop()
        if span in done:
            continue  # already moved forward
        if isinstance(span, Junction) and not done.issuperset(span.parents):
            stack += reversed(span.closure(known=done))  # the junction comes last
            continue
        done.add(span)
        yield span
        stack += reversed(list(continuations(span)))
