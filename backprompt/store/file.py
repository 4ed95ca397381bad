"""One entry as one safetensors file, with checksums that detect a flipped byte.

    8 bytes      length of the header, little endian
    header       JSON: the tensors' dtypes, shapes and offsets, and under "__metadata__", all as strings:
                   "format"     the version of this format
                   "entry"      JSON: the `Header`
                   "checksums"  JSON: for each tensor the CRC-32 of each `CHUNK_BYTES` of its bytes
                   "check"      CRC-32 of the rest of this header
    data         the tensors' bytes

Any reader of safetensors can read the file. Each tensor is read and checked by itself, so reading hidden states does
not read keys and values.

A file is checked before memory is allocated for it: the header is compared with the schema (schema.py), and the size of
the data in the header with the size of the file. Checksums detect accidents only: a person who can write to the folder
can also write matching checksums.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from backprompt.errors import DamagedEntryError, EntryTooLargeError, StoreVersionError
from backprompt.memory.blocks import AXES, kind_of, token_axis
from backprompt.store.base import Entry, Header
from backprompt.store.schema import TensorSpec, check_header, check_tensors

FORMAT = 1
CHUNK_BYTES = 1 << 20

MAX_HEADER_BYTES = 32 << 20
"""The limit for a header, which is read and parsed as a whole: enough for millions of tokens."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_MAX_LENGTH = 1 << 48
"""The limit for the length of an axis and of a file, so that products of lengths stay small numbers."""

_FIELDS = {field.name for field in fields(Header)}
_NEEDED_FIELDS = {
    field.name for field in fields(Header) if field.default is MISSING and field.default_factory is MISSING
}


@dataclass(frozen=True)
class Place:
    """The place of a tensor's bytes in a file, and their dtype, shape and checksums."""

    spec: TensorSpec
    start: int
    checksums: list[int]

    @property
    def stop(self) -> int:
        """The offset behind the tensor's bytes."""
        return self.start + self.spec.num_bytes


@dataclass(frozen=True)
class Contents:
    """The checked contents of a file's header."""

    header: Header
    places: Mapping[str, Place]


def to_pieces(entry: Entry) -> list[memoryview]:
    """Return the file's content: its header, then each tensor's bytes, without a copy where possible.

    Raises:
        DamagedEntryError: the entry could not be read again.
        EntryTooLargeError: the header does not fit a file.

    """
    check_header(entry.header)
    check_tensors(entry.header, {name: TensorSpec.of(tensor) for name, tensor in entry.tensors.items()})
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
    described += b" " * (-len(described) % 8)  # safetensors aligns the data in this way
    if len(described) > MAX_HEADER_BYTES:
        raise EntryTooLargeError(f"The header of {len(entry.header.token_ids):,} tokens is too large for a file.")
    return [memoryview(len(described).to_bytes(8, "little") + described), *pieces]


def read_header(path: Path) -> Header:
    """Return the header of the entry in a file.

    Raises:
        OSError: the file cannot be read, or is missing.
        DamagedEntryError: the header shows that the file is not a whole entry.
        StoreVersionError: another version of backprompt wrote the file.

    """
    with _opened(path) as file:
        return read_contents(file, os.fstat(file.fileno()).st_size).header


def read_entry(path: Path, names: Collection[str] | None = None) -> Entry:
    """Return the entry with these tensors, by default all; every byte that is read is compared with its checksum.

    Large tensors are read and checked in parallel, because allocating their memory takes most of the time.

    Raises:
        MemoryError: memory is too small for the entry's tensors, though the file is whole.
        OSError, DamagedEntryError, StoreVersionError: see `read_header`.

    """
    with _opened(path) as file:
        contents = read_contents(file, os.fstat(file.fileno()).st_size)
    chosen = {name: place for name, place in contents.places.items() if names is None or name in names}

    def read(name: str) -> Tensor:
        return _read_tensor(path, name, chosen[name])

    if sum(place.spec.num_bytes for place in chosen.values()) < CHUNK_BYTES:
        return Entry(contents.header, {name: read(name) for name in chosen})
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return Entry(contents.header, dict(zip(chosen, pool.map(read, chosen), strict=True)))


def _opened(path: Path) -> BinaryIO:
    """Return a file opened for reading; pipes and devices, which would wait for a writer, are refused at once."""
    try:
        file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115
    except IsADirectoryError as error:
        raise DamagedEntryError("it is not a regular file") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedEntryError("it is not a regular file")
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read_tensor(path: Path, name: str, place: Place) -> Tensor:
    with _opened(path) as file:
        file.seek(place.start)
        return read_tensor(file, name, place)


