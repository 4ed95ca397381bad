"""Attention over a whole packed forest in one launch for each layer, with a kernel in Triton.

The kernel reads keys and values in place, through a table of addresses, in any number of blocks. The tables (tables.py)
of all layers are made once for each pass and go to the device in one copy. A second small kernel joins partial results
where several programs share the rows of a tile. All query heads that share a head of keys are rows of one tile, so each
head of keys is read once.

The kernel is compared with the clear kernel once for each device, dtype, shape of heads, tile and kind of scoring. If
the comparison fails, or the kernel does not support a layer (keys and values of different sizes, float64), the calls of
calls.py are used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from backprompt.attention.base import CannotStandError, PreparedAttention, Scoring
from backprompt.attention.calls import CallsAttention
from backprompt.attention.device_tables import ADDRESS_COLUMNS, DeviceTables, Room
from backprompt.attention.kernels import additive_mask, clear_kernel
from backprompt.attention.launches import Launcher
from backprompt.attention.shapes import Launch, Shape, launch_for
from backprompt.attention.tables import JOIN_COLUMNS, PIECE_COLUMNS, PROGRAM_COLUMNS, Segments, Work
from backprompt.attention.tiles import LARGEST_HEAD, Tile
from backprompt.attention.triton_kernels import attend_kernel, join_kernel
from backprompt.forest.plan import KeySegment, Pass

LOG2E = math.log2(math.e)

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class TritonAttention:
    """A `ForestAttention` that makes one launch for each layer, or two where programs share rows.

    Args:
        launch: the way of launching; by default the tile of tiles.py for the heads and the number of rows.
        device_types: the types of devices on which the kernel is used. Triton's interpreter computes on the CPU.

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
        """Return the attention of captured steps with `num_rows` rows; see `ForestAttention.standing`."""
        return StandingTriton(self, num_rows)

    def launch_or_refusal(
        self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, segments: Segments
    ) -> Launch | str:
        """Return the way of launching for such tensors and segments, or the reason why the kernel is not used."""
        refusal = self.refusal(query, key, value, scoring, None)
        if refusal is not None:
            return refusal
        launch = self.launch_for(Shape.of(query, key), segments)
        return self.refusal(query, key, value, scoring, launch.tile) or launch

    def refusal(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, tile: Tile | None) -> str | None:
        """Return why the kernel is not used for such tensors with a tile; None if it is used."""
        if query.device.type not in self.device_types:
            return f"triton is not used on {query.device.type}"
        if query.dtype not in DTYPES:
            return f"triton is not used for {query.dtype}"
        if key.shape[-1] != value.shape[-1]:
            return "keys and values differ in size"
        if key.shape[-1] > LARGEST_HEAD:
            return f"triton is not used for heads of more than {LARGEST_HEAD} numbers"
        if tile is None:
            return None
        features = scoring.window is not None, scoring.softcap is not None, scoring.sinks is not None
        return reason_against(Shape.of(query, key), tile, *features)

    def launch_for(self, shape: Shape, segments: Segments) -> Launch:
        """Return the way of launching for heads of a shape and the segments of a pass."""
        return self._launch or launch_for(shape, segments)


class PreparedTriton:
    """The tables of one pass, made once for all layers of the same shape and window, and anew for each step."""

    def __init__(self, attention: TritonAttention, pass_: Pass, num_steps: int = 1) -> None:
        self._attention = attention
        self._pass = pass_
        self._segments: Segments | None = None
        self._forest: OneLaunch | None = None
        self._calls = attention.calls.prepare(pass_, num_steps)  # for layers that the kernel does not support
        self._launches: dict[Hashable, Launch | str] = {}
        self._layers: dict[Hashable, _Layers] = {}

    @property
    def segments(self) -> Segments:
        """The segments of the next step."""
        if self._segments is None:
            self._segments = Segments.of(self._pass.segments, self._pass.positions)
        return self._segments

    def advance(self, rows: Sequence[int] | None = None) -> None:
        """Advance to the next step; see `PreparedAttention.advance`."""
        self._forest = None
        self._layers.clear()
        self._segments = self.segments.next_step(rows)
        self._calls.advance(rows)

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the forest; see `PreparedAttention.attend`."""
        attention = self._attention
        kind = _kind_of(query, key, value, scoring)
        layers = self._layers.get(kind)
        if layers is None:
            launch = self._launches.get(kind)
            if launch is None:
                launch = attention.launch_or_refusal(query, key, value, scoring, self.segments)
                self._launches[kind] = launch
            if isinstance(launch, str):
                output = self._calls.attend(layer_idx, query, key, value, scoring)
                attention.name = f"{attention.calls.name} ({launch})"
                return output
            if self._forest is None:
                self._forest = OneLaunch(self.segments)
            layers = self._layers[kind] = self._forest.layers(kind, query, key, scoring, launch)
        attention.name = "triton"
        return layers.attend(layer_idx, query, key, value, scoring.sinks)


class StandingTriton:
    """A `StandingAttention` that makes the launches of `PreparedTriton`, with tables that have room for later steps."""

    def __init__(self, attention: TritonAttention, num_rows: int) -> None:
        self._attention = attention
        self._num_rows = num_rows
        self._forest: OneLaunch | None = None
        self._launches: dict[Hashable, Launch] = {}

    @property
    def num_bytes(self) -> int:
        """The bytes of the tables and of partial results."""
        return 0 if self._forest is None else self._forest.num_bytes

    def load(self, prepared: PreparedAttention) -> bool:
        """Set the step for which an attention is prepared; see `StandingAttention.load`."""
        assert isinstance(prepared, PreparedTriton), prepared
        return self._load(prepared.segments)

    def load_next(self, prepared: PreparedAttention) -> bool:
        """Set the step behind the one for which an attention is prepared; see `StandingAttention.load_next`."""
        assert isinstance(prepared, PreparedTriton), prepared
        return self._load(prepared.segments.next_step())

    def _load(self, segments: Segments) -> bool:
        padded = segments.padded(self._num_rows)
        if self._forest is None:
            self._forest = OneLaunch(padded, has_room=True)
            return True
        return self._forest.load(padded)

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the forest; see `PreparedAttention.attend`."""
        assert self._forest is not None, "`load` comes first"
        kind = _kind_of(query, key, value, scoring)
        if kind not in self._launches:
            launch = self._attention.launch_or_refusal(query, key, value, scoring, self._forest.segments)
            if isinstance(launch, str):
                raise CannotStandError(launch)
            self._launches[kind] = launch
        layers = self._forest.layers(kind, query, key, scoring, self._launches[kind])
        return layers.attend(layer_idx, query, key, value, scoring.sinks)


