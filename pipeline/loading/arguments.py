"""Checks of the arguments of a cache's public methods."""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from softcache.base.errors import UsageError
from softcache.data.sampling import SAMPLERS
from softcache.data.transfer_set import Labels

Rows = NDArray[np.int64]


def check_index(split: str, index: ArrayLike, rows: int) -> Rows:
    """Return indices as int64 [n].

    Args:
        split: Name of the split, for messages.
        index: One whole number, or several.
        rows: Of the split.

    Raises:
        UsageError: They are no whole numbers from 0 to rows - 1.
    """
    numbers = np.atleast_1d(np.asarray(index))
    if numbers.ndim != 1 or (numbers.size and not np.issubdtype(numbers.dtype, np.integer)):
        raise UsageError(f"an index is a list of whole numbers, not {numbers.dtype} {list(numbers.shape)}")
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < rows):
        outside = numbers[(numbers < 0) | (numbers >= rows)][0]
        raise UsageError(f"index {outside} is not between 0 and {rows - 1}, the last row of {split}")
    return numbers.astype(np.int64)


def check_subset(split: str, subset: ArrayLike | None, rows: int) -> Rows:
    """Return the indices of a subset as int64 [n]; of None, all of them.

    Raises:
        UsageError: As in `check_index`; or an index comes twice, or there is none.
    """
    if subset is None:
        return np.arange(rows)
    index = check_index(split, subset, rows)
    if not len(index):
        raise UsageError("the subset has no row")
    values, counts = np.unique(index, return_counts=True)
    if len(values) < len(index):
        raise UsageError(f"the subset has index {values[counts > 1][0]} more than once")
    return index


def check_labels(split: str, labels: ArrayLike | torch.Tensor, rows: int, classes: int) -> Labels:
    """Return labels as int64 [rows], -1 where one is hidden.

    Raises:
        UsageError: They are of another number or type, or one is no class.
    """
    values = np.asarray(labels)
    if values.shape != (rows,) or not np.issubdtype(values.dtype, np.integer):
        raise UsageError(f"labels of {split} are whole numbers [{rows}], not {values.dtype} {list(values.shape)}")
    if values.max() >= classes:
        raise UsageError(f"label {values.max()} is not below the {classes} classes of the cache")
    hidden_as_minus_one: Labels = np.maximum(values, -1).astype(np.int64)
    return hidden_as_minus_one


def check_draw(split: str, draw: int, draws: int) -> None:
    """Raise UsageError for a draw that is not cached; a held-out split has draw 0 alone."""
    draws = draws if split == "train" else 1
    if not 0 <= draw < draws:
        raise UsageError(f"draw {draw} of {split} is not between 0 and {draws - 1}, the last one in the cache")


def check_device(device: str | torch.device) -> torch.device:
    """Return a device.

    Raises:
        UsageError: There is no such device here.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"no device '{device}': there are cpu, cuda and cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"no device '{device}': there are {torch.cuda.device_count()} GPUs here")
    return found


def check_loader(
    batch_size: int, seed: int, draws: int, draws_per_decode: int, sampler: str, *, cached_draws: int
) -> None:
    """Raise UsageError for numbers that make no batches, see `Cache.loader`."""
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size} is below 1")
    if seed < 0:
        raise UsageError(f"seed {seed} is below 0")
    if not 1 <= draws <= cached_draws:
        raise UsageError(f"draws {draws} is not between 1 and the {cached_draws} draws of the cache")
    if draws_per_decode < 1 or draws % draws_per_decode or batch_size % draws_per_decode:
        raise UsageError(
            f"draws_per_decode {draws_per_decode} does not divide the {draws} draws and the batch_size {batch_size}"
        )
    if sampler and sampler not in SAMPLERS:
        raise UsageError(f"no sampler '{sampler}'. There are: {', '.join(SAMPLERS)}")
