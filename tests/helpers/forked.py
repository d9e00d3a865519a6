"""The process that forks: it loads PyTorch once and runs each command in a child of its own, in 20 ms instead of 4 s.

Started by processes.py; one JSON object a line in and out. A child can have a trap between the command and the file
system: each call that changes a disk has a point before it, one after it, and a write one in its middle.
"""

import builtins
import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import xxhash

Real = Callable[..., Any]
CALLS = ("fsync", "replace", "mkdir", "unlink", "pwrite")  # of os, which the program calls by these names


class Trap:
    """act: kill, stop, fork, or full: what happens at point number at. room: bytes that can still be written."""

    def __init__(self, log: str = "", at: int = 0, act: str = "kill", room: int = -1):
        self.at, self.act, self.room, self.points = at, act, room, 0
        self.real_open = io.open
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644) if log else -1

    def install(self) -> None:
        """From now on, in this process."""
        for name in CALLS:
            setattr(os, name, self._around(name, getattr(os, name)))
        builtins.open = io.open = self._open  # type: ignore[assignment]

    def point(self, when: str, call: str, path: str, to: str = "") -> None:
        """Write down where we are; act if this is the point."""
        self.points += 1
        if self.log >= 0:
            os.write(self.log, (json.dumps(self._facts(when, call, path, to)) + "\n").encode())
        if self.points == self.at:
            getattr(self, f"_{self.act}")()

    def _facts(self, when: str, call: str, path: str, to: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"when": when, "call": call, "path": path, "to": to}
        if os.path.lexists(path):
            facts["inode"] = os.lstat(path).st_ino
        if os.path.isfile(path) and ((when, call) == ("after", "fsync") or (when, call) == ("before", "replace")):
            with self.real_open(path, "rb") as file:
                text = file.read()
            facts["digest"] = xxhash.xxh3_128_hexdigest(text)
            facts["text"] = text.decode() if to.endswith("manifest.json") else ""
        return facts

    def _around(self, name: str, real: Real) -> Real:
        def around(*arguments: Any, **more: Any) -> Any:
            first, *others = arguments
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.path.abspath(first)
            to = os.path.abspath(others[0]) if name == "replace" else ""
            self.point("before", name, path, to)
            if name == "pwrite":
                self.take(len(others[0]))
            found = real(*arguments, **more)
            self.point("after", name, path, to)
            return found

        return around

    def _open(
        self, path: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *rest: Any, **more: Any
    ) -> Any:
        if isinstance(path, int) or not set(mode) & set("wax+"):
            return self.real_open(path, mode, buffering, encoding, *rest, **more)
        self.point("before", "open", os.path.abspath(path))
        file = io.BufferedWriter(Raw(self, path, mode))
        self.point("after", "open", os.path.abspath(path))
        return file if "b" in mode else io.TextIOWrapper(file, encoding, *rest, **more)

    def take(self, count: int) -> int:
        """So many of count bytes find room on the disk. Raises OSError when none does."""
        if self.room < 0 or not count:
            return count
        if not self.room:
            self._full()
        count = min(count, self.room)
        self.room -= count
        return count

    def _full(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _fork(self) -> None:
        """A child that outlives its parent, as a worker that decodes images may; it prints its number."""
        pid = os.fork()
        while pid == 0:
            signal.pause()
        print(f"worker {pid}", flush=True)
        self._stop()


class Raw(io.FileIO):
    """A file whose every write is seen by a trap."""

    def __init__(self, trap: Trap, path: Any, mode: str):
        super().__init__(path, mode.replace("b", "").replace("t", ""))
        self.trap, self.path = trap, os.path.abspath(path)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.trap.point("before", "write", self.path)
        view = view[: self.trap.take(len(view))]
        done = super().write(view[: len(view) // 2]) or 0
        self.trap.point("half", "write", self.path)
        done += super().write(view[done:]) or 0
        self.trap.point("after", "write", self.path)
        return done


def starve(at: int, kind: str) -> None:
    """At its call number at, the teacher asks for more memory than there is."""
    import numpy as np
    import torch

    from softcache.pipeline.models.prepared_model import PreparedModel

    forward, calls = PreparedModel.forward, iter(range(1, 1 << 30))

    def hungry(self: PreparedModel, views: torch.Tensor) -> torch.Tensor:
        if next(calls) == at:
            np.empty(1 << 50, np.uint8) if kind == "numpy" else torch.empty(1 << 50, dtype=torch.uint8)
        answer: torch.Tensor = forward(self, views)
        return answer

    PreparedModel.forward = hungry  # type: ignore[method-assign]


def child(arguments: list[str], cwd: str, output: str, more: dict[str, Any]) -> NoReturn:
    """Run a command; what it says goes to the file said."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    os.chdir(cwd)
    if more.get("program"):
        os.execvp(arguments[0], arguments)
    code = 1
    try:
        if more.get("file_size"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (more["file_size"], more["file_size"]))
        if more.get("unchecked"):
            shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60)
        if more.get("starve"):
            starve(*more["starve"])
        if "trap" in more:
            Trap(**more["trap"]).install()
        from softcache.stages.main import main

        main(arguments)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Fork on demand; tell how a child ended: exit code, signal as a negative number, None where it is stopped."""
    import torch

    commands = (f"softcache.stages.{name}.command" for name in ("check_cache", "student", "teacher_cache", "tune"))
    for name in ("scipy.stats", "sklearn.datasets", *commands):
        import_module(name)

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], os.WUNTRACED)
            answer = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork() or child(**asked)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
