"""Files and folders that appear whole or not at all: built under a temporary name beside the target, then renamed.

A rename replaces the old file in one step, so a reader, a crash, a full disk or `kill -9` meets the old file or the
new one. A killed process may leave its temporary sibling behind: `.NAME.XXXXXXXX.tmp`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from prefixkit.errors import InputError


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`. Raises InputError when the file cannot be written; the old file then stays."""
    write_stream(path, (data,))


def write_stream(path: str | Path, chunks: Iterable[bytes]) -> None:
    """Write `chunks` one after the other to `path`. Raises InputError as `write_bytes` does."""
    with replacing(path) as file:
        for chunk in chunks:
            file.write(chunk)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it raises.

    Raises:
        InputError: no such folder, no permission, a full disk, or a `path` that is no regular file.
    """
    target = _file_target(path)
    temporary = _sibling(target)
    with _told_as_input_errors(path, temporary, target):
        try:
            # Opened by hand: tempfile would give the file its private mode 0600 for good.
            with os.fdopen(os.open(temporary, _NEW_FILE, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)


@contextmanager
def replacing_folder(path: str | Path, *, marker: str | None = None) -> Iterator[Path]:
    """An empty folder that takes the place of `path` when the block ends well, and vanishes when it raises.

    Args:
        path: the folder to write; its parent must exist.
        marker: the name of a file by which a folder of ours is known. A folder that is not empty is replaced only
            if it holds this file, so that a slip of the pen cannot delete somebody's documents.

    Raises:
        InputError: a folder of somebody else's, no such parent, no permission, a full disk.
    """
    target = _folder_target(path, marker)
    temporary = _sibling(target)
    with _told_as_input_errors(path, temporary, target):
        try:
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            _swap(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(target.parent)


_NEXT = "free space or choose another place"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def _file_target(path: str | Path) -> Path:
    # A symbolic link stays a link: what it points to is replaced.
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        found = "a folder" if target.is_dir() else "a device"
        raise InputError(path, expected="the path of a file", found=found, next_step="add a file name")
    return _with_parent(path, target)


def _folder_target(path: str | Path, marker: str | None) -> Path:
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise InputError(path, expected="the path of a folder", found="a file", next_step="choose another name")
    if target.is_dir() and any(target.iterdir()) and not (marker and (target / marker).is_file()):
        expected = f"an empty folder, a new one or one with {marker}" if marker else "an empty folder or a new one"
        raise InputError(path, expected=expected, found="other files in it", next_step="choose another folder")
    return _with_parent(path, target)


def _with_parent(path: str | Path, target: Path) -> Path:
    if not target.parent.is_dir():
        raise InputError(path, expected="an existing folder", found=f"no {target.parent}", next_step="create it first")
    return target


def _sibling(target: Path) -> Path:
    # A name may have 255 bytes; the suffix needs 14 of them, and one character can take 4.
    return target.with_name(f".{target.name[:60]}.{secrets.token_hex(4)}.tmp")


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; no system call does that for folders that are not empty."""
    if not target.exists():
        os.replace(new, target)
        return
    old = _sibling(target)
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable. Windows cannot open folders, some network file systems cannot sync them.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


@contextmanager
def _told_as_input_errors(path: str | Path, *ours: Path) -> Iterator[None]:
    """One line for what goes wrong with our own files; the errors of other files pass through."""
    try:
        yield
    except OSError as error:
        # A failed write to an open file, such as on a full disk, names no file; a failed copy names both.
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if named and not any(_within(name, folder) for name in named for folder in ours):
            raise
        reason = (error.strerror or str(error)).lower()
        raise InputError(path, expected="a place that can be written", found=reason, next_step=_NEXT) from error


def _within(name: str, folder: Path) -> bool:
    return Path(name) == folder or folder in Path(name).parents
