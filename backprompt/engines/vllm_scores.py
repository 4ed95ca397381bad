"""Log-probabilities from vLLM, with its prefix cache as far as possible.

vLLM has two options. `logprob_token_ids` gives log-probabilities of listed tokens behind a text, and the text may come
from the prefix cache. `prompt_logprobs` gives the log-probabilities of a text's own tokens. Tokens that come from the
cache have no row of logits, so with this option vLLM skips the cache unless told otherwise. A text that is scored from
some token on becomes two requests:

    text              the beginning, scored by `logprob_token_ids`    the rest, by `prompt_logprobs`
    prompt|a b c      "prompt" with token a                           "prompt a b" from b on, with token c
    prompt|a b d                                                      the same request, with token d
    prompt|e          the first request, with token e

The second kind of request reads the cache, too. The cache consists of blocks of tokens. If a cached block contains
tokens that are to be scored, their rows of logits are missing. The missing scores are requested once more: each token
behind its beginning, or the whole text without the cache, whichever forwards fewer tokens.

If the unscored beginning of a text is no longer than a block, the whole text is computed without the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from backprompt.engines.vllm_requests import Request, Requests, imported_vllm
from backprompt.errors import NonFiniteError
from backprompt.evaluation.distributions import NO_TOKEN
from backprompt.evaluation.reading import Wanted
from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.evaluation.scoring import ScoredTexts
from backprompt.tokens.graph import flat

MAX_CANDIDATES = 128
"""The largest number of `logprob_token_ids` that vLLM takes in a request."""

Ids = tuple[int, ...]


@dataclass(eq=False)
class Read:
    """The scores to read from one text.

    Attributes:
        token_ids: the ids of the text.
        start: the idx of the text's first scored token.
        is_whole: whether the whole text is computed, without the prefix cache.
        own: the scores of the text's tokens from `start` on; None for a missing score.
        candidates: the scores of tokens that may follow the text, by id.

    """

    token_ids: Ids
    start: int
    is_whole: bool
    own: list[TokenScore | None] = field(default_factory=list)
    candidates: dict[int, TokenScore | None] = field(default_factory=dict)

    def missing(self) -> list[int]:
        """Return the indices of tokens without a score, except the text's first token, which no token predicts."""
        return [idx for idx, score in enumerate(self.own, self.start) if score is None and idx > 0]

    def of(self, wanted: Wanted) -> list[TokenScore]:
        """Return the wanted scores."""
        found = [*self.own[wanted.start - self.start :], *map(self.candidates.__getitem__, wanted.candidates)]
        return [_UNPREDICTED if score is None else score for score in found]


_UNPREDICTED = TokenScore(math.nan, False)


