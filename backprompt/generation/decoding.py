"""How the next token is chosen and when a text is finished: the rules of transformers' `generate`, a text at a time.

The only file that knows transformers' generation (and beams.py, its beam search). Configuration, logits processors and
stopping criteria are its own; each text has processors and criteria of its own, so texts of different lengths never
meet in a padded batch, and what is chosen for one does not depend on the others.
"""

from __future__ import annotations

import copy
import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

from backprompt.arguments import as_int
from backprompt.errors import GenerationError
from backprompt.evaluation.scores import TokenScore
from backprompt.generation.lookahead import DEFAULT_NGRAM, proposals
from backprompt.generation.options import SAMPLING_FIELDS, checked
from backprompt.generation.stops import Cut, StopStrings, as_stop_strings
from backprompt.logprobs import log_softmax, logprob_dtype
from backprompt.model.skeleton import head_dtype

Completion: TypeAlias = tuple[int, ...]
"""What was added to a text."""

FinishReason: TypeAlias = Literal["eos", "stop", "length", "criteria", "interrupted"]


@dataclass(frozen=True)
class Choice:
    """A chosen token, its log-probability in the model's own distribution (nats), and whether that has none higher."""

    token_id: int
    logprob: float
    is_argmax: bool

    @property
    def score(self) -> TokenScore:
        """The same without the token."""
        return TokenScore(self.logprob, self.is_argmax)


@dataclass(frozen=True)
class Found:
    """A continuation: its tokens as they were chosen, why it ended, and what of it stays if a stop string ended it."""

    choices: tuple[Choice, ...]
    finish_reason: FinishReason
    cut: Cut | None = None


@dataclass(frozen=True)
class Rules:
    """Options, processors and criteria for one text."""

    config: Any
    processors: Any
    criteria: Sequence[Any]

    def are_met(self, ids: Tensor) -> Tensor:
        """Return whether a criterion ends each of `(texts, tokens)`, `(texts,)`."""
        return torch.stack([criterion(ids, None) for criterion in self.criteria]).any(dim=0)


