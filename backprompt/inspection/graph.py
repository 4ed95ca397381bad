"""The graph of texts: their segments, merged where texts share them, for networkx and for pictures.

A segment is one node for all texts in which it follows the same segments. Branches of a group stand side by side
between the node before the group and a *junction*, a node without tokens at the end of the group.

    context + (a | b) + question        context --+-- a --+-- (junction) -- question
                                                  +-- b --+

Two tokens are the same if they and all tokens before them are equal, as in an evaluation. Each distinct token is
counted at one node: the first node that has it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import networkx as nx

from backprompt.bound import as_lm
from backprompt.evaluation.lookup import Sketch, where
from backprompt.forest.forest import Forest
from backprompt.forest.passes import missing_spans
from backprompt.forest.span import Inserted, Span
from backprompt.generation.continued import GeneratedText
from backprompt.lm import LM
from backprompt.text.checks import as_texts
from backprompt.text.extents import Extent
from backprompt.text.node import Text
from backprompt.text.segments import Adapted, Group, Leaf, Segment, bare, leaves
from backprompt.tokens.adapted import plain
from backprompt.tokens.graph import flat

Kind: TypeAlias = Literal["string", "token ids", "special tokens", "junction"]

Status: TypeAlias = Literal["computed now", "reused from memory", "from disk", "evicted", "not evaluated", "no model"]
STATUSES: tuple[Status, ...] = (
    "computed now",
    "reused from memory",
    "from disk",
    "evicted",
    "not evaluated",
    "no model",
)


def to_networkx(texts: Text | Iterable[Text]) -> nx.DiGraph:
    """Return the graph of texts; nothing is computed, loaded or dropped.

    Nodes are numbered from 0 in the order in which an evaluation of all the texts would forward them, and every edge
    goes to a higher number. Nodes have these attributes:

    - `kind`: "string", "token ids", "special tokens" (those before a group) or "junction" (the end of a group);
    - `string`, `segment`: the string that the node adds to a text, and the segment itself;
    - `adapter`: the name of the segment's own adapter, "" for `with_adapter(None)`, None if it has none of its own;
    - `token_ids`, `num_tokens`: its tokens in the first text that has it; a token across a join belongs to the segment
      behind the join;
    - `num_own_tokens`: the number of distinct tokens counted here; an evaluation of all texts computes their sum;
    - `num_bytes`: the bytes of these distinct tokens when held; None before the `LM` has computed anything;
    - `position`: the position of its first token; None without a model;
    - `status`: "computed now" (by the latest evaluation), "reused from memory", "from disk", "evicted", "not evaluated"
      or "no model"; if there are several, the one with the most tokens; None for a junction. `statuses` counts own
      tokens by status;
    - `is_join_changed`: whether joining the segment to the text before it changed tokens;
    - `is_frozen`: whether the node begins a branch that sees nothing before it;
    - `behind`: for a junction the node before its group, or None;
    - `generated`: the reasons for the end of generated texts that end here ("eos", "length" ...);
    - `ends`: the indices of the texts that end here; `num_texts`: the number of texts that pass through;
    - `written_order`: the place of the node in the texts as given.

    The graph has `num_texts` and `num_tokens`, of all strings together. Edges have `times`, the number of a group's
    branches that end with this edge, and `is_join_changed`.

    Args:
        texts: a text or several, of one `LM`, of several, or of none.

    Raises:
        TextTypeError: an element is not a `Text`, or `texts` cannot be iterated.
        JoinError, TokenizerError: a text that cannot be encoded.

    """
    return graph_of(as_texts(texts, "to_networkx"))


def graph_of(listed: Sequence[Text]) -> nx.DiGraph:
    """Return the graph of texts; see `to_networkx`."""
    by_lm: dict[LM | None, list[int]] = {}
    for idx, text in enumerate(listed):
        by_lm.setdefault(None if text.lm is None else as_lm(text.lm), []).append(idx)
    nodes: list[_Node] = []
    num_tokens = 0
    for lm, indices in by_lm.items():
        merged = _Merged()
        if lm is None:
            for idx in indices:
                merged.add(listed[idx], idx, None)
        else:
            num_tokens += _add_encoded(merged, lm, {idx: listed[idx] for idx in indices})
        nodes += merged.in_order(len(nodes))
    return _as_networkx(nodes, listed, num_tokens)


@dataclass(eq=False)
class _Node:
    """A segment behind certain other segments, or a junction, while the graph is built."""

    kind: Kind
    segment: Segment | None
    string: str
    parents: dict[_Node, int] = field(default_factory=dict)  # the number of branches that end there
    behind: _Node | None = None
    token_ids: tuple[int, ...] = ()
    position: int | None = None
    order: int = -1
    written_order: int = 0
    num_own_tokens: int = 0
    num_bytes: int | None = None
    statuses: Counter[Status] = field(default_factory=Counter)
    status: Status | None = None
    is_join_changed: bool = False
    is_frozen: bool = False
    ends: list[int] = field(default_factory=list)
    num_texts: int = 0


@dataclass(frozen=True)
class _Encoding:
    """The encoding of a text by its model."""

    token_ids: tuple[int, ...]
    extents: Sequence[Extent]
    decode: Any


@dataclass(frozen=True)
class _Use:
    """A node in a text, and the index in the text behind the node's last token."""

    node: _Node
    stop: int


