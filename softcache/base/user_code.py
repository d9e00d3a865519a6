"""Errors inside a user's own code: where in their files an exception was raised, in one line.

Code of the user runs in four places: a module is imported and a factory in it called, a network runs inside PyTorch, a
loss is called, and a dataset returns its items. A frame of a traceback is the user's where PyTorch or one of our
modules in _CALLERS called it, and it is neither ours, nor PyTorch's, nor of the standard library.
"""

import errno
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from softcache.base.errors import UsageError, make_printable

# The modules that import a user's code and call it.
_CALLERS = (
    "softcache.base.user_modules",
    "softcache.pipeline.models.other_frameworks.callable_networks",
    "softcache.pipeline.models.custom_networks",
    "softcache.pipeline.losses.custom",
    "softcache.pipeline.losses.custom_specs",
    "softcache.data.images.dataset_items",
    "softcache.data.sources.user_dataset",
)
_LIBRARY_FOLDERS = ("site-packages", "dist-packages")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
_MAX_LENGTH = 300  # characters of an exception's message


@contextmanager
def user_code(task: str, location: str = "", advice: Callable[[BaseException], str] | None = None) -> Iterator[None]:
    """Turn an error of a user's code into one line.

    Args:
        task: What is done, such as "the factory of --arch 'nets:make' failed", the beginning of the line.
        location: Where the user's code is, for an error without a frame of it.
        advice: What to append to the line for an error, beginning with a colon or a semicolon.

    Raises:
        UsageError: Any exception in the block, and SystemExit; its cause is that exception. An interrupt, a lack of
            memory and our own errors pass.
    """
    try:
        yield
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        if type(error).__module__.startswith("softcache.") or is_out_of_memory(error):
            raise
        text = f"{task}: {describe_error(error, location)}"
        raise UsageError(text + (advice(error) if advice else "")) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory cannot be allocated, on a CPU or a GPU."""
    text = str(error)
    is_error_of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return (
        isinstance(error, MemoryError)
        or is_error_of_system
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def describe_error(error: BaseException, location: str = "") -> str:
    """Describe an exception in one line: type, message, and file, line and function of the user's code.

    Args:
        error: The exception.
        location: Where the user's code is, for an exception whose traceback has no frame of it.
    """
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = make_printable(lines[0], _MAX_LENGTH) if lines else ""
    place = locate_user_code(error) or location
    return f"{type(error).__name__}{f': {text}' if text else ''}{f' ({place})' if place else ''}"


def locate_user_code(error: BaseException) -> str:
    """Find the place of a user's code at which an exception was raised.

    Returns:
        `nets.py:12, in forward`: the innermost frame in the user's own files, or else in a library that they call;
        "" where the traceback has no frame of a user's code.
    """
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith(_STANDARD_LIBRARY):
        return f"{_shorten_path(error.filename)}:{error.lineno}"
    frames = list(_find_user_frames(error))
    own = [frame for frame in frames if not any(folder in frame[0].f_code.co_filename for folder in _LIBRARY_FOLDERS)]
    if not frames:
        return ""
    frame, line = (own or frames)[-1]
    function = frame.f_code.co_name
    place = f"{_shorten_path(frame.f_code.co_filename)}:{line}"
    return place if function.startswith("<") else f"{place}, in {function}"


def locate_definition(value: Any) -> str:
    """Return `nets.py:3`, where a function or the constructor of a class is defined, or ""."""
    function = vars(value).get("__init__") if isinstance(value, type) else value
    code = getattr(function, "__code__", None)
    return f"{_shorten_path(code.co_filename)}:{code.co_firstlineno}" if code else ""


def _find_user_frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield the user's frames of a traceback and their lines, the outermost first."""
    is_users = False
    for frame, line in traceback.walk_tb(error.__traceback__):
        name, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
        package = name.partition(".")[0]
        if package in ("torch", "softcache"):
            is_users = package == "torch" or name in _CALLERS
        elif is_users and not _is_standard(file):
            yield frame, line


def _is_standard(file: str) -> bool:
    is_library = any(folder in file for folder in _LIBRARY_FOLDERS)
    return file.startswith("<") or (file.startswith(_STANDARD_LIBRARY) and not is_library)


def _shorten_path(file: str) -> str:
    """Return a path relative to the current folder where it is inside it."""
    path = Path(file)
    try:
        return make_printable(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    except OSError:  # the current folder was removed
        return make_printable(path)
