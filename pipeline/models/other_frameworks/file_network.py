"""Teachers that are no PyTorch network but a file: a model in another format, or targets that were made elsewhere."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import UsageError

# What stands after the colon of --teacher for each. The arch of such a teacher in an identity is the name alone: its
# digest says which file it was.
FILE_TEACHERS = {"onnx": "FILE", "logits": "FILE.npz or FILE.parquet"}
_TARGET_FILE = re.compile(r".*(\.(npz|npy|parquet|pq|csv|json|pt|pth|pkl|h5|hdf5|safetensors)|/.*)", re.IGNORECASE)


def parse_file_teacher(arch: str) -> tuple[str, str] | None:
    """Split `onnx:FILE` into ("onnx", "FILE"), and `logits:FILE.npz` likewise; None for the arch of a network.

    `logits:make_network`, without the ending of a file, is a factory in a module of a user's own.
    """
    name, colon, argument = arch.partition(":")
    if not colon or name not in FILE_TEACHERS or (name == "logits" and argument and not _TARGET_FILE.match(argument)):
        return None
    return name, argument


def find_file_teacher(path: str) -> str:
    """Return the name in FILE_TEACHERS whose files have the ending of a path; "" where none has."""
    ending = path.lower().rpartition(".")[2] if ":" not in path else ""
    return {"onnx": "onnx", "npz": "logits", "parquet": "logits"}.get(ending, "")


class FileNetwork(nn.Module):
    """A network without parameters, which its file defines.

    Args:
        digest: SHA-256 that identifies it, 64 hexadecimal digits, in the place of a digest of its weights.

    Attributes:
        digest: As given.
    """

    def __init__(self, digest: str):
        super().__init__()
        self.digest = digest


class StoredTargets(FileNetwork):
    """Targets that were made elsewhere: they are looked up by row, and no view is read.

    Args:
        logits: {split: float32 [N, K]} of every row of the split, in the order of its images.
        digest: See FileNetwork.

    Attributes:
        logits: {split: float32 tensor [N, K]}.
    """

    def __init__(self, logits: Mapping[str, NDArray[np.float32]], digest: str):
        super().__init__(digest)
        self.logits = {split: torch.from_numpy(rows) for split, rows in logits.items()}

    def look_up(self, split: str, index: NDArray[np.int64]) -> torch.Tensor:
        """Return the targets float32 [B, K] of the rows `index`, int64 [B], of a split."""
        return self.logits[split][torch.from_numpy(index.astype(np.int64))]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Raise UsageError: there is no network that could be run."""
        raise UsageError("targets that were made elsewhere cannot be computed for a view")
