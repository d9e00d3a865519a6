"""Commands in processes that can be killed, stopped and starved, and what must be true of a disk afterwards.

A test module has the fixture `forks` after `forks = processes.forks`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from softcache.pipeline.cache.shards import hash_arrays
from tests.helpers.commands import tiny_cache_command
from tests.helpers.paths import ROOT

Event = dict[str, Any]  # of forked.Trap.point
KILLED = -9
ONE_DRAW = ("--draws", 1, "--shard-rows", 150)
TWO_DRAWS = ("--draws", 2, "--shard-rows", 150)
_PATIENCE = 120  # seconds that a command may take


class Child:
    """A command under way. code: see wait; said: all that it printed."""

    def __init__(self, forks: "Forks", pid: int, log: Path):
        self.forks, self.pid, self.log = forks, pid, log
        self.code: int | None = None

    def kill(self) -> int | None:
        """SIGKILL, unless it is over."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def terminate(self) -> int | None:
        """SIGTERM, as a scheduler sends it."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def wait(self) -> int | None:
        """Its exit code, -9 when it was killed, None when it has stopped itself and can go on."""
        watch = threading.Timer(_PATIENCE, os.kill, (self.pid, signal.SIGKILL))
        watch.start()
        self.code = self.forks.ask(wait=self.pid)
        watch.cancel()
        return self.code

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def error(self) -> str:
        """The one line of its error."""
        lines = [line for line in self.output.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.output
        assert "Traceback" not in self.output
        return lines[0]


class Forks:
    """`forks.start("student", …)` is a process that runs a command; `forks.run(…)` waits for its end.

    more: trap={at, act, room, log}, see forked.Trap; starve=(call, kind); file_size=bytes; unchecked=True, with which
    a disk has room for everything until it is full; program=True for a command that is not one of ours.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.children: list[Child] = []
        prefix = ("unshare", "--map-root-user", "--mount")  # so that they can have a disk of their own
        self.can_mount = _works(*prefix, "mount", "-t", "tmpfs", "tmpfs", folder)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [*(prefix if self.can_mount else ()), sys.executable, str(ROOT / "tests/helpers/forked.py")]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n"

    def ask(self, **question: Any) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments: object, **more: Any) -> Child:
        said = self.folder / f"said-{len(self.children)}"
        pid = self.ask(arguments=[str(a) for a in arguments], cwd=str(self.folder), output=str(said), more=more)
        self.children.append(Child(self, pid, said))
        return self.children[-1]

    def run(self, *arguments: object, **more: Any) -> Child:
        found = self.start(*arguments, **more)
        found.wait()
        return found

    def succeeds(self, *arguments: object, **more: Any) -> Child:
        found = self.run(*arguments, **more)
        assert found.code == 0, found.output
        return found

    def fails(self, *arguments: object, **more: Any) -> str:
        """The error of a command that must end with exit code 1 and one line."""
        found = self.run(*arguments, **more)
        assert found.code == 1, (found.code, found.output)
        return found.error

    def close(self) -> None:
        """The end, also of children that a failed test has left behind."""
        for child in self.children:
            if child.code is None:
                os.kill(child.pid, signal.SIGKILL)
        self.server.communicate()


@pytest.fixture(scope="session")
def forks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """Processes that start in 20 ms. Needs fork and /proc."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
    if not _SERVERS:
        _SERVERS.append(Forks(tmp_path_factory.mktemp("forks")))
        request.config.add_cleanup(_SERVERS[0].close)
    return _SERVERS[0]


def _works(*command: object) -> bool:
    try:
        return subprocess.run(list(map(str, command)), capture_output=True).returncode == 0
    except OSError:
        return False


_SERVERS: list[Forks] = []  # one for all test modules: it takes as long to start as PyTorch takes to load


def payloads(cache: Path) -> dict[str, str]:
    """{path: payload} of the shards, as the manifest has them."""
    return {shard["path"]: shard["payload"] for shard in json.loads((cache / "manifest.json").read_text())["shards"]}


def files(folder: Path) -> set[str]:
    """The names of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def temporaries(folder: Path) -> list[str]:
    return sorted(name for name in files(folder) if re.search(r"(^|/)\.[^/]*\.tmp$", name))


