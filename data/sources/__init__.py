"""Data sources: each module loads one kind of data set from its files, as it was published.

May import the modules of `softcache.data` beside this folder, not `transfer_set.py`, which cuts the splits that are
loaded here. Begin with `digits.py`; a new source is one function in a module and one row of SOURCES.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.progress import Progress, no_progress
from softcache.data.dataset_items import Data

from .arrays import load_arrays
from .cifar import load_cifar10, load_cifar100
from .dataset import load_dataset
from .digits import load_digits
from .folder import load_image_folder
from .mnist import load_fashion_mnist, load_mnist
from .source_data import DEFAULT_READING, ReadingOptions, SourceData


class Source(NamedTuple):
    """A kind of data that `--data` can name.

    Attributes:
        load: Called with what stands after the colon, the options and a progress bar.
        argument: What stands after the colon, such as PATH; "" where nothing does.
        options: Options of ReadingOptions that it takes, besides those of every source.
    """

    load: Callable[[str, ReadingOptions, Progress], SourceData]
    argument: str = ""
    options: tuple[str, ...] = ()


SOURCES: dict[str, Source] = {
    "digits": Source(lambda _, options, __: load_digits(options.root)),
    "mnist": Source(lambda _, options, __: load_mnist(options.root)),
    "fashion-mnist": Source(lambda _, options, __: load_fashion_mnist(options.root)),
    "cifar10": Source(lambda _, options, __: load_cifar10(options.root)),
    "cifar100": Source(lambda _, options, __: load_cifar100(options.root)),
    "folder": Source(load_image_folder, "PATH", ("classes", "exif", "unreadable")),
    "arrays": Source(load_arrays, "FILE.npz"),
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
        The name of a source in SOURCES, and its argument, which is empty where the source has none.

    Raises:
        UsageError: There is no such source, its argument is missing, or it has none and one is given.
    """
    name, _, argument = data.partition(":")
    if name == DATASET:
        raise UsageError(f"a dataset of your own has no name by which its cache could be opened: {OPEN_FROM_PYTHON}")
    if name not in SOURCES:
        raise unknown_name_error("data set", name, [format_placeholder(name) for name in SOURCES])
    if SOURCES[name].argument and not argument:
        raise UsageError(f"--data {name} needs what it reads after a colon: --data {format_placeholder(name)}")
    if argument and not SOURCES[name].argument:
        raise UsageError(f"--data {data}: '{name}' has nothing after a colon")
    return name, argument


def format_placeholder(name: str) -> str:
    """Format `--data` of a source without the path of this machine: `digits`, `folder:PATH`."""
    argument = SOURCES[name].argument if name in SOURCES else ""
    return f"{name}:{argument}" if argument else name


def has_argument(name: str) -> bool:
    """Return whether the source of this name has an argument, which no manifest may name: the path of a folder."""
    return name in SOURCES and bool(SOURCES[name].argument)


def load_source(data: Data, options: ReadingOptions = DEFAULT_READING, progress: Progress = no_progress) -> SourceData:
    """Load the data that `digits` or `folder:PATH` names, or a dataset, in the splits in which they were published.

    Args:
        data: The name of a source, `folder:PATH`, or a dataset or one of each split, see `load_dataset`.
        options: How it is read. Of a dataset, `classes` may be the names of the classes.
        progress: Shows how many images are read.

    Raises:
        UsageError: There is no such source, an option is given that the source does not have, or the data have a form
            that cannot be read.
        CacheError: Files are missing and cannot be downloaded, or they are damaged.
    """
    name, argument = parse_data(data) if isinstance(data, str) else (DATASET, "")
    allowed = SOURCES[name].options if name in SOURCES else ("classes",)
    for option in ("classes", "exif", "unreadable"):
        if option not in allowed and getattr(options, option) != getattr(DEFAULT_READING, option):
            takers = ", ".join(
                format_placeholder(name) for name, source in SOURCES.items() if option in source.options
            )
            raise UsageError(f"--{option} is for --data {takers}, not for {'a dataset' if name == DATASET else name}")
    if not isinstance(data, str):
        return load_dataset(data, options.classes or (), progress)
    return SOURCES[name].load(argument, options, progress)


def short_name(data: str) -> str:
    """Return a name for folders: `digits` for `digits`, and the last part of the path for `folder:PATH`.

    A file of arrays gives its name without the ending.
    """
    name, _, argument = data.partition(":")
    path = Path(argument)
    if path.suffix in (".npz", ".npy"):
        return path.stem
    return path.name or name if argument else name
