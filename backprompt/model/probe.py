"""The probe: before a model is used, the results of a small packed tree are compared with those of its plain calls.

The probe finds faults that the configuration does not show: layers that mix tokens outside attention (state-space
layers, convolutions), norms outside the body, unusual heads. The tree has 16 tokens,

    a a a a --+-- b b b --+-- c c
              |           +-- d d
              +-- e e e e e

and runs as two passes, so that attention to cached keys, to keys of the same pass and within a tile are all tested.

In low precision a comparison of logits is coarse: small weights mix tokens by less than the tolerance. So the second
pass runs once more with other tokens in the places of `bbb`, `cc` and `dd`. The rows of `eeeee` do not see these
tokens, and must stay the same.

Layers that keep a state of all tokens before are refused by their kind: see families.py.

The choice of experts can flip with the last bit. A flip changes rows of one set of tokens, but a wrong layer changes
rows of every set. So a model with experts is refused only if several sets show a fault.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backprompt.errors import NonFiniteError, UnsupportedModelError
from backprompt.forest.forest import Forest
from backprompt.forest.passes import missing_spans
from backprompt.forest.plan import plan_pass
from backprompt.forest.span import Span
from backprompt.logprobs import are_distributions
from backprompt.memory.blocks import gather, states_of
from backprompt.model import skeleton
from backprompt.model.executor import Executor
from backprompt.model.forwarded import Computed
from backprompt.model.in_flight import is_about_marker
from backprompt.model.levels import Levels
from backprompt.model.levels_probe import ways_by_levels
from backprompt.model.limits import Limits
from backprompt.model.quantized import compared_as, multiplies_in_tf32, special_weights

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
"""Largest gap in logits, absolute below 1 and relative to the largest logit above: docs/design/exactness.md.

In float64 many models still take their softmax in float32.
"""

_CHANGE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 2e-4, torch.bfloat16: 2e-4}
"""Largest change of hidden states, relative to the largest, when tokens change that a text does not see."""
_CHANGE_BY_EXPERTS = _CHANGE | {torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""The same for models with experts: the rounding of an expert depends on the number of rows that chose it."""

_PATHS = ("aaaabbbcc", "aaaabbbdd", "aaaaeeeee")
"""Texts of one length, so that one plain call takes all of them."""
_TILE_TOKENS = 3
_MAX_TRIES = 4
"""Number of token sets to try: a model may be used even if a few rows of its embedding are not finite."""

_MAX_PLACEHOLDERS = 16

_Texts = list[tuple[int, ...]]


def probe(model: nn.Module, executor: Executor) -> None:
    """Compare packed evaluation with the plain call, and with itself after a change that must not matter.

    Raises:
        UnsupportedModelError: the two differ by more than the tolerance, or the model cannot be run packed.
        NonFiniteError: NaN or infinity in the plain call itself, or on the way in a packed pass.

    """
    plain_model = skeleton.plain_copy(model)
    why = skeleton.why_not_packed(model)
    fault = _compared(model, plain_model, executor) if why is None else UnsupportedModelError(why)
    if fault is None:
        return
    if not _is_causal(plain_model, executor):
        raise UnsupportedModelError(
            f"{type(model).__name__} lets tokens attend to later tokens, as an encoder does, so its results for a "
            "text change with the text behind it. Use a causal LM (a configuration of some families needs "
            "is_decoder=True)."
        ) from fault
    _probe_by_levels(model, plain_model, executor, fault)


def _probe_by_levels(
    model: nn.Module, plain_model: nn.Module, executor: Executor, not_packed: UnsupportedModelError
) -> None:
    """Let the executor forward passes by levels, in the first way that gives the numbers of the plain call."""
    ids = _without_placeholders(token_ids_of("abcdefg", executor.limits.num_embeddings, 0), executor.limits)
    fault: UnsupportedModelError | None = None
    try:
        for levels in ways_by_levels(model, executor, ids, str(not_packed)):
            executor.go_by_levels(levels)
            found = _compared(model, plain_model, executor)
            if found is None:
                return
            fault = fault or found
    except UnsupportedModelError as error:
        fault = fault or error
    raise UnsupportedModelError(f"{not_packed} {fault}") from not_packed


def _compared(model: nn.Module, plain_model: nn.Module, executor: Executor) -> UnsupportedModelError | None:
    """Compare the executor's evaluation with the plain call; return the fault, or None."""
    has_experts = skeleton.has_experts(model)
    fault: UnsupportedModelError | None = None
    for first in range(_MAX_TRIES if has_experts else 1):
        texts, plain = _plain_logits(plain_model, executor, first)
        fault = _fault(model, executor, texts, plain, has_experts=has_experts)
        if fault is None:
            executor.refuse_placeholders(_refused_placeholders(plain_model, executor))
            return None
    return fault


