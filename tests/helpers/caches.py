"""Small caches that take 50 ms to make, and what several tests ask about a cache's folder."""

import contextlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softcache.data import views
from softcache.pipeline.cache.writer import CacheWriter
from softcache.pipeline.models import build
from softcache.stages.teacher_cache.targets import TargetGenerator

# In the folder of home_with_cache: weights named by one word are found again by a command that a message prints.
# It makes 2 shards of a draw, 1 of val and 2 of test; as many again where taps are added.
ASKED = (
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
PETS = (
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


def home_with_cache(tiny: Path, folder: Path, *more: str) -> Path:
    """The folder with the run of `tiny`'s teacher as `teacher`, and its cache `c`, made or grown by ASKED and more."""
    from softcache.stages.main import main

    shutil.copytree(tiny / "runs/teacher", folder / "teacher", dirs_exist_ok=True)
    with contextlib.chdir(folder):
        main([*ASKED, *more, "--out", "c"])
    return folder


def save_pets(root: Path, save_image: Callable[..., Any]) -> None:
    """A folder of RGB images of 8 x 8: the classes cat and dog, 12 of each to train on, 3 to test."""
    for split, count in (("train", 12), ("test", 3)):
        for c, name in enumerate(("cat", "dog")):
            for k in range(count):
                save_image(root / split / name / f"{k}.png", k=10 * count + 5 * k + c)


def save_pets_teacher(path: Path, seed: int = 0) -> None:
    """Weights of an `mlp:4` for two classes of images, 3 x 8 x 8."""
    torch.manual_seed(seed)
    torch.save(build("mlp:4", 2, 3, 8).state_dict(), path)


def printed_command(error: str) -> list[str]:
    """The arguments of the command that the last line of a message ends with, as a shell would split them."""
    program, found, arguments = error.splitlines()[-1].partition(" -m softcache ")
    assert found, error
    assert program
    return shlex.split(arguments)


def payloads(cache: Path) -> dict[str, str]:
    """{path: payload} of the shards in the manifest."""
    return {shard["path"]: shard["payload"] for shard in json.loads((cache / "manifest.json").read_text())["shards"]}


def files(folder: Path) -> Files:
    """Every file below a folder, with what changes when it is written again."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*") if not path.is_dir()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def everything(folder: Path) -> Files:
    """The same with the folders: whoever makes a file and removes it again is seen, too."""
    folders = {str(path): path.stat() for path in (folder, *folder.rglob("*")) if path.is_dir()}
    times = {f"{name}/": (stat.st_ino, stat.st_mtime_ns, 0) for name, stat in folders.items()}
    return files(folder) | times


def count_shards_asked(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that the teacher is asked for from now on."""
    asked: list[str] = []
    piece = TargetGenerator.compute_shard

    def counted(self: TargetGenerator, wanted: Any, shown: Any) -> Any:
        asked.append(wanted.path)
        return piece(self, wanted, shown)

    patch.setattr(TargetGenerator, "compute_shard", counted)
    return asked


def drift(patch: pytest.MonkeyPatch) -> None:
    """From now on one pixel of every view is one level off, as a new decoder or library would have it."""
    render_one = views._render_unmixed

    def drifted(*arguments: Any) -> torch.Tensor:
        pixels = render_one(*arguments).clone()
        pixels[:, 0, 3, 4] ^= 1
        return pixels

    patch.setattr(views, "_render_unmixed", drifted)


def stop_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once so many shards are written."""
    add = CacheWriter.write_shard
    written: list[str] = []

    def stopping(self: CacheWriter, piece: Any, arrays: Any, facts: Any) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(piece.path)
        add(self, piece, arrays, facts)

    patch.setattr(CacheWriter, "write_shard", stopping)


def save_teacher_with_a_volume(folder: Path, name: str) -> None:
    """folder/NAME.py, whose network says VOLUME times what its weights, folder/w.pt, say."""
    (folder / f"{name}.py").write_text(
        "import torch\n"
        "VOLUME = 1.0\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self): super().__init__(); self.linear = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x): return VOLUME * self.linear(x.flatten(1))\n"
        "def make(classes, channels, size): return Net()\n"
    )
    torch.save({"linear.weight": torch.eye(10, 64), "linear.bias": torch.zeros(10)}, folder / "w.pt")
