"""Which tokens the segments of a text became, and what a join between two of them changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Join:
    """A place where two strings meet and the tokens around it depend on that.

    Attributes:
        segment_idx: index of the segment that begins here, counting strings and runs of token ids in written order.
        left: the string of the run before the join.
        right: the segment after it.
        split_tokens: the ids around the join if both sides are encoded apart; the common ids at both ends left out. Of
            a tokenizer that encodes no continuations, the ids of the left side only, from the first that changes on.
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


@dataclass(frozen=True)
class Extent:
    """Which tokens of a text a segment became. A token that spans a join belongs to the segment behind the join.

    Attributes:
        segment: a string or token ids; what stands in the branches of groups is segments of their own.
        start, stop: the first token and the one behind the last, counted in `text.tokens`. Special tokens belong to the
            segment that they stand next to.
        replaced: the ids from `start` on of what stands before this segment if it is encoded without it: those that the
            join with this segment changed.
        is_join_changed: whether its ids and those of what stands before it are others than those of both apart.
        num_special: how many of its first tokens are special ones, of the text or branch that begins with it, or with
            the group that begins with it.

    """

    segment: str | tuple[int, ...]
    start: int
    stop: int
    replaced: tuple[int, ...] = ()
    is_join_changed: bool = False
    num_special: int = 0
