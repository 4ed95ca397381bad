"""The `LM` of a model that is being trained: made once, kept as long as the model, and empty between calls.

The model itself keeps its `LM`, in an attribute that copies and pickles leave out. A table of `LM`s would keep models
alive, whatever its keys are, because an `LM` holds its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from backprompt.arguments import as_int
from backprompt.errors import UnsupportedModelError
from backprompt.lm import LM
from backprompt.model.skeleton import unwrap
from backprompt.model.spread import head_device, is_spread
from backprompt.session.budgets import default_bytes
from backprompt.session.session import Session

_ATTRIBUTE = "_backprompt_lm"


class Scorer(NamedTuple):
    """An `LM`, and whether it keeps what it computes between calls."""

    lm: LM
    keeps_results: bool


def scorer_of(lm_or_model: LM | nn.Module, max_tokens_per_forward: int | None, requires_grad: bool = False) -> Scorer:
    """Return the given `LM`, or the `LM` that the given model keeps.

    Raises:
        TypeError: the value is neither an `LM` nor a model.
        ValueError: an `LM` is given together with `max_tokens_per_forward`.
        UnsupportedModelError: dropout is active in the model, or gradients would not reach other processes.

    """
    if max_tokens_per_forward is not None:
        as_int(max_tokens_per_forward, "max_tokens_per_forward", at_least=1)
    if isinstance(lm_or_model, LM):
        if max_tokens_per_forward is not None:
            raise ValueError(
                "max_tokens_per_forward can be given with a model only. An LM gets this limit when it is made: "
                "LM(model, tokenizer, max_tokens_per_forward=...)."
            )
        if requires_grad:
            check_no_dropout(lm_or_model.session.model)
        return Scorer(lm_or_model, keeps_results=True)
    if not isinstance(lm_or_model, nn.Module):
        raise TypeError(f"lm_or_model must be an LM or a model of transformers, not {type(lm_or_model).__name__}.")
    if requires_grad and isinstance(lm_or_model, DistributedDataParallel):
        raise UnsupportedModelError(
            "DistributedDataParallel averages gradients only after a call of its own forward, but a shared pass does "
            "not make this call. Give its .module, and average the gradients of the processes yourself."
        )
    model = lm_or_model.module if isinstance(lm_or_model, DistributedDataParallel) else lm_or_model
    check_no_dropout(model)
    return Scorer(_own_lm(model), keeps_results=False)


def fit(session: Session, max_tokens_per_forward: int | None) -> None:
    """Set the budgets of a model's `LM` from the memory that is free now; the caller must hold the lock.

    Between two calls a trainer may have made the states of its optimizer, or freed its activations.
    """
    computation = session.current().computation
    computation.max_tokens = max_tokens_per_forward or computation.executor.tokens_per_forward()
    computation.memory.max_bytes = default_bytes(session.model)


def check_no_dropout(model: nn.Module) -> None:
    """Raise UnsupportedModelError if a module drops numbers or adds noise at random in the model's present mode."""
    for name, module in model.named_modules():
        if module.training and (found := _randomness(module)) is not None:
            raise UnsupportedModelError(
                f"Dropout is active: the model is in training mode, and its module {name or type(module).__name__!r} "
                f"{found}. The trainer's own numbers then come from random parts of the model, which a shared pass "
                "cannot reproduce. Set dropout to 0 (disable_dropout=True in trl, lora_dropout=0 in peft, attn_pdrop=0 "
                "and the like in a configuration), or call model.eval() for this call."
            )


def _randomness(module: nn.Module) -> str | None:
    """Return the random operation of a module in training, for messages; None if there is none.

    Many layers of transformers have no module for dropout, but a number in an attribute: `attention_dropout`,
    `residual_dropout`, `resid_pdrop`, `layerdrop`. Routers of experts have `router_jitter_noise`.
    """
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return f"drops with probability {module.p:g}" if module.p > 0 else None
    for name, value in vars(module).items():
        if isinstance(value, float) and value > 0:
            if "drop" in name:
                return f"drops with probability {value:g}"
            if name.endswith("jitter_noise"):
                return f"adds noise ({name} = {value:g})"
    return None


def goes_as_with_gradients(model: nn.Module) -> bool:
    """Return whether a call without gradients runs the model as a call with gradients does.

    This is the case under autocast, and with half-precision weights. There, two ways of computing the same numbers
    differ by rounding, so the ratio of a policy's probabilities to its own old ones would not be 1. A model that is
    offloaded or spread over devices always runs through its `LM`, which shuts autocast out.
    """
    model = unwrap(model)
    if is_spread(model):
        return False
    is_half = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in model.parameters())
    return is_half or torch.is_autocast_enabled(head_device(model).type)


class _Kept:
    """Holds the `LM` of a model in the model's attribute. Copies and pickles of the holder are empty."""

    def __init__(self, lm: LM | None = None) -> None:
        self.lm = lm

    def __copy__(self) -> _Kept:
        return _Kept()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


def _own_lm(model: nn.Module) -> LM:
    """Return the `LM` that a model keeps; it is made if there is none."""
    kept = vars(model).get(_ATTRIBUTE)
    lm: LM | None = None if kept is None else kept.lm
    if lm is None or lm.session.model is not model:  # a shallow copy of a model has the attributes of the original
        lm = LM(model, NoTokenizer())
        vars(model)[_ATTRIBUTE] = _Kept(lm)
    return lm


class NoTokenizer:
    """Stands in for the tokenizer if only ids are needed: it knows no string, and shows ids as numbers.

    Attributes:
        vocab_size: larger than any id, so that each is shown.

    """

    vocab_size = 1 << 32

    def __call__(self, strings: Sequence[str] | str, **options: object) -> dict[str, list[Any]]:
        """Return no ids for any string."""
        return {"input_ids": [] if isinstance(strings, str) else [[] for _ in strings]}

    def __len__(self) -> int:
        return 0

    def get_vocab(self) -> dict[str, int]:
        """Return the tokens: there are none."""
        return {}

    def decode(self, token_ids: Iterable[int], **options: object) -> str:
        """Return the ids as they are printed."""
        return " ".join(map(str, token_ids))
