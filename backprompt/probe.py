"""The probe: before a model is used, a small packed tree is compared with its plain calls.

It catches what a look at the configuration does not: layers that mix tokens outside attention (state-space layers,
convolutions), norms outside the body, heads with a mind of their own. The tree has 12 tokens,

    a a a a --+-- b b b --+-- c c
              |           +-- d
              +-- e e

and runs as two passes, so that attention to cached keys, to keys of the same pass and within a tile all take part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backprompt import skeleton
from backprompt.cache import gather, states_of
from backprompt.errors import UnsupportedModelError
from backprompt.executor import Executor
from backprompt.plan import missing_spans
from backprompt.radix import Forest

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
"""Largest gap in logits, absolute below 1 and relative to the largest logit above: docs/design.md, "Exactness".

In float64 many models still take their softmax in float32.
"""

_PATHS = ("aaaabbbcc", "aaaabbbd", "aaaaee")
_TILE_TOKENS = 3


def probe(model: nn.Module, executor: Executor) -> None:
    """Compare packed evaluation with the plain call.

    Raises:
        UnsupportedModelError: the two differ by more than the tolerance, or the model cannot be run packed.

    """
    texts = [_token_ids(path, executor.limits.num_embeddings) for path in _PATHS]
    name = type(model).__name__
    try:
        packed = _packed_logits(executor, texts)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"{name} cannot be run on a packed row of texts: {type(error).__name__}: {error}. Use a family whose "
            "layers go through transformers' attention interface (GPT-2, Llama, Qwen, Mistral, Gemma, OPT, Phi ...)."
        ) from error
    plain_model = skeleton.plain_copy(model)
    for ids, logits in zip(texts, packed, strict=True):
        plain = plain_model(input_ids=torch.tensor([ids], device=executor.device)).logits[0]
        scale = max(1.0, float(plain[plain.isfinite()].abs().max()))
        gap = float((logits.float() - plain.float()).nan_to_num().abs().max())
        if not gap <= TOLERANCE[logits.dtype] * scale:
            raise UnsupportedModelError(
                f"{name} gives other logits in a packed pass than in its plain call: they differ by {gap:.2e}, more "
                f"than {TOLERANCE[logits.dtype] * scale:.0e} for {logits.dtype}. Something in it mixes tokens outside "
                "attention, so its texts cannot share a pass."
            )


def _token_ids(path: str, num_embeddings: int) -> tuple[int, ...]:
    """Spread the probe's tokens over the vocabulary; equal paths get equal ids."""
    return tuple((31 * idx + 7 * ord(letter) + 11) % num_embeddings for idx, letter in enumerate(path))


def _packed_logits(executor: Executor, texts: list[tuple[int, ...]]) -> list[Tensor]:
    """Return the logits of each text, `(tokens, vocab)`, computed as one forest in two passes."""
    forest = Forest()
    ends = [forest.insert(ids) for ids in texts]
    spans = missing_spans(ends)
    try:
        for part in (spans[:1], spans[1:]):
            executor.compute(part, tile_tokens=_TILE_TOKENS).place()
        places = [[states_of(span) for span in end.path()] for end in ends]
        return [executor.logits(gather(path, lambda states: states.hidden, dim=0)) for path in places]
    finally:
        forest.clear()  # spans refer to each other: without this, their tensors would wait for the cycle collector