class _Merged:
    """The nodes of texts of one model, merged one text after the other."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], _Node] = {}

    def add(self, text: Text, text_idx: int, encoding: _Encoding | None) -> list[_Use]:
        """Merge a text in, and return its nodes in written order."""
        walk = _Walk(self._found, encoding)
        end, _ = walk.through(text.segments, None, 0)
        end = walk.special_tokens_left(end)
        if end is not None:
            end.ends.append(text_idx)
        for node in walk.visited:
            node.num_texts += 1
        return walk.uses

    def in_order(self, num_before: int) -> list[_Node]:
        """Return the nodes in the order of forwarding; nodes without a place in that order take that of their parents.

        `num_before`: the number of nodes of other texts.
        """
        graph = nx.DiGraph()
        for written_order, node in enumerate(self._found.values()):
            node.written_order = num_before + written_order
            graph.add_node(node)
            graph.add_edges_from((parent, node) for parent in node.parents)
            if node.order < 0:
                node.order = max((parent.order for parent in node.parents), default=-1)
        return list(nx.lexicographical_topological_sort(graph, key=lambda node: (node.order, node.written_order)))


class _Walk:
    """The walk of one text through the nodes; adds missing nodes."""

    def __init__(self, found: dict[tuple[Any, ...], _Node], encoding: _Encoding | None) -> None:
        self.uses: list[_Use] = []
        self.visited: dict[_Node, None] = {}
        self._found = found
        self._encoding = encoding
        self._extents = iter(()) if encoding is None else iter(encoding.extents)
        self._next_extent: Extent | None = next(self._extents, None)
        self._num_tokens = 0  # passed so far

    def through(
        self, segments: Sequence[Segment], before: _Node | None, position: int, extra: tuple[Any, ...] = ()
    ) -> tuple[_Node | None, int]:
        """Walk through segments behind a node; return the last node, and the position behind it."""
        for idx, segment in enumerate(segments):
            if isinstance(segment, Group):
                if idx == 0 and not segment.branches[0].is_frozen:
                    before, position = self._special_tokens(before, position, extra)
                before, position = self._group(segment, before, position)
            else:
                before, position = self._leaf(segment, before, position, extra)
            extra = ()
        return before, position

    def special_tokens_left(self, before: _Node | None) -> _Node | None:
        """Return the node at the end: a text without segments may still have special tokens."""
        if self._encoding is not None and self._num_tokens < len(self._encoding.token_ids):
            node = self._node(("special tokens", before), "special tokens", None, {before: 1}, 0)
            self._pass(node, len(self._encoding.token_ids))
            return node
        return before

    def _leaf(
        self, segment: Leaf | Adapted, before: _Node | None, position: int, extra: tuple[Any, ...]
    ) -> tuple[_Node, int]:
        kind: Kind = "string" if isinstance(bare(segment), str) else "token ids"
        num_special = 0 if self._next_extent is None else self._next_extent.num_special
        node = self._node((kind, before, segment, num_special, *extra), kind, segment, {before: 1}, position)
        if self._next_extent is None:
            self.uses.append(_Use(node, 0))
            return node, position
        node.is_join_changed |= self._next_extent.is_join_changed
        start = self._num_tokens
        self._pass(node, self._next_extent.stop)
        self._next_extent = next(self._extents, None)
        return node, position + self._num_tokens - start

    def _special_tokens(self, before: _Node | None, position: int, extra: tuple[Any, ...]) -> tuple[_Node | None, int]:
        """Return the node of the special tokens before a group, if there are any, and the position behind them."""
        if self._next_extent is None or not self._next_extent.num_special:
            return before, position
        node = self._node(("special tokens", before, *extra), "special tokens", None, {before: 1}, position)
        num_tokens = self._next_extent.num_special
        self._pass(node, self._num_tokens + num_tokens)
        return node, position + num_tokens

    def _group(self, group: Group, before: _Node | None, position: int) -> tuple[_Node, int]:
        ends: list[tuple[_Node, bool]] = []
        start, last = position, position
        for branch in group.branches:
            # The start of a sequential branch depends on the branches before it.
            extra = tuple(end for end, _ in ends) if group.positions == "sequential" and not branch.is_frozen else ()
            first = len(self.uses)
            if branch.is_frozen:
                end, stop = self.through(branch.segments, None, 0)
                self.uses[first].node.is_frozen = True
            else:
                end, stop = self.through(branch.segments, before, start, extra)
            assert end is not None, "branches are never empty"
            ends.append((end, branch.is_frozen))
            last = max(last, stop)
            if group.positions == "sequential" and not branch.is_frozen:
                start = stop
        parents: dict[_Node | None, int] = {}
        for end, _ in ends:
            parents[end] = parents.get(end, 0) + 1
        if all(is_frozen for _, is_frozen in ends):
            parents[before] = 1
        key = ("junction", before, frozenset(Counter(ends).items()), last)
        junction = self._node(key, "junction", None, parents, last)
        junction.behind = before
        return junction, last

    def _node(
        self, key: tuple[Any, ...], kind: Kind, segment: Segment | None, parents: dict[_Node | None, int], position: int
    ) -> _Node:
        """Return the node of this key, new or not."""
        node = self._found.get(key)
        if node is None:
            string = "".join(map(str, leaves([segment]))) if kind == "string" and segment is not None else ""
            node = self._found[key] = _Node(kind, segment, string)
            node.parents = {parent: times for parent, times in parents.items() if parent is not None}
            node.position = None if self._encoding is None else position
        self.visited[node] = None
        return node

    def _pass(self, node: _Node, stop: int) -> None:
        """Give the tokens up to `stop` to a node."""
        assert self._encoding is not None
        if not node.token_ids:
            node.token_ids = self._encoding.token_ids[self._num_tokens : stop]
            if node.kind != "string":
                node.string = self._encoding.decode(node.token_ids)
        self._num_tokens = stop
        self.uses.append(_Use(node, stop))


def _add_encoded(merged: _Merged, lm: LM, texts: dict[int, Text]) -> int:
    """Merge texts of one `LM` in, with their tokens and the status of these; return the number of tokens."""
    with lm.session.exclusive():
        evaluator, encoder = lm.session.current(), lm.session.encoder
        all_token_ids = encoder.encode(list(texts.values()))
        sketch = evaluator.sketch(all_token_ids)
        statuses = [list(_statuses(sketch, text)) for text in sketch.texts]
        extents = encoder.extents(list(texts.values()))
        token_bytes = evaluator.executor.token_bytes
    claims = _Claims()
    inserted = [Inserted(claims.forest.insert(token_ids), token_ids) for token_ids in all_token_ids if token_ids]
    inserted_left = iter(inserted)
    for (text_idx, text), token_ids, its_extents, its_statuses in zip(
        texts.items(), all_token_ids, extents, statuses, strict=True
    ):
        encoding = _Encoding(plain(flat(token_ids)), its_extents, encoder.tokenizer.decode)
        uses = merged.add(text, text_idx, encoding)
        if token_ids:
            claims.claim(next(inserted_left), uses, its_statuses)
    claims.note_order(inserted)
    for node in claims.nodes:
        node.num_bytes = node.num_own_tokens * token_bytes if token_bytes else None
    return sum(map(len, all_token_ids))


def _statuses(sketch: Sketch, text: Inserted) -> Iterator[Status]:
    """Yield the status of each token of a text, in written order."""
    for span in sketch.forest.in_order(text):
        yield from itertools.repeat(_status(sketch, span), len(span.token_ids))


def _status(sketch: Sketch, span: Span) -> Status:
    match where(span):
        case "disk":
            return "from disk"
        case "evicted":
            return "evicted"
        case "absent":
            return "not evaluated"
    if span.computed_in == sketch.forest.evaluation:
        return "computed now"
    return "from disk" if span.loaded_in == sketch.forest.evaluation else "reused from memory"


class _Claims:
    """The nodes at which distinct tokens are counted."""

    def __init__(self) -> None:
        self.forest = Forest()
        self.nodes: dict[_Node, None] = {}
        self._owners: dict[Span, _Node] = {}

    def claim(self, text: Inserted, uses: Sequence[_Use], statuses: Sequence[Status]) -> None:
        """Count a text's tokens at its nodes, except for tokens that are counted elsewhere."""
        rest = self.forest.in_order(text)[::-1]
        start = 0
        for use in uses:
            self.nodes[use.node] = None
            first = start
            while start < use.stop:
                span = self._cut(rest, use.stop - start)
                stop = start + len(span.token_ids)
                if span not in self._owners:
                    self._owners[span] = use.node
                    use.node.num_own_tokens += stop - start
                    use.node.statuses.update(statuses[start:stop])
                start = stop
            if use.node.status is None:
                seen = Counter(statuses[first:start]) or Counter(statuses[max(0, first - 1) : first])
                use.node.status = _of_most_tokens(seen)
            if use.node.statuses:
                use.node.status = _of_most_tokens(use.node.statuses)

    def note_order(self, inserted: Sequence[Inserted]) -> None:
        """Number the nodes in the order in which their first own tokens are forwarded."""
        for order, span in enumerate(missing_spans(text.end for text in inserted)):
            owner = self._owners.get(span)
            if owner is not None and owner.order < 0:
                owner.order = order

    def _cut(self, rest: list[Span], num_tokens: int) -> Span:
        """Take a span of at most `num_tokens` tokens off the end of `rest`, splitting a longer span."""
        span = rest.pop()
        if len(span.token_ids) <= num_tokens:
            return span
        upper = self.forest.split(span, num_tokens)
        if span in self._owners:
            self._owners[upper] = self._owners[span]
        rest.append(span)
        for idx in reversed(range(len(rest) - 1)):  # a branch may be in `rest` several times
            if rest[idx] is span:
                rest.insert(idx + 1, upper)
        return upper


