"""The ways in which a command ends early. Printed as one line, without a traceback, by `stages`."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """The command asks for something that does not exist or does not fit together. Exit code 2."""


class CacheError(Exception):
    """What lies on disk is damaged, half done, or not what it claims to be. Exit code 1."""


class CacheMismatchError(CacheError):
    """A cache is whole and not the one that is asked for. The message names the fields; a stage adds the command."""


class TrainingStopped(CacheError):
    """A training that is over before its last epoch."""


class DivergedError(TrainingStopped):
    """Its loss or logits are no numbers any more."""


class LockedError(CacheError):
    """Another process is writing there."""


class Interrupted(Exception):
    """Ctrl-C, with how to go on. Exit code 130."""


def is_interrupt(error: BaseException | None) -> bool:
    """Whether it is what a library, or we, made of a Ctrl-C that came in the middle."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def make_printable(text: object, most: int | None = 200) -> str:
    """Text from a file nobody vouches for, as it may reach a terminal: on one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:most])


def unknown_name_error(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is in no table: what was asked, what was probably meant, what there is."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    meant = f" Did you mean '{close[0]}'?" if close else ""
    return UsageError(f"no {kind} '{name}'.{meant} There are: {', '.join(names)}")
