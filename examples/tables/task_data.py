"""Write the arrays of the tables in docs/guides/several-labels.md and docs/guides/numbers.md.

    python examples/tables/task_data.py             # reads MNIST in datasets/, where it is downloaded if it is missing
    python examples/tables/task_data.py MNIST_ROOT

Takes a minute. task_figures.sh trains from them:

- canvases.npz: 20,000 images with two to four MNIST digits each, and which digits these are.
- rotated.npz: 20,000 and 4,000 MNIST digits turned by up to 60 degrees, and their angles.
- diabetes.npz: scikit-learn's, 442 rows.
- yeast.npz: 2,417 rows of 103 numbers with 14 labels, where the package river is installed, which has them.
"""

import csv
import gzip
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_diabetes
from torchvision.datasets import MNIST

CANVAS, SIDE, MOST_DEGREES = 40, 18, 60.0
Array = NDArray[np.generic]


def read_mnist(root: str, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    data = MNIST(root, train=train, download=True)
    return data.data.numpy(), data.targets.numpy()


def compose(
    images: NDArray[np.uint8], digits: NDArray[np.int64], rows: int, random: np.random.Generator
) -> tuple[Array, Array]:
    """Put two to four digits on each canvas, where they overlap little; overlapping pixels take the maximum."""
    x, y = np.zeros((rows, CANVAS, CANVAS), np.uint8), np.zeros((rows, 10), np.int8)
    for canvas, labels in zip(x, y, strict=True):
        count = random.integers(2, 5)
        placed: list[tuple[int, int]] = []
        for k in random.integers(0, len(images), count):
            for _ in range(50):
                top, left = (int(value) for value in random.integers(0, CANVAS - SIDE + 1, 2))
                if all(max(abs(top - a), abs(left - b)) >= SIDE - 7 for a, b in placed):
                    break
            placed.append((top, left))
            small = np.asarray(Image.fromarray(images[k]).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
            part = canvas[top : top + SIDE, left : left + SIDE]
            np.maximum(part, small, out=part)
            labels[digits[k]] = 1
    return x, y


def write_canvases(train: tuple[Array, Array], test: tuple[Array, Array]) -> None:
    """No digit of one split occurs in another."""
    random, arrays = np.random.default_rng(0), {}
    sources = {
        "train": (train[0][:54000], train[1][:54000], 13_000),
        "val": (train[0][54000:], train[1][54000:], 2_000),
        "test": (*test, 5_000),
    }
    for split, (images, digits, rows) in sources.items():
        arrays[f"x_{split}"], arrays[f"y_{split}"] = compose(images, digits, rows, random)
    np.savez_compressed("canvases.npz", **arrays, classes=np.array([f"digit {n}" for n in range(10)]))


def rotate(images: NDArray[np.uint8], rows: int, seed: int) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    index = random.permutation(len(images))[:rows]
    angles = random.uniform(-MOST_DEGREES, MOST_DEGREES, rows)
    turned = [
        np.asarray(Image.fromarray(images[i]).rotate(angle, Image.Resampling.BILINEAR))
        for i, angle in zip(index, angles, strict=True)
    ]
    return np.stack(turned), angles.astype(np.float32)


def write_rotated(train: NDArray[np.uint8], test: NDArray[np.uint8]) -> None:
    (x_train, y_train), (x_test, y_test) = rotate(train, 20_000, 0), rotate(test, 4_000, 1)
    np.savez("rotated.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=["degrees"])


def write_diabetes() -> None:
    x, y = load_diabetes(return_X_y=True)
    split = np.where(np.random.default_rng(0).permutation(len(x)) % 4 == 0, "test", "train")
    np.savez("diabetes.npz", x=x.astype(np.float32), y=y, split=split, classes=["progression"])


def write_yeast() -> None:
    """The usual split: 917 rows to test on."""
    package = find_spec("river")
    if package is None or not package.submodule_search_locations:
        print("yeast.npz is left out: pip install river")
        return
    path = Path(package.submodule_search_locations[0]) / "datasets/yeast.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    columns, names = ([k for k in rows[0] if k.startswith(start)] for start in ("Att", "Class"))
    x = np.array([[float(row[k]) for k in columns] for row in rows], np.float32)
    y = np.array([[int(float(row[k])) for k in names] for row in rows], np.int8)
    split = np.array(["train"] * 1500 + ["test"] * 917)
    split[np.random.default_rng(0).permutation(1500)[:300]] = "val"
    np.savez("yeast.npz", x=x, y=y, split=split, classes=np.array(names))


if __name__ == "__main__":
    root = sys.argv[1] if len(sys.argv) > 1 else "datasets"
    train, test = read_mnist(root, train=True), read_mnist(root, train=False)
    write_canvases(train, test)
    write_rotated(train[0], test[0])
    write_diabetes()
    write_yeast()
