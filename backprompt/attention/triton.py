"""Attention over a whole packed forest in one launch a layer, with a kernel in Triton.

The kernel reads keys and values in place, through a table of addresses, in any number of blocks. The tables (tables.py)
of all layers are made once a pass and go to the device in one copy. A second small kernel joins partial results where
several programs share the rows of a tile. The heads of a group are rows of one tile, so keys are read once a head of
keys.

The kernel is compared with the clear kernel once a device, dtype, shape of heads, tile and kind of scoring. Where the
comparison fails, and where the kernel does not serve (keys and values of different sizes, float64), the calls of
calls.py do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from backprompt.attention.base import CannotStandError, PreparedAttention, Scoring
from backprompt.attention.calls import CallsAttention
from backprompt.attention.device_tables import ADDRESS_COLUMNS, DeviceTables, Room
from backprompt.attention.kernels import additive_mask, clear_kernel
from backprompt.attention.tables import JOIN_COLUMNS, PIECE_COLUMNS, PROGRAM_COLUMNS, Cut, Segments, Work
from backprompt.attention.tiles import LEAST_PIECES, PROGRAMS_A_PROCESSOR, Tile, tile_for
from backprompt.attention.triton_kernels import attend_kernel, join_kernel
from backprompt.forest.plan import KeySegment, Pass

LOG2E = math.log2(math.e)

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Shape:
    """The shape of a layer's heads, and where and how the layer computes."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Shape:
        """Return the shape of a layer; shapes of tensors are those of `PreparedAttention.attend`."""
        return cls(query.device, query.dtype, query.shape[0], key.shape[0], query.shape[-1])

    @property
    def group(self) -> int:
        """The number of heads that share a head of keys."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Launch:
    """The way in which a layer is launched: its tile, and how programs share rows."""

    tile: Tile
    programs_a_processor: float = PROGRAMS_A_PROCESSOR
    least_pieces: int = LEAST_PIECES

    def heads_of_program(self, shape: Shape) -> int:
        """Return the number of heads of a group that a program computes; a large group is cut into equal parts."""
        num_parts = -(-shape.group // self.tile.rows)
        return -(-shape.group // num_parts)

    def num_axes(self, shape: Shape) -> int:
        """Return the number of programs that compute the heads of the same rows and keys."""
        return shape.kv_heads * -(-shape.group // self.heads_of_program(shape))

    def cut(self, shape: Shape) -> Cut:
        """Return the sizes of tiles and pieces."""
        shares = _num_processors(shape.device) * self.programs_a_processor / self.num_axes(shape)
        return Cut(self.tile.rows // self.heads_of_program(shape), self.tile.keys, shares, self.least_pieces)


class TritonAttention:
    """A `ForestAttention` that makes one launch a layer, or two where programs share rows.

    Args:
        launch: the way of launching; by default the tile of tiles.py for the heads and the number of rows.
        device_types: the types of devices on which the kernel serves. Triton's interpreter computes on the CPU.

    """

    def __init__(self, launch: Launch | None = None, device_types: Collection[str] = ("cuda",)) -> None:
        self._launch = launch
        self.device_types = device_types
        self.calls = CallsAttention()
        self.name = "none yet"

    def prepare(self, pass_: Pass, num_steps: int = 1) -> PreparedTriton:
        """Return the attention of a pass, for one or several steps; see `ForestAttention.prepare`."""
        return PreparedTriton(self, pass_, num_steps)

    def standing(self, num_rows: int) -> StandingTriton:
        """Return the attention of captured steps of so many rows; see `ForestAttention.standing`."""
        return StandingTriton(self, num_rows)

    def refusal(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> str | None:
        """Return why the kernel does not serve for such tensors; None if the kernel serves."""
        if query.device.type not in self.device_types:
            return f"triton is not used on {query.device.type}"
        if query.dtype not in DTYPES:
            return f"triton is not used for {query.dtype}"
        if key.shape[-1] != value.shape[-1]:
            return "keys and values differ in size"
        features = scoring.window is not None, scoring.softcap is not None, scoring.sinks is not None
        return reason_against(Shape.of(query, key), self.launch_for(query, key).tile, *features)

    def launch_for(self, query: Tensor, key: Tensor) -> Launch:
        """Return the way of launching for such tensors."""
        if self._launch is not None:
            return self._launch
        num_rows = query.shape[1] * (query.shape[0] // key.shape[0])
        return _launch_of(query.shape[-1], query.element_size(), min(num_rows, 1 << 16))


class PreparedTriton:
    """The tables of one pass, made once for all layers of the same shape and window, and anew for each step."""

    def __init__(self, attention: TritonAttention, pass_: Pass, num_steps: int = 1) -> None:
        self._attention = attention
        self._pass = pass_
        self._segments: Segments | None = None
        self._forest: OneLaunch | None = None
        self._calls = attention.calls.prepare(pass_, num_steps)  # for layers that the kernel does not serve

    @property
    def segments(self) -> Segments:
        """The segments of the step that is next."""
        if self._segments is None:
            self._segments = Segments.of(self._pass.segments, self._pass.positions)
        return self._segments

    def advance(self, rows: Sequence[int] | None = None) -> None:
        """Go on to the next step; see `PreparedAttention.advance`."""
        self._forest = None
        self._segments = self.segments.next_step(rows)
        self._calls.advance(rows)

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the forest; see `PreparedAttention.attend`."""
        attention = self._attention
        refusal = attention.refusal(query, key, value, scoring)
        if refusal is not None:
            output = self._calls.attend(layer_idx, query, key, value, scoring)
            attention.name = f"{attention.calls.name} ({refusal})"
            return output
        attention.name = "triton"
        if self._forest is None:
            self._forest = OneLaunch(self.segments)
        return self._forest.attend(layer_idx, query, key, value, scoring, attention.launch_for(query, key))


