"""Small things that several tests share."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers import task_runs
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.embeddings import make_embedding_caches
from tests.helpers.paths import ROOT

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="the full number of trials, as `make torture` runs them")
    parser.addoption("--device", default="auto", help="of the tests marked gpu: auto, cpu, cuda or cuda:N")


@pytest.fixture(scope="session")
def dose(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`dose(5, 100)`: how many trials, by default and under torture."""
    return lambda few, many: many if request.config.getoption("--torture") else few


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread_where_tests_are_short(request: pytest.FixtureRequest) -> None:
    """Small tensors on a busy machine: threads that wait for each other make a test twenty times as long."""
    if "not slow" in request.config.option.markexpr or request.config.option.markexpr in ("browser", "hosts", "gpu"):
        import torch

        os.environ["OMP_NUM_THREADS"] = "1"  # of processes that a test starts
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def index_in_a_folder_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What data files hold is recorded in no folder of the user, also not by processes that a test starts."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and public weights beside the checkout; without it the test is skipped."""
    folder = ROOT.parent / "shared"
    if not (folder / "weights").is_dir():
        pytest.skip("needs the real data and weights beside the checkout (../shared)")
    return folder


@pytest.fixture
def stages(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Stages:
    """The commands, called in this process from an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Stages(capsys)


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one, in which modules are found as by a command; they are forgotten afterwards."""
    from softcache.base.current_folder import search_current_folder

    search_current_folder()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


@pytest.fixture
def stages_process() -> Run:
    """The commands in a process of their own: `stages_process("student", …, cwd=…)`."""

    def run(*arguments: object, cwd: Path, **more: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "softcache", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": f"{cwd}:{ROOT}"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **more)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher (runs/teacher) and its cache (cache): digits, 300 training rows, 3 draws, 2 taps."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("tiny")
    main(["teacher", "--train-size", "300", "--arch", "cnn", "--epochs", "12", "--out", f"{folder}/runs/teacher"])
    main(tiny_cache_command(folder))
    return folder


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, caches and runs of labels, numbers and an embedding, see tests/helpers/task_runs.py."""
    folder = tmp_path_factory.mktemp("tasks")
    task_runs.make_caches(folder)
    for task in task_runs.TASKS:
        task_runs.make_runs(folder, task)
    return folder


@pytest.fixture(scope="session")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2 seeds of `cnn` with baselines, from `tiny`'s cache, exported with 8 bits too. To be read."""
    from softcache.stages.main import main

    run = tmp_path_factory.mktemp("exported") / "run"
    student = ["--cache", f"{tiny}/cache", "--arch", "cnn", "--epochs", "15", "--learning-rate", "0.02"]
    main(["student", *student, "--seeds", "2", "--baseline", "--out", str(run)])
    main(["export", str(run), "--int8", "--most-drop", "0.05"])
    return run


@pytest.fixture
def cache(tiny: Path, tmp_path: Path) -> Path:
    """A copy of `tiny`'s cache that a test may damage."""
    return Path(shutil.copytree(tiny / "cache", tmp_path / "cache"))


@pytest.fixture(scope="session")
def save_image() -> Callable[..., Image.Image]:
    """`save_picture(path, width, height, k, mode)` writes image number k of a formula, and returns it."""

    def save(path: Path, width: int = 8, height: int = 8, k: int = 0, mode: str = "RGB") -> Image.Image:
        y, x, c = np.indices((height, width, 3))
        image = Image.fromarray(((41 * k + 89 * c + 13 * x + 5 * y * y + 7 * x * y) % 256).astype(np.uint8))
        image = image.convert(mode)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return image

    return save


@pytest.fixture(scope="session")
def embedding_caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_embedding_caches`. To be read."""
    return make_embedding_caches(tmp_path_factory.mktemp("embeddings"))


@pytest.fixture
def embedding_folder(embedding_caches: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of it, in which the commands are called."""
    shutil.copytree(embedding_caches, tmp_path, dirs_exist_ok=True)
    return tmp_path
