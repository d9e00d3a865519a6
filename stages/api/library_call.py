"""What a function of the library owes its caller: it prints nothing, and leaves PyTorch's global state as it was."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import torch

from softcache.base.errors import DISK_ERRORS, CacheError, Interrupted, UsageError, unknown_name_error
from softcache.base.progress import ProgressCallback
from softcache.stages.cli.console import report_to
from softcache.stages.cli.options import check_value
from softcache.stages.distributed.ranks import as_single_process

C = TypeVar("C")
# A file system that is full, failing, read-only or not to be written to.
_FILE_ERRORS = (*DISK_ERRORS, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def library_call(progress: bool | ProgressCallback) -> Iterator[None]:
    """Run the code of a command inside a call of the library.

    Lines go to the logger `softcache`. Random generators and the number of threads are afterwards what they were.
    Under torchrun each process makes its call alone: the processes are the caller's, and may not all make it.

    Args:
        progress: As in `report_to`.

    Raises:
        KeyboardInterrupt: On Ctrl-C. The same call goes on from where it was stopped.
        CacheError: A file cannot be written.
    """
    threads = torch.get_num_threads()
    dynamo: Any = sys.modules.get("torch._dynamo")
    limit = dynamo.config.recompile_limit if dynamo else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with as_single_process(), report_to(progress), torch.random.fork_rng(devices):
            yield
    except Interrupted:
        raise KeyboardInterrupt from None
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        raise CacheError(f"'{error.filename}': {error.strerror}" if error.filename else str(error)) from error
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if dynamo:
            dynamo.config.recompile_limit = limit


def make_config(kind: type[C], options: dict[str, Any], **arguments: Any) -> C:
    """Make the options of a command from those of a call.

    Args:
        kind: The class of the options.
        options: {name: value} of what the caller adds, each named as on the command line, with underscores.
        arguments: {name: value} of the call's own arguments; None for one that the caller left out.

    Raises:
        UsageError: There is no such option, or a value is of another type or out of range.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name in options:
        if name in arguments:
            raise UsageError(f"'{name}' is no option of this call, which has an argument for it")
        if name not in known or name in ("json", "resume"):
            raise unknown_name_error("option", name, [n for n in known if n not in ("json", "resume")])
    given = {name: value for name, value in {**arguments, **options}.items() if value is not None}
    return kind(**{name: check_value(known[name], value) for name, value in given.items()})
