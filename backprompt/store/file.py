"""One entry as one safetensors file, in which a flipped byte is noticed.

    8 bytes      length of the header, little endian
    header       JSON: the tensors' dtypes, shapes and offsets, and under "__metadata__", all as strings:
                   "format"     the version of this format
                   "entry"      JSON: the `Header`
                   "checksums"  JSON: for each tensor the CRC-32 of each `CHUNK_BYTES` of its bytes
                   "check"      CRC-32 of all the rest of this header
    data         the tensors' bytes

Any reader of safetensors can read it. Each tensor is read and checked by itself, so reading hidden states does not
read keys and values.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from backprompt.errors import DamagedEntryError, StoreVersionError
from backprompt.store.base import Entry, Header

FORMAT = 1
CHUNK_BYTES = 1 << 20

_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_pieces(entry: Entry) -> list[memoryview]:
    """Return the file's content: its header, then each tensor's bytes, which are not copied where they can be used."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
    # Larger items first, so that each tensor begins at a multiple of its item's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    pieces = [_bytes_of(tensors[name]) for name in names]
    checksums = {name: _checksums(piece) for name, piece in zip(names, pieces, strict=True)}
    table: dict[str, Any] = {
        "__metadata__": {
            "format": str(FORMAT),
            "entry": json.dumps(asdict(entry.header)),
            "checksums": json.dumps(checksums, sort_keys=True),
        }
    }
    offset = 0
    for name, piece in zip(names, pieces, strict=True):
        tensor = tensors[name]
        place = [offset, offset + len(piece)]
        table[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset += len(piece)
    table["__metadata__"]["check"] = str(_check_of(table))
    described = json.dumps(table).encode()
    described += b" " * (-len(described) % 8)  # safetensors aligns the data so
    return [memoryview(len(described).to_bytes(8, "little") + described), *pieces]


def read_header(file: BinaryIO) -> Header:
    """Return what the entry stands for.

    Raises:
        DamagedEntryError: a byte of the file's header is not what was written.
        StoreVersionError: another version of backprompt wrote it.

    """
    return _read_table(file)[1]


def read_entry(path: Path, names: Collection[str] | None = None) -> Entry:
    """Return the entry with these tensors, all by default, after comparing every byte read with its checksum.

    Large tensors are read and checked side by side: most of the time goes into finding memory for them.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedEntryError, StoreVersionError: see `read_header`.

    """
    with open(path, "rb") as file:
        table, header, data_start = _read_table(file)
    checksums = json.loads(table.pop("__metadata__")["checksums"])
    chosen = [name for name in table if names is None or name in names]

    def read(name: str) -> Tensor:
        return _read_tensor(path, name, table[name], data_start, checksums[name])

    if sum(table[name]["data_offsets"][1] - table[name]["data_offsets"][0] for name in chosen) < CHUNK_BYTES:
        return Entry(header, {name: read(name) for name in chosen})
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return Entry(header, dict(zip(chosen, pool.map(read, chosen), strict=True)))


def _read_tensor(path: Path, name: str, place: Mapping[str, Any], data_start: int, checksums: list[int]) -> Tensor:
    first, last = place["data_offsets"]
    tensor = torch.empty(place["shape"], dtype=_DTYPES[place["dtype"]])
    data = _bytes_of(tensor)
    with open(path, "rb", buffering=0) as file:
        file.seek(data_start + first)
        num_read = 0
        while num_read < last - first and (num_more := file.readinto(data[num_read:])):
            num_read += num_more
    if num_read != last - first:
        raise DamagedEntryError(f"tensor {name!r} is cut off")
    if _checksums(data) != checksums:
        raise DamagedEntryError(f"tensor {name!r} has other bytes than were written")
    return tensor


def _read_table(file: BinaryIO) -> tuple[dict[str, Any], Header, int]:
    """Return the checked safetensors header, the entry's header, and where the data begins."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise DamagedEntryError(f"its header cannot be {length} bytes long")
    try:
        table = json.loads(file.read(length))
        described = table["__metadata__"]
        check = int(described.pop("check"))
        is_whole = check == _check_of(table)
        version = described["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedEntryError(f"its header cannot be read: {error}") from error
    if not is_whole:
        raise DamagedEntryError("its header has other bytes than were written")
    if version != str(FORMAT):
        raise StoreVersionError(
            f"it has format {version}, and this version of backprompt reads format {FORMAT}. Use the version that "
            "wrote it, or a new folder."
        )
    fields = json.loads(described["entry"])
    return table, Header(**fields | {name: tuple(fields.get(name, ())) for name in ("token_ids", "behind")}), 8 + length


def _check_of(table: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(table, sort_keys=True).encode())


def _checksums(data: memoryview) -> list[int]:
    return [zlib.crc32(data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor where they lie: writing to them changes it."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers
