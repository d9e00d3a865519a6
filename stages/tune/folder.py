"""The folder of a search: the record of its settings, and the locks of the processes that work in it."""

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
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.runs.folder import add_new_options, read_json

DATABASE = "study.db"
_SEARCH = "search.json"  # {mark: identifier of the folder, begun: settings of the search}


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Check that a search can be started or continued in a folder.

    Args:
        folder: the folder, which need not exist.
        settings: those of the search.

    Raises:
        CacheError: when it holds another search.
        UsageError: when it holds something else, or its path cannot be that of a database.
    """
    if "?" in str(folder.resolve()):
        raise UsageError(f"--out {folder}: the path of a database must not contain '?'")
    if (folder / _SEARCH).exists():
        record = read_json(folder / _SEARCH, {"mark", "begun"})
        return check_same_search(record["begun"], settings, f"'{folder}'")
    if folder.exists() and not (folder.is_dir() and all(_is_left_by_killed_start(path) for path in folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is not the folder of a search: choose another --out")


def _is_left_by_killed_start(path: Path) -> bool:
    """Whether a file is one that exists before search.json does, as when a process is killed at its start."""
    return path.name.startswith((f".{_SEARCH}.", LOCK, DATABASE))


def find_unfinished_searches(folder: Path, settings: dict[str, Any]) -> list[Path]:
    """Return the folders of the same search that was stopped, among those named like `folder` up to the number."""
    unfinished = []
    for path in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/{_SEARCH}")):
        with suppress(CacheError):  # a damaged record is an error only for the command that continues the search
            if (
                not _list_differences(read_json(path).get("begun"), settings)
                and not (path.parent / "tune.json").exists()
            ):
                unfinished.append(path.parent)
    return unfinished


def start_search(folder: Path, settings: dict[str, Any]) -> str:
    """Make the folder of a search, or continue in it.

    Args:
        folder: the folder.
        settings: those of the search.

    Returns:
        The identifier of the folder.

    Raises:
        CacheError: when the folder holds another search.
    """
    path = folder / _SEARCH
    make_folder(folder)
    with lock_search(folder):
        remove_stale_files(folder, (_SEARCH, "tune.json", "tune.png"))
        if not path.exists():
            publish_json(path, {"mark": uuid4().hex, "begun": settings})
        record = read_json(path, {"mark", "begun"})
    check_same_search(record["begun"], settings, f"'{folder}'")
    return str(record["mark"])


def format_lock_name(slot: int) -> str:
    """Return the name of the lock that a process holds while it trains the trial of a slot."""
    return f".trial-{slot:04d}.lock"


def clean_up(folder: Path) -> None:
    """Remove the locks that killed processes left of trials that nobody trains again: finished and pruned ones."""
    for path in [*folder.glob(".trial-*.lock"), *folder.glob(f"trial-*/{LOCK}")]:
        with suppress(LockedError), hold_lock(path.parent, path.name):
            pass


def check_same_search(recorded: Any, settings: dict[str, Any], place: str) -> None:
    """Compare the recorded settings of a search with those of this command.

    Args:
        recorded: the settings in a folder or study.
        settings: those of the command.
        place: what holds the record, for the message: a folder in quotes, or a study.

    Raises:
        CacheError: when they differ, with the first differences.
    """
    if differences := _list_differences(recorded, settings):
        option = "--out" if place.startswith("'") else "--study"
        raise CacheError(
            f"{place} holds a search with other settings ({'; '.join(differences[:4])}): choose another {option}"
        )


def _list_differences(recorded: Any, settings: dict[str, Any]) -> list[str]:
    """List the settings that differ; an option that is newer than the record has its default there."""
    if isinstance(recorded, dict):
        defaults = add_new_options({}, StudentConfig)
        recorded = {name: defaults[name] for name in settings if name in defaults} | recorded
    return [f"{name} {old} there, {new} here" for name, old, new in find_differences(recorded, settings)]


@contextmanager
def lock_search(folder: Path) -> Iterator[None]:
    """Hold the lock of a search's folder. Waits for another process that holds it, which is for a moment only."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock(folder))
                break
            except LockedError:
                time.sleep(0.05)
        yield
