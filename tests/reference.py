"""The slow reference that is here to stay: the plain call, one text at a time.

No cache, no batch, no packing: transformers' results of `model(tokenizer(string))`, which the library promises.
Nothing here may use the library.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How far logits and log-probabilities may lie from the plain call's, by the dtype the model computes in. The same
# products are summed in another order, which moves the last bits in every layer. A dtype that is not here has not been
# measured.
ATOL: dict[torch.dtype, float] = {
    # The largest gap measured over all families: 1.0e-5, logits up to 10.
    torch.float32: 5e-5,
    # Measured: 5e-15, log-probabilities included.
    torch.float64: 1e-12,
    # Eight bits: logits of 4 to 8 are 2 ** -5 apart, and each layer rounds a residual that differs already. Measured
    # over the models of test_models.py: 0.16; the float32 model is as far from the plain call as from the library,
    # which is tested too.
    torch.bfloat16: 0.3,
    # Eleven bits, an eighth of the above. Measured: 0.018.
    torch.float16: 0.04,
}


def plain_ids(tokenizer: PreTrainedTokenizerBase, string: str) -> list[int]:
    """The token ids of the whole string, with the special tokens that the tokenizer adds."""
    return tokenizer(string)["input_ids"]


def ids_for(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The ids of one text as the model takes them, `(1, tokens)`, on its device."""
    return torch.tensor([list(ids)], device=model.device)


def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The logits after each of the ids, (tokens, vocab), in the model's dtype, on the CPU."""
    with _evaluating(model), torch.no_grad():
        return model(input_ids=ids_for(model, ids)).logits[0].cpu()


def plain_token_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The log-probability of each id after those before it, (tokens,), nats, float32 at least; nan for the first."""
    return token_logprobs_of(plain_logits(model, ids), ids)


def token_logprobs_of(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """The same, from the logits after each of the ids, (tokens, vocab)."""
    logprobs = _log_softmax(logits[:-1])  # (tokens - 1, vocab)
    next_ids = torch.tensor(list(ids)[1:], dtype=torch.long, device=logprobs.device)
    following = logprobs.gather(1, next_ids[:, None])[:, 0]  # (tokens - 1,)
    return torch.cat([following.new_full((1,), float("nan")), following])


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def plain_is_argmax(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Whether each id is the most probable after those before it, (tokens,); False for the first."""
    most_probable = plain_logits(model, ids)[:-1].argmax(dim=-1)
    return torch.tensor([False, *(most_probable.cpu() == torch.tensor(list(ids)[1:])).tolist()])