def _kind_of(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Hashable:
    """Return all properties on which a layer's launches depend, except the way of launching; equal in most layers."""
    return (
        query.device,
        query.dtype,
        query.shape,
        key.shape[0],
        value.shape[-1],
        scoring.scaling,
        scoring.window,
        scoring.softcap,
        None if scoring.sinks is None else scoring.sinks.dtype,
    )


class OneLaunch:
    """The launches of one pass, or of several passes of the same shape, one after the other.

    Args:
        segments: the segments of the pass.
        has_room: whether the tables have room for later steps.

    Attributes:
        segments: see above.
        tables: the tables of layers that are alike.

    """

    def __init__(self, segments: Segments, *, has_room: bool = False) -> None:
        self.segments = segments
        self._has_room = has_room
        self.tables: dict[tuple[Shape, Launch, int | None], DeviceTables] = {}
        self._layers: dict[Hashable, _Layers] = {}

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, launch: Launch
    ) -> Tensor:
        """Return attention over the forest; see `PreparedAttention.attend`."""
        layers = self.layers(_kind_of(query, key, value, scoring), query, key, scoring, launch)
        return layers.attend(layer_idx, query, key, value, scoring.sinks)

    def layers(self, kind: Hashable, query: Tensor, key: Tensor, scoring: Scoring, launch: Launch) -> _Layers:
        """Return the launches of the layers of a kind."""
        layers = self._layers.get(kind)
        if layers is None or layers.launch is not launch:
            shape = Shape.of(query, key)
            layers = self._layers[kind] = _Layers.of(self._tables_of(shape, launch, scoring), shape, scoring, launch)
        return layers

    @property
    def num_bytes(self) -> int:
        """The bytes of the tables and of partial results."""
        partial = [layers.partial.nbytes + layers.partial_lse.nbytes for layers in self._layers.values()]
        return sum(tables.numbers.nbytes for tables in self.tables.values()) + sum(partial)

    def load(self, segments: Segments) -> bool:
        """Set another pass; return False if there is no room for it. Then `load` must succeed before the next use.

        The blocks of the pass are not kept alive here: other objects keep them during the step.
        """
        num_steps = segments.steps_since(self.segments)
        is_loaded = all(
            (num_steps is not None and tables.advance(segments, num_steps))
            or tables.load(segments, Work.of(segments, launch.cut(shape), window))
            for (shape, launch, window), tables in self.tables.items()
        )
        self.segments = replace(segments, blocks=())
        if not is_loaded:  # some tables may be of another step now
            self.segments = replace(self.segments, first_step=object())
        return is_loaded

    def _tables_of(self, shape: Shape, launch: Launch, scoring: Scoring) -> DeviceTables:
        of_tables = shape, launch, scoring.window
        if of_tables not in self.tables:
            cut = launch.cut(shape)
            work = Work.of(self.segments, cut, scoring.window)
            room = Room.for_steps(self.segments, work, cut) if self._has_room else None
            self.tables[of_tables] = DeviceTables.of(self.segments, work, shape.device, room)
        return self.tables[of_tables]


