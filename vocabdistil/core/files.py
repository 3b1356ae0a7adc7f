"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from .errors import VocabdistilError

__all__ = [
    "files_in",
    "finish_folder",
    "make_folder",
    "remove_folders",
    "told",
    "whole_file",
    "whole_path",
    "write_json",
]

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def _usual_mode() -> int:
    """The permissions of a new file: libraries that write by way of a temporary one leave it to its owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync(path: str | os.PathLike[str]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name under which to write a file, which gets its own, ``path``, only when it is complete and on the disk.

    Until then it is called ``.NAME.`` and something random, in the same folder; after an error it is removed. A link is
    followed.

    Raises:
        OSError: it cannot be written, or what has the name is no file, such as a folder or a device.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file that can be replaced", str(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        _sync(temporary)
        os.chmod(temporary, _usual_mode())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write by way of :func:`whole_path`."""
    with whole_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those that it is in.

    Returns:
        Those that were not there, the innermost first, for :func:`remove_folders`.

    Raises:
        OSError: it cannot be made; then none of them is left.
    """
    missing = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_folders(missing)
        raise
    return missing


def remove_folders(folders: Iterable[Path]) -> None:
    """Removes those of the folders that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def files_in(folder: Path) -> dict[str, int]:
    """The size in bytes of every file in a folder and those below it, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.lstat().st_size for path in files}


def finish_folder(folder: Path) -> None:
    """Gives all files in a folder the permissions of new ones, and waits until they are on the disk."""
    mode = _usual_mode()
    for name in files_in(folder):
        os.chmod(folder / name, mode)
        _sync(folder / name)


@contextmanager
def told(option: str, place: str | os.PathLike[str]) -> Iterator[None]:
    """What the disk refuses while something is written below ``place``, in one line that begins with ``option``.

    Raises:
        VocabdistilError: the disk is full or broken, or must not be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise VocabdistilError.of(option, f"cannot write {place}: {error.strerror}") from None
    except (SafetensorError, RuntimeError) as error:
        # Rust and C++ tell of the same in exceptions of their own.
        found = str(error)
        if not ("I/O error" in found or "PytorchStreamWriter" in found or "inline_container" in found):
            raise
        problem = found if "I/O error" in found else "the disk is full or broken"
        raise VocabdistilError.of(option, f"cannot write {place}: {problem}") from None


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as file:
        file.write(text.encode())
