"""Teachers that are no networks: functions and estimators with predict_proba, named as module:factory or passed."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # the fixture `user_folder` forgets modules that are imported after this
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from torch import nn

import softcache
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages

CODE = """\
from pathlib import Path
import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn

with np.load("table.npz") as archive:
    file = dict(archive)

def forest():
    return RandomForestClassifier(10, random_state=0).fit(file["x"], file["y"])

def forest_of_names():
    return RandomForestClassifier(10, random_state=0).fit(file["x"], np.array(["2", "0", "1"])[file["y"]])

fitted = forest()

class Estimator:
    def __init__(self, classes):
        self.classes_ = np.array(classes)

    def predict_proba(self, x):
        assert x.dtype == np.float32 and x.ndim == 2
        return np.eye(len(self.classes_))[np.abs(x[:, 0]).astype(int) % len(self.classes_)]

def permuted():
    return Estimator([2, 0, 1])

def two_classes():
    return Estimator([0, 1])

def other_names():
    return Estimator(["a", "b", "c"])

def unfitted():
    return RandomForestClassifier(10)

def batch_logits(x):
    assert isinstance(x, np.ndarray) and x.dtype == np.float32
    return torch.from_numpy(x[:, :3].copy()) * float(Path("factor").read_text())

def make_function(shape, classes):
    return lambda x: x.reshape(len(x), -1)[:, :classes] + len(shape)

def network(shape, classes):
    with open("calls", "a") as file:
        file.write("x")
    torch.manual_seed(0)
    return nn.Linear(shape[0], classes)

def number():
    return 3

def fails(x):
    return x[:, 99]

def one_column(x):
    return x[:, 0]

def wrong_width(x):
    return x[:, :2]

def as_text(x):
    return x[:, :3].astype(str)

def lists():
    class Several:
        classes_ = [np.arange(3), np.arange(3)]
        def predict_proba(self, x):
            return []
    return Several()

def random_outputs(x):
    return np.random.default_rng().normal(size=(len(x), 3))

def of_batch(x):
    return x[:, :3] - x[:, :3].mean(0)

def probabilities(x):
    return np.full((len(x), 3), 1 / 3)
"""


@pytest.fixture
def table(user_folder: Path, stages: Stages) -> Path:
    """A folder with table.npz, 90 rows of 4 numbers in 3 classes, and the module teachers."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 4)) + 2 * y[:, None]
    np.savez(user_folder / "table.npz", x=x.astype(np.float32), y=y)
    (user_folder / "teachers.py").write_text(CODE)
    (user_folder / "factor").write_text("2")
    return user_folder


def cache_command(teacher: str, *more: str) -> list[str]:
    options = ["--test-fraction", "0.2", "--codec", "float32", "--out", "cache", *more]
    return ["teacher-cache", "--data", "arrays:table.npz", "--teacher", teacher, *options]


def read_all(folder: Path, split: str) -> NDArray[np.float32]:
    """The logits of a split, float32 [N, K], by index."""
    cache = softcache.Cache(folder, data=f"arrays:{folder.parent / 'table.npz'}")
    return cache.targets(split, np.arange(cache.splits[split])).numpy()


def test_a_forest_is_cached_and_its_students_loss_is_the_live_one(table: Path, stages: Stages) -> None:
    record = stages(*cache_command("teachers:forest", "--views", "noise:std=0.2,mixup=0.3", "--draws", "3"))
    assert record["teacher"]["test"]["accuracy"] > 0.8
    cache = softcache.Cache(table / "cache", data="arrays:table.npz")
    forest = RandomForestClassifier(10, random_state=0)
    with np.load(table / "table.npz") as file:
        forest.fit(file["x"], file["y"])
    student = nn.Linear(4, 3)
    criterion = softcache.DistillationLoss("kd:temperature=4")
    differences = []
    for batch in cache.loader("train", batch_size=32, draws=3):
        probabilities = torch.from_numpy(forest.predict_proba(batch.views.numpy())).float()
        live = torch.log(probabilities.clamp(min=torch.finfo(torch.float32).tiny))
        outputs = student(batch.images)
        kd = nn.functional.kl_div(
            (outputs / 4).log_softmax(1), (live / 4).log_softmax(1), log_target=True, reduction="batchmean"
        )
        differences.append(abs(float(criterion(outputs, batch).detach() - 16 * kd.detach())))
    assert max(differences) < 1e-6
    result = stages("student", "--cache", "cache", "--data", "arrays:table.npz", "--epochs", "2", "--out", "run")
    assert result["student"]["arch"] == "mlp:64"


@pytest.mark.parametrize("teacher", ["teachers:fitted", "teachers:forest_of_names", "teachers:permuted"])
def test_the_columns_of_an_estimator_are_put_in_the_order_of_the_labels(
    table: Path, stages: Stages, teacher: str
) -> None:
    """In `forest_of_names`, rows of class 0 are called "2", of 1 "0" and of 2 "1"."""
    stages(*cache_command(teacher))
    cache = softcache.Cache(table / "cache", data="arrays:table.npz")
    top = read_all(table / "cache", "train").argmax(1)
    rows = cache.transfer_set.splits["train"]
    if teacher == "teachers:permuted":
        first = np.abs(rows.images.load_plain(np.arange(len(rows)), 0, 0).numpy()[:, 0]).astype(int) % 3
        np.testing.assert_array_equal(top, np.array([2, 0, 1])[first])
    else:
        expected = rows.labels if teacher == "teachers:fitted" else np.array([2, 0, 1])[rows.labels]
        assert (top == expected).mean() > 0.95


