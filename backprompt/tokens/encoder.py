"""From texts to token ids: joins, special tokens, and the tokens that a join changed.

The segments of a text form *runs*: adjacent strings are one run, and a segment of token ids is a run of its own, with a
hard boundary on both sides. The first run is encoded like a whole string; a run after a hard boundary is encoded as a
continuation (no special tokens, no dummy prefix space).

    "the ref" + "und" + <5, 9> + " is due"     runs: "the refund", <5, 9>, " is due"

A group has hard boundaries at both edges and between its branches. If no text stands before a group, its branches are
encoded like the beginning of a text. A frozen branch is encoded as a text of its own.

Under `joins="exact"` a run is encoded as one string. Texts that share a beginning share the work: their segments are
arranged as a trie, and the string that a node adds is encoded once, up to the last place where the string can provably
be cut. Under `joins="split"` every segment is encoded on its own, the later ones as continuations.

Adapters change no token of a run. A token that spans a join has the adapter of the segment behind the join. Special
tokens have the adapter of the segment next to them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from backprompt.arguments import lone_surrogate, surrogate_message
from backprompt.errors import AdapterError, JoinError, TokenizerError
from backprompt.text.extents import Extent, Join
from backprompt.text.node import Text, given_ids, note, noted
from backprompt.text.segments import Adapted, Branch, Group, Leaf, Segment, bare, leaves, marked_leaves
from backprompt.tokens.adapted import plain, under
from backprompt.tokens.chains import Chain, Marked, MarkedChain, chains_of, pieces_of
from backprompt.tokens.graph import Part, TokenBranch, TokenGroup, TokenIds, as_token_ids, common_length, flat
from backprompt.tokens.joins import Joins, changed_joins
from backprompt.tokens.tokenizer import EncodesStrings, added
from backprompt.tokens.trie import Trie, TrieNode, encode_chains
from backprompt.warn import warn_caller


def _no_adapters(name: str | None) -> int:
    raise AdapterError(f"The adapter {name!r} needs a model, and this encoder has none.")


class Encoder:
    """Encodes texts; remembers each text's ids for as long as the text lives.

    Args:
        tokenizer: encodes strings.
        joins: see `LM`.
        add_special_tokens: see `LM`.
        number_of: returns the number of the adapter with this name; see adapted.py.

    """

    def __init__(
        self,
        tokenizer: EncodesStrings,
        joins: Joins,
        add_special_tokens: bool,
        number_of: Callable[[str | None], int] = _no_adapters,
    ) -> None:
        self.tokenizer = tokenizer
        self._joins = joins
        self._add_special_tokens = add_special_tokens
        self._number_of_name = number_of
        self._encoded: WeakKeyDictionary[Text, TokenIds] = WeakKeyDictionary()  # for equal texts
        self._mark = object()  # texts keep ids under this mark, so they do not keep the tokenizer alive

    def encode(self, texts: Sequence[Text]) -> list[TokenIds]:
        """Return the token ids of each text; texts that were not encoded before are encoded together.

        Raises:
            JoinError: under `joins="error"`, tokens change where two segments of a text meet.
            AdapterError: the model has no such adapter.
            TokenizerError: the tokenizer cannot encode a string.

        """
        unknown = [text for text in texts if noted(text, self._mark) is None]
        found: dict[Text, TokenIds | None] = dict.fromkeys(unknown)
        if self._encoded:
            found = {text: self._encoded.get(text) for text in found}
        new = [text for text, ids in found.items() if ids is None]
        if new:
            encoded = dict(zip(new, self._encode_new(new), strict=True))
            self._encoded.update(encoded)
            found |= encoded
        for text, ids in zip(
            unknown, found.values() if len(found) == len(unknown) else map(found.get, unknown), strict=True
        ):
            note(text, self._mark, ids)
        return [noted(text, self._mark) for text in texts]

    def encode_beginnings(self, texts: Sequence[Text]) -> list[TokenIds]:
        """Return the token ids of each text as if token ids followed: no special tokens stand behind a whole string.

        The ids are not remembered.

        Raises:
            The errors of `encode`.

        """
        found = list(map(given_ids, texts))
        new = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        encoded = iter(self._encode_new(new, are_whole=False))
        return [next(encoded) if ids is None else ids for ids in found]

    def extents(self, texts: Sequence[Text]) -> list[list[Extent]]:
        """Return, for each text, the tokens of each string and each segment of token ids, in written order.

        Every prefix of every run is encoded and, if the tokenizer encodes continuations, every segment alone. Texts
        that share prefixes or segments share the work.
        """
        chains = {chain for text in texts for chain in chains_of(text.segments)}
        beginnings = {
            Chain(chain.leaves[:stop], chain.is_continuation)
            for chain in chains
            for stop in range(1, len(chain.leaves) + 1)
        }
        leaves_alone = (
            {leaf for chain in chains for leaf in chain.leaves} if self.tokenizer.encodes_continuations else ()
        )
        alone = {_alone(leaf) for leaf in leaves_alone}
        ids_of = encode_chains(self.tokenizer, beginnings | alone, split=self._joins == "split")
        encoded = self.encode(texts)
        return [self._extents(text, len(ids), ids_of) for text, ids in zip(texts, encoded, strict=True)]

    def _extents(self, text: Text, num_tokens: int, ids_of: Mapping[Chain, tuple[int, ...]]) -> list[Extent]:
        extents: list[Extent] = []
        num_special = self._num_prefix_ids(_as_branch(text), ids_of)
        marked = marked_leaves(text.segments)
        for chain, num_before in zip(chains_of(text.segments), num_special, strict=True):
            start = extents[-1].stop if extents else 0
            own = [
                replace(extent, segment=segment)
                for extent, segment in zip(_extents_of(chain, ids_of, start + num_before), marked, strict=False)
            ]
            extents += [replace(own[0], start=start, num_special=num_before), *own[1:]]
        return [*extents[:-1], *(replace(last, stop=num_tokens) for last in extents[-1:])]

    def joins(self, text: Text) -> list[Join]:
        """Return every join of a text that changes tokens, from left to right."""
        return changed_joins(self.tokenizer, text)

    def string(self, text: Text) -> str:
        """Return the text's string; a segment of token ids adds what its ids add to the string decoded so far."""
        string = ""
        before: list[Leaf] = []
        all_leaves = leaves(text.segments)
        for is_string, side_by_side in itertools.groupby(all_leaves, key=lambda leaf: isinstance(leaf, str)):
            run = list(side_by_side)
            if is_string:
                string += "".join(map(str, run))
            else:
                ids_before = self._ids_before(before, text.add_special_tokens)
                ids = ids_before + tuple(int(token_id) for leaf in run for token_id in leaf)
                string += added(self.tokenizer.decode(ids_before), self.tokenizer.decode(ids))
            before += run
        return string

    def _ids_before(self, before: list[Leaf], add_special_tokens: bool) -> tuple[int, ...]:
        """Return the ids of the leaves `before` a segment, encoded as a text."""
        if not before:
            return ()
        branch = Branch(tuple(before), is_frozen=True, add_special_tokens=add_special_tokens)
        ids_of = encode_chains(self.tokenizer, [Chain(tuple(before), False)], split=self._joins == "split")
        (ids,) = ids_of.values()
        return self._special_ids(branch, ids_of)[0] + ids

    def _encode_new(self, texts: list[Text], *, are_whole: bool = True) -> list[TokenIds]:
        encoded = self._encode_texts(texts, split=self._joins == "split", are_whole=are_whole)
        if self._joins == "error":
            for text in self._with_changed_joins(texts, encoded, are_whole=are_whole):
                self._raise_join_error(text)
        return encoded

    def _encode_texts(self, texts: Sequence[Text], *, split: bool, are_whole: bool) -> list[TokenIds]:
        """Encode texts, all together; if not `are_whole`, token ids follow each.

        Raises:
            TokenizerError: a string has a lone surrogate.

        """
        trie = Trie(self.tokenizer, split=split)
        nodes = [trie.add_text(text) for text in texts]
        grouped = [text for text, node in zip(texts, nodes, strict=True) if node is None]
        if grouped or any(lone_surrogate(string) is not None for string in trie.strings):
            for text in texts:
                _check_encodable(text)
        trie.encode()
        with_groups = iter(self._encode_branches(list(map(_as_branch, grouped)), split=split, are_whole=are_whole))
        return [
            next(with_groups) if node is None else self._with_special_ids(node, text, is_whole=are_whole)
            for text, node in zip(texts, nodes, strict=True)
        ]

    def _with_special_ids(self, node: TrieNode, text: Text, *, is_whole: bool) -> tuple[int, ...]:
        """Return the ids of a text without groups with the special tokens of a whole string."""
        ids = node.ids()
        if not (self._add_special_tokens and text.add_special_tokens and node.begins_with_string):
            return ids
        prefix, suffix = self.tokenizer.special_ids_around(ids)
        if prefix and ids[: len(prefix)] == prefix:
            self._warn_of_repeated(prefix)
        return prefix + ids + (suffix if is_whole and node.is_only_strings else ())

    def _with_changed_joins(
        self, texts: Sequence[Text], encoded: Sequence[TokenIds], *, are_whole: bool
    ) -> Iterator[Text]:
        """Yield the texts whose tokens, `encoded`, differ from those of their segments encoded separately."""
        if self.tokenizer.encodes_continuations:
            apart = self._encode_texts(texts, split=True, are_whole=are_whole)
            yield from (
                text
                for text, ids, split in zip(texts, encoded, apart, strict=True)
                if plain(flat(ids)) != plain(flat(split))
            )
        else:
            yield from filter(self.joins, texts)

    def _raise_join_error(self, text: Text) -> None:
        joins = "\n  ".join(map(str, self.joins(text)))
        raise JoinError(
            f"{text!r}: tokens change where its segments meet:\n  {joins}\n"
            'Move the join to a place where no token spans it (often before a space), or use joins="exact" or "split".'
        )

    def _encode_branches(self, texts: Sequence[Branch], *, split: bool, are_whole: bool) -> list[TokenIds]:
        """Encode texts, all together."""
        chains = {chain for text in texts for chain in self._chains_to_encode(text.segments)}
        ids_of = encode_chains(self.tokenizer, chains, split=split)
        return [as_token_ids(self._whole(text, ids_of, is_last=are_whole)) for text in texts]

    def _whole(
        self, branch: Branch, ids_of: Mapping[Chain, tuple[int, ...]], *, is_last: bool = True
    ) -> tuple[Part, ...]:
        """Return the parts of a text with the special tokens of a whole string; if not `is_last`, more text follows."""
        prefix, suffix = self._special_ids(branch, ids_of)
        parts = self._parts(branch.segments, False, ids_of)
        if prefix and parts and isinstance(parts[0], tuple) and plain(parts[0][: len(prefix)]) == prefix:
            self._warn_of_repeated(prefix)
        if prefix:
            prefix = under(self._number_at_start(branch.segments), prefix)
        if suffix and branch.segments:
            suffix = under(self._number_of(branch.segments[-1]), suffix)
        return ((prefix,) if prefix else ()) + parts + ((suffix,) if suffix and is_last else ())

    def _special_ids(
        self, branch: Branch, ids_of: Mapping[Chain, tuple[int, ...]]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the special tokens before and behind a text; none behind it unless all its segments are strings."""
        segments = branch.segments
        if not (self._add_special_tokens and branch.add_special_tokens and _begins_with_string(segments)):
            return (), ()
        first = next(pieces_of(segments, is_continuation=False), None)
        prefix, suffix = self.tokenizer.special_ids_around(
            ids_of[first.chain] if isinstance(first, MarkedChain) else ()
        )
        return prefix, suffix if all(isinstance(_bare(segment), str) for segment in segments) else ()

    def _warn_of_repeated(self, prefix: tuple[int, ...]) -> None:
        warn_caller(
            f"A text begins with {self.tokenizer.decode(prefix)!r}, which the tokenizer also puts before every string. "
            "So it stands there twice, as in the plain call. If a string has its special tokens already, as a rendered "
            "chat template does, write Text(string, lm, add_special_tokens=False)."
        )

    def _parts(
        self, segments: tuple[Segment, ...], is_continuation: bool, ids_of: Mapping[Chain, tuple[int, ...]]
    ) -> tuple[Part, ...]:
        parts: list[Part] = []
        for piece in pieces_of(segments, is_continuation):
            if isinstance(piece, MarkedChain):
                parts.append(self._under_adapters(piece, ids_of))
                continue
            branches = []
            for branch in piece.group.branches:
                if branch.is_frozen:
                    inner = self._whole(branch, ids_of, is_last=False)
                else:
                    inner = self._parts(branch.segments, piece.is_continuation, ids_of)
                branches.append(TokenBranch(inner, branch.is_frozen))
            parts.append(TokenGroup(tuple(branches), piece.group.positions == "sequential"))
        return tuple(parts)

    def _chains_to_encode(self, segments: Sequence[Segment], is_continuation: bool = False) -> Iterator[Chain]:
        """Yield the chains of a text, and their beginnings up to each join where the adapter changes."""
        for piece in pieces_of(segments, is_continuation):
            if isinstance(piece, MarkedChain):
                yield piece.chain
                yield from (piece.chain.up_to(idx) for idx in self._joins_of_adapters(piece.leaves))
                continue
            for branch in piece.group.branches:
                yield from self._chains_to_encode(branch.segments, piece.is_continuation and not branch.is_frozen)

    def _joins_of_adapters(self, leaves: Sequence[Marked]) -> range:
        """Return the indices of the first leaf whose adapter differs from the leaf before, and of all later leaves."""
        numbers = list(map(self._number_of, leaves))
        changes = (idx for idx in range(1, len(numbers)) if numbers[idx] != numbers[idx - 1])
        return range(next(changes, len(numbers)), len(numbers))

    def _under_adapters(self, piece: MarkedChain, ids_of: Mapping[Chain, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the ids of a chain; the ids of each leaf are under the leaf's adapter."""
        ids = ids_of[piece.chain]
        later: tuple[int, ...] = ()
        for idx in reversed(self._joins_of_adapters(piece.leaves)):
            start = common_length(ids_of[piece.chain.up_to(idx)], ids, 0)
            later = under(self._number_of(piece.leaves[idx]), ids[start:]) + later
            ids = ids[:start]  # a later join may have changed earlier tokens
        return under(self._number_of(piece.leaves[0]), ids) + later

    def _number_of(self, segment: Segment) -> int:
        """Return the number of a leaf's adapter."""
        return self._number_of_name(segment.adapter) if isinstance(segment, Adapted) else 0

    def _number_at_start(self, segments: Sequence[Segment]) -> int:
        """Return the number of the adapter that a text begins with; 0 for a group whose branches begin with several."""
        first = segments[0] if segments else ""
        if not isinstance(first, Group):
            return self._number_of(first)
        numbers = {self._number_at_start(branch.segments) for branch in first.branches if not branch.is_frozen}
        return numbers.pop() if len(numbers) == 1 else 0

    def _num_prefix_ids(self, branch: Branch, ids_of: Mapping[Chain, tuple[int, ...]]) -> list[int]:
        """Return the number of special tokens before each chain of a branch; a frozen branch is a text of its own."""
        counts: list[int] = []
        for piece in pieces_of(branch.segments, is_continuation=False):
            if isinstance(piece, MarkedChain):
                counts.append(0)
            else:
                for inner in piece.group.branches:
                    counts += self._num_prefix_ids(inner, ids_of)
        if branch.is_frozen and counts:
            counts[0] += len(self._special_ids(branch, ids_of)[0])
        return counts


def _alone(leaf: Leaf) -> Chain:
    """Return the chain of a leaf encoded on its own, unchanged by joins."""
    return Chain((leaf,), is_continuation=True)


def _as_branch(text: Text) -> Branch:
    """Return a text as a frozen branch, which is encoded in the same way."""
    return Branch(text.segments, is_frozen=True, add_special_tokens=text.add_special_tokens)


def _begins_with_string(segments: Sequence[Segment]) -> bool:
    """Return whether special tokens belong before these segments: before a string, not before given token ids.

    A group begins with a string if any of its branches does, frozen ones left out.
    """
    if not segments:
        return True  # an empty string
    first = segments[0]
    if isinstance(first, Group):
        return any(not branch.is_frozen and _begins_with_string(branch.segments) for branch in first.branches)
    return isinstance(bare(first), str)


def _bare(segment: Segment) -> Segment:
    return segment if isinstance(segment, Group) else bare(segment)


def _extents_of(chain: Chain, ids_of: Mapping[Chain, tuple[int, ...]], first: int) -> list[Extent]:
    """Return the extents of a chain's leaves, whose tokens begin at `first`.

    `ids_of` has the ids of all prefixes of the chain and, if the tokenizer encodes continuations, of each leaf alone.
    For other tokenizers a join counts as changed if the segment behind the join changes the ids of the text before.
    """
    ids = ids_of[chain]
    extents: list[Extent] = []
    stop = len(ids)
    for idx in reversed(range(len(chain.leaves))):
        before = ids_of[Chain(chain.leaves[:idx], chain.is_continuation)] if idx else ()
        num_same = common_length(before, ids, 0)
        start = min(num_same, stop)  # a later join may have changed earlier tokens
        replaced = before[start:] if num_same < len(before) else ()
        joined = ids_of[Chain(chain.leaves[: idx + 1], chain.is_continuation)]
        alone = ids_of.get(_alone(chain.leaves[idx]))
        is_changed = idx > 0 and (joined[: len(before)] != before if alone is None else joined != before + alone)
        extents.append(Extent(chain.leaves[idx], first + start, first + stop, replaced, is_changed))
        stop = start
    return extents[::-1]


def _check_encodable(text: Text) -> None:
    """Raise TokenizerError for a lone surrogate (half of a UTF-16 pair)."""
    num_before = 0
    for segment in leaves(text.segments):
        if not isinstance(segment, str):
            continue
        position = lone_surrogate(segment)
        if position is not None:
            raise TokenizerError(surrogate_message(ascii(text), num_before + position))
        num_before += len(segment)
