"""Call the commands of softcache from tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT


class Stages:
    """Calls commands: `stages("student", …)` returns the JSON result, `stages.fails(code, …)` the error's text."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def __call__(self, *arguments: object) -> dict[str, Any]:
        code, out, err = self.call(*arguments, "--json")
        assert code == 0, err
        result: dict[str, Any] = json.loads(out)
        return result

    def call(self, *arguments: object) -> tuple[int, str, str]:
        """Run a command. Returns its exit code, standard output and standard error."""
        from softcache.stages.main import main

        self.capsys.readouterr()
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = self.capsys.readouterr()
        return code, out, err

    def fails(self, code: int, *arguments: object) -> str:
        """Run a command that must end with this exit code and one error, without a traceback; return the error."""
        exit_code, out, err = self.call(*arguments)
        assert exit_code == code, (exit_code, out, err)
        lines = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return err[err.index("Error: ") :].rstrip()


def run_python(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run Python in a folder, in a process of its own that finds softcache."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def tiny_cache_command(folder: Path, out: str = "cache") -> list[str]:
    """Return the command that made `tiny`'s cache."""
    return [
        "teacher-cache",
        "--train-size",
        "300",
        "--weights",
        f"{folder}/runs/teacher",
        "--views",
        "crop:pad=1",
        "--draws",
        "3",
        "--taps",
        "pool1,flatten",
        "--shard-rows",
        "120",
        "--out",
        f"{folder}/{out}",
    ]
