"""Whether a folder can be written into, checked before any work is done for it."""

import os
from pathlib import Path

from softcache.base.errors import CacheError, UsageError, make_printable


def check_output_folder(folder: Path) -> None:
    """Check that a folder exists and can be written into, or can be made. Nothing is made.

    Args:
        folder: what --out names.

    Raises:
        UsageError: it is a file, or one of its parents is.
        CacheError: the nearest folder that exists cannot be written into, or the path is one that no file can have.
    """
    name = make_printable(folder)
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        is_folder = existing.is_dir()
    except OSError as error:  # a loop of links
        raise CacheError(f"--out {name}: {error.strerror}") from None
    if not is_folder:
        raise UsageError(f"--out {name}: '{make_printable(existing)}' is a file: choose another --out")
    if any(len(os.fsencode(part)) > 255 for part in folder.parts):
        raise UsageError(f"--out {make_printable(folder, 60)}…: a name has more than 255 bytes: choose a shorter one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CacheError(f"--out {name}: '{make_printable(existing)}' cannot be written into: choose another --out")
