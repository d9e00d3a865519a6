"""Files that are complete or absent, and reading of regular files alone.

Writing: temporary file, fsync, rename, fsync of the folder. Reading: nothing but a regular file is opened. Of a cache
no symbolic link is followed, neither for a file nor for a folder below the one that is read; in a user's own folders
links are followed.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .errors import CacheError, UsageError, find_disk_error, is_interrupt, make_printable

_PROBE_BYTES = 1 << 20  # written to find out whether a disk is full


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically and durably: at any moment, `path` is the old file or the complete new one.

    Args:
        path: The file to create or replace.
        write: Called with the path of a temporary file in the same folder, which it writes.

    Raises:
        OSError: The disk is full, or the folder cannot be written; its file name is `path`. Whatever error a library
            raises for a full disk, this one is raised. Other errors of `write` are passed on. The temporary file is
            removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        disk_error = _find_disk_error(error, temporary)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if disk_error is not None:
            raise OSError(disk_error.errno, disk_error.strerror, str(path)) from None
        raise


def _find_disk_error(error: BaseException, temporary: Path) -> OSError | None:
    """Return the disk's error behind one of `write`; where that hides it, write to the file that was not written."""
    if not isinstance(error, Exception) or isinstance(error, CacheError | UsageError) or is_interrupt(error):
        return None
    if (disk_error := find_disk_error(error)) or isinstance(error, OSError | MemoryError):
        return disk_error
    try:
        with open(temporary, "ab") as file:
            file.write(bytes(_PROBE_BYTES))
        sync(temporary)
    except OSError as write_error:
        return find_disk_error(write_error)
    return None


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


def open_input_file(path: Path) -> BinaryIO:
    """Open a regular file of the user's for reading; links are followed.

    A pipe, socket or device is not opened: that could wait for ever, or act on the device. The file is looked at
    before and after it is opened, because it may be replaced in between.

    Raises:
        CacheError: It is a folder, pipe, socket or device.
        OSError: It does not exist, or cannot be read.
    """
    _require_regular(path, os.stat(path).st_mode)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return os.fdopen(fd, "rb")


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CacheError(f"'{make_printable(path, None)}' is {_describe_kind(mode)}, not a regular file")


def _describe_kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def refuse_special_file(path: Path) -> None:
    """Raise CacheError for a pipe, socket or device, before a library opens it. A folder, or nothing, passes."""
    if path.exists() and not path.is_dir():
        _require_regular(path, path.stat().st_mode)


def refuse_special_files(folder: Path) -> None:
    """Raise CacheError for a pipe, socket or device directly in a folder."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            refuse_special_file(path)


def read_input_file(path: Path) -> bytes:
    """Read a regular file of the user's, see `open_input_file`."""
    with open_input_file(path) as file:
        return file.read()


def sync(path: Path) -> None:
    """Write a file's bytes, or a folder's names, to the disk, so that they survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with name_file(path):
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def name_file(path: Path) -> Iterator[None]:
    """Add the name of a file to an OSError that has a number and no name, such as that of a write."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
