"""Steps of a generation in place: one token more for each of several texts, whose last spans take the tokens in.

Most steps of a generation are like the step before: the same texts, of which nobody else knows yet, each one token
longer. Such a step inserts nothing into the forest and plans nothing: the plan of the last step (forest/steps.py) and
its attention go on by one, and the new rows go into the room behind those of their texts (memory/growth.py). A step
that cannot go this way goes the way of all evaluations (continuations.py).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from backprompt.attention.base import PreparedAttention
from backprompt.evaluation.computation import Computation
from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.forest.plan import Pass
from backprompt.forest.span import Span
from backprompt.forest.steps import StepPlan
from backprompt.memory.blocks import States
from backprompt.memory.growth import Growth, NewRows, takes_tokens_in
from backprompt.memory.places import Places
from backprompt.model.executor import Forwarded


@dataclass(frozen=True)
class Stepped:
    """The texts of a step in the order of its rows, and the final hidden state behind each, `(texts, hidden)`."""

    ends: Sequence[Span]
    hidden: Tensor


@dataclass
class _NextStep:
    """The plan of the next step and its attention, and for how many steps these serve."""

    plan: StepPlan
    attention: PreparedAttention
    num_left: int


class Steps:
    """Lets texts take in tokens.

    Args:
        computation: forwards the tokens.
        growth: has the room for their rows.

    """

    def __init__(self, computation: Computation, growth: Growth) -> None:
        self._computation = computation
        self._growth = growth

    def extend(self, owner: object, tokens: Mapping[Span, tuple[int, TokenScore]]) -> Stepped | None:
        """Forward a token behind each of several texts, and let the texts take it in.

        Args:
            owner: that of the texts, as given to `Holders.let_grow`.
            tokens: by the last span of each text, the token and its score.

        Returns:
            None if this is not possible for all of them; then nothing has changed.

        """
        computation, forest = self._computation, self._computation.forest
        if not self._can_extend(owner, tokens):
            return None
        step = self._next_step(tokens)
        forest.next_step = None
        plan = step.plan
        token_ids = [tokens[end][0] for end in plan.ends]
        plan.begin(token_ids)
        places = self._growth.places(plan.ends)
        forwarded = self._forward(plan.pass_, step.attention, places)
        if not forwarded.is_finite:
            return None
        executor = computation.executor
        scores = TokenScores.of([tokens[end][1] for end in plan.ends], executor.logprob_dtype, executor.device)
        states = States.of_scored(forwarded.hidden, scores.logprobs, scores.is_argmax)
        new = NewRows(forwarded.keys_values, states, places, forwarded.are_placed)
        self._growth.extend(plan.ends, token_ids, new)
        evaluation = forest.stamp()
        for end in plan.ends:
            end.computed_in = evaluation
        computation.memory.touch(plan.ends)
        plan.advance()
        step.num_left -= 1
        forest.next_step = step
        return Stepped(plan.ends, forwarded.hidden)

    def _forward(self, pass_: Pass, attention: PreparedAttention, places: Places) -> Forwarded:
        """Forward the tokens that texts go on with, and count them, unless something is not finite."""
        computation, started = self._computation, time.perf_counter()
        with computation.blaming_weights():
            forwarded = computation.executor.step(pass_, attention, places)
        if forwarded.is_finite:
            computation.counters.forward_passes += 1
            computation.counters.tokens_computed += len(pass_.spans)
            computation.counters.seconds += time.perf_counter() - started
        return forwarded

    def end(self, ends: Iterable[Span]) -> None:
        """Forget the plan of texts that have ended, or that keeps rows in memory while there is too little."""
        step = self._computation.forest.next_step
        if self._computation.memory.is_exceeded() or (
            isinstance(step, _NextStep) and set(ends).issuperset(step.plan.ends)
        ):
            self._computation.forest.next_step = None

    def _can_extend(self, owner: object, tokens: Collection[Span]) -> bool:
        """Return whether the texts can take tokens in."""
        computation = self._computation
        if not tokens or len(tokens) > computation.max_tokens:
            return False
        if computation.memory.is_exceeded() or computation.memory.is_scattered:
            return False
        return computation.holders.others(owner).isdisjoint(tokens) and all(map(takes_tokens_in, tokens))

    def _next_step(self, tokens: Collection[Span]) -> _NextStep:
        """Return the next step of these texts: the one after the last, or a new one."""
        computation, step = self._computation, self._computation.forest.next_step
        if isinstance(step, _NextStep) and step.num_left:
            rows = step.plan.rows_of(tokens)
            are_all = len(rows) == len(step.plan.ends)
            if not are_all:
                step.plan.keep(rows)
            if len(rows) == len(tokens) and step.plan.is_current():
                step.attention.advance(None if are_all else rows)
                return step
        computation.memory.add(self._growth.make_room(tokens))
        num_steps = self._growth.num_steps(tokens)
        plan = StepPlan(list(tokens), computation.tile_tokens)
        return _NextStep(plan, computation.executor.prepare(plan.pass_, num_steps), num_steps)
