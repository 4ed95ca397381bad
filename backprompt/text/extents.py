"""The tokens of each segment of a text, and the tokens that a join between two segments changed."""

from __future__ import annotations

from dataclasses import dataclass

from backprompt.text.segments import Adapted, Leaf


@dataclass(frozen=True)
class Join:
    """A place where two strings meet and change the tokens around it.

    Attributes:
        segment_idx: index of the segment that begins here, counting strings and runs of token ids in written order.
        left: the adjacent strings before the join, as one string.
        right: the string after the join.
        split_tokens: the ids around the join if both sides are encoded separately, without the ids at both ends that
            the joined string has too. For a tokenizer that cannot encode continuations: the ids of the left side only,
            from the first changed id on.
        joined_tokens: the ids in the joined string, in place of `split_tokens`.

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


@dataclass(frozen=True)
class Extent:
    """The tokens of a segment of a text. A token that spans a join belongs to the segment behind the join.

    Attributes:
        segment: a string or token ids, or either with its adapter (`Adapted`); each segment inside the branches of a
            group has an extent of its own.
        start, stop: indices into `text.tokens`: of the first token, and of the token behind the last one. Special
            tokens belong to the segment next to them.
        replaced: the ids that the join with this segment changed: those from `start` on, if the text before this
            segment is encoded without the segment.
        is_join_changed: whether the ids of this segment and the text before it, encoded together, differ from the ids
            of both encoded separately.
        num_special: the number of special tokens at the start of the segment; they belong to the text, branch or group
            that begins with this segment.

    """

    segment: Leaf | Adapted
    start: int
    stop: int
    replaced: tuple[int, ...] = ()
    is_join_changed: bool = False
    num_special: int = 0
