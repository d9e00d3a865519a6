"""The labels of a user's own dataset: their form says the task, as that of arrays does; what is unclear is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import softcache
from softcache.base.errors import CacheError, UsageError
from softcache.data.tasks import HardTargets
from softcache.data.transfer_set import TransferSet, load_transfer_set

N = 12
random = np.random.default_rng(0)
ROWS = random.normal(size=(N, 3)).astype(np.float32)
IMAGES = random.integers(0, 256, (N, 6, 6, 3), dtype=np.uint8)
SEVERAL = np.array([[1, 1, 0], [0, 0, 0], [0, -1, 1]] * 4)
NUMBERS = random.normal(size=(N, 2))


def load(labels: Any, inputs: Any = ROWS, task: str = "", **options: Any) -> TransferSet:
    items = list(zip(inputs, labels, strict=True))
    return load_transfer_set(items, Path(), val_fraction=0.25, task=task, **options)


def get_labels(transfer_set: TransferSet) -> HardTargets:
    """Return the labels of train and val by row of the dataset."""
    parts = transfer_set.splits.values()
    labels = np.concatenate([part.labels for part in parts])
    by_row = np.empty_like(labels)
    by_row[np.concatenate([part.source_rows for part in parts if part.source_rows is not None])] = labels
    return by_row


FORMS: dict[str, tuple[Any, str, str, Any]] = {
    "int": (range(N), "", "classes", np.arange(N)),
    "float": ([float(row) for row in range(N)], "", "numbers", np.arange(N)[:, None]),
    "float of numpy": (NUMBERS[:, 0], "", "numbers", NUMBERS[:, :1]),
    "float as class": ([float(row % 3) for row in range(N)], "classes", "classes", np.arange(N) % 3),
    "int as number": (range(-3, N - 3), "numbers", "numbers", np.arange(-3, N - 3)[:, None]),
    "int as label": (SEVERAL[:, 0].tolist(), "labels", "labels", SEVERAL[:, :1]),
    "tensor [D]": (torch.from_numpy(NUMBERS), "", "numbers", NUMBERS),
    "bfloat16": (torch.full((N, 2), 0.5, dtype=torch.bfloat16), "", "numbers", np.full((N, 2), 0.5)),
    "list of floats": (NUMBERS.tolist(), "", "numbers", NUMBERS),
    "array [K]": (SEVERAL, "", "labels", SEVERAL),
    "tensor of floats [K]": (torch.from_numpy(SEVERAL).float(), "", "labels", SEVERAL),
    "list of ints": (SEVERAL.tolist(), "", "labels", SEVERAL),
    "truth values": (SEVERAL == 1, "", "labels", SEVERAL == 1),
    "0 and 1 as numbers": (SEVERAL, "numbers", "numbers", SEVERAL),
    "one class in an array": (np.arange(N)[:, None], "", "classes", np.arange(N)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inputs", [ROWS, IMAGES], ids=["rows", "images"])
def test_the_form_of_the_labels_says_the_task(form: str, inputs: Any) -> None:
    given, task, expected_task, expected = FORMS[form]
    transfer_set = load(given, inputs, task)
    assert transfer_set.task == expected_task
    np.testing.assert_allclose(get_labels(transfer_set), expected, rtol=1e-6)


def test_none_is_unknown_in_every_form() -> None:
    for labels, task, unknown in (
        (list(SEVERAL), "labels", [-1, -1, -1]),
        (list(NUMBERS), "numbers", [np.nan, np.nan]),
        (NUMBERS[:, 0].tolist(), "numbers", [np.nan]),
    ):
        transfer_set = load([None, *labels[1:]])
        assert transfer_set.task == task
        np.testing.assert_array_equal(get_labels(transfer_set)[0], unknown)
        np.testing.assert_array_equal(get_labels(transfer_set)[1:], get_labels(load(labels))[1:])


def test_a_split_without_labels_has_the_form_of_the_others() -> None:
    data = {"train": TensorDataset(torch.from_numpy(ROWS), torch.from_numpy(NUMBERS)), "test": list(ROWS)}
    transfer_set = load_transfer_set(data, Path(), val_fraction=0.25)
    assert transfer_set.splits["test"].labels.shape == (N, 2)
    assert np.isnan(transfer_set.splits["test"].labels).all()


def test_names_are_of_the_labels_or_of_the_numbers() -> None:
    assert load(SEVERAL).classes == ("0", "1", "2")
    assert load(SEVERAL, classes=("cat", "dog", "hat")).classes == ("cat", "dog", "hat")
    assert load(NUMBERS, classes=("x", "y")).classes == ("x", "y")


WRONG: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "an int among floats": (
        [0.5, *range(N - 1)],
        "",
        {},
        r"train row 1 of the dataset has .*int as its label, and",
    ),
    "a list among ints": ([*range(N - 1), [1, 0]], "", {}, "train row 11 of the dataset has a list of 2 as its label"),
    "another width": ([[1, 0]] * 11 + [[1, 0, 0]], "", {}, "row 11 .* a list of 3 as its label, and train row 0 of"),
    "text": (["cat"] * N, "", {}, "train row 0 of the dataset has a value of type str as its label: expected the n"),
    "a list of text": ([["cat"]] * N, "", {}, "has a list of 1 as its label: expected the number of a class"),
    "an empty list": ([[]] * N, "", {}, "has a list of 0 as its label"),
    "two axes": (np.zeros((N, 2, 2)), "", {}, r"has an array float64 \[2, 2\] as its label"),
    "complex": (np.zeros((N, 2), complex), "", {}, r"has an array complex128 \[2\] as its label"),
    "one-hot": (np.eye(N), "", {}, r"exactly one 1 in each row: return label.argmax\(\) where that is the class"),
    "integers": (SEVERAL + 5, "", {}, "train dataset has 3 columns of integers: say --task numbers"),
    "fraction as label": (NUMBERS, "labels", {}, "in row 0, column 0: several labels are 0, 1, and -1 where unknown"),
    "infinite": (NUMBERS[:, 0] * np.inf, "", {}, "inf in row 0, column 0, which is no finite float32"),
    "beyond float32": (NUMBERS * 1e300, "", {}, "column 0, which is no finite float32"),
    "fraction as class": (NUMBERS[:, 0], "classes", {}, "expected the number of a class, 0 to K - 1; numbers to pr"),
    "several as class": (
        SEVERAL,
        "classes",
        {},
        "--task classes needs the number of a class as label, and train row 0",
    ),
    "no labels": ([None] * N, "numbers", {}, "--task numbers needs the label of an item, and no row of the dataset"),
    "no several labels": ([None] * N, "labels", {}, "--task labels needs the label of an item"),
    "too few names": (
        SEVERAL,
        "",
        {"classes": ("a", "b")},
        r"classes has 2 names \(a, b\), and a label of the",
    ),
    "beyond int64": ([1 << 70] * N, "", {}, "the label 1180591620717411303424: the largest is 1048575"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_or_is_unclear_is_refused_in_one_line(case: str) -> None:
    labels, task, options, words = WRONG[case]
    with pytest.raises(UsageError, match=words) as error:
        load(labels, ROWS, task, **options)
    assert "\n" not in str(error.value)


class Noisy:
    """Rows with another number to predict each time."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        return IMAGES[row], np.random.default_rng().normal(size=2)


def test_random_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="has another label when it is read twice"):
        load_transfer_set(Noisy(), Path(), val_fraction=0.25)


def test_a_cache_of_a_dataset_is_opened_with_it_again(tmp_path: Path) -> None:
    items = list(zip(ROWS, (SEVERAL == 1).astype(np.float32), strict=True))
    torch.manual_seed(0)
    teacher = nn.Linear(3, 3)
    cache = softcache.build_cache(tmp_path / "c", teacher, items, task="labels", class_names=("a", "b", "c"))
    again = softcache.Cache(tmp_path / "c", data=items)
    assert (again.task, again.classes, again.fingerprint) == ("labels", ("a", "b", "c"), cache.fingerprint)
    np.testing.assert_array_equal(again.labels("train"), cache.transfer_set.splits["train"].labels)
    with pytest.raises(CacheError, match="made from other data"):
        softcache.Cache(tmp_path / "c", data=list(zip(ROWS, SEVERAL[::-1], strict=True)))
    with pytest.raises(UsageError, match="task='numbers', and the task of the transfer set is labels"):
        softcache.build_cache(tmp_path / "d", teacher, cache.transfer_set, task="numbers")
