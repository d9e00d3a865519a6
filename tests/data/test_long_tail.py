"""Rare classes: long-tailed training sets, and samplers that show every class."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcache.base.errors import UsageError
from softcache.data.long_tail import parse_imbalance, resample_rows, select_long_tail
from softcache.data.transfer_set import load_transfer_set
from softcache.pipeline.cache.reader import Cache
from tests.helpers.commands import Stages

SMALL = ("--arch", "mlp:8", "--epochs", 2)


def digits(**cut: object) -> list[int]:
    rows = load_transfer_set("digits", Path(), val_fraction=0.125, **cut).splits["train"]  # type: ignore[arg-type]
    return np.bincount(rows.labels, minlength=10).tolist()


# The cut


@pytest.mark.parametrize(
    ("text", "classes", "head", "total"),
    # CIFAR-10-LT and CIFAR-100-LT as published; the sets of the same recipe with other factors; a step by hand.
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


def test_the_rows_that_stay_are_of_the_training_split_alone_and_the_same_for_ever() -> None:
    whole = load_transfer_set("digits", Path(), val_fraction=0.125)
    cut = load_transfer_set("digits", Path(), val_fraction=0.125, imbalance="20", head_size=100)
    labels = cut.splits["train"].labels
    assert np.bincount(labels).tolist() == [100, 71, 51, 36, 26, 18, 13, 9, 6, 5]
    for split in ("val", "test"):
        assert cut.splits[split].content == whole.splits[split].content
    pixels = {row.tobytes() for row in whole.splits["train"].images.pixels.numpy()}  # type: ignore[union-attr]
    assert {row.tobytes() for row in cut.splits["train"].images.pixels.numpy()} <= pixels  # type: ignore[union-attr]
    again = load_transfer_set("digits", Path(), val_fraction=0.125, imbalance="20:exponential", head_size=100)
    assert again.identity() == cut.identity()
    assert cut.cut == {**whole.cut, "imbalance": "20:exponential", "head_size": 100}
    other = load_transfer_set("digits", Path(), val_fraction=0.125, imbalance="20", head_size=100, seed=1)
    assert other.splits["train"].content != cut.splits["train"].content
    golden = select_long_tail(np.arange(40) % 2, 2, "4", 8, (0, 12))[0].tolist()
    assert golden == GOLDEN


GOLDEN = [0, 3, 4, 5, 6, 12, 18, 24, 30, 36]


def test_without_a_head_size_the_largest_class_has_all_that_the_data_allow() -> None:
    there, shares = np.array(digits()), parse_imbalance("3").shares(10)
    head = digits(imbalance="3")[0]
    assert (np.floor(head * shares + 1e-9) <= there).all()
    assert (np.floor((head + 1) * shares + 1e-9) > there).any()


@pytest.mark.parametrize(
    ("cut", "wrong"),
    [
        ({"imbalance": "1"}, "--imbalance 1: a factor above 1, and exponential or step: 100, 100:step"),
        ({"imbalance": "100:linear"}, "--imbalance 100:linear: a factor above 1"),
        ({"imbalance": "ten"}, "--imbalance ten: a factor above 1"),
        ({"imbalance": "5", "head_size": 5000}, "5000 is not from 0 to 124: class 0 with 124 rows allows no more"),
        ({"imbalance": "5", "head_size": 10**30}, "is not from 0 to 124"),
        ({"imbalance": "5", "head_size": -3}, "-3 is not from 0 to 124"),
        ({"imbalance": "1000", "head_size": 100}, "a largest class of 100 rows leaves none of class 7"),
        ({"imbalance": "5", "train_size": 50}, "--train-size and --imbalance both say which training rows stay"),
        ({"head_size": 5}, "--head-size 5 is the largest class of a long tail: say --imbalance, too"),
    ],
)
def test_what_cannot_be_cut_is_refused(cut: dict[str, object], wrong: str) -> None:
    with pytest.raises(UsageError) as refusal:
        digits(**cut)
    assert wrong in str(refusal.value)


def test_a_cache_of_a_long_tail_is_a_cache_of_its_own_and_students_find_their_rows(stages: Stages) -> None:
    cut = ("--imbalance", "10", "--head-size", 60)
    teacher = stages("teacher", *SMALL, *cut, "--out", "t")
    assert teacher["teacher"]["test"]["recall_tail"] is not None
    made = ("teacher-cache", "--weights", "t", "--out", "c")
    stages(*made, *cut)
    assert Cache(Path("c")).manifest.splits == {"train": 240, "val": 180, "test": 360}
    result = stages("student", "--cache", "c", "--arch", "mlp:32", "--epochs", 20, "--loss", "hard", "--out", "r")
    assert result["student"]["test"]["recall_head"] > result["student"]["test"]["recall_tail"]
    assert np.array(result["student"]["test"]["confusion"]).sum() == 360
    assert stages("evaluate", "r")["0"]["test"]["recall_tail"] == result["student"]["test"]["recall_tail"]
    for other in ((), ("--imbalance", "10", "--head-size", 50), ("--imbalance", "10:step", "--head-size", 60)):
        assert "transfer_set.cut" in stages.fails(1, *made, *other)
    stages("teacher-cache", "--weights", "t", *cut, "--draws", 1, "--out", "c")  # the same again: whole already


def test_a_teacher_that_stage_one_trains_sees_the_long_tail(stages: Stages) -> None:
    cut = ("--imbalance", "10", "--head-size", 20, "--teacher", "mlp:4")
    stages("teacher-cache", *cut, "--out", "c")
    kept = json.loads(Path("c-teacher/settings.json").read_text())
    assert (kept["imbalance"], kept["head_size"]) == ("10", 20)
    assert "the teacher in 'c-teacher' is another one" in stages.fails(
        1, "teacher-cache", "--teacher", "mlp:4", "--out", "c"
    )


def test_a_teacher_of_another_cut_is_remarked_on(stages: Stages) -> None:
    stages("teacher", *SMALL, "--seed", 3, "--out", "t")
    _, out, _ = stages.call("teacher-cache", "--weights", "t", "--out", "c")
    assert "the teacher in 't' was trained on another cut (seed 3 there, 0 here): it may have learned rows" in out
    _, out, _ = stages.call("teacher-cache", "--weights", "t", "--seed", 3, "--out", "d")
    assert "another cut" not in out


# Sampling


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_each_class_is_shown_in_proportion_to_a_power_of_its_rows(labels: list[int], power: float, key: int) -> None:
    chosen = resample_rows(np.array(labels), power, (key,))
    shown, there = Counter(np.array(labels)[chosen].tolist()), Counter(labels)
    whole = sum(n**power for n in there.values())
    assert len(chosen) == len(labels)
    for c, n in there.items():
        assert abs(shown[c] - len(labels) * n**power / whole) < 1
        rows = Counter(int(i) for i in chosen if labels[i] == c)
        assert max(rows.values(), default=0) - min(rows.get(i, 0) for i, y in enumerate(labels) if y == c) <= 1


def test_at_power_one_every_row_comes_once() -> None:
    assert sorted(resample_rows(np.arange(30) % 4, 1.0, (0,)).tolist()) == list(range(30))


@pytest.mark.parametrize("resident", [True, False])
def test_a_balanced_round_shows_every_class_equally_often_with_its_own_targets(
    tiny: Path, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softcache.pipeline.loading.loader import CacheLoader

    cache = Cache(tiny / "cache")
    rows = cache.load_transfer_set("digits", Path(), lambda items, total, what: items).splits["train"]
    monkeypatch.setattr(Cache, "fits_in_memory", lambda *_: resident)
    kept = np.flatnonzero(rows.labels[cache.row_order("train")] < 3)[:-40]  # an uneven part of it
    stream = CacheLoader(rows, cache.views, cache.seed, 3, 10, rows.labels, kept, 3, cache, sampler="balanced")
    batches = list(stream.batches(0, 2 * stream.steps_per_epoch))
    for half in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        counts = Counter(int(y) for batch in half for y in batch.labels)
        assert sum(counts.values()) == len(kept)
        assert max(counts.values()) - min(counts.values()) <= 1
    place = {int(i): p for p, i in enumerate(cache.row_order("train"))}
    for batch in batches:
        expected = cache.read_stored("train", batch.draw, np.array([place[int(i)] for i in batch.index]))[0]
        assert batch.logits is not None
        assert (batch.logits == expected).all()


def test_the_sampler_changes_what_is_learned_and_a_stopped_training_goes_on(tiny: Path, stages: Stages) -> None:
    asked = ("student", "--cache", tiny / "cache", *SMALL)
    plain, balanced = stages(*asked, "--out", "p"), stages(*asked, "--sampler", "balanced", "--out", "b")
    assert plain["student"]["val"]["nll"] != balanced["student"]["val"]["nll"]
    root = stages("teacher", "--imbalance", "10", "--head-size", 50, *SMALL, "--sampler", "sqrt", "--out", "t")
    assert root["settings"]["sampler"] == "sqrt"


def test_a_sampler_needs_all_labels(tiny: Path, stages: Stages) -> None:
    refused = stages.fails(2, "student", "--cache", tiny / "cache", *SMALL, "--sampler", "sqrt", "--labelled", 20)
    assert "--sampler needs the labels of all rows, --labelled hides some" in refused


# Held-out splits that lack a class


def test_figures_of_a_class_that_validation_lacks_are_not_known(
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
    for figures in (teacher["teacher"]["val"], student["student"]["val"], student["teacher"]["val"]):
        assert figures["recall_tail"] is None  # cow is the tail, and nothing is known of it
        assert figures["per_class"]["recall"][2] is None
        assert figures["per_class"]["f1"][2] is None
        assert figures["per_class"]["support"] == [2, 1, 0]
        assert figures["auroc_macro"] is None
        assert figures["f1_macro"] == pytest.approx(np.mean(figures["per_class"]["f1"][:2]))
    assert student["student"]["test"]["recall_tail"] is not None


def test_the_command_that_a_teacher_ends_with_makes_a_cache_of_its_own_cut(stages: Stages) -> None:
    """With another cut, rows of validation are ones that the teacher has learned."""
    cut = ("--seed", 3, "--val-fraction", 0.2, "--imbalance", "20", "--head-size", 60)
    _, out, _ = stages.call("teacher", *SMALL, *cut, "--out", "t")
    (said,) = (line.split(" teacher-cache ")[1] for line in out.splitlines() if line.startswith("next: "))
    stages("teacher-cache", *said.split())
    rows = Cache(Path("caches/digits")).manifest.identity["transfer_set"]
    own = load_transfer_set("digits", Path(), val_fraction=0.2, imbalance="20", head_size=60, seed=3)
    assert rows == own.identity()
    _, out, _ = stages.call("teacher", *SMALL, "--out", "other")
    assert "--weights other --out caches/digits-2" in out  # the usual folder is taken
