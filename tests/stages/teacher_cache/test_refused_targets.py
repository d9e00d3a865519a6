"""Files of targets and options that `--teacher logits:FILE` cannot use: one line each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.commands import Stages

Arrays = dict[str, NDArray[Any]]


class Trap:
    """An object that makes a folder when it is loaded by pickle."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path("made_by_trap").mkdir, ()


def save_wrong_file(name: str, rows: Arrays) -> None:
    """Save t.npz, which cannot be used."""
    train, test, index = rows["train"], rows["test"], np.arange(1437)
    nan = test.copy()
    nan[7, 3] = np.nan
    both = np.concatenate([train, test])
    splits = np.array(["train"] * 1437 + ["test"] * 360)
    indices = np.concatenate([index, np.arange(360)])
    arrays: dict[str, dict[str, Any]] = {
        "truncated": rows,
        "object": {"train": np.array([Trap()]), "test": test},
        "no-logits": {"x": train},
        "both": {"logits": train, "train": train},
        "no-test": {"train": train},
        "few-rows": {"train": train[:-1], "test": test},
        "one-column": {"train": train[:, 0], "test": test},
        "integers": {"train": train.astype(int), "test": test},
        "other-widths": {"train": train[:, :9], "test": test},
        "nine-classes": {"train": train[:, :9], "test": test[:, :9]},
        "nan": {"train": train, "test": nan},
        "infinite": {"train": train.astype("f8") * 1e300, "test": test},
        "names-of-digits": {"logits": train, "names": index.astype(str)},
        "short-index": {"logits": train, "index": index[:-1]},
        "index-too-large": {"logits": both, "index": indices + 1, "split": splits},
        "doubled-index": {"logits": both, "index": indices // 2, "split": splits},
        "unknown-split": {"logits": train, "index": index, "split": np.array(["dev"] * 1437)},
        "index-of-train-alone": {"logits": train, "index": index},
        "missing-index": {"logits": both[1:], "index": indices[1:], "split": splits[1:]},
    }
    np.savez("t.npz", **arrays.get(name, {}))
    if name == "truncated":
        Path("t.npz").write_bytes(Path("t.npz").read_bytes()[:-99])
    if name == "not-zip":
        Path("t.npz").write_text("no zip file")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("not-zip", "no .npz file"),
        ("truncated", "damaged"),
        ("object", "Python objects"),
        ("no-logits", "it has 'x'"),
        ("both", "leave out one"),
        ("no-test", "no targets for the 360 images of 'test': it has those of train"),
        ("few-rows", "1,436 rows of 'train', the data have 1,437"),
        ("one-column", "float32 [1437], not logits [N, K]"),
        ("integers", "int64 [1437, 10], not logits"),
        ("other-widths", "train 9, test 10"),
        ("nine-classes", "9 classes, the data have 10"),
        ("nan", "test row 7, class 3 is nan"),
        ("infinite", "not a finite number"),
        ("names-of-digits", "the images of digits have none"),
        ("short-index", "index has 1,436 rows, logits have 1,437"),
        ("index-too-large", "index 1437 of 'train' is not between 0 and 1436"),
        ("doubled-index", "2 rows for index 0 of 'train'"),
        ("unknown-split", "split 'dev' is not train, val, test"),
        ("index-of-train-alone", "no targets for the 360 images of 'test'"),
        ("missing-index", "no targets for 1 of 1,797 images"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    stages: Stages, rows: Arrays, name: str, expected: str
) -> None:
    save_wrong_file(name, rows)
    code, _, error = stages.call("teacher-cache", "--teacher", "logits:t.npz", "--out", "c")
    assert code in (1, 2)
    assert error.count("\n") == 1, error
    assert expected in error
    assert not Path("c/manifest.json").exists()
    assert not Path("made_by_trap").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--views", "crop"), "--views none"),
        (("--views", "none:mixup=1"), "--views none"),
        (("--draws", "2"), "--draws 1"),
        (("--taps", "fc"), "of no network"),
        (("--output", "0"), "of no network"),
        (("--weights", "a.npz"), "leave it out"),
        (("--weights-key", "ema"), "leave it out"),
        (("--precision", "auto"), "leave it out"),
        (("--compile",), "leave it out"),
        (("--teacher", "logits:"), "FILE.npz or FILE.parquet"),
        (("--teacher", "logits:none.npz"), "no file 'none.npz'"),
        (("--teacher", "logits:./a.csv"), "neither .npz nor .parquet"),
        (("--normalize", "imagnet"), "there are imagenet"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_in_one_line(
    stages: Stages, rows: Arrays, options: tuple[str, ...], expected: str
) -> None:
    np.savez("a.npz", **rows)
    Path("a.csv").write_text("1,2\n")
    error = stages.fails(2, "teacher-cache", "--teacher", "logits:a.npz", "--out", "c", *options)
    assert "\n" not in error
    assert expected in error
