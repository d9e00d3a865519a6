"""Data sets that torchvision reads, from small files of the right format."""

import hashlib
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from numpy.typing import NDArray

from softcache.base.errors import CacheError
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.sources import SOURCES
from softcache.data.transfer_set import Split, TransferSet, load_transfer_set

Pixels = NDArray[np.uint8]
IDX = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
CIFAR = {"cifar10": 10, "cifar100": 100}
FOLDERS = {
    "mnist": "MNIST/raw",
    "fashion-mnist": "FashionMNIST/raw",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
}
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def images_of(split: Split) -> Pixels:
    assert isinstance(split.images, ImageArrays)
    return split.images.pixels.numpy()


def test_every_source_has_tests() -> None:
    in_other_files = {
        "folder",
        "parquet",
        "webdataset",
        "hf",
        "arrays",
    }  # test_image_folder, test_data_files, test_hub_dataset
    assert {"digits", *in_other_files, *FOLDERS} == set(SOURCES)


@dataclass
class Content:
    """Pixels [N, C, H, W] and labels [N] of the train and the test files, and the names of the classes."""

    pixels: dict[str, Pixels]
    labels: dict[str, NDArray[np.int64]]
    classes: list[str]


def make_content(data: str, classes: int) -> Content:
    pixels, labels = {}, {}
    for split, n, k in (("train", 5 * 2 * classes, 3), ("test", 2 * classes, 11)):
        i, c, y, x = np.indices((n, 1, 28, 28) if data in IDX else (n, 3, 32, 32))
        pixels[split] = ((k * i + 70 * c + 7 * y + 3 * x + x * y + i * x + i // 256 * y) % 256).astype(np.uint8)
        labels[split] = np.arange(n) * 7 % classes
    return Content(pixels, labels, [f"class {c}" for c in range(classes)])


def write_idx(folder: Path, content: Content) -> None:
    """Write the four files of MNIST: a magic number and the sizes, big-endian, then the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = content.pixels[split][:, 0], content.labels[split]
        head = b"".join(n.to_bytes(4, "big") for n in (0x0803, *images.shape))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = b"".join(n.to_bytes(4, "big") for n in (0x0801, len(labels)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())


def write_cifar(folder: Path, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write pickled batches, and replace torchvision's list of their checksums by theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    is_cifar10 = len(content.classes) == 10
    dataset = torchvision.datasets.CIFAR10 if is_cifar10 else torchvision.datasets.CIFAR100

    def store(name: str, batch: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        return hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    lists = {}
    for split, attribute in (("train", "train_list"), ("test", "test_list")):
        names = [name for name, _ in getattr(dataset, attribute)]
        images = np.array_split(content.pixels[split], len(names))
        labels = np.array_split(content.labels[split], len(names))
        lists[attribute] = [
            [name, store(name, {"data": x.reshape(len(x), -1), "labels" if is_cifar10 else "fine_labels": y.tolist()})]
            for name, x, y in zip(names, images, labels, strict=True)
        ]
    names_key, file = ("label_names", "batches.meta") if is_cifar10 else ("fine_label_names", "meta")
    lists["meta"] = {"filename": file, "key": names_key, "md5": store(file, {names_key: content.classes})}
    for attribute, value in lists.items():
        monkeypatch.setattr(dataset, attribute, value)


Write = Callable[[str, Content], TransferSet]


@pytest.fixture
def write_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write_and_load("cifar10", content)` writes the files of a data set and loads it from them."""

    def call(data: str, content: Content) -> TransferSet:
        folder = tmp_path / FOLDERS[data]
        if data in IDX:
            write_idx(folder, content)
        else:
            write_cifar(folder, content, monkeypatch)
        return load_transfer_set(data, tmp_path, val_fraction=0.2)

    return call


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every download fails at once, as on a machine without a network."""

    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fail)


@pytest.mark.parametrize(
    ("data", "channels", "size"),
    [
        ("mnist", 1, 28),
        ("fashion-mnist", 1, 28),
        ("cifar10", 3, 32),
        ("cifar100", 3, 32),
    ],
)
def test_pixels_and_labels_are_those_of_the_files(
    write_and_load: Write, no_network: None, data: str, channels: int, size: int
) -> None:
    content = make_content(data, CIFAR.get(data, 10))
    transfer_set = write_and_load(data, content)
    assert (transfer_set.name, transfer_set.channels, transfer_set.size) == (data, channels, size)
    assert np.array_equal(images_of(transfer_set.splits["test"]), content.pixels["test"])
    assert np.array_equal(transfer_set.splits["test"].labels, content.labels["test"])

    train, val = transfer_set.splits["train"], transfer_set.splits["val"]
    n = len(content.labels["train"])
    assert (len(train), len(val)) == (n * 4 // 5, n // 5)
    assert np.bincount(val.labels).tolist() == [2] * len(content.classes)
    # The rows of each split are in the order of the files, and the two splits have all rows of the file.
    position_of = {image.tobytes(): i for i, image in enumerate(content.pixels["train"])}
    assert len(position_of) == n
    positions = {
        split: [position_of[x.tobytes()] for x in images_of(transfer_set.splits[split])] for split in ("train", "val")
    }
    assert all(rows == sorted(rows) for rows in positions.values())
    assert sorted(positions["train"] + positions["val"]) == list(range(n))
    for split, rows in positions.items():
        assert np.array_equal(transfer_set.splits[split].labels, content.labels["train"][rows])


def test_class_names_are_those_of_the_data(write_and_load: Write) -> None:
    numbers = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    mnist = write_and_load("mnist", make_content("mnist", 10)).classes
    assert mnist == tuple(f"{digit} - {name}" for digit, name in enumerate(numbers))
    assert write_and_load("fashion-mnist", make_content("fashion-mnist", 10)).classes == FASHION
    for data, classes in CIFAR.items():
        assert write_and_load(data, make_content(data, classes)).classes == tuple(f"class {c}" for c in range(classes))


@pytest.mark.parametrize("data", FOLDERS)
def test_missing_files_give_one_line_that_says_where_to_put_them(tmp_path: Path, no_network: None, data: str) -> None:
    with pytest.raises(CacheError) as raised:
        load_transfer_set(data, tmp_path, val_fraction=0.1)
    message = str(raised.value)
    assert f"is not under '{tmp_path}' and cannot be downloaded (" in message
    assert "no route to host" in message
    assert f"put its files into '{tmp_path / FOLDERS[data]}', or name their folder with --data-root" in message
    assert "\n" not in message


@pytest.mark.parametrize("data", FOLDERS)
def test_files_are_read_from_the_folder_that_the_message_names(
    tmp_path: Path, no_network: None, write_and_load: Write, data: str
) -> None:
    write_and_load(data, make_content(data, CIFAR.get(data, 10)))
    shutil.move(tmp_path / FOLDERS[data], tmp_path / "aside")
    with pytest.raises(CacheError) as raised:
        load_transfer_set(data, tmp_path, val_fraction=0.2)
    named_folder = str(raised.value).split("put its files into '")[1].split("'")[0]
    shutil.rmtree(named_folder, ignore_errors=True)
    shutil.move(tmp_path / "aside", named_folder)
    assert load_transfer_set(data, tmp_path, val_fraction=0.2).name == data


def test_a_damaged_batch_is_refused(tmp_path: Path, no_network: None, write_and_load: Write) -> None:
    write_and_load("cifar10", make_content("cifar10", 10))
    batch = tmp_path / FOLDERS["cifar10"] / "data_batch_3"
    raw = bytearray(batch.read_bytes())
    raw[-100] ^= 1
    batch.write_bytes(raw)
    with pytest.raises(CacheError, match="CIFAR10 is not under"):
        load_transfer_set("cifar10", tmp_path, val_fraction=0.2)


def test_fewer_labels_than_images_are_refused(tmp_path: Path) -> None:
    content = make_content("mnist", 10)
    content.labels["train"] = content.labels["train"][:-1]
    write_idx(tmp_path / "MNIST" / "raw", content)
    with pytest.raises(CacheError, match="hold 100 images, 99 labels"):
        load_transfer_set("mnist", tmp_path, val_fraction=0.5)


def test_a_file_that_is_not_an_idx_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_idx(folder, make_content("mnist", 10))
    (folder / "train-images-idx3-ubyte").write_bytes(b"not an IDX file, but long enough to be one")
    with pytest.raises(CacheError, match="are damaged"):
        load_transfer_set("mnist", tmp_path, val_fraction=0.5)


# --- identity -----------------------------------------------------------------------------------------------------


def change_pixel(content: Content) -> None:
    content.pixels["test"][3, 0, 5, 5] ^= 1


def change_training_pixel(content: Content) -> None:
    content.pixels["train"][-1, -1, -1, -1] ^= 128


def change_label(content: Content) -> None:
    content.labels["test"][4] = (content.labels["test"][4] + 1) % 10


def swap_classes(content: Content) -> None:
    content.classes[:2] = content.classes[1::-1]


def swap_rows(content: Content) -> None:
    for arrays in (content.pixels, content.labels):
        arrays["test"][[0, 10]] = arrays["test"][[10, 0]]  # two rows of one class: the labels stay as they are


@pytest.mark.parametrize("change", [change_pixel, change_training_pixel, change_label, swap_classes, swap_rows])
def test_the_identity_changes_with_every_pixel_label_class_and_order(
    write_and_load: Write, change: Callable[[Content], None]
) -> None:
    before = write_and_load("cifar10", make_content("cifar10", 10)).identity()
    assert write_and_load("cifar10", make_content("cifar10", 10)).identity() == before
    content = make_content("cifar10", 10)
    change(content)
    assert write_and_load("cifar10", content).identity() != before
