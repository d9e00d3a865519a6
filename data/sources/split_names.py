"""The names that splits have in folders, files and columns, and in which order splits are reported."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
# In any case. Some kinds of data know a few more, see there.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "dev"),
}


def map_to_splits(names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return {name: its split} of {split: names}."""
    return {name: split for split, of_split in names.items() for name in of_split}


def order_splits(splits: Mapping[str, T]) -> dict[str, T]:
    """Return splits in the order train, val, test. A validation split without a test split is the test split."""
    if "val" in splits and "test" not in splits:
        splits = {"test" if split == "val" else split: rows for split, rows in splits.items()}
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}
