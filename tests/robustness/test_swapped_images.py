"""Two images that trade places while a command reads them: the command ends, and names the row."""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from tests.helpers.processes import Child, Forks, forks

__all__ = ["forks"]
Dose = Callable[[int, int], int]
CHANGED = r"(train|val|test) row \d+, the image .*/(\d{4})\.png, has changed since this command began"
CACHE_OPTIONS = ("--views", "none", "--draws", 8, "--shard-rows", 200, "--batch-size", 32)
EPOCHS = 60
STUDENT = ("--cache", "c", "--arch", "mlp:4", "--learning-rate", 0.001, "--batch-size", 32)


@pytest.fixture(scope="module")
def folder(forks: Forks) -> Path:
    """Images d/, a teacher t of them, and its cache c."""
    root = forks.folder / "swapped"
    noise = np.random.default_rng(0)
    for split, rows in (("train", 120), ("test", 20)):
        for label, name in enumerate(("ant", "bee", "cow")):
            (root / "d" / split / name).mkdir(parents=True)
            for i in range(rows):
                pixels = noise.integers(0, 128, (8, 8, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / "d" / split / name / f"{i:04d}.png")
    options = ("--data", "folder:d", "--arch", "mlp:4", "--views", "none", "--epochs", 2)
    forks.succeeds("teacher", *options, "--out", "t", cwd=root)
    forks.succeeds("teacher-cache", "--data", "folder:d", "--weights", "t", *CACHE_OPTIONS, "--out", "c", cwd=root)
    return root


def count_epochs(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def swap(first: Path, second: Path) -> None:
    """Let two files trade places; a command that looks meanwhile finds one of them missing, or the same one twice."""
    shutil.copy(first, first.with_suffix(".tmp"))
    second.replace(first)
    first.with_suffix(".tmp").replace(second)


def swap_during(child: Child, progress: Callable[[], int], moment: int, images: Path, random: Random) -> str:
    """Swap two training images of a copy of the data once a command has made some progress.

    Returns:
        The error of the command, which must end with exit code 1.
    """
    while progress() < moment:
        assert not child.has_ended(), child.output
        time.sleep(0.01)
    numbers = random.sample(range(120), 2)
    first, second = (images / "train" / name / f"{i:04d}.png" for name, i in zip(("ant", "bee"), numbers, strict=True))
    swap(first, second)
    assert child.wait() == 1, child.output
    found = re.search(CHANGED, child.error)
    assert found, child.error
    assert found[2] in {path.stem for path in (first, second)}
    return child.error


@pytest.mark.parametrize("workers", [0, 1])
def test_swapped_while_a_student_is_trained(folder: Path, forks: Forks, dose: Dose, workers: int) -> None:
    for trial in range(dose(1, 8)):
        data, out, random = f"s{workers}-{trial}", folder / f"so{workers}-{trial}", Random(trial)
        shutil.copytree(folder / "d", folder / data)
        options = ("--data", f"folder:{data}", *STUDENT, "--epochs", EPOCHS, "--workers", workers)
        child = forks.start("student", *options, "--out", out.name, cwd=folder)
        swap_during(child, lambda out=out: count_epochs(out), random.randrange(1, EPOCHS // 3), folder / data, random)
        assert not (out / "result.json").exists()


def test_swapped_while_a_teacher_is_trained(folder: Path, forks: Forks, dose: Dose) -> None:
    for trial in range(dose(1, 12)):
        data, out, random = f"t{trial}", folder / f"to{trial}", Random(trial)
        shutil.copytree(folder / "d", folder / data)
        options = ("--data", f"folder:{data}", "--arch", "mlp:4", "--views", "crop:pad=1", "--epochs", EPOCHS)
        child = forks.start("teacher", *options, "--batch-size", 32, "--out", out.name, cwd=folder)
        swap_during(child, lambda out=out: count_epochs(out), random.randrange(1, EPOCHS // 3), folder / data, random)
        assert not (out / "result.json").exists()


def test_swapped_during_stage_one(folder: Path, forks: Forks, dose: Dose) -> None:
    for trial in range(dose(1, 12)):
        data, out, random = f"c{trial}", folder / f"co{trial}", Random(trial)
        shutil.copytree(folder / "d", folder / data)
        options = ("--data", f"folder:{data}", "--weights", "t", *CACHE_OPTIONS)
        child = forks.start("teacher-cache", *options, "--out", out.name, cwd=folder)

        def count_shards(out: Path = out) -> int:
            return len(list(out.rglob("*.h5")))

        swap_during(child, count_shards, random.randrange(1, 12), folder / data, random)
        assert not (out / "manifest.json").exists()


def test_images_that_are_rewritten_with_the_same_content_are_no_change(folder: Path, forks: Forks) -> None:
    """A copy has another inode and other times: its content is hashed again, and is the same."""
    shutil.copytree(folder / "d", folder / "same")
    options = ("--data", "folder:same", *STUDENT, "--epochs", 12)
    child = forks.start("student", *options, "--out", "same-out", cwd=folder)
    while not count_epochs(folder / "same-out"):
        assert not child.has_ended(), child.output
        time.sleep(0.01)
    for path in sorted((folder / "same/train/ant").iterdir()):
        shutil.copy(path, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    assert child.wait() == 0, child.output
    forks.succeeds("student", *options, "--out", "undisturbed", cwd=folder)
    assert (folder / "same-out/student.pt").read_bytes() == (folder / "undisturbed/student.pt").read_bytes()
