"""The current folder as a place of modules: for commands alone."""

import sys
from contextvars import ContextVar
from pathlib import Path

_IS_SEARCHED: ContextVar[bool] = ContextVar("is_searched", default=False)


def search_current_folder() -> None:
    """Let names of modules on this command line mean modules in the current folder, too."""
    _IS_SEARCHED.set(True)


def make_current_folder_importable() -> None:
    """Put the current folder at the front of sys.path, unless it is on it, so that a user's module there is found.

    `python -m softcache` starts with the current folder on the path, the console script `softcache` does not; an
    --arch or --loss must mean the same module under both. The folder stays on the path for the rest of the process:
    the module may import its neighbours when it is called, and worker processes import it once more. As a library,
    softcache leaves sys.path as it is.
    """
    folder = str(Path.cwd())
    if _IS_SEARCHED.get() and folder not in sys.path:
        sys.path.insert(0, folder)
