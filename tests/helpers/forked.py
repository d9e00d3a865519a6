"""A server that loads PyTorch once and forks a child for each command, which takes 20 ms instead of 4 s.

processes.py starts it; requests and replies are JSON objects, one a line. A child can have a trap between the command
and the file system. Every call that changes a disk has a point before it and one after it, a write also one halfway.
"""

import builtins
import errno
import gc
import io
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import xxhash

Real = Callable[..., Any]
CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CALLS = ("fsync", "replace", "mkdir", "unlink", "pwrite")  # of os, which the program calls by these names


class Trap:
    """Acts at one point of the calls that change a disk, and logs all points.

    Args:
        log: file for the points, a JSON object a line; none for an empty name.
        at: number of the point, from 1.
        act: what happens there: kill, stop, fork or full (no space left).
        room: bytes that can be written before the disk is full; -1 for no limit.
    """

    def __init__(self, log: str = "", at: int = 0, act: str = "kill", room: int = -1):
        self.at, self.act, self.room, self.points = at, act, room, 0
        self.real_open = io.open
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644) if log else -1

    def install(self) -> None:
        """Wrap the calls of this process."""
        for name in CALLS:
            setattr(os, name, self._around(name, getattr(os, name)))
        builtins.open = io.open = self._open  # type: ignore[assignment]

    def point(self, when: str, call: str, path: str, to: str = "") -> None:
        """Log a point, and act if it is the one."""
        self.points += 1
        if self.log >= 0:
            os.write(self.log, (json.dumps(self._describe(when, call, path, to)) + "\n").encode())
        if self.points == self.at:
            getattr(self, f"_{self.act}")()

    def _describe(self, when: str, call: str, path: str, to: str) -> dict[str, Any]:
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
        def call(*arguments: Any, **more: Any) -> Any:
            first, *others = arguments
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.path.abspath(first)
            to = os.path.abspath(others[0]) if name == "replace" else ""
            self.point("before", name, path, to)
            if name == "pwrite":
                self.take(len(others[0]))
            result = real(*arguments, **more)
            self.point("after", name, path, to)
            return result

        return call

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
        """Return how many of `count` bytes can be written. Raises OSError when none can."""
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
        """Fork a child that outlives its parent, as a decoding worker may; print its process id."""
        pid = os.fork()
        while pid == 0:
            signal.pause()
        print(f"worker {pid}", flush=True)
        self._stop()


