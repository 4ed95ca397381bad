"""The way by levels for a model that cannot be packed: the form of its cache, and the calls that may continue it.

The probe (probe.py) compares the results with plain calls afterwards. In low precision this comparison is too coarse to
tell whether a call with several tokens sees all of a cache. (Some models use their states for single tokens only.) So
keys and values, and each kind of states, are made larger here in turn. If a call with several tokens sees the larger
numbers, its hidden states change as they do when the same tokens are forwarded one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from backprompt.errors import UnsupportedModelError
from backprompt.model import spread
from backprompt.model.cache_form import Body, CacheError, CacheForm
from backprompt.model.executor import Executor
from backprompt.model.levels import Levels, Way

_TIMES_LARGER = 32
_ALLOWED = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Largest difference of hidden states, as a share of the change from larger numbers in a cache."""

_SAME = 1e-3
"""Largest difference of hidden states that should be the same, as a share of the largest hidden state."""

_NUM_BEFORE = 4


def ways_by_levels(
    model: nn.Module, executor: Executor, token_ids: Sequence[int], why_not_packed: str
) -> Iterator[Levels]:
    """Yield the ways by levels that may give the numbers of the plain call, the better first.

    Args:
        model: the model.
        executor: its executor, which gets another body.
        token_ids: seven tokens to try.
        why_not_packed: the reason why the model cannot be packed, for messages.

    Raises:
        UnsupportedModelError: the model has no cache that can be taken apart.

    """
    if spread.is_spread(model):
        raise UnsupportedModelError(
            "Evaluation by levels, the other way, needs the whole model on one device: load it without offloading."
        )
    body = executor.own_body()
    for takes_positions in dict.fromkeys((body.takes_positions, False)):
        body.takes_positions = takes_positions
        try:
            form = body.form(token_ids[0])
            found = Way(
                takes_several=_takes_several(body, form, token_ids),
                takes_batches=_takes_batches(body, form, token_ids),
                takes_positions=takes_positions,
                counts_positions=_counts_positions(body, form, token_ids),
                why_not_packed=why_not_packed,
            )
        except torch.OutOfMemoryError:
            raise
        except CacheError as error:
            raise UnsupportedModelError(f"Spans cannot continue its cache either: {error}.") from error
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, ArithmeticError) as error:
            raise UnsupportedModelError(
                f"Spans cannot continue its cache either: {type(error).__name__}: {error}"
            ) from error
        yield Levels(body, form, found)
        if found.takes_several:
            yield Levels(body, form, replace(found, takes_several=False))


def _takes_several(body: Body, form: CacheForm, token_ids: Sequence[int]) -> bool:
    """Return whether several tokens behind a cache give the same as one at a time, with larger numbers in the cache."""
    before, after = list(token_ids[:_NUM_BEFORE]), list(token_ids[_NUM_BEFORE:])
    _, cache = body.call([before], form.begun())
    rows = [tensor.clone() for tensor in form.rows_of(cache, _NUM_BEFORE)]
    snapshots = form.snapshots_of(cache) if form.states else None
    usual = _one_at_a_time(body, form.built(rows, snapshots, _NUM_BEFORE), after)
    changed = [([tensor * _TIMES_LARGER for tensor in rows], snapshots)] if rows else []
    changed += [(rows, larger) for larger in _larger_states(form, snapshots)]
    for own_rows, own_snapshots in changed:
        apart = _one_at_a_time(body, form.built(own_rows, own_snapshots, _NUM_BEFORE), after)
        together, _ = body.call([after], form.built(own_rows, own_snapshots, _NUM_BEFORE), _NUM_BEFORE)
        gap, change = (float((hidden - apart).float().abs().max()) for hidden in (together, usual))
        if not (
            change > 0 and gap <= _ALLOWED[usual.dtype] * change
        ):  # weights of 0 show nothing, and may change later
            return False
    return True


def _takes_batches(body: Body, form: CacheForm, token_ids: Sequence[int]) -> bool:
    """Return whether two texts with a token each give the same in one call as in two."""
    texts = [list(token_ids[:_NUM_BEFORE]), list(token_ids[-_NUM_BEFORE:])]
    _, cache = body.call(texts, form.begun())
    rows = [tensor.clone() for tensor in form.rows_of(cache, _NUM_BEFORE)]
    snapshots = form.snapshots_of(cache) if form.states else None
    following = [[text[-1]] for text in texts]
    together, _ = body.call(following, form.built(rows, snapshots, _NUM_BEFORE), _NUM_BEFORE)
    apart = []
    for idx, ids in enumerate(following):
        own = [tensor[idx : idx + 1] for tensor in rows]
        own_snapshots = None if snapshots is None else snapshots[idx : idx + 1]
        apart.append(body.call([ids], form.built(own, own_snapshots, _NUM_BEFORE), _NUM_BEFORE)[0])
    if together.shape != (2, 1, apart[0].shape[-1]):
        return False
    gap = float((together - torch.cat(apart)).float().abs().max())
    change = float((apart[0] - apart[1]).float().abs().max())
    return change > 0 and gap <= _ALLOWED[together.dtype] * change


def _counts_positions(body: Body, form: CacheForm, token_ids: Sequence[int]) -> bool:
    """Return whether a call behind a cache gives the same without positions as with them."""
    before, after = list(token_ids[:_NUM_BEFORE]), list(token_ids[_NUM_BEFORE:])
    takes_positions = body.takes_positions
    try:
        found = []
        for body.takes_positions in (takes_positions, False):
            _, cache = body.call([before], form.begun())
            hidden, _ = body.call([after], cache, _NUM_BEFORE)
            found.append(hidden.float())
    finally:
        body.takes_positions = takes_positions
    told, counted = found
    size = float(told.abs().max())
    return size > 0 and float((told - counted).abs().max()) <= _SAME * size


def _one_at_a_time(body: Body, cache: object, token_ids: Sequence[int]) -> Tensor:
    """Return the final hidden states of tokens that go behind a cache one at a time."""
    found = []
    for num_before, token_id in enumerate(token_ids, _NUM_BEFORE):
        hidden, cache = body.call([[token_id]], cache, num_before)
        found.append(hidden)
    return torch.cat(found, dim=1)


def _larger_states(form: CacheForm, snapshots: Tensor | None) -> list[Tensor]:
    """Return snapshots with larger states, one for each kind of states."""
    found = []
    for kind in form.kinds_of_states():
        assert snapshots is not None
        larger = snapshots.clone()
        for state in kind:
            numbers = state.from_bytes(snapshots)
            if numbers.is_floating_point():
                larger[:, state.start : state.stop] = state.as_bytes(numbers * _TIMES_LARGER)
        found.append(larger)
    return found
