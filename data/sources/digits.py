"""The 1,797 handwritten digits of 8 x 8 pixels that are part of scikit-learn: nothing is downloaded."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.data.images.image_arrays import ImageArrays

from .source_data import LabelledImages, SourceData

_FILE = "datasets/data/digits.csv.gz"  # in the package
# One bit for each image, set for those of the test split: a stratified fifth, drawn once by scikit-learn's
# train_test_split(test_size=0.2, stratify=labels, random_state=0). The split is part of what a cache is made of.
_TEST_ROWS = bytes.fromhex(
    "000004883524104000064100934205001a00080100240028062c12001000940a009019120420f8a0028110a000080a8820441524494240a0"
    "0a0000004004d80000818020004805c400104008a0100005404800301000020ec409000224840083a8013c20a6980a0000000b08400804a0"
    "184802024041c1008004404684376a810216004480004042a0a4180a5000840b8561c608108008004c80c02004068e000108820081003808"
    "03c008190000100e01008410a0210033282904c044c080680e0102830082008822a6402c24042108a860809081a00c02820242120138a415"
    "00"
)


def load_digits(root: Path) -> SourceData:
    """Load the digits: a stratified fifth is the test split, the rest is the training split.

    Args:
        root: Unused: the digits are part of scikit-learn.

    Returns:
        Grey images, uint8 [N, 1, 8, 8], with pixels scaled from 0 … 16 to 0 … 255.
    """
    rows = _read_rows()
    pixels, labels = rows[:, :-1], rows[:, -1]
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    digits = LabelledImages(ImageArrays(images), labels.astype(np.int64))
    is_test = np.unpackbits(np.frombuffer(_TEST_ROWS, np.uint8), count=len(rows)).astype(bool)
    splits = {"train": digits.take(np.flatnonzero(~is_test)), "test": digits.take(np.flatnonzero(is_test))}
    return SourceData(splits, tuple(str(digit) for digit in range(10)))


def _read_rows() -> NDArray[np.uint8]:
    """Read pixels and label of each image, [N, 65], from scikit-learn's file: importing the package takes 1.2 s."""
    spec = find_spec("sklearn")
    file = Path(*(spec.submodule_search_locations or [])[:1] if spec else (), _FILE)
    if not file.is_file():  # a release that has it elsewhere
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        return np.column_stack([pixels, labels]).astype(np.uint8)
    with gzip.open(file, "rt") as lines:
        return np.loadtxt(lines, np.uint8, delimiter=",")
