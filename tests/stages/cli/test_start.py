"""A command starts without the libraries that it does not use: each of them takes 0.3 to 1.3 s to import."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import run_python

SLOW = {"torch._dynamo", "sympy", "torchvision", "sklearn", "scipy", "matplotlib", "onnx", "optuna"}
LOADED = """
import sys
from softcache.stages.main import main
try:
    main({arguments})
except SystemExit as end:
    assert not end.code, end.code
finally:
    import json
    print()
    print(json.dumps(sorted({names} & set(sys.modules))))
"""


def list_loaded(folder: Path, names: set[str], *arguments: str) -> list[str]:
    """Run a command in a process of its own; return those modules that it has loaded at its end."""
    done = run_python("-c", LOADED.format(arguments=list(arguments), names=names), cwd=folder)
    assert done.returncode == 0, done.stderr
    loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
    return loaded


@pytest.mark.parametrize("arch", ["mlp:16", "resnet8"])
def test_a_student_of_classes_loads_nothing_that_it_does_not_use(arch: str, tiny: Path, tmp_path: Path) -> None:
    student = (
        "student",
        "--cache",
        f"{tiny}/cache",
        "--arch",
        arch,
        "--epochs",
        "1",
        "--loss",
        "kd",
        "--loss",
        "hard",
    )
    assert list_loaded(tmp_path, SLOW, *student, "--out", "run") == []


def test_a_teacher_loads_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    teacher = ("teacher", "--data", "digits", "--arch", "mlp:8", "--epochs", "1", "--out", "run")
    assert list_loaded(tmp_path, SLOW, *teacher) == []


@pytest.mark.parametrize("command", ["losses", "recipes"])
def test_a_list_is_printed_without_pytorch(command: str, tmp_path: Path) -> None:
    assert list_loaded(tmp_path, {*SLOW, "torch", "numpy", "h5py"}, command) == []