def read_tensor(file: BinaryIO, name: str, place: Place) -> Tensor:
    """Return the tensor whose bytes come next in an open file; the bytes are compared with their checksums.

    Raises:
        MemoryError: memory is too small for the tensor.
        DamagedEntryError: the bytes are not those that were written.

    """
    tensor = _room_for(name, place)
    data = _bytes_of(tensor)
    _read_into(file, data, f"tensor {name!r} is cut off")
    _compare(name, data, place.checksums)
    return tensor


def ranges_of(name: str, place: Place, num_rows: int | None) -> list[tuple[int, int]]:
    """Return the ranges of a tensor's bytes, in whole chunks, that contain its first `num_rows` rows; None: all rows.

    A tensor `(kv_heads, tokens, head_dim)` is stored head by head, so its first rows are one run of bytes a head.
    """
    shape = place.spec.shape
    if num_rows is None or kind_of(name) not in AXES:
        return [(0, place.spec.num_bytes)]
    axis = token_axis(name)
    row_bytes = math.prod(shape[axis + 1 :]) * place.spec.dtype.itemsize
    ranges: list[tuple[int, int]] = []
    for run_idx in range(math.prod(shape[:axis])):
        run = run_idx * shape[axis] * row_bytes
        start = run // CHUNK_BYTES * CHUNK_BYTES
        stop = min(-(-(run + num_rows * row_bytes) // CHUNK_BYTES) * CHUNK_BYTES, place.spec.num_bytes)
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(stop, ranges[-1][1])
        else:
            ranges.append((start, stop))
    return ranges


def tensor_of(
    name: str, place: Place, ranges: Sequence[tuple[int, int]], pieces: Sequence[bytes], num_rows: int | None
) -> Tensor:
    """Return the first rows of a tensor from the bytes of `ranges_of`, which are compared with their checksums.

    Raises:
        MemoryError, DamagedEntryError: see `read_tensor`.

    """
    tensor = _room_for(name, place)
    data = _bytes_of(tensor)
    for (start, stop), piece in zip(ranges, pieces, strict=True):
        _read_into(io.BytesIO(piece), data[start:stop], f"tensor {name!r} is cut off")
        _compare(name, data[start:stop], place.checksums[start // CHUNK_BYTES : -(-stop // CHUNK_BYTES)])
    if num_rows is None or kind_of(name) not in AXES:
        return tensor
    return tensor.narrow(token_axis(name), 0, num_rows).clone(memory_format=torch.contiguous_format)


def _room_for(name: str, place: Place) -> Tensor:
    try:
        return torch.empty(place.spec.shape, dtype=place.spec.dtype)
    except RuntimeError as error:  # torch's form of a MemoryError
        raise MemoryError(f"no room for {place.spec.num_bytes:,} bytes of tensor {name!r}") from error


def _compare(name: str, data: memoryview, checksums: Sequence[int]) -> None:
    if _checksums(data) != checksums:
        raise DamagedEntryError(f"the bytes of tensor {name!r} do not match their checksum")


def _read_into(file: BinaryIO, data: memoryview, complaint: str) -> None:
    """Fill `data`; a file that is too short is damaged."""
    num_read = 0
    while num_read < len(data) and (num_more := file.readinto(data[num_read:])):  # type: ignore[attr-defined]
        num_read += num_more
    if num_read != len(data):
        raise DamagedEntryError(complaint)


def read_contents(file: BinaryIO, num_bytes: int) -> Contents:
    """Return the contents of the header at the beginning of a file of `num_bytes` bytes, without reading the data.

    Raises:
        DamagedEntryError, StoreVersionError: see `read_header`.

    """
    if not 10 <= num_bytes <= _MAX_LENGTH:
        raise DamagedEntryError(f"it cannot be {num_bytes} bytes long")
    start = bytearray(8)
    _read_into(file, memoryview(start), "it is cut off")
    length = int.from_bytes(start, "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, num_bytes - len(start)):
        raise DamagedEntryError(f"its header cannot be {length} bytes long")
    described = bytearray(length)
    _read_into(file, memoryview(described), "it is cut off")
    table = _object(described)
    metadata = _checked_metadata(table)
    header = _header_of(_object(metadata["entry"]))
    places = _places_of(table, _object(metadata["checksums"]), len(start) + length, num_bytes)
    check_tensors(header, {name: place.spec for name, place in places.items()})
    return Contents(header, places)


def _checked_metadata(table: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of a header, removed from `table`; the header is compared with its checksum.

    The header of another format is not checked further: its contents are unknown here.
    """
    metadata = table.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedEntryError("its header has no metadata")
    check = metadata.pop("check", None)
    if check != str(_check_of(table)):
        raise DamagedEntryError("its header does not match its checksum")
    version = metadata.get("format", "")
    if not re.fullmatch(r"[0-9]{1,9}", version):
        raise DamagedEntryError("its header names no format")
    if version != str(FORMAT):
        raise StoreVersionError(
            f"it has format {version}, and this version of backprompt reads format {FORMAT}. Use the version that "
            "wrote the file, or a new folder."
        )
    if metadata.keys() != {"format", "entry", "checksums"}:
        raise DamagedEntryError("the metadata of its header are not those of an entry")
    del table["__metadata__"]
    return metadata


def _header_of(described: dict[str, Any]) -> Header:
    if not _NEEDED_FIELDS <= described.keys() <= _FIELDS:
        raise DamagedEntryError("the fields of its header are not those of an entry")
    for name in ("token_ids", "behind"):
        if isinstance(described.get(name), list):
            described[name] = tuple(described[name])
    header = Header(**described)
    check_header(header)
    return header


def _places_of(table: dict[str, Any], checksums: dict[str, Any], data_start: int, num_bytes: int) -> dict[str, Place]:
    """Return the place of each tensor; the places together cover all of the file's data without overlap."""
    if checksums.keys() != table.keys():
        raise DamagedEntryError("its checksums are those of other tensors")
    places, starts = {}, []
    for name, described in table.items():
        if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
            raise DamagedEntryError("a tensor is not described by its dtype, shape and offsets")
        dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise DamagedEntryError("a tensor has a dtype that no entry has")
        if not _are_lengths(shape, 1, 3) or not _are_lengths(offsets, 2, 2):
            raise DamagedEntryError("a tensor's shape or offsets are not whole numbers within the limit")
        spec = TensorSpec(_DTYPES[dtype], tuple(shape))
        if offsets[1] - offsets[0] != spec.num_bytes:
            raise DamagedEntryError("a tensor's shape and offsets contradict each other")
        _check_checksums(checksums[name], spec.num_bytes)
        places[name] = Place(spec, data_start + offsets[0], checksums[name])
        starts.append((data_start + offsets[0], data_start + offsets[1]))
    stop = data_start
    for start, next_stop in sorted(starts):
        if start != stop:
            raise DamagedEntryError("its tensors overlap, or leave gaps")
        stop = next_stop
    if stop != num_bytes:
        raise DamagedEntryError(f"its tensors end after {stop:,} bytes, but the file ends after {num_bytes:,}")
    return places


def _check_checksums(checksums: object, num_bytes: int) -> None:
    num_chunks = -(-num_bytes // CHUNK_BYTES)
    if not isinstance(checksums, list) or len(checksums) != num_chunks:
        raise DamagedEntryError("the number of a tensor's checksums is not the number of its chunks")
    if not all(type(checksum) is int and 0 <= checksum < 1 << 32 for checksum in checksums):
        raise DamagedEntryError("a checksum is not a number of 32 bits")


def _are_lengths(numbers: object, fewest: int, most: int) -> bool:
    return (
        isinstance(numbers, list)
        and fewest <= len(numbers) <= most
        and all(type(number) is int and 0 <= number <= _MAX_LENGTH for number in numbers)
    )


def _object(encoded: str | bytearray) -> dict[str, Any]:
    """Return the JSON object; duplicate names and constants such as NaN are refused."""
    try:
        decoded = json.loads(encoded, object_pairs_hook=_without_duplicates, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedEntryError(f"its header cannot be read: {error}") from error
    if not isinstance(decoded, dict):
        raise DamagedEntryError("its header is not a JSON object")
    return decoded


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        raise ValueError("a name occurs twice")
    return decoded


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not allowed as a number")


def _check_of(table: dict[str, Any]) -> int:
    try:
        return zlib.crc32(json.dumps(table, sort_keys=True).encode())
    except RecursionError as error:
        raise DamagedEntryError("its header is nested too deeply") from error


def _checksums(data: memoryview) -> list[int]:
    return [zlib.crc32(data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in place: writing to them changes the tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers
