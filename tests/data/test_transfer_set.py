"""Transfer sets: rows, labels, splits and identity, of the digits."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.transfer_set import Split, TransferSet, load_transfer_set

Pixels = NDArray[np.uint8]


def images_of(split: Split) -> Pixels:
    assert isinstance(split.images, ImageArrays)
    return split.images.pixels.numpy()


# --- splits -------------------------------------------------------------------------------------------------------


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
    # No two digits are equal, so equal counts mean that no row is in two splits.
    assert len(set(split_up)) == 1797


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_digits_are_split_by_class(digits: TransferSet, split: str) -> None:
    all_labels = np.concatenate([rows.labels for rows in digits.splits.values()])
    rows = digits.splits[split]
    for c in range(10):
        share = (all_labels == c).sum() * len(rows) / 1797
        # Rounding moves one row when the test split is drawn, and one more when the validation split is.
        assert abs((rows.labels == c).sum() - share) < (1 if split == "test" else 2)


def test_digits_are_pinned_so_that_a_cache_stays_valid(digits: TransferSet) -> None:
    assert {split: rows.content[:16] for split, rows in digits.splits.items()} == {
        "train": "c8e170b71028ff8f",
        "val": "ed70df0eb9e6f9a2",
        "test": "38453adaa0f8e18b",
    }


def test_loading_twice_gives_the_same_identity(digits: TransferSet) -> None:
    assert load_transfer_set("digits", Path("elsewhere"), val_fraction=0.125).identity() == digits.identity()


def test_another_seed_draws_another_val_split_and_the_same_test_split(digits: TransferSet) -> None:
    other_seed = load_transfer_set("digits", Path(), val_fraction=0.125, seed=1)
    assert other_seed.splits["test"].content == digits.splits["test"].content
    assert other_seed.splits["val"].content != digits.splits["val"].content
    common = {x.tobytes() for x in images_of(other_seed.splits["val"])} & {
        x.tobytes() for x in images_of(digits.splits["val"])
    }
    assert len(common) < 60  # of 180; 22 are expected of two independent draws
    assert other_seed.identity() != digits.identity()


# --- train_size, val_fraction, names ------------------------------------------------------------------------------


def test_train_size_keeps_a_stratified_part_of_the_training_rows(digits: TransferSet) -> None:
    part = load_transfer_set("digits", Path(), val_fraction=0.125, train_size=200)
    train, full = part.splits["train"], digits.splits["train"]
    assert len(train) == 200
    for c in range(10):
        assert abs((train.labels == c).sum() - 200 * (full.labels == c).sum() / 1257) < 1
    rows = [(image.tobytes(), int(label)) for image, label in zip(images_of(full), full.labels, strict=True)]
    part_rows = [(image.tobytes(), int(label)) for image, label in zip(images_of(train), train.labels, strict=True)]
    assert [row for row in rows if row in set(part_rows)] == part_rows
    assert [part.splits[split].content for split in ("val", "test")] == [
        digits.splits[split].content for split in ("val", "test")
    ]
    assert part.identity() != digits.identity()


def test_train_size_of_all_rows_keeps_all(digits: TransferSet) -> None:
    full = load_transfer_set("digits", Path(), val_fraction=0.125, train_size=1257)
    assert full.splits["train"].content == digits.splits["train"].content


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
        ("mnst", "no data set 'mnst'. Did you mean 'mnist'? There are: arrays:FILE.npz, cifar10, cifar100, digits"),
        ("cifar-10", "Did you mean 'cifar10'?"),
        ("folders:x", "no data set 'folders'. Did you mean 'folder"),
        ("", "no data set ''. There are: "),
        ("folder", "--data folder needs what it reads after a colon: --data folder:PATH"),
        ("folder:", "--data folder needs what it reads after a colon: --data folder:PATH"),
        ("digits:x", "--data digits:x: 'digits' has nothing after a colon"),
    ],
)
def test_an_unknown_data_set_is_refused_with_the_names_of_those_that_exist(data: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_transfer_set(data, Path(), val_fraction=0.1)
    assert message in str(error.value)


# --- identity -----------------------------------------------------------------------------------------------------


def test_the_identity_names_data_classes_content_and_cut(digits: TransferSet) -> None:
    identity = digits.identity()
    assert set(identity) == {"name", "classes", "content", "cut"}
    assert identity["cut"] == {"val_fraction": 0.125, "seed": 0, "train_size": 0}
    assert identity["classes"] == list(digits.classes)


@pytest.mark.parametrize("cut", [{"seed": 1}, {"val_fraction": 0.2}, {"train_size": 100}])
def test_another_cut_gives_another_identity(digits: TransferSet, cut: dict[str, float]) -> None:
    assert load_transfer_set("digits", Path(), **{"val_fraction": 0.125, **cut}).identity() != digits.identity()
