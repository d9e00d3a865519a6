"""Teachers that are no networks, and data sets of rows, passed by a caller in Python."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.utils.data import TensorDataset

import softcache
from softcache.base.errors import CacheError, UsageError


def test_a_caller_in_python_passes_an_estimator_or_a_function_and_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = (rng.normal(size=(60, 5)) + 2 * y[:, None]).astype(np.float32)
    forest = RandomForestClassifier(5, random_state=0).fit(x, y)
    data = {"train": TensorDataset(torch.from_numpy(x), torch.from_numpy(y))}
    cache = softcache.build_cache(tmp_path / "forest", forest, data, codec="float32")
    assert cache.input_spec.shape == (5,)
    batch = next(iter(cache.loader("train", batch_size=8)))
    expected = np.log(np.maximum(forest.predict_proba(batch.views.numpy()), np.finfo(np.float32).tiny))
    assert batch.logits is not None
    np.testing.assert_allclose(batch.logits.numpy(), expected, atol=1e-6)
    softcache.train_student(cache, "mlp:8", out=tmp_path / "run", epochs=1)
    with pytest.raises(CacheError, match="outputs have changed"):
        softcache.build_cache(tmp_path / "forest", RandomForestClassifier(5).fit(x, 1 - y), data, codec="float32")

    def double(views: NDArray[Any]) -> NDArray[Any]:
        return 2 * views[:, :2]

    functions = softcache.build_cache(tmp_path / "function", double, data, codec="float32")
    batch = next(iter(functions.loader("train", batch_size=8)))
    assert batch.logits is not None
    np.testing.assert_array_equal(batch.logits, 2 * batch.views[:, :2])


@pytest.mark.parametrize("teacher", [3, None, [1], RandomForestClassifier, nn.Linear])
def test_what_is_no_teacher_is_refused(tmp_path: Path, teacher: Any) -> None:
    with pytest.raises(UsageError, match=r"a teacher is a torch\.nn\.Module"):
        softcache.build_cache(tmp_path / "cache", teacher, "digits")


class Rows:
    """A dataset whose items a function makes."""

    def __init__(self, item: Callable[[int], Any]):
        self.item = item

    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> Any:
        return self.item(row)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (
            lambda row: (np.zeros(3 + (row == 7)), row % 2),
            "train row 7 of the dataset is float64 [4], and",
        ),
        (lambda row: (np.zeros(3, "f4" if row else "f8"), row % 2), "train row 1 of the dataset is float32 [3]"),
        (lambda row: (np.random.default_rng().normal(size=3), row % 2), "has other numbers when it is read twice"),
        (lambda row: (np.zeros(3), "a"), "as its label"),
        (lambda row: (np.array(["a"]), row % 2), "expected an array or tensor of numbers with one axis"),
        (lambda row: (torch.zeros(3, 3) if row == 5 else torch.zeros(3), row % 2), "train row 5 of the dataset is a"),
        (lambda row: (torch.zeros(0), row % 2), "a row has 0 numbers"),
        (lambda row: (torch.zeros(3), 0), "has one class"),
        (lambda row: (torch.zeros(2, 3, 4) / 7 + 0.3, 0), "normalises or augments"),
    ],
)
def test_datasets_of_rows_that_do_not_fit_are_refused(tmp_path: Path, item: Callable[[int], Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        softcache.build_cache(tmp_path / "cache", lambda views: views[:, :2], Rows(item))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
