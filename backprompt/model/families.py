"""Changes that some families need in the private copies, so that a packed pass gives the numbers of the plain call.

- *Positions behind the padding id* (RoBERTa and kin): the plain call counts positions from `padding_idx + 1` on. The
  table of positions in a private copy adds this number to the positions that it is given.
- *Positions by row* (BART and kin): the decoder takes no positions, and gives the row numbers of the call to its table.
  In a private copy the table uses the positions that the decoder is given.
- *Temperature by position* (Llama 4): layers without rotation scale their queries by the row of the call. In a private
  copy these layers get a stand-in for a cache, with which the model's own code counts true positions.
- *Chosen keys* (DeepSeek V3.2, GLM-MoE-DSA, MiniMax M3 and kin): an indexer chooses a number of keys, or of blocks of
  keys, for each query. In a text with no more keys than that it chooses all of them. In a private copy the indexer
  chooses all keys without computing, and longer texts are refused.

The parts are found by features of their code, so a new family with the same code needs no change here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from backprompt.errors import UnsupportedModelError
from backprompt.model.cache_form import KEYS_VALUES_NAMES

_UPDATE = "mamba2_selective_state_update"
"""The name of the function by which layers of Mamba 2 update their state by a single token."""


def adapt(body: nn.Module) -> None:
    """Change the modules of a private body that would not compute the same in a packed pass as in the plain call.

    Raises:
        UnsupportedModelError: the forward of such a module was replaced.

    """
    for module in list(_modules(body)):
        if _num_chosen(module) is not None:
            _become(module, _ChoosesAllKeys)
        elif any(map(_scales_by_row, module.children())):
            _become(module, _TellsPositions)
        elif _scales_by_row(module):
            _become(module, _AtTruePositions)
        elif _counts_rows(module):
            _become(module, _TakesPositions)
            _become(module.embed_positions, _TableAtTruePositions)
        elif _counts_behind_padding(module):
            _become(module.position_embeddings, _ShiftedPositions)
            module.position_embeddings.first_position = module.padding_idx + 1


def keep_weights(private: nn.Module) -> None:
    """Keep a private copy from changing the weights that it shares with the user's model.

    RWKV divides weights in its first call in eval mode, and then divides hidden states between layers, so that these
    stay within float16's range. The user's model may do so. If a private copy runs first, it divides neither.
    """
    for module in _modules(private):
        if getattr(module, "layers_are_rescaled", True) is False:
            module.config.rescale_every = 0


def limit_single_steps(body: nn.Module) -> None:
    """Let layers of a private body limit their time steps for a single token behind a cache, as they do for several.

    The layers of Mamba 2 do not apply the limit to a single token (Nemotron-H, Zamba 2, and models whose configuration
    has a limit). So a plain call behind a cache gives other numbers than a plain call on the whole text.
    """
    for module in list(_modules(body)):
        limit = getattr(module, "time_step_limit", None)
        forward = inspect.unwrap(type(module).forward)
        if limit is not None and isinstance(forward, FunctionType) and _UPDATE in forward.__code__.co_names:
            module.forward = MethodType(_with_limited_update(forward, *limit), module)


def _with_limited_update(forward: FunctionType, least: float, most: float) -> Callable[..., Any]:
    """Return a layer's `forward` with an update of its state by a single token that limits the time step."""
    plain = forward.__globals__[_UPDATE]

    def update(state: Tensor, hidden: Tensor, dt: Tensor, *numbers: Tensor, **options: Any) -> Tensor:
        bias, is_softplus = options.pop("dt_bias", None), options.pop("dt_softplus", False)
        dt = dt if bias is None else dt + bias.to(dt.dtype)
        dt = nn.functional.softplus(dt) if is_softplus else dt
        found: Tensor = plain(state, hidden, dt.clamp(least, most), *numbers, **options)
        return found

    names = {**forward.__globals__, _UPDATE: update}
    limited = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    limited.__kwdefaults__ = forward.__kwdefaults__
    return limited


def padding_id(decoder: nn.Module) -> int | None:
    """Return the token id that takes no position in the plain call, and behind which positions begin, or None."""
    return next((module.padding_idx for module in _modules(decoder) if _counts_behind_padding(module)), None)


def mixing_layers(decoder: PreTrainedModel) -> list[str]:
    """Return the classes of layers that keep a state of all earlier tokens, found by class names and by their cache.

    A comparison of numbers may miss such layers: small weights mix tokens by less than the comparison shows, and keys
    may be compressed in blocks that are longer than the compared texts.
    """
    compressors = {type(module).__name__ for module in decoder.modules() if _is_compressor(module)}
    if compressors or not _caches_states(decoder.config):
        return sorted(compressors)
    around_convolutions = {
        type(module).__name__
        for module in decoder.modules()
        if any(isinstance(part, nn.Conv1d) and max(part.kernel_size) > 1 for part in module.children())
    }
    return sorted(around_convolutions) or ["linear attention"]


