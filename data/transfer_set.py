"""Transfer sets: what the teacher is asked about. One row of TRANSFER_SETS per data set."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base import rng
from softcache.base.errors import CacheError, UsageError, unknown_name_error

from .image_arrays import ImageArrays
from .image_folder import ImageFolder, Progress, hash_files, read_folder
from .long_tail import apportion, parse_imbalance, select_long_tail

Labels = NDArray[np.int64]
SplitsAndClasses = tuple[dict[str, tuple[ImageArrays | ImageFolder, Labels]], tuple[str, ...]]


@dataclass(frozen=True)
class Split:
    """Rows that belong together. labels int64 [N], -1 where there is none; content: digest of all of it."""

    images: ImageArrays | ImageFolder
    labels: Labels
    content: str

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TransferSet:
    """Splits of one data set. size: the images' one side in pixels, 0 where they differ."""

    name: str
    classes: tuple[str, ...]
    channels: int
    size: int
    splits: dict[str, Split]
    cut: dict[str, Any]

    def identity(self) -> dict[str, object]:
        """What a cache must agree with: name, classes in order, content of each split, how they were cut."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "content": {split: rows.content for split, rows in self.splits.items()},
            "cut": dict(self.cut),
        }


@dataclass(frozen=True)
class Recipe:
    """What `stages` does with a data set when nothing else is said. Losses and archs as on the command line."""

    views: str = "crop-flip"
    draws: int = 10
    teacher: str = "resnet56"
    teacher_views: str = "crop-flip"
    teacher_epochs: int = 100
    student: str = "resnet8"
    student_epochs: int = 100
    losses: tuple[str, ...] = ("kd:temperature=4,weight=0.9", "hard:weight=0.1")
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    teacher_learning_rate: float = 0.1
    teacher_weight_decay: float = 5e-4
    val_fraction: float = 0.1


@dataclass(frozen=True)
class DataSource:
    """read(root) gives the splits that the data set comes with, and its classes."""

    read: Callable[[Path], SplitsAndClasses]
    recipe: Recipe


def _read_digits(root: Path) -> SplitsAndClasses:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)  # 0 … 16 on 8 x 8
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = labels.astype(np.int64)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    rest, test, whole = np.sort(rest), np.sort(test), ImageArrays(images)
    splits = {"train": (whole.take(rest), labels[rest]), "test": (whole.take(test), labels[test])}
    return splits, tuple(str(c) for c in range(10))  # type: ignore[return-value]


def _torchvision_reader(name: str, folder: str) -> Callable[[Path], SplitsAndClasses]:
    """A data set that torchvision reads, and downloads when its files are absent."""

    def read(root: Path) -> SplitsAndClasses:
        import torchvision

        kind = getattr(torchvision.datasets, name)
        splits = {}
        for split, train in (("train", True), ("test", False)):
            try:
                found = kind(root, train=train, download=False)
            except (AssertionError, ValueError, TypeError, EOFError) as error:
                raise CacheError(f"the files of {name} in '{root / folder}' are damaged ({error})") from None
            except RuntimeError:  # not there, says torchvision
                try:
                    found = kind(root, train=train, download=True)
                except Exception as error:  # urllib, sockets, checksums: whatever a download can raise
                    why = " ".join(str(error).split())  # torchvision's own goes over several lines
                    raise CacheError(
                        f"{name} is not under '{root}' and cannot be downloaded ({why}): put its files"
                        f" into '{root / folder}', or say where they are with --data-root"
                    ) from None
            pixels = torch.as_tensor(found.data)
            images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
            labels = np.asarray(found.targets, np.int64)
            if len(labels) != len(images):
                raise CacheError(
                    f"the files of {name} in '{root / folder}' hold {len(images)} images, {len(labels)} labels"
                )
            splits[split] = (ImageArrays(images), labels)
        return splits, tuple(found.classes)  # type: ignore[return-value]

    return read


# Numbers of the recipes: see DESIGN.md, "Recipes".
TRANSFER_SETS: dict[str, DataSource] = {
    "digits": DataSource(
        _read_digits,
        Recipe(
            views="none",
            draws=1,
            teacher="cnn",
            teacher_views="crop:pad=1",
            teacher_epochs=60,
            teacher_learning_rate=0.05,
            teacher_weight_decay=1e-3,
            student="mlp:64",
            student_epochs=150,
            losses=("kd:temperature=4",),
            batch_size=64,
            val_fraction=0.125,
        ),
    ),
    "mnist": DataSource(
        _torchvision_reader("MNIST", "MNIST/raw"),
        Recipe(
            views="none",
            draws=1,
            teacher="mlp:1200,1200",
            teacher_views="crop:pad=2",
            teacher_epochs=30,
            teacher_learning_rate=0.05,
            teacher_weight_decay=1e-4,
            student="mlp:800,800",
            student_epochs=20,
            losses=("kd:temperature=20",),
            learning_rate=0.05,
        ),
    ),
    "fashion-mnist": DataSource(
        _torchvision_reader("FashionMNIST", "FashionMNIST/raw"),
        Recipe(teacher="resnet20", teacher_epochs=30, student="cnn", student_epochs=30),
    ),
    "cifar10": DataSource(_torchvision_reader("CIFAR10", "cifar-10-batches-py"), Recipe()),
    "cifar100": DataSource(_torchvision_reader("CIFAR100", "cifar-100-python"), Recipe()),
    "folder": DataSource(
        read_folder,  # type: ignore[arg-type]
        Recipe(
            views="resized-crop-flip",
            teacher_views="resized-crop-flip",
            teacher="torchvision:resnet50",
            student="torchvision:mobilenet_v3_small",
        ),
    ),
}


def find_source(data: str) -> DataSource:
    """The row of TRANSFER_SETS that `digits` or `folder:PATH` names, or UsageError."""
    name, _, path = data.partition(":")
    if name not in TRANSFER_SETS:
        raise unknown_name_error("data set", name, [*TRANSFER_SETS, "folder:PATH"])
    if (name == "folder") != bool(path):
        raise UsageError("a folder of images is named with its path: --data folder:PATH")
    return TRANSFER_SETS[name]


def load_transfer_set(
    data: str,
    root: Path,
    *,
    val_fraction: float,
    seed: int = 0,
    train_size: int = 0,
    imbalance: str = "",
    head_size: int = 0,
    progress: Progress = lambda items, total, what: items,
) -> TransferSet:
    """Read a data set and cut its validation split out of its training data.

    val_fraction: share of the training data, 0 < val_fraction < 1, drawn by class from seed; unused when
    the data come with a validation split. train_size: keep so many training rows, drawn by class; 0 keeps all.
    imbalance, head_size: keep a long-tailed part of the training rows, see long_tail; val and test stay as they are.
    Raises UsageError or CacheError where the data are not there or do not fit.
    """
    row = find_source(data)
    name, _, path = data.partition(":")
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction:g} is outside 0 to 1")
    read, classes = row.read(Path(path) if path else root)
    images, labels = read["train"]
    if "val" not in read:
        rows = max(1, round(len(labels) * val_fraction))
        if rows >= len(labels):
            raise UsageError(f"--val-fraction {val_fraction:g} of {len(labels)} training rows leaves none to train on")
        val = draw_stratified(labels, rows, key=(seed, 10))
        read["val"] = (images.take(val), labels[val])
        keep = np.setdiff1d(np.arange(len(labels)), val)
        images, labels = images.take(keep), labels[keep]
    keep, tail = _select_training_rows(labels, len(classes), train_size, imbalance, head_size, seed)
    if len(keep) < len(labels):
        images, labels = images.take(keep), labels[keep]
    read["train"] = (images, labels)

    splits: dict[str, Split] = {
        split: Split(read[split][0], read[split][1], _hash_content(*read[split], progress))
        for split in ("train", "val", "test")
        if split in read
    }
    if isinstance(images, ImageFolder):
        channels, size = (1 if images.mode == "L" else 3), images.native
    else:
        channels, size = images.pixels.shape[1], images.pixels.shape[-1]
    cut = {"val_fraction": val_fraction, "seed": seed, "train_size": train_size, **tail}
    return TransferSet(name, classes, channels, size, splits, cut)


def _select_training_rows(
    labels: Labels, classes: int, train_size: int, imbalance: str, head_size: int, seed: int
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """The training rows that stay, sorted; and what the cut says of a long tail, nothing where there is none."""
    if not 0 <= train_size <= len(labels):
        raise UsageError(f"--train-size {train_size} is not between 0 and the {len(labels)} training rows there are")
    if imbalance:
        if train_size:
            raise UsageError("--train-size and --imbalance both say which training rows stay: leave out one")
        keep, head = select_long_tail(labels, classes, imbalance, head_size, key=(seed, 12))
        return keep, {"imbalance": str(parse_imbalance(imbalance)), "head_size": head}
    if head_size:
        raise UsageError(f"--head-size {head_size} is the largest class of a long tail: say --imbalance, too")
    if train_size:
        return np.sort(draw_stratified(labels, train_size, key=(seed, 11))), {}
    return np.arange(len(labels)), {}


def draw_stratified(labels: Labels, n: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """n rows, sorted, drawn so that each class keeps its share to within one row; the same rows for ever.

    Our own few lines because the rows are part of a cache's identity: scikit-learn's draw may change
    between releases, and it refuses a class with a single row.
    """
    classes, position, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quota = apportion(counts * (n / len(labels)), n)
    order = rng.permutation(key, len(labels))
    taken = [order[position[order] == c][: quota[c]] for c in range(len(classes))]
    return np.sort(np.concatenate(taken))


def count_classes(labels: Labels, classes: int) -> NDArray[np.int64]:
    """int64 [classes]: rows of each class; rows without a label count for nothing."""
    return np.bincount(labels[labels >= 0], minlength=classes)


def _hash_content(images: ImageArrays | ImageFolder, labels: Labels, progress: Progress) -> str:
    if isinstance(images, ImageFolder):
        return hash_files(images, labels, progress)
    whole = sha256(repr(tuple(images.pixels.shape)).encode())
    whole.update(images.pixels.contiguous().numpy().data)
    whole.update(labels.astype("<i8").tobytes())
    return whole.hexdigest()


def short_name(data: str) -> str:
    """A data set's name as part of a folder's name: `digits`, or the last part of a folder's path."""
    name, _, path = data.partition(":")
    return Path(path).name or "folder" if path else name
