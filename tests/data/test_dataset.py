"""A user's own dataset as a transfer set: classes, splits, rows, storage, and errors inside its code."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision import transforms
from torchvision.datasets import VisionDataset

from softcache.base.errors import CacheError, UsageError
from softcache.data.images.dataset_images import DatasetImages
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.sources import dataset as dataset_source
from softcache.data.sources import load_source
from softcache.data.transfer_set import Split, TransferSet, load_transfer_set
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.loading.rendering import render_batches

Pixels = NDArray[np.uint8]


class Images:
    """Images in memory with labels, and names of the classes where there are some."""

    def __init__(self, images: Any, labels: Any, classes: Any = None):
        self.images, self.labels = images, labels
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.images[row], self.labels[row]


def load(data: Any, **options: Any) -> TransferSet:
    return load_transfer_set(data, Path(), **{"val_fraction": 0.125, **options})


def make_images(rows: int = 24, classes: int = 3, size: int = 8, names: Any = None) -> Images:
    pixels = (np.arange(rows * size * size * 3) * 91 % 256).astype(np.uint8).reshape(rows, size, size, 3)
    return Images(pixels, [row % classes for row in range(rows)], names)


@pytest.fixture(scope="module")
def digits() -> dict[str, Images]:
    return {
        split: Images(part.images.pixels[:, 0].numpy(), part.labels.tolist())  # type: ignore[union-attr]
        for split, part in load_source("digits").splits.items()
    }


# --- classes ------------------------------------------------------------------------------------------------------


def test_classes_are_the_given_names_or_the_datasets_own_or_numbers() -> None:
    assert load(make_images()).classes == ("0", "1", "2")
    assert load(make_images(names=["a", "b", "c", "d"])).classes == ("a", "b", "c", "d")
    assert load(make_images(names=[("a", "A"), ("b",), ("c",)])).classes == ("0", "1", "2")
    assert load(make_images(), classes=["x", "y", "z"]).classes == ("x", "y", "z")
    assert load({"train": make_images(), "test": make_images(classes=2)}).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("data", "classes", "text"),
    [
        (make_images(), ["x", "y", "x"], "classes has the name 'x' more than once"),
        (make_images(), ["x", "y"], r"train row 2 .* has the label 2, but there are 2 classes \(x, y\)"),
        (make_images(), "natural", "expected a list of names"),
        (make_images(), [1, 2, 3], "no text"),
        (make_images(), ["x", "y", "a\nb"], "cannot be printed"),
        (make_images(names=["a", "b", "c"]), ["x", "y", "z"], r"\(x, y, z\) are not the dataset's own \(a, b, c\)"),
        ({"train": make_images(names=["a", "b", "c"]), "test": make_images(names=["a", "c", "b"])}, (), "other class"),
    ],
    ids=["twice", "too few", "a text", "numbers", "unprintable", "others than its own", "others in test"],
)
def test_names_that_do_not_fit_are_refused(data: Any, classes: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        load(data, classes=classes)


def test_options_of_folders_are_refused() -> None:
    with pytest.raises(UsageError, match="not for a dataset"):
        load(make_images(), exif="transpose")
    with pytest.raises(UsageError, match="open the cache from Python"):
        load("dataset")


# --- splits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"train_size": 300, "seed": 3}, {"imbalance": "10", "head_size": 50}])
def test_rows_are_drawn_as_those_of_other_sources(digits: dict[str, Images], options: dict[str, Any]) -> None:
    expected, loaded = load("digits", **options), load(digits, **options)
    assert loaded.name == "dataset"
    assert loaded.cut == expected.cut
    assert loaded.classes == expected.classes
    for split, rows in expected.splits.items():
        np.testing.assert_array_equal(loaded.splits[split].labels, rows.labels)
        np.testing.assert_array_equal(loaded.splits[split].source_rows, rows.source_rows)
        assert torch.equal(loaded.splits[split].images.pixels, rows.images.pixels)  # type: ignore[union-attr]


def test_source_rows_are_rows_of_the_dataset(digits: dict[str, Images]) -> None:
    loaded = load(digits, train_size=300)
    for split, source in (("train", "train"), ("val", "train"), ("test", "test")):
        rows = loaded.splits[split]
        assert rows.source_rows is not None
        assert rows.source_rows.dtype == np.int64
        np.testing.assert_array_equal(rows.images.pixels[:, 0], digits[source].images[rows.source_rows])  # type: ignore[union-attr]
    drawn = np.concatenate([loaded.splits[split].source_rows for split in ("train", "val")])
    assert len(set(drawn.tolist())) == 300 + len(loaded.splits["val"])


def test_one_dataset_has_no_test_rows_and_a_given_val_split_is_taken() -> None:
    assert set(load(make_images()).splits) == {"train", "val"}
    given = load({"test": make_images(4), "val": make_images(6), "train": make_images()})
    assert {split: len(rows) for split, rows in given.splits.items()} == {"train": 24, "val": 6, "test": 4}
    np.testing.assert_array_equal(given.splits["val"].source_rows, np.arange(6))


def test_content_depends_on_pixels_labels_and_order() -> None:
    data = make_images()
    content = load(data).splits["train"].content
    assert load(data).splits["train"].content == content
    changed = Images(data.images.copy(), data.labels)
    changed.images[5, 0, 0, 0] ^= 1
    is_same = [load(changed).splits[split].content == rows.content for split, rows in load(data).splits.items()]
    assert sorted(is_same) == [False, True]
    assert load(Images(data.images, data.labels[::-1])).splits["train"].content != content
    assert load(Images(data.images[::-1], data.labels)).splits["train"].content != content


# --- in memory, or read for each view -----------------------------------------------------------------------------


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_source, "MAX_IN_MEMORY", 24 * 8 * 8 * 3 - 1)


def render_all(split: Split, policy: str) -> torch.Tensor:
    index = np.repeat(np.arange(len(split)), 2)
    return render(split.images, parse_views(policy), 5, index, np.arange(len(index)) % 2)


@pytest.mark.parametrize("policy", ["none", "crop-flip:pad=2,mixup=0.3", "resized-crop-flip", "crop-flip:size=6"])
def test_views_are_the_same_in_memory_and_read_again(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = load(make_images())
    assert isinstance(in_memory.splits["train"].images, ImageArrays)
    monkeypatch.setattr(dataset_source, "MAX_IN_MEMORY", 24 * 8 * 8 * 3 - 1)
    read_again = load(make_images())
    assert isinstance(read_again.splits["train"].images, DatasetImages)
    assert read_again.identity() == in_memory.identity()
    assert (read_again.size, read_again.channels) == (8, 3)
    for split, rows in in_memory.splits.items():
        assert torch.equal(render_all(read_again.splits[split], policy), render_all(rows, policy))


def test_images_of_several_sizes_are_read_for_each_view() -> None:
    images = [np.full((8 + row % 3, 10, 3 if row == 20 else 1), 10 * row, np.uint8) for row in range(24)]
    loaded = load(Images(images, [row % 2 for row in range(24)]))
    assert (loaded.size, loaded.channels) == (0, 3)
    train = loaded.splits["train"]
    views = render(train.images, parse_views("none:size=8"), 0, np.arange(len(train)), 0)
    assert views[:, :, 4, 4].tolist() == [[10 * row] * 3 for row in train.source_rows.tolist()]  # type: ignore[union-attr]
    assert train.images.describe(0) == f"train row {train.source_rows[0]} of the dataset"  # type: ignore[index]


@pytest.mark.usefixtures("no_memory")
def test_images_that_are_read_again_go_to_other_processes() -> None:
    train = load(make_images()).splits["train"]
    copy = Split(pickle.loads(pickle.dumps(train.images)), train.labels, "")
    assert torch.equal(render_all(copy, "crop-flip"), render_all(train, "crop-flip"))


@pytest.mark.usefixtures("no_memory")
def test_an_image_that_changes_after_loading_is_an_error() -> None:
    data = make_images()
    train = load(data).splits["train"]
    data.images[int(train.source_rows[3])] += 1  # type: ignore[index]
    render(train.images, parse_views("none"), 0, np.arange(3), 0)
    with pytest.raises(CacheError, match=r"^train row \d+ of the dataset is another image than"):
        render(train.images, parse_views("none"), 0, np.arange(4), 0)


def test_progress_counts_the_rows_of_each_split() -> None:
    shown: list[tuple[int, str]] = []

    def progress(items: Any, total: int, text: str) -> Any:
        shown.append((total, text))
        return items

    load({"train": make_images(), "test": make_images(5)}, progress=progress)
    assert shown == [(24, "reading images"), (5, "reading images")]


# --- datasets as others write them --------------------------------------------------------------------------------


class TorchvisionDigits(VisionDataset):  # type: ignore[misc]
    """Digits as torchvision's MNIST returns them."""

    def __init__(self, data: Images, transform: Callable[[Any], Any] | None):
        super().__init__("unused", transform=transform)
        self.data, self.classes = data, [f"{c} - digit" for c in range(10)]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        pixels, label = self.data[row]
        image = transforms.functional.to_pil_image(pixels)
        return self.transform(image) if self.transform else image, label


