"""The copies of copies.py in one launch for each layer, with a kernel in Triton.

The kernel reads queries, keys and values once each. torch takes two passes over queries and keys for their extremes,
and two more launches for the copies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from functools import lru_cache

import torch
from torch import Tensor

from backprompt.attention.copies import PlainCopies
from backprompt.attention.launches import Launcher
from backprompt.attention.triton_kernels import copy_kernel

logger = logging.getLogger(__name__)

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

PROGRAM_NUMBERS = 4096
"""The approximate number of elements that a program copies."""


class TritonCopies:
    """Copies made by the kernel, or by torch for tensors that the kernel does not support.

    Args:
        device_types: the types of devices on which the kernel is used.

    """

    def __init__(self, device_types: Collection[str] = ("cuda",)) -> None:
        self._device_types = device_types
        self._plain = PlainCopies()
        self._flags: dict[torch.device, Tensor] = {}
        self.is_plain_used = False

    def of(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Copies`."""
        if not self._is_fit(query, key, value):
            self.is_plain_used = True
            return self._plain.of(query, key, value)
        return _copied(query, key, value, self._flag_on(query.device))

    def check(self, hidden: Tensor) -> None:
        """See `Copies`; the hidden states are checked as queries without keys."""
        query = hidden.reshape(1, -1, math.gcd(hidden.shape[1], PROGRAM_NUMBERS))
        nothing = query[:0]
        if self._is_fit(query, nothing, nothing):
            _copied(query, nothing, nothing, self._flag_on(query.device))
        else:
            self.is_plain_used = True
            self._plain.check(hidden)

    def are_finite(self) -> Tensor:
        """See `Copies`."""
        found = [flag == 0 for flag in self._flags.values()]
        if self.is_plain_used:
            found.append(self._plain.are_finite())
        return found[0] if len(found) == 1 else torch.stack([one.to(found[0].device) for one in found]).all()

    def _is_fit(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        return (
            query.device.type in self._device_types
            and query.dtype in DTYPES
            and query.dtype == key.dtype == value.dtype
            and key.shape == value.shape
            and query.shape[2] == key.shape[2]
            and query.stride(2) == key.stride(2) == value.stride(2) == 1
            and serves(query.device, query.dtype, query.shape[0], key.shape[0], query.shape[2])
        )

    def _flag_on(self, device: torch.device) -> Tensor:
        flag = self._flags.get(device)
        if flag is None:
            flag = self._flags[device] = torch.zeros((), dtype=torch.int32, device=device)
        return flag


def _copied(query: Tensor, key: Tensor, value: Tensor, flag: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies of keys and values; `flag` becomes 1 if a query or a key is not finite."""
    heads, num_tokens, head_dim = query.shape
    kv_heads = key.shape[0]
    launch, tokens = launcher(query.device, query.dtype, heads, kv_heads, head_dim)
    copies = (
        torch.empty_like(key, memory_format=torch.contiguous_format),
        torch.empty_like(value, memory_format=torch.contiguous_format),
    )
    strides = *query.stride()[:2], *key.stride()[:2], *value.stride()[:2]
    num_programs = -(-num_tokens // tokens) * (heads + 2 * kv_heads)
    launch.launch(num_programs, (query, key, value, *copies, flag), strides, (num_tokens,))
    return copies


@lru_cache(maxsize=64)
def launcher(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> tuple[Launcher, int]:
    """Return the launcher for tensors of a kind, and the number of tokens that a program copies."""
    padded = 1 << (head_dim - 1).bit_length()
    tokens = max(1, PROGRAM_NUMBERS // padded)
    constants = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "PADDED_DIM": padded, "TOKENS": tokens}
    return Launcher(copy_kernel, constants, {"num_warps": 4}), tokens


@lru_cache(maxsize=64)
def serves(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Return whether the kernel compiles, copies a tiny case and notices infinity there."""
    query, key, value = (
        torch.arange(num * 3 * head_dim, device=device).to(dtype).remainder(7).view(3, num, head_dim).transpose(0, 1)
        for num in (heads, kv_heads, kv_heads)
    )
    flags = torch.zeros(2, dtype=torch.int32, device=device)
    try:
        first = _copied(query, key, value, flags[0])
        (key if kv_heads else query)[0, 2, 0] = torch.inf
        second = _copied(query, key, value, flags[1])
    except torch.OutOfMemoryError:
        raise  # this error says nothing about the kernel, and the answer is cached
    except Exception as error:  # a compiler runs, and fails in ways of its own
        logger.info("Keys and values are copied by torch: triton failed: %s", error)
        return False
    return (
        flags.tolist() == [0, 1]
        and all(torch.equal(copy, value) for copy in (first[1], second[1]))
        and torch.equal(second[0], key)
    )
