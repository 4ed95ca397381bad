"""Padded rows of trainers: real tokens, targets, and the way back to the trainer's shape."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backprompt.errors import TokenIdError
from backprompt.training.rows import PaddedRows

IDS = [
    [-100, 999, 17, 5, 8, 9, -1],
    [17, 5, 6, 2, 8, 0, 0],
    [0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 3, 0, 0],
]
MASK = [
    [0, 0, 1, 1, 1, 1, 0],
    [1, 1, 1, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 1, 0, 0],
]


def rows_of(mask_dtype=torch.int64, logits_to_keep=4) -> PaddedRows:
    return PaddedRows.of(torch.tensor(IDS), torch.tensor(MASK).to(mask_dtype), logits_to_keep, 20)


@pytest.mark.parametrize(
    "mask_dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16]
)
def test_real_tokens_lie_flat_row_behind_row(mask_dtype):
    rows = rows_of(mask_dtype)
    assert rows.token_ids.tolist() == [17, 5, 8, 9, 17, 5, 6, 2, 8, 3]
    assert rows.offsets.tolist() == [0, 4, 9, 9, 10]
    assert rows.first_columns.tolist() == [2, 0, 0, 4]
    assert [rows.ids_of(row) for row in range(rows.num_rows)] == [(17, 5, 8, 9), (17, 5, 6, 2, 8), (), (3,)]


def test_targets_are_the_kept_tokens_that_something_predicts():
    rows = rows_of()
    assert rows.starts.tolist() == [1, 3, 0, 1]
    assert rows.targets.tolist() == [1, 2, 3, 7, 8]  # the 3 of the last row is its first token
    assert rows.token_ids[rows.targets].tolist() == [5, 8, 9, 2, 8]
    assert rows.places.tolist() == [0, 1, 2, 4, 5]


def test_results_of_targets_go_where_the_trainer_has_them():
    scattered = rows_of().scattered(torch.tensor([1.0, 2, 3, 4, 5]))
    assert scattered.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    ids = rows_of().scattered(torch.arange(10).reshape(5, 2) + 1)
    assert (ids.shape, ids.dtype) == ((4, 4, 2), torch.int64)
    assert ids[1, 1].tolist() == [9, 10]
    assert ids.count_nonzero() == 10


def test_gradients_flow_to_the_targets():
    values = torch.ones(5, requires_grad=True)
    (rows_of().scattered(values) * torch.arange(16).reshape(4, 4)).sum().backward()
    assert values.grad.tolist() == [0, 1, 2, 4, 5]


def test_values_of_kept_columns_are_read_at_the_targets():
    values = torch.arange(32).reshape(4, 4, 2)
    assert rows_of().of_targets(values, "token_ids").tolist() == [[0, 1], [2, 3], [4, 5], [8, 9], [10, 11]]
    with pytest.raises(ValueError, match=r"token_ids has shape \(4, 3, 2\), but must begin with \(4, 4\)"):
        rows_of().of_targets(values[:, :3], "token_ids")


def test_all_columns_are_kept_unless_a_number_is_given():
    rows = rows_of(logits_to_keep=None)
    assert (rows.num_kept, len(rows.targets)) == (7, 7)
    assert rows.scattered(torch.ones(7)).tolist() == [
        [0, 0, 0, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    assert rows_of(logits_to_keep=0).scattered(torch.zeros(0)).shape == (4, 0)


def test_no_mask_means_no_padding():
    rows = PaddedRows.of(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), None, None, 20)
    assert rows.token_ids.tolist() == [1, 2, 3, 4]
    assert rows.token_ids.dtype == np.int64
    assert rows.offsets.tolist() == [0, 2, 4]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0)])
def test_batches_without_tokens(shape):
    rows = PaddedRows.of(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), None, 20)
    assert (len(rows.token_ids), len(rows.targets)) == (0, 0)
    assert rows.scattered(torch.zeros(0)).shape == shape


def test_ids_out_of_range_are_an_error_where_the_mask_is_1():
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    with pytest.raises(TokenIdError, match=r"input_ids has 17 in row 0, column 2, .* ids 0 to 16"):
        PaddedRows.of(ids, mask, None, 17)
    with pytest.raises(TokenIdError, match="input_ids has -100 in row 0, column 0, where attention_mask is 1"):
        PaddedRows.of(ids, None, None, 1000)


@pytest.mark.parametrize(
    ("ids", "mask", "kept", "error", "message"),
    [
        ([[1, 2]], torch.ones(1, 2), None, TypeError, "input_ids must be a tensor"),
        (torch.ones(1, 2).long(), [[1, 1]], None, TypeError, "attention_mask must be a tensor"),
        (torch.ones(1, 2), torch.ones(1, 2), None, TypeError, "input_ids must be integers"),
        (torch.ones(2).long(), torch.ones(2), None, ValueError, r"\(rows, columns\), not \(2,\)"),
        (torch.ones(2, 3).long(), torch.ones(2, 2), None, ValueError, r"shape \(2, 2\), and input_ids \(2, 3\)"),
        (torch.ones(1, 4).long(), torch.tensor([[1, 0, 1, 0]]), None, ValueError, "a 0 in row 0, column 1, between"),
        (torch.ones(1, 2).long(), torch.tensor([[0.5, 1]]), None, ValueError, "has 0.5 in row 0, column 0"),
        (torch.ones(1, 2).long(), torch.tensor([[-torch.inf, 0]]), None, ValueError, "additive mask"),
        (torch.ones(1, 2).long(), torch.ones(1, 2), 3, ValueError, "logits_to_keep is 3, but input_ids has 2 columns"),
        (torch.ones(1, 2).long(), torch.ones(1, 2), -1, ValueError, "logits_to_keep must be an int of at least 0"),
        (torch.ones(1, 2).long(), torch.ones(1, 2, device="meta"), None, ValueError, "cpu and attention_mask on meta"),
    ],
)
def test_other_input_is_refused_with_the_next_step(ids, mask, kept, error, message):
    with pytest.raises(error, match=message):
        PaddedRows.of(ids, mask, kept, 20)


@st.composite
def batches(draw):
    width = draw(st.integers(0, 6))
    bounds = draw(st.lists(st.tuples(st.integers(0, width), st.integers(0, width)).map(sorted), max_size=5))
    return width, bounds, draw(st.integers(0, width))


@given(batches())
def test_each_target_goes_to_its_own_column(batch):
    """Scattering column numbers finds exactly the kept real columns but for the first of each row."""
    width, bounds, kept = batch
    mask = torch.zeros(len(bounds), width)
    for row, (start, stop) in enumerate(bounds):
        mask[row, start:stop] = 1
    ids = torch.arange(1, width + 1).repeat(len(bounds), 1)
    rows = PaddedRows.of(ids, mask, kept, width + 1)
    expected = [
        [column + 1 if start < column < stop else 0 for column in range(width - kept, width)] for start, stop in bounds
    ]
    assert rows.scattered(torch.from_numpy(rows.token_ids[rows.targets])).tolist() == expected


def test_the_folder_imports_its_names_when_they_are_used():
    code = """
import sys
import backprompt.training as training
assert "torch" not in sys.modules
assert set(training.__all__) <= set(dir(training))
assert training.PaddedRows is sys.modules["backprompt.training.rows"].PaddedRows
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    import backprompt.training

    assert not hasattr(backprompt.training, "nothing_of_this_name")
