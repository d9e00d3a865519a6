"""The transfer set, the size of its views and the preparation of the input, as the options of a command name them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from softcache.base.errors import UnreadableImageError
from softcache.data.content_index import open_index
from softcache.data.transfer_set import TransferSet, load_transfer_set
from softcache.data.unreadable import find_all_unreadable
from softcache.data.views import ViewPolicy, render
from softcache.pipeline.models.prepared_model import IMAGENET_MEAN, IMAGENET_STD, InputSpec, parse_normalize
from softcache.stages.cli.configs import CacheConfig, TeacherConfig
from softcache.stages.cli.console import Console, progress
from softcache.stages.distributed.ranks import is_first

# Options that decide which rows of a data set are in which split: those of SplitOptions, and the seed.
SPLIT_OPTIONS = ("val_fraction", "test_fraction", "seed", "train_size", "imbalance", "head_size")
# Options that decide how files of images are read: those of FolderOptions.
FOLDER_OPTIONS = ("classes", "exif", "unreadable", "columns")
FOLDER_SIZE = 224  # pixels; size of the views of a folder whose images differ in size
_SAMPLE_ROWS = 4096  # training rows whose mean and standard deviation are measured


def load_data(config: TeacherConfig | CacheConfig) -> TransferSet:
    """Load the transfer set that the options name, split as they say.

    Raises:
        UsageError: There is no such data set, or an option of the split is out of range.
        CacheError: An image is damaged.
    """
    options = {name: getattr(config, name) for name in (*SPLIT_OPTIONS, *FOLDER_OPTIONS)}
    index = open_index(config.index, config.rehash and is_first())
    return load_transfer_set(config.data, Path(config.data_root), **options, index=index, progress=progress)


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


def fill_size(views: ViewPolicy, transfer_set: TransferSet, console: Console) -> ViewPolicy:
    """Fill in the size of the views: that of the images, or 224 pixels where the images differ in size.

    Args:
        views: The view policy; size 0 where the user named none.
        transfer_set: Its images.
        console: Prints a line where 224 is used.
    """
    if not views.size and not transfer_set.size:
        console.print(
            f"the images differ in size: views are of {FOLDER_SIZE} px; --views {views.name}:size=N changes it"
        )
    return replace(views, size=views.size or transfer_set.size or FOLDER_SIZE)


def make_input_spec(normalize: str, transfer_set: TransferSet, views: ViewPolicy) -> InputSpec:
    """Make the input preparation of a network.

    Args:
        normalize: "imagenet" for ImageNet's mean and standard deviation, of three channels; "data" for those of the
            plain views of up to 4,096 training rows, at regular distances; "none" for pixels divided by 255; or
            numbers, see `parse_normalize`. One number is for all channels of the images.
        transfer_set: Its images.
        views: The view policy, with a size.

    Raises:
        UsageError: normalize is none of these.
    """
    channels, size = transfer_set.channels, views.size
    if numbers := parse_normalize(normalize):
        channels = max(channels, len(numbers[0]))
        means, deviations = (values * (channels // len(values)) for values in numbers)
        return InputSpec(channels, size, means, deviations)
    if normalize == "imagenet":
        return InputSpec(3, size, IMAGENET_MEAN, IMAGENET_STD)
    if normalize == "none":
        return InputSpec(channels, size, (0.0,) * channels, (1.0,) * channels)
    train = transfer_set.splits["train"]
    count = min(len(train), _SAMPLE_ROWS)
    sample = np.arange(count) * len(train) // count
    pixels = render(train.images, views.without_augmentation(), 0, sample, 0).double() / 255
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()
    return InputSpec(channels, size, tuple(round(m, 4) for m in mean), tuple(max(round(s, 4), 1e-4) for s in std))
