"""Checks of the arguments of a cache's public methods."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from softcache.base.arguments import check_integer, check_text, type_error
from softcache.base.errors import UsageError
from softcache.data.sampling import SAMPLERS
from softcache.data.tasks import CLASSES, LABELS, NUMBERS, HardTargets

Rows = NDArray[np.int64]
MAX_WORKERS = 256


def check_index(split: str, index: ArrayLike, rows: int, name: str = "index") -> Rows:
    """Return indices as int64 [n].

    Args:
        split: Name of the split, for messages.
        index: One whole number, or several; or a mask bool [rows], of which the positions of True are returned.
        rows: Of the split.
        name: Name of the argument, for messages.

    Raises:
        UsageError: They are no whole numbers from 0 to rows - 1, or a mask of another length.
    """
    numbers = _to_array(name, index, f"a list of whole numbers, or a mask bool [{rows}]")
    if numbers.dtype == bool:
        if numbers.shape != (rows,):
            raise UsageError(f"the mask {name} is bool {list(numbers.shape)}, and {split} has {rows} rows")
        return np.flatnonzero(numbers)
    numbers = np.atleast_1d(numbers)
    if numbers.ndim != 1 or (numbers.size and not np.issubdtype(numbers.dtype, np.integer)):
        kind = f"{numbers.dtype} {list(numbers.shape)}"
        raise UsageError(f"{name} is a list of whole numbers, not {kind}; or a mask bool [{rows}]")
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < rows):
        outside = numbers[(numbers < 0) | (numbers >= rows)][0]
        raise UsageError(f"index {outside} is not between 0 and {rows - 1}, the last row of {split}")
    return numbers.astype(np.int64)


def _to_array(name: str, values: Any, expected: str) -> NDArray[Any]:
    """Return numbers as an array; raise UsageError for what is none, such as None, a set or texts."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        raise type_error(name, values, expected) from None
    if array.dtype.kind not in "biuf":
        advice = f": give list({name})" if isinstance(values, set | frozenset) else ""
        raise type_error(name, values, expected + advice)
    return array


def check_subset(split: str, subset: ArrayLike | None, rows: int) -> Rows:
    """Return the indices of a subset as int64 [n]; of None, all of them.

    Raises:
        UsageError: As in `check_index`; or an index comes twice, or there is none.
    """
    if subset is None:
        return np.arange(rows)
    index = check_index(split, subset, rows, "subset")
    if not len(index):
        raise UsageError("the subset has no row")
    values, counts = np.unique(index, return_counts=True)
    if len(values) < len(index):
        raise UsageError(f"the subset has index {values[counts > 1][0]} more than once")
    return index


def check_labels(
    split: str, labels: ArrayLike | torch.Tensor, rows: int, classes: int, task: str = CLASSES
) -> HardTargets:
    """Return labels as int64 [rows], -1 where one is hidden; or the hard targets of another task.

    Raises:
        UsageError: They are of another number or type, or one is no class.
    """
    if task in (LABELS, NUMBERS):
        return _check_outputs(split, labels, (rows, classes), task)
    values = _to_array("labels", labels, f"whole numbers [{rows}]")
    if values.shape != (rows,) or not np.issubdtype(values.dtype, np.integer):
        raise UsageError(f"labels of {split} are whole numbers [{rows}], not {values.dtype} {list(values.shape)}")
    if values.max() >= classes:
        raise UsageError(f"label {values.max()} is not below the {classes} classes of the cache")
    hidden_as_minus_one: NDArray[np.int64] = np.maximum(values, -1).astype(np.int64)
    return hidden_as_minus_one