def _is_compressor(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Compressor")


def _caches_states(config: Any) -> bool:
    try:
        layers = DynamicCache(config=config).layers
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ):  # a configuration whose layers transformers' caches do not know
        return False
    return any(hasattr(layer, "conv_states") for layer in layers)


def num_chosen_keys(decoder: nn.Module) -> int | None:
    """Return the number of keys that the indexers of a decoder choose for a query; None if there are no indexers."""
    return min((num for num in map(_num_chosen, decoder.modules()) if num is not None), default=None)


def _modules(decoder: nn.Module) -> Iterator[Any]:
    return decoder.modules()


def _num_chosen(module: Any) -> int | None:
    """Return the number of keys that an indexer chooses for a query; None for other modules."""
    if not type(module).__name__.endswith("Indexer"):
        return None
    if isinstance(getattr(module, "index_topk", None), int):
        return int(module.index_topk)
    if isinstance(getattr(module, "topk_blocks", None), int):
        return int(module.topk_blocks * module.block_size)
    return None


def _counts_rows(module: Any) -> bool:
    """Return whether a decoder gives the row numbers of the call to its table of positions."""
    table = module._modules.get("embed_positions")
    if table is None or not {"past_key_values_length", "position_ids"} <= _parameters_of(table):
        return False
    own = _parameters_of(module)
    return not own.isdisjoint(KEYS_VALUES_NAMES) and "position_ids" not in own


def _parameters_of(module: nn.Module) -> set[str]:
    return set(inspect.signature(type(module).forward).parameters)


def _scales_by_row(module: Any) -> bool:
    own = vars(module)  # a lookup of a missing attribute of a module takes long
    return "floor_scale" in own and bool(own.get("attn_temperature_tuning"))


def _counts_behind_padding(module: Any) -> bool:
    return (
        isinstance(module._modules.get("position_embeddings"), nn.Embedding)
        and isinstance(getattr(module, "padding_idx", None), int)
        and hasattr(module, "create_position_ids_from_input_ids")
    )


def _become(module: Any, kind: type) -> None:
    """Give a module of a private copy the forward of another class, which calls the module's own."""
    cls: type = type(module)
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise UnsupportedModelError(
            f"A module {cls.__name__} of the model has a forward that was replaced, and it would treat the texts of a "
            "pass as one text. Remove the replacement, or change the class of the module."
        )
    module.__class__ = type(cls.__name__, (kind, cls), {"__module__": cls.__module__})
    if "_old_forward" in vars(module):  # accelerate's hooks call the method that they have wrapped
        module._old_forward = MethodType(module.__class__.forward, module)


class _ShiftedPositions:
    """A table of positions with unused rows before the first position."""

    first_position: int

    def forward(self, positions: Tensor) -> Tensor:
        shifted: Tensor = super().forward(positions + self.first_position)  # type: ignore[misc]
        return shifted


class _TakesPositions:
    """A decoder that hands the given positions to its table."""

    def forward(self, *args: Any, position_ids: Tensor, **keywords: Any) -> Any:
        self.embed_positions.position_ids = position_ids  # type: ignore[attr-defined]
        return super().forward(*args, **keywords)  # type: ignore[misc]


class _TableAtTruePositions:
    """A table of positions that returns the rows of the positions that it was handed before."""

    position_ids: Tensor

    def forward(self, shape: Any, *_: Any, **__: Any) -> Tensor:
        rows: Tensor = super().forward(shape, position_ids=self.position_ids[0])  # type: ignore[misc]
        return rows


class _TellsPositions:
    """A layer that tells its attention the positions that it is given."""

    def forward(self, *args: Any, position_ids: Tensor, **keywords: Any) -> Any:
        for part in self.children():  # type: ignore[attr-defined]
            if isinstance(part, _AtTruePositions):
                part.position_ids = position_ids
        return super().forward(*args, position_ids=position_ids, **keywords)  # type: ignore[misc]


class _AtTruePositions:
    """An attention layer that would scale queries by their rows in the call, and here uses positions."""

    position_ids: Tensor

    def forward(self, *args: Any, **keywords: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        (name,) = inspect.signature(forward).parameters.keys() & {*KEYS_VALUES_NAMES}
        return forward(*args, **{**keywords, name: _TruePositions(self.position_ids)})


class _TruePositions:
    """Takes a cache's place: gives the number of tokens before a row, and adds no keys and values."""

    def __init__(self, position_ids: Tensor) -> None:
        self._position_ids = position_ids

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """Return the numbers that turn the rows of the call into their positions, `(tokens,)`."""
        rows = torch.arange(self._position_ids.shape[-1], device=self._position_ids.device)
        return self._position_ids[0] - rows

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """Return the keys and values as they are."""
        return keys, values


class _ChoosesAllKeys:
    """An indexer that chooses all keys without naming them: see `are_all_keys`."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return torch.empty((*hidden_states.shape[:-1], 0), dtype=torch.int32, device=hidden_states.device)


def are_all_keys(value: object) -> bool:
    """Return whether a value that a layer passes to its attention means that an indexer has chosen all keys."""
    return isinstance(value, Tensor) and value.dtype == torch.int32 and value.shape[-1:] == (0,)
