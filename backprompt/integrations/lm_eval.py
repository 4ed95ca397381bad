"""lm-evaluation-harness: a model type `backprompt` that plans all requests of a task as one forest.

    python -m backprompt.integrations.lm_eval --model backprompt --model_args pretrained=gpt2 --tasks hellaswag

This command is the harness's own command line. The harness finds models of other packages only once they are imported.
So in Python import this module first; then `lm_eval.simple_evaluate(model="backprompt", model_args=...)` knows the
name. An instance may be passed as well: `simple_evaluate(model=BackpromptLM(lm), ...)`.

Scores are those of the harness's `hf` backend: the same ids are scored behind the same ids, and long requests are cut
off on the left in the same way. Only rolling log-likelihoods with a tokenizer that adds BOS differ: `hf` puts a second
BOS before the first. Arguments with the same meaning have the same names.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from backprompt.arguments import as_bool, as_int, check_encodable
from backprompt.bound import as_lm
from backprompt.engines.ray import RayLM
from backprompt.errors import GenerationError
from backprompt.generation.decoding import Decoding
from backprompt.generation.generate import refused_ids
from backprompt.generation.options import SAMPLING_FIELDS
from backprompt.generation.run import Running, run_with_bar, running
from backprompt.generation.stops import StopStrings, missing_characters
from backprompt.integrations.lm_eval_requests import Continuation, behind_contexts, slices_of
from backprompt.lm import LM
from backprompt.loading import load
from backprompt.progress import Bar, showing
from backprompt.session.text_scores import scores_of_ids, token_scores
from backprompt.text.node import Text
from backprompt.tokens.tokenizer import Speller

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry

    # This import also registers the harness's own models; the harness itself does so only while its registry is empty.
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
        resolve_max_length,
    )
except ImportError as error:
    raise ImportError(
        f"backprompt.integrations.lm_eval needs lm-evaluation-harness ({error}): pip install lm-eval"
    ) from error

logger = logging.getLogger(__name__)

WORKER_OPTIONS = ("num_workers", "num_cpus", "num_gpus")
_OTHER_OPTIONS = {"model", "tokenizer", "joins", "add_special_tokens"}
LM_OPTIONS = tuple(name for name in inspect.signature(LM).parameters if name not in _OTHER_OPTIONS)
"""Options of `LM` for a model that is given by name. Texts are ids here, so options about strings are left out."""


class BackpromptLM(TemplateLM):  # type: ignore[misc]
    """A `backprompt.LM` as a model of lm-evaluation-harness.

    Results stay in the `LM` for later tasks, within its `memory_bytes`.

    Args:
        pretrained: a hub id or the path of a model, an `LM`, or a `(model, tokenizer)` tuple.
        tokenizer: the id, path or object of a tokenizer; by default the model's own.
        dtype: the dtype of the weights; by default the checkpoint's, as for `hf`.
        device: the device; by default as for `backprompt.load`. "cuda", the command line's default, is ignored on a
            machine without CUDA. An `LM` stays on its device.
        max_length: the largest number of tokens given to the model; by default from its configuration.
        add_bos_token: whether the tokenizer adds special tokens to a context; by default as the tokenizer does.
        prefix_token_id: the token before texts without context; by default BOS, or else EOS.
        rolling_as_hf: whether rolling log-likelihoods score the special tokens that the tokenizer adds to a string, as
            `hf` does. With a tokenizer that adds BOS, a second BOS is then scored behind the first. By default only the
            string's own tokens are scored behind the prefix token.
        chat_template_args: arguments for the tokenizer's chat template.
        batch_size, max_batch_size: accepted from the command line and not used. There are no batches: a pass is filled
            up to `max_tokens_per_forward` tokens.
        **lm_options: options of `LM`, such as memory_bytes, store; and num_workers, num_cpus, num_gpus of `RayLM`.

    Raises:
        TypeError: an unknown option, or an option that must be given to the `LM` itself; raised before anything is
            loaded.
        ValueError: an option has an invalid value; raised before anything is loaded.
        The errors of `backprompt.load`.

    """

    def __init__(
        self,
        pretrained: str | LM | tuple[Any, Any],
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | str | None = None,
        device: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        rolling_as_hf: bool = False,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **lm_options: Any,
    ) -> None:
        super().__init__()
        unknown = lm_options.keys() - {*LM_OPTIONS, *WORKER_OPTIONS}
        if unknown:
            raise TypeError(
                f"The model type backprompt takes no argument {', '.join(sorted(map(repr, unknown)))}. It takes "
                f"the arguments of BackpromptLM, and {', '.join(LM_OPTIONS)}. For a model that is loaded in "
                "another way, pass an LM: "
                "BackpromptLM(LM(model, tokenizer))."
            )
        as_bool(rolling_as_hf, "rolling_as_hf")
        if add_bos_token is not None:
            as_bool(add_bos_token, "add_bos_token")
        if max_length is not None:
            as_int(max_length, "max_length", at_least=1)
        if prefix_token_id is not None:
            as_int(prefix_token_id, "prefix_token_id", at_least=0)
        if isinstance(pretrained, tuple):
            pretrained = as_lm(pretrained)
        if isinstance(pretrained, LM):
            late = [*lm_options, *(["dtype"] if dtype is not None else [])]
            if late:
                raise TypeError(f"An LM is loaded already: give {', '.join(late)} to the LM, not here.")
            self.lm = pretrained
        elif isinstance(pretrained, str):
            loader = RayLM if "num_workers" in lm_options else load
            self.lm = loader(pretrained, dtype=dtype or "auto", device=_there(device), **lm_options)
        else:
            raise TypeError(
                f"pretrained must be a hub id, a path or a backprompt.LM, not {type(pretrained).__name__}. "
                "Wrap a model of transformers: LM(model, tokenizer)."
            )
        self.tokenizer = _tokenizer(self.lm, pretrained, tokenizer, add_bos_token)
        self.add_bos_token = add_bos_token
        self.chat_template_args = chat_template_args or {}
        self._rolling_as_hf = rolling_as_hf
        self._max_length = max_length
        own_ids = (prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self._prefix_token_id = next((token_id for token_id in own_ids if token_id is not None), None)
        self._prefix = None if self._prefix_token_id is None else self.tokenizer.decode(self._prefix_token_id)

    # The harness's interface of a model

    @property
    def max_length(self) -> int:
        """The largest number of tokens given to the model."""
        if self._max_length is not None:
            return self._max_length
        config = self.lm.session.causal_lm.config  # not lm.model: reading that lets LM expect written weights
        return int(resolve_max_length(config, self.tokenizer))

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's EOS, if it has one."""
        token_id = self.tokenizer.eos_token_id
        return None if token_id is None else int(token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context.

        Raises:
            ValueError: the tokenizer has no such token, and none was given.

        """
        if self._prefix_token_id is None:
            raise ValueError(
                "A text without context needs a token before it, and this tokenizer has neither BOS nor EOS. "
                "Choose a token: prefix_token_id=..."
            )
        return self._prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """The name that the harness gives to its cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return the counts of `Stats`; the harness adds them to `results["config"]` at the end."""
        return {"backprompt": asdict(self.lm.stats)}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a string, the last `left_truncate_len` of them.

        Special tokens are added if requested; by default `add_bos_token` or the tokenizer decides.
        """
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self._prefix):
            add = False  # the string has them already
        check_encodable(string, "A string of a request")
        ids: list[int] = self.tokenizer.encode(string, **({} if add is None else {"add_special_tokens": add}))
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as one string; without its system message if the template refuses such messages."""
        from jinja2.exceptions import TemplateError

        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self.chat_template_args,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except TemplateError as error:
            logger.warning("The chat template refuses the conversation (%s); the system message is left out.", error)
            others = [message for message in chat_history if message["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(others, **options))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole string, in nats, in windows of at most `max_length` tokens.

        Every token of a string is scored once, the first behind the prefix token; see `rolling_as_hf`. The windows of
        all strings are one forest.

        Raises:
            ValueError: the tokenizer has no prefix token, and none was given.

        """
        windows: list[tuple[None, list[int], list[int]]] = []
        num_windows = []
        for (string,) in Bar([request.args for request in requests], desc="Tokenizing inputs", disable=disable_tqdm):
            pairs = utils.get_rolling_token_windows(
                self._rolling_ids(string), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            own = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            windows += own
            num_windows.append(len(own))
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(logprob for logprob, _ in itertools.islice(scored, num)) for num in num_windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _rolling_ids(self, string: str) -> list[int]:
        """Return the ids of a string that are scored behind the prefix token."""
        if self._rolling_as_hf:
            return self.tok_encode(string)
        ids = self.tok_encode(string, add_special_tokens=False)
        return ids[1:] if ids[:1] == [self.prefix_token_id] else ids  # the prefix token is written in the string

    @property
    def max_gen_toks(self) -> int:
        """The largest number of tokens to generate for a request without such a number."""
        return 256

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated behind each context, up to the first of its stop strings.

        Requests with the same options are generated together. Options are those of `backprompt.generate`, with the
        harness's names for the number of tokens and the stop strings. Stop strings are searched in the generated text,
        decoded by itself, as for `hf`.

        Raises:
            GenerationError: unknown options, or no room for a context.
            ValueError: there is no token to put in an empty context.
            The errors of `backprompt.generate`. All are raised before anything is computed.

        """
        by_options: dict[str, list[int]] = {}
        for idx, request in enumerate(requests):
            by_options.setdefault(repr(sorted(request.args[1].items())), []).append(idx)
        begun = [
            (indices, self._begun([requests[idx].args[0] for idx in indices], requests[indices[0]].args[1]))
            for indices in by_options.values()
        ]
        found: dict[int, str] = {}
        for indices, (run, stop) in begun:
            run_with_bar(run, not disable_tqdm)
            for idx, (best, *_) in zip(indices, run.found(), strict=True):
                ids = [choice.token_id for choice in best.choices]
                string = self.tokenizer.decode(Speller(self.tokenizer).known(ids), skip_special_tokens=True)
                found[idx] = str(postprocess_generated_text(string, stop, None))
                self.cache_hook.add_partial("generate_until", requests[idx].args, found[idx])
        return [found[idx] for idx in range(len(requests))]

    def _begun(self, contexts: Sequence[str], given: dict[str, Any]) -> tuple[Running, list[str]]:
        """Return a generation, checked and with nothing computed, and the strings at which to cut its results."""
        options = normalize_gen_kwargs(given, self.max_gen_toks)
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        stop = [string for string in handle_stop_sequences(options.pop("until", None), eos=end) if string]
        max_new_tokens = options.pop("max_gen_toks")
        if not options.get("do_sample"):
            options = {name: value for name, value in options.items() if name not in SAMPLING_FIELDS}
        room = self.max_length - max_new_tokens
        if room < 1:
            raise GenerationError(
                f"The task asks for {max_new_tokens} tokens, which leaves no room for a context in the model's "
                f"{self.max_length}. Ask for fewer: --gen_kwargs max_gen_toks=..."
            )
        # A task's stop strings suit no particular tokenizer; a string that the tokenizer cannot spell never occurs.
        spelled = [string for string in stop if not missing_characters(string, self.tokenizer)]
        decoding = Decoding(
            self.lm.session.causal_lm,
            self.lm.tokenizer,
            max_new_tokens=max_new_tokens,
            stops=StopStrings(spelled, self.tokenizer, is_behind_prompt=False),
            seed=options.pop("seed", None),
            given=options,
            refused=refused_ids(self.lm),
        )
        encoded = (self.tok_encode(context, left_truncate_len=room) for context in contexts)
        prompts = [Text.from_tokens(ids or [self.prefix_token_id], self.lm) for ids in encoded]
        return running(self.lm, prompts, decoding), stop

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return, for each request, the log-probability of its continuation, and whether greedy decoding gives it.

        Args:
            requests: for each request, context and continuation as strings (the key of the harness's cache; None for no
                entry), the ids of the context, and the ids of the continuation.
            disable_tqdm: show no bar.

        Raises:
            ValueError: a continuation has no tokens, or more than the model can be given; before anything is computed.

        """
        continuations = [self._continuation(*request) for request in requests]
        num_cut = sum(len(context) + len(given) > self.max_length + 1 for _, context, given in requests)
        if num_cut:
            logger.warning(
                "%d of %d requests are longer than %d tokens, and cut off on the left.",
                num_cut,
                len(requests),
                self.max_length,
            )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(continuations)
        with Bar(total=len(continuations), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for chosen in slices_of(continuations, self.lm.session.num_workers):
                for idx, result in zip(chosen, self._score([continuations[idx] for idx in chosen]), strict=True):
                    found[idx] = result
                    strings = requests[idx][0]
                    if strings is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, result)
                bar.update(len(chosen))
        return found

    def _continuation(
        self, strings: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> Continuation:
        if not 1 <= len(continuation) <= self.max_length or not context:
            what = "" if strings is None else f" ({strings[1][:40]!r} behind {strings[0][-40:]!r})"
            raise ValueError(
                f"A request{what} has {len(context)} tokens of context and {len(continuation)} of continuation. It "
                f"needs at least one of each, and at most max_length={self.max_length} of continuation."
            )
        ids = (*context, *continuation)[-(self.max_length + 1) :]
        return Continuation(ids, len(ids) - len(continuation))

    def _score(self, continuations: Sequence[Continuation]) -> Iterator[tuple[float, bool]]:
        """Yield each continuation's sum of log-probabilities, and whether it is the greedy one; all are one forest."""
        session = self.lm.session
        with showing(False):  # there is a bar over the requests
            found = scores_of_ids(session, behind_contexts(continuations))
            if found is None:
                texts = [Text.from_tokens(continuation.token_ids, self.lm) for continuation in continuations]
                found = token_scores(session, texts, [continuation.start for continuation in continuations])
        lengths = np.array(found.lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        logprobs = found.scores.logprobs.cpu().double().numpy()  # MPS has no float64
        is_argmax = found.scores.is_argmax.cpu().numpy()
        yield from zip(
            np.add.reduceat(logprobs, starts).tolist(), np.logical_and.reduceat(is_argmax, starts).tolist(), strict=True
        )


def _there(device: str | None) -> str | None:
    """Return the device, or None for CUDA on a machine without it, which `hf` ignores, too."""
    is_missing = device is not None and device.startswith("cuda") and not torch.cuda.is_available()
    return None if is_missing else device


def _tokenizer(lm: LM, pretrained: str | LM, tokenizer: Any, add_bos_token: bool | None) -> Any:
    """Return the tokenizer to encode with; a name is loaded as the `hf` backend does."""
    name = tokenizer
    if tokenizer is None and isinstance(pretrained, str) and add_bos_token is not None:
        name = pretrained  # load has no such option
    if isinstance(name, str):
        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        return AutoTokenizer.from_pretrained(name, **options)
    return lm.tokenizer if tokenizer is None else tokenizer


def main() -> None:
    """Run the harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if "backprompt" not in model_registry:  # with -m this module is loaded twice: the name is registered, not the class
    model_registry.register("backprompt", target="backprompt.integrations.lm_eval:BackpromptLM")

if __name__ == "__main__":
    main()
