"""Rare classes: long-tailed training sets, cut from balanced ones as the literature does, and rows drawn by class."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.base.errors import UsageError

Rows = NDArray[np.int64]
SAMPLERS = {"balanced": 0.0, "sqrt": 0.5}  # a class is shown in proportion to this power of its rows


@dataclass(frozen=True)
class Imbalance:
    """factor: rows of the largest class for each row of the smallest, above 1; shape: exponential or step."""

    factor: float
    shape: str

    def __str__(self) -> str:
        return f"{self.factor:.6f}".rstrip("0").rstrip(".") + f":{self.shape}"

    def shares(self, classes: int) -> NDArray[np.float64]:
        """float64 [classes]: each class's rows as a share of the first one's.

        exponential: factor ** -(c / (classes - 1)); step: the second half of the classes has 1 / factor (Cui et al.
        2019, arXiv 1901.05555, section 5; Buda et al. 2018; Cao et al. 2019, arXiv 1906.07413, section 4).
        """
        c = np.arange(classes)
        if self.shape == "step":
            return np.where(2 * c < classes, 1.0, 1 / self.factor)
        return self.factor ** -(c / max(classes - 1, 1))

    def counts(self, classes: int, head: int) -> Rows:
        """int64 [classes]: rows of each class when the first has `head`: rounded down, as published sets are."""
        return np.floor(head * self.shares(classes) + 1e-9).astype(np.int64)


def parse_imbalance(text: str) -> Imbalance:
    """`100`, `100:step` -> Imbalance. Raises UsageError."""
    found = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,6})?)(?::(exponential|step))?", text)
    if not found or float(found[1]) <= 1:
        raise UsageError(f"--imbalance {text}: a factor above 1, and exponential or step: 100, 100:step")
    return Imbalance(float(found[1]), found[2] or "exponential")


def select_long_tail(labels: Rows, classes: int, text: str, head_size: int, key: tuple[int, ...]) -> tuple[Rows, int]:
    """The rows that stay, sorted, and how many of them the largest class has; the same rows for ever.

    labels [N]; head_size: rows of the largest class, 0 for as many as the data allow. The first class is the largest.
    Raises UsageError where the data have too few rows of a class, or a class would keep none.
    """
    imbalance = parse_imbalance(text)
    there = np.bincount(labels[labels >= 0], minlength=classes)
    if classes < 2 or (labels < 0).any():
        raise UsageError(f"--imbalance {text} needs images of two classes or more, all with labels")
    most = int(np.floor((there + 1 - 1e-6) / imbalance.shares(classes)).min())
    while (imbalance.counts(classes, most) > there).any():  # rounding down leaves one or two to try
        most -= 1
    if not 0 <= head_size <= most:  # before it is multiplied: a manifest may say any number
        c = int((imbalance.counts(classes, most + 1) > there).argmax())
        raise UsageError(
            f"--head-size {head_size} is not from 0 to {most}: class {c} with {there[c]} rows allows no more"
        )
    head = head_size or most
    wanted = imbalance.counts(classes, head)
    if not wanted.min():
        raise UsageError(
            f"--imbalance {text} with a largest class of {head} rows leaves none of class {int(wanted.argmin())}"
        )
    order = rng.permutation(key, len(labels))
    kept = [order[labels[order] == c][: wanted[c]] for c in range(classes)]
    return np.sort(np.concatenate(kept)), head


def resample_rows(labels: Rows, power: float, key: tuple[int, ...]) -> Rows:
    """As many places as labels [N] has, each class in proportion to its rows to the power, in a random order.

    power 0: every class equally often; 1: as they are. Within a class every row comes once before one comes again, and
    which ones come once more differs from key to key: less noise than drawing each place on its own.
    """
    classes, position, counts = np.unique(labels, return_inverse=True, return_counts=True)
    share = counts**power
    quota = apportion(len(labels) * share / share.sum(), len(labels))
    order = rng.permutation(key, len(labels))
    return np.concatenate([np.resize(order[position[order] == c], quota[c]) for c in range(len(classes))])


def apportion(share: NDArray[np.floating], n: int) -> Rows:
    """Whole numbers that add up to n, each within one of its share; share adds up to n."""
    quota: Rows = np.floor(share).astype(np.int64)
    largest = np.argsort(-(share - quota), kind="stable")
    quota[largest[: n - quota.sum()]] += 1
    return quota
