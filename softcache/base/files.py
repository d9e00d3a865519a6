"""Files that are complete or absent, and reading of regular files alone.

Writing: temporary file, fsync, rename, fsync of the folder. Reading: no symbolic link is followed, neither for a file
nor for a folder below the one that is read, and nothing but a regular file is opened.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CacheError


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically and durably: at any moment, `path` is the old file or the complete new one.

    Args:
        path: The file to create or replace.
        write: Called with the path of a temporary file in the same folder, which it writes.

    Raises:
        OSError: The disk is full, or the folder cannot be written. Errors of `write` are passed on; the temporary
            file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish_text(path: Path, text: str) -> None:
    """Publish text as UTF-8, with its line ends as they are."""
    publish_bytes(path, text.encode())


def publish_bytes(path: Path, content: bytes) -> None:
    """Publish bytes."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    publish(path, write)


def publish_json(path: Path, content: Any) -> None:
    """Publish content as indented JSON.

    Raises:
        ValueError: The content has a number that is NaN or infinite, which JSON cannot express.
    """
    publish_bytes(path, format_json(content))


def format_json(content: Any) -> bytes:
    """Format content as `publish_json` writes it.

    Raises:
        ValueError: The content has a number that is NaN or infinite, which JSON cannot express.
    """
    return f"{json.dumps(content, indent=1, allow_nan=False)}\n".encode()


def publish_together(folder: Path, contents: Mapping[str, bytes], obsolete: Iterable[str] = ()) -> None:
    """Replace several files of a folder by new ones, after all of the new ones are on the disk.

    Where a file cannot be written, the old files stay as they are. The last file marks that all are of one set: it is
    removed before the first is replaced, and comes back last.

    Args:
        folder: Where the files are; the caller holds its lock.
        contents: {name: content}.
        obsolete: Names of files of older sets, which are deleted where they are not in `contents`.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    temporaries = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, temporary in temporaries.items():
            temporary.write_bytes(contents[name])
            sync(temporary)
        *_, marker = contents
        for name in (marker, *(name for name in obsolete if name not in contents)):
            (folder / name).unlink(missing_ok=True)
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    sync(folder)


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they are missing, so that they survive a power cut."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def remove_stale_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Delete the temporary files that killed processes left in a folder when they published files of these names.

    The caller holds the folder's lock: no process that still writes such a file is running.

    Args:
        folder: Where to look; not in folders below it.
        names: Names of published files. Files that `publish` would not have made for them are left alone.

    Returns:
        The deleted files.
    """
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[0-9]+\.tmp")
    stale = [p for p in folder.iterdir() if pattern.fullmatch(p.name) and p.is_file() and not p.is_symlink()]
    for path in stale:
        path.unlink()
    return stale


def open_regular_file(folder: Path, name: str) -> int:
    """Open a regular file for reading without following a symbolic link below `folder`.

    Args:
        folder: A trusted folder; its own path may contain links.
        name: Path of the file relative to `folder`, with slashes. It may come from an untrusted manifest.

    Returns:
        A file descriptor, which the caller closes.

    Raises:
        CacheError: Nothing is there, or a link, a pipe (reading it would hang), a device or a folder.
    """
    first, *parts = folder, *PurePosixPath(name).parts
    file_flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(first, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for i, part in enumerate(parts):
            is_last = i == len(parts) - 1
            parent, fd = fd, -1
            try:
                fd = os.open(part, file_flags if is_last else file_flags | os.O_DIRECTORY, dir_fd=parent)
            finally:
                os.close(parent)
    except OSError as error:
        raise CacheError(f"{folder / name}: cannot be opened as a plain file ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CacheError(f"{folder / name}: not a plain file")
    return fd


def read_regular_file(folder: Path, name: str, max_bytes: int) -> bytes:
    """Read a small regular file, see `open_regular_file`.

    Raises:
        CacheError: It cannot be opened, or has more than `max_bytes` bytes.
    """
    with os.fdopen(open_regular_file(folder, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise CacheError(f"{folder / name}: {size} bytes, more than the {max_bytes} that it may have")
        return file.read(max_bytes)


def sync(path: Path) -> None:
    """Write a file's bytes, or a folder's names, to the disk, so that they survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