def shards(cache: Path) -> dict[str, tuple[int, int]]:
    """{path: (inode, time of the last change)} of what lies under the name of a shard."""
    found = {str(path.relative_to(cache)): path.stat() for path in cache.glob("*/shard-*.h5")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def payload_of(path: Path) -> str:
    """The digest of a shard's datasets, read with h5py alone; what is no whole file has another."""
    try:
        with h5py.File(path) as file:
            arrays = {key: file[key][:] for key in file if key != "features"}
            arrays |= {f"features/{key}": file[f"features/{key}"][:] for key in file.get("features", ())}
    except (OSError, KeyError) as error:
        return str(error)
    return hash_arrays(arrays)


def bad_shards(cache: Path, expected: dict[str, str]) -> list[str]:
    """What lies under the name of a shard and does not hold what the uninterrupted cache holds there."""
    return [name for name in shards(cache) if payload_of(cache / name) != expected.get(name)]


def events(log: Path) -> list[Event]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def point_of(log: Path, when: str, call: str, name: str) -> int:
    """The number of the first point of that kind at a file whose path ends so."""
    return next(
        i
        for i, event in enumerate(events(log), 1)
        if (event["when"], event["call"]) == (when, call) and (event["to"] or event["path"]).endswith(name)
    )


def sweep(log: Path, most: int) -> list[int]:
    """The numbers of the points in a log: all, or about so many of them, evenly spread."""
    points = len(events(log))
    stride = max(1, points // most)
    return list(range(1 + stride // 2, points + 1, stride))


def cache_command(tiny: Path, out: Path, *more: object) -> list[object]:
    return [*tiny_cache_command(tiny)[:-1], out, *more]


def student_command(cache: Path, out: Path, epochs: int, *more: object) -> list[object]:
    return [
        "student",
        "--cache",
        cache,
        "--arch",
        "mlp:16",
        "--batch-size",
        50,
        "--epochs",
        epochs,
        *more,
        "--out",
        out,
    ]


def going_on(run: Path, command: list[object]) -> list[object]:
    """--resume, once there is a run; until then the same command."""
    return ["student", "--resume", "--out", run] if (run / "settings.json").exists() else command


def figures(run: Path) -> object:
    result = json.loads((run / "result.json").read_text())
    return {name: result[name]["test"] for name in ("student", "baseline") if name in result}


def lines(path: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in path.read_text().splitlines()]


def assert_done(folder: Path) -> None:
    """Nothing is left of the work."""
    assert [
        name for name in files(folder) if name.endswith(("tmp", ".lock", "unfinished.json", "checkpoint.pt"))
    ] == []


def assert_same_files(folder: Path, expected: Path) -> None:
    more, fewer = set(files(folder)) - set(files(expected)), set(files(expected)) - set(files(folder))
    assert not more, f"left over: {sorted(more)}"
    assert not fewer, f"missing: {sorted(fewer)}"


def assert_equal_runs(run: Path, expected: Path) -> None:
    """The same weights to the bit, in the same bytes; the same figures and lines; nothing besides."""
    assert_same_files(run, expected)
    assert_done(run)
    for name in files(expected):
        if name.endswith(".pt"):
            found, wanted = (torch.load(folder / name, weights_only=True) for folder in (run, expected))
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
            assert (run / name).read_bytes() == (expected / name).read_bytes()
        elif name.endswith("metrics.jsonl"):
            assert lines(run / name) == lines(expected / name)
    assert figures(run) == figures(expected)


def readme(cache: Path) -> list[str]:
    """The card's lines, without the one of the size: a shard keeps the seconds that it took."""
    return [line for line in (cache / "README.md").read_text().splitlines() if not line.startswith("| size")]


def assert_equal_caches(forks: Forks, cache: Path, expected: Path) -> None:
    """The same rows under the same names, every file whole, the same card, nothing besides."""
    assert payloads(cache) == payloads(expected)
    assert bad_shards(cache, payloads(expected)) == []
    assert_same_files(cache, expected)
    assert_done(cache)
    assert readme(cache) == readme(expected)
    forks.succeeds("check-cache", cache)


def wait_until(seen: Callable[[], bool]) -> None:
    """Until something is on disk, or for 5 seconds."""
    end = time.monotonic() + 5
    while not seen() and time.monotonic() < end:
        time.sleep(0.001)
