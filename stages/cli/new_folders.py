"""The folders of commands that were given no --out: runs/NAME-1, runs/NAME-2 …"""

from contextlib import suppress
from itertools import count
from pathlib import Path

from softcache.base.files import make_folder

_made: list[Path] = []  # by this command, the deepest last


def make_new_folder(name: str) -> Path:
    """Make the first of the folders runs/name-1, runs/name-2 … that does not exist, and return its path.

    Making it is one call of the system: of two commands that are started at once, each gets a folder of its own. While
    it is empty, `remove_unused_folders` removes it.
    """
    parent = Path("runs")
    if not parent.is_dir():
        make_folder(parent)
        _made.append(parent.absolute())
    for number in count(1):
        path = parent / f"{name}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        _made.append(path.absolute())
        return path
    raise AssertionError("count ends")  # for the type checker


def remove_unused_folders() -> None:
    """Remove the folders of `make_new_folder` that are empty: their command ended before it wrote anything."""
    while _made:
        with suppress(OSError):  # it is not empty
            _made.pop().rmdir()
