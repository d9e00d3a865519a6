"""Small caches that take 50 ms to make, and functions that inspect the folder of a cache."""

import contextlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softcache.data.views import render as views
from softcache.pipeline.cache.writer import CacheWriter
from softcache.pipeline.models import build
from softcache.stages.teacher_cache.targets import TargetGenerator

# To run in the folder of make_folder_with_cache: the relative name of the weights is valid in a command that a message
# prints. It makes 2 shards per draw, 1 of val and 2 of test, and as many again when taps are added.
CACHE_COMMAND = (
    "teacher-cache",
    "--train-size",
    "200",
    "--weights",
    "teacher",
    "--views",
    "crop:pad=1",
    "--shard-rows",
    "190",
)
PETS_CACHE_COMMAND = (
    "teacher-cache",
    "--data",
    "folder:pets",
    "--teacher",
    "mlp:4",
    "--weights",
    "pets.pt",
    "--normalize",
    "none",
    "--views",
    "crop:pad=1",
    "--draws",
    "2",
    "--taps",
    "hidden1",
)
Files = dict[str, tuple[int, int, int]]  # {name: (inode, time of the last change, size)}


def make_folder_with_cache(tiny: Path, folder: Path, *more: str) -> Path:
    """Copy the run of `tiny`'s teacher to folder/teacher, make or grow its cache folder/c, and return the folder.

    Args:
        tiny: folder of the fixture.
        folder: to fill.
        more: options added to CACHE_COMMAND.
    """
    from softcache.stages.main import main

    shutil.copytree(tiny / "runs/teacher", folder / "teacher", dirs_exist_ok=True)
    with contextlib.chdir(folder):
        main([*CACHE_COMMAND, *more, "--out", "c"])
    return folder


def save_pets(root: Path, save_image: Callable[..., Any]) -> None:
    """Save RGB images of 8 x 8 pixels: the classes cat and dog, 12 training and 3 test images of each."""
    for split, count in (("train", 12), ("test", 3)):
        for c, name in enumerate(("cat", "dog")):
            for k in range(count):
                save_image(root / split / name / f"{k}.png", k=10 * count + 5 * k + c)


def save_pets_teacher(path: Path, seed: int = 0) -> None:
    """Save the weights of an `mlp:4` for two classes of images, 3 x 8 x 8."""
    torch.manual_seed(seed)
    torch.save(build("mlp:4", 2, 3, 8).state_dict(), path)


def parse_printed_command(error: str) -> list[str]:
    """Return the arguments of the command at the end of a message's last line, split as a shell does."""
    program, separator, arguments = error.splitlines()[-1].partition(" -m softcache ")
    assert separator, error
    assert program
    return shlex.split(arguments)


def read_payloads(cache: Path) -> dict[str, str]:
    """Return {path: payload digest} of the shards in the manifest."""
    return {shard["path"]: shard["payload"] for shard in json.loads((cache / "manifest.json").read_text())["shards"]}


def stat_files(folder: Path) -> Files:
    """Return the stat of every file below a folder, which changes when the file is written again."""
    stats = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*") if not path.is_dir()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def stat_tree(folder: Path) -> Files:
    """Return the stat of every file and folder, which also shows files that were made and removed again."""
    folders = {str(path): path.stat() for path in (folder, *folder.rglob("*")) if path.is_dir()}
    times = {f"{name}/": (stat.st_ino, stat.st_mtime_ns, 0) for name, stat in folders.items()}
    return stat_files(folder) | times


def record_computed_shards(patch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the path of every shard that the teacher computes from now on."""
    paths: list[str] = []
    compute_shard = TargetGenerator.compute_shard

    def record_shard(self: TargetGenerator, spec: Any, progress: Any) -> Any:
        paths.append(spec.path)
        return compute_shard(self, spec, progress)

    patch.setattr(TargetGenerator, "compute_shard", record_shard)
    return paths


def shift_one_pixel(patch: pytest.MonkeyPatch) -> None:
    """Change one pixel of every view by one level from now on, as a new decoder or library might."""
    render_one = views._render_unmixed

    def render_shifted(*arguments: Any) -> torch.Tensor:
        pixels = render_one(*arguments).clone()
        pixels[:, 0, 3, 4] ^= 1
        return pixels

    patch.setattr(views, "_render_unmixed", render_shifted)


def interrupt_after_shards(count: int, patch: pytest.MonkeyPatch) -> None:
    """Raise KeyboardInterrupt in place of writing a shard once `count` shards are written."""
    write_shard = CacheWriter.write_shard
    written: list[str] = []

    def write_or_interrupt(self: CacheWriter, spec: Any, arrays: Any, facts: Any) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(spec.path)
        write_shard(self, spec, arrays, facts)

    patch.setattr(CacheWriter, "write_shard", write_or_interrupt)


def save_scaled_teacher(folder: Path, name: str) -> None:
    """Save folder/NAME.py, whose network outputs VOLUME times a linear layer, and its weights folder/w.pt."""
    (folder / f"{name}.py").write_text(
        "import torch\n"
        "VOLUME = 1.0\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self): super().__init__(); self.linear = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x): return VOLUME * self.linear(x.flatten(1))\n"
        "def make(classes, channels, size): return Net()\n"
    )
    torch.save({"linear.weight": torch.eye(10, 64), "linear.bias": torch.zeros(10)}, folder / "w.pt")
