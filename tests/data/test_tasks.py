"""Tasks: the form of the hard targets in arrays says what is predicted, or --task does; what is unclear is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.data.tasks import HardTargets, find_known, find_strata, hide_rows
from softcache.data.transfer_set import TransferSet, load_transfer_set

N = 30
random = np.random.default_rng(0)
X = random.normal(size=(N, 4)).astype(np.float32)
SEVERAL = (random.random((N, 3)) < 0.5).astype(np.int64)
SEVERAL[0] = [1, 1, 0]  # not one label in every row
ONE_HOT = np.eye(3, dtype=np.int64)[np.arange(N) % 3]
NUMBERS = random.normal(size=(N, 2))
WHOLE = np.arange(N, dtype=np.float64)


def load(folder: Path, y: NDArray[Any], task: str = "", **options: Any) -> TransferSet:
    np.savez(folder / "table.npz", x=X, y=y, **options.pop("more", {}))
    return load_transfer_set(f"arrays:{folder / 'table.npz'}", Path(), val_fraction=0.2, task=task, **options)


def all_labels(transfer_set: TransferSet) -> HardTargets:
    """Return the labels of train and val by row of the file."""
    parts = [transfer_set.splits[split] for split in ("train", "val")]
    labels = np.concatenate([part.labels for part in parts])
    rows = np.concatenate([part.source_rows for part in parts if part.source_rows is not None])
    by_row = np.empty_like(labels)
    by_row[rows] = labels
    return by_row


@pytest.mark.parametrize(
    ("y", "task", "expected"),
    [
        (np.arange(N) % 3, "", ("classes", np.int64)),
        (np.arange(N) % 3, "classes", ("classes", np.int64)),
        (np.arange(N) % 3, "embedding", ("embedding", np.int64)),
        (np.arange(N) % 3, "numbers", ("numbers", np.float32)),
        (SEVERAL, "", ("labels", np.int8)),
        (SEVERAL.astype(bool), "", ("labels", np.int8)),
        (SEVERAL.astype(np.float32), "", ("labels", np.int8)),
        (SEVERAL.astype(np.float32), "numbers", ("numbers", np.float32)),
        (ONE_HOT, "labels", ("labels", np.int8)),
        (SEVERAL[:, 0], "labels", ("labels", np.int8)),
        (NUMBERS, "", ("numbers", np.float32)),
        (NUMBERS[:, 0], "", ("numbers", np.float32)),
        (WHOLE, "numbers", ("numbers", np.float32)),
    ],
)
def test_the_form_of_y_or_the_option_says_the_task(
    tmp_path: Path, y: NDArray[Any], task: str, expected: tuple[str, Any]
) -> None:
    transfer_set = load(tmp_path, y, task)
    labels = all_labels(transfer_set)
    assert (transfer_set.task, labels.dtype) == expected
    values = y if labels.ndim == y.ndim else y[:, None]
    np.testing.assert_allclose(labels, values.astype(labels.dtype))
    assert ("task" in transfer_set.identity()) == (expected[0] != "classes")


def test_what_is_unknown_stays_so_and_counts_as_unlabelled(tmp_path: Path) -> None:
    several, numbers = SEVERAL.copy(), NUMBERS.copy()
    several[3], several[4, 0] = -1, -1
    numbers[3], numbers[4, 0] = np.nan, np.nan
    of_several, of_numbers = all_labels(load(tmp_path, several)), all_labels(load(tmp_path, numbers))
    assert of_several[3].tolist() == [-1, -1, -1]
    assert np.isnan(of_numbers[3]).all()
    for labels in (of_several, of_numbers):
        assert find_known(labels).tolist() == [row != 3 for row in range(N)]
    assert sum(load(tmp_path, numbers).count_labelled().values()) == N - 1


def test_one_changed_hard_target_changes_the_digest_and_the_form_of_nan_does_not(tmp_path: Path) -> None:
    numbers = NUMBERS.astype(np.float32)
    numbers[5, 1] = np.nan
    contents = [load(tmp_path, numbers).splits["train"].content]
    negative_nan = numbers.copy()
    negative_nan.view(np.uint32)[np.isnan(numbers)] |= 0x80000001
    contents.append(load(tmp_path, negative_nan).splits["train"].content)
    changed = load(tmp_path, numbers + np.float32(1e-3)).splits["train"].content
    assert contents[0] == contents[1] != changed


def test_columns_have_the_names_in_classes_or_their_numbers(tmp_path: Path) -> None:
    assert load(tmp_path, NUMBERS).classes == ("0", "1")
    assert load(tmp_path, NUMBERS, more={"classes": np.array(["angle", "size"])}).classes == ("angle", "size")
    with pytest.raises(UsageError, match="'classes' has 3 names, and y has 2 columns of numbers"):
        load(tmp_path, NUMBERS, more={"classes": np.array(["a", "b", "c"])})


WRONG: dict[str, tuple[NDArray[Any], str, dict[str, Any], str]] = {
    "one-hot": (ONE_HOT, "", {}, r"'y' has exactly one 1 in each row: save y.argmax\(1\)"),
    "integers": (SEVERAL + 5, "", {}, "'y' has 3 columns of integers: say --task numbers"),
    "not-0-or-1": (SEVERAL + 1, "labels", {}, "several labels are 0, 1, and -1 where unknown"),
    "infinite": (np.where(SEVERAL == 1, np.inf, 0.5), "", {}, "which is no finite float32"),
    "too-large": (NUMBERS * 1e300, "", {}, "which is no finite float32"),
    "three-axes": (NUMBERS[:, :, None], "numbers", {}, r"'y' has the shape \[30, 2, 1\]"),
    "text": (np.array(["a"] * N), "labels", {}, "'y' is <U1: expected numbers"),
    "columns-of-classes": (SEVERAL, "classes", {}, "expected one label for each row"),
    "fractions-of-classes": (NUMBERS[:, 0], "classes", {}, "numbers to predict are --task numbers"),
    "long-tail": (SEVERAL, "", {"imbalance": "10"}, "--imbalance 10 is for one class an image, and the task here is"),
    "misspelt": (SEVERAL, "label", {}, "no task 'label'. Did you mean 'labels'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_or_is_unclear_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    y, task, options, words = WRONG[case]
    with pytest.raises(UsageError, match=words) as error:
        load(tmp_path, y, task, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_a_source_with_classes_alone_names_those_that_have_other_tasks(task: str) -> None:
    with pytest.raises(UsageError, match=f"--task {task} is for --data .*arrays:FILE.npz.*: 'digits' has classes"):
        load_transfer_set("digits", Path(), val_fraction=0.2, task=task)


def test_digits_as_embedding_keep_their_labels_for_evaluation() -> None:
    transfer_set = load_transfer_set("digits", Path(), val_fraction=0.2, task="embedding")
    assert (transfer_set.task, len(transfer_set.classes)) == ("embedding", 10)
    assert transfer_set.identity()["task"] == "embedding"


def test_arrays_without_y_have_no_other_task(tmp_path: Path) -> None:
    np.savez(tmp_path / "table.npz", x=X)
    with pytest.raises(UsageError, match="--task numbers needs an array y, and there is none"):
        load_transfer_set(f"arrays:{tmp_path / 'table.npz'}", Path(), val_fraction=0.2, task="numbers")


@pytest.mark.parametrize("labels", [np.arange(N) % 3, SEVERAL.astype(np.int8), NUMBERS.astype(np.float32)])
def test_hidden_rows_are_unknown_and_form_a_group_of_their_own(labels: HardTargets) -> None:
    is_hidden = np.arange(N) % 4 == 0
    hidden = hide_rows(labels, is_hidden)
    assert np.array_equal(find_known(hidden), ~is_hidden)
    assert np.array_equal(find_strata(hidden) == -1, is_hidden)
    assert find_known(labels).all()


@pytest.mark.parametrize("y", [SEVERAL, ONE_HOT, NUMBERS, NUMBERS[:, 0]])
def test_hard_targets_that_are_no_classes_are_left_out_of_embeddings_with_a_note(
    tmp_path: Path, y: NDArray[Any]
) -> None:
    transfer_set = load(tmp_path, y, "embedding")
    assert (transfer_set.task, transfer_set.classes) == ("embedding", ())
    assert (all_labels(transfer_set) == -1).all()
    assert any("y has no class of each row, and is left out" in note for note in transfer_set.notes)