def plain_greedy(model: PreTrainedModel, ids: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """The ids that greedy decoding appends to `ids`."""
    found = list(ids)
    for _ in range(num_tokens):
        found.append(int(plain_logits(model, found)[-1].argmax()))
    return tuple(found[len(ids) :])


def generated_by_transformers(model: PreTrainedModel, ids: Sequence[int], **options: Any) -> tuple[int, ...]:
    """The ids that transformers' `generate` appends to one prompt; greedily, unless options say otherwise."""
    prompt = ids_for(model, ids)
    options = {"do_sample": False, "pad_token_id": 0, **options}
    found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return tuple(found[0, len(ids) :].tolist())


# Texts with groups: a row of all tokens in written order, repeated branches repeated, with explicit positions and mask.
# Parts are runs of ids (tuples) and groups: `is_sequential`, and `branches`, each with `parts` and `is_frozen`.


@dataclass
class Written:
    """Each token of a text in written order.

    `predictors` has the row that predicts it, or None; `seen` which rows it sees, its own included.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    predictors: list[int | None] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)


def written(parts: Sequence[Any]) -> Written:
    """Lay the parts out one branch after the other."""
    text = Written()
    _write(text, parts, [], 0, None)
    return text


def _write(
    text: Written, parts: Sequence[Any], before: list[int], position: int, predictor: int | None
) -> tuple[list[int], int, int | None]:
    """Write parts behind the rows `before`; return what follows sees, its position, and the row that predicts it."""
    for part in parts:
        if isinstance(part, tuple):
            for token_id in part:
                row = len(text.ids)
                before = [*before, row]
                text.ids.append(token_id)
                text.positions.append(position)
                text.predictors.append(predictor)
                text.seen.append(before)
                position, predictor = position + 1, row
            continue
        start, last, after = position, position, list(before)
        for branch in part.branches:
            if branch.is_frozen:
                seen, stop, _ = _write(text, branch.parts, [], 0, None)
                after += seen
            else:
                seen, stop, _ = _write(text, branch.parts, before, start, predictor)
                after += seen[len(before) :]
                start = stop if part.is_sequential else start
            last = max(last, stop)
        before, position, predictor = after, last, None
    return before, position, predictor


def masked_logits(model: PreTrainedModel, parts: Sequence[Any]) -> torch.Tensor:
    """The logits after each token in written order, (tokens, vocab), under the declared mask, on the CPU."""
    return _masked_call(model, parts).logits[0].cpu()


def _masked_call(model: PreTrainedModel, parts: Sequence[Any]) -> Any:
    text = written(parts)
    visible = torch.zeros((len(text.ids), len(text.ids)), dtype=torch.bool)
    for row, seen in enumerate(text.seen):
        visible[row, seen] = True
    window = getattr(model.config, "sliding_window", None)  # of all layers, in the families that this is used with
    if window is not None:
        positions = torch.tensor(text.positions)
        visible &= positions[:, None] - positions < window
    mask = torch.zeros(visible.shape, dtype=model.dtype).masked_fill_(~visible, torch.finfo(model.dtype).min)
    with _evaluating(model), torch.no_grad():
        return model(
            input_ids=ids_for(model, text.ids),
            position_ids=ids_for(model, text.positions),
            attention_mask=mask[None, None].to(model.device),
        )


def masked_token_logprobs(model: PreTrainedModel, parts: Sequence[Any]) -> torch.Tensor:
    """The log-probability of each token in written order, nats, float32 at least; nan where no one row predicts it."""
    text, logprobs = written(parts), _log_softmax(masked_logits(model, parts))
    values = [
        float("nan") if row is None else float(logprobs[row, token_id])
        for token_id, row in zip(text.ids, text.predictors, strict=True)
    ]
    return torch.tensor(values, dtype=logprobs.dtype, device=logprobs.device)


# Attention: the weights that transformers' eager attention returns.


def plain_attention(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The weights of the plain call, (layers, heads, tokens, tokens), in the model's dtype, on the CPU."""
    with _eager(model), _evaluating(model), torch.no_grad():
        return torch.cat(model(input_ids=ids_for(model, ids), output_attentions=True).attentions).cpu()


def masked_attention(model: PreTrainedModel, parts: Sequence[Any]) -> torch.Tensor:
    """The same for tokens in written order, under the declared mask."""
    with _eager(model):
        return torch.cat(_masked_call(model, parts).attentions).cpu()


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    try:
        yield
    finally:
        model.config.output_attentions = False
        model.set_attn_implementation(before)


# Adapters by segment: each row of a call under adapters of its own.


@contextmanager
def adapters_by_row(model: torch.nn.Module, names_of_rows: Sequence[tuple[str, ...] | None]) -> Iterator[None]:
    """Let each row of a call of one text be under the LoRAs with these names; None: as the model is set.

    Each LoRA layer computes all rows once as the model is set, and once under each of the names, with peft's own code,
    and takes each row from the computation that the row belongs to.
    """
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.forward = partial(_by_row, layer, names_of_rows)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _by_row(layer: Any, names_of_rows: Sequence[tuple[str, ...] | None], rows: torch.Tensor) -> torch.Tensor:
    """The layer's output for `rows`, (1, tokens, inputs)."""
    forward = type(layer).forward
    found = forward(layer, rows)
    before = layer._active_adapter, layer._disable_adapters
    for names in set(names_of_rows) - {None}:
        layer._active_adapter, layer._disable_adapters = list(names), False
        belongs = torch.tensor([own == names for own in names_of_rows], device=rows.device)
        found = torch.where(belongs[None, :, None], forward(layer, rows), found)
        layer._active_adapter, layer._disable_adapters = before
    return found


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
