"""Two hosts on one machine: network namespaces that are joined by a link, with torchrun in each."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

ADDRESSES = ("10.213.7.1", "10.213.7.2")
_LINK = "veth0"
_TIMEOUT = 240.0  # seconds that a command may take
LIMIT = 10  # SOFTCACHE_RANK_TIMEOUT of the ranks


class Job:
    """One command on both hosts.

    Attributes:
        codes: of torchrun on each host, once it has ended.
        seconds: from the last `mark` to the end of each torchrun.
    """

    def __init__(self, processes: list["subprocess.Popen[bytes]"], logs: list[Path]):
        self.processes, self.logs = processes, logs
        self.codes: list[int] = []
        self.seconds: list[float] = []
        self._mark = time.monotonic()

    def mark(self) -> None:
        """Measure `seconds` from now."""
        self._mark = time.monotonic()

    def wait(self) -> list[int]:
        """Wait until torchrun has ended on both hosts. Returns the exit codes."""
        ended: dict[int, float] = {}
        while len(ended) < len(self.processes):
            now = time.monotonic() - self._mark
            assert now < _TIMEOUT, f"after {now:.0f} s: {self.codes}\n{self.output}"
            for i, process in enumerate(self.processes):
                if i not in ended and process.poll() is not None:
                    ended[i] = now
            time.sleep(0.02)
        self.codes = [process.returncode for process in self.processes]
        self.seconds = [ended[i] for i in range(len(self.processes))]
        return self.codes

    def wait_for(self, is_reached: Callable[[], bool]) -> None:
        """Wait until a condition holds, while the command runs."""
        start = time.monotonic()
        while not is_reached():
            assert time.monotonic() - start < _TIMEOUT, self.output
            assert all(process.poll() is None for process in self.processes), self.output
            time.sleep(0.001)

    def kill_rank(self, rank: int) -> None:
        """Send SIGKILL to a rank."""
        os.kill(self.find_rank(rank), signal.SIGKILL)

    def find_rank(self, rank: int) -> int:
        """Return the process id of a rank."""
        agents = {str(process.pid) for process in self.processes}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (folder / "stat").read_text().rpartition(")")[2].split()[1] in agents:
                    variables = (folder / "environ").read_bytes().split(b"\0")
                    if f"RANK={rank}".encode() in variables:
                        return int(folder.name)
        raise AssertionError(f"rank {rank} is not there")

    @property
    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def error_lines(self) -> list[list[str]]:
        """Return the lines of each host that tell why its ranks have ended."""
        texts = [log.read_text(errors="replace").splitlines() for log in self.logs]
        return [[line for line in text if line.startswith("Error: ") or line == "Stopped."] for text in texts]

    def end(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Hosts:
    """Two network namespaces. `start` starts torchrun in both; `cut` and `mend` take the link down and up.

    Args:
        folder: for what the commands print.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = [f"softcache-{os.getpid()}-{host}" for host in "ab"]
        self.jobs: list[Job] = []

    def make(self) -> None:
        """Make the namespaces and the link."""
        a, b = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", _LINK, "netns", a, "type", "veth", "peer", "name", _LINK, "netns", b)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", _LINK)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", _LINK, "up")

    def cut(self, host: int = 0) -> None:
        """Take the link down, at the end of one host."""
        _ip("-n", self.names[host], "link", "set", _LINK, "down")

    def mend(self, host: int = 0) -> None:
        """Take the link up."""
        _ip("-n", self.names[host], "link", "set", _LINK, "up")

    def start(self, count: int, *arguments: object, cwd: Path, by: str = "static") -> Job:
        """Start a command of softcache, or a script, in `count` ranks on each host.

        Args:
            count: ranks of a host.
            arguments: the command, or a script whose name ends with .py and its arguments.
            cwd: the working directory.
            by: `c10d`, or `static` for the address and the number of each host.
        """
        program = [] if str(arguments[0]).endswith(".py") else ["-m", "softcache"]
        processes, logs = [], []
        port = 29500 + len(self.jobs)
        for host, name in enumerate(self.names):
            place = (
                ["--master-addr", ADDRESSES[0], "--master-port", port, "--node-rank", host]
                if by == "static"
                else [
                    *("--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"{ADDRESSES[0]}:{port}"),
                    *("--rdzv-conf", f"is_host={1 - host}", "--local-addr", ADDRESSES[host]),
                ]
            )
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", 2]
            command += ["--nproc-per-node", count, *place, *program, *arguments]
            log = self.folder / f"job-{len(self.jobs)}-host-{host}"
            environment = {
                **os.environ,
                "PYTHONPATH": f"{cwd}:{ROOT}",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "GLOO_SOCKET_IFNAME": _LINK,
                "SOFTCACHE_RANK_TIMEOUT": str(LIMIT),
            }
            with log.open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        [str(a) for a in command],
                        cwd=cwd,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            logs.append(log)
        self.jobs.append(Job(processes, logs))
        return self.jobs[-1]

    def succeeds(self, count: int, *arguments: object, cwd: Path, by: str = "static") -> Job:
        """Run a command that must end with exit code 0 on both hosts."""
        job = self.start(count, *arguments, cwd=cwd, by=by)
        assert job.wait() == [0, 0], job.output
        return job

    def close(self) -> None:
        """End what still runs, and remove the namespaces; the link goes with them."""
        for job in self.jobs:
            job.end()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, timeout=20)


def find_obstacle() -> str:
    """Return why there can be no namespaces here; nothing where there can be."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux, to make network namespaces"
    if not shutil.which("ip"):
        return "needs the command ip (iproute2)"
    name = f"softcache-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return f"needs network namespaces: {made.stderr.strip()}" if made.returncode else ""


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts; the test is skipped where there can be none."""
    if obstacle := find_obstacle():
        pytest.skip(obstacle)
    pair = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        pair.make()
        yield pair
    finally:
        pair.close()
