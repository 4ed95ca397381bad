"""The results of a batch of rows, in the shape of the trainer, and the account of the tokens that they took."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Account:
    """The tokens of a batch.

    Attributes:
        tokens_given: the real tokens of all rows.
        tokens_distinct: the distinct ones among them: a token is the same where all tokens before it are the same, too.
        tokens_forwarded: those that went through the model, tokens that were forwarded again included. The last token
            of a row predicts nothing that is wanted; it is not forwarded unless another row goes on behind it.

    """

    tokens_given: int
    tokens_distinct: int
    tokens_forwarded: int


@dataclass(frozen=True)
class RowScores:
    """The scores of the last columns of a batch, float32, on the device of `input_ids`.

    All are 0 where the mask says padding, and for the first real token of a row, which nothing predicts. They are not
    nan there: a loss multiplies by its mask, and nan times 0 is nan, in the loss and in its gradient.

    Attributes:
        logprobs: log-probabilities of the tokens, nats, `(rows, kept)`.
        entropies: of the distributions that predict the tokens, nats, `(rows, kept)`; None if not asked for.
        top_logprobs, top_ids: the most probable tokens in the place of each token, in falling order, and their
            log-probabilities, `(rows, kept, k)`; None if not asked for. Equal ones may stand in any order.
        given_logprobs: log-probabilities of given tokens in the place of each token, `(rows, kept, k)`; None if not
            asked for.
        account: of the tokens.

    """

    logprobs: Tensor
    entropies: Tensor | None
    top_logprobs: Tensor | None
    top_ids: Tensor | None
    given_logprobs: Tensor | None
    account: Account
