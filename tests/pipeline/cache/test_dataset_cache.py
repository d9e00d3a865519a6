"""A cache of a user's own dataset: it is opened with the dataset, which must be the one that it was made from."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.base.errors import CacheError, CacheMismatchError, UsageError
from softcache.base.progress import no_progress
from softcache.data.sources import load_source
from softcache.data.transfer_set import TransferSet, load_transfer_set
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import verify_views
from tests.helpers.commands import Stages
from tests.helpers.damage import Record, edit_whole_cache

NAMES = tuple("abcdefghij")


class Digits(list[Any]):
    """The digits as (array [8, 8], label)."""


def make_digits() -> dict[str, Digits]:
    return {
        split: Digits(zip(part.images.pixels[:, 0].numpy(), part.labels.tolist(), strict=True))  # type: ignore[union-attr]
        for split, part in load_source("digits").splits.items()
    }


def make_cache(tiny: Path, folder: Path, classes: tuple[str, ...] = ()) -> CacheReader:
    """Copy the cache of the digits as if it had been made from `make_digits`, whose rows and views are the same."""
    shutil.copytree(tiny / "cache", folder)
    cut = CacheReader(folder).cut

    def change(record: Record) -> None:
        transfer_set = load_transfer_set(make_digits(), Path(), **cut, classes=classes)
        record["identity"]["transfer_set"] = transfer_set.identity()

    edit_whole_cache(folder, change)
    return CacheReader(folder)


@pytest.fixture(scope="module")
def cache(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return make_cache(tiny, tmp_path_factory.mktemp("dataset") / "cache")


@pytest.fixture(scope="module")
def named_cache(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return make_cache(tiny, tmp_path_factory.mktemp("dataset") / "cache", NAMES)


def open_data(cache: CacheReader, data: Any) -> TransferSet:
    return cache.load_transfer_set(data, Path(), no_progress)


def test_the_dataset_gives_the_rows_and_views_of_the_cache(cache: CacheReader) -> None:
    transfer_set = open_data(cache, make_digits())
    assert transfer_set.name == cache.data == "dataset"
    verify_views(cache, transfer_set, cache.manifest.draws)
    positions = np.arange(len(transfer_set.splits["train"]))
    assert cache.read_targets("train", 1, positions)[0].shape == (300, 10)


def test_names_of_the_cache_are_taken_where_the_dataset_has_none(named_cache: CacheReader) -> None:
    assert open_data(named_cache, make_digits()).classes == NAMES


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]])
def test_names_of_the_dataset_must_be_those_of_the_cache(named_cache: CacheReader, names: tuple[str, ...]) -> None:
    data = make_digits()
    data["train"].classes = list(names)  # type: ignore[attr-defined]
    if names == NAMES:
        assert open_data(named_cache, data).classes == NAMES
    else:
        with pytest.raises(CacheMismatchError, match="classes"):
            open_data(named_cache, data)


def test_another_image_is_a_mismatch(cache: CacheReader) -> None:
    data = make_digits()
    pixels, label = data["test"][7]
    data["test"][7] = (pixels ^ 1, label)
    with pytest.raises(CacheMismatchError, match=r"content\.test"):
        open_data(cache, data)


@pytest.mark.parametrize("name", ["", "dataset"])
def test_a_cache_of_a_dataset_is_not_opened_without_it(cache: CacheReader, name: str) -> None:
    with pytest.raises(UsageError, match=r"of a dataset of your own: .*softcache\.Cache\(path, data=your_dataset\)"):
        open_data(cache, name)


def test_another_source_is_refused_in_either_direction(cache: CacheReader, tiny: Path) -> None:
    with pytest.raises(CacheError, match="is of dataset, not of digits"):
        open_data(cache, "digits")
    with pytest.raises(CacheError, match="is of digits, not of a dataset of your own"):
        open_data(CacheReader(tiny / "cache"), make_digits())


@pytest.mark.parametrize("command", ["check-cache", "student"])
def test_a_command_tells_how_the_cache_is_opened(stages: Stages, cache: CacheReader, command: str) -> None:
    option = ("--cache",) if command == "student" else ()
    for more in ((), ("--data", "dataset")):
        deep = ("--deep",) if command == "check-cache" else ()
        error = stages.fails(2, command, *option, cache.folder, *deep, *more)
        assert "softcache.Cache(path, data=your_dataset)" in error
        assert len(error.splitlines()) == 1


def test_stage_one_has_no_dataset_by_that_name(stages: Stages) -> None:
    error = stages.fails(2, "teacher", "--data", "dataset", "--out", "t")
    assert "softcache.Cache(path, data=your_dataset)" in error
    assert len(error.splitlines()) == 1
