"""Teachers of several labels: estimators of scikit-learn, networks that end in a sigmoid, targets from a file."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # the fixture `user_folder` forgets modules that are imported after this
from numpy.typing import NDArray

import softcache
import softcache.stages.check_cache.command
import softcache.stages.student.command
import softcache.stages.teacher_cache.command
from tests.helpers.commands import Stages

K = 3
CODE = """\
import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

with np.load("table.npz") as archive:
    x, y = archive["x"], archive["y"].copy()
y[y < 0] = 0

def forest():
    return RandomForestClassifier(5, max_depth=4, random_state=0).fit(x, y)

def neighbours():
    return KNeighborsClassifier(7).fit(x, y)

def outputs():
    return MultiOutputClassifier(LogisticRegression()).fit(x, y)

def one_vs_rest():
    return OneVsRestClassifier(LogisticRegression()).fit(x, y)

def chain():
    return ClassifierChain(LogisticRegression(), random_state=0).fit(x, y)

def constant_label():
    return RandomForestClassifier(5, random_state=0).fit(x, np.where([True, False, True], y, [0, 1, 0]))

def two_labels():
    return RandomForestClassifier(5, random_state=0).fit(x, y[:, :2])

def other_values():
    return RandomForestClassifier(5, random_state=0).fit(x, y + 1)

def linear(scale=1.0):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    layer.weight.data *= 20 * scale
    return layer

def logits():
    return linear()

def sigmoid():
    return nn.Sequential(linear(), nn.Sigmoid())

def faint_sigmoid():
    return nn.Sequential(linear(0.08), nn.Sigmoid())

def softmax():
    return nn.Sequential(linear(), nn.Softmax(1))

def beyond_later(rows):
    values = torch.from_numpy(np.clip(np.abs(rows[:, :3]), 0, 1))
    values[torch.from_numpy(rows[:, 0] > 1.9)] = 1.5
    return values
"""


@pytest.fixture
def table(user_folder: Path) -> Path:
    """A folder with table.npz, 120 rows of 4 numbers with 3 labels, and the module teachers."""
    random = np.random.default_rng(0)
    x = random.normal(size=(120, 4)).astype(np.float32)
    y = (x[:, :K] + 0.5 * random.normal(size=(120, K)) > 0.3).astype(np.int8)
    y[::11, 1] = -1
    np.savez(user_folder / "table.npz", x=x, y=y)
    (user_folder / "labels_teachers.py").write_text(CODE)
    return user_folder


def command(teacher: str, *more: str) -> list[str]:
    weights = [] if teacher.startswith("logits:") else ["--weights", "DEFAULT"]
    options = ["--test-fraction", "0.2", "--codec", "float32", "--views", "none", "--out", "cache"]
    return ["teacher-cache", "--data", "arrays:table.npz", "--teacher", teacher, *weights, *options, *more]


def read_rows(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The stored logits [N, K] of the training split by index, and its rows x [N, 4]."""
    cache = softcache.Cache(folder / "cache", data="arrays:table.npz")
    with np.load(folder / "table.npz") as file:
        x = file["x"][cache.rows("train")]
    return cache.targets("train", np.arange(cache.splits["train"])).numpy(), x


def presence(outputs: Any) -> NDArray[np.float64]:
    """The probability of each label [N, K] of what predict_proba returned."""
    return np.stack([column[:, 1] for column in outputs], 1) if isinstance(outputs, list) else outputs


def to_log_odds(p: NDArray[np.floating]) -> NDArray[np.float64]:
    tiny, p = torch.finfo(torch.float32).tiny, p.astype(np.float64)
    return np.asarray(np.log(np.maximum(p, tiny)) - np.log(np.maximum(1 - p, tiny)))


@pytest.mark.parametrize("name", ["forest", "neighbours", "outputs", "one_vs_rest", "chain"])
def test_the_log_odds_of_an_estimator_are_stored(table: Path, stages: Stages, name: str) -> None:
    stages(*command(f"labels_teachers:{name}"))
    stored, x = read_rows(table)
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    p = presence(namespace[name]().predict_proba(x)).astype(np.float32)
    assert p.shape == stored.shape
    np.testing.assert_allclose(stored, to_log_odds(p), rtol=1e-5, atol=1e-6)
    assert ((stored > 0) == (p > 0.5)).all()


