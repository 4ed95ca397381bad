"""Adapters by segment: LoRAs that are on for some tokens of a pass and off for the others.

A pass may have tokens under several adapters. Each linear layer multiplies all rows by its own weights once, then adds
the product of each adapter to the rows of this adapter. The adapters are those that peft, or transformers'
`load_adapter`, has put into the model. Tokens without an adapter of their own are under the model's active adapters, as
in the plain call.

An adapter has a number, a hash of its content, which token ids carry (tokens/adapted.py). Adapters of equal content
have the same number, whatever their names. An adapter has the number 0 if it computes the same as the active adapters;
so does "no adapter" if none is active.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from backprompt.errors import AdapterError, UnsupportedModelError
from backprompt.model.peft_layers import Layer, active_in, adapters_in, is_of_peft
from backprompt.model.skeleton import decoder_of
from backprompt.tokens.adapted import MAX_EMBEDDINGS, NUMBER_BITS, Ints

_LIKE_LORA = "ALoraLinearVariant"
"""The variant of LoRA that differs from an ordinary one only in the tokens to which it applies."""

_VARIANTS = (None, _LIKE_LORA, "DoraLinearVariant")
"""The kinds of LoRA that compute each row by itself."""

_ADVICE = "Activate it for all tokens instead (model.set_adapter), or use a LoRA of linear layers."


class SegmentAdapters:
    """The adapters of a model in one state, by name and by number.

    Args:
        model: the user's causal LM.

    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._numbers: dict[str | None, int] = {}
        self._names: dict[int, str | None] = {}
        self._contents: dict[int, bytes] = {}
        self._reason: str | None = None

    def number_of(self, name: str | None) -> int:
        """Return the number of an adapter; the name None stands for no adapter.

        Raises:
            AdapterError: the model has no adapter of this name, or the adapter cannot apply to some tokens only.

        """
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = self._found(name)
            self._names.setdefault(number, name)
        return number

    def check(self, numbers: Collection[int]) -> None:
        """Raise AdapterError if tokens cannot be under adapters with these numbers."""
        if self._reason is not None and any(numbers):
            raise AdapterError(f"Segments of texts cannot have adapters: {self._reason}")

    def refuse(self, reason: str) -> None:
        """Refuse adapters of segments from now on."""
        self._reason = reason

    @property
    def numbers(self) -> frozenset[int]:
        """The numbers that were given out."""
        return frozenset(self._names)

    def name_of(self, number: int) -> str | None:
        """Return the name of an adapter; if several have equal content, the name of one of them."""
        return self._names[number]

    def _found(self, name: str | None) -> int:
        layers = [(path, module) for path, module in self._model.named_modules() if is_of_peft(module)]
        self._check(name, layers)
        content, active = _content(layers, lambda layer: [] if name is None else [name]), _content(layers, active_in)
        if content == active:
            return 0
        number = int.from_bytes(content, "little") >> (8 * len(content) - NUMBER_BITS) or 1
        if self._contents.setdefault(number, content) != content:
            raise AdapterError(
                f"The adapters {name!r} and {self._names[number]!r} have the same hash. Load only one of them."
            )
        return number

    def _check(self, name: str | None, layers: Sequence[tuple[str, Layer]]) -> None:
        """Raise AdapterError unless some tokens can be under this adapter while others are under the active ones."""
        known = sorted({own for _, layer in layers for own in adapters_in(layer)})
        if name is not None and name not in known:
            has = f"it has {', '.join(map(repr, known))}" if known else "it has none"
            raise AdapterError(
                f"The model has no adapter {name!r}: {has}. Load it with model.load_adapter(path, adapter_name=...)."
            )
        if not layers:
            return
        if self._model.get_input_embeddings().weight.shape[0] > MAX_EMBEDDINGS:  # type: ignore[operator]
            raise AdapterError(
                f"Segments can have adapters only if a model has at most {MAX_EMBEDDINGS:,} embeddings. "
                "Activate the adapter for all tokens instead (model.set_adapter)."
            )
        decoder = decoder_of(self._model)
        assert decoder is not None, "check_supported refuses a model without one"
        inner = {id(module) for module in decoder.modules()}
        for path, layer in layers:
            if layer.merged_adapters:
                raise AdapterError(
                    f"The adapter {layer.merged_adapters[0]!r} is merged into the weights of {path}, so no token can "
                    "be without it. Unmerge it first (model.unmerge_adapter())."
                )
            for own in adapters_in(layer):
                reason = _why_not(path, layer, own, is_inner=id(layer) in inner) if own == name else None
                if reason is not None:
                    raise AdapterError(f"The adapter {name!r} cannot be that of a segment: it {reason}. {_ADVICE}")
                if own in active_in(layer) and (reason := _why_not(path, layer, own, is_inner=id(layer) in inner)):
                    raise AdapterError(
                        f"Segments cannot have adapters beside the active adapter {own!r}: it {reason}. Deactivate it "
                        "(model.disable_adapter_layers() of peft's base_model, or model.disable_adapters())."
                    )


def _why_not(path: str, layer: Layer, name: str, *, is_inner: bool) -> str | None:
    """Return why an adapter's part of a layer cannot apply to some rows only; None if it can."""
    kind = type(layer)
    if (kind.__module__, kind.__qualname__) != ("peft.tuners.lora.layer", "Linear"):
        return f"changes {path} as {kind.__qualname__} of {kind.__module__}"
    if _variant(layer, name) not in _VARIANTS:
        return f"changes {path} as a LoRA of the kind {_variant(layer, name)}"
    if not is_inner:
        return f"changes {path}, outside the body of the model"
    if "expert" in path:
        return f"changes {path}, an expert, which sees some tokens only"
    if any(parameter.is_meta for parameter in layer.parameters()):
        return f"changes {path}, which is offloaded"
    return None


