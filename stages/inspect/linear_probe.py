"""What cached taps say about the classes: a linear probe of each, and which taps and channels a probe leans on."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from softcache.base import rng
from softcache.base.errors import CacheError
from softcache.data.transfer_set import Labels
from softcache.pipeline.cache.manifest import count_row_bytes
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.cache.rows import Positions
from softcache.pipeline.taps.statistics import compute_statistic, parse_tap

MAX_COLUMNS = 2048  # columns of a tap; a wider one is projected
_BLOCK_BYTES = 64 << 20  # of a tap that are in memory before they are reduced
_MOST_STEPS = 1000
Floats = NDArray[np.float64]
OnRows = Callable[[int], object]  # told of every so many steps that are done


@dataclass(frozen=True)
class TapForm:
    """How a tap becomes columns. words: for people; columns: D; channels: groups of neighbouring columns, None where
    a column is a sum over many channels."""

    words: str
    columns: int
    channels: tuple[slice, ...] | None


def describe_tap(tap: str, shape: list[int]) -> TapForm:
    """The form of a tap whose rows have that shape.

    A map [C, H, W] becomes its mean over space, tokens [T, C] their mean over the tokens: a channel each. Other
    statistics are flattened; the cells of a grid [C, N, N] stay together as a channel. What is wider than WIDEST is
    projected onto so many columns (see `_projection`) and has no channels any more.
    """
    kind = parse_tap(tap)[1]
    if kind == "map" and len(shape) in (2, 3):
        shape, words = [shape[0] if len(shape) == 3 else shape[1]], "mean per channel"
    else:
        words = "as it is" if len(shape) == 1 else "flattened"
    wide = prod(shape)
    if wide > MAX_COLUMNS:
        return TapForm(f"{words}, {wide:,} values projected onto {MAX_COLUMNS:,}", MAX_COLUMNS, None)
    each = prod(shape[1:]) if kind.startswith("grid") else 1
    return TapForm(words, wide, tuple(slice(at, at + each) for at in range(0, wide, each)))


def read_columns(cache: Cache, split: str, positions: Positions, tap: str, seed: int, counted: OnRows) -> Floats:
    """[n, D] of a tap of draw 0 at positions [n], read by blocks. Raises CacheError for what is not finite."""
    name = f"features/{tap}"
    size = max(1, _BLOCK_BYTES // count_row_bytes({name: cache.manifest.datasets[name]}))
    parts = []
    for at in range(0, len(positions), size):
        some = positions[at : at + size]
        x = torch.from_numpy(cache.read_rows(split, 0, name, some)).float()
        if not bool(x.isfinite().all()):
            raise CacheError(f"'{cache.folder}': tap '{tap}' of {split} has values that are not finite")
        parts.append(_reduce_columns(x, parse_tap(tap)[1], seed))
        counted(len(some))
    return np.concatenate(parts)


def _reduce_columns(x: torch.Tensor, kind: str, seed: int) -> Floats:
    if kind == "map" and x.ndim in (3, 4):
        x = compute_statistic(x, "pool")
    flat = x.flatten(1).double().numpy()
    if flat.shape[1] > MAX_COLUMNS:
        flat = flat @ _projection(flat.shape[1], seed)
    return np.asarray(flat, np.float64)


def _projection(wide: int, seed: int) -> csr_array:
    """[wide, WIDEST]: every value is added, with a random sign, to one random column.

    Feature hashing (Weinberger et al. 2009, arXiv 0902.2206): inner products are kept in expectation, and the matrix
    has one entry a row, where a Gaussian one for a map of 100,000 values would take 1.6 GB.
    """
    places = np.arange(wide)
    sign = 2.0 * rng.integers((seed, 41), places, 2) - 1
    return csr_array((sign, (places, rng.integers((seed, 42), places, MAX_COLUMNS))), shape=(wide, MAX_COLUMNS))


def standardize(train: Floats, held_out: Floats) -> tuple[Floats, Floats]:
    """Both [·, D] with the mean and standard deviation of the training rows; a constant column becomes 0."""
    scaler = StandardScaler().fit(train)
    return np.asarray(scaler.transform(train)), np.asarray(scaler.transform(held_out))


@dataclass(frozen=True)
class Probe:
    """A linear classifier: scores = x @ weight [D, k] + bias [k] of classes [k]. converged: within its steps."""

    classes: Labels
    weight: Floats
    bias: Floats
    converged: bool

    def scores(self, x: Floats) -> Floats:
        """x [m, D] -> [m, k]."""
        return np.asarray(x @ self.weight + self.bias)

    def logits(self, x: Floats, classes: int) -> Floats:
        """Scores by class [m, K]; a class that the probe was never shown has -1e9."""
        found = np.full((len(x), classes), -1e9)
        found[:, self.classes] = self.scores(x)
        return found


def fit_probe(x: Floats, labels: Labels) -> Probe:
    """Multinomial logistic regression with scikit-learn's default penalty (L2, C = 1). x [n, D] standardised.

    labels [n] of at least two classes.
    """
    model = LogisticRegression(max_iter=_MOST_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is reported
        model.fit(x, labels)
    weight, bias = model.coef_.T, model.intercept_
    if weight.shape[1] == 1:  # of two classes scikit-learn keeps the score of the second alone
        weight, bias = np.concatenate([0 * weight, weight], 1), np.concatenate([0 * bias, bias])
    return Probe(model.classes_, weight, bias, int(model.n_iter_.max()) < _MOST_STEPS)


class GatheredProbe:
    """A fitted probe as scikit-learn's permutation_importance wants it: a classifier of row indices.

    X: int32 [m, G]; X[i, g] is the row from which row i takes the columns of group g. To permute a column of X is to
    permute all columns of a group at once, a whole tap for example. Linear scores are sums over groups, so that only
    groups that were moved are computed: a prediction with one moved channel costs m k, not m D k, multiplications.
    """

    def __init__(self, probe: Probe, x: Floats, groups: tuple[slice, ...]):
        self.probe, self.x, self.groups = probe, x, groups
        self.kept = probe.scores(x)
        self.own = np.arange(len(x), dtype=np.int32)[:, None]
        self.rows = np.repeat(self.own, len(groups), axis=1)  # of nothing moved

    def fit(self, X: object, y: object) -> "GatheredProbe":
        """It is fitted; scikit-learn only asks whether there is such a method."""
        return self

    def predict(self, X: NDArray[np.int32]) -> Labels:
        """The class of each row."""
        scores = self.kept.copy()
        for g in np.flatnonzero((self.own != X).any(0)):
            part = self.x[:, self.groups[g]]
            scores += (part[X[:, g]] - part) @ self.probe.weight[self.groups[g]]
        return np.asarray(self.probe.classes[scores.argmax(1)])


def measure_importance(
    probe: Probe, x: Floats, labels: Labels, groups: tuple[slice, ...], repeats: int, seed: int, counted: OnRows
) -> tuple[Floats, Floats]:
    """What accuracy on x [m, D], labels [m] loses when a group of columns is permuted: mean [G] and sd [G] of repeats.

    Breiman 2001, section 10, as scikit-learn does it (the sd is over the repeats, not n - 1). Groups that say the
    same share it: the probe reads in one what it misses in the other.
    """
    gathered = GatheredProbe(probe, x, groups)

    def accuracy(model: GatheredProbe, X: NDArray[np.int32], y: Labels) -> float:
        counted(1)
        return float((model.predict(X) == y).mean())

    found: Any = permutation_importance(
        gathered, gathered.rows, labels, scoring=accuracy, n_repeats=repeats, random_state=seed
    )
    return found.importances_mean, found.importances_std
