"""New keys, values and hidden states go to their places in one launch, with a kernel in Triton.

The kernel reads the addresses of tensors from tables, so a captured graph can replay the launch after a buffer has
moved.
"""

# The language of kernels has no types for Python's checkers: see attention/triton_kernels.py.

from typing import Any

import torch
import triton
import triton.language as tl

SOURCE_COLUMNS = 4
"""Columns of a source: the address of the first element, the stride between heads in elements, the number of heads, the
number of elements in a row of a head. The rows of a head are contiguous in all tensors."""

NUMBERS = 1024
"""The number of elements that a program copies at once."""


@triton.jit
def place_kernel(
    like,
    is_finite,
    sources,
    targets,
    block_idx,
    target_rows,
    num_tensors,
    SOURCE_COLUMNS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Copy a row of a tensor to its place. NaN and infinity become zeros there, and `is_finite` becomes 0.

    In a key or value, such numbers could spoil even the rows that do not attend to it.
    """
    tensor = tl.program_id(0) % num_tensors
    row = tl.program_id(0) // num_tensors
    block = tl.load(block_idx + row)
    if block >= 0:
        element: tl.constexpr = like.dtype.element_ty
        source = sources + tensor * SOURCE_COLUMNS
        target = targets + (block * num_tensors + tensor) * 2
        read = tl.load(source).to(tl.pointer_type(element))
        write = tl.load(target).to(tl.pointer_type(element))
        read_stride, write_stride = tl.load(source + 1), tl.load(target + 1)
        num_heads, head_numbers = tl.load(source + 2), tl.load(source + 3)
        target_row = tl.load(target_rows + row)
        for first in range(0, num_heads * head_numbers, NUMBERS):
            idx = first + tl.arange(0, NUMBERS)
            is_number = idx < num_heads * head_numbers
            head, number = idx // head_numbers, idx % head_numbers
            values = tl.load(read + head * read_stride + row * head_numbers + number, mask=is_number, other=0.0)
            is_right = tl.abs(values.to(tl.float32)) < float("inf")
            if tl.sum((is_number & (is_right == 0)).to(tl.int32), 0) > 0:
                tl.store(is_finite, 0)
            values = tl.where(is_right, values, 0.0)
            tl.store(write + head * write_stride + target_row * head_numbers + number, values, mask=is_number)


def place(like: Any, is_finite: Any, sources: Any, targets: Any, rows: Any) -> None:
    """Copy rows of tensors to their places; see `place_kernel`. All arguments are tensors.

    Args:
        like: any tensor with the dtype of all others.
        is_finite: `()`, int32; set to 0 if a row is not finite, else unchanged.
        sources: `(tensors, SOURCE_COLUMNS)`.
        targets: `(blocks, tensors, 2)`, flat: the address and the stride between heads.
        rows: the block and the row there of each row, `(2, rows)`; block -1 for a row that is not copied.

    """
    num_tensors = sources.shape[0]
    with torch.cuda.device(like.device if like.device.type == "cuda" else -1):
        place_kernel[(num_tensors * rows.shape[1],)](
            like,
            is_finite,
            sources,
            targets,
            rows[0],
            rows[1],
            num_tensors,
            SOURCE_COLUMNS=SOURCE_COLUMNS,
            NUMBERS=NUMBERS,
        )
