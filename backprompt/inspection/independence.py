"""The gap between a declared independence and full attention: the same tokens, evaluated both ways."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from backprompt.bound import as_lm, bound_lm, evaluate, lm_of
from backprompt.text.checks import listed_texts
from backprompt.text.node import Text, lazily
from backprompt.tokens.adapted import number_of, plain
from backprompt.tokens.graph import flat


@dataclass(frozen=True)
class IndependenceGap:
    """The effect of declaring segments independent on the distribution of the next token, for each text.

    Attributes:
        divergences: Kullback-Leibler divergence of the distribution under the declared mask from that under full
            attention, `sum p_full log(p_full / p_declared)`, nats; inf if a token is possible under full
            attention alone.
        argmax_changed: whether the most probable next tokens differ.

    """

    divergences: tuple[float, ...]
    argmax_changed: tuple[bool, ...]

    @property
    def mean_divergence(self) -> float:
        """The mean of `divergences`, nats."""
        return sum(self.divergences) / len(self.divergences)

    @property
    def share_changed(self) -> float:
        """The share of texts whose most probable next token is another one, between 0 and 1."""
        return sum(self.argmax_changed) / len(self.argmax_changed)

    def __str__(self) -> str:
        return (
            f"{len(self.divergences)} texts: mean divergence {self.mean_divergence:.3g} nats (largest "
            f"{max(self.divergences):.3g}), another most probable token in {self.share_changed:.0%}"
        )


def independence_gap(texts: Text | Iterable[Text], *, show_progress_bar: bool | None = None) -> IndependenceGap:
    """Compare texts that have groups or frozen segments with full attention over the same tokens in written order.

    Both versions are evaluated, which costs an extra plain forward of each text. `show_progress_bar` is that of
    `evaluate`.

    Raises:
        ValueError: there are no texts.
        GroupError: a text ends in a group, so that it has no next token.
        The errors of `evaluate`; under full attention every token takes a position.

    """
    declared = listed_texts(texts, "independence_gap")
    for idx, text in enumerate(declared):
        lm_of(text, idx).session.prompt_ids([text])  # refuses a text that ends in a group
    full = list(map(_in_written_order, declared))
    divergences, argmax_changed = [], []
    reprs = evaluate([*declared, *full], show_progress_bar=show_progress_bar)
    for ours, others in zip(reprs[: len(full)], reprs[len(full) :], strict=True):
        by_mask, by_all = (r.logits.cpu().double().log_softmax(dim=-1) for r in (ours, others))
        terms = by_all.exp() * (by_all - by_mask)
        divergences.append(float(terms.where(by_all > -math.inf, 0.0).sum()))  # a token of probability 0 adds nothing
        argmax_changed.append(bool(by_mask.argmax() != by_all.argmax()))
    return IndependenceGap(tuple(divergences), tuple(argmax_changed))


def _in_written_order(text: Text) -> Text:
    """Return a text of the same tokens and adapters in which each token sees all tokens before it."""
    lm = as_lm(bound_lm(text, "a representation"))
    with lm.session.exclusive(), lazily():
        lm.session.current()
        (token_ids,) = lm.session.encoder.encode([text])
        whole = Text("", lm, add_special_tokens=False)
        for number, run in itertools.groupby(flat(token_ids), key=number_of):
            part = Text.from_tokens(plain(tuple(run)), lm)
            whole += part.with_adapter(lm.session.evaluator.executor.adapters.name_of(number)) if number else part
        return whole
