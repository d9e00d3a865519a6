"""Small digits with hard targets of each task: arrays in files, and a teacher that returns an embedding."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

# A network that embeds an image, as a module of a user's own.
EMBEDDER = """\
import torch
from torch import nn


def make(classes, channels, size, shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 12))
"""
LABELS = ("even", "big|x", "loop")
NUMBERS = ("height", "light")


def read_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return 450 digits, uint8 [N, 8, 8], and their classes [N]; every fifth row is for the test split."""
    digits = load_digits()
    images = np.round(digits.images[:450] * (255 / 16)).astype(np.uint8)
    return images, digits.target[:450]


def make_labels() -> NDArray[np.int8]:
    """Return several labels of each digit, int8 [N, 3], some of them unknown."""
    y = read_digits()[1]
    labels = np.stack([y % 2 == 0, y >= 5, np.isin(y, (0, 6, 8, 9))], 1).astype(np.int8)
    labels[::17, 1] = -1
    return labels


def make_numbers() -> NDArray[np.float32]:
    """Return numbers of each digit whose units differ by six powers of ten, float32 [N, 2], some unknown."""
    images, y = read_digits()
    numbers = np.stack([1000 + 50 * y, images.mean((1, 2)) * 1e-4], 1).astype(np.float32)
    numbers[::17, 1] = np.nan
    return numbers


def save_arrays(path: Path, targets: NDArray[Any], names: tuple[str, ...], **more: Any) -> None:
    """Save the digits with hard targets as `--data arrays:` reads them."""
    images = more.pop("x", read_digits()[0])
    split = np.where(np.arange(len(images)) % 5 == 0, "test", "train")
    np.savez(path, x=images, y=targets, split=split, classes=np.array(names))


def save_image(path: Path, row: int) -> None:
    """Save a digit as an image file."""
    Image.fromarray(read_digits()[0][row]).save(path)
