"""The command that was typed, and the commands that continue it."""

import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from shlex import join, quote

from softcache.base.errors import make_printable

# What was typed: of `softcache`, its arguments; of make, the whole command line. Empty where softcache is a library.
_TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
_TYPED_IN_MAKE: ContextVar[tuple[str, ...]] = ContextVar("typed_in_make", default=())


def program_name() -> str:
    """Return how this program was called: `softcache`, or `.venv/bin/python -m softcache`."""
    if Path(sys.argv[0]).name == "softcache":
        return "softcache"
    python, folder = Path(sys.executable), Path.cwd()
    return f"{python.relative_to(folder) if python.is_relative_to(folder) else python} -m softcache"


def remember_typed_command(arguments: Sequence[str]) -> None:
    """Remember the arguments of this command, for the messages that repeat it."""
    _TYPED.set(tuple(arguments))


def remember_make_command(words: Sequence[str]) -> None:
    """Remember the command line of make of which this command is one step."""
    _TYPED_IN_MAKE.set(tuple(words))


def format_typed_command(out: str = "") -> str:
    """Format the command that was typed: to type it again continues what was stopped.

    Args:
        out: the folder that the command works in, named where the command did not name it; "" where that follows from
            the other options.

    Returns:
        The command; `the same call` where softcache is used as a library.
    """
    if _TYPED_IN_MAKE.get() and not out:
        return make_printable(join(_TYPED_IN_MAKE.get()), None)
    command, *options = _TYPED.get() or ("",)
    if not command:
        return "the same call"
    if out and not any(option.partition("=")[0] == "--out" for option in options):
        options = ["--out", out, *options]
    return " ".join([program_name(), command, *(quote(make_printable(option, None)) for option in options)])


def format_continue_command(
    command: str, out: str | Path, arch: str, losses: Sequence[str] = (), data: str = ""
) -> str:
    """Format the command that continues a stopped training.

    Args:
        command: `teacher` or `student`, which train in `out`. A training that is a step of another command, as the
            teacher of `teacher-cache` is, is continued by that command, as it was typed.
        out: the folder of the run.
        arch: its arch.
        losses: its losses, a text for each term.
        data: its data.
    """
    if _TYPED.get()[:1] in ((), (command,)):
        return format_resume_command(command, out, arch, losses, data)
    return format_typed_command()


def format_resume_command(
    command: str, out: str | Path, arch: str = "", losses: Sequence[str] = (), data: str = ""
) -> str:
    """Format `student --resume`, or `teacher --resume`.

    Args:
        command: `teacher` or `student`.
        out: the folder of the run.
        arch: its arch, which is named where it is code of the user.
        losses: its losses, a text for each term, all of which are named where one of them is code of the user.
        data: its data, which are named where code of the user makes them.
    """
    options = ["--resume", "--out", str(out)]
    if arch or losses or data:
        # Not at the top: these load PyTorch, which --help needs not.
        from softcache.data.sources import is_user_dataset
        from softcache.pipeline.losses import is_custom_loss
        from softcache.pipeline.models import is_external_arch

        if is_user_dataset(data):
            options += ["--data", data]
        if is_external_arch(arch):
            options += ["--arch", arch]
        if any(map(is_custom_loss, losses)):
            options += [word for spec in losses for word in ("--loss", spec)]
    return " ".join([program_name(), command, *(quote(make_printable(option, None)) for option in options)])
