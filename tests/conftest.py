"""Small things that several tests share."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and public weights beside the checkout; without it the test is skipped."""
    folder = ROOT.parent / "shared"
    if not (folder / "weights").is_dir():
        pytest.skip("needs the real data and weights beside the checkout (../shared)")
    return folder


@pytest.fixture
def stages(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> "Stages":
    """The commands, called in this process from an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Stages(capsys)


class Stages:
    """`stages("student", "--cache", …)` returns the JSON result; `stages.fails(code, …)` the one line of the error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def __call__(self, *arguments: object) -> dict[str, Any]:
        code, out, err = self.call(*arguments, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def call(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        from stages.__main__ import main

        self.capsys.readouterr()
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = self.capsys.readouterr()
        return code, out, err

    def fails(self, code: int, *arguments: object) -> str:
        """The error's line; it must be the only one that begins so, and come without a traceback."""
        found, out, err = self.call(*arguments)
        assert found == code, (found, out, err)
        lines = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]


@pytest.fixture
def stages_process() -> Run:
    """The commands in a process of their own: `stages_process("student", …, cwd=…)`."""

    def run(*arguments: object, cwd: Path, **more: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "stages", *map(str, arguments)]
        environment = {**__import__("os").environ, "PYTHONPATH": f"{cwd}:{ROOT}"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **more)

    return run
