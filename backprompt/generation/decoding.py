"""The rules of transformers' `generate` for choosing tokens and ending texts; and the tokens added to a text.

Configuration, logits processors and stopping criteria are those of transformers. Each text has processors and criteria
of its own. So texts of different lengths are never padded, and the choice for one does not depend on the others.
Besides this file, options.py, choosing.py, quick.py, constrained.py, beams.py and searches.py know transformers'
generation.
"""

from __future__ import annotations

import copy
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from backprompt.arguments import as_int
from backprompt.errors import GenerationError
from backprompt.evaluation.scores import TokenScore
from backprompt.generation.constrained import MAX_FORCED, UNCONSTRAINED, AllowedTokens, Constraints
from backprompt.generation.found import Choice, Completion, FinishReason, Found
from backprompt.generation.lookahead import DEFAULT_NGRAM, Ngrams
from backprompt.generation.options import config_of, num_tokens_of
from backprompt.generation.stops import Cut, StopStrings, as_stop_strings
from backprompt.logprobs import logprob_dtype
from backprompt.model.skeleton import head_dtype
from backprompt.tokens.constraints import Constraint
from backprompt.tokens.matching import Allowed, Matching
from backprompt.tokens.tokenizer import PrivateTokenizer


@dataclass(frozen=True)
class Rules:
    """Options, processors and criteria for one text.

    Attributes:
        config: all options.
        processors: change the scores of the next token.
        criteria: decide whether the text ends.

    """

    config: Any
    processors: Any
    criteria: Sequence[Any]

    @cached_property
    def other_criteria(self) -> list[Any]:
        """Criteria that look at more than the last token and the number of tokens."""
        return [
            criterion for criterion in self.criteria if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria)
        ]

    def are_ends(self, token_ids: Tensor) -> Tensor:
        """Return whether each token is an end token, in the same shape."""
        ends: list[Any] = [criterion for criterion in self.criteria if type(criterion) is EosTokenCriteria]
        found = torch.zeros_like(token_ids, dtype=torch.bool)
        for criterion in ends:
            found |= criterion(token_ids.reshape(-1, 1), None).reshape(token_ids.shape)
        return found


@dataclass(frozen=True)
class Recipe:
    """The options of a `Decoding`, from which another process with the model and the tokenizer makes the decoding.

    Attributes:
        max_new_tokens: the largest number of tokens to add.
        stop, include_stop, is_behind_prompt: see `StopStrings`.
        seed: the seed of sampling.
        given: fields of `GenerationConfig`.
        constraints: the constraint of each text; empty without constraints.
        first_sample: see `Decoding`.

    """

    max_new_tokens: int
    stop: tuple[str, ...]
    include_stop: bool
    is_behind_prompt: bool
    seed: int
    given: Mapping[str, Any]
    constraints: tuple[Constraint | None, ...] = ()
    first_sample: int = 0

    def part(self, indices: Sequence[int]) -> Recipe:
        """Return the recipe for some of the texts."""
        return replace(self, constraints=tuple(self.constraints[idx] for idx in indices)) if self.constraints else self

    def decoding(
        self, model: Any, tokenizer: Any, refused: Callable[[], frozenset[int]], private: PrivateTokenizer
    ) -> Decoding:
        """Return the decoding for a model, its tokenizer and the tokenizer's copy; `refused`: see `Decoding`."""
        stops = StopStrings(
            self.stop, tokenizer, include_stop=self.include_stop, is_behind_prompt=self.is_behind_prompt
        )
        return Decoding(
            model,
            tokenizer,
            max_new_tokens=self.max_new_tokens,
            stops=stops,
            seed=self.seed,
            given=self.given,
            refused=refused,
            constraints=Constraints.of(self.constraints, private),
            first_sample=self.first_sample,
        )


class Decoding:
    """Options of `generate`, checked, for any number of texts.

    Args:
        model: the causal LM inside all wrappers; its `generation_config` supplies options that are not given.
        tokenizer: the tokenizer for transformers' `stop_strings`.
        max_new_tokens: the largest number of tokens to add.
        stops: strings that end a text; the text ends with the token that completes one of them.
        seed: the seed of sampling. The same text with the same options, seed and number of the sample has the same
            continuation, whatever other texts are continued with it. By default each run has a seed of its own.
        given: fields of `GenerationConfig`.
        refused: returns the ids that must not be chosen, because a text with one of them cannot be evaluated. Called
            for each text after its evaluation, when the probe has found these ids.
        constraints: the constraints of the texts, in order.
        first_sample: the number of the first sample of each text.

    Attributes:
        end_ids: the tokens that end a text.

    Raises:
        GenerationError: options contradict each other or are not supported; the message says what to do instead.

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
        refused: Callable[[], frozenset[int]] = frozenset,
        constraints: Constraints = UNCONSTRAINED,
        first_sample: int = 0,
    ) -> None:
        self.model = model
        self._constraints = constraints
        self._refused = refused
        self.logprob_dtype = logprob_dtype(head_dtype(model))
        self.max_new_tokens = as_int(max_new_tokens, "max_new_tokens", at_least=1, error=GenerationError)
        self.stops = stops
        own_seed = secrets.randbits(63) if seed is None else seed
        self._seed = as_int(own_seed, "seed", at_least=0, error=GenerationError)
        self._first_sample = as_int(first_sample, "sample_idx", at_least=0, error=GenerationError)
        self._given = dict(given)
        self._config = config_of(model, given)
        self.is_sampling = bool(self._config.do_sample)
        self.num_beams = int(self._config.num_beams or 1)
        self.num_lookup_tokens = int(self._config.prompt_lookup_num_tokens or 0)
        self.max_ngram = int(self._config.max_matching_ngram_size or DEFAULT_NGRAM)
        self.end_ids: frozenset[int] = frozenset()
        self._stop_strings: list[StopStringCriteria] = []  # made once: each reads the whole vocabulary
        strings = as_stop_strings(self._config.stop_strings, tokenizer, "stop_strings")
        self._config.stop_strings = None
        try:
            if strings:
                self._stop_strings.append(StopStringCriteria(tokenizer, list(strings)))
            self._rehearse()
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise GenerationError(f"transformers refuses these options: {error}") from error
        constraints.check_begin(num_tokens_of(model), self.end_ids)
        self.looks_ahead = self.num_lookup_tokens > 0 or bool(constraints)

    @property
    def recipe(self) -> Recipe:
        """The options, for another process."""
        stops = self.stops
        return Recipe(
            self.max_new_tokens,
            stops.strings,
            stops.include_stop,
            stops.is_behind_prompt,
            self._seed,
            self._given,
            self._constraints.given,
            self._first_sample,
        )

    def repeated(self, num_each: int) -> Decoding:
        """Return the decoding for a call in which each text stands `num_each` times in a row."""
        decoding = copy.copy(self)
        decoding._constraints = self._constraints.repeated(num_each)
        return decoding

    def matching(self, text_idx: int) -> Matching | None:
        """Return the matching of a text under its constraint; None for a text without a constraint."""
        return self._constraints.matching(text_idx, num_tokens_of(self.model), self.end_ids)

    def _rehearse(self) -> None:
        """Apply all rules to one token, so that errors show now, before a prompt is computed."""
        ids = torch.zeros((1, 1), dtype=torch.long)
        rules = self.rules(ids)
        rules.processors(ids, torch.zeros((1, num_tokens_of(self.model))))
        for criterion in rules.criteria:
            criterion(ids, None)
        ends = [criterion for criterion in rules.criteria if isinstance(criterion, EosTokenCriteria)]
        self.end_ids = frozenset(token_id for criterion in ends for token_id in criterion.eos_token_id.tolist())

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
            logits_processor=LogitsProcessorList([AllowedTokens()] if self._constraints else []),
            device=str(prompt_ids.device),
            model_kwargs={},
        )
        refused = sorted(self._refused())
        if refused:
            first = SuppressTokensLogitsProcessor(refused, device=str(prompt_ids.device))
            processors = LogitsProcessorList([first, *processors])
        criteria = self.model._get_stopping_criteria(config, StoppingCriteriaList())
        return Rules(config, processors, [*criteria, *self._stop_strings])

    def reason(
        self,
        rules: Rules,
        ids: Callable[[], Tensor],
        last_id: int,
        num_new: int,
        *,
        is_stopped: bool,
        is_over: Callable[[], bool] | None,
    ) -> FinishReason | None:
        """Return the reason for which a text with `num_new` added tokens is finished, or None.

        Args:
            rules: the rules of the text.
            ids: returns the text's ids so far, `(1, tokens)`; called only if a criterion needs them.
            last_id: the last id.
            num_new: the number of added ids.
            is_stopped: whether a stop string ends the text.
            is_over: returns whether the text's constraint allows no further token; None without a constraint.

        """
        if is_stopped:
            return "stop"
        if last_id in self.end_ids:
            return "eos"
        if is_over is not None and is_over():
            return "constraint"
        others = rules.other_criteria
        met = [criterion for criterion in others if bool(criterion(ids(), None).any())] if others else []
        if not met:
            return "length" if num_new == self.max_new_tokens else None
        if any(isinstance(criterion, StopStringCriteria) for criterion in met):
            return "stop"
        return "length" if num_new == self.max_new_tokens else "criteria"

    def generator(self, prompt_ids: Sequence[int], sample_idx: int, device: torch.device) -> torch.Generator:
        """Return the random number generator of one sample of a text."""
        drawn = (self._seed, self._first_sample + sample_idx, tuple(prompt_ids))
        digest = hashlib.sha256(repr(drawn).encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


class TextDecoding:
    """The decoding of one text, greedy or sampled: its ids so far, its rules, its random numbers.

    Args:
        decoding: the options.
        prompt_ids: the text's ids.
        sample_idx: the number of this sample of the text.
        matching: tells the tokens that the text's constraint allows; None without a constraint.

    """

    rules: Rules
    generator: torch.Generator

    def __init__(
        self, decoding: Decoding, prompt_ids: Sequence[int], sample_idx: int, matching: Matching | None = None
    ) -> None:
        self._decoding = decoding
        self._matching = matching
        self._prompt_ids = prompt_ids
        self._sample_idx = sample_idx
        self._choices: list[Choice] = []
        self._finish_reason: FinishReason | None = None
        self._watched = decoding.stops.begin(prompt_ids)
        self._cut: Cut | None = None
        self.is_drawn = decoding.is_sampling
        self.looks_ahead = decoding.looks_ahead
        self._device: torch.device | None = None
        self._ids = torch.empty(0)  # (1, tokens), with room for all later tokens; used if rules need ids
        self._num_written = 0  # the number of ids written so far
        self._num_ahead = decoding.num_lookup_tokens
        self._ngrams = Ngrams(decoding.max_ngram)  # for looking up proposals
        self._completion: Completion = ()  # the ids added so far, or a beginning of them
        self._are_forced = False  # whether the constraint forces the tokens of `proposals`
        self.proposals: list[Completion] = []
        """Possible longer continuations: the tokens added so far, and proposed tokens behind them."""

    @property
    def completion(self) -> Completion:
        """The ids added so far."""
        if len(self._completion) < len(self._choices):
            self._completion += tuple(choice.token_id for choice in self._choices[len(self._completion) :])
        return self._completion

    @property
    def ahead(self) -> list[Completion]:
        """Continuations after which logits are needed next; each one comes later in the list than its beginnings."""
        return [self.completion, *self.proposals]

    @property
    def is_finished(self) -> bool:
        """Whether no more tokens are added."""
        return self._finish_reason is not None

    @property
    def num_new(self) -> int:
        """The number of tokens added so far."""
        return len(self._choices)

    @property
    def num_ids(self) -> int:
        """The number of ids so far, the prompt included."""
        return len(self._prompt_ids) + len(self._choices)

    @property
    def has_begun(self) -> bool:
        """Whether a token was chosen already, so that the rules are known."""
        return self._device is not None

    @property
    def takes_most_probable(self) -> bool:
        """Whether the next token is the most probable one, and no rule needs to see its logits."""
        return self.has_begun and not (self.is_drawn or self.rules.processors)

    def begin(self, device: torch.device) -> None:
        """Make the rules and the generator on the device of the scores; later calls do nothing."""
        if self._device is None:
            self.rules = self._decoding.rules(torch.tensor([self._prompt_ids], device=device))
            if self.is_drawn:
                self.generator = self._decoding.generator(self._prompt_ids, self._sample_idx, device)
            self._device = device

    def ids(self) -> Tensor:
        """Return the ids so far, `(1, tokens)`, on the device of the scores."""
        num_ids = self.num_ids
        if self._num_written == 0:
            self._ids = torch.zeros((1, num_ids + self._decoding.max_new_tokens), dtype=torch.long, device=self._device)
        if self._num_written < num_ids:
            self._ids[0, self._num_written : num_ids] = torch.tensor(self._ids_from(self._num_written))
            self._num_written = num_ids
        return self._ids[:, :num_ids]

    def only_next(self, num_before: int) -> Choice | None:
        """Return the token behind the first ones added; None if there is none, several, or proposals behind it."""
        choices = self._choices
        return choices[-1] if len(choices) == num_before + 1 and not self.proposals else None

    def add(self, choice: Choice) -> None:
        """Add a token, and note whether the text ends with it."""
        choices, decoding = self._choices, self._decoding
        choices.append(choice)
        if decoding.stops.strings:
            self._watched = decoding.stops.with_token(self._watched, choice.token_id)
        is_stopped = self._watched.is_stopped
        is_over = None if self._matching is None else self._is_over
        self._finish_reason = decoding.reason(
            self.rules, self.ids, choice.token_id, len(choices), is_stopped=is_stopped, is_over=is_over
        )
        if is_stopped:
            self._cut = decoding.stops.cut(self._prompt_ids, self.completion)

    def look_ahead(self, num_rows: int, num_added: int) -> None:
        """Set `proposals` for the next pass; the last `num_rows` rows of logits gave `num_added` tokens."""
        if num_rows > 1 and not self._are_forced:  # wrong proposals cost time, so fewer tokens are proposed next
            longest = self._decoding.num_lookup_tokens
            self._num_ahead = min(2 * self._num_ahead, longest) if num_added > 1 else max(1, self._num_ahead // 2)
        self.proposals = self._proposed()

    def allowed(self) -> list[Allowed] | None:
        """Return the tokens that the constraint allows next, one row; None for a text without a constraint."""
        return None if self._matching is None else [self._matching.allowed(self.completion)]

    def needed(self) -> set[Completion]:
        """Return the continuations to keep: the one without its last token, which was not forwarded yet."""
        return {self.completion[:-1]}

    def score_of(self, completion: Completion) -> TokenScore | None:
        """Return the score of the last token of `completion` if it begins the completion so far; else None."""
        is_beginning = 0 < len(completion) <= len(self.completion) and self.completion[: len(completion)] == completion
        return self._choices[len(completion) - 1].score if is_beginning else None

    def found(self, num: int) -> list[Found]:
        """Return the continuation so far: always one, for any `num`."""
        return [Found(tuple(self._choices), self._finish_reason or "interrupted", self._cut)]

    def _is_over(self) -> bool:
        """Return whether the constraint allows no further token."""
        return self._matching is not None and self._matching.is_over(self.completion)

    def _ids_from(self, start: int) -> list[int]:
        """Return the ids from index `start` on, the prompt included."""
        choices = self._choices[max(0, start - len(self._prompt_ids)) :]
        return [*self._prompt_ids[start:], *(choice.token_id for choice in choices)]

    def _proposed(self) -> list[Completion]:
        """Return proposals, each with all its beginnings: the forced continuation, or those that were looked up."""
        # No logits are needed behind the last token that `max_new_tokens` allows.
        num_left = self._decoding.max_new_tokens - len(self._choices) - 1
        forced: Completion = ()
        if self._matching is not None and not self.is_finished:
            forced = self._matching.forced(self.completion, min(num_left, MAX_FORCED))
        self._are_forced = bool(forced)
        tried = [forced] if forced else self._looked_up(min(self._num_ahead, num_left))
        beginnings = (tokens[:stop] for tokens in tried for stop in range(1, len(tokens) + 1))
        return list(dict.fromkeys((*self.completion, *tokens) for tokens in beginnings))

    def _looked_up(self, num_tokens: int) -> list[Completion]:
        """Return tokens that may come next, by looking them up in the text itself."""
        if num_tokens < 1:
            return []
        self._ngrams.extend(self._ids_from(len(self._ngrams)))
        found = self._ngrams.proposals(num_tokens)
        return found if self._matching is None else [self._matching.possible(self.completion, ids) for ids in found]
