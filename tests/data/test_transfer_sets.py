"""What the teacher is asked about: every data set's rows, labels, splits and identity."""

import hashlib
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError
from softcache.data.image_arrays import ImageArrays
from softcache.data.sampling import draw_stratified
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


# --- digits -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> TransferSet:
    return load_transfer_set("digits", Path(), val_fraction=0.125)


def test_digits_have_1797_rows_in_three_splits(digits: TransferSet) -> None:
    assert {split: len(rows) for split, rows in digits.splits.items()} == {"train": 1257, "val": 180, "test": 360}
    assert (digits.name, digits.channels, digits.size) == ("digits", 1, 8)
    assert digits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    for split in digits.splits.values():
        assert images_of(split).shape == (len(split), 1, 8, 8)
        assert split.labels.dtype == np.int64


def test_every_digit_is_in_exactly_one_split(digits: TransferSet) -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    stored = [
        (row.tobytes(), int(y)) for row, y in zip(np.rint(pixels * 255 / 16).astype(np.uint8), labels, strict=True)
    ]
    split_up = [
        (image.tobytes(), int(label))
        for split in digits.splits.values()
        for image, label in zip(images_of(split), split.labels, strict=True)
    ]
    assert Counter(split_up) == Counter(stored)
    # No two digits are alike, so equal counts mean that no row is in two splits.
    assert len(set(split_up)) == 1797


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_digits_are_split_by_class(digits: TransferSet, split: str) -> None:
    everything = np.concatenate([rows.labels for rows in digits.splits.values()])
    rows = digits.splits[split]
    for c in range(10):
        share = (everything == c).sum() * len(rows) / 1797
        # One row of rounding when the test split is cut off, one more when the validation split is.
        assert abs((rows.labels == c).sum() - share) < (1 if split == "test" else 2)


def test_digits_are_pinned_so_that_a_cache_stays_valid(digits: TransferSet) -> None:
    assert {split: rows.content[:16] for split, rows in digits.splits.items()} == {
        "train": "c8e170b71028ff8f",
        "val": "ed70df0eb9e6f9a2",
        "test": "38453adaa0f8e18b",
    }


def test_loading_twice_gives_the_same_identity(digits: TransferSet) -> None:
    assert load_transfer_set("digits", Path("elsewhere"), val_fraction=0.125).identity() == digits.identity()


def test_another_seed_cuts_another_val_split_and_leaves_the_test_split(digits: TransferSet) -> None:
    other = load_transfer_set("digits", Path(), val_fraction=0.125, seed=1)
    assert other.splits["test"].content == digits.splits["test"].content
    assert other.splits["val"].content != digits.splits["val"].content
    shared = {x.tobytes() for x in images_of(other.splits["val"])} & {
        x.tobytes() for x in images_of(digits.splits["val"])
    }
    assert len(shared) < 60  # of 180; 22 are expected of two independent draws
    assert other.identity() != digits.identity()


# --- torchvision's data sets, from small files of the right form ----------------------------------------------------


@dataclass
class Written:
    """What a test wrote: pixels [N, C, H, W] and labels [N] of the train and the test files."""

    pixels: dict[str, Pixels]
    labels: dict[str, NDArray[np.int64]]
    classes: list[str]