class StandingTriton:
    """A `StandingAttention` that makes the launches of `PreparedTriton`, with tables that have room for later steps."""

    def __init__(self, attention: TritonAttention, num_rows: int) -> None:
        self._attention = attention
        self._num_rows = num_rows
        self._forest: OneLaunch | None = None

    def load(self, prepared: PreparedAttention) -> bool:
        """Go on to the step that an attention is prepared for; see `StandingAttention.load`."""
        assert isinstance(prepared, PreparedTriton), prepared
        segments = prepared.segments.padded(self._num_rows)
        if self._forest is None:
            self._forest = OneLaunch(segments, has_room=True)
            return True
        return self._forest.load(segments)

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the forest; see `PreparedAttention.attend`."""
        attention = self._attention
        refusal = attention.refusal(query, key, value, scoring)
        if refusal is not None:
            raise CannotStandError(refusal)
        assert self._forest is not None, "`load` comes first"
        return self._forest.attend(layer_idx, query, key, value, scoring, attention.launch_for(query, key))


class OneLaunch:
    """The launches of one pass, or of several of the same shape one after the other.

    Args:
        segments: the segments of the pass.
        has_room: whether the tables have room for later steps.

    """

    def __init__(self, segments: Segments, *, has_room: bool = False) -> None:
        self._segments = segments
        self._has_room = has_room
        self._tables: dict[tuple[Shape, Launch, int | None], DeviceTables] = {}

    def load(self, segments: Segments) -> bool:
        """Go on to another pass; False if there is no room for it, then this object is of no more use."""
        self._segments = segments
        return all(
            tables.load(segments, Work.of(segments, launch.cut(shape), window))
            for (shape, launch, window), tables in self._tables.items()
        )

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, launch: Launch
    ) -> Tensor:
        """Return attention over the forest; see `PreparedAttention.attend`."""
        shape = Shape.of(query, key)
        of_tables = shape, launch, scoring.window
        if of_tables not in self._tables:
            cut = launch.cut(shape)
            work = Work.of(self._segments, cut, scoring.window)
            room = Room.for_steps(self._segments, work, cut) if self._has_room else None
            self._tables[of_tables] = DeviceTables.of(self._segments, work, shape.device, room)
        with _on_device(shape.device):
            return _launch(self._tables[of_tables], layer_idx, query, key, value, scoring, launch)


def _launch(
    tables: DeviceTables, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, launch: Launch
) -> Tensor:
    """Launch the kernel of a layer, and the join if programs share rows."""
    shape, tile = Shape.of(query, key), launch.tile
    query = query if query.stride(2) == 1 else query.contiguous()
    key, value = key.contiguous(), value.contiguous()
    num_tokens, head_dim = query.shape[1:]
    num_axes, heads = launch.num_axes(shape), launch.heads_of_program(shape)
    output = torch.empty((num_tokens, shape.heads, head_dim), dtype=query.dtype, device=query.device)
    partial = torch.empty((tables.room.slots, num_axes, tile.rows, head_dim), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty((tables.room.slots, num_axes, tile.rows), dtype=torch.float32, device=query.device)
    sinks = output if scoring.sinks is None else scoring.sinks
    softcap = scoring.softcap
    common = {
        "GROUP": shape.group,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(16, 1 << (head_dim - 1).bit_length()),
        "ROWS": tile.rows,
        "HAS_SINKS": scoring.sinks is not None,
    }
    attend_kernel[(tables.room.programs * num_axes,)](
        query,
        key,
        value,
        output,
        sinks,
        partial,
        partial_lse,
        tables.addresses,
        tables.positions,
        tables.until,
        tables.pieces,
        tables.programs,
        layer_idx,
        tables.room.blocks,
        num_tokens,
        num_axes,
        scoring.window or 0,
        scoring.scaling * LOG2E if softcap is None else scoring.scaling / softcap,
        0.0 if softcap is None else softcap * LOG2E,
        query.stride(0),
        query.stride(1),
        shape.heads,
        KEYS=tile.keys,
        HAS_WINDOW=scoring.window is not None,
        HAS_SOFTCAP=softcap is not None,
        IS_ALIGNED=head_dim * query.element_size() % 16 == 0,
        IS_INTERPRETED=shape.device.type == "cpu",
        PROGRAM_COLUMNS=PROGRAM_COLUMNS,
        PIECE_COLUMNS=PIECE_COLUMNS,
        ADDRESS_COLUMNS=ADDRESS_COLUMNS,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **common,
    )
    if tables.room.joins:
        join_kernel[(tables.room.joins * num_axes,)](
            output,
            sinks,
            partial,
            partial_lse,
            tables.joins,
            num_axes,
            shape.heads,
            JOIN_COLUMNS=JOIN_COLUMNS,
            num_warps=4,
            **common,
        )
    return output


@lru_cache(maxsize=4096)
def _launch_of(head_dim: int, num_bytes: int, num_rows: int) -> Launch:
    return Launch(tile_for(head_dim, num_bytes, num_rows))


@lru_cache(maxsize=16)
def _num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _on_device(device: torch.device) -> Any:
    """Return a context in which kernels are launched on a device: Triton launches on the current one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


