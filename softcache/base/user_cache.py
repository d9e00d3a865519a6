"""The folder of softcache in the user's cache folder, and random keys with which files of this user's are signed."""

import hmac
import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from .errors import CacheError
from .files import make_folder, read_regular_file

KEY, KEY_BYTES = "key", 32


def find_user_folder() -> Path | None:
    """Return `softcache` in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache); None where there is no home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path(os.path.expanduser("~")) / ".cache"
    return base / "softcache" if base.is_absolute() else None


def load_key(folder: Path) -> bytes:
    """Read the key of a folder, or make it: one that others could have written is replaced.

    Args:
        folder: Where the key is; it is made where it is missing.

    Raises:
        OSError, CacheError: The folder cannot be written.
    """
    make_folder(folder)
    path = folder / KEY
    with suppress(CacheError):
        key = read_regular_file(folder, KEY, KEY_BYTES)
        if len(key) == KEY_BYTES and not path.stat().st_mode & 0o022:
            return key
    path.unlink(missing_ok=True)
    temporary = path.with_name(f".{KEY}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, os.urandom(KEY_BYTES))
        os.fsync(fd)
    finally:
        os.close(fd)
    with suppress(FileExistsError):  # another process made one just now
        os.link(temporary, path)
    temporary.unlink()
    return read_regular_file(folder, KEY, KEY_BYTES)


def sign(key: bytes, kind: bytes, name: str, payload: bytes | memoryview) -> bytes:
    """Return the signature of a file, HMAC-SHA256: 32 bytes.

    Args:
        key: Of the folder, see `load_key`.
        kind: The first bytes of files of its kind, so that none is taken for one of another kind.
        name: Of the file in the folder, so that none is taken for another one.
        payload: What is signed.
    """
    signature = hmac.new(key, kind + name.encode() + b"\0", sha256)
    signature.update(payload)
    return signature.digest()
