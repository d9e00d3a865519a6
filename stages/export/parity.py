"""Whether a file says what PyTorch says: of every image of a held-out split, in batches of several sizes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.errors import CacheError
from softcache.stages.cli.console import progress
from softcache.stages.training.validation import HeldOutSplit

from .onnx_model import Images, OnnxStudent

BATCHES = (1, 7, 512)  # sizes that must work
Logits = NDArray[np.float32]


def run_in_batches(rows: HeldOutSplit, ask: Callable[[torch.Tensor], Logits], what: str) -> Logits:
    """float32 [N, K], in row order of the split."""
    batches = -(-len(rows.labels) // rows.batch_size)
    return np.concatenate([ask(views) for views in progress(rows.batches(), batches, what)])


def to_unit_range(views: torch.Tensor) -> Images:
    """The input float32 [B, C, S, S], 0 … 1, of views uint8."""
    pixels: Images = views.numpy().astype(np.float32)
    return pixels / np.float32(255)


def first_rows(rows: HeldOutSplit, count: int) -> Images:
    """So many images of a split, the first ones over and over where it has fewer."""
    views = to_unit_range(next(iter(rows.batches())))
    return np.resize(views, (count, *views.shape[1:]))


def largest_batch_difference(runner: OnnxStudent, rows: HeldOutSplit, said: Logits) -> float:
    """The largest difference from PyTorch's logits in batches of every size that must work."""
    images = first_rows(rows, max(BATCHES))
    wanted = np.resize(said[: rows.batch_size], (max(BATCHES), said.shape[1]))
    differences = [np.abs(runner.logits(images[:size]) - wanted[:size]).max() for size in BATCHES]
    return float(np.max(differences))  # NaN where one is


def check_parity(
    name: str, said: Logits, found: Logits, largest_batch_difference: float, own: float, tolerance: float
) -> dict[str, Any]:
    """How far ONNX Runtime is from PyTorch on a split. own: how far PyTorch is from itself, see own_difference. Raises
    CacheError over the tolerance."""
    difference = float(np.max([np.abs(found - said).max(), largest_batch_difference]))  # NaN where one is
    flips = int((found.argmax(1) != said.argmax(1)).sum())
    if not difference <= tolerance:  # as NaN is
        raise CacheError(
            f"a logit of {name} differs from PyTorch's by {difference:.2e}, more than --tolerance {tolerance:g}"
            f" ({flips} of {len(said):,} images change their first class): nothing was written. PyTorch's own differ"
            f" by {own:.2e} between two layouts of memory: so much is the rounding of float32 in this network"
        )
    return {
        "rows": len(said),
        "tolerance": tolerance,
        "largest_difference": difference,
        "flips": flips,
        "own_difference": own,
    }


def float32_noise(model: nn.Module, rows: HeldOutSplit, said: Logits) -> float:
    """How far the logits of the first batch lie from PyTorch's own in another layout of memory: what the rounding of
    float32 amounts to, against which any other runtime's difference is to be judged."""
    images = torch.from_numpy(to_unit_range(next(iter(rows.batches()))))
    with torch.inference_mode():
        return float(np.abs(model(images).numpy() - said[: len(images)]).max())


def check_reloaded(name: str, loaded: nn.Module, model: nn.Module, rows: HeldOutSplit, tolerance: float) -> float:
    """The largest difference between the logits of a network and of the same one loaded from its file, of the first
    batch. Raises CacheError over the tolerance."""
    images = torch.from_numpy(to_unit_range(next(iter(rows.batches()))))
    with torch.inference_mode():
        difference = float((loaded(images) - model(images)).abs().max())
    if not difference <= tolerance:
        raise CacheError(
            f"a logit of {name}, loaded again, differs by {difference:.2e}, more than --tolerance {tolerance:g}:"
            " nothing was written"
        )
    return difference