def _variant(layer: Layer, name: str) -> str | None:
    variant = layer.lora_variant.get(name)
    return None if variant is None else type(variant).__name__


def _content(layers: Sequence[tuple[str, Layer]], names_in: Callable[[Layer], Sequence[str]]) -> bytes:
    """Return a hash of the parts that adapters add to layers, by the names of the adapters in each layer."""
    found = hashlib.sha256()
    for path, layer in layers:
        for name in names_in(layer):
            if name not in adapters_in(layer):
                continue
            tensors = [(part, tensor) for part, tensor in layer.named_parameters() if f".{name}." in f".{part}."]
            variant = _variant(layer, name) if hasattr(layer, "lora_variant") else type(layer).__name__
            kind = None if variant == _LIKE_LORA else variant
            found.update(repr((path, kind, getattr(layer, "scaling", {}).get(name))).encode())
            for part, tensor in tensors:
                found.update(repr((part.replace(f".{name}", ""), tuple(tensor.shape), str(tensor.dtype))).encode())
                found.update(_bytes_of(tensor))
    return found.digest()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()


@dataclass
class _Group:
    """The rows of a pass under one adapter, or under the active ones; `name`: of the adapter, None for no adapter."""

    name: str | None
    rows: Tensor
    is_active: bool
    _on: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> Tensor:
        """Return the rows as a tensor on a device."""
        found = self._on.get(device)
        if found is None:
            found = self._on[device] = self.rows.to(device)
        return found

    def names_in(self, layer: Layer) -> list[str]:
        """Return the adapters of these rows in a layer."""
        if self.is_active:
            return active_in(layer)
        return [] if self.name is None or self.name not in layer.lora_A else [self.name]


class AdaptedRows:
    """The rows of the pass in flight by adapter; None where all rows are under the active adapters."""

    def __init__(self) -> None:
        self.groups: list[_Group] | None = None
        self.num_rows = 0


class AdaptedLayers:
    """Lets the linear layers of a private copy apply to each row the adapter of the row.

    Args:
        body: the private copy.
        adapters: the adapters of the model.

    """

    def __init__(self, body: nn.Module, adapters: SegmentAdapters) -> None:
        self._body = body
        self._adapters = adapters
        self._rows = AdaptedRows()
        self._are_in_place = False

    @contextmanager
    def under(self, numbers: Ints) -> Iterator[None]:
        """Compute under adapters while the context lasts; `numbers`: the adapter's number of each row, `(rows,)`."""
        if not numbers.any():
            yield
            return
        if not self._are_in_place:
            _put_in_place(self._body, self._rows)
            self._are_in_place = True
        self._rows.num_rows = len(numbers)
        self._rows.groups = [
            _Group(
                self._adapters.name_of(number) if number else None,
                torch.from_numpy(np.flatnonzero(numbers == number)),
                is_active=not number,
            )
            for number in np.unique(numbers).tolist()
        ]
        try:
            yield
        finally:
            self._rows.groups = None


def _put_in_place(body: nn.Module, rows: AdaptedRows) -> None:
    made: dict[nn.Module, AdaptedLinear] = {}  # a layer may stand in several places
    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            if is_of_peft(child) and hasattr(child, "lora_variant"):
                if child not in made:
                    made[child] = AdaptedLinear(child, rows)
                setattr(parent, name, made[child])


class AdaptedLinear(nn.Module):
    """Replaces a LoRA layer of peft in a private copy: each row under its own adapter.

    Args:
        layer: the layer of peft.
        rows: the rows of the pass in flight.

    """

    def __init__(self, layer: Layer, rows: AdaptedRows) -> None:
        super().__init__()
        self.layer = layer
        self._rows = rows

    @property
    def weight(self) -> Tensor:
        """The weight of the linear layer, which some models read."""
        weight: Tensor = self.layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear layer, which some models read."""
        bias: Tensor | None = self.layer.bias
        return bias

    def forward(self, rows: Tensor) -> Tensor:
        """`(..., inputs)` -> `(..., outputs)`."""
        layer = self.layer
        if self._rows.groups is None:
            product: Tensor = layer(rows)
            return product
        if math.prod(rows.shape[:-1]) != self._rows.num_rows:
            raise UnsupportedModelError(
                "The rows of a linear layer of the model are not the tokens of the pass, so no token can be under an "
                "adapter of its own. Activate the adapter for all tokens instead (model.set_adapter)."
            )
        product = layer.base_layer(rows)
        inputs, outputs = rows.reshape(-1, rows.shape[-1]), product.reshape(-1, product.shape[-1])
        for group in self._rows.groups:
            if names := group.names_in(layer):
                own = group.on(rows.device)
                outputs.index_copy_(0, own, outputs_under(layer, names, inputs[own], outputs[own]))
        return outputs.view(product.shape)


def outputs_under(layer: Layer, names: Sequence[str], inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the outputs of rows, adapters included, as peft's `forward` of the layer computes them."""
    dtype = outputs.dtype
    for name in names:
        inputs = layer._cast_input_dtype(inputs, layer.lora_A[name].weight.dtype)
        if _variant(layer, name) in (None, _LIKE_LORA):
            outputs = outputs + layer.lora_B[name](layer.lora_A[name](inputs)) * layer.scaling[name]
        else:
            outputs = layer.lora_variant[name].forward(layer, active_adapter=name, x=inputs, result=outputs)
    return outputs.to(dtype)
