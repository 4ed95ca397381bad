"""Look-ahead without a second model: if the last tokens occur earlier in the text, the same tokens may follow again.

"Prompt lookup decoding" (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding), after "Fast Inference
from Transformers via Speculative Decoding" (Leviathan et al. 2023, arXiv 2211.17192). Several proposals are tried at
once: they are branches of a tree, forwarded in the pass that forwards the last token. The chosen tokens do not change:
each token is chosen by the same rules from the same logits, which may be available earlier. The number of proposed
tokens is halved if no proposed token was right. Otherwise it is doubled, up to the requested number.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_PROPOSALS = 3
"""The number of continuations tried at once."""

DEFAULT_NGRAM = 2
"""The default for the largest number of last tokens to look up."""


class Ngrams:
    """The ids of a text, and the places of its n-grams.

    Args:
        max_ngram: the largest n.

    """

    def __init__(self, max_ngram: int) -> None:
        self._max_ngram = max_ngram
        self._ids: list[int] = []
        self._stops: dict[tuple[int, ...], list[int]] = {}  # by n-gram, the place behind each, ascending

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Add ids to the text."""
        for token_id in ids:
            stop = len(self._ids)
            for size in range(1, min(self._max_ngram, stop) + 1):
                self._stops.setdefault(tuple(self._ids[stop - size :]), []).append(stop)
            self._ids.append(token_id)

    def proposals(self, num_tokens: int) -> list[tuple[int, ...]]:
        """Return possible continuations of the text: the ids behind earlier occurrences of its last n ids.

        Longer n-grams come first; of equal length, the latest comes first. No proposal is a beginning of another.
        `num_tokens`: the largest number of tokens in a proposal.
        """
        found: list[tuple[int, ...]] = []
        for size in range(min(self._max_ngram, len(self._ids)), 0, -1):
            for stop in reversed(self._stops.get(tuple(self._ids[-size:]), [])):
                following = tuple(self._ids[stop : stop + num_tokens])
                if any(other[: len(following)] == following for other in found):
                    continue
                found = [other for other in found if following[: len(other)] != other]
                found.append(following)
                if len(found) == MAX_PROPOSALS:
                    return found
        return found
