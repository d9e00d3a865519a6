"""The transfer set, the size of its views and the preparation of the input, as the options of a command name them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from softcache.base.errors import UnreadableImageError, UsageError
from softcache.data.content_index import open_index
from softcache.data.images.unreadable import find_all_unreadable
from softcache.data.sources import DATASET, get_source_name
from softcache.data.transfer_set import TransferSet, load_transfer_set
from softcache.data.views.policy import ViewPolicy, check_policy
from softcache.data.views.render import render
from softcache.pipeline.models.configurations import (
    NetworkConfiguration,
    find_configuration,
    has_published_weights,
)
from softcache.pipeline.models.prepared_model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PUBLISHED,
    InputSpec,
    parse_normalize,
)
from softcache.stages.cli.configs import CacheConfig, TeacherConfig
from softcache.stages.cli.console import Console, progress
from softcache.stages.distributed.ranks import is_first

# Options that decide which rows of a data set are in which split: those of SplitOptions, and the seed.
SPLIT_OPTIONS = ("val_fraction", "test_fraction", "seed", "train_size", "imbalance", "head_size")
# Options that decide how files of images are read: those of FolderOptions.
FOLDER_OPTIONS = ("classes", "exif", "unreadable", "layout", "task", "columns")
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


def can_be_rows(data: str) -> bool:
    """Return whether `--data` may name rows of numbers: arrays, or a dataset of a user's own."""
    return get_source_name(data) in _ROW_SOURCES if data != DATASET else True


def find_view_configuration(arch: str) -> NetworkConfiguration | None:
    """Find the configuration that decides the size of the views of a folder: of an arch `timm:` or `hf:`, else None.

    Raises:
        UsageError, CacheError: As of `find_configuration`.
    """
    return find_configuration(arch) if arch.startswith(("timm:", "hf:")) else None


def fill_size(
    views: ViewPolicy, transfer_set: TransferSet, console: Console, configuration: NetworkConfiguration | None = None
) -> ViewPolicy:
    """Fill in the size of the views: that of the images; where these differ, that of the teacher, or 224 pixels.

    Rows of numbers have no size: 0.

    Args:
        views: The view policy; size 0 where the user named none.
        transfer_set: Its images.
        console: Prints a line where the images differ in size.
        configuration: What is published of the teacher, see `find_view_configuration`; None for 224 pixels.

    Raises:
        UsageError: The policy crops rows of numbers, or adds noise to images.
    """
    check_policy(views, transfer_set.shape)
    if transfer_set.shape:
        return views
    if not views.size and not transfer_set.size and configuration is not None and not views.resize:
        size, resize = configuration.size, configuration.resize
        console.print(
            f"the images differ in size: views are of {size} px, cut out of images whose shorter side is {resize} px,"
            f" as published with the teacher; --views {views.name}:size=N changes it"
        )
        return replace(views, size=size, resize=resize)
    if not views.size and not transfer_set.size:
        console.print(
            f"the images differ in size: views are of {FOLDER_SIZE} px; --views {views.name}:size=N changes it"
        )
    return replace(views, size=views.size or transfer_set.size or FOLDER_SIZE)


def check_normalize(normalize: str, arch: str, may_be_rows: bool = False) -> None:
    """Check --normalize before an image is read.

    Args:
        normalize: The option; "" where it is not given.
        arch: Of the network.
        may_be_rows: Whether the data may be rows of numbers.

    Raises:
        UsageError: It is no normalisation, or "model" and nothing is published of this arch.
    """
    if normalize:
        parse_normalize(normalize, may_be_rows)
    if normalize == PUBLISHED and not has_published_weights(arch):
        raise UsageError(
            f"--normalize {PUBLISHED} is the input published with torchvision:, timm: and hf: networks, and the"
            f" network is '{arch}': give numbers, such as mean=0.5,0.5,0.5,std=0.25,0.25,0.25"
        )


def make_input_spec(normalize: str, transfer_set: TransferSet, views: ViewPolicy, arch: str = "") -> InputSpec:
    """Make the input preparation of a network.

    Of rows of numbers, the mean and standard deviation are those of each entry of the first axis, where there are at
    most 4,096, else of all numbers; a standard deviation of 0 counts as 1.

    Args:
        normalize: "imagenet" for ImageNet's mean and standard deviation, of three channels; "data" for those of the
            plain views of up to 4,096 training rows, at regular distances; "none" for pixels divided by 255;
            "pixels" for pixels as they are; "model" for those that are published with the network; or numbers, see
            `parse_normalize`. One number is for all channels of the images.
        transfer_set: Its images.
        views: The view policy, with a size.
        arch: Of the network, for "model".

    Raises:
        UsageError: normalize is none of these, or nothing is published of the network.
    """
    if transfer_set.shape:
        return _make_row_spec(normalize, transfer_set, views)
    channels, size = transfer_set.channels, views.size
    if numbers := parse_normalize(normalize):
        channels = max(channels, len(numbers[0]))
        means, deviations = (values * (channels // len(values)) for values in numbers)
        return InputSpec(channels, size, means, deviations)
    if normalize == PUBLISHED:
        check_normalize(normalize, arch)
        return make_published_spec(arch, size)
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
        return InputSpec(entries, 0, *numbers, shape=shape)
    if normalize == "imagenet":
        raise UsageError(
            f"--normalize imagenet is for images, the data are rows of numbers {list(shape)}: take data, none or"
            " mean=…,std=…"
        )
    if normalize == "none":
        return InputSpec(entries, 0, (0.0,), (1.0,), shape=shape)
    values = _render_sample(transfer_set, views).double()
    values = values.flatten(2) if values.ndim > 2 else values[..., None]  # [n, entries, numbers]
    axes = (0, 2) if entries <= _MAX_MEANS else (0, 1, 2)
    mean, std = (x.reshape(-1).tolist() for x in (values.mean(axes), values.std(axes, correction=0)))
    means, deviations = tuple(map(_round_mean, mean)), tuple(map(_round_std, std))
    return InputSpec(entries, 0, means, deviations, shape=shape)


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


def make_published_spec(arch: str, size: int) -> InputSpec:
    """Make the input preparation that is published with a network, for views of a size.

    Raises:
        UsageError: Mean and standard deviation are not published.
    """
    configuration = find_configuration(arch)
    if configuration is None or not configuration.mean:
        raise UsageError(f"how the input of {arch} is normalised is not published with it: give it with --normalize")
    return InputSpec(len(configuration.mean), size, configuration.mean, configuration.std)
