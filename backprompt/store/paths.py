"""The folder of a store: its allowed places, and explanations of system errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INDEX = "index.sqlite"
FOLDERS = ("entries", "damaged", "writing")
"""The folders of a store. The first one distinguishes a store from other folders."""

_ANOTHER_FOLDER = "Name a folder of a store, an empty folder, or a new one, such as prompts.bp"
_MORE_SPACE = "Free some space, or choose another disk"
_PERMISSION = "Choose a folder of your own, or change the permissions of this one"
_ADVICE = {
    errno.ENOENT: _ANOTHER_FOLDER,
    errno.ENOTDIR: _ANOTHER_FOLDER,
    errno.EEXIST: _ANOTHER_FOLDER,
    errno.EINVAL: _ANOTHER_FOLDER,
    errno.ELOOP: _ANOTHER_FOLDER,
    errno.EBADF: "Open it again",
    errno.ENAMETOOLONG: "Choose a shorter path",
    errno.ENOSPC: _MORE_SPACE,
    errno.EDQUOT: _MORE_SPACE,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
}


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that is a store or may become one, without creating it.

    Raises:
        OSError: the path is a file, lies below a file, has other content, cannot be read, or cannot be created.
        TypeError: the value is not a path.

    """
    given = os.fspath(path)
    if not isinstance(given, str):
        raise TypeError(f"The path of a store must be a str or a Path, not {type(given).__name__}.")
    with explaining("This folder cannot be used for a store", given):
        if not given:
            raise OSError(errno.ENOENT, "the path is empty")
        try:
            folder = Path(os.path.abspath(given))
            names = os.listdir(folder)
        except FileNotFoundError:
            _check_can_be_made(folder)
            return folder
        except ValueError as error:  # a NUL, or half of a UTF-16 pair
            raise OSError(errno.EINVAL, f"the value is not a path ({error})") from error
        foreign = [name for name in names if not name.startswith((".", INDEX)) and name not in FOLDERS]
        if foreign and not (folder / FOLDERS[0]).is_dir():
            raise OSError(errno.EEXIST, f"it has other content, such as {min(foreign)!r}")
    return folder


def _check_can_be_made(folder: Path) -> None:
    above = next(parent for parent in folder.parents if parent.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, f"{above} cannot be written to")


@contextmanager
def explaining(what: str, path: str | Path) -> Iterator[None]:
    """Turn system errors inside the context into errors that name the failed action, the path, and advice."""
    try:
        yield
    except OSError as error:
        raise explained(error, what, path) from error


def explained(error: OSError, what: str, path: str | Path) -> OSError:
    """Return an error of the same kind with the failed action, the path, and advice."""
    number = error.errno or errno.EIO
    advice = _ADVICE.get(number, "Check that the folder exists and belongs to you")
    return OSError(number, f"{what}: {str(error.strerror or error).rstrip('.')}. {advice}", str(path))
