"""Data sources: each module loads one kind of data set from its files, as it was published.

May import the modules of `softcache.data` beside this folder, not `transfer_set.py`, which cuts the splits that are
loaded here. Begin with `digits.py`; a new source is one function in a module and one row of SOURCES.
"""

from collections.abc import Callable
from pathlib import Path

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.progress import Progress, no_progress

from .cifar import load_cifar10, load_cifar100
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


def parse_data(data: str) -> tuple[str, str]:
    """Split `digits` into ("digits", "") and `folder:PATH` into ("folder", "PATH").

    Returns:
        The name of a source in SOURCES and the path, which is empty for every source but `folder`.

    Raises:
        UsageError: There is no such source, `folder` has no path, or another source has one.
    """
    name, _, path = data.partition(":")
    if name not in SOURCES:
        raise unknown_name_error("data set", name, [*(name for name in SOURCES if name != "folder"), "folder:PATH"])
    if (name == "folder") != bool(path):
        raise UsageError("a folder of images is named with its path: --data folder:PATH")
    return name, path


def load_source(
    data: str, root: Path, options: FolderOptions = FOLDER_DEFAULTS, progress: Progress = no_progress
) -> SourceData:
    """Load the data that `digits` or `folder:PATH` names, in the splits in which they were published.

    Args:
        data: The name of a source, or `folder:PATH`.
        root: Folder of the data sets that torchvision reads; unused by `digits` and `folder:PATH`.
        options: How a folder of images is read; the defaults for every other source.
        progress: Shows how far a search for images that cannot be decoded is.

    Raises:
        UsageError: There is no such source, options are given for another source than a folder, or the folder's
            layout is not one that can be read.
        CacheError: Files are missing and cannot be downloaded, or they are damaged.
    """
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
