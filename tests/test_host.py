"""The second pool by itself: the spans that it takes, refuses and gives back, and its limit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backprompt.forest.span import KINDS
from backprompt.memory.host import HostMemory
from backprompt.memory.leaves import NOTHING_SPARED
from backprompt.memory.location import Location
from backprompt.memory.tier import Tier
from tiny_blocks import (
    KEYS_VALUES_BYTES,
    STATES_BYTES,
    TOKEN_BYTES,
    assert_right,
    assert_right_in_host,
    compute,
    inserted,
)

STEM, LEFT, RIGHT = (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 7, 8, 9)
CPU = Location(torch.device("cpu"))


def any_order(kind, span):
    return (0.0, 0)


def shortest_first(kind, span):
    return (float(len(span.token_ids)), 0)


def pools(num_host_bytes, *texts, order=any_order):
    """A device that holds texts, each computed alone, an empty second pool, and the texts' spans."""
    forest, _ = inserted(*texts)
    spans = list(forest.spans())
    device, host = Tier(10_000, "device", order), HostMemory(num_host_bytes, order, CPU, CPU)
    device.add(block for span in spans for block in compute([span]))
    return device, host, forest, spans


def moved_out(num_host_bytes, *texts, order=any_order):
    """The same, with all of them gone to the second pool as far as that takes them."""
    device, host, forest, spans = pools(num_host_bytes, *texts, order=order)
    host.take(forest, device.shrink(forest, 10**9, NOTHING_SPARED), NOTHING_SPARED)
    return device, host, forest, spans


def test_what_goes_lies_in_the_second_pool_alone():
    device, host, _, spans = moved_out(10_000, STEM, LEFT, RIGHT)
    assert (device.num_bytes, host.num_bytes) == (0, 9 * TOKEN_BYTES)
    assert_right_in_host(spans)


def test_rows_of_one_block_that_go_together_stay_together():
    forest, _ = inserted(STEM, LEFT, RIGHT)
    spans = list(forest.spans())
    device, host = Tier(10_000, "device", any_order), HostMemory(10_000, any_order, CPU, CPU)
    device.add(compute(spans))
    host.take(forest, device.shrink(forest, 10**9, NOTHING_SPARED), NOTHING_SPARED)
    assert len({id(span.host_states.block) for span in spans}) == 1
    assert len({id(span.host_keys_values.block) for span in spans}) == 1
    assert_right_in_host(spans)


def test_a_pool_of_no_bytes_takes_nothing():
    _, host, _, spans = moved_out(0, STEM, LEFT)
    assert host.num_bytes == 0
    assert all(span.is_empty for span in spans)


def test_leaves_go_where_not_all_fits():
    """Of the two leaves the one that ranks lower; of the other its keys and values only."""
    _, host, _, (stem, left, right) = moved_out(
        6 * TOKEN_BYTES + 2 * STATES_BYTES, STEM, LEFT, RIGHT, order=shortest_first
    )
    assert host.num_bytes <= host.max_bytes
    assert left.is_empty
    assert right.is_held(in_host=True)
    assert not right.is_held(in_host=True, with_keys_values=True)
    assert_right_in_host([stem])


def test_what_cannot_fit_with_what_it_continues_pushes_nothing_out():
    device, host, forest, spans = moved_out(6 * TOKEN_BYTES, STEM, (9, 8), order=shortest_first)
    end = forest.insert((*STEM, *range(50, 70)))
    device.add(compute([end]))
    host.take(forest, device.shrink(forest, 10**9, NOTHING_SPARED), NOTHING_SPARED)  # these would be dropped last
    assert end.is_empty
    assert_right_in_host(spans)


def test_choosing_what_comes_back_changes_nothing():
    _, host, _, (stem, left, right) = moved_out(10_000, STEM, LEFT, RIGHT)
    planned = host.plan_fetch([left], 10_000, frozenset(), with_keys_values=True)
    assert planned.served == [left]
    assert {kind: list(planned.spans[kind]) for kind in KINDS} == {kind: [stem, left] for kind in KINDS}
    assert (planned.num_bytes, planned.num_tokens) == (6 * TOKEN_BYTES, 6)
    assert host.num_bytes == 9 * TOKEN_BYTES
    assert_right_in_host([stem, left, right])


