"""The digits: scikit-learn's images, in the split of its train_test_split."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.model_selection import train_test_split

from softcache.data.images.image_arrays import ImageArrays
from softcache.data.sources import digits
from softcache.data.sources.source_data import SourceData


def get_split(data: SourceData, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = data.splits[name].images
    assert isinstance(images, ImageArrays)
    return images.pixels.numpy(), np.asarray(data.splits[name].labels)


@pytest.mark.parametrize("file", [digits._FILE, "no/such/file"])
def test_the_digits_are_those_of_scikit_learn_in_a_stratified_split(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "_FILE", file)
    data = digits.load_digits(Path())
    pixels, labels = datasets.load_digits(return_X_y=True)
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=0.2, stratify=labels, random_state=0)
    for name, members in (("train", np.sort(train)), ("test", np.sort(test))):
        images, split_labels = get_split(data, name)
        assert np.array_equal(images.reshape(-1, 64), np.rint(pixels[members] * 255 / 16))
        assert np.array_equal(split_labels, labels[members])
    assert data.classes == tuple("0123456789")