# The comparison with the clear kernel


@dataclass(frozen=True)
class _OneLayer:
    """The keys and values of a block with one layer, `(kv_heads, keys, head_dim)`."""

    key: Tensor
    value: Tensor

    def addresses(self) -> list[tuple[int, int, int]]:
        """See `Addressed`."""
        return [(self.key.data_ptr(), self.value.data_ptr(), self.key.stride(0))]


@lru_cache(maxsize=256)
def reason_against(shape: Shape, tile: Tile, has_window: bool, has_softcap: bool, has_sinks: bool) -> str | None:
    """Return why the kernel does not serve; None if the kernel agrees with the clear kernel on a tiny case."""
    try:
        gap = _largest_gap(shape, tile, has_window, has_softcap, has_sinks)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel, and the answer is cached
    except Exception as error:  # a compiler runs, and fails in ways of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"triton failed: {reason}"
    return None if gap <= 32 * torch.finfo(shape.dtype).eps else f"triton was off by {gap:.1e}"


def _largest_gap(shape: Shape, tile: Tile, has_window: bool, has_softcap: bool, has_sinks: bool) -> float:
    """Return the largest gap between the kernel and the clear kernel: a tree of 5 rows behind 19 keys that count twice.

    Rows 1 to 3 see the keys of the block; rows 1 and 2 are siblings. Each piece of keys has a program of its own.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int, rows: int) -> Tensor:
        drawn = torch.randn((rows, num_heads, shape.head_dim), generator=generator)
        return drawn.to(shape.device, shape.dtype).transpose(0, 1)

    query, key, value = draw(shape.heads, 5), draw(shape.kv_heads, 5), draw(shape.kv_heads, 5)
    block = _OneLayer(draw(shape.kv_heads, 19).contiguous(), draw(shape.kv_heads, 19).contiguous())
    sinks = torch.linspace(-1, 1, shape.heads, device=shape.device) if has_sinks else None
    scoring = Scoring(0.3, 6 if has_window else None, 2.0 if has_softcap else None, sinks)
    positions, until = [19, 20, 20, 21, 22], (5, 2, 3, 5, 5)
    segments = [KeySegment.own(0, 5, 19, until), KeySegment(1, 4, block, 0, 19, 0, times=2)]
    launch = Launch(tile, programs_a_processor=math.inf, least_pieces=1)
    output = OneLaunch(Segments.of(segments, positions)).attend(0, query, key, value, scoring, launch)

    visible = torch.zeros((5, 43), dtype=torch.bool)  # the keys of the block twice, and those of the rows
    key_positions = [*range(19), *range(19), *positions]
    for row in range(5):
        for idx, position in enumerate(key_positions):
            is_ancestor = 1 <= row < 4 if idx < 38 else idx - 38 <= row < until[idx - 38]
            visible[row, idx] = is_ancestor and (not has_window or positions[row] - position < 6)
    expected, lse = clear_kernel(
        query,
        torch.cat([block.key, block.key, key], dim=1),
        torch.cat([block.value, block.value, value], dim=1),
        scoring.scaling,
        False,
        additive_mask(visible.to(shape.device), torch.float32),
        softcap=scoring.softcap,
    )
    if sinks is not None:
        expected = expected.float() * torch.sigmoid(lse - sinks)[..., None]
    return float((output.float() - expected.float()).abs().max())
