"""Regressors of scikit-learn and functions as teachers of numbers; what is for another task is refused."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression

import softcache
from softcache.base.errors import UsageError
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages

CODE = """\
import numpy as np
import torch
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import nn

with np.load("one.npz") as archive:
    x, y = archive["x"], archive["y"]

def boosting():
    return GradientBoostingRegressor(n_estimators=20, random_state=0).fit(x, y)

fitted = boosting()

def linear():
    return LinearRegression().fit(x, np.stack([y, -y], 1))

def classifier():
    return LogisticRegression().fit(x, y > 140)

def unfitted():
    return LinearRegression()

def one_axis(batch):
    return batch[:, 0]

def one_column(batch):
    return batch[:, :1]

def wide(batch):
    return batch[:, :3]

class Flat(nn.Module):
    def forward(self, batch):
        return batch.sum(1)

def network():
    return Flat()

def text(batch):
    return batch[:, :1].astype(str)

def infinite(batch):
    return np.full((len(batch), 1), np.inf)
"""


def read_rows(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    with np.load(path) as file:
        return file["x"], file["y"]


@pytest.fixture
def table(user_folder: Path, stages: Stages) -> Path:
    """A folder with diabetes as one.npz, two.npz with two outputs, classes.npz, and the module teachers."""
    data = load_diabetes()
    x, y = data.data.astype(np.float32)[:120], data.target.astype(np.float32)[:120] + 0.5
    np.savez(user_folder / "one.npz", x=x, y=y)
    np.savez(user_folder / "two.npz", x=x, y=np.stack([y, 1000 * y], 1))
    np.savez(user_folder / "classes.npz", x=x, y=np.arange(120) % 2)
    (user_folder / "teachers.py").write_text(CODE)
    return user_folder


def cache_command(teacher: str, data: str = "one.npz", *more: str) -> list[str]:
    options = ["--test-fraction", "0.2", "--out", "cache", *more]
    return ["teacher-cache", "--data", f"arrays:{data}", "--teacher", teacher, *options]


@pytest.mark.parametrize("teacher", ["teachers:boosting", "teachers:fitted"])
def test_a_fitted_regressor_is_cached_checked_and_distilled(table: Path, stages: Stages, teacher: str) -> None:
    stages(*cache_command(teacher))
    x, y = read_rows(table / "one.npz")
    boosting = GradientBoostingRegressor(n_estimators=20, random_state=0).fit(x, y)
    splits = softcache.Cache("cache", data="arrays:one.npz").transfer_set.splits
    rows = {split: part.images.load_plain(np.arange(len(part)), 0, 0).numpy() for split, part in splits.items()}  # type: ignore[union-attr]
    cache = softcache.Cache("cache", data="arrays:one.npz")
    for split, values in rows.items():
        outputs = cache.targets(split, np.arange(len(values))).numpy()
        np.testing.assert_allclose(outputs[:, 0], boosting.predict(values), rtol=1e-6)
    stages("check-cache", "cache", "--data", "arrays:one.npz", "--deep", "--teacher", teacher, "--weights", "DEFAULT")
    if teacher == "teachers:boosting":
        student = ("student", "--data", "arrays:one.npz", "--cache", "cache", "--arch", "mlp:8", "--epochs", "30")
        result = stages(*student, "--out", "run")
        live = boosting.predict(rows["test"])
        assert result["teacher"]["test"]["mae"] == pytest.approx(
            np.abs(live - splits["test"].labels[:, 0]).mean(), 1e-6
        )
        assert result["student"]["test"]["r2_to_teacher"] > 0


def test_several_outputs_and_a_live_regressor(table: Path) -> None:
    x, y = read_rows(table / "two.npz")
    linear = LinearRegression().fit(x, y)
    cache = softcache.build_cache("cache", linear, "arrays:two.npz", test_fraction=0.2)
    assert (cache.task, cache.num_classes) == ("numbers", 2)
    for split, part in cache.transfer_set.splits.items():
        inputs = part.images.load_plain(np.arange(len(part)), 0, 0).numpy()  # type: ignore[union-attr]
        np.testing.assert_allclose(cache.targets(split, np.arange(len(part))), linear.predict(inputs), rtol=1e-5)
    with pytest.raises(UsageError, match="is a classifier, a LogisticRegression with predict_proba"):
        softcache.build_cache("other", LogisticRegression().fit(x, y[:, 0] > 140), "arrays:one.npz")
    with pytest.raises(UsageError, match="is a LinearRegression, with predict and without predict_proba"):
        softcache.build_cache("other", linear, "arrays:classes.npz")


@pytest.mark.parametrize("teacher", ["one_axis", "one_column", "network"])
def test_a_function_or_network_of_one_number_returns_one_axis_or_one_column(
    table: Path, stages: Stages, teacher: str
) -> None:
    stages(*cache_command(f"teachers:{teacher}", "one.npz", "--weights", "DEFAULT"))
    assert CacheReader(table / "cache").classes == 1


WRONG: dict[str, tuple[list[str], str]] = {
    "classifier": (
        cache_command("teachers:classifier"),
        "is a classifier, a LogisticRegression with predict_proba, and",
    ),
    "regressor": (
        cache_command("teachers:boosting", "classes.npz"),
        "a regressor is for --task numbers; others are a",
    ),
    "unfitted": (cache_command("teachers:unfitted"), "NotFittedError"),
    "too wide": (cache_command("teachers:wide"), "returned [2, 3] for 2 views, not [2, 1]"),
    "too narrow": (cache_command("teachers:one_axis", "two.npz"), "returned [2] for 2 views, not [2, 2]"),
    "other width": (cache_command("teachers:linear"), "returned [2, 2] for 2 views, not [2, 1]"),
    "text": (cache_command("teachers:text"), "returned <U"),
    "network": (
        cache_command("teachers:network", "two.npz", "--weights", "DEFAULT"),
        "outputs [2], not logits [B, 2]",
    ),
    "infinite": (cache_command("teachers:infinite"), "is inf: it is not a finite number"),
    "taps": (cache_command("teachers:boosting", "one.npz", "--taps", "a"), "--taps a is for networks of PyTorch"),
    "codec": (cache_command("teachers:boosting", "one.npz", "--codec", "sqrt8"), "--codec sqrt8 is not for the task"),
    "probabilities": (
        cache_command("teachers:boosting", "one.npz", "--outputs", "probabilities"),
        "--outputs probabilities is for one class an image, and the task here is numbers",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_teachers_that_do_not_fit_are_refused_in_one_line(table: Path, stages: Stages, case: str) -> None:
    command, words = WRONG[case]
    code, _, error = stages.call(*command)
    assert code in (1, 2)
    assert words in error
    assert "\n" not in error.rstrip("\n")


def test_a_teacher_of_an_output_without_numbers_is_not_trained(table: Path, stages: Stages) -> None:
    x, y = read_rows(table / "two.npz")
    y[:, 1] = np.nan
    np.savez("gap.npz", x=x, y=y, classes=np.array(["size", "mass"]))
    error = stages.fails(2, "teacher", "--data", "arrays:gap.npz", "--out", "t")
    assert "no training row of 'arrays:gap.npz' has 'mass'" in error
