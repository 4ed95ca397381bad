"""Forests whose spans hold tiny blocks that are made by hand, without a model.

Every number of a token is told by its id and its position, so that a test can say what lies where.
"""

from collections.abc import Iterable, Sequence

import torch

from backprompt.forest.forest import Forest
from backprompt.forest.span import NOTHING, Junction, Span
from backprompt.memory.blocks import Block, BlockRows, KeysValues, States, gather_each, keys_values_of, states_of

KEYS_VALUES_BYTES = 2 * (2 * 3 + 2 * 1) * 4
"""Of a token: two layers of two heads, three numbers a key and one a value."""

STATES_BYTES = 4 * 4 + 4 + 1 + 1
"""Of a token: four hidden numbers, a log-probability, two flags."""

TOKEN_BYTES = KEYS_VALUES_BYTES + STATES_BYTES


def numbers_of(spans: Iterable[Span]) -> torch.Tensor:
    """One number a token, `(tokens,)`."""
    tokens = [(idx, token_id) for span in spans for idx, token_id in enumerate(span.token_ids, span.position)]
    return torch.tensor([1000.0 * position + token_id for position, token_id in tokens])


def keys_values_for(spans: Iterable[Span]) -> KeysValues:
    numbers = numbers_of(spans)[None, :, None] + torch.tensor([0.0, 0.25])[:, None, None]  # (heads, tokens, 1)
    keys = [numbers.repeat(1, 1, 3) + layer_idx / 2 for layer_idx in range(2)]
    return KeysValues.of(keys, [-numbers - layer_idx / 2 for layer_idx in range(2)])


def states_for(spans: Iterable[Span]) -> States:
    numbers = numbers_of(spans)
    states = States.of(numbers[:, None].repeat(1, 4))
    states.write_scores(torch.arange(len(numbers)), -numbers, numbers % 2 == 0)
    return states


def compute(spans: Sequence[Span], *, with_keys_values: bool = True) -> list[Block]:
    """Let spans hold what a pass over them would leave; return its blocks, the states first."""
    with_tokens = [span for span in spans if span.token_ids]
    keys_values, states, start = keys_values_for(with_tokens), states_for(with_tokens), 0
    for span in spans:
        stop = start + len(span.token_ids)
        if isinstance(span, Junction):
            span.place(keys_values=NOTHING, states=NOTHING)
        else:
            span.place(states=BlockRows(states, start, stop))
            if with_keys_values:
                span.place(keys_values=BlockRows(keys_values, start, stop))
        start = stop
    return [states, keys_values] if with_keys_values else [states]


def inserted(*texts: Sequence[int]) -> tuple[Forest, list[Span]]:
    """A forest of texts, and their ends."""
    forest = Forest()
    return forest, [forest.insert(text) for text in texts]


def assert_right(spans: Iterable[Span]) -> None:
    """Spans of tokens hold on the device the numbers of their tokens, keys and values where they hold any."""
    for span in spans:
        assert span.is_held()
        assert_equal([states_of(span)], states_for([span]))
        if span.is_held(with_keys_values=True):
            assert_equal([keys_values_of(span)], keys_values_for([span]))


def assert_right_in_host(spans: Iterable[Span]) -> None:
    """Spans of tokens hold these numbers in the second pool, and nothing on the device."""
    for span in spans:
        assert not span.is_held()
        assert span.is_held(with_keys_values=True, in_host=True)
        assert_equal([span.host_states], states_for([span]))
        assert_equal([span.host_keys_values], keys_values_for([span]))


def assert_equal(rows: Sequence[BlockRows], expected: Block) -> None:
    found = dict(gather_each(rows))
    assert found.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found[name], tensor), name
