"""Data sources: each module loads one kind of data set from its files, as it was published.

May import the modules of `softcache.data` beside this folder, not `transfer_set.py`, which cuts the splits that are
loaded here. Begin with `digits.py`; a new source is one function in a module and one row of SOURCES.
"""

import shlex
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from softcache.base.errors import UsageError, make_printable, unknown_name_error
from softcache.base.progress import Progress, no_progress
from softcache.base.user_modules import file_name_error, module_exists
from softcache.data.images.dataset_items import Data
from softcache.data.sources.files.hub_dataset import load_hub_dataset
from softcache.data.sources.files.parquet import load_parquet
from softcache.data.sources.files.webdataset import load_webdataset
from softcache.data.sources.folders.folder import load_image_folder
from softcache.data.tasks import CLASSES, EMBEDDING

from .arrays import load_arrays
from .cifar import load_cifar10, load_cifar100
from .dataset import load_dataset
from .digits import load_digits
from .mnist import load_fashion_mnist, load_mnist
from .source_data import DEFAULT_READING, ReadingOptions, SourceData
from .user_dataset import is_dataset_spec, make_user_dataset


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


_OTHER_TASKS = ("labels", "numbers")  # besides classes, which every source has

SOURCES: dict[str, Source] = {
    "digits": Source(lambda _, options, __: load_digits(options.root)),
    "mnist": Source(lambda _, options, __: load_mnist(options.root)),
    "fashion-mnist": Source(lambda _, options, __: load_fashion_mnist(options.root)),
    "cifar10": Source(lambda _, options, __: load_cifar10(options.root)),
    "cifar100": Source(lambda _, options, __: load_cifar100(options.root)),
    "folder": Source(load_image_folder, "PATH", ("classes", "exif", "unreadable", "layout", "task")),
    "hf": Source(load_hub_dataset, "NAME", ("classes", "exif", "unreadable", "columns")),
    "parquet": Source(load_parquet, "GLOB", ("classes", "exif", "unreadable", "columns")),
    "webdataset": Source(load_webdataset, "GLOB", ("classes", "exif", "unreadable")),
    "arrays": Source(load_arrays, "FILE.npz", ("task",)),
}

# The sources that are suggested for a file that is named without one.
_SOURCE_OF_ENDING = {".npz": "arrays", ".npy": "arrays", ".parquet": "parquet", ".tar": "webdataset"}

DATASET = "dataset"  # the name of a user's own dataset, which has no row in SOURCES: their code makes it
DATASET_SPEC = "my_module:factory"  # stands for the code in commands that are printed
NAME_DATASET = (  # the end of a message
    f"name the function that makes it, with --data {DATASET_SPEC}, or open the cache from Python, with"
    " softcache.Cache(path, data=your_dataset)"
)


def get_source_name(data: Data) -> str:
    """Return the name of the source of any data: "dataset" for a dataset in memory of this process.

    Raises:
        UsageError: As in `parse_data`, for a text.
    """
    return parse_data(data)[0] if isinstance(data, str) else DATASET


def parse_data(data: str) -> tuple[str, str]:
    """Split `digits` into ("digits", "") and `folder:PATH` into ("folder", "PATH"). Nothing is imported.

    Returns:
        The name of a source in SOURCES, and its argument, which is empty where the source has none; "dataset" and the
        whole text for `my_module:factory`.

    Raises:
        UsageError: There is no such source, its argument is missing, or it has none and one is given.
    """
    name, _, argument = data.partition(":")
    if name == DATASET:
        raise UsageError(f"a dataset of your own has no name by which its cache could be opened: {NAME_DATASET}")
    if name.endswith(".py") and (error := file_name_error("data", data)):
        raise error
    is_misspelt = name not in SOURCES and get_close_matches(name, SOURCES, n=1) and not module_exists(name)
    if is_user_dataset(data) and not is_misspelt:
        return DATASET, data
    if name not in SOURCES:
        if data and (suggestion := _suggest_source(Path(data))):
            raise UsageError(f"--data {make_printable(data)}: a path goes after the name of a source: {suggestion}")
        raise unknown_name_error("data set", name, [format_placeholder(name) for name in SOURCES])
    if SOURCES[name].argument and not argument:
        raise UsageError(f"--data {name} needs what it reads after a colon: --data {format_placeholder(name)}")
    if argument and not SOURCES[name].argument:
        raise UsageError(f"--data {data}: '{name}' has nothing after a colon")
    return name, argument