def _of_most_tokens(statuses: Counter[Status]) -> Status:
    return max(STATUSES, key=lambda status: statuses[status]) if statuses else "not evaluated"


def _as_networkx(nodes: Sequence[_Node], listed: Sequence[Text], num_tokens: int) -> nx.DiGraph:
    graph = nx.DiGraph(num_texts=len(listed), num_tokens=num_tokens)
    numbers = {node: number for number, node in enumerate(nodes)}
    for node, number in numbers.items():
        is_junction = node.kind == "junction"
        has_model = node.position is not None
        graph.add_node(
            number,
            kind=node.kind,
            string=node.string,
            segment=node.segment,
            adapter=(node.segment.adapter or "") if isinstance(node.segment, Adapted) else None,
            token_ids=node.token_ids,
            num_tokens=len(node.token_ids),
            num_own_tokens=node.num_own_tokens,
            num_bytes=node.num_bytes,
            position=node.position,
            status=None if is_junction else node.status if has_model else "no model",
            statuses=dict(node.statuses),
            is_join_changed=node.is_join_changed,
            is_frozen=node.is_frozen,
            behind=None if node.behind is None else numbers[node.behind],
            ends=tuple(node.ends),
            generated=tuple(text.finish_reason for idx in node.ends if isinstance(text := listed[idx], GeneratedText)),
            num_texts=node.num_texts,
            written_order=node.written_order,
        )
        for parent, times in node.parents.items():
            graph.add_edge(numbers[parent], number, times=times, is_join_changed=node.is_join_changed)
    return graph
