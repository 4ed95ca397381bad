"""Advancing: the next token of every live text of several runs, forwarded in one pass, and the logits behind it.

A run is continued by its own thread, but its step may be done along with steps of other threads' runs. So `advance`
only computes, and changes no run. Each run takes its results, and chooses its tokens itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from backprompt.evaluation.evaluator import Evaluator
from backprompt.evaluation.scores import TokenScore
from backprompt.evaluation.steps import Following, Stepped, Token
from backprompt.forest.span import Span
from backprompt.generation.choosing import Logits, choices_of, needs_only_scores
from backprompt.generation.decoding import TextDecoding
from backprompt.generation.found import Choice
from backprompt.generation.live import Live
from backprompt.tokens.graph import TokenIds, with_more


class Advancing(Protocol):
    """A run whose live texts are continued with one token each."""

    @property
    def live(self) -> Sequence[Live]:
        """The live texts."""

    @property
    def num_steps(self) -> int:
        """The number of steps done so far."""

    @property
    def following(self) -> Following:
        """The expected tokens behind the next ones of the live texts, of which there must be one."""

    def to_begin(self, evaluator: Evaluator) -> Sequence[TokenIds]:
        """Return the waiting texts that begin now."""


@dataclass(frozen=True)
class Advance:
    """The results for a step of a run.

    Attributes:
        num_steps: the number of steps that the run had done before.
        tokens: the next token of each live text.
        grown: for each live text the end of its continuation with the next token, and the position behind the end.
        are_inserted: whether these ends are new spans, which have not absorbed the spans before them.
        begun: the ends of the texts that begin now.
        rows: the row of logits of each text: first the live texts, then the texts that begin now.
        logits: the logits behind the texts of all runs.

    """

    num_steps: int
    tokens: Sequence[Choice]
    grown: Sequence[tuple[Span, int]]
    are_inserted: bool
    begun: Sequence[Span]
    rows: Sequence[int]
    logits: Logits


@dataclass(frozen=True)
class _Grown:
    """The ends of live texts with their next tokens.

    Attributes:
        ends: the end of each text.
        distinct: the distinct ends.
        are_inserted: see `Advance`.
        hidden: the final hidden states behind the distinct ends, `(ends, hidden)`; None if these must be read.
        stepped: the step in place, if there was one; its texts are the distinct ends.

    """

    ends: Sequence[Span]
    distinct: Sequence[Span]
    are_inserted: bool
    hidden: Tensor | None = None
    stepped: Stepped | None = None


def advance(evaluator: Evaluator, runs: Sequence[tuple[Advancing, Sequence[Choice]]]) -> list[Advance]:
    """Forward the next token of every live text, begin waiting texts, and return the logits behind all of them.

    Args:
        evaluator: the evaluator of all runs.
        runs: each run with the next tokens of its live texts.

    Raises:
        StaleRepresentationError: the model's weights have changed meanwhile.
        NonFiniteError: the model returned NaN or infinity for a text of any run.

    """
    grown = _grown(evaluator, runs)
    waiting = [run.to_begin(evaluator) for run, _ in runs]
    prompts = [prompt for own in waiting for prompt in own]
    with evaluator.holders.using(grown.distinct):
        begun = evaluator.continuations.begin(prompts) if prompts else []
    new = list(dict.fromkeys(begun))
    ends = [*grown.distinct, *new]
    found_by_graph = None if new else _found_by_graph(grown.stepped)
    logits = _logits(evaluator, grown, new) if found_by_graph is None else found_by_graph
    report = None if grown.stepped is None or found_by_graph is None else grown.stepped.report
    are_same = None if report is None else report.are_weights_same
    evaluator.computation.check_unchanged(are_same)  # before any token is chosen by these logits
    row_of = {end: row for row, end in enumerate(ends)}
    found: list[Advance] = []
    grown_ends, begun_ends = iter(grown.ends), iter(begun)
    for (run, tokens), own in zip(runs, waiting, strict=True):
        lives = [next(grown_ends) for _ in run.live]
        starts = [next(begun_ends) for _ in own]
        rows = [row_of[end] for end in (*lives, *starts)]
        stops = [(end, end.stop) for end in lives]
        found.append(Advance(run.num_steps, tokens, stops, grown.are_inserted, starts, rows, logits))
    return found


def _grown(evaluator: Evaluator, runs: Sequence[tuple[Advancing, Sequence[Choice]]]) -> _Grown:
    """Forward the next token of every live text: in place if all texts can grow in place, else as new spans."""
    texts = [text for run, own in runs for text in zip(run.live, own, strict=True)]
    if not texts:
        return _Grown([], [], are_inserted=False)
    tokens: dict[Token, TokenScore] = {}
    token_of: list[Token] = []
    for live, choice in texts:
        assert live.tip is not None
        token = live.tip, live.base_id + choice.token_id
        token_of.append(token)
        tokens[token] = choice.score
    owners = [run for run, _ in runs]
    pairs = zip(token_of, texts, strict=True)
    decodings = {token: live.decoding for token, (live, _) in pairs if isinstance(live.decoding, TextDecoding)}
    following = _following([run for run in owners if run.live], decodings, len(texts))
    stepped = evaluator.continuations.extend(owners, tokens, len(texts), following)
    if stepped is not None:
        end_of = dict(zip(stepped.tokens, stepped.ends, strict=True))
        ends = [end_of[token] for token in token_of]
        return _Grown(ends, stepped.ends, are_inserted=False, hidden=stepped.hidden, stepped=stepped)
    parts = [(end, (token_id,)) for end, token_id in token_of]
    ends = evaluator.continuations.grow(parts, lambda: [_whole(*text) for text in texts])
    return _Grown(ends, list(dict.fromkeys(ends)), are_inserted=True)


def _following(runs: Sequence[Advancing], decodings: Mapping[Token, TextDecoding], num_texts: int) -> Following:
    """Return the expected tokens behind the next ones of live texts; `decodings`: the text of each next token."""
    expected = [run.following for run in runs]
    are_most_probable, go_on = all(own.are_most_probable for own in expected), all(own.go_on for own in expected)
    # The results for one run are used at once: a text must not draw twice.
    is_alone = len(runs) == 1 and len(decodings) == num_texts
    if are_most_probable or not (is_alone and go_on and needs_only_scores(next(iter(decodings.values())))):
        return Following(are_most_probable, go_on)
    return Following(False, go_on, lambda tokens, logits: choices_of([decodings[token] for token in tokens], logits))


def _found_by_graph(stepped: Stepped | None) -> Logits | None:
    """Return the logits, or the most probable tokens, that a graph has found behind all texts; None without a graph."""
    found = None if stepped is None or stepped.report is None else stepped.report.most_probable
    if stepped is None or found is None or not found.are_of_distributions:
        return None
    if stepped.chosen is not None:
        return Logits([], len(stepped.ends), stepped.chosen.tolist())
    chosen = [found.token_ids, found.logprobs, [1.0] * len(found.token_ids), found.logprobs, found.logits]
    return Logits([] if stepped.logits is None else [stepped.logits], len(stepped.ends), chosen)


def _logits(evaluator: Evaluator, grown: _Grown, new: Sequence[Span]) -> Logits:
    """Return the logits behind grown texts and texts that begin.

    Raises:
        NonFiniteError: a row is not a distribution.

    """
    readout, ends = evaluator.readout, [*grown.distinct, *new]
    if grown.hidden is None:
        hidden = readout.last_hidden(ends)
    else:
        hidden = torch.cat([grown.hidden, readout.last_hidden(new)]) if new else grown.hidden
    return Logits(readout.logits_after(ends, hidden), evaluator.executor.rows_in_a_slice)


def _whole(live: Live, choice: Choice) -> TokenIds:
    """Return all ids of a text with its next token, which is the last one chosen."""
    return with_more(live.prompt_ids, live.forwarded(live.decoding.ahead[0]))
