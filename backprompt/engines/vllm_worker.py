"""VllmWorker: answers questions about texts with a vLLM engine in this process, in the place of a worker with an `LM`.

It keeps the requests to the engine, and the streams. It answers those questions of `Worker` that vLLM can answer;
`VllmCrew` refuses the others by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from backprompt.engines.continuing import Continuing
from backprompt.engines.remote import Question
from backprompt.engines.travel import Answer, PackedIds
from backprompt.engines.vllm_requests import Requests, imported_vllm
from backprompt.engines.vllm_run import VllmRun
from backprompt.engines.vllm_scores import Scoring
from backprompt.engines.worker import Description, behind_of, wanted_of
from backprompt.errors import UnsupportedModelError
from backprompt.evaluation.distributions import Asked
from backprompt.evaluation.reading import Wanted
from backprompt.evaluation.scoring import ScoredTexts
from backprompt.forest.partition import Ints
from backprompt.generation.decoding import Decoding, Recipe
from backprompt.session.stats import Stats
from backprompt.tokens.graph import with_more
from backprompt.tokens.tokenizer import PrivateTokenizer

_WITH_AN_LM = "Evaluate the texts with an LM: backprompt.load(name)."
_REFUSED = {
    "all_logits": "rows of logits",
    "explain": "account of its cost",
    "fingerprint": "hash of its weights",
    "look_up": "way to look into its prefix cache",
    "past_key_values": "keys and values",
    "pid": "process of its own that a VllmLM knows",
    "pin": "hold on texts",
    "property_of": "name and size of a text's results",
    "save": "entries for a store",
}


class VllmCrew:
    """A crew of one `VllmWorker`, in this process.

    Args:
        worker: the worker.
        close: ends the engine.

    """

    num_workers = 1
    where = "with vLLM"

    def __init__(self, worker: VllmWorker, close: Callable[[], None]) -> None:
        self._worker = worker
        self.close = close

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """Answer all questions in order.

        Raises:
            UnsupportedModelError: vLLM has no answer, or a text has groups.

        """
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Any:
        if question.method in _REFUSED:
            raise UnsupportedModelError(f"vLLM gives no {_REFUSED[question.method]}. {_WITH_AN_LM}")
        if any(isinstance(given, PackedIds) and given.graphs for given in question.arguments):
            raise UnsupportedModelError(
                "In vLLM each token sees all tokens before it, so texts cannot have groups or frozen segments. "
                f"{_WITH_AN_LM}"
            )
        return getattr(self._worker, question.method)(*question.arguments)


class VllmWorker(Continuing):
    """Answers questions about texts with a vLLM engine; see the module.

    Args:
        llm: a `vllm.LLM`.
        description: a description of the model and the tokenizer.

    """

    def __init__(self, llm: Any, description: Description) -> None:
        super().__init__()
        self._llm = llm
        self._description = description
        self._skeleton = description.skeleton()
        self._tokenizer = PrivateTokenizer(description.tokenizer)
        self._requests = Requests(llm)
        self._scoring = Scoring(self._requests, llm.llm_engine.vllm_config.cache_config.block_size)
        self._num_requested = 0
        max_logprobs = llm.model_config.max_logprobs
        self._max_top_k = description.vocab_size if max_logprobs == -1 else max_logprobs

    # Scores

    def behind(self, prompts: PackedIds, shapes: Sequence[PackedIds], shape_of: Ints, nums_own: Ints) -> Answer:
        """Score completions behind prompts."""
        wanted: list[Wanted] = []
        counts: list[int] = []
        for prompt, shape, num_own in behind_of(prompts, shapes, shape_of, nums_own):
            own = [Wanted(prompt, len(prompt) - num_own)] if num_own else []
            own += [Wanted(with_more(prompt, ids[:-1]), len(prompt), ids[-1:]) for ids in shape.completions]
            wanted += own
            counts.append(len(own))
        scored = self._scored(wanted)
        lengths = iter(scored.lengths)
        return Answer.of_scores(
            ScoredTexts(scored.scores, [sum(next(lengths) for _ in range(count)) for count in counts])
        )

    def scored(self, texts: PackedIds, starts: Ints, candidates: PackedIds) -> Answer:
        """Score tokens of texts, and tokens that may follow the texts."""
        return Answer.of_scores(self._scored(wanted_of(texts, starts, candidates)))

    def distributions(self, texts: PackedIds, starts: Ints, candidates: PackedIds, asked: Asked) -> Answer:
        """Read the most probable tokens."""
        if asked.entropy or asked.temperature != 1:
            raise UnsupportedModelError(
                f"vLLM gives only log-probabilities of single tokens at temperature 1, and no entropies. {_WITH_AN_LM}"
            )
        wanted = wanted_of(texts, starts, candidates)
        lengths = [len(text.token_ids) - text.start + len(text.candidates) for text in wanted]
        if asked.top_k is None:
            return Answer.of(lengths, logprobs=self._scored(wanted).scores.logprobs)
        if asked.top_k > self._max_top_k:
            raise ValueError(
                f"This vLLM gives the {self._max_top_k} most probable tokens at most, not {asked.top_k}. Allow "
                f"more: VllmLM(..., max_logprobs={asked.top_k})."
            )
        self._count(wanted)
        return Answer.of(lengths, **self._scoring.top(wanted, asked.top_k))

    # Representations

    def evaluate(self, texts: PackedIds) -> Answer:
        """Put texts into the prefix cache."""
        params = imported_vllm().SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        asked: Any = texts.unpacked()
        self._num_requested += sum(map(len, asked))
        self._requests.finish([(ids, params) for ids in sorted(set(asked))])
        return Answer.of([0] * len(asked))

    def read(self, texts: PackedIds, name: str) -> Answer:
        """Read the log-probabilities of texts' tokens."""
        if name != "token_logprobs":
            raise UnsupportedModelError(
                f"vLLM gives no {name.replace('_', ' ')}. next_token_logprobs and top_logprobs of a VllmLM give "
                f"log-probabilities. {_WITH_AN_LM}"
            )
        scored = self._scored([Wanted(ids, 0) for ids in texts.unpacked()])
        return Answer.of(scored.lengths, token_logprobs=scored.scores.logprobs)

    # Continuations

    def decoding(self, recipe: Recipe) -> Decoding:
        """Return the options of a generation as a `Decoding` for the model."""
        limits, vocab_size = self._description.limits, self._description.vocab_size

        def refused() -> frozenset[int]:
            return limits.placeholders.union(range(limits.num_embeddings, vocab_size))

        return recipe.decoding(self._skeleton, self._description.tokenizer, refused, self._tokenizer)

    # The engine as a whole

    def stats(self) -> Stats:
        """Return the counts that vLLM has; all others are 0."""
        counts = dict.fromkeys((field.name for field in fields(Stats)), 0)
        counts |= {
            "tokens_requested": self._num_requested,
            "tokens_computed": self._requests.num_computed,
            "tokens_reused": self._num_requested - self._requests.num_computed,
        }
        return Stats(**{**counts, "seconds": self._requests.seconds, "kernel": "vllm", "linears": "vllm"})  # type: ignore

    def clear(self) -> None:
        """Empty the prefix cache."""
        self._llm.reset_prefix_cache()

    def _scored(self, wanted: Sequence[Wanted]) -> ScoredTexts:
        self._count(wanted)
        return self._scoring.scored(wanted)

    def _count(self, wanted: Sequence[Wanted]) -> None:
        self._num_requested += sum(len(text.token_ids) + len(text.candidates) for text in wanted)

    def _run(self, prompts: PackedIds, recipe: Recipe) -> VllmRun:
        ids: Any = prompts.unpacked()
        self._num_requested += sum(map(len, ids))
        return VllmRun(self._requests, self.decoding(recipe), ids)
