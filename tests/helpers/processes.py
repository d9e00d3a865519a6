"""Run commands in processes that can be killed, stopped or made to run out of memory; check the files afterwards.

A test module gets the fixture `forks` by `forks = processes.forks`.
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
_TIMEOUT = 120  # seconds that a command may take


class Child:
    """A process that runs a command.

    Attributes:
        pid: process id.
        code: the result of `wait`; None before.
        output: all that it has printed.
    """

    def __init__(self, forks: "Forks", pid: int, log: Path):
        self.forks, self.pid, self.log = forks, pid, log
        self.code: int | None = None

    def kill(self) -> int | None:
        """Send SIGKILL, and wait."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def terminate(self) -> int | None:
        """Send SIGTERM, as a scheduler does, and wait."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def wait(self) -> int | None:
        """Wait for its end. Returns the exit code, -9 when it was killed, None when it has stopped itself."""
        timer = threading.Timer(_TIMEOUT, os.kill, (self.pid, signal.SIGKILL))
        timer.start()
        self.code = self.forks.request(wait=self.pid)
        timer.cancel()
        return self.code

    def has_ended(self) -> bool:
        """Return whether the process has ended, without waiting for it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def error(self) -> str:
        """The error line; there must be one, without a traceback."""
        lines = [line for line in self.output.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.output
        assert "Traceback" not in self.output
        return lines[0]


class Forks:
    """Starts commands of softcache in forked processes.

    `start("student", …)` starts one, and `run(…)` waits for its end. Both take as keywords: trap={at, act, room, log},
    see forked.Trap; starve=(call, kind), see forked.exhaust_memory; file_size=bytes, a limit for every file;
    unchecked=True, with which free disk space is reported as unlimited; program=True for another program's command;
    environment={…}, the variables of torchrun; errors=file, for standard error; cwd=folder, in place of `folder`;
    path=[folder, …], see forked.become_fresh; failing_call=(kind, at, log), see forked.FailingCall; finalize=True, to
    end as a Python program ends; streams={…}, see forked.replace_streams.

    Args:
        folder: working directory of the commands.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.children: list[Child] = []
        prefix = ("unshare", "--map-root-user", "--mount")  # so that the commands can have a disk of their own
        self.can_mount = _succeeds(*prefix, "mount", "-t", "tmpfs", "tmpfs", folder)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [*(prefix if self.can_mount else ()), sys.executable, str(ROOT / "tests/helpers/forked.py")]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n"

    def request(self, **message: Any) -> Any:
        """Send a message to the server and return its reply."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(message) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments: object, **more: Any) -> Child:
        """Start a command."""
        log = self.folder / f"output-{len(self.children)}"
        cwd = str(more.pop("cwd", self.folder))
        pid = self.request(arguments=[str(a) for a in arguments], cwd=cwd, output=str(log), more=more)
        self.children.append(Child(self, pid, log))
        return self.children[-1]

    def run_ranks(self, count: int, *arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
        """Run a command, or a script, by several ranks, as torchrun does.

        The store of the ranks is in this process, and once a rank fails the others get SIGTERM.

        Returns:
            The exit code of the first rank that failed, else 0; what all ranks printed, and their errors.
        """
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        errors = [self.folder / f"errors-{len(self.children) + rank}" for rank in range(count)]
        ranks = [
            self.start(
                *arguments,
                cwd=cwd,
                errors=str(file),
                environment={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, file in enumerate(errors)
        ]
        code = 0
        while any(rank.code is None for rank in ranks):
            for rank in [rank for rank in ranks if rank.code is None and rank.has_ended()]:
                if rank.wait() and not code:
                    code = rank.code or 0
                    for other in ranks:
                        if other.code is None:
                            os.kill(other.pid, signal.SIGTERM)
            time.sleep(0.02)
        output, error_text = "".join(rank.output for rank in ranks), "".join(file.read_text() for file in errors)
        return subprocess.CompletedProcess(list(arguments), code, output, error_text)

    def run(self, *arguments: object, **more: Any) -> Child:
        """Run a command to its end."""
        child = self.start(*arguments, **more)
        child.wait()
        return child

    def succeeds(self, *arguments: object, **more: Any) -> Child:
        """Run a command that must end with exit code 0."""
        child = self.run(*arguments, **more)
        assert child.code == 0, child.output
        return child

    def fails(self, *arguments: object, **more: Any) -> str:
        """Run a command that must end with exit code 1 and one error line; return the line."""
        child = self.run(*arguments, **more)
        assert child.code == 1, (child.code, child.output)
        return child.error

    def close(self) -> None:
        """End the server, and children that a failed test has left running."""
        for child in self.children:
            if child.code is None:
                os.kill(child.pid, signal.SIGKILL)
        self.server.communicate()


@pytest.fixture(scope="session")
def forks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """A server whose processes start in 20 ms. Needs fork and /proc."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
    if not _SERVERS:
        _SERVERS.append(Forks(tmp_path_factory.mktemp("forks")))
        request.config.add_cleanup(_SERVERS[0].close)
    return _SERVERS[0]


def _succeeds(*command: object) -> bool:
    try:
        return subprocess.run(list(map(str, command)), capture_output=True).returncode == 0
    except OSError:
        return False


_SERVERS: list[Forks] = []  # one for all test modules, because its start loads PyTorch


def read_payloads(cache: Path) -> dict[str, str]:
    """Return {path: payload digest} of the shards in the manifest."""
    return {shard["path"]: shard["payload"] for shard in json.loads((cache / "manifest.json").read_text())["shards"]}


def list_files(folder: Path) -> set[str]:
    """Return the names of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def list_temporary_files(folder: Path) -> list[str]:
    """Return the names of softcache's temporary files below a folder."""
    return sorted(name for name in list_files(folder) if re.search(r"(^|/)\.[^/]*\.tmp$", name))


def stat_shards(cache: Path) -> dict[str, tuple[int, int]]:
    """Return {path: (inode, time of the last change)} of the files that have the name of a shard."""
    stats = {str(path.relative_to(cache)): path.stat() for path in cache.glob("*/shard-*.h5")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def compute_payload(path: Path) -> str:
    """Return the digest of a shard's datasets, read with h5py alone; an error's text where the file is incomplete."""
    try:
        with h5py.File(path) as file:
            arrays = {key: file[key][:] for key in file if key != "features"}
            arrays |= {f"features/{key}": file[f"features/{key}"][:] for key in file.get("features", ())}
    except (OSError, KeyError) as error:
        return str(error)
    return hash_arrays(arrays)


def find_bad_shards(cache: Path, expected: dict[str, str]) -> list[str]:
    """Return the names of the shards whose payload differs from that of the uninterrupted cache."""
    return [name for name in stat_shards(cache) if compute_payload(cache / name) != expected.get(name)]


def read_events(log: Path) -> list[Event]:
    """Read the log of a trap."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def find_point(log: Path, when: str, call: str, name: str) -> int:
    """Return the number of the first point of this kind at a file whose path ends with `name`."""
    return next(
        i
        for i, event in enumerate(read_events(log), 1)
        if (event["when"], event["call"]) == (when, call) and (event["to"] or event["path"]).endswith(name)
    )


def select_points(log: Path, most: int) -> list[int]:
    """Return the numbers of the points in a log: all, or about `most` of them, evenly spread."""
    points = len(read_events(log))
    stride = max(1, points // most)
    return list(range(1 + stride // 2, points + 1, stride))


def make_cache_command(tiny: Path, out: Path, *more: object) -> list[object]:
    """Return the command that makes the cache of `tiny` in another folder, with more options."""
    return [*tiny_cache_command(tiny)[:-1], out, *more]


def make_student_command(cache: Path, out: Path, epochs: int, *more: object) -> list[object]:
    """Return the command that trains a small student from a cache."""
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


def make_resume_command(run: Path, command: list[object]) -> list[object]:
    """Return the command that continues a run: --resume once it has settings, else the command itself."""
    return ["student", "--resume", "--out", run] if (run / "settings.json").exists() else command


def read_test_metrics(run: Path) -> object:
    """Return {model: test metrics} of a run's result."""
    result = json.loads((run / "result.json").read_text())
    return {name: result[name]["test"] for name in ("student", "baseline") if name in result}


def read_metric_lines(path: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without their seconds."""
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in path.read_text().splitlines()]


def assert_done(folder: Path) -> None:
    """Check that no temporary file, lock, marker or checkpoint is left."""
    assert [
        name for name in list_files(folder) if name.endswith(("tmp", ".lock", "unfinished.json", "checkpoint.pt"))
    ] == []


def assert_same_files(folder: Path, expected: Path) -> None:
    """Check that two folders have files of the same names."""
    extra, missing = list_files(folder) - list_files(expected), list_files(expected) - list_files(folder)
    assert not extra, f"left over: {sorted(extra)}"
    assert not missing, f"missing: {sorted(missing)}"


def assert_equal_runs(run: Path, expected: Path) -> None:
    """Check that two runs have the same files: the same weights in the same bytes, the same metrics."""
    assert_same_files(run, expected)
    assert_done(run)
    for name in list_files(expected):
        if name.endswith(".pt"):
            weights, expected_weights = (torch.load(folder / name, weights_only=True) for folder in (run, expected))
            assert weights.keys() == expected_weights.keys()
            assert all(torch.equal(weights[key], expected_weights[key]) for key in expected_weights), name
            assert (run / name).read_bytes() == (expected / name).read_bytes()
        elif name.endswith("metrics.jsonl"):
            assert read_metric_lines(run / name) == read_metric_lines(expected / name)
    assert read_test_metrics(run) == read_test_metrics(expected)


def read_readme_lines(cache: Path) -> list[str]:
    """Return the lines of README.md without the size, which depends on the seconds stored in the shards."""
    return [line for line in (cache / "README.md").read_text().splitlines() if not line.startswith("| size")]


def assert_equal_caches(forks: Forks, cache: Path, expected: Path) -> None:
    """Check that two caches have the same files, payloads and README.md, and that the first passes check-cache."""
    assert read_payloads(cache) == read_payloads(expected)
    assert find_bad_shards(cache, read_payloads(expected)) == []
    assert_same_files(cache, expected)
    assert_done(cache)
    assert read_readme_lines(cache) == read_readme_lines(expected)
    forks.succeeds("check-cache", cache)


def wait_until(is_reached: Callable[[], bool], seconds: float = 5) -> None:
    """Wait until a condition holds, for at most so many seconds."""
    end = time.monotonic() + seconds
    while not is_reached() and time.monotonic() < end:
        time.sleep(0.001)