def test_a_label_that_was_constant_in_training_has_probability_0_or_1(table: Path, stages: Stages) -> None:
    stages(*command("labels_teachers:constant_label"))
    stored, _ = read_rows(table)
    assert stored[:, 1] == pytest.approx(np.full(len(stored), -np.log(np.finfo(np.float32).tiny)))
    student = stages("student", "--data", "arrays:table.npz", "--cache", "cache", "--epochs", "2", "--out", "run")
    assert np.isfinite(student["student"]["test"]["kl_to_teacher"])


def test_probabilities_of_a_sigmoid_are_stored_as_the_logits_before_it(table: Path, stages: Stages) -> None:
    stages(*command("labels_teachers:sigmoid", "--outputs", "probabilities"))
    stored, _ = read_rows(table)
    stages(*command("labels_teachers:logits", "--out", "plain"))
    cache = softcache.Cache(table / "plain", data="arrays:table.npz")
    logits = cache.targets("train", np.arange(cache.splits["train"])).numpy()
    inner = np.abs(logits) < 8
    assert inner.sum() > 50
    np.testing.assert_allclose(stored[inner], logits[inner], rtol=1e-3, atol=1e-4)
    teacher = ("--teacher", "labels_teachers:sigmoid", "--weights", "DEFAULT")
    stages("check-cache", "cache", "--data", "arrays:table.npz", "--deep", *teacher)


@pytest.mark.parametrize(
    ("teacher", "more", "words"),
    [
        ("sigmoid", (), r"between 0 and 1 .* as after a sigmoid, and not logits"),
        ("softmax", (), "--outputs probabilities stores their log-odds"),
        ("logits", ("--outputs", "probabilities"), "probabilities of labels are between 0 and 1"),
        ("two_labels", (), "returned probabilities of 2 labels, the data have 3"),
        ("other_values", (), "with the values 1, 2: expected two columns, of 0 and of 1"),
    ],
)
def test_outputs_of_another_kind_are_refused(
    table: Path, stages: Stages, teacher: str, more: tuple[str, ...], words: str
) -> None:
    error = stages.fails(2, *command(f"labels_teachers:{teacher}", *more))
    assert re.search(words, error), error


def test_uncertain_outputs_between_0_and_1_have_a_note(table: Path, stages: Stages) -> None:
    code, out, err = stages.call(*command("labels_teachers:faint_sigmoid"))
    assert code == 0, err
    assert "note: all outputs of the teacher are between 0 and 1" in out


def test_a_row_that_is_no_probability_is_named(table: Path, stages: Stages) -> None:
    error = stages.fails(1, *command("labels_teachers:beyond_later", "--outputs", "probabilities"))
    assert "is not between 0 and 1, and --outputs probabilities is given" in error


def test_targets_of_several_labels_come_from_a_file(table: Path, stages: Stages) -> None:
    with np.load(table / "table.npz") as file:
        data = dict(file)
    np.savez(table / "table.npz", **{f"{name}_train": a[:90] for name, a in data.items()}, x_test=data["x"][90:])
    logits = {"train": 3 * data["x"][:90, :K], "test": 3 * data["x"][90:, :K]}
    np.savez(table / "targets.npz", **logits)
    np.savez(table / "probabilities.npz", **{split: 1 / (1 + np.exp(-z)) for split, z in logits.items()})
    for name, more in (("targets", []), ("probabilities", ["--outputs", "probabilities"])):
        stages("teacher-cache", "--data", "arrays:table.npz", "--teacher", f"logits:{name}.npz", *more, "--out", name)
        cache = softcache.Cache(table / name, data="arrays:table.npz")
        stored = cache.targets("test", np.arange(30)).numpy()
        np.testing.assert_allclose(stored, logits["test"], atol=5e-3)
