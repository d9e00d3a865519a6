"""Small caches of embeddings."""

import contextlib
from pathlib import Path

import torch

from softcache.pipeline.models import build

DIGITS = ("teacher-cache", "--data", "digits", "--train-size", "200", "--task", "embedding", "--normalize", "none")


def make_embedding_caches(folder: Path) -> Path:
    """Make the caches `a`, of the 12 features of an mlp, and `b`, of the 7 of another, of 2 draws; return the folder.

    The weights are a.pth and b.pth.
    """
    from softcache.stages.main import main

    with contextlib.chdir(folder):
        for name, width in (("a", 12), ("b", 7)):
            torch.manual_seed(width)
            torch.save(build(f"mlp:{width}", 10, 1, 8).state_dict(), f"{name}.pth")
            teacher = ["--teacher", f"mlp:{width}", "--weights", f"{name}.pth"]
            main([*DIGITS, *teacher, "--draws", "2", "--views", "crop:pad=1", "--axes", "--out", name])
    return folder
