"""Compiled programs that are kept in a folder of the user's, so that a later process need not compile again.

A program is native code. It is believed only where nobody but the user can have made it: the folder is the user's and
closed to others, and the file is signed with a random key in that folder (HMAC-SHA256 over its name and its content).
What is run are the bytes that were checked, from a temporary folder of the process.
"""

import hmac
import os
import stat
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from softcache.base.errors import CacheError
from softcache.base.files import make_folder, open_regular_file, publish, read_regular_file
from softcache.base.user_cache import KEY, KEY_BYTES, find_user_folder, load_key, sign

MAX_PROGRAMS, MAX_BYTES = 20, 2 << 30  # of the folder; the least recently used are deleted
_MAGIC = b"softcache program1\n"
_SUFFIX = ".program"
_ABANDONED = 3600  # seconds after which a temporary file belongs to a process that was killed


class KeptPrograms:
    """A folder of signed programs.

    Args:
        folder: The folder, which is made when the first program is written; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def read(self, name: str) -> bytes | None:
        """Read a program.

        Args:
            name: What it was compiled from: a digest, as hexadecimal digits.

        Returns:
            The program; None where there is none, or it is damaged, not signed, or not of this user alone.
        """
        if self.folder is None:
            return None
        try:
            if not (_is_private(self.folder) and _is_private(self.folder / KEY)):
                return None
            key = read_regular_file(self.folder, KEY, KEY_BYTES)
            with os.fdopen(open_regular_file(self.folder, name + _SUFFIX), "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_size > MAX_BYTES:
                    return None
                head, payload = file.read(len(_MAGIC) + sha256().digest_size), file.read()
            if len(key) != KEY_BYTES or not hmac.compare_digest(head, _MAGIC + sign(key, _MAGIC, name, payload)):
                return None
            os.utime(self.folder / (name + _SUFFIX))  # the time of its last use
        except (CacheError, OSError):
            return None
        return payload

    def write(self, name: str, payload: bytes) -> bool:
        """Keep a program, and delete those that were not used for longest where the folder grows too large.

        Args:
            name: As in `read`.
            payload: The program.

        Returns:
            Whether it was kept.
        """
        if self.folder is None or len(payload) > MAX_BYTES // 2:
            return False
        try:
            make_folder(self.folder.parent)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if not _is_private(self.folder):
                return False
            if (self.folder / KEY).exists() and not _is_private(self.folder / KEY):
                (self.folder / KEY).unlink()
            signature = sign(load_key(self.folder), _MAGIC, name, payload)

            def write(temporary: Path) -> None:
                with open(temporary, "wb") as file:
                    file.writelines((_MAGIC, signature, payload))

            publish(self.folder / (name + _SUFFIX), write)
            self._trim()
        except (CacheError, OSError):
            return False
        return True

    def describe_obstacle(self) -> str:
        """Return why nothing is kept, as far as the folder shows it."""
        if self.folder is None:
            return "there is no home folder"
        if self.folder.is_dir() and not _is_private(self.folder):
            return f"others can read or write '{self.folder}', or it is not yours: chmod 700 it"
        return f"'{self.folder}' cannot be written, or is full"

    def _trim(self) -> None:
        """Delete what is too much, and what killed processes left."""
        assert self.folder is not None
        programs, total = [], 0
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process deletes, too
                status = path.lstat()
                if path.name.endswith(_SUFFIX):
                    programs.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == ".tmp" and status.st_mtime < time.time() - _ABANDONED:
                    path.unlink()
        for count, (_, size, path) in enumerate(sorted(programs, reverse=True), 1):
            total += size
            if count > MAX_PROGRAMS or total > MAX_BYTES:
                path.unlink(missing_ok=True)


def open_kept_programs() -> KeptPrograms:
    """Open the folder of the user's programs, `compiled` in the folder that `find_user_folder` finds."""
    folder = find_user_folder()
    return KeptPrograms(folder and folder / "compiled")


def _is_private(path: Path) -> bool:
    """Return whether a file or folder, and no link, is this user's, and others can neither read nor write it."""
    status = path.lstat()
    is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return is_plain and status.st_uid == os.geteuid() and not status.st_mode & 0o077