class Decoding:
    """Options of `generate`, checked, for any number of texts.

    Args:
        model: the causal LM inside all wrappers; its `generation_config` says what is not given.
        tokenizer: for transformers' `stop_strings`.
        max_new_tokens: how many tokens to add at most.
        stops: strings that end a text with the token that completes one of them.
        seed: of sampling. The same text with the same options, seed and sample has the same continuation, whatever else
            is generated with it; by default each run has a seed of its own.
        given: fields of `GenerationConfig`.

    Raises:
        GenerationError: options that contradict each other, or that this does not do; says what to do instead.

    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        stops: StopStrings,
        seed: int | None,
        given: Mapping[str, Any],
    ) -> None:
        self.model = model
        self.logprob_dtype = logprob_dtype(head_dtype(model))
        self.max_new_tokens = as_int(max_new_tokens, "max_new_tokens", at_least=1, error=GenerationError)
        self.stops = stops
        own_seed = secrets.randbits(63) if seed is None else seed
        self._seed = as_int(own_seed, "seed", at_least=0, error=GenerationError)
        self._config = _config(model, given)
        self.is_sampling = bool(self._config.do_sample)
        self.num_beams = int(self._config.num_beams or 1)
        self.num_lookup_tokens = int(self._config.prompt_lookup_num_tokens or 0)
        self.max_ngram = int(self._config.max_matching_ngram_size or DEFAULT_NGRAM)
        self._stop_strings: list[StopStringCriteria] = []  # made once: it reads the whole vocabulary
        strings = as_stop_strings(self._config.stop_strings, tokenizer, "stop_strings")
        self._config.stop_strings = None
        try:
            if strings:
                self._stop_strings.append(StopStringCriteria(tokenizer, list(strings)))
            self._rehearse()
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise GenerationError(f"transformers refuses these options: {error}") from error

    def _rehearse(self) -> None:
        """Let all rules look at one token, so that what is wrong shows now, before a prompt is computed."""
        ids = torch.zeros((1, 1), dtype=torch.long)
        rules = self.rules(ids)
        rules.processors(ids, torch.zeros((1, _num_tokens(self.model))))
        self.reason(rules, ids, 1, is_stopped=False)

    def rules(self, prompt_ids: Tensor) -> Rules:
        """Return the rules for a prompt, `(1, tokens)`."""
        config = copy.deepcopy(self._config)
        num_before = prompt_ids.shape[1]
        config.max_length, config.max_new_tokens = num_before + self.max_new_tokens, self.max_new_tokens
        if config.min_new_tokens is not None:
            config.min_length = num_before + config.min_new_tokens
        self.model._prepare_special_tokens(config, True, device=prompt_ids.device)
        processors = self.model._get_logits_processor(
            config,
            input_ids_seq_length=num_before,
            encoder_input_ids=prompt_ids,
            device=str(prompt_ids.device),
            model_kwargs={},
        )
        criteria = self.model._get_stopping_criteria(config, StoppingCriteriaList())
        return Rules(config, processors, [*criteria, *self._stop_strings])

    def reason(self, rules: Rules, ids: Tensor, num_new: int, *, is_stopped: bool) -> FinishReason | None:
        """Return why `(1, tokens)` of which `num_new` were added are finished, or None.

        Args:
            rules: of the text.
            ids: its ids so far.
            num_new: how many of them were added.
            is_stopped: whether a stop string ends it.

        """
        if is_stopped:
            return "stop"
        met = [criterion for criterion in rules.criteria if bool(criterion(ids, None).any())]
        if any(isinstance(criterion, EosTokenCriteria) for criterion in met):
            return "eos"
        if any(isinstance(criterion, StopStringCriteria) for criterion in met):
            return "stop"
        if num_new == self.max_new_tokens:
            return "length"
        return "criteria" if met else None

    def generator(self, prompt_ids: Sequence[int], sample_idx: int, device: torch.device) -> torch.Generator | None:
        """Return the random numbers of one sample of a text, or None where nothing is drawn."""
        if not self.is_sampling:
            return None
        digest = hashlib.sha256(repr((self._seed, sample_idx, tuple(prompt_ids))).encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


class TextDecoding:
    """The decoding of one text, greedy or sampled: its ids so far, its rules, its random numbers.

    Args:
        decoding: the options.
        prompt_ids: the text.
        sample_idx: which sample of it this is.

    """

    def __init__(self, decoding: Decoding, prompt_ids: Sequence[int], sample_idx: int) -> None:
        self._decoding = decoding
        self._prompt_ids = prompt_ids
        self._sample_idx = sample_idx
        self._choices: list[Choice] = []
        self._finish_reason: FinishReason | None = None
        self._completion: Completion = ()
        self._watched = decoding.stops.begin(prompt_ids)
        self._cut: Cut | None = None
        self._ids: Tensor | None = None  # (1, tokens), with room for all that may come
        self._num_ahead = decoding.num_lookup_tokens
        self.ahead: list[Completion] = [()]
        """Continuations after which the logits are wanted next, each behind those that it begins with."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing is added any more."""
        return self._finish_reason is not None

    @property
    def num_new(self) -> int:
        """How many tokens were added so far."""
        return len(self._choices)

    def choose(self, rows: Mapping[Completion, Tensor]) -> None:
        """Choose the next token by the logits after what was added, and go on for as long as they are there.

        Args:
            rows: the logits after each of `ahead`, `(vocab,)`.

        """
        num_before = len(self._choices)
        while not self.is_finished and (logits := rows.get(self._completion)) is not None:
            self._choose(logits)
        if len(rows) > 1:  # what was proposed in vain costs, so less is proposed next
            was_right = len(self._choices) - num_before > 1
            longest = self._decoding.num_lookup_tokens
            self._num_ahead = min(2 * self._num_ahead, longest) if was_right else max(1, self._num_ahead // 2)
        self.ahead = [self._completion, *self._proposed()]

    def needed(self) -> set[Completion]:
        """Return the continuations that must stay held: all but the last token, which was not forwarded yet."""
        return {self._completion[:-1]}

    def score_of(self, completion: Completion) -> TokenScore | None:
        """Return how the model rates the last token of what was added so far, or of its beginning; else None."""
        is_beginning = (
            0 < len(completion) <= len(self._completion) and self._completion[: len(completion)] == completion
        )
        return self._choices[len(completion) - 1].score if is_beginning else None

    def found(self, num: int) -> list[Found]:
        """Return what was added so far; there is one continuation, whatever `num` asks for."""
        return [Found(tuple(self._choices), self._finish_reason or "interrupted", self._cut)]

    def _choose(self, logits: Tensor) -> None:
        if self._ids is None:
            self._begin(logits.device)
        assert self._ids is not None
        num_ids = len(self._prompt_ids) + len(self._choices)
        unprocessed = logits.float()  # what transformers chooses by, whatever the model computes in
        scores = self._rules.processors(self._ids[:, :num_ids], unprocessed[None].clone())  # (1, vocab)
        check_scores(scores, is_drawn=self._generator is not None)
        if self._generator is None:
            token_id = int(scores.argmax(dim=-1))
        else:
            probabilities = scores.softmax(dim=-1)
            token_id = int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))
        logprob, is_argmax = float(log_softmax(logits)[token_id]), int(unprocessed.argmax()) == token_id
        self._choices.append(Choice(token_id, logprob, is_argmax))
        self._completion = (*self._completion, token_id)
        self._ids[0, num_ids] = token_id
        self._watched = self._decoding.stops.with_token(self._watched, token_id)
        self._finish_reason = self._decoding.reason(
            self._rules, self._ids[:, : num_ids + 1], len(self._choices), is_stopped=self._watched.is_stopped
        )
        if self._watched.is_stopped:
            self._cut = self._decoding.stops.cut(self._prompt_ids, self._completion)

    def _begin(self, device: torch.device) -> None:
        prompt = torch.tensor([self._prompt_ids], device=device)
        self._ids = torch.cat([prompt, prompt.new_zeros(1, self._decoding.max_new_tokens)], dim=1)
        self._rules = self._decoding.rules(prompt)
        self._generator = self._decoding.generator(self._prompt_ids, self._sample_idx, device)

    def _proposed(self) -> list[Completion]:
        """Return what may come next, token by token, by looking it up in the text itself."""
        # The last token that may come is not continued.
        num_tokens = min(self._num_ahead, self._decoding.max_new_tokens - len(self._choices) - 1)
        if self._ids is None or num_tokens < 1:
            return []
        ids = self._ids[0, : len(self._prompt_ids) + len(self._choices)]
        tried = proposals(ids, num_tokens, self._decoding.max_ngram)
        beginnings = (tokens[:stop] for tokens in tried for stop in range(1, len(tokens) + 1))
        return list(dict.fromkeys((*self._completion, *tokens) for tokens in beginnings))