class Raw(io.FileIO):
    """A file whose writes pass a trap."""

    def __init__(self, trap: Trap, path: Any, mode: str):
        super().__init__(path, mode.replace("b", "").replace("t", ""))
        self.trap, self.path = trap, os.path.abspath(path)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.trap.point("before", "write", self.path)
        view = view[: self.trap.take(len(view))]
        written = super().write(view[: len(view) // 2]) or 0
        self.trap.point("half", "write", self.path)
        written += super().write(view[written:]) or 0
        self.trap.point("after", "write", self.path)
        return written


def exhaust_memory(at: int, kind: str) -> None:
    """Make the teacher allocate more memory than there is, in its forward call number `at`, by numpy or torch."""
    import numpy as np
    import torch

    from softcache.pipeline.models.prepared_model import PreparedModel

    forward, calls = PreparedModel.forward, iter(range(1, 1 << 30))

    def forward_or_fail(self: PreparedModel, views: torch.Tensor) -> torch.Tensor:
        if next(calls) == at:
            np.empty(1 << 50, np.uint8) if kind == "numpy" else torch.empty(1 << 50, dtype=torch.uint8)
        logits: torch.Tensor = forward(self, views)
        return logits

    PreparedModel.forward = forward_or_fail  # type: ignore[method-assign]


class UnexpectedError(Exception):
    """An error that no code expects."""


class FailingCall:
    """Raises UnexpectedError at one call, and counts calls.

    Args:
        kind: "call", of a function of the project or of PyTorch, or by the project, in the main thread; or "event",
            what Python reports to audit hooks, such as opened files and imports, in every thread.
        at: number of the call, from 1; 0 for none.
        log: file for the number of calls and the time of the error.
    """

    def __init__(self, kind: str, at: int, log: str):
        self.kind, self.at, self.log, self.calls, self.time = kind, at, log, 0, 0.0

    def install(self) -> None:
        """Watch the calls of this process from now on."""
        if self.kind == "call":
            sys.setprofile(self._profile)
        else:
            sys.addaudithook(lambda _event, _arguments: self._count())

    def _profile(self, frame: Any, event: str, _argument: Any) -> None:
        folders = {"call": (CHECKOUT, "/torch/"), "c_call": (CHECKOUT,)}.get(event, ())
        if any(folder in frame.f_code.co_filename for folder in folders):
            self._count()

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.time = time.monotonic()
            raise UnexpectedError(f"at {self.kind} {self.at}")

    def finish(self) -> None:
        """Stop watching and log the number of calls."""
        sys.setprofile(None)
        calls, self.at = self.calls, 0
        with open(self.log, "w", encoding="utf-8") as file:
            file.write(f"{calls} {self.time}")


def replace_streams(kinds: dict[str, str]) -> None:
    """Make standard output or standard error one that cannot be written.

    Args:
        kinds: {"stdout" or "stderr": kind}, the kind being "closed"; "broken", a pipe that nobody reads; or "full", a
            disk without space.
    """
    for name, kind in kinds.items():
        fd = {"stdout": 1, "stderr": 2}[name]
        if kind == "closed":
            os.close(fd)
            setattr(sys, name, None)  # as Python does at its start
            continue
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing if kind == "broken" else os.open("/dev/full", os.O_WRONLY), fd)


def become_rank(environment: dict[str, str], folder: str) -> None:
    """Take the environment variables of torchrun, as a fresh interpreter has them whose PYTHONPATH has the folder."""
    from softcache.stages.distributed import ranks

    os.environ |= environment
    sys.path.insert(0, folder)
    ranks.LAUNCHED = ranks.read_ranks(os.environ)


def become_fresh(path: list[str]) -> None:
    """Forget the project's modules, and import from these folders in place of the checkout, as PYTHONPATH has them."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("softcache", "tests")]:
        del sys.modules[name]
    sys.path[:] = [*path, *(x for x in sys.path if x not in (CHECKOUT, os.path.dirname(os.path.abspath(__file__))))]
    sys.path_importer_cache.clear()


def run_command(arguments: list[str], cwd: str, output: str, more: dict[str, Any]) -> NoReturn:
    """Run a command, a script whose name ends with .py, or a module after `-m`, in this child and exit.

    All that it prints goes to the file `output`; its errors to the file more["errors"] where there is one. The child
    ends at once; with more["finalize"] as a Python program ends, which can wait for threads.
    """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    if more.get("errors"):
        os.dup2(os.open(more["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    os.chdir(cwd)
    if more.get("program"):
        os.execvp(arguments[0], arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    code = 1
    failing_call = FailingCall(*more["failing_call"]) if more.get("failing_call") else None
    try:
        if more.get("file_size"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (more["file_size"], more["file_size"]))
        if more.get("unchecked"):
            shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60)
        if more.get("starve"):
            exhaust_memory(*more["starve"])
        if "trap" in more:
            Trap(**more["trap"]).install()
        if more.get("environment"):
            become_rank(more["environment"], cwd)
        if "path" in more:
            become_fresh(more["path"])
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, cwd)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0].endswith(".py"):
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            from softcache.stages.main import main

            if failing_call:
                failing_call.install()
            replace_streams(more.get("streams", {}))
            main(arguments)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        if failing_call:
            failing_call.finish()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        if not more.get("finalize"):
            os._exit(code)
    sys.exit(code)


def serve() -> None:
    """Serve requests: start a child and reply with its process id, or wait for one and reply with how it ended.

    The reply is the exit code, the signal as a negative number, or None where the child is stopped.
    """
    import torch

    commands = (f"softcache.stages.{name}.command" for name in ("check_cache", "student", "teacher_cache", "tune"))
    # torch._dynamo takes 3 s to import, and the first tensor on the device "meta" imports it.
    for name in ("scipy.stats", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo", *commands):
        import_module(name)

    torch.set_num_threads(1)
    gc.freeze()  # a child's garbage collection, also that at its end, skips what it inherits: 1 s less
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], os.WUNTRACED)
            reply = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        else:
            reply = os.fork() or run_command(**request)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()
