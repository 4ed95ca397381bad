"""Attention over a trie in one call a layer: torch's FlexAttention, with the interval test as its mask.

Token q sees token k if `k <= q < until[k]`. Rows and keys are divided into blocks of 128 by 128. A table lists the
blocks that are partly visible, and the blocks in which every row sees every key. Other blocks are skipped, and the mask
is evaluated only in partly visible blocks. torch compiles the call, for any number of tokens, with its backward. Before
the first use for a kind of layer, numbers and gradients on two small tries are compared with attention written out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from backprompt.attention.base import Scoring
from backprompt.attention.kernels import additive_mask, clear_kernel
from backprompt.training.trie import Trie
from backprompt.transfers import on_device

logger = logging.getLogger(__name__)

BLOCK = 128
"""Rows and keys of a block of the table."""

Call: TypeAlias = "Callable[..., tuple[Tensor, Tensor | None]]"


@dataclass(frozen=True)
class Kind:
    """A kind of layer: layers of one kind are compiled, and compared, once."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    has_window: bool
    has_softcap: bool
    has_sinks: bool

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Kind:
        """Return the kind of a layer; shapes are those of `TrieAttention.attend`."""
        return cls(
            query.device,
            query.dtype,
            query.shape[0],
            key.shape[0],
            key.shape[-1],
            value.shape[-1],
            scoring.window is not None,
            scoring.softcap is not None,
            scoring.sinks is not None,
        )


class NotCompiledError(RuntimeError):
    """torch would not compile the call, and so would hold the scores of all rows and keys."""


@dataclass(frozen=True)
class Choice:
    """The compiled call of a kind of layer; None, with the reason, if it cannot be used."""

    call: Call | None
    reason: str = ""


def attend_at_once(call: Call, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, mask: Any) -> Tensor:
    """Return attention under a `block_mask`, `(tokens, heads, value_dim)`, with gradients.

    Shapes: query `(heads, tokens, head_dim)`, key and value `(kv_heads, tokens, head_dim)`.

    Raises:
        NotCompiledError: torch.compile is switched off, or has compiled the call as often as its limit allows.

    """
    wide = torch.promote_types(query.dtype, torch.float32)
    # Tensors, not numbers: torch would compile again for another number, and cannot compile a symbol for it.
    scaling = query.new_full((), scoring.scaling, dtype=wide)
    softcap = None if scoring.softcap is None else query.new_full((), scoring.softcap, dtype=wide)
    try:
        output, lse = call(query[None], key[None], value[None], mask, scaling, softcap, scoring.sinks is not None)
    except Exception as error:
        if (
            type(error).__name__ == "FailOnRecompileLimitHit"
        ):  # its class has no name that exists in all versions of torch
            raise NotCompiledError("torch has compiled it too often") from error
        raise
    if scoring.sinks is not None and lse is not None:
        weights = torch.sigmoid(
            lse - scoring.sinks.to(lse.dtype)[:, None]
        )  # of all keys, without the sink, (1, heads, tokens)
        output = (output * weights[..., None]).to(query.dtype)
    return output[0].transpose(0, 1)


def block_mask(trie: Trie, window: int | None, device: torch.device) -> Any:
    """Return torch's `BlockMask` of a trie: `window` hides keys at least that many positions back."""
    from torch.nn.attention.flex_attention import BlockMask  # torch alone takes long enough to import

    asking, whole = map(_table, _blocks(trie, window))
    until, positions = (on_device(of_tokens, device) for of_tokens in (trie.until, trie.positions))
    first_seen = None if window is None else positions - (window - 1)
    num = len(trie.until)
    made = BlockMask.from_kv_blocks(
        *asking, *whole, BLOCK_SIZE=BLOCK, mask_mod=_sees(until, positions, first_seen), seq_lengths=(num, num)
    )
    return made.to(device)


