"""The 1,797 handwritten digits of 8 x 8 pixels that are part of scikit-learn: nothing is downloaded."""

from pathlib import Path

import numpy as np
import torch

from softcache.data.images.image_arrays import ImageArrays

from .source_data import LabelledImages, SourceData


def load_digits(root: Path) -> SourceData:
    """Load the digits: a stratified fifth is the test split, the rest is the training split.

    Args:
        root: Unused: the digits are part of scikit-learn.

    Returns:
        Grey images, uint8 [N, 1, 8, 8], with pixels scaled from 0 … 16 to 0 … 255.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_sklearn_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    digits = LabelledImages(ImageArrays(images), labels.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    splits = {"train": digits.take(np.sort(train)), "test": digits.take(np.sort(test))}
    return SourceData(splits, tuple(str(digit) for digit in range(10)))
