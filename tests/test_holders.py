"""Holders are asked each time: pins, live texts whose owner lives, and texts in use."""

from types import SimpleNamespace

import pytest

from backprompt.evaluation.holders import Holders, PinnedText
from backprompt.forest.forest import Forest


class Owner:
    pass


@pytest.fixture
def ends():
    forest = Forest()
    return [forest.insert((token_id,)) for token_id in range(4)]


def test_pins_hold_until_they_are_released(ends):
    holders, pin, empty = Holders(), PinnedText((0,), ends[0]), PinnedText((1,))
    for text in (pin, empty):
        holders.pin(text)
    assert (holders.ends(), holders.pinned_ends(), list(holders.pins)) == ({ends[0]}, [ends[0]], [pin, empty])
    empty.end = ends[1]
    assert holders.ends() == set(ends[:2])
    holders.unpin(pin)
    holders.unpin(pin)
    assert holders.ends() == {ends[1]}
    holders.unpin_all()
    assert not holders.ends()


def test_texts_that_grow_are_held_as_they_are_now_and_while_their_owner_lives(ends):
    holders, owner, text = Holders(), Owner(), SimpleNamespace(ends={"a": ends[0]})
    live = [text]
    holders.let_grow(owner, live)
    text.ends = {"b": ends[1], "c": ends[2]}
    assert holders.ends() == set(ends[1:3])
    live.clear()
    assert not holders.ends()
    live.append(text)
    del owner
    assert not holders.ends()


def test_what_is_in_use_is_held_within_the_context(ends):
    holders = Holders()
    with holders.using(ends[:2]), holders.using(ends[1:3]):
        assert holders.ends() == set(ends[:3])
    assert not holders.ends()
    with holders.using(ends):
        holders.stop_using()
        assert not holders.ends()
    assert not holders.ends()