def _suggest_source(path: Path) -> str:
    """Format `--data` for a path that exists; "" where no source reads it."""
    if path.is_dir():
        return f"--data {_quote('folder', path)}"
    if not path.is_file():
        return ""
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return f"--data {_quote('folder', path.parent)}, which reads the images beside labels.csv or labels.tsv"
    source = _SOURCE_OF_ENDING.get(ending, "")
    return f"--data {_quote(source, path)}" if source in SOURCES else ""


def _quote(source: str, path: Path) -> str:
    return shlex.quote(f"{source}:{make_printable(path)}")


def is_user_dataset(data: str) -> bool:
    """Return whether a text names code of the user that makes a dataset: `my_module:factory`."""
    name = data.partition(":")[0]
    return name not in SOURCES and name != DATASET and is_dataset_spec(data)


def make_named_dataset(data: Data, root: Path) -> Data:
    """Return the dataset that `my_module:factory` makes; other data as they are.

    Args:
        data: The data; "" for those that a cache names. Only text that a user typed: the module is imported.
        root: The option --data-root, see `make_user_dataset`.

    Raises:
        UsageError: As in `make_user_dataset`.
    """
    if isinstance(data, str) and is_user_dataset(data):
        parse_data(data)  # it may be a misspelt name
        return make_user_dataset(data, root)
    return data


def format_placeholder(name: str) -> str:
    """Format `--data` of a source without the path of this machine: `digits`, `folder:PATH`, `my_module:factory`."""
    if name == DATASET:
        return DATASET_SPEC
    argument = SOURCES[name].argument if name in SOURCES else ""
    return f"{name}:{argument}" if argument else name


def has_argument(name: str) -> bool:
    """Return whether a source has an argument that no manifest may name: the path of a folder, or code of the user."""
    return name == DATASET or (name in SOURCES and bool(SOURCES[name].argument))


def load_source(data: Data, options: ReadingOptions = DEFAULT_READING, progress: Progress = no_progress) -> SourceData:
    """Load the data that `digits` or `folder:PATH` names, or a dataset, in the splits in which they were published.

    Args:
        data: The name of a source, `folder:PATH`, `my_module:factory`, or a dataset or one of each split, see
            `load_dataset`.
        options: How it is read. Of a dataset, `classes` may be the names of the classes.
        progress: Shows how many images are read.

    Raises:
        UsageError: There is no such source, an option is given that the source does not have, or the data have a form
            that cannot be read.
        CacheError: Files are missing and cannot be downloaded, or they are damaged.
    """
    data = make_named_dataset(data, options.root)
    name, argument = parse_data(data) if isinstance(data, str) else (DATASET, "")
    if options.task == EMBEDDING and name != "arrays":  # what an embedding is evaluated with is one class an image
        options = replace(options, task=CLASSES)
    allowed = SOURCES[name].options if name in SOURCES else ("classes", "task")
    if options.task in _OTHER_TASKS and "task" not in allowed:
        takers = ", ".join(format_placeholder(name) for name, source in SOURCES.items() if "task" in source.options)
        raise UsageError(f"--task {options.task} is for --data {takers}, {DATASET_SPEC}: '{name}' has classes")
    for option in ("classes", "exif", "unreadable", "layout", "columns"):
        if option not in allowed and getattr(options, option) != getattr(DEFAULT_READING, option):
            takers = ", ".join(
                format_placeholder(name) for name, source in SOURCES.items() if option in source.options
            )
            raise UsageError(f"--{option} is for --data {takers}, not for {'a dataset' if name == DATASET else name}")
    if not isinstance(data, str):
        return load_dataset(data, options.classes or (), options.task, progress)
    return SOURCES[name].load(argument, options, progress)


def short_name(data: str) -> str:
    """Return a name for folders: `digits` for `digits`, and the last part of the path for `folder:PATH`.

    Of a pattern it is the last part without wildcards, such as `beans` of `parquet:beans/train-*.parquet`; of a file
    of arrays its name without the ending.
    """
    name, _, argument = data.partition(":")
    parts = [Path(argument.partition("@")[0].replace(":", "-") if name == "hf" else argument).name]
    if name in ("parquet", "webdataset"):
        plain = [part for part in Path(argument).parts if not set(part) & set("*?[]{}/")]
        parts = ["", *(part.removesuffix(".parquet").removesuffix(".tar") for part in plain)]
    return parts[-1].removesuffix(".npz").removesuffix(".npy") or name