def _fault(
    model: nn.Module, executor: Executor, texts: _Texts, plain_logits: Tensor, *, has_experts: bool
) -> UnsupportedModelError | None:
    """Return why one set of tokens shows that the model cannot be packed, or None."""
    name = type(model).__name__
    try:
        packed, change = _packed_logits(executor, texts)
    except NonFiniteError as error:
        # In float16 the plain call may be just within range, and torch's attention hides some NaN scores.
        raise NonFiniteError(
            f"{error} (The plain call returned numbers for the same tokens, a few of the probe's.)"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        return error if isinstance(error, UnsupportedModelError) else _cannot_run(name, error, executor.levels)
    dtype = max(skeleton.head_dtype(model), packed[0].dtype, key=TOLERANCE.__getitem__)  # logits may be cast up
    for ids, logits, plain in zip(texts, packed, plain_logits, strict=True):
        if logits.dtype == torch.float16:
            for idx in (~are_distributions(logits)).nonzero()[:, 0].tolist():
                raise executor.logits_error(logits[idx], ids[: idx + 1])
        scale = max(1.0, float(plain[plain.isfinite()].abs().max()))
        tolerance = TOLERANCE[_as_multiplied(compared_as(model, logits.dtype), executor.device)]
        gap = float(differences(logits.float(), plain.float()).max())
        if not gap <= tolerance * scale:
            if executor.levels is not None:
                return UnsupportedModelError(
                    f"Spans cannot continue its cache either: the logits differ by {gap:.2e} from those of its plain "
                    f"call, more than {tolerance * scale:.0e}."
                )
            return UnsupportedModelError(
                f"{name} gives other logits in a packed pass than in its plain call: they differ by {gap:.2e}, more "
                f"than {tolerance * scale:.0e} for {dtype}. Something in it mixes tokens outside attention, so "
                "its texts cannot share a pass."
            )
    allowed = (_CHANGE_BY_EXPERTS if has_experts else _CHANGE)[_as_multiplied(dtype, executor.device)]
    if not change <= allowed:
        return UnsupportedModelError(
            f"{name} gives a text other hidden states when other texts in the same pass change: by {change:.2e} of the "
            f"largest, more than {allowed:.0e}. Something in it mixes tokens outside attention, so its texts cannot "
            "share a pass."
        )
    return None


def _cannot_run(name: str, error: Exception, levels: Levels | None) -> UnsupportedModelError:
    """Return the error for a model that raises one on a packed row, or behind a cache."""
    if levels is not None:
        return UnsupportedModelError(f"Spans cannot continue its cache either: {type(error).__name__}: {error}")
    if is_about_marker(error):
        what = "uses its attention mask in code of its own, so its attention cannot be packed"
    else:
        what = f"cannot be run on a packed row of texts: {type(error).__name__}: {error}"
    found = UnsupportedModelError(
        f"{name} {what}. Use a family whose layers go through transformers' attention interface (GPT-2, Llama, Qwen, "
        "Mistral, Gemma, OPT, Phi ...)."
    )
    found.__cause__ = error
    return found


def _is_causal(plain_model: nn.Module, executor: Executor) -> bool:
    """Return whether the plain call computes the same for the beginning of a text as for the text.

    One equal row is enough: in an encoder later tokens change all rows, and a flip in the choice of experts changes a
    few.
    """
    texts, plain_logits = _plain_logits(plain_model, executor, 0)
    start = len(texts[0]) // 2
    alone: Tensor = plain_model(input_ids=torch.tensor([texts[0][:start]], device=executor.device)).logits[0]
    dtype = max(skeleton.head_dtype(plain_model), alone.dtype, key=TOLERANCE.__getitem__)
    gaps = differences(alone.float(), plain_logits[0, :start].float()).amax(dim=-1)
    tolerance = TOLERANCE[_as_multiplied(dtype, executor.device)]
    return float(gaps.min()) <= tolerance * max(1.0, float(alone.abs().max()))


def _as_multiplied(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype whose tolerances fit numbers in `dtype`: TF32 rounds factors to as many bits as float16 has."""
    return torch.float16 if multiplies_in_tf32(device, dtype) else dtype


def differences(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the distances between numbers: 0 where both are -inf, infinity where one is NaN."""
    return torch.where(ours == theirs, 0.0, (ours - theirs).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _plain_logits(plain_model: nn.Module, executor: Executor, first: int) -> tuple[_Texts, Tensor]:
    """Return texts whose plain logits are distributions, and these logits, `(texts, tokens, vocab)`."""
    limits = executor.limits
    error: NonFiniteError | None = None
    for attempt in range(first, first + _MAX_TRIES):
        texts = [_without_placeholders(token_ids_of(path, limits.num_embeddings, attempt), limits) for path in _PATHS]
        plain = _plain_call(plain_model, texts, executor.device)
        unusable = (~are_distributions(plain)).nonzero().tolist()
        if not unusable:
            return texts, plain
        text_idx, idx = unusable[0]
        error = error or executor.logits_error(plain[text_idx, idx], texts[text_idx][: idx + 1])
    raise NonFiniteError(f"{error} All {_MAX_TRIES} sets of tokens with which the model was tested gave such an error.")


def _plain_call(plain_model: nn.Module, texts: _Texts, device: torch.device) -> Tensor:
    try:
        logits: Tensor = plain_model(input_ids=torch.tensor(texts, device=device)).logits
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        how = "with its quantized weights" if special_weights(plain_model) else "with token ids alone"
        raise UnsupportedModelError(
            f"{type(plain_model).__name__} cannot be called {how}: {type(error).__name__}: {error}"
        ) from error
    if logits.shape[:-1] != (len(texts), len(texts[0])):
        raise UnsupportedModelError(
            f"{type(plain_model).__name__} returns logits of the shape {tuple(logits.shape)} for {len(texts)} texts of "
            f"{len(texts[0])} tokens, so they are not the logits of next tokens. Use a causal LM."
        )
    return logits


def token_ids_of(path: str, num_embeddings: int, attempt: int) -> tuple[int, ...]:
    """Spread the probe's tokens over the vocabulary; equal paths get equal ids, and each attempt other ids."""
    return tuple((31 * idx + 7 * ord(letter) + 11 + 5 * attempt) % num_embeddings for idx, letter in enumerate(path))


def _refused_placeholders(plain_model: nn.Module, executor: Executor) -> frozenset[int]:
    """Return the ids that stand for images or sounds; none if the plain call embeds all of them like other ids."""
    placeholders = executor.limits.placeholders
    if not placeholders or len(placeholders) > _MAX_PLACEHOLDERS:
        return placeholders
    (usual,) = _without_placeholders((min(placeholders),), executor.limits)
    ids = (usual, *sorted(placeholders), usual)
    forest = Forest()
    executor.refuse_placeholders(frozenset())
    try:
        plain: Tensor = plain_model(input_ids=torch.tensor([ids], device=executor.device)).logits[0]
        end = forest.insert(ids)
        executor.compute(plan_pass(missing_spans([end]), _TILE_TOKENS)).place()
        packed = executor.logits(gather([states_of(span) for span in end.path()], "hidden"))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, ArithmeticError):
        return placeholders  # the plain call needs an image or a sound for each of these ids
    finally:
        forest.clear()
        executor.refuse_placeholders(placeholders)
    tolerance = TOLERANCE[_as_multiplied(packed.dtype, executor.device)]
    allowed = tolerance * float(plain.abs().max()) * (1 if packed.itemsize > 2 else 1 / 8)
    return frozenset() if float(differences(packed.float(), plain.float()).max()) <= allowed else placeholders


def _without_placeholders(ids: tuple[int, ...], limits: Limits) -> tuple[int, ...]:
    """Return the ids with another token in the places of those that stand for images or sounds."""
    usual = next(token_id for token_id in range(limits.num_embeddings) if token_id not in limits.placeholders)
    return tuple(usual if token_id in limits.placeholders else token_id for token_id in ids)


def _with_other_siblings(texts: _Texts) -> _Texts:
    """Return the texts with the last one unchanged, and other tokens in the branches of the others.

    The tokens come from other branches, so their embeddings are known to be finite.
    """
    (*_, c1, c2), (*_, d1, d2), (*trunk, e3, e4, e5) = texts
    other = (*trunk[:4], e5, e4, e3)
    return [(*other, d2, d1), (*other, c2, c1), texts[-1]]


def _packed_logits(executor: Executor, texts: _Texts) -> tuple[list[Tensor], float]:
    """Compute the texts as one forest in two passes, and then the second pass with other siblings of the last text.

    Returns:
        The logits of each text, `(tokens, vocab)`, and the change of the last text's hidden states.

    """
    forest = Forest()
    ends = [forest.insert(ids) for ids in texts]
    other_ends = [forest.insert(ids) for ids in _with_other_siblings(texts)]
    try:
        (trunk, *_), (_, *changed) = missing_spans(ends), missing_spans(other_ends)
        executor.compute(plan_pass([trunk], _TILE_TOKENS)).place()
        spans = missing_spans(ends)
        other = executor.compute(plan_pass(changed, _TILE_TOKENS))
        computed = executor.compute(plan_pass(spans, _TILE_TOKENS))
        change = 0.0
        if [len(span.token_ids) for span in spans] == [len(span.token_ids) for span in changed]:
            change = _change(*(_hidden(of, ends[-1].path()) for of in (computed, other)))
        computed.place()
        places = [[states_of(span) for span in end.path()] for end in ends]
        return [executor.logits(gather(path, "hidden")) for path in places], change
    finally:
        forest.clear()  # spans refer to each other: without this, their tensors would wait for the cycle collector


def _hidden(computed: Computed, path: Sequence[Span]) -> Tensor:
    """Return the final hidden states of the spans of a path that a pass has computed, `(tokens, hidden)`."""
    return gather([computed.states_of[span] for span in path if span in computed.states_of], "hidden")


def _change(before: Tensor, after: Tensor) -> float:
    """Return the largest change of a row, relative to the largest number in the row."""
    sizes = before.float().abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((before.float() - after.float()).abs().amax(-1) / sizes).max())
