"""Files that are whole or absent, and opening only plain ones.

Writing: temporary file, fsync, rename, fsync of the folder. Reading: no link is followed, neither a
file's nor a folder's inside the place that is read, and nothing but a regular file is opened.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CacheError


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let write make a temporary file beside path, make it durable, and give it its name.

    Whatever happens in between, path is the old file or the new one. Raises what write raises and OSError.
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
    """Publish text as UTF-8, its line ends as they are."""
    publish_bytes(path, text.encode())


def publish_bytes(path: Path, content: bytes) -> None:
    """Publish content as it is."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    publish(path, write)


def publish_json(path: Path, content: Any) -> None:
    """Publish content as indented JSON; NaN and infinity are refused, for they are not JSON."""
    publish_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def make_folder(path: Path) -> None:
    """A folder, and those above it, that a power cut does not take away again."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def remove_stale_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Delete the temporary files of these names that a killed process left in a folder; return them.

    Only files that publish would have made under these very names. The caller holds the folder's lock: the
    process that wrote them is gone.
    """
    ours = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[0-9]+\.tmp")
    found = [p for p in folder.iterdir() if ours.fullmatch(p.name) and p.is_file() and not p.is_symlink()]
    for path in found:
        path.unlink()
    return found


def open_regular_file(folder: Path, name: str) -> int:
    """A read-only descriptor of the regular file folder/name; folder itself is trusted, what is in it is not.

    Raises CacheError for a link anywhere below folder, a pipe (which would hang), a device, or nothing there.
    """
    path, *parts = folder, *PurePosixPath(name).parts
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        at = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            above, at = at, -1
            try:
                at = os.open(part, flags if last else flags | os.O_DIRECTORY, dir_fd=above)
            finally:
                os.close(above)
    except OSError as error:
        raise CacheError(f"{folder / name}: cannot be opened as a plain file ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(at).st_mode):
        os.close(at)
        raise CacheError(f"{folder / name}: not a plain file")
    return at


def read_regular_file(folder: Path, name: str, most: int) -> bytes:
    """The bytes of the regular file folder/name. Raises CacheError when there are more than most."""
    with os.fdopen(open_regular_file(folder, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CacheError(f"{folder / name}: {size} bytes, more than the {most} that it may have")
        return file.read(most)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
