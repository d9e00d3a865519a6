"""`--test-fraction`: a test split that is cut from the training rows, by class, of data that have none."""

from pathlib import Path

import numpy as np
import pytest

from softcache.base.errors import UsageError
from softcache.data.transfer_set import TransferSet, load_transfer_set

CLASSES, ROWS = 4, 200


class Levels:
    """A map-style data set without a test split: one grey level an image, and the class row % 4."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return np.full((4, 4), row, np.uint8), row % CLASSES


def load(test_fraction: float, **options: float) -> TransferSet:
    return load_transfer_set(Levels(), Path(), val_fraction=0.25, test_fraction=test_fraction, **options)  # type: ignore[arg-type]


def test_rows_of_the_three_splits_are_apart_together_all_and_stratified() -> None:
    splits = load(0.2).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 120, "val": 40, "test": 40}
    rows = {name: split.source_rows for name, split in splits.items()}
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(ROWS))  # type: ignore[arg-type]
    for split in splits.values():
        assert (np.bincount(split.labels) == len(split) / CLASSES).all()
        assert (split.labels == split.source_rows % CLASSES).all()  # type: ignore[operator]


def test_the_cut_is_recorded_only_where_there_is_one_and_follows_the_seed() -> None:
    assert "test_fraction" not in load(0.0).cut
    assert "test" not in load(0.0).splits
    assert load(0.2).cut["test_fraction"] == 0.2
    assert load(0.2).identity() == load(0.2).identity()
    assert load(0.2).identity()["content"] != load(0.2, seed=1).identity()["content"]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 0.999, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match="--test-fraction"):
        load(fraction)


def test_data_with_a_test_split_are_not_cut() -> None:
    with pytest.raises(UsageError, match=r"--test-fraction 0\.2: the data have a test split already"):
        load_transfer_set("digits", Path(), val_fraction=0.1, test_fraction=0.2)