def formula(data: str, classes: int) -> Written:
    pixels, labels = {}, {}
    for split, n, k in (("train", 5 * 2 * classes, 3), ("test", 2 * classes, 11)):
        i, c, y, x = np.indices((n, 1, 28, 28) if data in IDX else (n, 3, 32, 32))
        pixels[split] = ((k * i + 70 * c + 7 * y + 3 * x + x * y + i * x + i // 256 * y) % 256).astype(np.uint8)
        labels[split] = np.arange(n) * 7 % classes
    return Written(pixels, labels, [f"class {c}" for c in range(classes)])


def write_idx(folder: Path, written: Written) -> None:
    """Four files in MNIST's own form: a magic number, the sizes, big-endian, and then the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = written.pixels[split][:, 0], written.labels[split]
        head = b"".join(n.to_bytes(4, "big") for n in (0x0803, *images.shape))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = b"".join(n.to_bytes(4, "big") for n in (0x0801, len(labels)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())


def write_cifar(folder: Path, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled batches, and torchvision's list of their checksums made to fit them."""
    folder.mkdir(parents=True, exist_ok=True)
    ten = len(written.classes) == 10
    kind = torchvision.datasets.CIFAR10 if ten else torchvision.datasets.CIFAR100

    def store(name: str, content: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    lists = {}
    for split, attribute in (("train", "train_list"), ("test", "test_list")):
        names = [name for name, _ in getattr(kind, attribute)]
        images = np.array_split(written.pixels[split], len(names))
        labels = np.array_split(written.labels[split], len(names))
        lists[attribute] = [
            [name, store(name, {"data": x.reshape(len(x), -1), "labels" if ten else "fine_labels": y.tolist()})]
            for name, x, y in zip(names, images, labels, strict=True)
        ]
    names_key, file = ("label_names", "batches.meta") if ten else ("fine_label_names", "meta")
    lists["meta"] = {"filename": file, "key": names_key, "md5": store(file, {names_key: written.classes})}
    for attribute, value in lists.items():
        monkeypatch.setattr(kind, attribute, value)


Write = Callable[[str, Written], TransferSet]


@pytest.fixture
def write_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write_and_load("cifar10", written)` writes the files of a data set and loads it from them."""

    def call(data: str, written: Written) -> TransferSet:
        folder = tmp_path / FOLDERS[data]
        if data in IDX:
            write_idx(folder, written)
        else:
            write_cifar(folder, written, monkeypatch)
        return load_transfer_set(data, tmp_path, val_fraction=0.2)

    return call


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download fails at once, as it does for a machine without a network."""

    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    for door in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{door}.download_and_extract_archive", fail)


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
    written = formula(data, CIFAR.get(data, 10))
    found = write_and_load(data, written)
    assert (found.name, found.channels, found.size) == (data, channels, size)
    assert np.array_equal(images_of(found.splits["test"]), written.pixels["test"])
    assert np.array_equal(found.splits["test"].labels, written.labels["test"])

    train, val = found.splits["train"], found.splits["val"]
    n = len(written.labels["train"])
    assert (len(train), len(val)) == (n * 4 // 5, n // 5)
    assert np.bincount(val.labels).tolist() == [2] * len(written.classes)
    # The rows of each split are in the order of the files, and together they are the file.
    where = {image.tobytes(): i for i, image in enumerate(written.pixels["train"])}
    assert len(where) == n
    places = {split: [where[x.tobytes()] for x in images_of(found.splits[split])] for split in ("train", "val")}
    assert all(rows == sorted(rows) for rows in places.values())
    assert sorted(places["train"] + places["val"]) == list(range(n))
    for split, rows in places.items():
        assert np.array_equal(found.splits[split].labels, written.labels["train"][rows])


def test_class_names_are_those_of_the_data(write_and_load: Write) -> None:
    numbers = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    mnist = write_and_load("mnist", formula("mnist", 10)).classes
    assert mnist == tuple(f"{digit} - {name}" for digit, name in enumerate(numbers))
    assert write_and_load("fashion-mnist", formula("fashion-mnist", 10)).classes == FASHION
    for data, classes in CIFAR.items():
        assert write_and_load(data, formula(data, classes)).classes == tuple(f"class {c}" for c in range(classes))


@pytest.mark.parametrize("data", FOLDERS)
def test_files_that_are_absent_are_refused_in_one_line_with_the_way_out(
    tmp_path: Path, no_network: None, data: str
) -> None:
    with pytest.raises(CacheError) as refusal:
        load_transfer_set(data, tmp_path, val_fraction=0.1)
    said = str(refusal.value)
    assert f"is not under '{tmp_path}' and cannot be downloaded (" in said
    assert "no route to host" in said
    assert f"put its files into '{tmp_path / FOLDERS[data]}', or name their folder with --data-root" in said
    assert "\n" not in said


@pytest.mark.parametrize("data", FOLDERS)
def test_the_folder_that_is_named_when_files_are_absent_is_where_they_are_read(
    tmp_path: Path, no_network: None, write_and_load: Write, data: str
) -> None:
    write_and_load(data, formula(data, CIFAR.get(data, 10)))
    shutil.move(tmp_path / FOLDERS[data], tmp_path / "aside")
    with pytest.raises(CacheError) as refusal:
        load_transfer_set(data, tmp_path, val_fraction=0.2)
    named = str(refusal.value).split("put its files into '")[1].split("'")[0]
    shutil.rmtree(named, ignore_errors=True)
    shutil.move(tmp_path / "aside", named)
    assert load_transfer_set(data, tmp_path, val_fraction=0.2).name == data


def test_a_damaged_batch_is_refused(tmp_path: Path, no_network: None, write_and_load: Write) -> None:
    write_and_load("cifar10", formula("cifar10", 10))
    batch = tmp_path / FOLDERS["cifar10"] / "data_batch_3"
    content = bytearray(batch.read_bytes())
    content[-100] ^= 1
    batch.write_bytes(content)
    with pytest.raises(CacheError, match="CIFAR10 is not under"):
        load_transfer_set("cifar10", tmp_path, val_fraction=0.2)


# --- train_size, val_fraction, names --------------------------------------------------------------------------------


def test_train_size_keeps_a_stratified_part_of_the_training_rows(digits: TransferSet) -> None:
    part = load_transfer_set("digits", Path(), val_fraction=0.125, train_size=200)
    train, whole = part.splits["train"], digits.splits["train"]
    assert len(train) == 200
    for c in range(10):
        assert abs((train.labels == c).sum() - 200 * (whole.labels == c).sum() / 1257) < 1
    rows = [(image.tobytes(), int(label)) for image, label in zip(images_of(whole), whole.labels, strict=True)]
    kept = [(image.tobytes(), int(label)) for image, label in zip(images_of(train), train.labels, strict=True)]
    assert [row for row in rows if row in set(kept)] == kept
    assert [part.splits[split].content for split in ("val", "test")] == [
        digits.splits[split].content for split in ("val", "test")
    ]
    assert part.identity() != digits.identity()


def test_train_size_of_all_rows_keeps_all(digits: TransferSet) -> None:
    whole = load_transfer_set("digits", Path(), val_fraction=0.125, train_size=1257)
    assert whole.splits["train"].content == digits.splits["train"].content


def test_train_size_above_the_training_rows_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"--train-size 1258 is not between 0 and the 1257 training rows there are"):
        load_transfer_set("digits", Path(), val_fraction=0.125, train_size=1258)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_val_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match=rf"--val-fraction {fraction:g} is outside 0 to 1"):
        load_transfer_set("digits", Path(), val_fraction=fraction)


def test_a_val_fraction_that_takes_every_training_row_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--val-fraction 0\.9999 of 1437 training rows leaves none to train on"):
        load_transfer_set("digits", Path(), val_fraction=0.9999)


def test_a_val_fraction_below_one_row_takes_one_row() -> None:
    assert len(load_transfer_set("digits", Path(), val_fraction=1e-6).splits["val"]) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("mnst", "no data set 'mnst'. Did you mean 'mnist'? There are: cifar10, cifar100, digits"),
        ("cifar-10", "Did you mean 'cifar10'?"),
        ("folders:x", "no data set 'folders'. Did you mean 'folder"),
        ("", "no data set ''. There are: "),
        ("folder", "a folder of images is named with its path: --data folder:PATH"),
        ("folder:", "a folder of images is named with its path: --data folder:PATH"),
        ("digits:x", "a folder of images is named with its path: --data folder:PATH"),
    ],
)
def test_a_data_set_that_does_not_exist_is_refused_with_what_there_is(data: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_transfer_set(data, Path(), val_fraction=0.1)
    assert message in str(error.value)


def test_every_row_of_the_table_is_tried_here() -> None:
    assert {"digits", "folder", *FOLDERS} == set(SOURCES)


# --- stratified ---------------------------------------------------------------------------------------------------

LABELS = st.lists(st.integers(-1, 6), min_size=1, max_size=200)


@settings(deadline=None, max_examples=300)
@given(labels=LABELS, part=st.fractions(0, 1), key=st.tuples(st.integers(0, 2**32), st.integers(0, 99)))
def test_stratified_rows_keep_their_promises(labels: list[int], part: Fraction, key: tuple[int, int]) -> None:
    n, each = round(part * len(labels)), np.array(labels, np.int64)
    rows = draw_stratified(each, n, key)
    assert len(rows) == n
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert set(rows.tolist()) <= set(range(len(labels)))
    for label, count in Counter(labels).items():
        share = Fraction(count * n, len(labels))
        assert abs(int((each[rows] == label).sum()) - share) < 1
    assert np.array_equal(draw_stratified(each, n, key), rows)


@settings(deadline=None)
@given(half=LABELS, key=st.tuples(st.integers(0, 2**32)))
def test_stratified_rows_do_not_depend_on_how_classes_are_numbered(half: list[int], key: tuple[int]) -> None:
    labels = np.array(half + half, np.int64)  # half of every class is a whole number: no tie that goes by number
    assert np.array_equal(draw_stratified(labels, len(half), key), draw_stratified(5 - labels, len(half), key))


def test_stratified_draws_are_fair_and_depend_on_the_key() -> None:
    labels = np.repeat([0, 1], [300, 100])
    chosen = np.zeros(400, int)
    for seed in range(200):
        chosen[draw_stratified(labels, 40, (seed, 10))] += 1
    # Each row is drawn with probability 1/10: mean 20 of 200, standard deviation 4.2; five of them.
    assert chosen.min() >= 1
    assert chosen.max() <= 42
    assert not np.array_equal(draw_stratified(labels, 40, (0, 10)), draw_stratified(labels, 40, (0, 11)))


def test_stratified_rows_are_pinned() -> None:
    assert draw_stratified(np.arange(20) % 3, 6, (0, 10)).tolist() == [7, 9, 12, 14, 16, 17]


# --- identity -----------------------------------------------------------------------------------------------------


def one_pixel(written: Written) -> None:
    written.pixels["test"][3, 0, 5, 5] ^= 1


def one_training_pixel(written: Written) -> None:
    written.pixels["train"][-1, -1, -1, -1] ^= 128


def one_label(written: Written) -> None:
    written.labels["test"][4] = (written.labels["test"][4] + 1) % 10


def class_order(written: Written) -> None:
    written.classes[:2] = written.classes[1::-1]


def row_order(written: Written) -> None:
    for of in (written.pixels, written.labels):
        of["test"][[0, 10]] = of["test"][[10, 0]]  # two rows of one class: the labels stay as they are


@pytest.mark.parametrize("change", [one_pixel, one_training_pixel, one_label, class_order, row_order])
def test_the_identity_changes_with_anything_that_the_teacher_is_asked(
    write_and_load: Write, change: Callable[[Written], None]
) -> None:
    before = write_and_load("cifar10", formula("cifar10", 10)).identity()
    assert write_and_load("cifar10", formula("cifar10", 10)).identity() == before
    written = formula("cifar10", 10)
    change(written)
    assert write_and_load("cifar10", written).identity() != before


def test_the_identity_names_data_classes_content_and_cut(digits: TransferSet) -> None:
    identity = digits.identity()
    assert set(identity) == {"name", "classes", "content", "cut"}
    assert identity["cut"] == {"val_fraction": 0.125, "seed": 0, "train_size": 0}
    assert identity["classes"] == list(digits.classes)


@pytest.mark.parametrize("other", [{"seed": 1}, {"val_fraction": 0.2}, {"train_size": 100}])
def test_another_cut_is_another_identity(digits: TransferSet, other: dict[str, float]) -> None:
    assert load_transfer_set("digits", Path(), **{"val_fraction": 0.125, **other}).identity() != digits.identity()


def test_labels_that_are_fewer_than_the_pictures_are_refused(tmp_path: Path) -> None:
    written = formula("mnist", 10)
    written.labels["train"] = written.labels["train"][:-1]
    write_idx(tmp_path / "MNIST" / "raw", written)
    with pytest.raises(CacheError, match="hold 100 images, 99 labels"):
        load_transfer_set("mnist", tmp_path, val_fraction=0.5)


def test_a_file_that_is_no_idx_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_idx(folder, formula("mnist", 10))
    (folder / "train-images-idx3-ubyte").write_bytes(b"not an IDX file, but long enough to be one")
    with pytest.raises(CacheError, match="are damaged"):
        load_transfer_set("mnist", tmp_path, val_fraction=0.5)