def test_states_come_alone_where_they_are_enough():
    _, host, _, (stem, left, _) = moved_out(10_000, STEM, LEFT, RIGHT)
    planned = host.plan_fetch([left], 10_000, frozenset(), with_keys_values=False)
    assert {kind: list(spans) for kind, spans in planned.spans.items()} == {"states": [stem, left], "keys_values": []}
    assert planned.num_bytes == 6 * STATES_BYTES


def test_what_comes_back_lies_on_the_device_alone():
    device, host, forest, (stem, left, right) = moved_out(10_000, STEM, LEFT, RIGHT)
    device.add(host.fetch(forest, host.plan_fetch([left], 10_000, frozenset(), with_keys_values=True)))
    assert (device.num_bytes, host.num_bytes) == (6 * TOKEN_BYTES, 3 * TOKEN_BYTES)
    assert_right([stem, left])
    assert stem.is_held(with_keys_values=True)
    assert left.is_held(with_keys_values=True)
    assert all(span.rows_in(kind, "host") is None for span in (stem, left) for kind in KINDS)
    assert_right_in_host([right])


@pytest.mark.parametrize(("room", "num_served"), [(0, 1), (6 * TOKEN_BYTES - 1, 1), (6 * TOKEN_BYTES, 2)])
def test_texts_that_there_is_no_room_for_wait(room, num_served):
    """The first comes in any case; the room may be overdrawn by a span once."""
    _, host, _, (_, left, right) = moved_out(10_000, STEM, LEFT, RIGHT)
    planned = host.plan_fetch([left, right], room, frozenset(), with_keys_values=True)
    assert planned.served[0] is left
    assert len(planned.served) <= num_served
    assert planned.num_bytes <= max(6 * TOKEN_BYTES, room + 3 * KEYS_VALUES_BYTES)


def test_what_is_on_the_device_takes_room_unless_it_is_pinned():
    device, host, forest, (stem, left, right) = moved_out(10_000, STEM, LEFT, RIGHT)
    device.add(host.fetch(forest, host.plan_fetch([left], 10_000, frozenset(), with_keys_values=True)))
    room = 3 * TOKEN_BYTES
    served = {
        len(pinned): host.plan_fetch([left, right], room, pinned, with_keys_values=True).served
        for pinned in (frozenset(), frozenset([stem, left]))
    }
    assert served == {0: [left], 2: [left, right]}


def test_all_is_still_here_if_a_copy_fails(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    _, host, forest, (stem, left, right) = moved_out(10_000, STEM, LEFT, RIGHT)
    planned = host.plan_fetch([left], 10_000, frozenset(), with_keys_values=True)
    with monkeypatch.context() as patch:
        patch.setattr(Location, "copy", fail)
        with pytest.raises(torch.OutOfMemoryError):
            host.fetch(forest, planned)
    assert forest.is_whole
    assert_right_in_host([stem, left, right])


@given(data=st.data())
def test_the_budget_holds_and_what_is_held_has_what_it_continues(data):
    """Texts come and go at random: in both pools together a span has its ancestors, and every number is right."""
    texts = data.draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), min_size=1, max_size=5))
    device, host, forest, spans = pools(data.draw(st.integers(0, 15)) * TOKEN_BYTES, *texts)
    ends = [span for span in spans if span.is_end]
    for _ in range(3):
        excess = data.draw(st.integers(0, 12)) * TOKEN_BYTES
        host.take(forest, device.shrink(forest, excess, NOTHING_SPARED), NOTHING_SPARED)
        assert host.num_bytes <= host.max_bytes
        planned = host.plan_fetch(
            data.draw(st.permutations(ends)), data.draw(st.integers(0, 2000)), frozenset(), with_keys_values=True
        )
        device.add(host.fetch(forest, planned))
        for span in spans:
            for kind in KINDS:
                lies = [span.rows_in(kind, pool) is not None for pool in ("device", "host")]
                assert sum(lies) <= 1
                above = [parent for parent in span.parents if parent.parent is not None]
                for parent in above if any(lies) else ():
                    assert any(parent.rows_in(kind, pool) is not None for pool in ("device", "host"))
        assert_right(span for span in spans if span.is_held())
        assert_right_in_host(span for span in spans if span.host_states and span.host_keys_values)
