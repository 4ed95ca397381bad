"""TRL's trainers, with each distinct token of a batch forwarded and sent backward once.

    from trl import GRPOTrainer
    from backprompt.integrations.trl import ForestLogprobs

    class Trainer(ForestLogprobs, GRPOTrainer):
        pass

The completions of a group share their prompt, and so do the two answers of a pair. TRL forwards the prompt once for
each of them, with padding around it. `ForestLogprobs` replaces the method that computes log-probabilities and entropies
(GRPO, RLOO). `ForestStates` replaces the body of the model, and TRL's own head continues from the hidden states (DPO).
Data, rewards, losses and metrics stay the trainer's own. This module imports nothing of TRL.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from backprompt.errors import TextTooLongError, UnsupportedModelError
from backprompt.model.skeleton import decoder_of, unwrap
from backprompt.training import Account, RowScores, hidden_states, token_logprobs

logger = logging.getLogger(__name__)

KEYWORD = "backprompt_forest"
"""The keyword by which a call reaches the forest through all wrappers of a model."""

Work: TypeAlias = "Callable[[nn.Module], RowScores]"

Method: TypeAlias = "Callable[..., Any]"
"""The forward method of a module as a function, whose first argument is the module."""

METHOD = "_get_per_token_logps_and_entropies"
"""The method of a trainer that `ForestLogprobs` replaces."""


class _Forest:
    """The common part of the mixins: the reasons why the forest is not used, and the account of the tokens.

    Attributes:
        forest_refusals: the reasons why calls used the trainer's own method, each once.

    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise TypeError for a class that names a trainer before the mixin, which would then have no effect."""
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(_Forest)]:
            if hasattr(base, "compute_loss") and not issubclass(base, _Forest):
                raise TypeError(
                    f"{cls.__name__} names {base.__name__} before the forest's mixin, so nothing would go through the "
                    "forest. Name the mixin first, as in class Trainer(ForestLogprobs, GRPOTrainer)."
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forest_refusals: list[str] = []

    def _causal_models(self) -> list[nn.Module]:
        """Return the model and the reference, each without adapters around it."""
        models = (self.model, getattr(self, "ref_model", None))  # type: ignore[attr-defined]
        unwrapped = [self.accelerator.unwrap_model(model) for model in models if model is not None]  # type: ignore[attr-defined]
        return [model.get_base_model() if hasattr(model, "get_base_model") else model for model in unwrapped]

    def _why_cut(self) -> str | None:
        """Return the reason if no process holds the whole model."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            return "the model is split over several devices"
        if self.accelerator.parallelism_config is not None:  # type: ignore[attr-defined]
            return "a parallelism_config is set"
        if getattr(self.args, "use_liger_kernel", False):  # type: ignore[attr-defined]
            return "use_liger_kernel is set"
        return None

    def _say_once(self, reason: str) -> None:
        if reason not in self.forest_refusals:
            self.forest_refusals.append(reason)
            logger.warning(
                "Batches are computed by the trainer's own method, not by the forest: %s.", reason.rstrip(".")
            )

    def _count(self, account: Account) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]  # type: ignore[attr-defined]
        metrics["forest/tokens_given"].append(float(account.tokens_given))
        metrics["forest/tokens_forwarded"].append(float(account.tokens_forwarded))


