"""How a command ends: an error gets its line and its exit code, whatever raised it."""

import errno
import sys
import traceback
from collections.abc import Callable

import click

from softcache.stages.distributed.ranks import reports_errors

from .new_folders import remove_unused_folders
from .options import Invocation
from .streams import check_output, tolerate_closed_streams


def run_command(call: Callable[[], object], invocation: Invocation | None = None) -> None:
    """Call a function; an error ends the process with its line and its exit code, as `main.main` describes.

    Args:
        call: Runs the command.
        invocation: What its --traceback sets.
    """
    with tolerate_closed_streams():
        try:
            _call_or_exit(call, invocation or Invocation())
        finally:
            remove_unused_folders()


def _call_or_exit(call: Callable[[], object], invocation: Invocation) -> None:
    """Call a function; print its error and exit with the error's code, see `main.main`."""
    try:
        call()
        check_output()
        return
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        if reports_errors():
            _print_traceback(invocation)
            error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        if reports_errors():
            _print_traceback(invocation)
            click.echo("Stopped.", err=True)
        sys.exit(130)
    except (Exception, SystemExit) as error:
        line, code = _format_error(error)
        if not code and (reports_errors() or isinstance(error, SystemExit)):
            raise
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in line)  # it may quote a hostile file
        if reports_errors():
            _print_traceback(invocation)
            click.echo(f"Error: {text}", err=True)
        sys.exit(code or 1)


def _print_traceback(invocation: Invocation) -> None:
    """Print the traceback of the current error with --traceback, with those of the errors that it came from."""
    if invocation.show_traceback:
        click.echo(traceback.format_exc(), err=True)


def _format_error(error: Exception | SystemExit) -> tuple[str, int]:
    """Return what to print and the exit code; code 0 for an error of this program."""
    from softcache.base.errors import (
        CacheError,
        Interrupted,
        LostRankError,
        UsageError,
        describe_worker_failure,
        find_disk_error,
        is_interrupt,
        is_worker_failure,
    )
    from softcache.base.user_code import describe_error, is_out_of_memory, locate_user_code

    if isinstance(error, Interrupted):
        return str(error), 130
    if isinstance(error, LostRankError):
        return str(error), 1
    if is_interrupt(error):
        return "stopped", 130
    for kind, code in ((CacheError, 1), (UsageError, 2)):
        if isinstance(error, kind):
            return str(error), code
    if is_worker_failure(error):
        return describe_worker_failure(str(error)), 1
    if disk_error := find_disk_error(error):
        return _format_disk_error(disk_error), 1
    if is_out_of_memory(error):
        return "out of memory: what was finished is kept. A smaller --batch-size takes less", 1
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"--compile: the network cannot be compiled here ({why[:120]}): leave it out", 1
    if locate_user_code(error):
        return f"your network failed: {describe_error(error)}. --traceback shows where it was called", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'while writing'}", 1
    return "", 0


def _format_disk_error(error: OSError) -> str:
    """Return the line for a disk that is full or fails: which file, and how to go on."""
    remedy = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some of the quota",
        errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
        errno.EIO: "check the disk",
    }[error.errno or errno.EIO]
    return (
        f"{error.strerror}: {error.filename or 'while writing'}. What was finished is kept: {remedy}, then start the"
        " same command again (a training that was started: with --resume --out FOLDER)"
    )
