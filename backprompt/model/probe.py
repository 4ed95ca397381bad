"""The probe: before a model is used, a small packed tree is compared with its plain calls.

The probe catches what the configuration does not show: layers that mix tokens outside attention (state-space layers,
convolutions), norms outside the body, unusual heads. The tree has 12 tokens,

    a a a a --+-- b b b --+-- c c
              |           +-- d
              +-- e e

and runs as two passes, so that attention to cached keys, to keys of the same pass and within a tile all take part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backprompt.errors import NonFiniteError, UnsupportedModelError
from backprompt.forest.forest import Forest
from backprompt.forest.passes import missing_spans
from backprompt.forest.plan import plan_pass
from backprompt.logprobs import are_distributions
from backprompt.memory.blocks import gather, states_of
from backprompt.model import skeleton
from backprompt.model.executor import Executor

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
"""Largest gap in logits, absolute below 1 and relative to the largest logit above: docs/design/exactness.md.

In float64 many models still take their softmax in float32.
"""

_PATHS = ("aaaabbbcc", "aaaabbbd", "aaaaee")
_TILE_TOKENS = 3
_MAX_TRIES = 4
"""Number of token sets to try: a few rows of an embedding that are not finite are no reason to refuse a model."""


def probe(model: nn.Module, executor: Executor) -> None:
    """Compare packed evaluation with the plain call.

    Raises:
        UnsupportedModelError: the two differ by more than the tolerance, or the model cannot be run packed.
        NonFiniteError: NaN or infinity in the plain call itself, or on the way in a packed pass.

    """
    name = type(model).__name__
    texts, plain_logits = _plain_logits(model, executor)
    try:
        packed = _packed_logits(executor, texts)
    except NonFiniteError as error:
        # In float16 the plain call may be just within range, and torch's attention hides some scores that are NaN.
        raise NonFiniteError(
            f"{error} (The plain call returned numbers for the same tokens, a few of the probe's.)"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"{name} cannot be run on a packed row of texts: {type(error).__name__}: {error}. Use a family whose "
            "layers go through transformers' attention interface (GPT-2, Llama, Qwen, Mistral, Gemma, OPT, Phi ...)."
        ) from error
    for ids, logits, plain in zip(texts, packed, plain_logits, strict=True):
        if logits.dtype == torch.float16:
            for idx in (~are_distributions(logits)).nonzero()[:, 0].tolist():
                raise executor.logits_error(logits[idx], ids[: idx + 1])
        scale = max(1.0, float(plain[plain.isfinite()].abs().max()))
        gap = float(differences(logits.float(), plain.float()).max())
        if not gap <= TOLERANCE[logits.dtype] * scale:
            raise UnsupportedModelError(
                f"{name} gives other logits in a packed pass than in its plain call: they differ by {gap:.2e}, more "
                f"than {TOLERANCE[logits.dtype] * scale:.0e} for {logits.dtype}. Something in it mixes tokens outside "
                "attention, so its texts cannot share a pass."
            )


def differences(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the distances between numbers: 0 where both are -inf, infinity where one is NaN."""
    return torch.where(ours == theirs, 0.0, (ours - theirs).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _plain_logits(model: nn.Module, executor: Executor) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """Return texts whose plain logits are distributions, and the logits of each, `(tokens, vocab)`."""
    plain_model = skeleton.plain_copy(model)
    error: NonFiniteError | None = None
    for attempt in range(_MAX_TRIES):
        texts = [token_ids_of(path, executor.limits.num_embeddings, attempt) for path in _PATHS]
        plain = [plain_model(input_ids=torch.tensor([ids], device=executor.device)).logits[0] for ids in texts]
        unusable = [
            (row, ids[: idx + 1])
            for ids, logits in zip(texts, plain, strict=True)
            for idx, row in enumerate(logits)
            if not bool(are_distributions(row))
        ]
        if not unusable:
            return texts, plain
        error = error or executor.logits_error(*unusable[0])
    raise NonFiniteError(
        f"{error} So it does for each of {_MAX_TRIES} sets of tokens, with which it is tried before its first text."
    )


def token_ids_of(path: str, num_embeddings: int, attempt: int) -> tuple[int, ...]:
    """Spread the probe's tokens over the vocabulary; equal paths get equal ids, and each attempt other ids."""
    return tuple((31 * idx + 7 * ord(letter) + 11 + 5 * attempt) % num_embeddings for idx, letter in enumerate(path))


def _packed_logits(executor: Executor, texts: list[tuple[int, ...]]) -> list[Tensor]:
    """Return the logits of each text, `(tokens, vocab)`, computed as one forest in two passes."""
    forest = Forest()
    ends = [forest.insert(ids) for ids in texts]
    spans = missing_spans(ends)
    try:
        for part in (spans[:1], spans[1:]):
            executor.compute(plan_pass(part, _TILE_TOKENS)).place()
        places = [[states_of(span) for span in end.path()] for end in ends]
        return [executor.logits(gather(path, "hidden")) for path in places]
    finally:
        forest.clear()  # spans refer to each other: uncleared, their tensors would wait for the cycle collector
