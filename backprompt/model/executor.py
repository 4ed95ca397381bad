"""Runs passes on a model: the only file that knows transformers' forward call.

Each executor registers one attention function and one mask function under a name of its own, and switches its private
copy of the model to that name. While a pass runs, the mask function finds the meaning of the model's mask (causal, or
causal within a window) and hands the layers a marker for it. The attention function takes the layer's keys and values,
copies them into the pass's block, and attends over the forest.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from backprompt.attention.base import ForestAttention, PreparedAttention, StandingAttention
from backprompt.attention.by_device import AttentionByDevice, CopiesByDevice
from backprompt.attention.choice import attention_for, copies_for
from backprompt.attention.maps import EnoughSeen, PackedMaps
from backprompt.errors import NonFiniteError
from backprompt.forest.fan import without_fans
from backprompt.forest.plan import Pass, plan_pass
from backprompt.forest.span import Span
from backprompt.logprobs import logprob_dtype
from backprompt.memory.blocks import BlockRows, BlockType, KeysValues, States
from backprompt.memory.layout import Layout
from backprompt.memory.places import Places
from backprompt.model import skeleton, spread
from backprompt.model.adapters import AdaptedLayers, SegmentAdapters
from backprompt.model.cache_form import Body
from backprompt.model.caches import Form, dynamic_cache, form_of_cache
from backprompt.model.forwarded import Computed, Forwarded
from backprompt.model.fusion import fusion_for
from backprompt.model.graphs import Step
from backprompt.model.in_flight import InFlight, no_layers_error, run_body
from backprompt.model.int8 import speed_up_int8
from backprompt.model.lean import make_lean
from backprompt.model.levels import NO_ATTENTION, Levels
from backprompt.model.limits import limits_of
from backprompt.model.linear import speed_up
from backprompt.model.nonfinite import logits_error, states_error
from backprompt.model.padded import pad_head
from backprompt.model.pass_size import tokens_per_forward
from backprompt.model.quantized import copied_bytes, weight_bytes
from backprompt.model.steps import CapturedSteps, captured_steps
from backprompt.model.surroundings import out_of_inference_mode, plain_surroundings, set_gradients
from backprompt.tokens.adapted import Ints, are_plain, number_of, numbers_in, plain_array
from backprompt.transfers import on_device

logger = logging.getLogger(__name__)

HEAD_SLICE_BYTES = 24 << 20
"""Logit rows are computed in slices of at most this size, never for a whole forest at once.

The C library reuses memory of up to 32 MB for the next slice. Larger slices are new pages each time, and the system
takes longer to make them than a small model takes to fill them.
"""

CACHED_SLICE_BYTES = 4 << 20
"""A slice of this size stays in the processor's cache until its rows are read, so no slice on the CPU is smaller."""

SLICE_TO_HEAD = 8
"""The size of a slice on the CPU, as a multiple of the head's, between the two limits above. The weights of the head
are read for each slice, so only a tiny head takes small slices."""

DEVICE_HEAD_SLICE_BYTES = 128 << 20
"""The size of a slice on other devices, where slices cost launches. Scoring takes four times as many bytes besides."""

_names = itertools.count()