def test_a_torchvision_dataset_is_loaded_with_and_without_to_tensor(digits: dict[str, Images]) -> None:
    plain, tensors = (load(TorchvisionDigits(digits["test"], each)) for each in (None, transforms.ToTensor()))
    assert plain.identity() == tensors.identity()
    assert plain.classes[3] == "3 - digit"
    assert (plain.channels, plain.size) == (1, 8)


@pytest.mark.parametrize(
    "transform",
    [
        transforms.RandomHorizontalFlip(),
        transforms.RandomCrop(8, padding=2),
        transforms.Compose([transforms.ToTensor(), transforms.RandomErasing(p=0.5, value=1)]),
        transforms.RandomResizedCrop(8),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_random_transforms_are_refused_before_all_rows_are_read(digits: dict[str, Images], transform: Any) -> None:
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=r"has another image when it is read twice: .* without random transforms"):
        load(TorchvisionDigits(digits["train"], transform), progress=None)  # which cannot be called


def test_random_labels_are_refused() -> None:
    chance = random.Random(0)
    data = make_images()
    data.labels = type("", (), {"__getitem__": lambda self, row: chance.randrange(5)})()
    with pytest.raises(UsageError, match="has another label when it is read twice"):
        load(data)


# --- errors inside the user's code --------------------------------------------------------------------------------


class Failing(Images):
    broken = -1

    def __getitem__(self, row: int) -> tuple[Any, int]:
        if row == self.broken:
            raise KeyError("no such file")  # the line of the message
        return super().__getitem__(row)


LINE = next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "raise KeyError" in line)


