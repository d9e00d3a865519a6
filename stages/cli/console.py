"""What a command prints: lines, progress bars and durations."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

from tqdm import tqdm

from softcache.base.errors import make_printable
from softcache.base.progress import ProgressCallback
from softcache.stages.distributed.ranks import is_first

from .openmp import describe_waiting
from .streams import print_result, reserve_output

# Where lines and progress go: True for standard output and error, as in a command; False for the logger `softcache`;
# a function of (text, done, total) gets the progress, and the logger the lines.
_SHOWN: ContextVar[bool | ProgressCallback] = ContextVar("shown", default=True)
_LOGGER = logging.getLogger("softcache")


@contextmanager
def report_to(progress: bool | ProgressCallback) -> Iterator[None]:
    """Send lines and progress elsewhere, where softcache is used as a library.

    Args:
        progress: False to print nothing: lines go to the logger `softcache`. True to print as a command does, on
            standard error. A function of (text, done, total) to be called with the progress of each long work.
    """
    token = _SHOWN.set(progress)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def is_shown() -> bool:
    """Return whether lines and progress bars are printed."""
    return _SHOWN.get() is True


class Console:
    """Prints for a command. Under torchrun the first rank alone prints.

    Args:
        json_only: standard output is for one JSON object: lines go to standard error.
        epoch_lines: print a line for each epoch of a training where standard error is no terminal.
    """

    def __init__(self, json_only: bool, epoch_lines: bool = True):
        self.json_only, self.epoch_lines = json_only, epoch_lines
        if json_only:
            reserve_output()

    @staticmethod
    def for_library() -> "Console":
        """Return a console whose lines never go to standard output, see `report_to`."""
        console = Console(json_only=False)
        console.json_only = True
        return console

    def print(self, line: str = "") -> None:
        """Print a line, above a progress bar that may be running. Control characters in names become `?`."""
        if not is_shown():
            _LOGGER.info(make_printable(line, None))
        elif is_first():
            file = sys.stderr if self.json_only else sys.stdout
            _write(line, file)
            file.flush()

    def note(self, line: str) -> None:
        """Print a line about progress, which is no part of the result, on standard error."""
        if not is_shown():
            _LOGGER.info(make_printable(line, None))
        elif is_first():
            _write(line, sys.stderr)

    def print_json(self, text: str) -> None:
        """Print the one JSON object."""
        if is_first():
            print_result(text)


def _write(line: str, file: TextIO) -> None:
    """Write a line as tqdm.write does, but safe from an interrupt, and from control characters of a terminal.

    tqdm.write releases its lock even when an interrupt came before it had acquired it, and turns Ctrl-C into another
    error: 135 times of 1,500 within 50 ms of the end of the first epoch, where it creates the lock.
    """
    with tqdm.get_lock():
        tqdm.write(make_printable(line, None), file=file, nolock=True)


class CallbackBar:
    """What takes the place of a progress bar where nothing is printed: it calls the function of `report_to`, if any.

    Args:
        total: number of units.
        description: of the work.
        done: units that are done already.
    """

    def __init__(self, total: int, description: str, done: int = 0):
        self.total, self.description, self.done = total, description, done
        self.callback = _SHOWN.get()

    def update(self, n: float = 1) -> None:
        """Count n units."""
        self.done += int(n)
        if callable(self.callback):
            self.callback(self.description, self.done, self.total)

    def __enter__(self) -> "CallbackBar":
        return self

    def __exit__(self, *_error: object) -> None:
        pass


def progress_bar(total: int, description: str, unit: str, scale: bool = False) -> "tqdm[Any] | CallbackBar":
    """Return a progress bar on standard error.

    It appears after a second; where standard error is no terminal it prints a line every ten seconds.

    Args:
        total: number of units.
        description: of the work.
        unit: name of a unit.
        scale: print large numbers with k, M or G.
    """
    if not is_shown():
        return CallbackBar(total, description)
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=make_printable(description),
        unit=unit,
        unit_scale=scale,
        delay=1 if is_first() else 1e9,
        mininterval=0.2 if terminal else 10,
        dynamic_ncols=terminal,
        leave=False,
    )


def progress(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
    """Yield the items and count them on a progress bar."""
    with progress_bar(total, description, "") as bar:
        for item in items:
            yield item
            bar.update()


def format_duration(seconds: float) -> str:
    """Format seconds as `17 ms`, `45 s`, `12 min` or `2 h 10 min`."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_clock(seconds: float) -> str:
    """Format seconds as `0:12`, `12:05` or `2:10:00`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class LongWorkNotice:
    """Prints once, a few seconds after the first step, that a work will take more than two minutes.

    Args:
        console: prints the line.
        work: what takes long, such as "the student".
        total: number of steps.
        advice: what to do about it, appended to the line.
    """

    def __init__(self, console: Console, work: str, total: int, advice: str):
        self.console, self.work, self.total, self.advice = console, work, total, advice
        self.started: float | None = None
        self.first = 0
        self.is_printed = False

    def update(self, steps: int) -> None:
        """Call after each step with the number of steps that are done."""
        if self.is_printed:
            return
        now = time.monotonic()
        if self.started is None:  # the first step also compiles, allocates and warms up: not counted
            self.started, self.first = now, steps
        elif now - self.started > 3:
            remaining = (now - self.started) / (steps - self.first) * (self.total - steps)
            self.is_printed = True
            if remaining > 120:
                duration = format_duration(remaining)
                chosen = describe_waiting(only_set_here=True)
                waiting = f"; CPU threads that wait soon sleep ({chosen})" if chosen else ""
                self.console.print(f"{self.work} will take about {duration} on this machine{self.advice}{waiting}")