def test_a_function_of_a_batch_and_a_factory_of_one_output_logits(table: Path, stages: Stages) -> None:
    stages(*cache_command("teachers:batch_logits"))
    cache = softcache.Cache(table / "cache", data="arrays:table.npz")
    rows = cache.transfer_set.splits["train"].images
    x = rows.load_plain(np.arange(len(rows)), 0, 0).numpy()
    np.testing.assert_array_equal(read_all(table / "cache", "train"), 2 * x[:, :3])
    stages(*cache_command("teachers:make_function", "--out", "second"))
    np.testing.assert_array_equal(read_all(table / "second", "train"), x[:, :3] + 1)
    stages(*cache_command("teachers:make_function", "--normalize", "mean=1,std=2", "--out", "third"))
    np.testing.assert_allclose(read_all(table / "third", "train"), (x[:, :3] - 1) / 2 + 1, rtol=1e-6)
    identities = [CacheReader(table / name).manifest.identity["teacher"] for name in ("second", "third")]
    assert identities[0]["weights"] != identities[1]["weights"]


def test_a_complete_cache_is_compared_with_what_the_function_outputs_now(table: Path, stages: Stages) -> None:
    first = stages(*cache_command("teachers:batch_logits"))
    assert stages(*cache_command("teachers:batch_logits"))["fingerprint"] == first["fingerprint"]
    checked = ("check-cache", "cache", "--data", "arrays:table.npz", "--deep")
    stages(*checked, "--teacher", "teachers:batch_logits", "--weights", "DEFAULT")
    (table / "factor").write_text("3")
    assert "outputs have changed" in stages.fails(1, *cache_command("teachers:batch_logits"))
    assert "outputs have changed" in stages.fails(1, *cache_command("teachers:batch_logits", "--draws", "1"))
    error = stages.fails(1, *checked, "--teacher", "teachers:batch_logits", "--weights", "DEFAULT")
    assert "outputs have changed" in error


def test_a_network_of_a_factory_is_used_as_it_is_with_default_weights(table: Path, stages: Stages) -> None:
    stages(*cache_command("teachers:network", "--weights", "DEFAULT", "--normalize", "none"))
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    cache = softcache.Cache(table / "cache", data="arrays:table.npz")
    rows = cache.transfer_set.splits["train"].images
    expected = network(rows.load_plain(np.arange(len(rows)), 0, 0)).detach().numpy()
    np.testing.assert_allclose(read_all(table / "cache", "train"), expected, atol=1e-6)
    assert not (table / "cache-teacher").exists()
    assert (table / "calls").read_text() == "x"  # a factory may load gigabytes
    stages(
        "check-cache",
        "cache",
        "--data",
        "arrays:table.npz",
        "--deep",
        "--teacher",
        "teachers:network",
        "--weights",
        "DEFAULT",
    )
    assert (table / "calls").read_text() == "xx"
    stages(*cache_command("teachers:network", "--out", "trained"))
    assert (table / "trained-teacher" / "teacher.pt").is_file()


WRONG = {
    "teachers:number": "is a int: expected a torch.nn.Module, a function of a batch of views, or an object",
    "teachers:missing": "has no attribute 'missing'",
    "teachers:fails": "failed on a batch of float32 [2, 4]: IndexError",
    "teachers:one_column": "returned [2] for 2 views, not [2, 3]",
    "teachers:wrong_width": "returned [2, 2] for 2 views, not [2, 3]",
    "teachers:as_text": "returned <U",
    "teachers:two_classes": "has 2 classes_ (0, 1), the data have 3 (0, 1, 2): fit it",
    "teachers:other_names": "has 3 classes_ (a, b, c), the data have 3 (0, 1, 2): fit it",
    "teachers:unfitted": "NotFittedError",
    "teachers:lists": "it has several outputs",
    "teachers:random_outputs": "are random",
    "teachers:of_batch": "depend on the other views of its batch",
    "teachers:probabilities": "the teacher outputs probabilities (each row sums to 1)",
}


@pytest.mark.parametrize("teacher", WRONG)
def test_teachers_that_cannot_be_used_are_refused_in_one_line(table: Path, stages: Stages, teacher: str) -> None:
    error = stages.fails(2, *cache_command(teacher))
    assert WRONG[teacher] in error
    assert "\n" not in error
    assert not (table / "cache").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--precision", "auto"), "--precision auto is for networks of PyTorch"),
        (("--compile",), "--compile is for networks of PyTorch"),
        (("--taps", "linear"), "--taps linear is for networks of PyTorch"),
        (("--output", "logits"), "--output logits is for networks of PyTorch"),
        (("--normalize", "imagenet"), "--normalize imagenet is for images, the data are rows of numbers [4]"),
        (("--normalize", "mean=1,2,std=1"), "--normalize has 2 means"),
        (("--views", "crop"), "views 'crop' are for images, the data are rows of numbers [4]"),
        (("--views", "none:size=8"), "size=8 is for images"),
        (("--views", "noise:std=-1"), "std=-1 is outside 0 to 1e+09"),
        (("--views", "noise:pad=1"), "pad"),
    ],
)
def test_options_of_images_and_of_networks_are_refused_in_one_line(
    table: Path, stages: Stages, options: tuple[str, ...], words: str
) -> None:
    error = stages.fails(2, *cache_command("teachers:fitted", *options))
    assert words in error
    assert "\n" not in error
    assert not (table / "cache").exists()