class Scoring:
    """Scores texts with vLLM; see the module.

    Args:
        requests: the requests to the engine.
        block_size: the number of tokens in a block of the prefix cache.

    """

    def __init__(self, requests: Requests, block_size: int) -> None:
        self._requests = requests
        self._block_size = block_size

    def scored(self, wanted: Sequence[Wanted]) -> ScoredTexts:
        """Return the scores of the wanted tokens of texts without groups, and of tokens that may follow them.

        Raises:
            NonFiniteError: a log-probability is NaN.

        """
        parts = [self._parts(text) for text in wanted]
        reads = self._reads(part for own in parts for part in own)
        self._ask(reads.values())
        self._ask_again(reads.values())
        found = [[score for part in own for score in reads[_ids(part)].of(part)] for own in parts]
        flat_scores = TokenScores.of([score for own in found for score in own], torch.float32, torch.device("cpu"))
        return ScoredTexts(flat_scores, list(map(len, found)))

    def top(self, wanted: Sequence[Wanted], k: int) -> dict[str, torch.Tensor]:
        """Return `logprobs`, `top_logprobs` and `top_ids` of `Distributions`, without the prefix cache."""
        texts = [
            (_ids(text) + tuple(text.candidates[idx : idx + 1]), text.start if idx == 0 else len(text.token_ids))
            for text in wanted
            for idx in range(max(1, len(text.candidates)))
        ]
        params = imported_vllm().SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=k, detokenize=False)
        done = self._requests.finish([(ids, params) for ids, _ in texts])
        rows = [
            (ids[idx], {} if idx == 0 else request.output.prompt_logprobs[idx])
            for (ids, start), request in zip(texts, done, strict=True)
            for idx in range(start, len(ids))
        ]
        best = [
            sorted(((of.logprob, own) for own, of in row.items()), key=lambda pair: -pair[0])[:k] for _, row in rows
        ]
        best = [row or [(math.nan, NO_TOKEN)] * k for row in best]
        own = [row[token_id].logprob if row else math.nan for token_id, row in rows]
        return {
            "logprobs": torch.tensor(own),
            "top_logprobs": torch.tensor([[logprob for logprob, _ in row] for row in best]).reshape(-1, k),
            "top_ids": torch.tensor([[token_id for _, token_id in row] for row in best]).reshape(-1, k),
        }

    def _parts(self, text: Wanted) -> list[Wanted]:
        """Return the one or two texts from which the scores of a text are read, in the order of the scores."""
        ids = _ids(text)
        if self._block_size < text.start < len(ids):
            return [
                Wanted(ids[: text.start], text.start, ids[text.start : text.start + 1]),
                Wanted(ids, text.start + 1, text.candidates),
            ]
        return [Wanted(ids, text.start, text.candidates)]

    def _reads(self, wanted: Iterable[Wanted]) -> dict[Ids, Read]:
        """Return the scores to read from each distinct text."""
        reads: dict[Ids, Read] = {}
        for text in wanted:
            ids = _ids(text)
            read = reads.setdefault(ids, Read(ids, text.start, False))
            read.start = min(read.start, text.start)
            read.is_whole = read.start <= self._block_size
            read.candidates.update(dict.fromkeys(text.candidates))
        return reads

    def _ask(self, reads: Iterable[Read]) -> None:
        """Ask for scores in forest order, so that shared beginnings are in the prefix cache."""
        asked: list[tuple[Read, Sequence[int]]] = []
        for read in sorted(reads, key=lambda read: read.token_ids):
            read.own = [None] * (len(read.token_ids) - read.start)
            candidates = list(read.candidates)
            asked += [
                (read, candidates[first : first + MAX_CANDIDATES])
                for first in range(0, max(len(candidates), bool(read.missing())), MAX_CANDIDATES)
            ]
        given = [(read.token_ids, self._params(read, own)) for read, own in asked]
        for (read, own), request in zip(asked, self._requests.finish(given), strict=True):
            self._take(read, own, request)

    def _params(self, read: Read, candidates: Sequence[int]) -> Any:
        has_rows = bool(read.missing())
        return imported_vllm().SamplingParams(
            temperature=0,
            max_tokens=1,
            detokenize=False,
            logprob_token_ids=list(candidates) or None,
            prompt_logprobs=0 if has_rows else None,
            skip_reading_prefix_cache=has_rows and read.is_whole,
        )

    def _take(self, read: Read, candidates: Sequence[int], request: Request) -> None:
        (chosen,) = request.output.outputs
        for token_id in candidates:
            logprob = chosen.logprobs[0][token_id].logprob
            read.candidates[token_id] = self._score(logprob, token_id == chosen.token_ids[0], read)
        rows = request.output.prompt_logprobs
        if rows is None:
            return
        num_tokens = len(read.token_ids)
        # From the end: of cached tokens some runners give rows without meaning, others give none.
        for idx in range(max(1, read.start, request.num_cached + 1), num_tokens):
            of_token = rows[idx - num_tokens][read.token_ids[idx]]
            read.own[idx - read.start] = self._score(of_token.logprob, of_token.rank == 1, read)

    def _score(self, logprob: float, is_argmax: bool, read: Read) -> TokenScore:
        if math.isnan(logprob):
            raise NonFiniteError(
                f"vLLM returned NaN for a text of {len(read.token_ids)} tokens. Try another dtype: VllmLM(..., "
                'dtype="float32").'
            )
        return TokenScore(logprob, is_argmax)

    def _ask_again(self, reads: Iterable[Read]) -> None:
        """Ask for the scores of tokens that came from the prefix cache."""
        lacking = [(read, missing) for read in reads if (missing := read.missing())]
        whole = [read for read, missing in lacking if len(missing) * self._block_size >= len(read.token_ids)]
        for read in whole:
            read.is_whole = True
        single = [(read, idx) for read, missing in lacking if not read.is_whole for idx in missing]
        beginnings = self._reads(
            Wanted(read.token_ids[:idx], idx, read.token_ids[idx : idx + 1]) for read, idx in single
        )
        self._ask([*whole, *beginnings.values()])
        for read, idx in single:
            read.own[idx - read.start] = beginnings[read.token_ids[:idx]].candidates[read.token_ids[idx]]


def _ids(text: Wanted) -> Ids:
    return flat(text.token_ids)
