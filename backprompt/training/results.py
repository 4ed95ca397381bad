"""The results of a batch of rows, in the shape of the trainer, and the account of the batch's tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Account:
    """The numbers of tokens of a batch.

    Attributes:
        tokens_given: the real tokens of all rows.
        tokens_distinct: the distinct tokens among them: two tokens are the same if all tokens before them are the same,
            too.
        tokens_forwarded: the tokens that went through the model, with repeats. The last token of a row predicts no
            wanted token, so it is not forwarded unless another row continues behind it.

    """

    tokens_given: int
    tokens_distinct: int
    tokens_forwarded: int


@dataclass(frozen=True)
class RowScores:
    """The scores of the last columns of a batch, float32, on the device of `input_ids`.

    All scores are 0 at padding, and for the first real token of a row, which has no prediction. They are not nan there:
    a loss multiplies by its mask, and nan times 0 is nan, in the loss and in its gradient.

    Attributes:
        logprobs: log-probabilities of the tokens, nats, `(rows, kept)`.
        entropies: entropies of the distributions that predict the tokens, nats, `(rows, kept)`; None if not requested.
        top_logprobs, top_ids: log-probabilities and ids of the most probable tokens at each token's position, in
            falling order, `(rows, kept, k)`; None if not requested. Tokens of equal probability stand in any order.
        given_logprobs: log-probabilities of given tokens at each token's position, `(rows, kept, k)`; None if not
            requested.
        account: the numbers of tokens.

    """

    logprobs: Tensor
    entropies: Tensor | None
    top_logprobs: Tensor | None
    top_ids: Tensor | None
    given_logprobs: Tensor | None
    account: Account
