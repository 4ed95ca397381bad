"""The folder of a store: its files, each written as a whole or not at all; damaged files are moved aside."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from backprompt.errors import DamagedEntryError, StoreVersionError
from backprompt.progress import progress_bar
from backprompt.store.base import Header
from backprompt.store.file import read_header
from backprompt.store.paths import FOLDERS, explained, explaining
from backprompt.store.schema import is_name

logger = logging.getLogger(__name__)

_WRITING = "tmp"  # the prefix of file names in the folder `writing`
_ABANDONED_SECONDS = 24 * 3600


class Folder:
    """A store's folder, created if missing.

    Args:
        path: the result of `check_folder`.

    Attributes:
        is_writable: whether files can be written to the folder; if not, the folder is only read.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_writable = self._make_folders()

    def file(self, name: str) -> Path:
        """Return the path of the entry of this name."""
        return self.path / "entries" / name[:2] / f"{name}.safetensors"

    def files(self) -> Iterator[Path]:
        """Yield the files with names of entries; other files in the folders, and targets of links, are skipped."""
        with os.scandir(self.path / "entries") as found:
            folders = sorted(folder.path for folder in found if folder.is_dir(follow_symlinks=False))
        for folder in map(Path, folders):
            try:
                files = sorted(folder.glob("*.safetensors"))
            except OSError as error:  # other folders may be intact
                logger.warning("%s cannot be read: %s", folder, error)
                continue
            yield from (file for file in files if is_name(file.stem) and self.file(file.stem) == file)

    def described(self) -> Iterator[tuple[Header, int, float]]:
        """Yield the data of the index: for each file its header, its size in bytes, and the time of its last change."""
        files = list(self.files())
        with progress_bar(len(files), "indexing", "entries", is_long=len(files) > 1) as bar:
            for file in files:
                header = self.header(file)
                if header is not None:
                    with suppress(FileNotFoundError):  # deleted by another process meanwhile
                        status = file.stat()
                        yield header, status.st_size, status.st_mtime
                bar.update()

    def header(self, file: Path) -> Header | None:
        """Return an entry's header, or None after logging the reason. A damaged file is moved aside."""
        try:
            header = read_header(file)
            if header.name != file.stem:
                raise DamagedEntryError(f"the file holds another entry, {header.name}")
        except FileNotFoundError:
            return None  # deleted by another process meanwhile
        except DamagedEntryError as error:
            self.report(file, error)
            self.move_aside(file)
            return None
        except StoreVersionError as error:
            logger.warning("%s: %s", file, error)
            return None
        except (OSError, MemoryError) as error:  # other files may be intact
            logger.warning("%s cannot be read: %s", file, error)
            return None
        return header

    def write(self, final: Path, pieces: Sequence[memoryview]) -> None:
        """Write a temporary file, sync it, and rename it to its final name."""
        with suppress(FileExistsError):
            final.parent.mkdir(mode=0o700)
            _sync_folder(final.parent.parent)
        descriptor, temporary = tempfile.mkstemp(prefix=_WRITING, dir=self.path / "writing")  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_folder(final.parent)

    def check_writable(self) -> None:
        """Raise OSError if the folder cannot be written to."""
        if not self.is_writable:
            raise explained(
                OSError(errno.EACCES, "the folder cannot be written to"), "The store is only read", self.path
            )

    def report(self, file: Path, error: DamagedEntryError) -> None:
        """Warn about a damaged file."""
        logger.warning(
            "%s is damaged: %s. The file is set aside, and its tokens are computed again when needed.", file, error
        )

    def move_aside(self, file: Path) -> None:
        """Move a file into the folder `damaged`, if possible."""
        if not self.is_writable:
            return
        folder = self.path / "damaged"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            os.replace(file, folder / file.name)
        except FileNotFoundError:  # another thread or process moved it first
            logger.debug("%s was gone before it could be set aside.", file)
        except OSError as error:
            logger.warning("%s cannot be set aside: %s", file, error)

    def _make_folders(self) -> bool:
        """Create missing folders; return whether the folder can be written to."""
        folders = [self.path / name for name in FOLDERS]
        try:
            with explaining("The folder of a store cannot be made", self.path):
                for folder in (self.path, *folders):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            if not folders[0].is_dir():
                raise
            return False
        if not all(os.access(folder, os.R_OK | os.W_OK | os.X_OK) for folder in (self.path, *folders)):
            return False
        for folder in folders:
            if folder.is_symlink():  # files would be deleted and moved at the link's target
                raise explained(OSError(errno.ELOOP, "it is a link"), "This cannot be a store's own folder", folder)
        self._clear_away()
        return True

    def _clear_away(self) -> None:
        """Delete files left by processes that were killed during a write."""
        with os.scandir(self.path / "writing") as found:
            left = [file for file in found if file.name.startswith(_WRITING) and file.is_file(follow_symlinks=False)]
        for file in left:
            try:
                if file.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                    os.unlink(file.path)
            except OSError as error:  # another process was faster, or the file has another owner
                logger.debug("%s cannot be deleted: %s", file.path, error)


def _sync_folder(folder: Path) -> None:
    """Make sure that a rename in this folder survives a loss of power, if the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
