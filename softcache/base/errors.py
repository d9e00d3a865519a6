"""The errors that end a command. The commands print them as one line, without a traceback."""

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

# A disk or a quota that is full, a limit on the size of a file, and a disk that fails.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class UsageError(Exception):
    """A call or command names something that does not exist, or arguments that do not fit together: exit code 2."""


class CacheError(Exception):
    """Files or data are missing, damaged, unfinished or not what their manifest describes: exit code 1."""


class CacheMismatchError(CacheError):
    """A cache is complete, but it was made from other data or another teacher. The message names the fields."""


class LostRankError(CacheError):
    """Another process of the command has ended or cannot be reached; an interrupt that was its consequence is none."""


class UnreadableImageError(CacheError):
    """An image file cannot be decoded, or not without loss.

    Attributes:
        path: The file.
        reason: What is wrong with it; the message is "the image PATH REASON".
    """

    def __init__(self, path: object, reason: str):
        super().__init__(f"the image {make_printable(path, None)} {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle path and reason, of which a process makes the same error again."""
        return UnreadableImageError, (self.path, self.reason)


class TrainingStopped(CacheError):
    """A training ended before its last epoch."""


class DivergedError(TrainingStopped):
    """The loss or the logits of a training are no longer finite."""


class LockedError(CacheError):
    """Another process is writing to the same folder."""


class Interrupted(Exception):
    """Ctrl-C, with the command that goes on from here. Exit code 130."""


def is_interrupt(error: BaseException | None) -> bool:
    """Return whether an error is a KeyboardInterrupt, or was raised while one was being handled.

    Libraries raise errors of their own when Ctrl-C comes in the middle of their work, and so do we. PyTorch's C++ code
    keeps nothing of it but the name, in the text of a RuntimeError.
    """
    return any(
        isinstance(cause, KeyboardInterrupt)
        or (isinstance(cause, RuntimeError) and str(cause).startswith("KeyboardInterrupt"))
        for cause in _list_causes(error)
    )


def find_disk_error(error: BaseException | None) -> OSError | None:
    """Return the error of a full or failing disk that is behind an error, or None.

    Libraries raise errors of their own for it. PyTorch raises a RuntimeError whose context is the OSError, HDF5 an
    OSError without a number whose text has it, SQLite an error with a text alone.

    Args:
        error: Any error.

    Returns:
        An OSError with one of the numbers in DISK_ERRORS, and with a file name where that is known.
    """
    for cause in _list_causes(error):
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return cause
        text = str(cause)
        for number in DISK_ERRORS:
            name = os.strerror(number)
            if name in text or re.search(rf"errno\W*{number}\b", text, re.IGNORECASE):
                return OSError(number, name)
        if "database or disk is full" in text:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def is_worker_failure(error: BaseException) -> bool:
    """Return whether an error is PyTorch's for a worker process that was killed, or that ended by itself.

    PyTorch raises it in the main thread at whatever that executes, from the handler of a signal.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def describe_worker_failure(reason: str) -> str:
    """Return the line for worker processes that cannot go on.

    Args:
        reason: What happened, in the words of PyTorch or of the system.
    """
    return (
        f"the worker processes that render images cannot go on ({make_printable(reason.strip(), 160)}): too little"
        " memory, or too little shared memory in /dev/shm. Render with fewer or without workers (--workers 0), or give"
        " a container more (docker run --shm-size=2g)"
    )


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the error during whose handling it was raised, and theirs."""
    pending, seen = [error], set[int]()
    while pending:
        cause = pending.pop(0)
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            pending += [cause.__cause__, cause.__context__]


def make_printable(text: object, max_length: int | None = 200) -> str:
    """Make text from an untrusted file safe for a terminal: one line, no control characters.

    Args:
        text: Any object; its str() is used.
        max_length: Characters to keep; None keeps all.

    Returns:
        The text, with a question mark for every character that is not printable.
    """
    return "".join(c if c.isprintable() else "?" for c in str(text)[:max_length])


def unknown_model_error(library: str, name: str, names: Sequence[str], listing: str) -> UsageError:
    """Make the error for a model that a library does not have, with the most similar of its many names.

    Args:
        library: Such as "timm".
        name: The unknown name; a tag after a dot is not compared.
        names: All names.
        listing: The call that lists them, for the message.
    """
    similar = get_close_matches(name.partition(".")[0], names, n=6, cutoff=0.5)
    hint = f" Did you mean '{similar[0]}'?" if similar else ""
    others = f" Others: {', '.join(similar[1:])}." if similar[1:] else ""
    return UsageError(
        f"no {library} model '{make_printable(name, 80)}'.{hint}{others} {listing} lists all {len(names)}"
    )


def unknown_name_error(kind: str, name: str, known: Iterable[str], owner: str = "") -> UsageError:
    """Make the error for a name that is not in a table, with the most similar name and all names that are.

    Args:
        kind: What the name stands for, such as "arch".
        name: The unknown name.
        known: The names that exist.
        owner: What the name belongs to, such as "loss 'kd'"; "" where it belongs to nothing.
    """
    names = sorted(known)
    similar = get_close_matches(name, names, n=1)
    suggestion = f" Did you mean '{similar[0]}'?" if similar else ""
    subject = f"{kind} '{name}' of {owner}" if owner else f"{kind} '{name}'"
    return UsageError(f"no {subject}.{suggestion} There are: {', '.join(names)}")
