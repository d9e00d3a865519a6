"""Standard output and standard error of a command, which may be closed, full, or read by a program that ends first."""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TextIO, cast

_OUTPUT: ContextVar["TolerantStream | None"] = ContextVar("output", default=None)  # of the command that runs
_READER_GONE = (errno.EPIPE, errno.EBADF, errno.ECONNRESET)


class TolerantStream:
    """A text stream that drops what can no longer be written, so that a command goes on without its reader.

    Everything else is as in the stream itself.

    Args:
        stream: The stream.

    Attributes:
        error: Why a write failed; None while none has.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write text. A character that the stream's encoding lacks becomes a question mark."""
        try:
            if self.error is None:
                self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, which have their line ends."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            if self.error is None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: OSError | ValueError) -> None:
        """Drop everything from now on; Python's own flush at the end then succeeds as well."""
        self.error = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        with suppress(OSError, ValueError):
            fd = os.open(os.devnull, os.O_WRONLY)
            os.dup2(fd, self._stream.fileno())
            os.close(fd)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerate_closed_streams() -> Iterator[None]:
    """Let a command print to standard streams that are closed, or whose reader has ended.

    A descriptor 0, 1 or 2 that is closed gets the null device: otherwise it would be given to the next file that is
    opened, and what a library prints would go into that file.
    """
    _open_missing_descriptors()
    before = sys.stdout, sys.stderr
    output, errors = TolerantStream(_or_null(sys.stdout)), TolerantStream(_or_null(sys.stderr))
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    token = _OUTPUT.set(output)
    try:
        yield
    finally:
        _OUTPUT.reset(token)
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


def reserve_output() -> None:
    """Keep standard output for `print_result`: what else is printed, such as by a user's network, goes elsewhere.

    Until the command ends, it goes to standard error. Outside a command nothing is changed.
    """
    if _OUTPUT.get() is not None:
        sys.stdout = sys.stderr


def print_result(text: str) -> None:
    """Print a line on the standard output of the command, also where it is reserved."""
    print(text, file=cast(TextIO, _OUTPUT.get() or sys.stdout), flush=True)


def check_output() -> None:
    """Raise OSError when standard output is incomplete, for another reason than that nobody reads it: a full disk."""
    output = _OUTPUT.get() or sys.stdout
    output.flush()
    error = getattr(output, "error", None)
    if isinstance(error, OSError) and error.errno not in _READER_GONE:
        raise OSError(error.errno, error.strerror, "standard output")


def _or_null(stream: TextIO | None) -> TextIO:
    """Return a stream, or one to the null device where Python found its descriptor closed."""
    return open(os.devnull, "w", encoding="utf-8") if stream is None else stream


def _open_missing_descriptors() -> None:
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free descriptor, which is fd
