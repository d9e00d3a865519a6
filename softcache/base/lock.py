"""A lock on a folder: one process at a time writes to it, and the lock ends with the process that holds it."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from .errors import CacheError, LockedError
from .files import name_file

LOCK = ".lock"
_MAX_BYTES = 1024  # of a lock file's content that are read


@contextmanager
def hold_lock(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold a lock on a folder, or on a part of it, while the `with` block runs.

    It is a POSIX record lock of the kernel, for two reasons: it is released when the process ends, whatever the cause,
    and forked worker processes do not inherit it. A process that already holds the lock can take it again. The lock
    file describes its holder for messages; it is removed at the end.

    Args:
        folder: The folder to write to; it must exist.
        name: Name of the lock file in the folder, one for each part that is locked separately.

    Raises:
        LockedError: Another process holds the lock; the message names host, process id and time.
        CacheError: The file system has no such locks.
    """
    path = folder / name
    fd = _acquire(path)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().astimezone().isoformat()}
        with name_file(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _acquire(path: Path) -> int:
    """Lock a file and return its descriptor; try again where another holder removed it between opening and locking."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except (BlockingIOError, PermissionError):
            holder = _describe_holder(os.pread(fd, _MAX_BYTES, 0))
            os.close(fd)
            raise LockedError(f"'{path.parent}' is being written by {holder}: wait for it, or stop it") from None
        except OSError as error:
            os.close(fd)
            raise CacheError(
                f"'{path.parent}' cannot be locked ({error.strerror}): write on another file system, then move it"
            ) from None
        os.close(fd)


def _describe_holder(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {int(holder['pid'])} on {str(holder['host'])[:80]!r} since {str(holder['since'])[:19]}"
    except (ValueError, TypeError, KeyError):
        return "another process"