class Executor:
    """Private copies of one model, and the ways to run them; to be used in `plain_surroundings`.

    Args:
        model: any causal LM.
        decode: from token ids to text, for messages.
        pack_weights: whether to hold packed copies of the weights of linear layers.

    Raises:
        UnsupportedModelError: `skeleton.check_supported` refuses the model, or its weights cannot be packed.

    """

    def __init__(self, model: nn.Module, decode: Callable[[Sequence[int]], str], *, pack_weights: bool = False) -> None:
        skeleton.check_supported(model)
        self._model = model
        self._decode = decode
        self.device = spread.head_device(model)
        """The device of hidden states and logits. Keys and values lie on the device of their layer."""
        self._input_device = spread.input_device(model)
        self.limits = limits_of(model)
        self.logit_row_bytes = skeleton.logit_row_bytes(model)
        self.vocab_size = skeleton.vocab_size(model)
        self.logprob_dtype = logprob_dtype(skeleton.head_dtype(model))
        self.hidden_size = skeleton.hidden_size(model)
        self.token_bytes = 0
        """Bytes that are held for one token; known after the first pass."""
        self.snapshot_bytes = 0
        """Bytes that are held for the states behind a span, if the model has any; known after the first pass."""
        self.layout: Layout | None = None
        """The layout of rows; known after the first pass."""
        self.device_of: dict[str, torch.device] = {}
        """The device of each tensor of a block, by name; known after the first pass."""
        self._devices = spread.devices_of(model)
        is_on_one = len(self._devices) == 1
        self._attention: ForestAttention = attention_for(self.device) if is_on_one else AttentionByDevice()
        self._make_copies = copies_for(self.device) if is_on_one else CopiesByDevice
        self._model_name = type(model).__name__
        self._packs_weights = pack_weights
        self._name = f"backprompt-{next(_names)}"
        self.levels: Levels | None = None
        """Forwards passes by levels, where attention cannot be packed; see levels.py."""
        self._take(skeleton.make_body(model, self._name))
        self._config: Any = self._head.config
        self.adapters = SegmentAdapters(model)
        """The adapters that segments of texts may name."""
        self._adapted = AdaptedLayers(self._body, self.adapters)
        self._in_flight: InFlight | None = None
        self._form_of_cache: tuple[Form | None] | None = None  # known after its first use
        self.steps: CapturedSteps | None = None
        """Captured steps of generations, where the device has graphs."""
        self.may_stop = not spread.is_spread(model)
        """Whether a call of the body may be left in the middle: hooks that move weights must run to their end."""
        if not spread.is_spread(model):  # hooks move weights between steps
            self.steps = captured_steps(self._body, self._head, self._attention)
        _register(self._name, self)

    def _take(self, body: nn.Module) -> None:
        """Use `body`, a private copy of the decoder, from now on, and make a copy of the head."""
        self._body, self._head = body, skeleton.make_head(self._model)
        with plain_surroundings(self.device):
            if not spread.is_spread(self._model):
                fusion_for(self.device)(self._body)
            linears = speed_up((self._body, self._head), pack=self._packs_weights)
            linears = speed_up_int8((self._body, self._head), linears)
            linears = pad_head(self._head, self._model, linears)
        if not spread.is_spread(self._model):  # the hooks of accelerate write to the tables of weights
            for private in (self._body, self._head):
                make_lean(private)
        copied = linears.packed_bytes + copied_bytes(self._body) + copied_bytes(self._head)
        self.linears = replace(linears, packed_bytes=copied)
        self.weight_bytes = weight_bytes(self._model)
        """The bytes of the model's weights in memory; for quantized weights, those of the integers and scales."""

    def own_body(self) -> Body:
        """Use a body with its own attention from now on, and return it."""
        self.steps = None
        self._take(skeleton.make_own_body(self._model))
        self._adapted = AdaptedLayers(self._body, self.adapters)  # frees the earlier body and its packed weights
        return Body(self._body, self._input_device)

    def go_by_levels(self, levels: Levels) -> None:
        """Forward all passes by levels from now on."""
        self.levels, self.layout = levels, None
        self.adapters.refuse(f"{self._model_name} is forwarded by levels, always under its active adapters.")

    def close(self) -> None:
        """Release the copies of the model and packed weights; nothing can be computed afterwards."""
        self.steps = self.levels = None
        for name in ("_body", "_head", "_model", "_adapted", "adapters"):
            vars(self).pop(name, None)  # a second call finds none

    @property
    def kernel_name(self) -> str:
        """The name of the attention kernel in use; the clear kernel's name includes the reason for it."""
        return self._attention.name if self.levels is None else self.levels.name

    def compute(self, pass_: Pass) -> Computed:
        """Forward a pass; its spans hold no results before `Computed.place` is called.

        Raises:
            NonFiniteError: a hidden state, a query or a key is NaN or infinite; the message names the text.

        """
        forwarded = self.forward(pass_)
        keys_values, hidden = forwarded.keys_values, forwarded.hidden
        if not forwarded.is_finite:
            raise self._error_of(pass_, hidden)
        new = [span for span in pass_.spans if not span.is_held()]
        states: States | None = None
        if len(new) == len(pass_.spans):
            states = States.of(hidden)
        elif new:
            rows_of = dict(zip(pass_.spans, pass_.slices, strict=True))
            states = States.of_rows(hidden, [rows_of[span] for span in new])
        if self.layout is None:
            sample = States.of_rows(hidden, [slice(0, 1)])
            self.know_rows(Layout.of(keys_values, sample), keys_values.row_bytes + sample.num_bytes)
        states_of = {} if states is None else _in_rows_of(states, new)
        return Computed(keys_values, states, _in_rows_of(keys_values, pass_.spans), states_of, forwarded.work)

    def know_rows(self, layout: Layout, token_bytes: int) -> None:
        """Take over the layout of rows, and the bytes of a token, from a pass of a model with the same parts."""
        self.layout, self.token_bytes, self.snapshot_bytes = layout, token_bytes, layout.snapshot_bytes
        self.device_of |= {name: row.device for name, row in layout.rows.items()}

    def refuse_placeholders(self, placeholders: frozenset[int]) -> None:
        """Refuse only these token ids as standing for images or sounds; the probe finds them."""
        self.limits = replace(self.limits, placeholders=placeholders)

    def prepare(self, pass_: Pass, num_steps: int) -> PreparedAttention:
        """Return the attention of several steps of a generation; see `ForestAttention.prepare`."""
        return NO_ATTENTION if self.levels is not None else self._attention.prepare(pass_, num_steps)

    def step(self, pass_: Pass, attention: PreparedAttention, places: Callable[[], Places | None]) -> Forwarded:
        """Forward one token for each of several texts, by a captured graph where there is one: see steps.py.

        Args:
            pass_: the tokens.
            attention: the prepared attention.
            places: returns the places to which the results go; then the next step overwrites the results here. It
                returns None if the caller keeps the results here.

        """
        if self.steps is None or not are_plain(pass_.token_ids):  # a graph has all rows under the active adapters
            return self.forward(pass_, attention)
        self.limits.check_placeholders(pass_.token_ids)
        step = Step(list(pass_.token_ids), pass_.positions, places())
        launched = self.steps.launch(self, step, attention)
        return self.forward(pass_, attention) if launched is None else Forwarded.of(launched)

    def forward(self, pass_: Pass, attention: PreparedAttention | None = None) -> Forwarded:
        """Forward all tokens of a pass; `attention`: the prepared attention, if there is one.

        Where memory is short, the graphs of captured steps make room.

        Raises:
            UnsupportedModelError: the model's attention does something that is not implemented here.
            TokenIdError: a token stands for an image or a sound.

        """
        ids = np.array(pass_.token_ids, dtype=np.int64)
        if self.limits.placeholders:
            self.limits.check_placeholders(plain_array(ids).tolist())
        try:
            return self._forward(pass_, ids, attention)
        except torch.OutOfMemoryError:
            if self.steps is None or not self.steps.forget():
                raise
        return self._forward(pass_, ids, attention)

    def _forward(self, pass_: Pass, ids: Ints, attention: PreparedAttention | None) -> Forwarded:
        if self.levels is not None:
            self.adapters.check(numbers_in(pass_.token_ids))
            return self.levels.forward(pass_)
        positions = pass_.positions
        prepared = self._attention.prepare(pass_) if attention is None else attention
        with self._adapted.under(number_of(ids)):
            inputs = _inputs(ids, positions, self._input_device)
            in_flight, hidden = self.run(inputs, prepared, max(positions), in_inference_mode=True)
        in_flight.copies.check(hidden)
        are_finite = in_flight.copies.are_finite()
        return Forwarded(KeysValues.of(in_flight.keys, in_flight.values), hidden, are_finite)

    def observe(self, token_ids: Sequence[int], positions: Sequence[int], attention: PackedMaps) -> None:
        """Forward tokens of texts once more, behind their held keys, up to the last layer that is observed."""
        ids = np.array(token_ids, dtype=np.int64)
        with suppress(EnoughSeen), self._adapted.under(number_of(ids)):
            self.run(_inputs(ids, positions, self._input_device), attention, max(positions))

    def abandon(self) -> None:
        """Forget the pass in flight, which keeps rows alive; an error at the very end of a pass may leave it here."""
        self._in_flight = None

    def forget_graphs(self) -> None:
        """Release the memory of captured steps; more steps will be captured."""
        if self.steps is not None:
            self.steps.forget()

    def run(
        self,
        inputs: Tensor,
        attention: PreparedAttention | StandingAttention,
        max_position: int,
        *,
        in_inference_mode: bool = False,
    ) -> tuple[InFlight, Tensor]:
        """Run the model's body; return its keys and values, and the final hidden states, `(tokens, hidden)`.

        Args:
            inputs: token ids and positions, `(2, tokens)`.
            attention: the attention of the pass.
            max_position: the largest of the positions.
            in_inference_mode: whether to run the body in torch's inference mode, which takes the host less time. This
                mode hides some operations from the checks of a recording.

        """
        in_flight = self._in_flight = InFlight(
            attention=attention, copies=self._make_copies(), model_name=self._model_name, max_position=max_position
        )
        kernel_before = self.kernel_name
        try:
            with torch.inference_mode() if in_inference_mode else nullcontext():  # False would turn gradients on
                hidden = run_body(self._body, inputs)
        finally:
            self._in_flight = None
        if not in_flight.keys:
            raise no_layers_error(self._model_name)
        if self.kernel_name != kernel_before:
            logger.info("Attention of %s runs on the kernel %s.", self._model_name, self.kernel_name)
        return in_flight, hidden.clone() if hidden.device == self.device else hidden.to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the model's head to final hidden states: `(rows, hidden)` -> `(rows, vocab)`. Slice large inputs.

        The caller checks that each row is a distribution: `logprobs.are_distributions`.
        """
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    def logits_error(self, logits: Tensor, token_ids: Sequence[int]) -> NonFiniteError:
        """Return the error for logits behind `token_ids`, `(vocab,)`, that are not a distribution."""
        return logits_error(self._model, logits, token_ids, self._decode)

    def _error_of(self, pass_: Pass, hidden: Tensor) -> NonFiniteError:
        """Return the error for a pass that is not finite; the message names the text.

        A masked key that is NaN may spoil texts that do not see it. So each spoiled text runs alone, until one fails.
        """
        pass_ = Pass(tuple(without_fans(pass_.spans)), pass_.segments)
        spans = list(zip(pass_.spans, pass_.slices, strict=True))
        spoiled = [span for span, rows in spans if not bool(hidden[rows].isfinite().all())] or list(pass_.spans)
        for span in spoiled:
            way = set(span.closure())
            alone = plan_pass([part for part in pass_.spans if part in way])
            found = self.forward(alone)
            if not found.is_finite:
                break
        states = found.hidden[alone.slices[-1]]
        is_bad = ~states.isfinite().all(dim=-1)
        last = is_bad.tolist().index(True) if bool(is_bad.any()) else len(span.token_ids) - 1
        before = [token_id for part in span.path()[:-1] for token_id in part.token_ids]
        return states_error(self._model, states[last], [*before, *span.token_ids[: last + 1]], self._decode)

    @property
    def rows_in_a_slice(self) -> int:
        """The largest number of logit rows that one call of `logits` should compute."""
        num_bytes = DEVICE_HEAD_SLICE_BYTES
        if self.device.type == "cpu":
            head_bytes = self.hidden_size * self.logit_row_bytes
            num_bytes = min(HEAD_SLICE_BYTES, max(CACHED_SLICE_BYTES, SLICE_TO_HEAD * head_bytes))
        return max(1, num_bytes // self.logit_row_bytes)

    def tokens_per_forward(self) -> int:
        """Return the default of the largest number of tokens in a pass."""
        return min(tokens_per_forward(self._body, device) for device in self._devices)

    def dynamic_cache(self, keys_values: KeysValues, snapshot: Tensor | None) -> DynamicCache:
        """Return a cache for `model(..., past_key_values=...)` with all rows of a block; see caches.py.

        `snapshot`: the snapshot of the states behind the rows, if there is one.
        """
        if self.levels is not None:
            return self.levels.cache_of(self._model_name, keys_values, snapshot)
        if self._form_of_cache is None:
            self._form_of_cache = (form_of_cache(self._model, self._input_device),)
        return dynamic_cache(self._model_name, self._config, *self._form_of_cache, keys_values)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """Attend over the forest of the pass in flight; transformers' attention interface.

        Shapes: query `(1, heads, tokens, head_dim)`, key and value `(1, kv_heads, tokens, head_dim)`; returns
        `(1, tokens, heads, head_dim)`.
        """
        in_flight = self._in_flight
        assert in_flight is not None, "attention outside of Executor.forward"
        scoring = in_flight.scoring(query, attention_mask, **keywords)
        query = query[0]
        with out_of_inference_mode():  # keys and values that are kept are plain tensors
            set_gradients(False)  # for as long as this context lasts
            copies = in_flight.copies.of(query, key[0], value[0])
            layer_idx = in_flight.add_layer(*copies)
            output = in_flight.attention.attend(layer_idx, query, *copies, scoring)
        return output[None], None

    def mark_mask(self, *, mask_function: Callable[..., Tensor], use_vmap: bool = False, **keywords: object) -> Tensor:
        """Return a marker for a mask that is causal, or causal within a window; transformers' mask interface."""
        in_flight = self._in_flight
        assert in_flight is not None, "a mask outside of Executor.forward"
        return in_flight.mark(mask_function, use_vmap, self._input_device)


