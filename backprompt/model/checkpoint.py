"""A checkpoint: the files that a model was loaded from, and the content hash remembered for them.

Hashing every weight takes up to some seconds, and each process needs the hash once, but a checkpoint's files seldom
change. So the user's cache directory keeps the hash, in one file of two lines per checkpoint: the hash, and a check of
it. A wrong hash would find wrong numbers in a store, so the weights are hashed again in any case of doubt:

- The name of the file is made of the checkpoint: path, size, times, inode and device of each of its files, the
  requested dtype, and the versions of the libraries that load and hash. If files have changed since, or their times may
  not show a later write, there is no name.
- The files must decide every weight: no adapter, no quantizer, no code beyond transformers, nothing missing.
- The check covers a sample of each parameter, all buffers, the configuration and the settings of modules. So the check
  tells apart two models that have the same name in two disk images, and finds a damaged entry.
- The weights must be unchanged since they were loaded, and callers must know that. So an `LM` looks the hash up only
  while no other code, not even its user's, has got the model from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils.hub import cached_file

from backprompt.model.weights import HASH_FORMAT, sample_hash
from backprompt.version import __version__

logger = logging.getLogger(__name__)

CACHE_HOME_VARIABLE = "BACKPROMPT_CACHE_HOME"
MAX_REMEMBERED = 256
MAX_FILES = 1000
"""A folder with more files is not only a checkpoint, and is not searched."""
RACY_SECONDS = 2.0
"""Two writes within so short a time may leave a file with the same times (FAT counts in steps of 2 s)."""

_HASH_LENGTH = hashlib.sha256().digest_size * 2


@dataclass(frozen=True)
class Checkpoint:
    """The files under a model's name at one moment; two are equal if no file was changed, added or removed."""

    folder: Path
    dtype: str
    files: tuple[_File, ...]

    @classmethod
    def find(cls, name: str | Path, dtype: torch.dtype | str) -> Checkpoint | None:
        """Return the checkpoint that `from_pretrained(name, dtype=dtype)` reads, or None in doubt.

        The checkpoint is a folder, or the only snapshot of a hub id, in which any later write would show.
        """
        folder = Path(name) if os.path.isdir(name) else _only_snapshot(name)
        if folder is None:
            return None
        folder = folder.resolve()
        files = files_in(folder)
        return cls(folder, str(dtype), files) if files and _are_settled(files) else None

    def decides(self, model: nn.Module, loading_info: Mapping[str, Any]) -> bool:
        """Return whether each weight of the model, which was just loaded, was read from these files."""
        return (
            not any(loading_info[kind] for kind in ("missing_keys", "mismatched_keys", "error_msgs"))
            and type(model).__module__.startswith("transformers.")
            and not getattr(model, "_hf_peft_config_loaded", False)
            and not any(file.name == "adapter_config.json" for file in self.files)
            and getattr(model, "hf_quantizer", None) is None
            and getattr(model.config, "quantization_config", None) is None
            and not self._points_elsewhere()
        )

    def recall(self, model: nn.Module) -> str | None:
        """Return the remembered content hash for these files, or None; the model must be as loaded from them."""
        try:
            entry = self._entry_path().read_bytes()
        except OSError:
            return None
        content_hash = entry[:_HASH_LENGTH].decode("ascii", "replace")
        if entry != self._entry(model, content_hash) or files_in(self.folder) != self.files:
            return None
        return content_hash

    def remember(self, model: nn.Module, content_hash: str) -> None:
        """Keep the content hash of the model, which must be as loaded from these files."""
        if (
            files_in(self.folder) != self.files
        ):  # weights may be mapped into memory from the files, so they may have changed as well
            return
        try:
            _write(self._entry_path(), self._entry(model, content_hash))
        except OSError as error:
            logger.debug("The hash of the weights of %s could not be kept: %s", self.folder, error)

    def forget_unless(self, content_hash: str) -> None:
        """Drop the hash that is remembered for these files unless it is `content_hash`."""
        try:
            path = self._entry_path()
            if not path.read_bytes().startswith(content_hash.encode()):
                path.unlink()
        except OSError:
            pass  # no hash is remembered, or its file cannot be removed

    def _entry(self, model: nn.Module, content_hash: str) -> bytes:
        check = hashlib.sha256("\n".join((self._key(), sample_hash(model), content_hash)).encode()).hexdigest()
        return f"{content_hash}\n{check}\n".encode()

    def _entry_path(self) -> Path:
        return _private_folder() / self._key()

    def _key(self) -> str:
        versions = (HASH_FORMAT, __version__, torch.__version__, transformers.__version__)
        return hashlib.sha256(repr((versions, str(self.folder), self.dtype, self.files)).encode()).hexdigest()

    def _points_elsewhere(self) -> bool:
        """Return whether an index of shards names files outside of the folder, or cannot be read."""
        try:
            for file in self.files:
                if file.name.endswith(".index.json"):
                    shards = json.loads(Path(file.path).read_bytes()).get("weight_map", {}).values()
                    if any(".." in shard or os.path.isabs(shard) for shard in shards):
                        return True
        except (OSError, ValueError, TypeError, AttributeError):
            return True
        return False


@dataclass(frozen=True)
class _File:
    """The properties that show whether a file was written to or replaced."""

    name: str
    path: str  # resolved: snapshots of the hub's cache are links
    device: int
    inode: int
    num_bytes: int
    mtime_ns: int
    ctime_ns: int


def files_in(folder: Path) -> tuple[_File, ...] | None:
    """Return the files in a folder and below, by name; None if a file is unreadable or irregular, or if too many."""
    try:
        files: list[_File] = []
        for path in _walk(folder):
            status = path.stat()
            resolved = str(path.resolve())
            files.append(
                _File(
                    path.relative_to(folder).as_posix(),
                    resolved,
                    status.st_dev,
                    status.st_ino,
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                )
            )
            if not stat.S_ISREG(status.st_mode) or len(files) > MAX_FILES:
                return None
    except OSError:
        return None
    return tuple(sorted(files, key=lambda file: file.name))


def _are_settled(files: Iterable[_File]) -> bool:
    """Return whether any later write to one of the files would show in its times."""
    newest = max(max(file.mtime_ns, file.ctime_ns) for file in files)
    return time.time_ns() - newest >= RACY_SECONDS * 1e9


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every entry that is not a folder; a link to a folder counts as an irregular file."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        else:
            yield entry


def _only_snapshot(name: str | Path) -> Path | None:
    """Return the folder of a hub id in the hub's cache; None if there are several, since the choice is unknown."""
    try:
        config = cached_file(str(name), "config.json", local_files_only=True)
        if config is None:
            return None
        folder = Path(config).parent
        return folder if len(list(folder.parent.iterdir())) == 1 else None
    except (OSError, ValueError):  # a missing folder; an invalid id
        return None


def _private_folder() -> Path:
    """Return the folder of the remembered hashes, created if missing.

    Raises:
        OSError: the folder cannot be made, or others may write to it.

    """
    chosen, base = os.environ.get(CACHE_HOME_VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = (
            Path(chosen) if chosen else (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "backprompt"
        )
    except RuntimeError as error:  # no home
        raise OSError(str(error)) from error
    folder = home / "weights"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written to by others")
    return folder


def _write(path: Path, entry: bytes) -> None:
    """Write a temporary file and rename it, so that readers see whole files; delete the oldest of too many files."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(entry)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    by_age = sorted(path.parent.iterdir(), key=lambda other: other.stat().st_mtime_ns)
    for old in by_age[:-MAX_REMEMBERED]:
        old.unlink(missing_ok=True)
