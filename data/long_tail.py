"""Long-tailed training sets: subsets of balanced ones, made as the literature makes them."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.base.errors import UsageError


@dataclass(frozen=True)
class Imbalance:
    """How the number of rows falls from the first class to the last.

    Attributes:
        factor: Rows of the largest class for each row of the smallest one, above 1.
        shape: "exponential" or "step".
    """

    factor: float
    shape: str

    def __str__(self) -> str:
        """Return the text of which parse_imbalance makes the same imbalance; part of a cache's identity."""
        return f"{self.factor:.6f}".rstrip("0").rstrip(".") + f":{self.shape}"

    def shares(self, classes: int) -> NDArray[np.float64]:
        """Return the rows of each class as a share of the rows of the first one, float64 [classes].

        exponential: factor ** -(c / (classes - 1)); step: the second half of the classes has 1 / factor.

        Source:
            Cui et al. 2019, arXiv 1901.05555, section 5; Buda et al. 2018; Cao et al. 2019, arXiv 1906.07413,
            section 4.
        """
        c = np.arange(classes)
        if self.shape == "step":
            return np.where(2 * c < classes, 1.0, 1 / self.factor)
        return self.factor ** -(c / max(classes - 1, 1))

    def counts(self, classes: int, head: int) -> NDArray[np.int64]:
        """Return the rows of each class, int64 [classes], where the first has `head`; rounded down as published."""
        return np.floor(head * self.shares(classes) + 1e-9).astype(np.int64)


def parse_imbalance(text: str) -> Imbalance:
    """Parse `100` (exponential), `100:exponential` or `100:step`.

    Raises:
        UsageError: The factor is not a number above 1, or the shape is another one.
    """
    match = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,6})?)(?::(exponential|step))?", text)
    if not match or float(match[1]) <= 1:
        raise UsageError(f"--imbalance {text}: expected a factor above 1, and exponential or step: 100, 100:step")
    return Imbalance(float(match[1]), match[2] or "exponential")


def select_long_tail(
    labels: NDArray[np.int64], classes: int, imbalance_text: str, head_size: int, key: tuple[int, ...]
) -> tuple[NDArray[np.int64], int]:
    """Select training rows so that the classes become long-tailed; the first class is the largest.

    Args:
        labels: int64 [N], all known.
        classes: Number of classes, at least 2.
        imbalance_text: As parse_imbalance takes it.
        head_size: Rows of the largest class; 0 is as many as the data allow.
        key: The key of the random numbers, see softcache.base.rng. The same key always selects the same rows.

    Returns:
        The rows, int64 in ascending order, and the number of rows of the largest class.

    Raises:
        UsageError: There is one class, a label is unknown, a class has too few rows, or one would keep none.
    """
    imbalance = parse_imbalance(imbalance_text)
    available = np.bincount(labels[labels >= 0], minlength=classes)
    if classes < 2 or (labels < 0).any():
        raise UsageError(f"--imbalance {imbalance_text} needs images of two classes or more, all with labels")
    max_head = int(np.floor((available + 1 - 1e-6) / imbalance.shares(classes)).min())
    while (imbalance.counts(classes, max_head) > available).any():  # off by one or two, as counts are rounded down
        max_head -= 1
    if not 0 <= head_size <= max_head:  # checked before it is multiplied: a manifest may contain any number
        c = int((imbalance.counts(classes, max_head + 1) > available).argmax())
        raise UsageError(
            f"--head-size {head_size} is not from 0 to {max_head}: class {c} with {available[c]} rows allows no more"
        )
    head = head_size or max_head
    counts = imbalance.counts(classes, head)
    if not counts.min():
        raise UsageError(
            f"--imbalance {imbalance_text} with a largest class of {head} rows leaves none of class"
            f" {int(counts.argmin())}"
        )
    order = rng.permutation(key, len(labels))
    rows_by_class = [order[labels[order] == c][: counts[c]] for c in range(classes)]
    return np.sort(np.concatenate(rows_by_class)), head
