"""What a person sees: lines, progress bars and durations."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import click
from tqdm import tqdm

from softcache.stages.distributed.ranks import is_first


class Console:
    """Lines go to standard output, or to standard error when that is kept for one JSON object; of several ranks the
    first alone prints. epoch_lines: a training says each epoch where no line can be drawn again, see showing."""

    def __init__(self, json_only: bool, epoch_lines: bool = True):
        self.json_only, self.epoch_lines = json_only, epoch_lines

    def print(self, line: str = "") -> None:
        """Print a line, above a progress bar that may be running."""
        if not is_first():
            return
        _write(line, file := sys.stderr if self.json_only else sys.stdout)
        file.flush()

    def note(self, line: str) -> None:
        """Print a line of how a work goes on, which no one reads as its result: on standard error."""
        if is_first():
            _write(line, sys.stderr)

    def print_json(self, text: str) -> None:
        """Print the one JSON object."""
        if is_first():
            click.echo(text)


def _write(line: str, file: TextIO) -> None:
    """As tqdm.write, which lets go of its lock even when an interrupt came before it had it, and so makes another
    error of a Ctrl-C: of 135 of 1,500 that came within 50 ms of the first epoch's end, where it makes the lock."""
    with tqdm.get_lock():
        tqdm.write(line, file=file, nolock=True)


def progress_bar(total: int, what: str, unit: str, scale: bool = False) -> "tqdm[Any]":
    """A progress bar on standard error that appears after a second; rare lines where that is no terminal."""
    quick = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=scale,
        delay=1 if is_first() else 1e9,
        mininterval=0.2 if quick else 10,
        dynamic_ncols=quick,
        leave=False,
    )


def progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """The same items, counted on a progress bar."""
    with progress_bar(total, what, "") as shown:
        for item in items:
            yield item
            shown.update()


def format_duration(seconds: float) -> str:
    """`17 ms`, `45 s`, `12 min`, `2 h 10 min`."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_clock(seconds: float) -> str:
    """`0:12`, `12:05`, `2:10:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_ = divmod(minutes, 60)
    return f"{hours}:{minutes_:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LongWorkNotice:
    """Says once, after the first steps, that a work will take long."""

    def __init__(self, console: Console, what: str, total: int, advice: str):
        self.console, self.what, self.total, self.advice = console, what, total, advice
        self.started: float | None = None
        self.first = 0
        self.is_printed = False

    def update(self, done: int) -> None:
        """Call after each step with the number of steps that are done."""
        if self.is_printed:
            return
        now = time.monotonic()
        if self.started is None:  # the first step also compiles, allocates and warms up: not counted
            self.started, self.first = now, done
        elif now - self.started > 3:
            left = (now - self.started) / (done - self.first) * (self.total - done)
            self.is_printed = True
            if left > 120:
                self.console.print(f"{self.what} will take about {format_duration(left)} on this machine{self.advice}")
