"""The helpers that most tests rely on can fail."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comparing import assert_close, assert_equals_plain, beginnings, num_distinct, num_distinct_ids
from reference import ATOL, plain_logits, plain_token_logprobs

IDS = (5, 6, 7, 8)


@pytest.mark.parametrize("wrong", [None, "logits", "token_logprobs", "all_logits"])
def test_a_text_is_as_the_plain_call_only_where_all_of_it_is(wrong, model):
    logits = plain_logits(model, IDS)
    said = {"logits": logits[-1], "token_logprobs": plain_token_logprobs(model, IDS), "all_logits": logits}
    said = {name: tensor + (2 * ATOL[torch.float32] if name == wrong else 0) for name, tensor in said.items()}
    representation = SimpleNamespace(all_logits=lambda: said["all_logits"])
    text = SimpleNamespace(tokens=IDS, model_repr=representation, **said)
    if wrong is None:
        assert_equals_plain(model, [text])
    else:
        with pytest.raises(AssertionError, match="namespace"):
            assert_equals_plain(model, [text])


@pytest.mark.parametrize("dtype", ATOL)
def test_what_is_close_depends_on_the_dtype(dtype):
    expected = torch.tensor([0.0, float("nan")], dtype=dtype)
    assert_close(expected + ATOL[dtype] / 2, expected)
    for far in (expected + 2 * ATOL[dtype], expected.nan_to_num(), expected[:1], expected.to(torch.complex64)):
        with pytest.raises(AssertionError):
            assert_close(far, expected, ATOL[dtype])


@given(st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), max_size=6))
def test_distinct_tokens_are_distinct_beginnings(rows):
    expected = {ids[:stop] for ids in rows for stop in range(1, 6) if stop <= len(ids)}
    assert beginnings(rows) == expected
    assert num_distinct_ids(rows) == num_distinct(SimpleNamespace(tokens=ids) for ids in rows) == len(expected)
