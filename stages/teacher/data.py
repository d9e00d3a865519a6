"""The transfer set, the size of its views and the preparation of the input, as the options of a command name them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from softcache.base.errors import UnreadableImageError, UsageError
from softcache.data.sources import DATASET, get_source_name
from softcache.data.transfer_set import TransferSet, load_transfer_set
from softcache.data.unreadable import find_all_unreadable
from softcache.data.views import ViewPolicy, check_policy, render
from softcache.pipeline.models.prepared_model import IMAGENET_MEAN, IMAGENET_STD, InputSpec, parse_normalize
from softcache.stages.cli.configs import CacheConfig, TeacherConfig
from softcache.stages.cli.console import Console, progress

# Options that decide which rows of a data set are in which split: those of SplitOptions, and the seed.
SPLIT_OPTIONS = ("val_fraction", "test_fraction", "seed", "train_size", "imbalance", "head_size")
FOLDER_OPTIONS = ("classes", "exif", "unreadable")  # options that decide how a folder is read: those of FolderOptions
FOLDER_SIZE = 224  # pixels; size of the views of a folder whose images differ in size
_SAMPLE_ROWS = 4096  # training rows whose mean and standard deviation are measured
_MAX_MEANS = 4096  # entries of the first axis of a row that have a mean each
_ROW_SOURCES = ("arrays",)  # whose data may be rows of numbers


def load_data(config: TeacherConfig | CacheConfig) -> TransferSet:
    """Load the transfer set that the options name, split as they say.

    Raises:
        UsageError: There is no such data set, or an option of the split is out of range.
        CacheError: An image is damaged.
    """
    options = {name: getattr(config, name) for name in (*SPLIT_OPTIONS, *FOLDER_OPTIONS)}
    return load_transfer_set(config.data, Path(config.data_root), **options, progress=progress)


def print_notes(transfer_set: TransferSet, console: Console) -> None:
    """Print which files of a folder are left out, and what else a user should see before the images are used."""
    for line in (transfer_set.left_out, *transfer_set.notes):
        if line:
            console.print(line)


@contextmanager
def name_all_unreadable(transfer_set: TransferSet) -> Iterator[None]:
    """Where an image turns out to be no image while it is used, look for all of them, and name them at once.

    Raises:
        CacheError: It counts and names the images that cannot be decoded.
    """
    try:
        yield
    except UnreadableImageError as error:
        splits = (rows.images for rows in transfer_set.splits.values())
        raise find_all_unreadable(splits, error, progress) from None


def may_be_rows(data: str) -> bool:
    """Return whether `--data` may name rows of numbers: arrays, or a dataset of a user's own."""
    return get_source_name(data) in _ROW_SOURCES if data != DATASET else True


def fill_size(views: ViewPolicy, transfer_set: TransferSet, console: Console) -> ViewPolicy:
    """Fill in the size of the views: that of the images, or 224 pixels where the images differ in size; 0 for rows.

    Args:
        views: The view policy; size 0 where the user named none.
        transfer_set: Its images.
        console: Prints a line where 224 is used.

    Raises:
        UsageError: The policy crops rows of numbers, or adds noise to images.
    """
    check_policy(views, transfer_set.shape)
    if transfer_set.shape:
        return views
    if not views.size and not transfer_set.size:
        console.print(
            f"the images differ in size: views are of {FOLDER_SIZE} px; --views {views.name}:size=N changes it"
        )
    return replace(views, size=views.size or transfer_set.size or FOLDER_SIZE)


def make_input_spec(normalize: str, transfer_set: TransferSet, views: ViewPolicy) -> InputSpec:
    """Make the input preparation of a network.

    Of rows of numbers, the mean and standard deviation are those of each entry of the first axis, where there are at
    most 4,096, else of all numbers; a standard deviation of 0 counts as 1.

    Args:
        normalize: "imagenet" for ImageNet's mean and standard deviation, of three channels; "data" for those of the
            plain views of up to 4,096 training rows, at regular distances; "none" for pixels divided by 255; or
            numbers, see `parse_normalize`. One number is for all channels of the images.
        transfer_set: Its images.
        views: The view policy, with a size.

    Raises:
        UsageError: normalize is none of these.
    """
    if transfer_set.shape:
        return _make_row_spec(normalize, transfer_set, views)
    channels, size = transfer_set.channels, views.size
    if numbers := parse_normalize(normalize):
        channels = max(channels, len(numbers[0]))
        means, deviations = (values * (channels // len(values)) for values in numbers)
        return InputSpec(channels, size, means, deviations)
    if normalize == "imagenet":
        return InputSpec(3, size, IMAGENET_MEAN, IMAGENET_STD)
    if normalize == "none":
        return InputSpec(channels, size, (0.0,) * channels, (1.0,) * channels)
    pixels = _render_sample(transfer_set, views).double() / 255
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()
    return InputSpec(channels, size, tuple(round(m, 4) for m in mean), tuple(max(round(s, 4), 1e-4) for s in std))


def _make_row_spec(normalize: str, transfer_set: TransferSet, views: ViewPolicy) -> InputSpec:
    """Make the input preparation of rows of numbers; see `make_input_spec`."""
    shape, entries = transfer_set.shape, transfer_set.shape[0]
    if numbers := parse_normalize(normalize, may_be_rows=True):
        if len(numbers[0]) not in (1, entries):
            raise UsageError(
                f"--normalize has {len(numbers[0])} means, the rows have the shape {list(shape)}: give 1 or {entries}"
            )
        return InputSpec(entries, 0, *numbers, shape)
    if normalize == "imagenet":
        raise UsageError(
            f"--normalize imagenet is for images, the data are rows of numbers {list(shape)}: take data, none or"
            " mean=…,std=…"
        )
    if normalize == "none":
        return InputSpec(entries, 0, (0.0,), (1.0,), shape)
    values = _render_sample(transfer_set, views).double()
    values = values.flatten(2) if values.ndim > 2 else values[..., None]  # [n, entries, numbers]
    axes = (0, 2) if entries <= _MAX_MEANS else (0, 1, 2)
    mean, std = (x.reshape(-1).tolist() for x in (values.mean(axes), values.std(axes, correction=0)))
    return InputSpec(entries, 0, tuple(map(_round_mean, mean)), tuple(_round_std(s) for s in std), shape)


def _round_mean(mean: float) -> float:
    return float(f"{mean:.7g}")


def _round_std(std: float) -> float:
    """Round a standard deviation; of an entry that is always the same it is 1."""
    return float(f"{std:.7g}") if std > 1e-30 else 1.0


def _render_sample(transfer_set: TransferSet, views: ViewPolicy) -> torch.Tensor:
    """Render plain views of up to 4,096 training rows, at regular distances."""
    train = transfer_set.splits["train"]
    count = min(len(train), _SAMPLE_ROWS)
    sample = np.arange(count) * len(train) // count
    return render(train.images, views.without_augmentation(), 0, sample, 0)