def check_scores(scores: Tensor, *, is_drawn: bool) -> None:
    """Raise if nothing can be chosen by scores, `(texts, vocab)`, as the options have changed them.

    Raises:
        GenerationError: one is NaN, all are -inf, or, where a token `is_drawn`, one is inf.

    """
    best = float(scores.max())  # NaN if one is
    if best > -math.inf and not (is_drawn and best == math.inf):
        return
    what = "-inf for every token, so that none may follow" if best == -math.inf else str(best)
    raise GenerationError(
        f"The options of generate turn scores into {what}. Leave out those that exclude tokens or change their scores, "
        "one after the other."
    )


def _config(model: Any, given: Mapping[str, Any]) -> GenerationConfig:
    """Return the options in full: what is given, else what the model's own configuration says, but greedy."""
    options = checked(given, _num_tokens(model))
    asked = [name for name in SAMPLING_FIELDS if options.get(name) is not None]
    if asked and options.get("do_sample") is False:
        raise GenerationError(f"{asked[0]} is for sampling, but do_sample is False. Leave out one of the two.")
    options["do_sample"] = bool(asked) if options.get("do_sample") is None else options["do_sample"]
    try:
        config: GenerationConfig = model._prepare_generation_config(None, **options)[0]
        mode = config.get_generation_mode()
    except (TypeError, ValueError) as error:
        raise GenerationError(f"transformers refuses these options: {error}") from error
    is_lookup = mode == GenerationMode.ASSISTED_GENERATION and config.prompt_lookup_num_tokens is not None
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH) and not is_lookup:
        raise GenerationError(
            "generate does greedy decoding, sampling, beam search (num_beams=...) and look-ahead by n-grams "
            f"(prompt_lookup_num_tokens=...), not {mode.value.replace('_', ' ')}."
        )
    if config.prompt_lookup_num_tokens is not None and mode == GenerationMode.BEAM_SEARCH:
        raise GenerationError("prompt_lookup_num_tokens looks ahead for one continuation, not for num_beams of them.")
    if config.token_healing:
        raise GenerationError("generate does not do token healing, which changes the end of the prompt.")
    if config.guidance_scale is not None and config.guidance_scale != 1:
        raise GenerationError("generate does not do classifier-free guidance, which runs the model a second time.")
    return config


def _num_tokens(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
