"""Steps of a generation in place: one token more for each of several texts, whose last spans take the tokens in.

Most steps of a generation are like the step before: the same texts, known only to this generation, each one token
longer. Such a step inserts no span into the forest, and makes no plan. The plan of the last step (forest/steps.py) and
its attention advance by one token, and the new rows go into the room behind those of their texts (memory/growth.py).
Any other step is an ordinary evaluation (continuations.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.attention.base import PreparedAttention
from backprompt.evaluation.computation import Computation
from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.forest.span import FAN, Span
from backprompt.forest.steps import StepPlan
from backprompt.memory.blocks import BlockRows, States
from backprompt.memory.growth import Growth, NewRows, takes_tokens_in
from backprompt.model.forwarded import Forwarded
from backprompt.model.graphs import Launched
from backprompt.model.report import Report
from backprompt.transfers import Arriving

Token: TypeAlias = "tuple[Span, int]"
"""The last span of a text, and the token that continues it."""


@dataclass(frozen=True)
class Following:
    """The expected tokens behind those of a step.

    Attributes:
        are_most_probable: whether each text goes on with its most probable token.
        go_on: whether the step after this one will probably continue the same texts, or some of them.
        choose: chooses the tokens by the logits behind given tokens, `(tokens, vocab)`, without waiting for the device:
            returns the chosen ids in the first row of `(numbers, tokens)`. None if the caller chooses later.

    """

    are_most_probable: bool = False
    go_on: bool = False
    choose: Callable[[Sequence[Token], Tensor], Tensor] | None = None


NOTHING_KNOWN = Following()


@dataclass(frozen=True)
class Stepped:
    """The texts of a step in the order of its rows.

    Attributes:
        tokens: the last span and the new token of each text, as given.
        ends: the last span of each text now, with the new token.
        hidden: the final hidden state behind each text, `(texts, hidden)`; None if these must be read from the spans.
        report: the report of the graph that has computed the step; None without a graph.
        chosen: the result of `Following.choose`, where a graph has computed the logits for it.
        logits: the logits behind each text, `(texts, vocab)`, where a graph has computed them, and neither the most
            probable tokens nor `chosen` are enough.

    """

    tokens: Sequence[Token]
    ends: Sequence[Span]
    hidden: Tensor | None
    report: Report | None = None
    chosen: npt.NDArray[Any] | None = None
    logits: Tensor | None = None


@dataclass
class _NextStep:
    """The plan of the next step and its attention, and the number of steps for which both can still be used.

    Attributes:
        plan, attention, num_left: see above.
        goes_on: whether the step before had this plan, too: the texts of a generation, with no other one in between.
        launched: the next step, if it was launched already.

    """

    plan: StepPlan
    attention: PreparedAttention
    num_left: int
    goes_on: bool = False
    launched: Launched | None = None


class Steps:
    """Lets texts take in tokens.

    Args:
        computation: forwards the tokens.
        growth: holds the room for their rows.

    """

    def __init__(self, computation: Computation, growth: Growth) -> None:
        self._computation = computation
        self._growth = growth
        self._num_ahead = 0
        """The number of tokens that were forwarded ahead last."""

    def extend(
        self, owners: Collection[object], tokens: Mapping[Token, TokenScore], following: Following = NOTHING_KNOWN
    ) -> Stepped | None:
        """Forward a token behind each of several texts, and let the texts take it in.

        A text whose last span cannot take a token in gets a new span.

        Args:
            owners: the owners of the texts, as given to `Holders.let_grow`.
            tokens: the score of each token. A text may have several continuations.
            following: the expected tokens of the next step.

        Returns:
            The texts after the step. None if the step is not possible for all of them; then no text has changed.

        """
        computation, forest = self._computation, self._computation.forest
        growing = self._growing(owners, tokens)
        if growing is None:
            return None
        is_mixed = len(growing) < len(tokens)
        step = self._mixed_step(tokens, growing) if is_mixed else self._next_step(growing)
        forest.next_step = None
        plan = step.plan
        if not is_mixed:
            plan.begin([growing[end] for end in plan.ends])
        started = time.perf_counter()
        with computation.blaming_weights():
            forwarded = self._forwarded(step, is_mixed=is_mixed)
        executor, in_order = computation.executor, plan.tokens
        logits, token_ids, arriving = self._chosen(forwarded, in_order, following)
        behind = self._launched_behind(step, forwarded, following, token_ids)
        # The rest of the host's work is done while the device computes.
        scores = TokenScores.of([tokens[token] for token in in_order], executor.logprob_dtype, executor.device)
        states = States.of_scored(forwarded.hidden, scores.logprobs, scores.is_argmax)
        if not forwarded.is_finite:
            return None  # an ordinary evaluation finds the text to blame
        counters = computation.counters
        computation.note_work(forwarded.work)  # before the spans grow: snapshots lie at their ends
        counters.steps[forwarded.way] += 1
        counters.tokens_computed += len(tokens)
        counters.seconds += time.perf_counter() - started
        ends = self._keep(plan, in_order, growing, forwarded, states)
        computation.memory.touch(ends)
        report = None if forwarded.launched is None else forwarded.launched.report
        most_probable = None if report is None else report.most_probable
        if most_probable is not None:
            counters.logit_rows += len(tokens)
        chosen = None if arriving is None else arriving.numbers()
        if not is_mixed:
            plan.advance()
            step.num_left -= 1
            if behind is not None and most_probable is not None:
                known = most_probable.token_ids if chosen is None else chosen[0].astype(np.int64).tolist()
                step.launched = behind.with_tokens(known)
            forest.next_step = step
        return Stepped(in_order, ends, None if forwarded.are_placed else forwarded.hidden, report, chosen, logits)

    def end(self, ends: Iterable[Span]) -> None:
        """Forget the next step's plan, which keeps rows alive, if all its texts ended or the budget is exceeded."""
        step = self._computation.forest.next_step
        if self._computation.memory.is_exceeded() or (
            isinstance(step, _NextStep) and set(ends).issuperset(step.plan.ends)
        ):
            self._computation.forest.next_step = None
            self._note_dropped(0)

    def _growing(self, owners: Collection[object], tokens: Collection[Token]) -> dict[Span, int] | None:
        """Return the spans that take a token in, each with its token; None if this is not possible for some text."""
        computation = self._computation
        if not tokens or len(tokens) > computation.max_tokens:
            return None
        if computation.memory.is_exceeded() or computation.memory.is_scattered:
            return None
        parting = {end for end, count in Counter(map(itemgetter(0), tokens)).items() if count > 1}
        of_others = computation.holders.others(owners)
        growing: dict[Span, int] = {}
        for end, token_id in tokens:
            if takes_tokens_in(end) and end not in parting and end not in of_others:
                growing[end] = token_id
            elif token_id in end.children or FAN in end.children or not end.is_held(with_keys_values=True):
                return None  # an ordinary evaluation finds the token there, or unfolds the fan
        return growing

    def _forwarded(self, step: _NextStep, *, is_mixed: bool) -> Forwarded:
        """Return the output of a step: the one that was launched ahead, if it is the same step.

        `is_mixed`: whether some of the texts get new spans, which keep the rows of the output.
        """
        executor, plan, launched = self._computation.executor, step.plan, step.launched
        step.launched = None
        if launched is not None and executor.steps is not None and executor.steps.take(launched, plan.pass_.token_ids):
            self._note_dropped(len(launched.rows))
            return Forwarded.of(launched)
        self._note_dropped(0)
        places = (lambda: None) if is_mixed else partial(self._growth.places, plan.ends)
        return executor.step(plan.pass_, step.attention, places)

    def _launched_behind(
        self, step: _NextStep, forwarded: Forwarded, following: Following, token_ids: Tensor | None
    ) -> Launched | None:
        """Launch the step behind one that a graph computes, if its tokens are known on the device.

        `token_ids`: the tokens; None if each text takes its most probable token, or the tokens are not known.
        """
        captured, are_known = self._computation.executor.steps, following.are_most_probable or token_ids is not None
        is_expected = following.go_on and step.goes_on and step.num_left > 1
        if captured is None or forwarded.launched is None or not (are_known and is_expected):
            return None
        behind = captured.launch_behind(forwarded.launched, step.attention, token_ids)
        if behind is not None:
            self._num_ahead = len(behind.rows)
        return behind

    def _note_dropped(self, num_taken: int) -> None:
        """Count the tokens that were forwarded ahead, except those that texts have taken."""
        self._computation.counters.tokens_dropped += self._num_ahead - num_taken
        self._num_ahead = 0

    def _next_step(self, ends: Collection[Span]) -> _NextStep:
        """Return the next step of texts that all take a token in: the step after the last one, or a new plan."""
        step = self._computation.forest.next_step
        if isinstance(step, _NextStep) and step.num_left:
            rows = step.plan.rows_of(ends)
            are_all = len(rows) == len(step.plan.ends)
            if not are_all:
                step.plan.keep(rows)
                step.launched = None if step.launched is None else step.launched.kept(rows)
            if len(rows) == len(ends) and step.plan.is_current():
                step.attention.advance(None if are_all else rows)
                step.goes_on = True
                return step
        self._make_room(ends)
        return self._planned([(end, 0) for end in ends], self._growth.num_steps(ends))

    def _mixed_step(self, tokens: Iterable[Token], growing: Collection[Span]) -> _NextStep:
        """Return a step that adds spans; so the step after it is planned anew."""
        self._make_room(growing)
        return self._planned(tokens, 1)

    def _make_room(self, ends: Collection[Span]) -> None:
        self._computation.memory.add(self._growth.make_room(ends))

    def _planned(self, tokens: Iterable[Token], num_steps: int) -> _NextStep:
        computation = self._computation
        to_come = [Span((token_id,), end.stop, end) for end, token_id in tokens]
        plan = StepPlan(to_come, computation.tile_tokens)
        return _NextStep(plan, computation.executor.prepare(plan.pass_, num_steps), num_steps)

    @staticmethod
    def _chosen(
        forwarded: Forwarded, tokens: Sequence[Token], following: Following
    ) -> tuple[Tensor | None, Tensor | None, Arriving | None]:
        """Return a graph's logits, or the tokens that are chosen by them, and all results of the choice."""
        launched = forwarded.launched
        logits = None if launched is None or following.are_most_probable else launched.logits()
        if logits is None or following.choose is None:
            return None if logits is None else logits.clone(), None, None
        chosen = following.choose(tokens, logits)
        return None, chosen[0].to(torch.int64), Arriving(chosen)

    def _keep(
        self, plan: StepPlan, tokens: Sequence[Token], growing: Container[Span], forwarded: Forwarded, states: States
    ) -> Sequence[Span]:
        """Let spans hold the rows of a step; return the last span of each text."""
        forest, memory, growth = self._computation.forest, self._computation.memory, self._growth
        keys_values = forwarded.keys_values
        rows = [row for row, (end, _) in enumerate(tokens) if end in growing]
        grown = [tokens[row] for row in rows]
        new_rows = NewRows(rows, keys_values, states, forwarded.are_placed)
        growth.extend([end for end, _ in grown], [token_id for _, token_id in grown], new_rows)
        ends = list(plan.ends)
        evaluation = forest.stamp()
        for row, (before, token_id) in enumerate(tokens):
            if before not in growing:
                end = ends[row] = plan.pass_.spans[row]
                with forest.changing():
                    before.add_child(token_id, end)
                    end.place(keys_values=BlockRows(keys_values, row, row + 1), states=BlockRows(states, row, row + 1))
                    end.was_computed = True
            ends[row].computed_in = evaluation
        new = {end: before for end, before in zip(ends, plan.ends, strict=True) if end is not before}
        if new:
            memory.add([keys_values, states])
            growth.note_pass(new)
            memory.add(growth.release(new))
        return ends
