"""One attempt in a process of its own, so that a crash, a hang and a swollen memory are findings and not the end."""

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
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.cache.verification import verify_shard

SECONDS, MEMORY = 2.0, 200 << 20  # that a refusal may take


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt.

    refused: the line with which the program refused, "" when it did not; failed: a traceback, a signal or a hang, ""
    when there was none; value: what the attempt returned, as JSON; seconds; extra: bytes of memory at its height,
    beyond what the process began with.
    """

    refused: str
    failed: str
    value: Any
    seconds: float
    extra: int


def attempt(work: Callable[[], Any], limit: float = 5.0) -> Outcome:
    """Call work in a forked child that is killed after limit seconds."""
    read_end, write_end = os.pipe()
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none of them
        pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _child(work, write_end)
    os.close(write_end)
    said, hung = _all_of(read_end, begun + limit)
    os.close(read_end)
    if hung:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    seconds = time.monotonic() - begun
    if hung:
        return Outcome("", f"hangs: more than {limit} s", None, seconds, 0)
    if os.WIFSIGNALED(status) or not said:
        return Outcome("", f"died, status {status}", None, seconds, 0)
    refused, failed, value, extra = json.loads(said)
    return Outcome(refused, failed, value, seconds, extra)


def _child(work: Callable[[], Any], write_end: int) -> None:
    """Never returns."""
    refused = failed = ""
    value = None
    gc.disable()  # it would touch, and so copy, all that the parent has
    before = _memory("VmRSS")
    try:
        value = work()
    except (CacheError, UsageError) as error:
        refused = str(error) or "(nothing said)"
    except BaseException:
        failed = traceback.format_exc()[-3000:]
    text = json.dumps([refused, failed, value, _memory("VmHWM") - before])
    with os.fdopen(write_end, "w") as file:
        file.write(text)
    os._exit(0)


def _all_of(fd: int, deadline: float) -> tuple[str, bool]:
    """What the child says until it ends, and whether it did not in time."""
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
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(rf"{name}:\s+([0-9]+) kB", file.read())
    assert found is not None
    return int(found[1]) * 1024


def line_of(work: Callable[[], object]) -> str:
    """The line with which something is refused, "" when it is not."""
    try:
        work()
    except (CacheError, UsageError) as error:
        return str(error) or "(nothing said)"
    return ""


def read_like_a_student(cache: Cache, name: str = "") -> None:
    """Every row of every draw, with its features; of the draw that this shard is of, where one is named."""
    of = {(record.split, record.draw) for record in cache.manifest.shards if record.path == name}
    for split, draw in of or cache.manifest.iter_views():
        cache.read_targets(split, draw, np.arange(cache.manifest.splits[split]), tuple(cache.manifest.taps))


def read_like_check_cache(cache: Cache, name: str = "") -> None:
    """Every file, or the one that is named."""
    for record in cache.manifest.shards:
        if name in ("", record.path):
            verify_shard(cache, record)
    if name in ("", "head.h5"):
        cache.read_head()


def both(folder: Path, name: str = "") -> list[str]:
    """What is said to a student, and what check-cache finds, of all or of one file; "" where nothing is wrong."""
    return [
        line_of(lambda: read_like_a_student(Cache(folder), name)),
        line_of(lambda: read_like_check_cache(Cache(folder), name)),
    ]


def refused_quickly(folder: Path, name: str) -> list[str]:
    """The lines with which both readers refuse a cache, which name that file; within the limits of time and memory."""
    found = attempt(lambda: both(folder, name if name.endswith(".h5") else ""), limit=10)
    assert not found.failed, found.failed
    assert all(name in line for line in found.value), found.value
    assert found.seconds < SECONDS
    assert found.extra < MEMORY, f"{found.extra / 1e6:.0f} MB"
    return list(found.value)


def command(*arguments: object) -> tuple[object, str, str]:
    """Exit code, or a traceback in its place, and what a command prints."""
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


def one_line(said: tuple[object, str, str]) -> int:
    """The exit code of a command whose output is as it should be: printable, with one error or none."""
    code, out, err = said
    assert code in (0, 1, 2), code
    assert all(c.isprintable() or c == "\n" for c in out + err), out + err
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == (code != 0), err
    assert isinstance(code, int)
    return code


_IN_ACCESS, _IN_OPEN = 0x1, 0x20


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Fails at the end when any process has opened or read a file of this folder in between."""
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
