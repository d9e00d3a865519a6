"""Long-tailed training sets, and figures of classes that a split lacks."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from softcache.base.errors import UsageError
from softcache.data.long_tail import parse_imbalance, select_long_tail
from softcache.data.transfer_set import load_transfer_set
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages

SMALL = ("--arch", "mlp:8", "--epochs", 2)


def count_digits(**cut: object) -> list[int]:
    """The training rows of each class."""
    rows = load_transfer_set("digits", Path(), val_fraction=0.125, **cut).splits["train"]  # type: ignore[arg-type]
    return np.bincount(rows.labels, minlength=10).tolist()


# The cut


@pytest.mark.parametrize(
    ("text", "classes", "head", "total"),
    # CIFAR-10-LT and CIFAR-100-LT as published; sets made in the same way with other factors; a step by hand.
    [
        ("100", 10, 5000, 12_406),
        ("100", 100, 500, 10_847),
        ("50", 10, 5000, 13_996),
        ("10", 10, 5000, 20_431),
        ("100", 10, 1000, 2_478),
        ("100:step", 10, 5000, 25_250),
        ("10:step", 3, 20, 42),
    ],
)
def test_counts_are_those_of_the_literature(text: str, classes: int, head: int, total: int) -> None:
    counts = parse_imbalance(text).counts(classes, head)
    assert counts.sum() == total
    assert counts[0] == head
    assert (np.diff(counts) <= 0).all()


def test_a_long_tail_drops_training_rows_alone_and_always_the_same_ones() -> None:
    full = load_transfer_set("digits", Path(), val_fraction=0.125)
    cut = load_transfer_set("digits", Path(), val_fraction=0.125, imbalance="20", head_size=100)
    labels = cut.splits["train"].labels
    assert np.bincount(labels).tolist() == [100, 71, 51, 36, 26, 18, 13, 9, 6, 5]
    for split in ("val", "test"):
        assert cut.splits[split].content == full.splits[split].content
    pixels = {row.tobytes() for row in full.splits["train"].images.pixels.numpy()}  # type: ignore[union-attr]
    assert {row.tobytes() for row in cut.splits["train"].images.pixels.numpy()} <= pixels  # type: ignore[union-attr]
    same = load_transfer_set("digits", Path(), val_fraction=0.125, imbalance="20:exponential", head_size=100)
    assert same.identity() == cut.identity()
    assert cut.cut == {**full.cut, "imbalance": "20:exponential", "head_size": 100}
    other_seed = load_transfer_set("digits", Path(), val_fraction=0.125, imbalance="20", head_size=100, seed=1)
    assert other_seed.splits["train"].content != cut.splits["train"].content


def test_the_rows_of_a_long_tail_are_pinned() -> None:
    rows, head = select_long_tail(np.arange(40) % 2, 2, "4", 8, (0, 12))
    assert rows.tolist() == [0, 3, 4, 5, 6, 12, 18, 24, 30, 36]
    assert head == 8


def test_without_a_head_size_the_largest_class_has_all_that_the_data_allow() -> None:
    available, shares = np.array(count_digits()), parse_imbalance("3").shares(10)
    head = count_digits(imbalance="3")[0]
    assert (np.floor(head * shares + 1e-9) <= available).all()
    assert (np.floor((head + 1) * shares + 1e-9) > available).any()


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"imbalance": "1"}, "--imbalance 1: expected a factor above 1, and exponential or step: 100, 100:step"),
        ({"imbalance": "100:linear"}, "--imbalance 100:linear: expected a factor above 1"),
        ({"imbalance": "ten"}, "--imbalance ten: expected a factor above 1"),
        ({"imbalance": "5", "head_size": 5000}, "5000 is not from 0 to 124: class 0 with 124 rows allows no more"),
        ({"imbalance": "5", "head_size": 10**30}, "is not from 0 to 124"),
        ({"imbalance": "5", "head_size": -3}, "-3 is not from 0 to 124"),
        ({"imbalance": "1000", "head_size": 100}, "a largest class of 100 rows leaves none of class 7"),
        (
            {"imbalance": "5", "train_size": 50},
            "--train-size and --imbalance both select training rows: leave out one of them",
        ),
        ({"head_size": 5}, "--head-size 5 is the largest class of a long tail: give --imbalance as well"),
    ],
)
def test_an_impossible_long_tail_is_refused(cut: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        count_digits(**cut)
    assert message in str(raised.value)


def test_a_cache_of_a_long_tail_trains_students_and_is_another_cache_than_that_of_all_rows(stages: Stages) -> None:
    cut = ("--imbalance", "10", "--head-size", 60)
    teacher = stages("teacher", *SMALL, *cut, "--out", "t")
    assert teacher["teacher"]["test"]["recall_tail"] is not None
    make_cache = ("teacher-cache", "--weights", "t", "--out", "c")
    stages(*make_cache, *cut)
    assert CacheReader(Path("c")).manifest.splits == {"train": 240, "val": 180, "test": 360}
    result = stages("student", "--cache", "c", "--arch", "mlp:32", "--epochs", 20, "--loss", "hard", "--out", "r")
    assert result["student"]["test"]["recall_head"] > result["student"]["test"]["recall_tail"]
    assert np.array(result["student"]["test"]["confusion"]).sum() == 360
    assert stages("evaluate", "r")["0"]["test"]["recall_tail"] == result["student"]["test"]["recall_tail"]
    for other_cut in ((), ("--imbalance", "10", "--head-size", 50), ("--imbalance", "10:step", "--head-size", 60)):
        assert "transfer_set.cut" in stages.fails(1, *make_cache, *other_cut)
    stages(*make_cache, *cut, "--draws", 1)  # the same cut: the cache is complete already


def test_a_teacher_that_stage_one_trains_is_trained_on_the_long_tail(stages: Stages) -> None:
    cut = ("--imbalance", "10", "--head-size", 20, "--teacher", "mlp:4")
    stages("teacher-cache", *cut, "--out", "c")
    recorded = json.loads(Path("c-teacher/settings.json").read_text())
    assert (recorded["imbalance"], recorded["head_size"]) == ("10", 20)
    assert "the teacher in 'c-teacher' was trained with other options" in stages.fails(
        1, "teacher-cache", "--teacher", "mlp:4", "--out", "c"
    )


def test_a_teacher_of_another_cut_causes_a_note(stages: Stages) -> None:
    stages("teacher", *SMALL, "--seed", 3, "--out", "t")
    _, out, _ = stages.call("teacher-cache", "--weights", "t", "--out", "c")
    assert "the teacher in 't' was trained on another split (seed 3 there, 0 here): validation may hold rows" in out
    _, out, _ = stages.call("teacher-cache", "--weights", "t", "--seed", 3, "--out", "d")
    assert "another split" not in out


# Held-out splits that lack a class


def test_metrics_of_a_class_that_validation_lacks_are_null(
    stages: Stages, tmp_path: Path, save_image: Callable[..., object]
) -> None:
    for c, (name, rows) in enumerate((("ant", 20), ("bee", 10), ("cow", 2))):
        for split, count in (("train", rows), ("test", 3)):
            for k in range(count):
                save_image(tmp_path / "pets" / split / name / f"{k}.png", k=50 * c + k)
    data = ("--data", "folder:pets", "--views", "none")
    teacher = stages("teacher", *data, "--arch", "mlp:4", "--epochs", 2, "--select", "f1_macro", "--out", "t")
    stages("teacher-cache", *data, "--weights", "t", "--draws", 1, "--out", "c")
    student = stages(
        "student",
        "--data",
        "folder:pets",
        "--cache",
        "c",
        "--arch",
        "mlp:4",
        "--epochs",
        2,
        "--map",
        "vector",
        "--loss",
        "kd",
        "--loss",
        "soft_f1",
        "--select",
        "f1_macro",
        "--seeds",
        2,
        "--out",
        "s",
    )
    for metrics in (teacher["teacher"]["val"], student["student"]["val"], student["teacher"]["val"]):
        assert metrics["recall_tail"] is None  # cow is the tail, and no row of it is in validation
        assert metrics["per_class"]["recall"][2] is None
        assert metrics["per_class"]["f1"][2] is None
        assert metrics["per_class"]["support"] == [2, 1, 0]
        assert metrics["auroc_macro"] is None
        assert metrics["f1_macro"] == pytest.approx(np.mean(metrics["per_class"]["f1"][:2]))
    assert student["student"]["test"]["recall_tail"] is not None


def test_the_next_command_that_a_teacher_prints_makes_a_cache_of_the_same_cut(stages: Stages) -> None:
    """With another cut, validation would have rows that the teacher was trained on."""
    cut = ("--seed", 3, "--val-fraction", 0.2, "--imbalance", "20", "--head-size", 60)
    _, out, _ = stages.call("teacher", *SMALL, *cut, "--out", "t")
    (arguments,) = (line.split(" teacher-cache ")[1] for line in out.splitlines() if line.startswith("next: "))
    stages("teacher-cache", *arguments.split())
    identity = CacheReader(Path("caches/digits")).manifest.identity["transfer_set"]
    expected = load_transfer_set("digits", Path(), val_fraction=0.2, imbalance="20", head_size=60, seed=3)
    assert identity == expected.identity()
    _, out, _ = stages.call("teacher", *SMALL, "--out", "other")
    assert "--weights other --out caches/digits-2" in out  # the usual folder is taken
