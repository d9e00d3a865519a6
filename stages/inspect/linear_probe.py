"""Linear probes of cached taps: how a tap becomes columns, the fit of a probe, and the importance of its columns."""

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
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.rows import Positions
from softcache.pipeline.taps.statistics import compute_statistic, parse_tap

MAX_COLUMNS = 2048  # of a tap; a wider one is projected
_BLOCK_BYTES = 64 << 20  # of a tap that are read at once
_MAX_ITERATIONS = 1000
Floats = NDArray[np.float64]
OnProgress = Callable[[int], object]  # called with the number of further steps that are done


@dataclass(frozen=True)
class TapForm:
    """How a tap becomes columns.

    Attributes:
        description: For a person.
        columns: Number of columns D.
        channels: The columns of each channel; None where a column is a sum over many channels.
    """

    description: str
    columns: int
    channels: tuple[slice, ...] | None


def describe_tap(tap: str, shape: list[int]) -> TapForm:
    """Determine the columns of a tap.

    A feature map [C, H, W] becomes its mean over space, tokens [T, C] their mean over tokens: a column per channel.
    Other statistics are flattened; the cells of a grid [C, N, N] stay together as a channel. What has more than
    MAX_COLUMNS values is projected onto MAX_COLUMNS columns, see `_make_projection`, and then has no channels.

    Args:
        tap: Its spec, such as `layer3` or `layer3:grid2`.
        shape: Of one row of the tap.
    """
    statistic = parse_tap(tap)[1]
    if statistic == "map" and len(shape) in (2, 3):
        shape, description = [shape[0] if len(shape) == 3 else shape[1]], "mean per channel"
    else:
        description = "as it is" if len(shape) == 1 else "flattened"
    values = prod(shape)
    if values > MAX_COLUMNS:
        return TapForm(f"{description}, {values:,} values projected onto {MAX_COLUMNS:,}", MAX_COLUMNS, None)
    width = prod(shape[1:]) if statistic.startswith("grid") else 1
    return TapForm(description, values, tuple(slice(start, start + width) for start in range(0, values, width)))


