"""A teacher and its labels: class names of its run, another order of the classes, chance, another normalisation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.base.errors import UsageError
from softcache.data.sources.class_order import sort_classes
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models.prepared_model import parse_normalize
from softcache.stages.teacher_cache import label_checks
from softcache.stages.teacher_cache.label_checks import describe_label_fit
from tests.helpers.colours import save_colour_teacher, save_colours
from tests.helpers.commands import Stages

COMMAND = ("teacher-cache", "--data", "folder:d", "--views", "none", "--draws", "1", "--out", "c")
NUMBERS = [str(number) for number in range(12)]


# The classes of a run


@pytest.fixture
def run(tmp_path: Path, stages: Stages) -> Path:
    """The run of a teacher of ant, bee and cow."""
    save_colours(tmp_path / "d", ["ant", "bee", "cow"])
    train = ("--arch", "mlp:4", "--epochs", "1", "--views", "none", "--out", "t")
    result = stages("teacher", "--data", "folder:d", *train)
    assert result["classes"] == ["ant", "bee", "cow"]
    return tmp_path / "t"


def edit_result(run: Path, **changes: Any) -> None:
    result = {**json.loads((run / "result.json").read_text()), **changes}
    (run / "result.json").write_text(json.dumps({key: value for key, value in result.items() if value is not None}))


def test_a_run_of_renamed_classes_is_refused_and_its_weights_alone_are_taken(
    run: Path, stages: Stages, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        (tmp_path / "d" / split / "ant").rename(tmp_path / "d" / split / "zebra")
    error = stages.fails(1, *COMMAND, "--weights", "t")
    assert "class 0 is 'ant' in the run and 'bee' in the data" in error
    assert "\n" not in error
    way_out = error.partition("name the weights alone: ")[2].split()
    assert way_out[::2] == ["--weights", "--teacher", "--normalize"]
    stages(*COMMAND, *way_out)
    recorded = json.loads((run / "result.json").read_text())["teacher"]["preparation"]
    assert CacheReader(tmp_path / "c").input_spec.to_json() == recorded


@pytest.mark.parametrize(
    ("classes", "advice"),
    [(["bee", "ant", "cow"], "--classes FILE with the run's order"), (["ant", "bee"], "2 classes, the data have 3")],
)
def test_a_run_of_another_order_or_number_of_classes_is_refused(
    run: Path, stages: Stages, classes: list[str], advice: str
) -> None:
    edit_result(run, classes=classes)
    assert advice in stages.fails(1, *COMMAND, "--weights", "t")


@pytest.mark.parametrize("classes", [3, "abc", [1, 2, 3], {"a": 1}, ["a\x1b[2J", "b", "c"]])
def test_damaged_class_names_of_a_run_are_one_line(run: Path, stages: Stages, classes: Any) -> None:
    edit_result(run, classes=classes)
    error = stages.fails(1, *COMMAND, "--weights", "t")
    assert "\n" not in error
    assert error.isprintable()


def test_a_run_of_an_earlier_version_has_no_class_names(run: Path, stages: Stages) -> None:
    edit_result(run, classes=None)
    stages(*COMMAND, "--weights", "t")


def test_a_student_keeps_the_names_of_the_classes(run: Path, stages: Stages, tmp_path: Path) -> None:
    stages(*COMMAND, "--weights", "t")
    student = ("student", "--data", "folder:d", "--cache", "c", "--arch", "mlp:4", "--epochs", "1", "--seeds", "2")
    stages(*student, "--out", "s")
    for folder in ("s", "s/seed-0", "s/seed-1"):
        assert json.loads((tmp_path / folder / "result.json").read_text())["classes"] == ["ant", "bee", "cow"]
    stages(*COMMAND[:-1], "next", "--weights", "s/seed-0")


# The order of the classes


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize(
    ("names", "order", "advice"),
    [
        (NUMBERS, list(range(12)), "add --classes number"),
        ([f"c{number}" for number in NUMBERS], list(range(12)), "add --classes natural"),
        (["a", "b", "c", "d"], [1, 2, 3, 0], "output 0 fits 'b', output 1 fits 'c'"),
        (["a", "b", "c", "d"], [0, 1, 2, 3], ""),
    ],
)
def test_another_order_of_the_classes_is_named(
    stages: Stages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    order: list[int],
    advice: str,
    is_large: bool,
) -> None:
    """At the end, and for a large cache before the first shard too."""
    monkeypatch.setattr(label_checks, "_MIN_VIEWS", 0 if is_large else 10_000)
    save_colours(tmp_path / "d", names, train=14)
    save_colour_teacher(tmp_path, "nets_order", order)
    teacher = ("--teacher", "nets_order:plain", "--weights", "w.pt", "--normalize", "none")
    code, out, err = stages.call(*COMMAND, *teacher)
    assert code == 0, err
    lines = [line for line in out.splitlines() if "in another order" in line]
    assert len(lines) == (0 if not advice else 2 if is_large else 1), out
    assert all(advice in line for line in lines)
    assert "chance" not in out
    code, out, err = stages.call(*COMMAND[:-1], "e", *teacher, "--json")
    assert json.loads(out)["cache"] == "e"
    assert ("in another order" in err) == bool(advice)


def test_natural_order_counts_runs_of_digits_as_numbers() -> None:
    assert sort_classes(("a1b", "a10", "a2", "b"), "natural") == ("a1b", "a2", "a10", "b")
    assert sort_classes(("1", "x"), "number") is None
    assert sort_classes(("1", "10", "9"), "number") == ("1", "9", "10")


def test_chance_is_hardly_ever_taken_for_another_order(dose: Callable[[int, int], int]) -> None:
    """Labels and predictions without a relation, of few and many classes and rows, also with one frequent class."""
    rng = np.random.default_rng(0)
    names = {K: tuple(f"c{k}" for k in range(K)) for K in (2, 3, 12, 100)}
    wrong = trials = 0
    for _ in range(dose(40, 1000)):
        for K, classes in names.items():
            for n in (30, 500):
                shares = rng.dirichlet(np.full(K, 0.5))
                labels = rng.choice(K, n, p=shares)
                lines = describe_label_fit(labels, rng.choice(K, n, p=rng.dirichlet(np.full(K, 0.5))), classes)
                wrong += any("in another order" in line for line in lines)
                trials += 1
    assert wrong <= trials / 500


@pytest.mark.parametrize(("accuracy", "lines"), [(1.0, 0), (0.6, 0), (0.35, 0), (0.0, 1)])
def test_a_teacher_near_chance_is_named_and_a_poor_one_is_not(accuracy: float, lines: int) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 10, 1000)
    predictions = np.where(rng.random(1000) < accuracy, labels, rng.integers(0, 10, 1000))
    found = describe_label_fit(labels, predictions, tuple("abcdefghij"))
    assert len(found) == lines
    assert all("hardly better than chance" in line for line in found)


def test_two_classes_of_a_hundred_that_changed_places_are_found() -> None:
    labels = np.arange(10_000) % 100
    swapped = np.where(labels == 3, 4, np.where(labels == 4, 3, labels))
    line = describe_label_fit(labels, swapped, tuple(f"c{k:03d}" for k in range(100)))[0]
    assert "output 3 fits 'c004', output 4 fits 'c003'" in line


# The normalisation


def test_without_normalize_it_is_said_which_one_fits_weights_from_elsewhere(stages: Stages, tmp_path: Path) -> None:
    save_colours(tmp_path / "d", ["a", "b", "c", "d", "e", "f"], train=14)
    save_colour_teacher(tmp_path, "nets_normalize", [0, 1, 2, 3, 4, 5])  # for pixels of 0 … 1
    teacher = ("--teacher", "nets_normalize:plain", "--weights", "w.pt")
    code, out, err = stages.call(*COMMAND, *teacher)
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("--normalize not given"))
    assert "none 1.0000" in line
    assert line.endswith("--normalize none fits this teacher better")
    assert "--normalize not given" not in stages.call(*COMMAND, *teacher)[1]  # the cache is complete
    assert "--normalize not given" not in stages.call(*COMMAND[:-1], "e", *teacher, "--normalize", "data")[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", None),
        ("mean=0.5,std=0.25", ((0.5,), (0.25,))),
        ("mean=0.5,0.4,0.3,std=0.25", ((0.5, 0.4, 0.3), (0.25,) * 3)),
        ("mean=-1,0,1e-3, std=0.1,0.2,0.3", ((-1.0, 0.0, 1e-3), (0.1, 0.2, 0.3))),
    ],
)
def test_normalize_takes_a_name_or_numbers(text: str, expected: Any) -> None:
    assert parse_normalize(text) == expected


@pytest.mark.parametrize("command", ["teacher", "teacher-cache"])
@pytest.mark.parametrize(
    "text",
    [
        "imagnet",
        "0.5",
        "mean=0.5",
        "std=1,mean=0",
        "mean=,std=1",
        "mean=0,0,std=1",
        "mean=0,std=0",
        "mean=0,std=-1",
        "mean=nan,std=1",
        "mean=0,std=inf",
        "mean=a,std=1",
        "mean=0\x1b[2J,std=1",
    ],
)
def test_a_normalize_that_cannot_work_is_one_line(command: str, text: str, stages: Stages) -> None:
    with pytest.raises(UsageError):
        parse_normalize(text)
    error = stages.fails(2, command, "--normalize", text)
    assert error.isprintable()
    assert "--normalize" in error


def test_a_grey_teacher_of_numbers_and_one_of_three_channels(stages: Stages, tmp_path: Path) -> None:
    for normalize, channels in (("mean=0.3,std=0.2", 1), ("mean=0.3,0.4,0.5,std=0.2", 3)):
        result = stages("teacher", "--arch", "mlp:4", "--epochs", 1, "--train-size", 50, "--normalize", normalize)
        assert result["teacher"]["preparation"]["channels"] == channels
        assert torch.tensor(result["teacher"]["preparation"]["std"]).tolist() == pytest.approx([0.2] * channels)
