"""From texts to token ids: joins, special tokens, and what a join changed.

The segments of a text form *runs*: strings side by side are one run, and a segment of token ids stands alone, with a
hard boundary on both sides. The first run is encoded as a whole string would be; a run after a hard boundary is
encoded as a continuation (no special tokens, no dummy prefix space).

    "the ref" + "und" + <5, 9> + " is due"     runs: "the refund", <5, 9>, " is due"

Under `joins="exact"` a run is encoded as one string. Texts that share a beginning share the work: their segments are
arranged as a trie, and what a node adds is encoded once, up to the last place where the string can provably be cut.
Under `joins="split"` every segment is encoded on its own, the later ones as continuations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

from backprompt.errors import JoinError, TokenizerError
from backprompt.text import Segment, Text
from backprompt.tokenizer import EncodesStrings

Joins: TypeAlias = Literal["exact", "split", "error"]
JOINS: tuple[Joins, ...] = ("exact", "split", "error")


@dataclass(frozen=True)
class Join:
    """A place where two strings meet and the tokens around it depend on that.

    Attributes:
        segment_idx: index, in `Text.segments`, of the segment that begins here.
        left: the string of the run before the join.
        right: the segment after it.
        split_tokens: the ids around the join if both sides are encoded apart; the common ids at both ends left out.
        joined_tokens: the ids that take their place in the string of both.

    """

    segment_idx: int
    left: str
    right: str
    split_tokens: tuple[int, ...]
    joined_tokens: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"segment {self.segment_idx}: ...{self.left[-20:]!r} + {self.right[:20]!r}: tokens "
            f"{list(self.split_tokens)} become {list(self.joined_tokens)}"
        )


class Encoder:
    """Encodes texts; remembers each text's ids for as long as the text lives."""

    def __init__(self, tokenizer: EncodesStrings, joins: Joins, add_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self._joins = joins
        self._prefix_ids = tokenizer.prefix_ids if add_special_tokens else ()
        self._suffix_ids = tokenizer.suffix_ids if add_special_tokens else ()
        self._encoded: WeakKeyDictionary[Text, tuple[int, ...]] = WeakKeyDictionary()

    def encode(self, texts: Sequence[Text]) -> list[tuple[int, ...]]:
        """Return the token ids of each text; texts not seen before are encoded together.

        Raises:
            JoinError: under `joins="error"`, tokens change where two segments of a text meet.
            TokenizerError: a string that the tokenizer cannot take.

        """
        known = {text: ids for text in texts if (ids := self._encoded.get(text)) is not None}
        new = list(dict.fromkeys(text for text in texts if text not in known))
        if new:
            encoded = dict(zip(new, self._encode_new(new), strict=True))
            self._encoded.update(encoded)
            known |= encoded
        return [known[text] for text in texts]

    def joins(self, text: Text) -> list[Join]:
        """Return every join of a text at which joining changes tokens, from left to right."""
        return list(self._changed_joins(text.segments))

    def string(self, text: Text) -> str:
        """Return the text's string, token ids decoded: each such segment adds what it adds to the decoding so far."""
        string = ""
        before: list[Segment] = []
        for is_string, side_by_side in itertools.groupby(text.segments, key=lambda segment: isinstance(segment, str)):
            run = list(side_by_side)
            if is_string:
                string += "".join(map(str, run))
            else:
                ids_before = self._ids_before(before)
                ids = ids_before + tuple(int(token_id) for segment in run for token_id in segment)
                string += _added(self.tokenizer.decode(ids_before), self.tokenizer.decode(ids))
            before += run
        return string

    def _ids_before(self, segments: list[Segment]) -> tuple[int, ...]:
        """Return the ids of these segments where more follows."""
        if not segments:
            return ()
        return self._trie_encode([segments], split=self._joins == "split", is_whole=False)[0]

    def _encode_new(self, texts: list[Text]) -> list[tuple[int, ...]]:
        segments = [text.segments for text in texts]
        for text, its_segments in zip(texts, segments, strict=True):
            _check_encodable(text, its_segments)
        encoded = self._trie_encode(segments, split=self._joins == "split")
        if self._joins == "error":
            for text, joined, split in zip(texts, encoded, self._trie_encode(segments, split=True), strict=True):
                if joined != split:
                    self._raise_join_error(text)
        return encoded

    def _raise_join_error(self, text: Text) -> None:
        joins = "\n  ".join(map(str, self.joins(text)))
        raise JoinError(
            f"{text!r}: tokens change where its segments meet:\n  {joins}\n"
            'Move the join to a place where no token spans it (often before a space), or use joins="exact" or "split".'
        )

    def _trie_encode(
        self, texts: Sequence[Sequence[Segment]], *, split: bool, is_whole: bool = True
    ) -> list[tuple[int, ...]]:
        """Encode texts given by their segments, each distinct piece of string once; not `is_whole`: more follows."""
        pieces = _Pieces(self.tokenizer)
        root = _TrieNode()
        ends = [root.descend(segments, pieces, split=split) for segments in texts]
        pieces.encode()
        return [
            self._with_special_tokens(end.ids(pieces), segments, is_whole)
            for end, segments in zip(ends, texts, strict=True)
        ]

    def _with_special_tokens(
        self, ids: tuple[int, ...], segments: Sequence[Segment], is_whole: bool
    ) -> tuple[int, ...]:
        if segments and not isinstance(segments[0], str):
            return ids
        if ids[: len(self._prefix_ids)] != self._prefix_ids:
            ids = self._prefix_ids + ids
        if is_whole and self._suffix_ids and all(isinstance(segment, str) for segment in segments):
            ids = ids + self._suffix_ids
        return ids

    def _changed_joins(self, segments: Sequence[Segment]) -> Iterator[Join]:
        numbered = enumerate(segments)
        for is_string, side_by_side in itertools.groupby(numbered, key=lambda place: isinstance(place[1], str)):
            if is_string:
                yield from self._changed_joins_of_run([(idx, str(segment)) for idx, segment in side_by_side])

    def _changed_joins_of_run(self, strings: list[tuple[int, str]]) -> list[Join]:
        """Return the joins of one run, whose strings come with their segment indices; none if its ids stay the same.

        They may: in "x " + " " + "y" the "y" takes apart what the spaces had become.
        """
        (first_idx, run), *rest = strings
        (ids,) = self.tokenizer.encode([run], is_continuation=first_idx > 0)
        ids_apart, joins = ids, []
        for idx, string in rest:
            (right,) = self.tokenizer.encode([string], is_continuation=True)
            (joined,) = self.tokenizer.encode([run + string], is_continuation=first_idx > 0)
            if joined != ids + right:
                joins.append(Join(idx, run, string, *_differing_middles(ids + right, joined)))
            run, ids, ids_apart = run + string, joined, ids_apart + right
        return joins if ids != ids_apart else []


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
    """The state after some segments: what is settled, and a tail of string whose tokens may still change.

    The ids of the text up to here are those of its ancestors' `settled` (pieces, or token ids as they are), of its own,
    and of the tail. A node holds only what it adds to the tail of its parent, or the whole tail where it `begins_tail`:
    whole tails at every node of a long chain would take the square of its length.
    """

    parent: _TrieNode | None = None
    settled: tuple[_Piece | tuple[int, ...], ...] = ()
    added: str = ""
    begins_tail: bool = True
    is_continuation: bool = False
    children: dict[Segment, _TrieNode] = field(default_factory=dict)
    _settled_ids: tuple[int, ...] | None = None

    def descend(self, segments: Sequence[Segment], pieces: _Pieces, *, split: bool) -> _TrieNode:
        """Return the node after `segments`, adding what is new to the trie and to `pieces`."""
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

    def _extend(self, segment: Segment, tail: str, pieces: _Pieces, split: bool) -> _TrieNode:
        settled_tail = (_Piece(tail, self.is_continuation),) if tail else ()
        if not isinstance(segment, str):
            return _TrieNode(self, (*settled_tail, segment), is_continuation=True)
        if split:
            return _TrieNode(self, settled_tail, segment, is_continuation=self.is_continuation or bool(tail))
        longer = tail + segment
        cut = pieces.tokenizer.cut(longer, len(tail) - 1)  # the tail was searched before
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
            if len(node.children) > 1:  # remembered only where it is read again: a chain would cost its length squared
                node._settled_ids = tuple(ids)
        return tuple(ids)


def _differing_middles(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what is left of both after their common beginning and then their common end are taken away."""
    shortest = min(len(a), len(b))
    start = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    end = next((i for i in range(shortest - start) if a[-1 - i] != b[-1 - i]), shortest - start)
    return a[start : len(a) - end], b[start : len(b) - end]


def _added(before: str, after: str) -> str:
    """Return what `after` adds to `before`, from where they first differ."""
    if after.startswith(before):
        return after[len(before) :]
    return after[next(idx for idx, pair in enumerate(zip(before, after + "\0", strict=False)) if pair[0] != pair[1]) :]


def _check_encodable(text: Text, segments: Sequence[Segment]) -> None:
    """Raise TokenizerError for a lone surrogate, which is half of a UTF-16 pair and no character."""
    num_before = 0
    for segment in segments:
        if not isinstance(segment, str):
            continue
        try:
            _ = segment.isascii() or segment.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"{text!a} holds a lone surrogate at character {num_before + error.start} of its strings: half of a "
                "UTF-16 pair, which is no character. Decode the source as UTF-8, or replace it with "
                "string.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
            ) from error
        num_before += len(segment)