def _check_outputs(split: str, labels: ArrayLike | torch.Tensor, shape: tuple[int, int], task: str) -> HardTargets:
    """Return several labels as int8, or numbers as float32; raise UsageError for those of another form."""
    expected = "0, 1, and -1 where hidden" if task == LABELS else "numbers, NaN where hidden"
    values = _to_array("labels", labels, f"{expected}, {list(shape)}")
    if values.shape != shape:
        raise UsageError(f"labels of {split} are {expected}, {list(shape)}, not {values.dtype} {list(values.shape)}")
    if task == NUMBERS:
        return values.astype(np.float32)
    if not np.isin(values, (-1, 0, 1)).all():
        raise UsageError(f"labels of {split} are {expected}: there is {values[~np.isin(values, (-1, 0, 1))][0]}")
    return values.astype(np.int8)


def check_draw(split: str, draw: Any, draws: int) -> int:
    """Return the number of a draw; a held-out split has draw 0 alone.

    Raises:
        UsageError: It is no whole number, or that draw is not cached.
    """
    draws = draws if split == "train" else 1
    number = check_integer("draw", draw, least=0)
    if number >= draws:
        raise UsageError(f"draw {number} of {split} is not between 0 and {draws - 1}, the last one in the cache")
    return number


def check_device(device: Any) -> torch.device:
    """Return a device.

    Args:
        device: A str or a torch.device.

    Raises:
        UsageError: It is of another type, or there is no such device here.
    """
    if not isinstance(device, str | torch.device):
        raise type_error("device", device, "a device such as 'cpu' or 'cuda:0'")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"no device '{device}': there are cpu, cuda and cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"no device '{device}': there are {torch.cuda.device_count()} GPUs here")
    return found


def check_place(student: nn.Module, device: torch.device) -> None:
    """Raise UsageError for a student whose weights are all on another kind of device than that of its batches."""
    places = {weight.device for weight in student.parameters()}
    if places and device.type not in {place.type for place in places}:
        place = min(map(str, places))
        raise UsageError(f"the student is on {place}, and its batches are to be on {device}: give device='{place}'")


def check_draws(draws: Any, draws_per_decode: Any, batch_size: int, cached_draws: int) -> tuple[int, int]:
    """Return the draws that are used and how many of them are in a batch, see `Cache.loader`.

    Args:
        draws: The first so many; 0 for all.
        draws_per_decode: It divides the draws and the batch size.
        batch_size: Rows of a batch.
        cached_draws: The draws of the split.

    Raises:
        UsageError: A number is of another type or out of range.
    """
    number = check_integer("draws", draws, least=0) or cached_draws
    at_once = check_integer("draws_per_decode", draws_per_decode, least=1)
    if number > cached_draws:
        raise UsageError(f"draws {number} is not between 1 and the {cached_draws} draws of the cache")
    if number % at_once or batch_size % at_once:
        raise UsageError(
            f"draws_per_decode {at_once} does not divide the {number} draws and the batch_size {batch_size}"
        )
    return number, at_once


def check_views(views: Any, channels: int, size: int, shape: tuple[int, ...] = ()) -> None:
    """Raise UsageError for what is no uint8 [n, channels, size, size], such as images that are normalised already.

    Of rows of numbers, views are float32 [n, *shape].
    """
    if not isinstance(views, torch.Tensor):
        raise type_error("views", views, "a tensor")
    if shape:
        if views.dtype != torch.float32 or views.shape[1:] != shape:
            kind = str(views.dtype).removeprefix("torch.")
            raise UsageError(f"views are float32 [n, {str(list(shape))[1:]}, not {kind} {list(views.shape)}")
        return
    if views.dtype != torch.uint8:
        kind = str(views.dtype).removeprefix("torch.")
        normalised = "these are images already normalised: " if views.is_floating_point() else ""
        raise UsageError(f"views are uint8 [n, {channels}, {size}, {size}], not {kind}: {normalised}pass batch.views")
    if views.ndim != 4 or views.shape[1:] != (channels, size, size):
        raise UsageError(f"views are uint8 [n, {channels}, {size}, {size}], not {list(views.shape)}")


def check_sampler(sampler: Any) -> None:
    """Raise UsageError for what is no sampler; "" is none."""
    if check_text("sampler", sampler) and sampler not in SAMPLERS:
        raise UsageError(f"no sampler '{sampler}'. There are: {', '.join(SAMPLERS)}")