class ForestLogprobs(_Forest):
    """A mixin for `GRPOTrainer` and `RLOOTrainer` of TRL 1.16 and newer: log-probabilities by the forest of a batch.

    Name it before the trainer: `class Trainer(ForestLogprobs, GRPOTrainer)`. Numbers and gradients equal those of the
    trainer's own method up to rounding. Calls that the forest cannot compute use that method, and the log says so once
    for each reason. The reasons are images and other inputs beside tokens, the balancing loss of mixtures of experts,
    models that are split over several devices (FSDP, DeepSpeed, tensor, context or sequence parallelism),
    `use_liger_kernel`, `cast_lm_head_to_fp32`, active dropout, rows beyond the model's length, and models that
    backprompt does not support. Models that every process holds whole (DDP) are supported.

    The metrics `forest/tokens_given` and `forest/tokens_forwarded` are the tokens in a call's batch, and the tokens
    that were forwarded for them.

    Raises:
        TypeError: the trainer has no method that the mixin can replace.

    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        method = getattr(super(), METHOD, None)
        if method is None or "compute_aux_loss" not in inspect.signature(method).parameters:
            raise TypeError(
                "ForestLogprobs must stand before GRPOTrainer or RLOOTrainer of TRL 1.16 or newer, as in class "
                "Trainer(ForestLogprobs, GRPOTrainer). For DPOTrainer use ForestStates."
            )
        super().__init__(*args, **kwargs)
        for causal in self._causal_models():
            _let_through(causal)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log-probabilities and entropies, each `(rows, logits_to_keep)`; see the trainer's own method.

        `batch_size` bounds the number of rows that are forwarded at once, as in the trainer's method.
        """
        reason = self._why_not(compute_aux_loss, others)
        if reason is None:
            max_tokens = None if batch_size is None else batch_size * input_ids.shape[1]

            def work(causal: nn.Module) -> RowScores:
                return token_logprobs(
                    causal,
                    input_ids,
                    attention_mask,
                    logits_to_keep,
                    temperature=self.temperature,  # type: ignore[attr-defined]
                    entropy=compute_entropy,
                    requires_grad=torch.is_grad_enabled(),
                    max_tokens_per_forward=max_tokens,
                )

            try:
                unwrap(self.accelerator.unwrap_model(model))  # type: ignore[attr-defined]  # refuses adapters of the input
                with self.accelerator.autocast():  # type: ignore[attr-defined]
                    found: RowScores = model(**{KEYWORD: work})
            except (UnsupportedModelError, TextTooLongError) as error:
                reason = _said(error)
            else:
                self._count(found.account)
                return found.logprobs, found.entropies, None
        self._say_once(reason)
        return super()._get_per_token_logps_and_entropies(  # type: ignore[misc, no-any-return]
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=batch_size,
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
            **others,
        )

    def _why_not(self, compute_aux_loss: bool, others: dict[str, Any]) -> str | None:
        """Return the reason for which a call goes to the trainer's own method; None if there is none."""
        given = sorted(name for name, value in others.items() if value is not None)
        if given:
            return f"the batch has inputs beside tokens ({', '.join(given)})"
        if compute_aux_loss:
            return "the balancing loss of a mixture of experts is requested"
        if getattr(self.args, "cast_lm_head_to_fp32", False):  # type: ignore[attr-defined]
            return "cast_lm_head_to_fp32 is set"
        return self._why_cut()


class ForestStates(_Forest):
    """A mixin for `DPOTrainer` of TRL: hidden states by the forest of a batch, which TRL's own head continues from.

    Name it before the trainer: `class Trainer(ForestStates, DPOTrainer)`. Chosen and rejected answers share their
    prompt, which goes once through the body of the model, and once through the body of the reference model. Calls that
    the forest cannot compute, and the metrics, are treated as by `ForestLogprobs`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for causal in self._causal_models():
            body = decoder_of(causal)
            if body is not None:
                _share(causal, body, self._states)

    def _states(self, causal: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        """Return the final hidden states of a batch, `(rows, columns, hidden)`; None if the body must compute them."""
        given = {name for name, value in batch.items() if value is not None and name != "return_dict"}
        if given != {"input_ids", "attention_mask", "use_cache"} or batch["use_cache"]:
            if {"pixel_values", "output_router_logits"} & given:
                self._say_once(f"the batch has more than tokens ({', '.join(sorted(given))})")
            return None  # such as a call of generation
        reason = self._why_cut()
        if reason is None:
            try:
                found = hidden_states(causal, batch["input_ids"], batch["attention_mask"])
            except (UnsupportedModelError, TextTooLongError) as error:
                reason = _said(error)
            else:
                self._count(found.account)
                return found.hidden
        self._say_once(reason)
        return None


def _said(error: Exception) -> str:
    """Return the reason that an error gives, the same for all batches."""
    if isinstance(error, TextTooLongError):
        return "rows are longer than the model was trained for"
    return str(error)


def _let_through(causal: nn.Module) -> None:
    """Let a call with `KEYWORD` run the given function on the model, within the model's wrappers, such as DDP's."""

    def forward(plain: Method, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        work: Work | None = kwargs.pop(KEYWORD, None)
        return plain(self, *args, **kwargs) if work is None else work(self)

    _replace_forward(causal, forward)


def _share(causal: nn.Module, body: nn.Module, states_of: Callable[[nn.Module, dict[str, Any]], Tensor | None]) -> None:
    """Let the body of a model return the hidden states of `states_of`, and compute them itself if those are None."""

    def forward(plain: Method, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = None if args or self is not body else states_of(causal, kwargs)
        return plain(self, *args, **kwargs) if hidden is None else BaseModelOutputWithPast(last_hidden_state=hidden)

    _replace_forward(body, forward)


def _replace_forward(module: nn.Module, replacement: Callable[..., Any]) -> None:
    """Replace a module's forward method by a function, which gets the method as its first argument.

    A copy of the module gets the same function, which must then run the copy and not the original module.
    """
    before: Any = module.forward
    is_method = getattr(before, "__self__", None) is module
    plain: Method = before.__func__ if is_method else lambda self, *args, **kwargs: before(*args, **kwargs)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replacement(plain, self, *args, **kwargs)

    functools.update_wrapper(forward, type(module).forward)
    vars(forward)["__signature__"] = inspect.signature(type(module).forward)  # generation looks for it
    vars(forward)["__wrapped__"] = plain if is_method else before
    module.forward = types.MethodType(forward, module)