@dataclass(frozen=True)
class _Layers:
    """The launches of layers that are alike: the data that need not be found again in each layer.

    Attributes:
        launch: the way of launching.
        tables: the tables.
        attending, joining: the kernels.
        num_axes: the number of programs for the same rows and keys.
        numbers: the window, the factor of scores and the cap, as the kernel takes them.
        partial, partial_lse: the partial results of a layer. The next layer overwrites them.

    """

    launch: Launch
    tables: DeviceTables
    attending: Launcher
    joining: Launcher
    num_axes: int
    numbers: tuple[int, float, float]
    partial: Tensor
    partial_lse: Tensor

    @classmethod
    def of(cls, tables: DeviceTables, shape: Shape, scoring: Scoring, launch: Launch) -> _Layers:
        """Return the launches of layers with these tables."""
        softcap, num_axes = scoring.softcap, launch.num_axes(shape)
        scale = scoring.scaling * LOG2E if softcap is None else scoring.scaling / softcap
        slots = tables.room.slots, num_axes, launch.tile.rows
        dtype_of_sinks = None if scoring.sinks is None else scoring.sinks.dtype
        return cls(
            launch,
            tables,
            *launchers(shape, launch.tile, scoring.window is not None, softcap is not None, dtype_of_sinks),
            num_axes,
            (scoring.window or 0, scale, 0.0 if softcap is None else softcap * LOG2E),
            torch.empty((*slots, shape.head_dim), dtype=torch.float32, device=shape.device),
            torch.empty(slots, dtype=torch.float32, device=shape.device),
        )

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """Launch the kernel of a layer, and the join if programs share rows."""
        tables, num_axes = self.tables, self.num_axes
        if query.stride(2) != 1:
            query = query.contiguous()
        key, value = key.contiguous(), value.contiguous()
        num_heads, num_tokens, head_dim = query.shape
        output = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
        partial, partial_lse = self.partial, self.partial_lse
        sinks = output if sinks is None else sinks
        places = tables.addresses, tables.positions, tables.until, tables.pieces, tables.programs
        self.attending.launch(
            tables.room.programs * num_axes,
            (query, key, value, output, sinks, partial, partial_lse, *places),
            (query.stride(0), query.stride(1)),
            (layer_idx, tables.room.blocks, num_tokens, num_axes, num_heads, *self.numbers),
        )
        if tables.room.joins:
            results = output, sinks, partial, partial_lse, tables.joins
            self.joining.launch(tables.room.joins * num_axes, results, (), (num_axes, num_heads))
        return output


@lru_cache(maxsize=256)
def launchers(
    shape: Shape, tile: Tile, has_window: bool, has_softcap: bool, dtype_of_sinks: torch.dtype | None
) -> tuple[Launcher, Launcher]:
    """Return the launchers of the kernel and of the join."""
    common = {
        "GROUP": shape.group,
        "HEADS": Launch(tile).heads_of_program(shape),
        "HEAD_DIM": shape.head_dim,
        "PADDED_DIM": max(16, 1 << (shape.head_dim - 1).bit_length()),
        "ROWS": tile.rows,
        "HAS_SINKS": dtype_of_sinks is not None,
    }
    constants = {
        "KEYS": tile.keys,
        "HAS_WINDOW": has_window,
        "HAS_SOFTCAP": has_softcap,
        "IS_ALIGNED": shape.head_dim * shape.dtype.itemsize % 16 == 0,
        "IS_INTERPRETED": shape.device.type == "cpu",
        "PROGRAM_COLUMNS": PROGRAM_COLUMNS,
        "PIECE_COLUMNS": PIECE_COLUMNS,
        "ADDRESS_COLUMNS": ADDRESS_COLUMNS,
    }
    attending = Launcher(attend_kernel, common | constants, {"num_warps": tile.warps, "num_stages": tile.stages})
    joining = Launcher(join_kernel, common | {"JOIN_COLUMNS": JOIN_COLUMNS}, {"num_warps": 4})
    return attending, joining


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
    """Return why the kernel is not used; None if the kernel agrees with the clear kernel on a tiny case."""
    try:
        gap = _largest_gap(shape, tile, has_window, has_softcap, has_sinks)
    except torch.OutOfMemoryError:
        raise  # this error says nothing about the kernel, and the answer is cached
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
    forest = OneLaunch(Segments.of(segments, positions))
    for _ in range(2):  # the second launch is a cached one
        output = forest.attend(0, query, key, value, scoring, launch)

    visible = torch.zeros((5, 43), dtype=torch.bool)  # the keys of the block twice, and those of the rows
    key_positions = [*range(19), *range(19), *positions]
    for row in range(5):
        for idx, position in enumerate(key_positions):
            is_ancestor = 1 <= row < 4 if idx < 38 else idx - 38 <= row < until[idx - 38]
            visible[row, idx] = is_ancestor and (not has_window or positions[row] - position < 6)
    expected, lse = clear_kernel(
        query.double(),  # torch multiplies no float64 in TF32
        torch.cat([block.key, block.key, key], dim=1),
        torch.cat([block.value, block.value, value], dim=1),
        scoring.scaling,
        False,
        additive_mask(visible.to(shape.device), torch.float64),
        softcap=scoring.softcap,
    )
    if sinks is not None:
        expected = expected * torch.sigmoid(lse - sinks)[..., None]
    return float((output - expected).abs().max())
