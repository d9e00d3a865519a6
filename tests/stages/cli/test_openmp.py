"""How CPU threads wait: set by commands before PyTorch is loaded, unless the environment says how; not in Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

OPENMP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def run_and_show_openmp(
    folder: Path, *arguments: str, **variables: str
) -> "tuple[subprocess.CompletedProcess[str], str]":
    """Run Python with variables of OpenMP; return it and the turns for which OpenMP says that a thread spins."""
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE", **variables}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    shown = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not shown:
        pytest.skip("PyTorch is not built with GNU OpenMP here")
    return done, shown[0]


@pytest.mark.parametrize(
    ("variables", "turns"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_a_command_lets_threads_sleep_unless_the_environment_says_how_they_wait(
    variables: dict[str, str], turns: str, tmp_path: Path
) -> None:
    teacher = ("-m", "softcache", "teacher", "--train-size", "100", "--arch", "mlp:8", "--epochs", "1", "--out", "run")
    done, shown = run_and_show_openmp(tmp_path, *teacher, **variables)
    assert done.returncode == 0, done.stderr
    assert shown == turns
    machine = json.loads((tmp_path / "run/result.json").read_text())["machine"]
    chosen = variables or {"GOMP_SPINCOUNT": "5000"}
    assert machine["waiting"] == " ".join(f"{name}={value}" for name, value in chosen.items())


def test_as_a_library_it_leaves_openmp_as_it_is(tmp_path: Path) -> None:
    _, before = run_and_show_openmp(tmp_path, "-c", "import torch")
    done, after = run_and_show_openmp(tmp_path, "-c", "import softcache; softcache.build_cache; softcache.Cache")
    assert done.returncode == 0, done.stderr
    assert after == before != "5000"


def test_a_command_that_is_called_after_pytorch_is_loaded_changes_no_variable(tmp_path: Path) -> None:
    code = (
        "import os, torch, softcache.stages.main as m\ntry: m.main(['recipes'])\nexcept SystemExit: pass\n"
        f"assert not set(os.environ) & {set(OPENMP)}"
    )
    done, _ = run_and_show_openmp(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
