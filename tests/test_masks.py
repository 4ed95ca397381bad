"""The meaning of masks, for one position and for many at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backprompt.model.masks import POSITIONS_AHEAD, Mask, Meaning, meanings

CPU = torch.device("cpu")


def window_of(size):
    return lambda batch, head, query, key: (key <= query) & (key > query - size)


def chunk_of(size):
    return lambda batch, head, query, key: (key <= query) & (key // size == query // size)


def causal(batch, head, query, key):
    return key <= query


def alone(mask_function, position):
    """By one query at a time, with the keys that it sees written out."""
    keys = torch.arange(position + 5)
    seen = [keys[mask_function(0, 0, torch.tensor(p), keys)].tolist() for p in (position - 1, position)]
    for window in [None, *range(1, position + 1)]:
        first = [0 if window is None else max(0, p + 1 - window) for p in (position - 1, position)]
        if seen == [list(range(first[0], position)), list(range(first[1], position + 1))]:
            return Meaning(True, window)
    return Meaning(False)


masks = st.sampled_from(
    [causal, *map(window_of, (1, 2, 7, 30)), *map(chunk_of, (1, 2, 7, 30)), lambda b, h, q, k: k <= q + 1]
)


@given(mask_function=masks, first=st.integers(0, 40), num=st.integers(1, 40))
def test_meanings_of_many_positions_are_those_of_each(mask_function, first, num):
    expected = [alone(mask_function, position) for position in range(first, first + num)]
    assert meanings(mask_function, first, first + num, CPU) == expected


@pytest.mark.parametrize("size", [30, 100, 300])
def test_a_window_means_the_same_until_it_hides_a_key(size):
    mask = Mask(window_of(size), 5, CPU)
    assert mask.meaning == Meaning(True)
    for position in (*range(6, 400, 3), 5, 399, 7):
        assert mask.means_the_same_at(position) == (position < size)
    mask = Mask(window_of(size), size, CPU)
    assert mask.meaning == Meaning(True, size)
    assert mask.means_the_same_at(size + 500)
    assert not mask.means_the_same_at(size - 1)


def test_a_mask_is_asked_once_for_many_steps():
    asked = []

    def counted(*args):
        asked.append(args)
        return causal(*args)

    mask = Mask(counted, 10, CPU)
    asked.clear()
    assert all(mask.means_the_same_at(position) for position in range(11, 11 + POSITIONS_AHEAD))
    assert len(asked) == 1
