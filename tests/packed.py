"""Packed passes over random forests, and attention over what each token must see, written out in float64."""

from collections.abc import Iterable, Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from backprompt.attention.base import Scoring
from backprompt.attention.kernels import KernelOutput
from backprompt.forest.forest import Forest
from backprompt.forest.passes import cut_into_passes, missing_spans
from backprompt.forest.plan import Pass, plan_pass
from backprompt.memory.blocks import BlockRows, KeysValues

Ids = tuple[int, ...]

# Inputs are standard normal, so outputs and log-sum-exps are below 8 and their last bit is below 8 * eps. Sums in
# float32 and float64 lose a few bits more; the shorter dtypes lose that bit in each partial result and in the whole.
KERNEL_ATOL = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def attend_by_hand(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, visible: Tensor | None = None
) -> KernelOutput:
    """A softmax over the visible keys and the sinks, in float64: the shapes of a kernel, `visible` is (rows, keys)."""
    group = query.shape[0] // key.shape[0]
    key, value = (tensor.double().repeat_interleave(group, dim=0) for tensor in (key, value))
    scores = torch.einsum("hrd,hkd->hrk", query.double(), key) * scoring.scaling
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    weights = scores.exp() if visible is None else scores.exp() * visible
    total = weights.sum(dim=-1)  # (heads, rows)
    if scoring.sinks is not None:
        total = total + scoring.sinks.double().exp()[:, None]
    output = torch.einsum("hrk,hkd->hrd", weights, value) / total.where(total > 0, 1.0)[..., None]
    return output.transpose(0, 1), total.log().transpose(0, 1)


def check_close(result: KernelOutput, expected: KernelOutput, dtype: torch.dtype) -> None:
    for tensor, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(tensor.double().cpu(), wanted.double().cpu(), atol=KERNEL_ATOL[dtype], rtol=0)


def draw(heads: int, rows: int, dim: int, seed: int) -> Tensor:
    """Standard normal `(heads, rows, dim)`, laid out as models do: the heads of a row lie together."""
    return torch.randn((rows, heads, dim), generator=torch.Generator().manual_seed(seed)).transpose(0, 1)


class Layers:
    """Queries, keys and values of every token in two layers; a token is named by the ids that lead to it."""

    def __init__(
        self,
        texts: Iterable[Ids],
        value_dim: int,
        dtype: torch.dtype,
        device: str,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 8,
    ) -> None:
        names = {ids[: stop + 1] for ids in texts for stop in range(len(ids))}
        self.idx_of = {name: idx for idx, name in enumerate(sorted(names))}
        shapes = (
            (heads, head_dim),
            (kv_heads, head_dim),
            (kv_heads, value_dim),
        )  # heads and dim of queries, keys, values
        self.tensors = [
            [draw(heads, len(names), dim, seed).to(device, dtype) for seed, (heads, dim) in enumerate(shapes, first)]
            for first in (0, 3)
        ]

    def rows(self, layer_idx: int, names: Sequence[Ids]) -> list[Tensor]:
        """The layer's query, key and value of these tokens, in this order, laid out as models do."""
        indices = torch.tensor([self.idx_of[name] for name in names], device=self.tensors[0][0].device)
        return [tensor.transpose(0, 1)[indices].transpose(0, 1) for tensor in self.tensors[layer_idx]]

    def block(self, names: Sequence[Ids]) -> KeysValues:
        """The keys and values of a pass over these tokens."""
        keys, values = ([self.rows(layer_idx, names)[i].contiguous() for layer_idx in (0, 1)] for i in (1, 2))
        return KeysValues.of(keys, values)

    def expected(self, layer_idx: int, names: Sequence[Ids], scoring: Scoring) -> Tensor:
        """Attention of each token over its ancestors and itself, within the window."""
        visible = torch.zeros(len(names), len(self.idx_of), dtype=torch.bool)
        for row, name in enumerate(names):
            seen = [self.idx_of[name[:stop]] for stop in range(1, len(name) + 1)]
            visible[row, seen if scoring.window is None else seen[-scoring.window :]] = True
        query, key, value = self.rows(layer_idx, names)[0], *self.tensors[layer_idx][1:]
        return attend_by_hand(query, key, value, scoring, visible.to(query.device))[0]


def passes_over(
    batches: Iterable[Sequence[Ids]], layers: Layers, tile_tokens: int, max_tokens: int
) -> Iterator[tuple[Pass, list[Ids]]]:
    """Yield the passes that compute one batch of texts after the other, and the token of each row."""
    forest = Forest()
    for batch in batches:
        for group in cut_into_passes(forest, missing_spans([forest.insert(ids) for ids in batch]), max_tokens):
            names, ends = [], [0]
            for span in group:
                ids = tuple(token_id for above in span.path() for token_id in above.token_ids)
                names += [ids[: stop + 1] for stop in range(span.position, len(ids))]
                ends.append(len(names))
            yield plan_pass(group, tile_tokens), names
            block = layers.block(names)
            for span, start, stop in zip(group, ends, ends[1:], strict=False):
                span.keys_values = span.states = BlockRows(block, start, stop)


def batches_of_texts(seed: int, num_texts: int) -> tuple[list[Ids], ...]:
    """Three batches of texts, each of which is another one, of any batch, and some tokens more."""
    random = Random(seed)
    texts: list[Ids] = [()]
    batches: tuple[list[Ids], ...] = ([], [], [])
    for _ in range(num_texts):
        texts.append((*random.choice(texts), random.randrange(3), *[0] * random.choice((0, 0, 1, 2, 5, 20))))
        random.choice(batches).append(texts[-1])
    return batches
