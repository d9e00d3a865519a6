"""A cache with its data: what it says of itself, random access, verification, several teachers, and refusals."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import softcache
from softcache import Cache, CacheError, UsageError
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.transfer_set import load_transfer_set
from tests.helpers.damage import flip_bit


@pytest.fixture(scope="module")
def opened(tiny: Path) -> Cache:
    return Cache(str(tiny / "cache"))


def test_it_says_what_it_is(opened: Cache, tiny: Path) -> None:
    assert opened.classes == tuple("0123456789")
    assert (opened.num_classes, opened.draws, opened.teacher) == (10, 3, "cnn")
    assert opened.splits == {"train": 300, "val": 180, "test": 360}
    assert opened.taps == {"pool1": (64, 4, 4), "flatten": (512,)}
    assert opened.path == tiny / "cache"
    assert len(opened.fingerprint) == 64
    assert (opened.input_spec.channels, opened.input_spec.size) == (1, 8)
    assert opened.fingerprint[:12] in repr(opened)


def test_rows_of_the_data_are_those_from_which_the_split_was_drawn(opened: Cache) -> None:
    whole = load_transfer_set("digits", Path("none"), val_fraction=0.125)
    rows = {split: opened.rows(split) for split in ("train", "val", "test")}
    assert not set(rows["train"].tolist()) & set(rows["val"].tolist())
    assert rows["test"].tolist() == list(range(360))
    for split in ("train", "val"):
        assert len(rows[split]) == opened.splits[split]
    assert len(whole.splits["train"]) + len(whole.splits["val"]) > max(rows["train"].max(), rows["val"].max())


def test_targets_come_in_the_order_that_is_asked_for(opened: Cache) -> None:
    index = [299, 0, 7, 7, 120]
    for draw in range(3):
        one_by_one = torch.cat([opened.targets("train", i, draw=draw) for i in index])
        assert torch.equal(opened.targets("train", index, draw=draw), one_by_one)
        assert torch.equal(opened.targets("train", torch.tensor(index), draw=draw), one_by_one)
    assert not torch.equal(opened.targets("train", index, draw=0), opened.targets("train", index, draw=1))
    right = opened.targets("test", range(360)).argmax(1) == opened.labels("test")
    assert right.float().mean() > 0.85


def test_rendered_views_of_a_held_out_split_are_plain(opened: Cache) -> None:
    data = load_transfer_set("digits", Path("none"), val_fraction=0.125)
    expected = data.splits["test"].images.load_plain(np.array([5, 2]), 0, 0)
    assert torch.equal(opened.render("test", [5, 2]), expected)
    assert opened.prepare_input(expected).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.targets("dev", [0]), "no split 'dev'. There are: train, val, test"),
        (lambda cache: cache.targets("train", [300]), "index 300 is not between 0 and 299"),
        (lambda cache: cache.targets("train", [-1]), "index -1 is not between 0 and 299"),
        (lambda cache: cache.targets("train", [[1]]), r"a list of whole numbers, not int64 \[1, 1\]"),
        (lambda cache: cache.targets("train", [0], draw=3), "draw 3 of train is not between 0 and 2"),
        (lambda cache: cache.render("val", [0], draw=1), "draw 1 of val is not between 0 and 0"),
        (lambda cache: cache.labels("dev"), "no split 'dev'"),
    ],
)
def test_what_it_does_not_hold_is_refused_in_one_line(opened: Cache, call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call(opened)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_other_data_are_refused(tiny: Path) -> None:
    with pytest.raises(CacheError, match="is of digits, not of mnist"):
        Cache(tiny / "cache", data="mnist")
    with pytest.raises(CacheError, match="there is no cache at"):
        Cache(tiny / "nothing")
    with pytest.raises(UsageError, match="no cache: name the folder of one"):
        Cache([])
    with pytest.raises(UsageError, match="combine='learned' is for several caches"):
        Cache(tiny / "cache", combine="learned")


def test_verify_finds_a_byte_that_changed(cache: Path) -> None:
    opened, seen = Cache(cache), []
    opened.verify(deep=True, progress=lambda text, done, total: seen.append((text, done, total)))
    shards = len(opened.reader.manifest.shards)
    assert seen == [("check-cache", i + 1, shards) for i in range(shards)]
    flip_bit(cache / "draw-001/shard-00000.h5", 8 * 4000)
    with pytest.raises(CacheError, match=r"1 files are bad. The first: .*draw-001/shard-00000.h5.* Repair it with"):
        opened.verify()
    with pytest.raises(CacheError, match=r"draw-001/shard-00000.h5: damaged"):
        Cache(cache)


def test_a_map_of_the_distribution_changes_every_target(opened: Cache, tiny: Path) -> None:
    mapped = Cache(tiny / "cache", map="temperature")
    plain, targets = opened.targets("val", range(180)), mapped.targets("val", range(180))
    ratio = plain / targets
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])), rtol=1e-4, atol=1e-4)
    figures = [softcache.evaluate(z, opened.labels("val"))["nll"] for z in (plain, targets)]
    assert figures[1] < figures[0]


def test_several_caches_are_one_teacher(tiny: Path, tmp_path: Path) -> None:
    other = softcache.build_cache(
        tmp_path / "other",
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        "digits",
        views="crop:pad=1",
        draws=2,
        train_size=300,
        device="cpu",
    )
    mean = Cache([tiny / "cache", other.path])
    each = Cache([tiny / "cache", other.path], combine="per_teacher")
    first = Cache(tiny / "cache")
    assert mean.draws == each.draws == 2
    assert mean.teacher == "cnn + module(torch.nn.modules.container.Sequential)"
    index = [4, 200]
    logits = each.targets("train", index, draw=1)
    assert logits.shape == (2, 2, 10)
    assert torch.equal(logits[:, 0], first.targets("train", index, draw=1))
    assert torch.equal(logits[:, 1], other.targets("train", index, draw=1))
    probabilities = logits.softmax(-1).mean(1)
    torch.testing.assert_close(mean.targets("train", index, draw=1).softmax(-1), probabilities, rtol=1e-4, atol=1e-6)

    (batch,) = each.loader("train", batch_size=300)
    criterion = softcache.DistillationLoss("kd:temperature=4")
    student = torch.zeros(300, 10)
    kd = [softcache.DistillationLoss("kd:temperature=4")(student, copy_with(batch, k)) for k in range(2)]
    torch.testing.assert_close(criterion(student, batch), torch.stack(kd).mean())


def copy_with(batch: softcache.Batch, teacher: int) -> softcache.Batch:
    from dataclasses import replace

    assert batch.logits is not None
    return replace(batch, logits=batch.logits[:, teacher])


def test_a_pickled_cache_reads_the_same(opened: Cache) -> None:
    copy = pickle.loads(pickle.dumps(opened))
    assert torch.equal(copy.targets("val", [1, 2]), opened.targets("val", [1, 2]))
    assert torch.equal(next(iter(copy.loader())).images, next(iter(opened.loader())).images)


def test_an_image_that_changed_is_not_rendered(tiny: Path) -> None:
    opened = Cache(tiny / "cache")
    images = opened.transfer_set.splits["val"].images
    assert isinstance(images, ImageArrays)
    opened.render("val", [4, 5])
    images.pixels[7, 0, 3, 3] ^= 1
    with pytest.raises(
        CacheError, match=r"1 of 2 views .* come out differently here, the first is val index 7, draw 0"
    ):
        opened.render("val", [4, 7])