def make_failing() -> Failing:
    return Failing(make_images(40).images, make_images(40).labels)


@pytest.mark.parametrize("row", [0, 33])
def test_an_error_of_the_dataset_names_row_split_and_line(row: int) -> None:
    data = make_failing()
    data.broken = row
    with pytest.raises(UsageError) as error:
        load({"train": make_images(), "val": data})
    message = str(error.value)
    assert message.startswith(f"val row {row} of the dataset cannot be read: KeyError: 'no such file' (")
    assert message.endswith(f"test_dataset.py:{LINE}, in __getitem__)")
    assert isinstance(error.value.__cause__, KeyError)


def test_an_error_of_its_length_is_one_line() -> None:
    data = make_images()
    data.images = 3
    with pytest.raises(UsageError, match=r"the length of the train dataset cannot be read: TypeError: .*test_dataset"):
        load(data)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("no_memory")
def test_an_error_in_a_worker_process_is_the_same_line() -> None:
    data = make_failing()
    train = load(data).splits["train"]
    data.broken = int(train.source_rows[2])  # type: ignore[index]
    with pytest.raises(UsageError, match=rf"^train row {data.broken} .*test_dataset.py:{LINE}, in __getitem__\)$"):
        list(render_batches(train.images, parse_views("none"), 0, [np.arange(4)], 0, workers=1))
