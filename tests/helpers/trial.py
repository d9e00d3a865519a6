"""Run a piece of work in a forked process, so that a crash, a hang or too much memory is a result of the test."""

import contextlib
import ctypes
import gc
import io
import json
import os
import re
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import verify_shard

SECONDS, MEMORY = 2.0, 200 << 20  # the most that reporting an error may take


@dataclass(frozen=True)
class Outcome:
    """The result of an attempt.

    Attributes:
        error_line: text of the CacheError or UsageError that ended it; empty when there was none.
        failure: a traceback, a signal or a hang; empty when there was none.
        value: what the work returned, after a round trip through JSON.
        seconds: of a processor that it took; another program on the machine does not change it.
        extra_memory: peak bytes of memory above those at the start of the process.
    """

    error_line: str
    failure: str
    value: Any
    seconds: float
    extra_memory: int


def attempt(work: Callable[[], Any], limit: float = 20.0) -> Outcome:
    """Call work in a forked child, which is killed after `limit` seconds on the clock."""
    read_end, write_end = os.pipe()
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads; the child uses none of them
        pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _child(work, write_end)
    os.close(write_end)
    text, is_hung = _read_until_end(read_end, start + limit)
    os.close(read_end)
    if is_hung:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    seconds = usage.ru_utime + usage.ru_stime
    if is_hung:
        return Outcome("", f"hangs: more than {limit} s", None, seconds, 0)
    if os.WIFSIGNALED(status) or not text:
        return Outcome("", f"died, status {status}", None, seconds, 0)
    error_line, failure, value, extra_memory = json.loads(text)
    return Outcome(error_line, failure, value, seconds, extra_memory)


def _child(work: Callable[[], Any], write_end: int) -> None:
    """Run the work, write the result as JSON to a pipe and exit. Never returns."""
    error_line = failure = ""
    value = None
    gc.disable()  # a collection would touch, and so copy, the memory shared with the parent
    before = _memory("VmRSS")
    try:
        value = work()
    except (CacheError, UsageError) as error:
        error_line = str(error) or "(no text)"
    except BaseException:
        failure = traceback.format_exc()[-3000:]
    text = json.dumps([error_line, failure, value, _memory("VmHWM") - before])
    with os.fdopen(write_end, "w") as file:
        file.write(text)
    os._exit(0)


def _read_until_end(fd: int, deadline: float) -> tuple[str, bool]:
    """Read a pipe until its end. Returns the text, and whether the deadline passed before the end."""
    blocks: list[bytes] = []
    while True:
        ready = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            return "", True
        block = os.read(fd, 1 << 16)
        if not block:
            return b"".join(blocks).decode(), False
        blocks.append(block)


def _memory(name: str) -> int:
    """Return bytes of memory of this process: VmRSS is now, VmHWM the peak."""
    with open("/proc/self/status", encoding="ascii") as file:
        match = re.search(rf"{name}:\s+([0-9]+) kB", file.read())
    assert match is not None
    return int(match[1]) * 1024


def get_error_line(work: Callable[[], object]) -> str:
    """Return the text of the error that work raises; empty when it raises none."""
    try:
        work()
    except (CacheError, UsageError) as error:
        return str(error) or "(no text)"
    return ""


def read_like_a_student(cache: CacheReader, name: str = "") -> None:
    """Read every row of every draw with its features, or of the one draw to which the shard `name` belongs."""
    selected = {(record.split, record.draw) for record in cache.manifest.shards if record.path == name}
    for split, draw in selected or cache.manifest.iter_views():
        cache.read_targets(split, draw, np.arange(cache.manifest.splits[split]), tuple(cache.manifest.taps))


def read_like_check_cache(cache: CacheReader, name: str = "") -> None:
    """Verify every file, or the file `name` alone."""
    for record in cache.manifest.shards:
        if name in ("", record.path):
            verify_shard(cache, record)
    if name in ("", "head.h5"):
        cache.read_head()


def get_both_error_lines(folder: Path, name: str = "") -> list[str]:
    """Return the errors of reading as a student does and as check-cache does; empty where nothing is wrong."""
    return [
        get_error_line(lambda: read_like_a_student(CacheReader(folder), name)),
        get_error_line(lambda: read_like_check_cache(CacheReader(folder), name)),
    ]


def get_quick_refusals(folder: Path, name: str) -> list[str]:
    """Return the errors of both readers. Both must name the file and stay within the limits of time and memory."""
    outcome = attempt(lambda: get_both_error_lines(folder, name if name.endswith(".h5") else ""), limit=10)
    assert not outcome.failure, outcome.failure
    assert all(name in line for line in outcome.value), outcome.value
    assert outcome.seconds < SECONDS
    assert outcome.extra_memory < MEMORY, f"{outcome.extra_memory / 1e6:.0f} MB"
    return list(outcome.value)


def run_command(*arguments: object) -> tuple[object, str, str]:
    """Run a command. Returns its exit code or the traceback of an unexpected error, standard output and error."""
    from softcache.stages.main import main

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = traceback.format_exc()[-2000:]
    return code, out.getvalue(), err.getvalue()


def check_output(result: tuple[object, str, str]) -> int:
    """Check that the output of a command is printable and has one error line, or none on success; return its code."""
    code, out, err = result
    assert code in (0, 1, 2), code
    assert all(c.isprintable() or c == "\n" for c in out + err), out + err
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == (code != 0), err
    assert isinstance(code, int)
    return code


_IN_ACCESS, _IN_OPEN = 0x1, 0x20


@contextlib.contextmanager
def assert_unopened(folder: Path) -> Iterator[None]:
    """Fail at the end of the context when any process has opened or read a file of this folder during it."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert watch >= 0
    try:
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            assert libc.inotify_add_watch(watch, os.fsencode(path), _IN_ACCESS | _IN_OPEN) >= 0
        yield
        try:
            events = os.read(watch, 1 << 16)
        except BlockingIOError:
            return
        assert not events, f"{folder}: opened or read: {events!r}"
    finally:
        os.close(watch)
