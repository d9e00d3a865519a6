"""Users' own code is imported only where the command line names it: a run or a cache is data, not code."""

from collections.abc import Sequence

from softcache.base.errors import UsageError, make_printable
from softcache.data.sources import is_user_dataset
from softcache.pipeline.losses import is_custom_loss
from softcache.pipeline.models import is_custom_arch, is_external_arch


def require_named_code(recorded: str, explicit: str, owner: str, option: str, command: str) -> None:
    """Check that a command line names the code that a file names, before that code is imported.

    Built-in archs need not be named; an arch `hf:` must, whose folder would be opened.

    Args:
        recorded: The arch in the file, which may come from anyone.
        explicit: The arch on the command line; "" where there is none.
        owner: Whose arch it is, for the message, such as "the run 'runs/s'".
        option: That names it, such as "--arch".
        command: The command line with that option, to be copied.

    Raises:
        UsageError: The arch is code of a user and not named, or another one is named.
    """
    if explicit and explicit != recorded:
        raise UsageError(f"{option} {explicit}, but {owner} is of {make_printable(recorded)}")
    if is_custom_arch(recorded) and not explicit:
        raise _unnamed_error(recorded, owner, command)
    if is_external_arch(recorded) and not explicit:
        raise UsageError(
            f"{owner} names a model on this machine, '{make_printable(recorded)}', and a file alone does not have it"
            f" opened: name it with  {command}"
        )


def require_named_data(recorded: str, explicit: str, owner: str, command: str) -> None:
    """Check that a command line names the code of a dataset that a file names, before that code is imported.

    Args:
        recorded: The data in the file, which may come from anyone.
        explicit: The data on the command line, which replace those of the file; "" where there are none.
        owner: Whose data they are, for the message, such as "the run 'runs/s'".
        command: The command line with --data, to be copied.

    Raises:
        UsageError: The data are made by code of a user, and the command line names none.
    """
    if is_user_dataset(recorded) and not explicit:
        raise _unnamed_error(recorded, owner, command)


def require_named_losses(recorded: Sequence[str], is_explicit: bool, owner: str, command: str) -> None:
    """Check that a command line names the losses that a file names, where one of them is code of a user.

    Args:
        recorded: The losses in the file, which may come from anyone.
        is_explicit: Whether the command line names losses, which are the same as these.
        owner: Whose losses they are, for the message, such as "the run 'runs/s'".
        command: The command line with all of them, to be copied.

    Raises:
        UsageError: A loss is code of a user, and not named.
    """
    own = [spec for spec in recorded if is_custom_loss(spec)]
    if own and not is_explicit:
        raise _unnamed_error(own[0], owner, command)


def _unnamed_error(code: str, owner: str, command: str) -> UsageError:
    return UsageError(
        f"{owner} names code to be imported, '{make_printable(code)}', and a file alone does not run code:"
        f" where you trust that code, name it with  {command}"
    )
