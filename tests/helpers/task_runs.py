"""Caches and runs of students of the tasks beside classes, made of small images of digits."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

TASKS = ("labels", "numbers", "embedding")
RUN = ("--arch", "mlp:8", "--epochs", 3, "--batch-size", 50)


def make_embedder(classes: int, channels: int, size: int, shape: tuple[int, ...]) -> nn.Module:
    """Make the teacher of the embedding: a fixed random network of 12 outputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 12), nn.Tanh())


def make_caches(folder: Path) -> None:
    """Make labels.npz, numbers.npz and embedding.npz, and the caches labels, numbers and embedding, in a folder."""
    digits = load_digits()
    x, y = digits.images.astype(np.uint8)[:400] * 15, digits.target[:400]
    labels = np.stack([y % 2 == 0, y >= 5, np.isin(y, (0, 6, 8, 9))], 1).astype(np.int8)
    labels[::20] = -1
    numbers = np.stack([y * 10.0, x.mean((1, 2))], 1).astype(np.float32)
    numbers[::20, 1] = np.nan
    split = np.where(np.arange(400) % 4 == 0, "test", "train")
    for task, hard_targets in (("labels", labels), ("numbers", numbers), ("embedding", y)):
        names = {"labels": ["even", "big", "loop"], "numbers": ["value", "grey"]}.get(task, list("0123456789"))
        np.savez(folder / f"{task}.npz", x=x, y=hard_targets, split=split, classes=np.array(names))
        data = ("--data", f"arrays:{task}.npz")
        if task == "embedding":
            teacher: tuple[str, ...] = (
                *("--teacher", "tests.helpers.task_runs:make_embedder", "--weights", "DEFAULT", "--task", task),
            )
        else:
            call(folder, "teacher", *data, "--arch", "mlp:32", "--epochs", 15, "--out", f"{task}-teacher")
            teacher = ("--weights", f"{task}-teacher")
        call(folder, "teacher-cache", *data, *teacher, "--out", task)


def make_runs(folder: Path, task: str) -> None:
    """Make runs/TASK-a, with a baseline where hard targets are learned, and runs/TASK-b, with other options."""
    common = ("student", "--data", f"arrays:{task}.npz", "--cache", task, *RUN)
    baseline = () if task == "embedding" else ("--baseline",)
    call(folder, *common, *baseline, "--out", f"runs/{task}-a")
    call(folder, *common, "--learning-rate", 1e-6, "--out", f"runs/{task}-b")


def call(folder: Path, *arguments: object) -> None:
    """Call a command in a folder."""
    from softcache.stages.main import main

    with contextlib.chdir(folder):
        main([str(argument) for argument in arguments])
