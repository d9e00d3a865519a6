"""The commands, as tests call them."""

import json
from pathlib import Path
from typing import Any

import pytest


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
        """The error, fields side by side included; there must be one alone, without a traceback."""
        found, out, err = self.call(*arguments)
        assert found == code, (found, out, err)
        lines = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return err[err.index("Error: ") :].rstrip()


def tiny_cache_command(folder: Path, out: str = "cache") -> list[str]:
    """The command that made `tiny`'s cache."""
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
