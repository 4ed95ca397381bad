"""A trie of segments, with which texts share the encoding of a common beginning; each string is encoded once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from backprompt.text.node import Text, sides
from backprompt.text.segments import Adapted, Group, Leaf
from backprompt.tokens.chains import Chain
from backprompt.tokens.tokenizer import EncodesStrings


def encode_chains(tokenizer: EncodesStrings, chains: Iterable[Chain], *, split: bool) -> dict[Chain, tuple[int, ...]]:
    """Return the ids of each chain, without special tokens; with `split`, each segment is encoded on its own."""
    trie = Trie(tokenizer, split=split)
    nodes = {chain: trie.add_chain(chain) for chain in chains}
    trie.encode()
    return {chain: node.ids() for chain, node in nodes.items()}


_NO_LEAVES = frozenset({Adapted, Group})


class Trie:
    """A trie of segments, its nodes, and the ids of the strings that they add.

    Args:
        tokenizer: encodes the strings.
        split: whether each segment is encoded on its own.

    """

    def __init__(self, tokenizer: EncodesStrings, *, split: bool) -> None:
        self._pieces = _Pieces(tokenizer)
        self._split = split
        self._roots = {False: TrieNode(), True: TrieNode(is_continuation=True)}
        self._nodes: dict[int, TrieNode | None] = {}  # by the `id()` of a text

    def add_chain(self, chain: Chain) -> TrieNode:
        """Return the node behind a chain."""
        return self._ended(*self._descend(self._roots[chain.is_continuation], "", chain.leaves))

    def add_text(self, text: Text) -> TrieNode | None:
        """Return the node behind a text that stands at the beginning; None if the text has a group or adapters.

        Texts that were built on one text share the walk along it. The texts must live as long as the trie.
        """
        parts: list[tuple[Text, Text]] = []  # texts, each with its last part, the last text first
        first = text
        while id(first) not in self._nodes and (both := sides(first)) is not None:
            parts.append((first, both[1]))
            first = both[0]
        if id(first) in self._nodes:
            node = self._nodes[id(first)]
        else:
            node = self._roots[False]
            parts.append((first, first))
        tail = "" if node is None else node.tail()
        for whole, last in reversed(parts):
            segments = last.segments
            if node is None or not _NO_LEAVES.isdisjoint(map(type, segments)):
                node = None
            else:
                node, tail = self._descend(node, tail, segments)  # type: ignore[arg-type]  # none is a group
            self._nodes[id(whole)] = node
        return None if node is None else self._ended(node, tail)

    @property
    def strings(self) -> Iterator[str]:
        """The strings that `encode` encodes, each at most once as a beginning and once as a continuation."""
        return itertools.chain(*self._pieces.of_kind.values())

    def encode(self) -> None:
        """Encode the strings of all nodes."""
        self._pieces.encode()

    def _descend(self, node: TrieNode, tail: str, leaves: Iterable[Leaf]) -> tuple[TrieNode, str]:
        """Return the node behind leaves, and the unsettled tail of the string there; missing nodes are added."""
        for leaf in leaves:
            child = node.children.get(leaf)
            if child is None:
                child = node.extend(leaf, tail, self._pieces, split=self._split)
            node, tail = child, child.added if child.begins_tail else tail + child.added
        return node, tail

    def _ended(self, node: TrieNode, tail: str) -> TrieNode:
        """Return a node at which a text ends, after adding its tail to the strings to encode."""
        node.end = self._pieces.add(tail, node.is_continuation)
        return node


class _Piece:
    """A string that is encoded by itself, or given token ids."""

    __slots__ = ("ids",)

    def __init__(self, ids: tuple[int, ...] = ()) -> None:
        self.ids = ids  # of a string once it is encoded


class _Pieces:
    """The strings of one call of the encoder: for beginnings and for continuations, a piece for each string."""

    def __init__(self, tokenizer: EncodesStrings) -> None:
        self.tokenizer = tokenizer
        self.of_kind: dict[bool, dict[str, _Piece]] = {False: {}, True: {}}

    def add(self, string: str, is_continuation: bool) -> tuple[_Piece, ...]:
        """Return the piece of a string; none for an empty string."""
        pieces = self.of_kind[is_continuation]
        if not string:
            return ()
        piece = pieces.get(string)
        if piece is None:
            piece = pieces[string] = _Piece()
        return (piece,)

    def encode(self) -> None:
        for is_continuation, pieces in self.of_kind.items():
            encoded = self.tokenizer.encode(list(pieces), is_continuation=is_continuation) if pieces else []
            for piece, ids in zip(pieces.values(), encoded, strict=True):
                piece.ids = ids


@dataclass(eq=False, slots=True)
class TrieNode:
    """The state after some segments: settled ids, and the tail of the string, whose tokens may still change.

    The ids of the text up to here are those of the ancestors' `settled`, of the node's own `settled`, and of the tail.
    A node holds only its addition to the tail of its parent, or the whole tail if the node `begins_tail`. Whole tails
    at every node of a long chain would take memory quadratic in the length of the chain.

    Attributes:
        end: the piece of the tail, if a text ends here.
        is_only_strings: whether no segment so far consists of token ids.
        begins_with_string: whether the text begins with a string, as the empty text does.

    """

    parent: TrieNode | None = None
    settled: tuple[_Piece, ...] = ()
    added: str = ""
    begins_tail: bool = True
    is_continuation: bool = False
    is_only_strings: bool = True
    begins_with_string: bool = True
    end: tuple[_Piece, ...] = ()
    children: dict[Leaf, TrieNode] = field(default_factory=dict)
    _settled_ids: tuple[int, ...] | None = None

    def ids(self) -> tuple[int, ...]:
        """Return the ids of the text that ends here, without special tokens, once the strings are encoded."""
        chain: list[TrieNode] = []
        node: TrieNode | None = self
        while node is not None and node._settled_ids is None:
            chain.append(node)
            node = node.parent
        ids = [] if node is None or node._settled_ids is None else list(node._settled_ids)
        for node in reversed(chain):
            for piece in node.settled:
                ids += piece.ids
            if len(node.children) > 1:  # kept only where several children read it: memory stays linear
                node._settled_ids = tuple(ids)
        for piece in self.end:
            ids += piece.ids
        return tuple(ids)

    def extend(self, segment: Leaf, tail: str, pieces: _Pieces, *, split: bool) -> TrieNode:
        """Add the node behind a segment that stands here; `tail`: the string here that is not settled yet."""
        node = self._extended(segment, tail, pieces, split)
        node.is_only_strings = self.is_only_strings and isinstance(segment, str)
        node.begins_with_string = self.begins_with_string if self.parent is not None else isinstance(segment, str)
        self.children[segment] = node
        return node

    def _extended(self, segment: Leaf, tail: str, pieces: _Pieces, split: bool) -> TrieNode:
        is_continuation = self.is_continuation
        if not isinstance(segment, str):
            return TrieNode(self, (*pieces.add(tail, is_continuation), _Piece(segment)), is_continuation=True)
        if split:
            settled = pieces.add(tail, is_continuation)
            return TrieNode(self, settled, segment, is_continuation=is_continuation or bool(tail))
        cut = pieces.tokenizer.cut
        if tail and cut(tail[-1] + segment[:2]):  # at the join, for many texts may have the same part on either side
            settled, string, start = pieces.add(tail, is_continuation), segment, 0
        else:
            settled, string, start = (), tail + segment, len(tail) - 1  # the tail was searched already
        place = cut(string, start)
        if not (settled or place):
            return TrieNode(self, (), segment, begins_tail=False, is_continuation=is_continuation)
        settled += pieces.add(string[:place], is_continuation)
        return TrieNode(self, settled, string[place:], is_continuation=is_continuation)

    def tail(self) -> str:
        """Return the last part of the text that ends here: the string whose tokens may still change."""
        parts: list[str] = []
        node: TrieNode | None = self
        while node is not None:
            parts.append(node.added)
            node = None if node.begins_tail else node.parent
        return "".join(reversed(parts))
