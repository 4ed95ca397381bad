"""Scores of padded batches without gradients: each distinct token is forwarded once, each distinct row scored once.

The rows go to the evaluator as tuples of ids; no `Text` is built. If only log-probabilities at temperature 1 are
requested, they are read from the scores that the forest keeps, as by `LM.token_logprobs`. All other results are read
from the distributions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backprompt.arguments import as_bool
from backprompt.errors import TokenIdError
from backprompt.evaluation.distributions import Asked, Distributions
from backprompt.evaluation.reading import Wanted
from backprompt.lm import LM
from backprompt.model.levels import check_packed
from backprompt.session.distributions import as_temperature, as_top_k, distributions_of_ids
from backprompt.session.limits import TextLimits
from backprompt.session.session import Session
from backprompt.training.gradients import distributions
from backprompt.training.models import fit, goes_as_with_gradients, scorer_of
from backprompt.training.results import Account, RowScores
from backprompt.training.rows import PaddedRows
from backprompt.training.trie import num_distinct


def token_logprobs(
    lm_or_model: LM | nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    logits_to_keep: int | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    top_k: int | None = None,
    token_ids: Tensor | None = None,
    requires_grad: bool = False,
    max_tokens_per_forward: int | None = None,
) -> RowScores:
    """Return the log-probabilities of a padded batch's tokens, with each distinct token forwarded once.

        scores = token_logprobs(model, input_ids, attention_mask, logits_to_keep=completion_ids.size(1))
        scores.logprobs  # (rows, logits_to_keep)

    Column j of the results belongs to `input_ids[:, -kept + j]`, given the tokens before it in its row. Rows with a
    common beginning, such as completions of one prompt, share the work for it, in any order of rows and with padding on
    either side. Each row's numbers are those of a plain call on the row's own tokens; positions count from the row's
    first real token. An `LM` computes in the dtype of the weights, without autocast. A model under the caller's
    autocast, or with weights in half precision, gives the same numbers with and without gradients, to the bit.

    With `requires_grad=True` the results have an autograd graph behind them, down to the model's own parameters. Each
    distinct token goes backward once, too. The model runs in its own mode and under the caller's autocast, and
    recomputes its layers in the backward if gradient checkpointing is on.

    Args:
        lm_or_model: an `LM`, which keeps its results for later calls, within its budget; or a causal LM of
            transformers, adapters included, whose results are not kept between calls.
        input_ids: `(rows, columns)`, integers; any number where the mask is 0.
        attention_mask: `(rows, columns)`, 1 for real tokens and 0 for padding; None for no padding. The real tokens of
            a row stand together.
        logits_to_keep: the number of last columns that are scored; None for all columns.
        temperature: divides the logits.
        entropy: whether to return entropies, at the temperature.
        top_k: the number of most probable tokens to return, with their log-probabilities; None: no such tokens.
        token_ids: other tokens to score at each token's position, `(rows, kept, k)`; any number at padding. None: no
            other tokens.
        requires_grad: whether the results have an autograd graph, see above.
        max_tokens_per_forward: for a model, the largest number of tokens in one packed pass; see `LM`. With gradients
            None means no limit. Under a limit a batch goes through the model in parts, and the backward computes the
            parts again, one after the other; beginnings that several parts share are forwarded for each part.

    Raises:
        TypeError, ValueError: a value is not as described; the message names it.
        TokenIdError: the model has no such token id.
        TextTooLongError: a row has more tokens than the model has positions.
        UnsupportedModelError: the model cannot be evaluated exactly, or dropout is active in it.
        NonFiniteError: the model returned NaN or infinity. With gradients, and in half precision, such numbers are
            returned without an error, except in the probe before a model's first call.

    """
    as_bool(requires_grad, "requires_grad")
    lm, keeps_results = scorer_of(lm_or_model, max_tokens_per_forward, requires_grad)
    session = lm.session
    goes_through_lm = not requires_grad and (keeps_results or not goes_as_with_gradients(session.model))
    max_tokens = session.options.max_tokens_per_forward if keeps_results else max_tokens_per_forward
    try:
        with session.exclusive():
            session.current()
            if not keeps_results:
                fit(session, max_tokens)
            if not goes_through_lm:
                session.evaluator.computation.probe_once()
                if requires_grad:
                    check_packed(session.evaluator.executor.levels, "Gradients")
                goes_through_lm = session.evaluator.executor.levels is not None
            rows = PaddedRows.of(input_ids, attention_mask, logits_to_keep, session.limits.model.num_embeddings)
            if not goes_through_lm:  # an LM checks this itself
                session.limits.model.check_placeholders(rows.token_ids.tolist())
            check_lengths(session.limits, rows)
            asked = Asked(
                temperature=as_temperature(temperature),
                entropy=as_bool(entropy, "entropy"),
                top_k=None if top_k is None else as_top_k(session, top_k, "top_k"),
                given=None if token_ids is None else _given(session, rows, token_ids),
            )
            if goes_through_lm:
                return _scores(session, rows, asked)
        return _scores_of_model(session.model, rows, asked, max_tokens, requires_grad=requires_grad)
    finally:
        if not keeps_results:
            session.clear()


def _scores(session: Session, rows: PaddedRows, asked: Asked) -> RowScores:
    num_before = session.counters.tokens_computed
    numbers = (rows.lengths > rows.starts).nonzero()[0].tolist()  # of the rows with targets
    texts, starts = [rows.ids_of(row) for row in numbers], rows.starts[numbers].tolist()
    found = _read(session, texts, starts, asked)
    return _results(rows, found, session.counters.tokens_computed - num_before)


def _scores_of_model(
    model: nn.Module, rows: PaddedRows, asked: Asked, max_tokens: int | None, *, requires_grad: bool
) -> RowScores:
    """Return the scores by the user's own model, in its own modes and under the caller's autocast."""
    if requires_grad and not torch.is_grad_enabled():
        raise ValueError(
            "requires_grad=True makes an autograd graph, but the call stands under torch.no_grad() or "
            "torch.inference_mode(). Leave that context, or give requires_grad=torch.is_grad_enabled()."
        )
    with torch.set_grad_enabled(requires_grad):
        found, num_forwarded = distributions(model, rows, asked, max_tokens)
        return _results(rows, found, num_forwarded)


def _results(rows: PaddedRows, found: Distributions, num_forwarded: int) -> RowScores:
    return RowScores(
        logprobs=rows.scattered(found.logprobs.to(torch.float32)),
        entropies=_scattered(rows, found.entropies),
        top_logprobs=_scattered(rows, found.top_logprobs),
        top_ids=None if found.top_ids is None else rows.scattered(found.top_ids),
        given_logprobs=_scattered(rows, found.given_logprobs),
        account=Account(len(rows.token_ids), num_distinct(rows.split()), num_forwarded),
    )


def _scattered(rows: PaddedRows, values: Tensor | None) -> Tensor | None:
    return None if values is None else rows.scattered(values.to(torch.float32))


def _read(session: Session, texts: Sequence[tuple[int, ...]], starts: Sequence[int], asked: Asked) -> Distributions:
    """Return the requested results for the tokens of each row from its start on, row after row."""
    if asked.is_plain:
        session.counters.tokens_requested += sum(map(len, texts))
        scored = session.evaluator.scoring.token_scores(texts, starts, [None] * len(texts))
        return Distributions(scored.scores.logprobs, None, None, None, None)
    wanted = [Wanted(ids[:-1], start, ids[-1:]) for ids, start in zip(texts, starts, strict=True)]
    return distributions_of_ids(session, wanted, asked)


def check_lengths(limits: TextLimits, rows: PaddedRows, num_unused: int = 1) -> None:
    """Raise TextTooLongError for the first row that does not fit; its last `num_unused` tokens take no position."""
    if limits.model.max_tokens is None:
        return
    for row in (rows.lengths - num_unused > limits.model.max_tokens).nonzero()[0].tolist():
        num_tokens = int(rows.lengths[row])
        limits.check_length(f"Row {row} of input_ids", num_tokens, num_tokens - num_unused)


def _given(session: Session, rows: PaddedRows, token_ids: Tensor) -> Tensor:
    """Return the given tokens of each target, `(targets, k)`, on the model's device.

    Raises:
        TypeError, ValueError: the tokens are not integers, or have another shape.
        TokenIdError: the model's head has no such token.

    """
    if not isinstance(token_ids, Tensor) or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        kind = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
        raise TypeError(f"token_ids must be a tensor of integers (rows, kept, k), not {kind}.")
    if token_ids.dim() != 3:
        raise ValueError(f"token_ids must have the shape (rows, kept, k), not {tuple(token_ids.shape)}.")
    executor = session.evaluator.executor
    given = rows.of_targets(token_ids, "token_ids").to(executor.device, torch.int64)
    if given.numel():
        lowest, highest = torch.stack([given.amin(), given.amax()]).tolist()
        if lowest < 0 or highest >= executor.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise TokenIdError(
                f"token_ids has {wrong} in the place of a scored token, but the model's head has tokens 0 to "
                f"{executor.vocab_size - 1}."
            )
    return given