def read_columns(
    cache: CacheReader, split: str, positions: Positions, tap: str, *, seed: int, on_progress: OnProgress
) -> Floats:
    """Read the columns of a tap, draw 0.

    Args:
        cache: The cache.
        split: Of the cache.
        positions: Of the n rows in the split.
        tap: A tap of the cache.
        seed: Of the projection of a wide tap.
        on_progress: Called with the number of further rows.

    Returns:
        float64 [n, D].

    Raises:
        CacheError: A value is not finite.
    """
    name = f"features/{tap}"
    block_rows = max(1, _BLOCK_BYTES // count_row_bytes({name: cache.manifest.datasets[name]}))
    blocks = []
    for start in range(0, len(positions), block_rows):
        block = positions[start : start + block_rows]
        x = torch.from_numpy(cache.read_rows(split, 0, name, block)).float()
        if not bool(x.isfinite().all()):
            raise CacheError(f"'{cache.folder}': tap '{tap}' of {split} has values that are not finite")
        blocks.append(_reduce_to_columns(x, parse_tap(tap)[1], seed))
        on_progress(len(block))
    return np.concatenate(blocks)


def _reduce_to_columns(x: torch.Tensor, statistic: str, seed: int) -> Floats:
    """Convert rows [n, …] of a tap to columns [n, D], as `describe_tap` has them."""
    if statistic == "map" and x.ndim in (3, 4):
        x = compute_statistic(x, "pool")
    columns = x.flatten(1).double().numpy()
    if columns.shape[1] > MAX_COLUMNS:
        columns = columns @ _make_projection(columns.shape[1], seed)
    return np.asarray(columns, np.float64)


def _make_projection(values: int, seed: int) -> csr_array:
    """Make a matrix [values, MAX_COLUMNS] that adds every value, with a random sign, to one random column.

    Feature hashing preserves inner products in expectation. The matrix has one entry per row; a Gaussian one for a
    map of 100,000 values would take 1.6 GB.

    Source:
        Weinberger et al. 2009, arXiv 0902.2206.
    """
    rows = np.arange(values)
    signs = 2.0 * rng.integers((seed, 41), rows, 2) - 1
    columns = rng.integers((seed, 42), rows, MAX_COLUMNS)
    return csr_array((signs, (rows, columns)), shape=(values, MAX_COLUMNS))


def standardize(train: Floats, held_out: Floats) -> tuple[Floats, Floats]:
    """Standardise both [·, D] by mean and standard deviation of the training rows; a constant column becomes 0."""
    scaler = StandardScaler().fit(train)
    return np.asarray(scaler.transform(train)), np.asarray(scaler.transform(held_out))


@dataclass(frozen=True)
class Probe:
    """A linear classifier.

    Attributes:
        classes: Numbers of the k classes it was fitted on.
        weight: [D, k].
        bias: [k].
        converged: Whether the fit converged within its maximum of iterations.
    """

    classes: Labels
    weight: Floats
    bias: Floats
    converged: bool

    def compute_scores(self, x: Floats) -> Floats:
        """Compute the scores [m, k] of the probe's own classes for x [m, D]."""
        return np.asarray(x @ self.weight + self.bias)

    def compute_logits(self, x: Floats, classes: int) -> Floats:
        """Compute logits [m, classes] for x [m, D]; those of classes without a training row are -1e9."""
        logits = np.full((len(x), classes), -1e9)
        logits[:, self.classes] = self.compute_scores(x)
        return logits


def fit_probe(x: Floats, labels: Labels) -> Probe:
    """Fit multinomial logistic regression with scikit-learn's default penalty (L2, C = 1).

    Args:
        x: Standardised columns [n, D].
        labels: [n], of at least two classes.
    """
    model = LogisticRegression(max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # Probe.converged reports it
        model.fit(x, labels)
    weight, bias = model.coef_.T, model.intercept_
    if weight.shape[1] == 1:  # for two classes scikit-learn has only the score of the second
        weight, bias = np.concatenate([0 * weight, weight], 1), np.concatenate([0 * bias, bias])
    return Probe(model.classes_, weight, bias, int(model.n_iter_.max()) < _MAX_ITERATIONS)


class GatheredProbe:
    """A fitted probe with the interface of a classifier that scikit-learn's permutation_importance expects.

    Its input are row indices X int32 [m, G]: X[i, g] is the row from which row i takes the columns of group g. To
    permute a column of X is then to permute all columns of a group, for example a whole tap. Linear scores are sums
    over groups, so only the permuted groups are computed: a prediction with one permuted channel costs m·k
    multiplications, not m·D·k.

    Args:
        probe: The fitted probe.
        x: Its input [m, D].
        groups: The columns of each of the G groups.

    Attributes:
        rows: The input X without a permutation, int32 [m, G].
    """

    def __init__(self, probe: Probe, x: Floats, groups: tuple[slice, ...]):
        self.probe, self.x, self.groups = probe, x, groups
        self.scores = probe.compute_scores(x)
        self.row_numbers = np.arange(len(x), dtype=np.int32)[:, None]
        self.rows = np.repeat(self.row_numbers, len(groups), axis=1)

    def fit(self, X: object, y: object) -> "GatheredProbe":
        """Do nothing: scikit-learn only checks that there is such a method."""
        return self

    def predict(self, X: NDArray[np.int32]) -> Labels:
        """Predict the classes [m] for rows gathered by X int32 [m, G]."""
        scores = self.scores.copy()
        for g in np.flatnonzero((self.row_numbers != X).any(0)):
            columns = self.x[:, self.groups[g]]
            scores += (columns[X[:, g]] - columns) @ self.probe.weight[self.groups[g]]
        return np.asarray(self.probe.classes[scores.argmax(1)])


def measure_importance(
    probe: Probe,
    x: Floats,
    labels: Labels,
    groups: tuple[slice, ...],
    *,
    repeats: int,
    seed: int,
    on_progress: OnProgress,
) -> tuple[Floats, Floats]:
    """Measure the permutation importance of groups of columns: the accuracy lost when a group is permuted.

    Groups with the same information share their importance: the probe finds in one what it loses in the other.

    Args:
        probe: The fitted probe.
        x: Its input [m, D].
        labels: [m].
        groups: The columns of each of the G groups.
        repeats: Permutations of each group.
        seed: Of the permutations.
        on_progress: Called with 1 after each of 1 + G · repeats predictions.

    Returns:
        Mean [G] and standard deviation [G] over the repeats (divided by the number of repeats, as in scikit-learn).

    Source:
        Breiman 2001, Random forests, section 10.
    """
    gathered = GatheredProbe(probe, x, groups)

    def score(model: GatheredProbe, X: NDArray[np.int32], y: Labels) -> float:
        on_progress(1)
        return float((model.predict(X) == y).mean())

    importance: Any = permutation_importance(
        gathered, gathered.rows, labels, scoring=score, n_repeats=repeats, random_state=seed
    )
    return importance.importances_mean, importance.importances_std
