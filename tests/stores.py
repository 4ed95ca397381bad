"""Entries of a store, where the folder of a store has them, and changes to its index by somebody else."""

import sqlite3
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from backprompt.store import DiskStore, Entry, Header


def make_entry(
    number: int,
    num_tokens: int = 3,
    start: str = "root",
    dtype: torch.dtype = torch.float32,
    text: str | None = None,
) -> Entry:
    """An entry of a model of one layer; its content follows from the arguments."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.rand((2, num_tokens, 4), generator=generator)
    computed = torch.float32 if dtype == torch.int8 else dtype
    tensors = {
        "keys.0": (drawn * 100).to(dtype),
        "values.0": drawn.transpose(0, 2)[..., :1].to(computed),  # not contiguous
        "hidden": drawn[0].to(computed),
        "logprobs": torch.tensor([float("nan"), *(-1.5,) * (num_tokens - 1)]),
        "is_argmax": drawn[0, :, 0] > 0.5,
        "has_logprobs": drawn[0, :, 1] > 0.5,
    }
    dtypes = {}
    if dtype == torch.int8:
        tensors["keys.0.scale"] = drawn[..., :1].clone()
        dtypes = dict.fromkeys(("keys", "values", "hidden"), "float32")
    ids = tuple((number * 31 + idx) % 1000 for idx in range(num_tokens))
    header = Header(
        start=start,
        end=f"end{number}x{num_tokens}",
        position=7,
        token_ids=ids,
        text=f"text {number}" if text is None else text,
        model="m",
        tokenizer="t",
        dtype=str(computed),
        exactness="int8" if dtypes else "exact",
        dtypes=dtypes,
    )
    return Entry(header, tensors)


def assert_same(found: Entry | None, put: Entry, names: Collection[str] | None = None) -> None:
    """The same header, and of the tensors (of those with these names) the same dtypes and numbers, bit by bit."""
    assert found is not None
    assert found.header == put.header
    expected = put.tensors if names is None else {name: put.tensors[name] for name in names if name in put.tensors}
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].nan_to_num(9), tensor.nan_to_num(9)), name


def file_of(store: DiskStore, name: str) -> Path:
    """Where an entry of this name lies, whether it is there or not."""
    return store.path / "entries" / name[:2] / f"{name}.safetensors"


def change_index(store: DiskStore, statement: str, *values: Any) -> None:
    """Run a statement of SQL on the index, as another process may at any time."""
    connection = sqlite3.connect(store.path / "index.sqlite")
    try:
        with connection:
            connection.execute(statement, values)
    finally:
        connection.close()
