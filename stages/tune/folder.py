"""The folder of a search: what it was begun with, its mark, and whose it is for a moment."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from softcache.base.errors import CacheError, LockedError, UsageError
from softcache.base.files import make_folder, publish_json, remove_stale_files
from softcache.base.lock import LOCK, hold_lock
from softcache.pipeline.cache.identity import find_differences
from softcache.stages.runs.folder import read_json

DATABASE = "study.db"
_SEARCH = "search.json"


def check_folder(folder: Path, begun: dict[str, Any]) -> None:
    """Raise UsageError for a folder that holds something else, CacheError for one of another search."""
    if "?" in str(folder.resolve()):
        raise UsageError(f"--out {folder}: the path of a database has no '?'")
    if (folder / _SEARCH).exists():
        return check_same_search(read_json(folder / _SEARCH, {"mark", "begun"})["begun"], begun, f"'{folder}'")
    if folder.exists() and not (folder.is_dir() and all(_left_over(path) for path in folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is no search: choose another --out")


def find_unfinished_searches(folder: Path, begun: dict[str, Any]) -> list[Path]:
    """The same search, stopped, in other folders beside one whose name was chosen for this one."""
    found = []
    for path in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/{_SEARCH}")):
        with suppress(CacheError):  # damaged: that is for those who go on with it
            if read_json(path).get("begun") == begun and not (path.parent / "tune.json").exists():
                found.append(path.parent)
    return found


def _left_over(path: Path) -> bool:
    """Whether a process that was killed before it began a search left this."""
    return path.name.startswith((f".{_SEARCH}.", LOCK, DATABASE))


def start_search(folder: Path, begun: dict[str, Any]) -> str:
    """Make the folder of a search, or go on in it; its mark. Raises CacheError when it was begun otherwise."""
    path = folder / _SEARCH
    make_folder(folder)
    with lock_search(folder):
        remove_stale_files(folder, (_SEARCH, "tune.json", "tune.png"))
        if not path.exists():
            publish_json(path, {"mark": uuid4().hex, "begun": begun})
        record = read_json(path, {"mark", "begun"})
    check_same_search(record["begun"], begun, f"'{folder}'")
    return str(record["mark"])


def trial_lock(slot: int) -> str:
    """The name by which a process holds a trial of this folder."""
    return f".trial-{slot:04d}.lock"


def clean_up(folder: Path) -> None:
    """Remove the locks that killed processes left, of trials that were over or had only to be pruned."""
    for path in [*folder.glob(".trial-*.lock"), *folder.glob(f"trial-*/{LOCK}")]:
        with suppress(LockedError), hold_lock(path.parent, path.name):
            pass


def check_same_search(theirs: Any, mine: dict[str, Any], what: str) -> None:
    """Raise CacheError, naming what differs, when a search was begun otherwise than it is asked for now."""
    if differ := [f"{n} {a} there, {b} asked" for n, a, b in find_differences(theirs, mine)]:
        other = "another --out" if what.startswith("'") else "another --study"
        raise CacheError(f"{what} was begun otherwise ({'; '.join(differ[:4])}): choose {other}")


@contextmanager
def lock_search(folder: Path) -> Iterator[None]:
    """Hold a search's folder for a moment; other processes of it are done with it soon."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock(folder))
                break
            except LockedError:
                time.sleep(0.05)
        yield