def _table(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks of each row block, `(1, 1, row blocks)`, and their indices, with an axis more."""
    indices = np.argsort(~blocks, axis=1, kind="stable")  # those named, in order, and then the others
    num_named, named = (table[None, None].astype(np.int32) for table in (blocks.sum(axis=1), indices))
    return torch.from_numpy(num_named), torch.from_numpy(named)


def _sees(until: Tensor, positions: Tensor, first_seen: Tensor | None) -> Callable[..., Tensor]:
    """Return the mask: whether a row sees a key."""

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (row < until[key])

    def sees_within(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (row < until[key]) & (first_seen[row] <= positions[key])  # type: ignore[index]

    return sees if first_seen is None else sees_within


def _blocks(trie: Trie, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks that need the mask, and the blocks that are fully visible, each `(row blocks, key blocks)`.

    Under a window the first may include blocks in which no row sees a key: the mask hides all keys there.
    """
    tokens, until, positions = np.arange(len(trie.until)), trie.until, trie.positions
    starts = np.arange(0, len(tokens), BLOCK)
    stops = starts + BLOCK  # beyond the last token, so an incomplete block is never fully visible
    some = (tokens < stops[:, None]) & (until > starts[:, None])  # (row blocks, keys)
    every = (tokens <= starts[:, None]) & (until >= stops[:, None])
    if window is not None:
        some &= np.minimum.reduceat(positions, starts)[:, None] - positions < window
        every &= np.maximum.reduceat(positions, starts)[:, None] - positions < window
    every = np.logical_and.reduceat(every, starts, axis=1)
    return np.logical_or.reduceat(some, starts, axis=1) & ~every, every


def run(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Tensor, softcap: Tensor | None, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Make the call; this function is compiled. Returns output and log-sum-exp, `(1, heads, tokens)`, if wanted."""
    from torch.nn.attention.flex_attention import flex_attention

    def scaled(score: Tensor, *_: Tensor) -> Tensor:
        return score * scaling

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score * scaling / softcap)

    change = scaled if softcap is None else capped
    if not wants_lse:
        output: Any = flex_attention(query, key, value, change, mask, 1.0, enable_gqa=True)
        return output, None
    from torch.nn.attention.flex_attention import AuxRequest  # since torch 2.9

    request = AuxRequest(lse=True)
    output, more = flex_attention(query, key, value, change, mask, 1.0, enable_gqa=True, return_aux=request)
    return output, more.lse


def compiled() -> Call:
    """Return `run`, compiled at its first call, for any number of tokens."""

    def checked(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        if not torch.compiler.is_compiling():
            raise NotCompiledError("torch.compile is switched off")
        return run(*arguments)

    checked.__code__ = checked.__code__.replace()  # torch limits the compilations of each code object
    return torch.compile(checked, dynamic=True, fullgraph=True)


@lru_cache(maxsize=64)
def choose(kind: Kind) -> Choice:
    """Return the call of a kind of layer if it agrees with attention written out on small tries.

    The comparison runs in a thread of its own, without the caller's settings: autocast, and hooks on tensors that a
    backward needs, such as those of gradient checkpointing.
    """
    with ThreadPoolExecutor(1) as pool:
        choice = pool.submit(_compared, kind).result()
    if choice.call is None:
        logger.info("FlexAttention is not used for %s: %s.", kind, choice.reason)
    return choice


def _compared(kind: Kind) -> Choice:
    call = compiled()
    try:
        gap = max(_largest_gap(call, kind, num_tokens) for num_tokens in (350, 100))
    except torch.OutOfMemoryError:
        raise  # this error says nothing about the call, and the choice is kept
    except Exception as error:  # a compiler fails in many ways
        logger.debug("FlexAttention failed.", exc_info=True)
        reason = (str(error).splitlines() or [""])[0]
        return Choice(None, f"flex failed: {reason or type(error).__name__}")
    if not gap <= 64 * torch.finfo(kind.dtype).eps:
        return Choice(None, f"flex was off by {gap:.1e}")
    return Choice(call)


def _largest_gap(call: Call, kind: Kind, num_tokens: int) -> float:
    """Return the largest gap of output and gradients, over a trie of one beginning and two continuations."""
    middle, behind = num_tokens // 2, num_tokens * 3 // 4
    numbers = np.arange(num_tokens)
    trie = Trie.of([numbers[:behind], np.delete(numbers, slice(middle, behind))])
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(kind.device, kind.dtype)

    sizes = ((kind.heads, kind.head_dim), (kind.kv_heads, kind.head_dim), (kind.kv_heads, kind.value_dim))
    leaves = [draw(num_tokens, *size).requires_grad_() for size in sizes]  # the layout of models
    if kind.has_sinks:
        leaves.append(draw(kind.heads).requires_grad_())
    query, key, value = (leaf.transpose(0, 1) for leaf in leaves[:3])
    scoring = Scoring(
        kind.head_dim**-0.5,
        middle // 2 if kind.has_window else None,
        2.0 if kind.has_softcap else None,
        leaves[3] if kind.has_sinks else None,
    )
    found = attend_at_once(call, query, key, value, scoring, block_mask(trie, scoring.window, kind.device))
    expected = _written_out(query, key, value, scoring, trie)
    upstream = draw(*found.shape)
    ours, theirs = (torch.autograd.grad(output, leaves, upstream) for output in (found, expected))
    gaps = [
        _gap(our.detach().float(), their.detach().float())
        for our, their in zip((found, *ours), (expected, *theirs), strict=True)
    ]
    return float(torch.stack(gaps).max())  # nan stays nan


def _written_out(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, trie: Trie) -> Tensor:
    tokens = np.arange(len(trie.until))
    visible = (tokens <= tokens[:, None]) & (tokens[:, None] < trie.until)
    if scoring.window is not None:
        visible &= trie.positions[:, None] - trie.positions < scoring.window
    mask = additive_mask(on_device(visible, query.device), torch.float32)
    output, lse = clear_kernel(query, key, value, scoring.scaling, False, mask, softcap=scoring.softcap)
    if scoring.sinks is None:
        return output
    return (output * torch.sigmoid(lse - scoring.sinks.to(lse.dtype))[..., None]).to(query.dtype)


def _gap(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)
