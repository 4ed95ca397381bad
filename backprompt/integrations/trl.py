"""TRL's trainers, with each distinct token of a batch forwarded and sent backward once: `ForestLogprobs`.

    from trl import GRPOTrainer
    from backprompt.integrations.trl import ForestLogprobs

    class Trainer(ForestLogprobs, GRPOTrainer):
        pass

The completions of a group share their prompt. TRL forwards the prompt once for each of them, with padding around it.
The mixin replaces the method that computes log-probabilities and entropies, and nothing else: data, rewards, losses and
metrics are the trainer's own.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backprompt.errors import UnsupportedModelError
from backprompt.training import RowScores, token_logprobs

try:
    import trl
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        "ForestLogprobs needs TRL 1.16 or newer: pip install 'trl>=1.16', which is what the extra backprompt[trl] "
        "asks for.",
        name="trl",
    ) from error

logger = logging.getLogger(__name__)

KEYWORD = "backprompt_forest"
"""The keyword by which a call reaches the forest through everything that wraps a model."""

Work = Callable[[nn.Module], RowScores]


class ForestLogprobs:
    """A mixin for `GRPOTrainer` and `RLOOTrainer` of TRL: log-probabilities and entropies by the forest of a batch.

    Name it before the trainer: `class Trainer(ForestLogprobs, GRPOTrainer)`. Numbers and gradients are those of the
    trainer's own method but for rounding. What the forest cannot do goes to that method, and the log says so once for
    each reason: images and other inputs beside tokens, the balancing loss of mixtures of experts, models that are cut
    over several devices (FSDP, DeepSpeed, tensor, context or sequence parallelism), a head in float32 of a model in
    another dtype, models that backprompt does not support. Models that every process holds whole (DDP) are fine.

    The metrics `forest/tokens_given` and `forest/tokens_forwarded` say how many tokens each call saved.

    Attributes:
        forest_refusals: the reasons for which calls went to the trainer's own method, each once.

    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forest_refusals: list[str] = []
        for model in (self.model, getattr(self, "ref_model", None)):  # type: ignore[attr-defined]
            if model is not None:
                _let_through(_causal_of(self.accelerator.unwrap_model(model)))  # type: ignore[attr-defined]

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

        `batch_size` bounds what is forwarded at once, as there: so many rows' tokens.
        """
        reason = self._refusal(compute_aux_loss, others)
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
                with self.accelerator.autocast():  # type: ignore[attr-defined]
                    found: RowScores = model(**{KEYWORD: work})
            except UnsupportedModelError as error:
                reason = str(error)
            else:
                self._count(found)
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

    def _refusal(self, compute_aux_loss: bool, others: dict[str, Any]) -> str | None:
        """Return the reason for which a call goes to the trainer's own method; None if there is none."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        given = [name for name, value in others.items() if value is not None]
        if given:
            return f"the batch has inputs beside tokens ({', '.join(sorted(given))})"
        if compute_aux_loss:
            return "the balancing loss of a mixture of experts is asked for"
        if getattr(self.args, "cast_lm_head_to_fp32", False):  # type: ignore[attr-defined]
            return "cast_lm_head_to_fp32 is set"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            return "the model is cut over several devices"
        if accelerator.parallelism_config is not None:
            return "a parallelism_config is set"
        return None

    def _say_once(self, reason: str) -> None:
        if reason not in self.forest_refusals:
            self.forest_refusals.append(reason)
            logger.warning("Log-probabilities come from the trainer's own method, and not from the forest: %s.", reason)

    def _count(self, found: RowScores) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]  # type: ignore[attr-defined]
        metrics["forest/tokens_given"].append(float(found.account.tokens_given))
        metrics["forest/tokens_forwarded"].append(float(found.account.tokens_forwarded))


def _causal_of(model: nn.Module) -> nn.Module:
    """Return the causal language model inside an adapter."""
    base: nn.Module = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    return base


def _let_through(causal: nn.Module) -> None:
    """Let calls with `KEYWORD` do their work on the model, inside of all that wraps it, such as DDP's bookkeeping."""
    plain = causal.forward

    @functools.wraps(type(causal).forward)  # generation looks for the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        work: Work | None = kwargs.pop(KEYWORD, None)
        return plain(*args, **kwargs) if work is None else work(self)

    causal.forward = types.MethodType(forward, causal)
