"""Data sources: each module loads one kind of data set from its files, as it was published.

May import the modules of `softcache.data` beside this folder, not `transfer_set.py`, which cuts the splits that are
loaded here. Begin with `digits.py`; a new source is one function in a module and one row of SOURCES.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.progress import Progress, no_progress
from softcache.data.dataset_items import Data

from .cifar import load_cifar10, load_cifar100
from .dataset import load_dataset
from .digits import load_digits
from .folder import load_image_folder
from .mnist import load_fashion_mnist, load_mnist
from .source_data import FOLDER_DEFAULTS, FolderOptions, SourceData

SOURCES: dict[str, Callable[[Path], SourceData]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "folder": load_image_folder,  # the only one with FolderOptions
}

DATASET = "dataset"  # the name of a user's own dataset, which has no row in SOURCES: it has no name to load it by
OPEN_FROM_PYTHON = "open the cache from Python, with softcache.Cache(path, data=your_dataset)"  # the end of a message


def get_source_name(data: Data) -> str:
    """Return the name of the source of any data: "dataset" for a dataset in memory of this process.

    Raises:
        UsageError: As in `parse_data`, for a text.
    """
    return parse_data(data)[0] if isinstance(data, str) else DATASET


def parse_data(data: str) -> tuple[str, str]:
    """Split `digits` into ("digits", "") and `folder:PATH` into ("folder", "PATH").

    Returns:
        The name of a source in SOURCES and the path, which is empty for every source but `folder`.

    Raises:
        UsageError: There is no such source, `folder` has no path, or another source has one.
    """
    name, _, path = data.partition(":")
    if name == DATASET:
        raise UsageError(f"a dataset of your own has no name by which its cache could be opened: {OPEN_FROM_PYTHON}")
    if name not in SOURCES:
        raise unknown_name_error("data set", name, [*(name for name in SOURCES if name != "folder"), "folder:PATH"])
    if (name == "folder") != bool(path):
        raise UsageError("a folder of images is named with its path: --data folder:PATH")
    return name, path


def load_source(
    data: Data, root: Path, options: FolderOptions = FOLDER_DEFAULTS, progress: Progress = no_progress
) -> SourceData:
    """Load the data that `digits` or `folder:PATH` names, or a dataset, in the splits in which they were published.

    Args:
        data: The name of a source, `folder:PATH`, or a dataset or one of each split, see `load_dataset`.
        root: Folder of the data sets that torchvision reads; unused by `digits`, `folder:PATH` and a dataset.
        options: How a folder of images is read; the defaults for every other source. Of a dataset, `classes` may be
            the names of the classes.
        progress: Shows how many images are read.

    Raises:
        UsageError: There is no such source, options are given for another source than a folder, or the folder's
            layout is not one that can be read.
        CacheError: Files are missing and cannot be downloaded, or they are damaged.
    """
    if not isinstance(data, str):
        if replace(options, classes="") != FOLDER_DEFAULTS:
            raise UsageError("--exif and --unreadable are for --data folder:PATH, not for a dataset")
        return load_dataset(data, options.classes or (), progress)
    name, path = parse_data(data)
    if path:
        return load_image_folder(Path(path), options, progress)
    if options != FOLDER_DEFAULTS:
        raise UsageError(f"--classes, --exif and --unreadable are for --data folder:PATH, not for {name}")
    return SOURCES[name](root)


def short_name(data: str) -> str:
    """Return a name for folders: `digits` for `digits`, and the last part of the path for `folder:PATH`."""
    name, _, path = data.partition(":")
    return Path(path).name or "folder" if path else name
