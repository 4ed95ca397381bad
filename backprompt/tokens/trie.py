"""A trie of segments: texts that share a beginning share its encoding; each distinct string is encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from backprompt.tokens.chains import Chain, Leaf
from backprompt.tokens.tokenizer import EncodesStrings


def encode_chains(tokenizer: EncodesStrings, chains: Iterable[Chain], *, split: bool) -> dict[Chain, tuple[int, ...]]:
    """Return the ids of chains, without special tokens; `split`: each segment is encoded on its own."""
    pieces = _Pieces(tokenizer)
    roots = {False: _TrieNode(), True: _TrieNode(is_continuation=True)}
    ends = {chain: roots[chain.is_continuation].descend(chain.leaves, pieces, split=split) for chain in chains}
    pieces.encode()
    return {chain: end.ids(pieces) for chain, end in ends.items()}


@dataclass(frozen=True)
class _Piece:
    """A string that is encoded by itself."""

    string: str
    is_continuation: bool


class _Pieces:
    """All pieces of one call of the encoder, and their ids once encoded."""

    def __init__(self, tokenizer: EncodesStrings) -> None:
        self.tokenizer = tokenizer
        self._ids: dict[_Piece, tuple[int, ...]] = {}

    def add(self, piece: _Piece) -> None:
        self._ids[piece] = ()

    def encode(self) -> None:
        for is_continuation in (False, True):
            pieces = [piece for piece in self._ids if piece.is_continuation is is_continuation]
            strings = [piece.string for piece in pieces]
            encoded = self.tokenizer.encode(strings, is_continuation=is_continuation) if strings else []
            self._ids.update(zip(pieces, encoded, strict=True))

    def ids(self, piece: _Piece) -> tuple[int, ...]:
        return self._ids[piece]


@dataclass(eq=False)
class _TrieNode:
    """The state after some segments: settled ids, and the tail of the string, whose tokens may still change.

    The ids of the text up to here are those of its ancestors' `settled` (pieces, or given token ids), of its own, and
    of the tail. A node holds only its addition to the tail of its parent, or the whole tail if it `begins_tail`. Whole
    tails at every node of a long chain would take memory quadratic in its length.
    """

    parent: _TrieNode | None = None
    settled: tuple[_Piece | tuple[int, ...], ...] = ()
    added: str = ""
    begins_tail: bool = True
    is_continuation: bool = False
    children: dict[Leaf, _TrieNode] = field(default_factory=dict)
    _settled_ids: tuple[int, ...] | None = None

    def descend(self, segments: Sequence[Leaf], pieces: _Pieces, *, split: bool) -> _TrieNode:
        """Return the node after `segments`; adds new nodes to the trie and new pieces to `pieces`."""
        node, tail = self, ""
        for segment in segments:
            child = node.children.get(segment)
            if child is None:
                child = node._extend(segment, tail, pieces, split)
                for settled in child.settled:
                    if isinstance(settled, _Piece):
                        pieces.add(settled)
                node.children[segment] = child
            node, tail = child, child.added if child.begins_tail else tail + child.added
        if tail:
            pieces.add(_Piece(tail, node.is_continuation))
        return node

    def ids(self, pieces: _Pieces) -> tuple[int, ...]:
        """Return the ids of the text that ends here, without special tokens."""
        tail = self._tail()
        return self._all_settled_ids(pieces) + (pieces.ids(_Piece(tail, self.is_continuation)) if tail else ())

    def _extend(self, segment: Leaf, tail: str, pieces: _Pieces, split: bool) -> _TrieNode:
        settled_tail = (_Piece(tail, self.is_continuation),) if tail else ()
        if not isinstance(segment, str):
            return _TrieNode(self, (*settled_tail, segment), is_continuation=True)
        if split:
            return _TrieNode(self, settled_tail, segment, is_continuation=self.is_continuation or bool(tail))
        longer = tail + segment
        cut = pieces.tokenizer.cut(longer, len(tail) - 1)  # the tail was searched already
        if cut == 0:
            return _TrieNode(self, (), segment, begins_tail=False, is_continuation=self.is_continuation)
        piece = _Piece(longer[:cut], self.is_continuation)
        return _TrieNode(self, (piece,), longer[cut:], is_continuation=self.is_continuation)

    def _tail(self) -> str:
        parts: list[str] = []
        node: _TrieNode | None = self
        while node is not None:
            parts.append(node.added)
            node = None if node.begins_tail else node.parent
        return "".join(reversed(parts))

    def _all_settled_ids(self, pieces: _Pieces) -> tuple[int, ...]:
        chain: list[_TrieNode] = []
        node: _TrieNode | None = self
        while node is not None and node._settled_ids is None:
            chain.append(node)
            node = node.parent
        ids = list(node._settled_ids) if node is not None and node._settled_ids is not None else []
        for node in reversed(chain):
            for settled in node.settled:
                ids += pieces.ids(settled) if isinstance(settled, _Piece) else settled
            if len(node.children) > 1:  # kept only where several children read it: memory stays linear
                node._settled_ids = tuple(ids)
        return tuple(ids)
