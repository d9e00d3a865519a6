"""The errors that end a command. The commands print them as one line, without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """The command names something that does not exist, or options that do not fit together. Exit code 2."""


class CacheError(Exception):
    """Files are missing, damaged, unfinished or not what their manifest describes. Exit code 1."""


class CacheMismatchError(CacheError):
    """A cache is complete, but it was made from other data or another teacher. The message names the fields."""


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

    Libraries raise errors of their own when Ctrl-C comes in the middle of their work, and so do we.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def make_printable(text: object, max_length: int | None = 200) -> str:
    """Make text from an untrusted file safe for a terminal: one line, no control characters.

    Args:
        text: Any object; its str() is used.
        max_length: Characters to keep; None keeps all.

    Returns:
        The text, with a question mark for every character that is not printable.
    """
    return "".join(c if c.isprintable() else "?" for c in str(text)[:max_length])


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
