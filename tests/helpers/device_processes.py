"""Commands in processes of their own on a device, which may be killed. (Those of processes.py see no GPU.)"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.paths import ROOT

DETERMINISTIC = str(ROOT / "tests/helpers/deterministic_command.py")
_SECONDS = 240  # that a command may take: a GPU's libraries alone may take half a minute to load


def make_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process that imports this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return {**environment, **variables}


def run_deterministic(*arguments: object, cwd: Path) -> None:
    """Run a command with deterministic algorithms to its end, which must be a success."""
    command = [sys.executable, DETERMINISTIC, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=make_environment(), capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0, done.stderr


def kill_deterministic(is_reached: Callable[[], bool], *arguments: object, cwd: Path) -> None:
    """Start a command with deterministic algorithms, and send it SIGKILL once a condition holds."""
    command = [sys.executable, DETERMINISTIC, *map(str, arguments)]
    with (cwd / "killed-output").open("w") as output:
        process = subprocess.Popen(command, cwd=cwd, env=make_environment(), stdout=output, stderr=output)
    try:
        end = time.monotonic() + _SECONDS
        while not is_reached() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, (cwd / "killed-output").read_text()
    assert is_reached(), (cwd / "killed-output").read_text()


def run_ranks(count: int, *arguments: object, cwd: Path) -> str:
    """Run a command of softcache under torchrun, which must be a success; return what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*launcher, "-m", "softcache", *map(str, arguments)]
    environment = make_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout
