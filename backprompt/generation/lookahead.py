"""Look-ahead without a second model: what followed the last tokens where they stood before may follow them again.

"Prompt lookup decoding" (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding), after "Fast Inference
from Transformers via Speculative Decoding" (Leviathan et al. 2023, arXiv 2211.17192). Several proposals are tried at
once: they are branches of a tree, forwarded in the pass that forwards the last token. What is chosen does not change:
each token is chosen by the same rules from the same logits, which only may be there already. How many tokens are
proposed is halved when none was right, and doubled up to what was asked for when one was, as transformers does it for
an assistant model.
"""

from __future__ import annotations

from torch import Tensor

MAX_PROPOSALS = 3
"""How many continuations are tried at once."""

DEFAULT_NGRAM = 2
"""How many last tokens are looked up at most, where the options do not say."""


def proposals(ids: Tensor, num_tokens: int, max_ngram: int) -> list[tuple[int, ...]]:
    """Return what may follow `(tokens,)` ids: what followed their last n tokens before.

    Longer n-grams first, of one length the latest first; none is a beginning of another.

    Args:
        ids: a text's ids.
        num_tokens: how many tokens to propose at most, each time.
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
