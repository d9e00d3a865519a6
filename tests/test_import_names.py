"""A user's own modules named data, pipeline and stages work beside softcache, our one import package."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from softcache.pipeline.losses import LOSSES
from softcache.pipeline.models import build
from softcache.stages.main import main
from tests.helpers import processes
from tests.helpers.paths import ROOT
from tests.helpers.processes import Forks

forks = processes.forks

Process = subprocess.CompletedProcess[str]

DATA_MODULE = "WIDTH = 8\nprint('data of the user is imported')\n"
UNUSED_MODULE = "raise RuntimeError('a module of the user that nothing needs is imported')\n"
# The files of a user's folder, by what is in it.
FOLDERS = {
    "data.py": {"data.py": DATA_MODULE},
    "data package": {"data/__init__.py": DATA_MODULE},
    "data folder": {"data/notes.txt": "no module"},
    "pipeline package": {"pipeline/__init__.py": UNUSED_MODULE},
    "stages.py": {"stages.py": UNUSED_MODULE},
    "all": {
        "data.py": DATA_MODULE,
        "data/__init__.py": DATA_MODULE,
        "pipeline/__init__.py": UNUSED_MODULE,
        "stages.py": UNUSED_MODULE,
    },
}
WITH_WIDTH = ("data.py", "data package", "all")
ARCH_MODULE = """
from data import WIDTH
from torch import nn

def make(classes, channels, size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
"""


def make_folder(folder: Path, content: str) -> Path:
    for name, text in FOLDERS[content].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def python(*arguments: object, folder: Path, path: str) -> Process:
    """Run Python in a folder, with a PYTHONPATH."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def fork(forks: Forks, *arguments: object, folder: Path, path: list[object]) -> Process:
    """Run Python in a folder with a PYTHONPATH, in a process that has PyTorch loaded and nothing of the project."""
    errors = folder / "errors.txt"
    child = forks.run(*arguments, cwd=folder, path=[str(x) for x in path], errors=str(errors))
    assert child.code is not None
    return Process([], child.code, child.output, errors.read_text())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with softcache alone in it, as an installation has it, and its console script."""
    site = tmp_path_factory.mktemp("site")
    (site / "softcache").symlink_to(ROOT / "softcache")
    (site / "bin").mkdir()
    for name in ("softcache", "console.py"):
        (site / "bin" / name).write_text("from softcache.__main__ import main\nmain()\n")
    return site


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 100 digits, from a teacher with random weights."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    torch.save(build("mlp:4", 10, 1, 8).state_dict(), folder / "teacher.pt")
    teacher = ["--teacher", "mlp:4", "--weights", f"{folder}/teacher.pt", "--normalize", "none"]
    main(["teacher-cache", *teacher, "--data", "digits", "--train-size", "100", "--out", f"{folder}/cache"])
    return folder / "cache"


@pytest.fixture(scope="module")
def losses(forks: Forks, site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Process]:
    """`python -m softcache losses` in every folder, with and without the folder on PYTHONPATH.

    A fresh interpreter runs it in the folder that has all modules; it loads PyTorch beside them too.
    """
    done = {}
    for content, is_on_path in product(FOLDERS, (False, True)):
        folder = make_folder(tmp_path_factory.mktemp("losses"), content)
        if content == "all":
            path = f".:{site}" if is_on_path else str(site)
            process = python("-m", "softcache", "losses", folder=folder, path=path)
        else:
            path_folders = [folder, site] if is_on_path else [site]
            process = fork(forks, "-m", "softcache", "losses", folder=folder, path=path_folders)
        done[content, is_on_path] = process
    return done


@pytest.mark.parametrize("is_on_path", [False, True])
@pytest.mark.parametrize("content", FOLDERS)
def test_a_command_runs_beside_the_users_modules(
    losses: dict[tuple[str, bool], Process], content: str, is_on_path: bool
) -> None:
    done = losses[content, is_on_path]
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines() if not line.startswith(" ")] == list(LOSSES)
    assert "of the user" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def students(
    forks: Forks, site: Path, small_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Process]:
    """`softcache student` with the arch of a user's module that imports the user's data.

    A fresh interpreter runs it in the folder that has all modules.
    """

    def train(content: str) -> Process:
        folder = make_folder(tmp_path_factory.mktemp("student"), content)
        (folder / "mymodel.py").write_text(ARCH_MODULE)
        student = (
            "student",
            "--cache",
            small_cache,
            "--arch",
            "mymodel:make",
            "--epochs",
            1,
            "--out",
            "run",
            "--json",
        )
        if content == "all":
            return python(site / "bin/softcache", *student, folder=folder, path=str(site))
        return fork(forks, site / "bin/console.py", *student, folder=folder, path=[site])

    return {content: train(content) for content in WITH_WIDTH}


@pytest.mark.parametrize("content", WITH_WIDTH)
def test_a_users_arch_imports_the_users_data(students: dict[str, Process], content: str) -> None:
    done = students[content]
    assert done.returncode == 0, done.stderr
    assert "data of the user is imported" in done.stderr.splitlines()  # standard output is for the result
    assert json.loads(done.stdout)["student"]["parameters"] == 64 * 8 + 8 + 8 * 10 + 10


@pytest.mark.parametrize("name", ["data", "pipeline", "stages"])
def test_an_installation_has_no_module_of_that_name(site: Path, tmp_path: Path, name: str) -> None:
    done = python("-c", f"import {name}", folder=tmp_path, path=str(site))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named '{name}'"


@pytest.mark.parametrize("name", ["data", "pipeline", "stages"])
def test_a_checkout_on_the_path_refuses_the_name_of_a_folder(tmp_path: Path, name: str) -> None:
    """There the folder is found, and the message names the package that it is part of."""
    done = python("-c", f"import {name}", folder=tmp_path, path=str(ROOT))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: this folder is part of the package softcache: import softcache.{name}"
    )
