"""One writer at a time: a lock that dies with its holder."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from .errors import CacheError, LockedError

LOCK = ".lock"
_MAX_BYTES = 1024  # bytes that a lock file may have


@contextmanager
def hold_lock(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold a folder, or what name stands for in it, for writing. Raises LockedError, naming host, pid and time, when
    another process does.

    The lock is the kernel's (POSIX, by record): it is gone with the process that held it, however that ended, and
    workers that were forked do not inherit it. The file says who; it is removed at the end. The kernel does
    not keep a process from locking twice what it holds already.
    """
    path = folder / name
    fd = _acquire(path)
    try:
        os.ftruncate(fd, 0)
        words = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().astimezone().isoformat()}
        os.pwrite(fd, json.dumps(words).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _acquire(path: Path) -> int:
    """The locked file. Another holder may have removed it while we waited for the call: then once more."""
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


def _describe_holder(words: bytes) -> str:
    try:
        said = json.loads(words)
        return f"process {int(said['pid'])} on {str(said['host'])[:80]!r} since {str(said['since'])[:19]}"
    except (ValueError, TypeError, KeyError):
        return "another process"
