"""Look-ahead without a second model: tokens that followed the last tokens earlier in the text may follow them again.

"Prompt lookup decoding" (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding), after "Fast Inference
from Transformers via Speculative Decoding" (Leviathan et al. 2023, arXiv 2211.17192). Several proposals are tried at
once: they are branches of a tree, forwarded in the pass that forwards the last token. The chosen tokens do not change:
each is chosen by the same rules from the same logits, which only may be there earlier. The number of proposed tokens is
halved when none was right, and doubled, up to the number asked for, when one was, as transformers does for an assistant
model.
"""

from __future__ import annotations

from torch import Tensor

MAX_PROPOSALS = 3
"""The number of continuations tried at once."""

DEFAULT_NGRAM = 2
"""The largest number of last tokens to look up, where the options do not say."""


def proposals(ids: Tensor, num_tokens: int, max_ngram: int) -> list[tuple[int, ...]]:
    """Return possible continuations of `(tokens,)` ids: the ids that followed the last n of them earlier.

    Longer n-grams come first, and of one length the latest; no proposal is a beginning of another.

    Args:
        ids: a text's ids.
        num_tokens: the largest number of tokens in a proposal.
        max_ngram: the largest n.

    """
    found: list[tuple[int, ...]] = []
    for size in range(min(max_ngram, len(ids) - 1), 0, -1):
        is_match = (ids.unfold(0, size, 1)[:-1] == ids[-size:]).all(dim=1)
        for start in reversed(is_match.nonzero()[:, 0].tolist()):
            following = tuple(ids[start + size : start + size + num_tokens].tolist())
            if any(other[: len(following)] == following for other in found):
                continue
            found = [other for other in found if following[: len(other)] != other]
            found.append(following)
            if len(found) == MAX_PROPOSALS:
                return found
    return found
