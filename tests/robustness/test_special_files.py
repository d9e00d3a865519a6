"""Pipes, sockets, devices and folders named like a file that a command reads are refused in one line, not opened."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.base.errors import CacheError
from softcache.data.images.decoding import open_image
from softcache.data.images.image_folder import ImageFolder
from tests.helpers import processes
from tests.helpers.processes import Forks, make_student_command

forks = processes.forks
SaveImage = Callable[..., Any]
KINDS = {"pipe": "a pipe", "socket": "a socket", "device": "a device", "folder": "a folder"}


def replace(path: Path, kind: str) -> None:
    """Put a pipe, a socket, a link to a device, or a folder in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            folder = os.open(path.parent, os.O_RDONLY)  # a socket's path has 107 bytes at most
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.close(folder)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.fixture
def images(tmp_path: Path, save_image: SaveImage) -> Path:
    """A folder of 12 training and 6 test images of 2 classes, of which one is a link."""
    for split, count in (("train", 6), ("test", 3)):
        for label in ("ant", "bee"):
            for k in range(count):
                save_image(tmp_path / "images" / split / label / f"{k}.png", k=k + 10 * (label == "bee"))
    linked = tmp_path / "images/train/ant/5.png"
    linked.rename(tmp_path / "elsewhere.png")
    linked.symlink_to(tmp_path / "elsewhere.png")
    return tmp_path / "images"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])  # a folder is searched for images
def test_what_is_named_like_an_image_is_refused(forks: Forks, images: Path, tmp_path: Path, kind: str) -> None:
    replace(images / "train/bee/x.png", kind)
    options = ("--data", f"folder:{images}", "--arch", "mlp:4", "--views", "none", "--epochs", 1)
    error = forks.fails("teacher", *options, "--val-fraction", 0.3, "--out", tmp_path / "run")
    assert "train/bee/x.png" in error
    assert KINDS[kind] in error


def test_links_to_images_are_followed(images: Path) -> None:
    with open_image(images / "train/ant/5.png") as image:
        assert image.size == (8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_replaced_after_it_was_listed_is_refused(images: Path, kind: str) -> None:
    folder = ImageFolder(images, ("train/bee/0.png", "train/bee/1.png"), "RGB", 8)
    replace(images / "train/bee/1.png", kind)
    with pytest.raises(CacheError, match=KINDS[kind]):
        folder.load_plain(np.arange(2), 8, 8)
    with pytest.raises(CacheError, match=KINDS[kind]):
        folder.hash_content(np.zeros(2, np.int64), lambda items, total, text: items)


def test_other_files_that_are_pipes_are_refused(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    """Weights, settings, results, records of epochs, and files of a data set."""
    replace(tmp_path / "weights.pt", "pipe")
    cache = ("--train-size", 300, "--teacher", "cnn", "--weights", tmp_path / "weights.pt", "--out", tmp_path / "c")
    assert "is a pipe" in forks.fails("teacher-cache", *cache)
    run = tmp_path / "run"
    forks.succeeds(*make_student_command(tiny / "cache", run, 1))
    content = (run / "result.json").read_bytes()
    replace(run / "result.json", "pipe")
    assert "is a pipe" in forks.run("compare", run, run).error
    (run / "result.json").unlink()
    (run / "result.json").write_bytes(content)
    replace(run / "settings.json", "pipe")
    assert "is a pipe" in forks.fails("student", "--resume", "--out", run)
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    replace(raw / "train-images-idx3-ubyte", "pipe")
    data = ("--data", "fashion-mnist", "--data-root", tmp_path / "data", "--arch", "mlp:4", "--epochs", 1)
    assert "is a pipe" in forks.fails("teacher", *data, "--out", tmp_path / "t")