def _inputs(ids: Ints, positions: Sequence[int], device: torch.device) -> Tensor:
    """Return token ids without their adapters, and positions, `(2, tokens)`."""
    return on_device(np.array([plain_array(ids), positions], dtype=np.int64), device)


def _in_rows_of(block: BlockType, spans: Sequence[Span]) -> dict[Span, BlockRows[BlockType]]:
    """Return the rows of each span; the block holds the spans' rows one behind the other."""
    stops = itertools.accumulate(len(span.token_ids) for span in spans)
    return {span: BlockRows(block, stop - len(span.token_ids), stop) for span, stop in zip(spans, stops, strict=True)}


def _register(name: str, executor: Executor) -> None:
    """Register the executor's functions for as long as it lives."""
    reference = weakref.ref(executor)

    def attend(*args: Any, **keywords: Any) -> tuple[Tensor, None]:
        alive = reference()
        assert alive is not None
        return alive.attend(*args, **keywords)

    def mark_mask(**keywords: Any) -> Tensor | None:
        alive = reference()
        assert alive is not None
        return alive.mark_mask(**keywords)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mark_mask)
    for interface in (AttentionInterface, AttentionMaskInterface):
        # The interface offers no way to unregister a global name.
        weakref.finalize(executor, interface._global_mapping.pop, name, None)
