"""Weighed completions of prompts, and the best completion behind each prompt: exhaustively, or best first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from backprompt.classify.completions import EncodedCompletions
from backprompt.classify.discounts import discounts
from backprompt.classify.options import Options
from backprompt.classify.prompts import check_prompt
from backprompt.classify.scoring import PromptsWithCompletions
from backprompt.classify.search import Candidate, Node, Search, make_trie
from backprompt.classify.weighing import (
    Floats,
    Weighing,
    check_normalize,
    checked_prior,
    finite_weight,
    log_of_prior,
)
from backprompt.errors import NonFiniteError
from backprompt.progress import showing
from backprompt.session.text_scores import scores_of_next
from backprompt.tokens.graph import with_more

NODES_AT_A_TIME = 32
"""The largest number of nodes that best-first search expands in one pass. On two cores of a CPU a pass of 32 tokens
takes hardly longer than a pass of a single token."""
MAX_LIVE_SEARCHES = 32

Expanded: TypeAlias = "tuple[int, Search, Node]"
"""The idx of a prompt, its search, and a node that the search expands."""


@dataclass(frozen=True)
class WeighedCompletions:
    """The completions of prompts, and their weighing behind each.

    Attributes:
        pairs: the prompts with their completions.
        weighings: a weighing for each prompt.
        show_progress_bar: whether to show a bar while completions are scored; None: on long work.

    """

    pairs: PromptsWithCompletions
    weighings: Sequence[Weighing]
    show_progress_bar: bool | None

    @classmethod
    def of(cls, pairs: PromptsWithCompletions, options: Options) -> WeighedCompletions:
        """Check the options against the prompts, then score the neutral prompt and the discounts.

        Raises:
            TypeError, ValueError: options that do not fit the prompts; raised before anything is computed.

        """
        if pairs.are_examples:
            options.check_for_examples()
            weighings = [
                Weighing(options.aggregate, log_prior=log_of_prior(example.prior), normalize=example.normalize)
                for example in pairs.examples
            ]
        else:
            weighings = _common_weighings(pairs, options)
        return cls(pairs, weighings, options.show_progress_bar)

    def weights(self) -> Iterator[tuple[Sequence[int], Weighing, Floats]]:
        """Yield neighbouring prompts with common completions and weighing: their idxs, the weighing, and the weights.

        The weights are those of each completion behind each prompt, `(prompts, completions)`.
        """
        for block in self.pairs.scored(self.show_progress_bar):
            own = block.completions
            first = 0
            for weighing, group in itertools.groupby(block.prompt_idxs, key=self.weighings.__getitem__):
                idxs = list(group)
                weights = weighing.weights(own.lengths, block.logprobs[first : first + len(idxs)])
                for idx in np.flatnonzero((weights == np.inf).any(axis=0)).tolist():
                    finite_weight(np.inf, own.strings[idx])
                yield idxs, weighing, weights
                first += len(idxs)

    def probabilities(self) -> Iterator[Floats]:
        """Yield, for each prompt, the probability of each completion, `(completions,)`."""
        for idxs, weighing, weights in self.weights():
            if weighing.normalize:
                self._check_possible(idxs, weights)
            yield from weighing.probabilities(weights)

    def exhaustive(self) -> list[int]:
        """Return, for each prompt, the idx of the completion with the highest weight; of equal weights, the first."""
        best: list[int] = []
        for idxs, _, weights in self.weights():
            self._check_possible(idxs, weights)
            best += weights.argmax(axis=-1).tolist()
        return best

    def best_first(self) -> list[int]:
        """Return the same as `exhaustive`, without scoring completions that cannot win."""
        best = [0] * len(self.pairs.prompts)
        searches = self._searches()
        live: dict[int, Search] = {}
        num_workers = self.pairs.lm.session.num_workers
        with self.pairs.bar(self.show_progress_bar) as bar:
            while True:
                live.update(itertools.islice(searches, MAX_LIVE_SEARCHES * num_workers - len(live)))
                if not live:
                    return best
                expanded: list[Expanded] = []
                for idx, search in list(live.items()):
                    nodes = search.expand(max(1, NODES_AT_A_TIME * num_workers // len(live)))
                    expanded += [(idx, search, node) for node in nodes]
                    if not nodes:
                        self._check_possible([idx], np.array([[search.best_score]]))
                        best[idx] = search.best_idx
                        del live[idx]
                        bar.update()
                if expanded:
                    self._look_up(expanded)

    def _look_up(self, expanded: Sequence[Expanded]) -> None:
        """Compute the log-probabilities of the children of the expanded nodes, and pass them to the searches."""
        prompt_ids, own = self.pairs.prompt_ids, self.pairs.completions
        with showing(False):  # there is a bar over the prompts
            following = scores_of_next(
                self.pairs.lm.session,
                [
                    (with_more(prompt_ids[idx], own[idx].forwarded(node.token_ids)), list(node.children))
                    for idx, _, node in expanded
                ],
            )
        logprobs = iter(following.scores.logprobs.tolist())
        for _, search, node in expanded:
            search.tell(node, {token_id: next(logprobs) for token_id in node.children})

    def _searches(self) -> Iterator[tuple[int, Search]]:
        """Yield a search for each prompt; neighbouring prompts with the same completions and weighing share a trie."""
        made_for: tuple[Weighing, EncodedCompletions] | None = None
        for idx, (weighing, own) in enumerate(zip(self.weighings, self.pairs.completions, strict=True)):
            if made_for is None or made_for[0] is not weighing or made_for[1] is not own:
                made_for = weighing, own
                root = make_trie([as_candidate(weighing, i, token_ids) for i, token_ids in enumerate(own.token_ids)])
                score = _score_of(weighing, own)
            yield idx, Search(root, score)

    def _check_possible(self, prompt_idxs: Sequence[int], weights: Floats) -> None:
        """Raise if all completions behind a prompt have probability 0; `weights`: `(prompts, completions)`.

        Raises:
            NonFiniteError: the message names the prompt.

        """
        for prompt_idx in itertools.compress(prompt_idxs, weights.max(axis=-1) == -np.inf):
            raise NonFiniteError(
                f"Each of the {len(self.pairs.completions[prompt_idx])} completions has probability 0 behind "
                f"prompts[{prompt_idx}], {self.pairs.prompts[prompt_idx]!r}, so none of them is the most probable "
                "one, and their sum is 0. Give completions that the model can produce and the prior does not "
                "exclude; log_probs shows their impossible tokens as -inf."
            )


def _common_weighings(pairs: PromptsWithCompletions, options: Options) -> list[Weighing]:
    """Return the weighing of the common completions behind each prompt; one object for each set of completions."""
    strings = pairs.completions[0].strings
    log_prior = log_of_prior(checked_prior(options.prior, len(strings)))
    check_normalize(options.normalize, len(strings))
    neutral = None
    if options.neutral_prompt is not None:
        check_prompt(options.neutral_prompt, "neutral_prompt")
        neutral = PromptsWithCompletions.of(options.neutral_prompt, strings, pairs.lm, options.end_of_prompt)
    discounts_of = discounts(pairs, options) if options.discount_completions else {}
    neutral_weights = None if neutral is None else _weights_alone(neutral, Weighing(options.aggregate))
    weighing_of = {
        own: Weighing(options.aggregate, discounts_of.get(own), neutral_weights, log_prior, options.normalize)
        for own in dict.fromkeys(pairs.completions)
    }
    return [weighing_of[own] for own in pairs.completions]


def _weights_alone(neutral: PromptsWithCompletions, weighing: Weighing) -> list[float]:
    """Return the weight of each completion behind the neutral prompt."""
    (rows,) = neutral.log_probs(show_progress_bar=False)
    return [weighing.weight(idx, row) for idx, row in enumerate(rows)]


def as_candidate(weighing: Weighing, completion_idx: int, token_ids: tuple[int, ...]) -> Candidate:
    """Return a completion as a candidate of a search."""
    offset = weighing.weight(completion_idx, np.zeros(len(token_ids)))
    return Candidate(token_ids, offset, len(token_ids) if weighing.aggregate == "mean" else 1)


def _score_of(weighing: Weighing, completions: EncodedCompletions) -> Callable[[int, list[float]], float]:
    """Return the function that scores finished completions in a search."""

    def score(completion_idx: int, logprobs: list[float]) -> float:
        weight = weighing.weight(completion_idx, np.array(logprobs))
        return finite_weight(weight, completions.strings[completion_idx])

    return score
