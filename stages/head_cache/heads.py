"""Heads: functions from an embedding to the logits of classes, fitted to a few labelled rows."""

import warnings
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from softcache.base.errors import UsageError
from softcache.pipeline.metrics.distances import normalize_rows

PROBE, CENTROIDS, FILE = "probe", "centroids", "file"
STRENGTHS = tuple(10.0**k for k in range(-5, 3))  # C of the logistic regression
SCALES = tuple(float(x) for x in np.geomspace(1, 1000, 61))  # of cosines to centroids
DEFAULT_SCALE = 1 / 0.07
_MAX_FOLDS, _MAX_ITERATIONS = 5, 1000
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Head:
    """A head: logits = scale * f(x) @ weight.T + bias, f(x) the embedding, or the embedding divided by its norm.

    Attributes:
        kind: PROBE, CENTROIDS or FILE.
        weight: float64 [K, D]; with `normalize` of norm 1 in each row.
        bias: float64 [K].
        scale: Factor of the products.
        normalize: Whether embeddings are divided by their norm, so that products are cosines.
    """

    kind: str
    weight: Floats
    bias: Floats
    scale: float = 1.0
    normalize: bool = False

    def __call__(self, rows: NDArray[np.floating]) -> NDArray[np.float32]:
        """Compute logits float32 [n, K] of embeddings [n, D], in float64."""
        x = rows.astype(np.float64)
        x = normalize_rows(x) if self.normalize else x
        return np.asarray(self.scale * (x @ self.weight.T) + self.bias, np.float32)

    def digest(self) -> str:
        """SHA-256 of all that decides the logits, 64 hexadecimal digits."""
        text = f"{self.kind}\0{self.weight.shape}\0{self.scale!r}\0{self.normalize}\0"
        return sha256(
            text.encode() + self.weight.astype("<f8").tobytes() + self.bias.astype("<f8").tobytes()
        ).hexdigest()


def fit_probe(rows: Floats, labels: Rows, classes: int, seed: int) -> tuple[Head, str]:
    """Fit a multinomial logistic regression to standardised embeddings.

    The inverse strength C of its L2 penalty is the one of STRENGTHS with the largest mean log-likelihood in a
    stratified cross-validation on these rows, of as many folds as the smallest class has rows, 5 at most; the
    smallest of equal ones. It is 1 where a class has one row.

    Args:
        rows: [n, D].
        labels: int64 [n], each class of 0 … K - 1 at least once.
        classes: K, two or more.
        seed: Of the folds.

    Returns:
        The head, and how C was chosen, for a person.

    Source: scikit-learn's LogisticRegression, StandardScaler and cross_val_score.
    """
    folds = min(_MAX_FOLDS, int(np.bincount(labels, minlength=classes).min()))
    strength, how = 1.0, "C 1, as a class has one labelled row"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if folds >= 2:
            cut = StratifiedKFold(folds, shuffle=True, random_state=seed)
            scores = [
                cross_val_score(_make_pipeline(c), rows, labels, cv=cut, scoring="neg_log_loss").mean()
                for c in STRENGTHS
            ]
            strength = STRENGTHS[int(np.argmax(scores))]
            how = f"C {strength:g} by {folds}-fold cross-validation"
        scaler, model = (step for _, step in _make_pipeline(strength).fit(rows, labels).steps)
    weight, bias = model.coef_, model.intercept_
    if classes == 2:  # scikit-learn has one row for two classes: the difference of their logits
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    return Head(PROBE, weight, bias - weight @ scaler.mean_), how


def _make_pipeline(strength: float):  # type: ignore[no-untyped-def]  # scikit-learn has no types
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_MAX_ITERATIONS))


def fit_centroids(rows: Floats, labels: Rows, classes: int) -> tuple[Head, str]:
    """Make the head of cosines to the means of the classes, of rows divided by their norm.

    The scale of the cosines is the one of SCALES with the largest log-likelihood of the rows, each compared with the
    mean of its class without it; rows that are alone in their class are left out. It is 1 / 0.07 where all are.

    Args:
        rows: [n, D].
        labels: int64 [n], each class of 0 … K - 1 at least once.
        classes: K.

    Returns:
        The head, and how the scale was chosen, for a person.
    """
    x = normalize_rows(rows)
    counts = np.bincount(labels, minlength=classes)
    sums = np.stack([x[labels == c].sum(0) for c in range(classes)])
    weight = normalize_rows(sums)
    scale, how = DEFAULT_SCALE, "scale 1/0.07, as each class has one labelled row"
    is_used = counts[labels] > 1
    if is_used.any():
        own = normalize_rows(sums[labels] - x)
        cosines = x @ weight.T
        cosines[np.arange(len(x)), labels] = (x * own).sum(1)
        scale = max(SCALES, key=lambda s: _log_likelihood(s * cosines[is_used], labels[is_used]))
        how = f"scale {scale:.4g} by leave-one-out on these rows"
    return Head(CENTROIDS, weight, np.zeros(classes), scale, normalize=True), how


def _log_likelihood(logits: Floats, labels: Rows) -> float:
    top = logits.max(1, keepdims=True)
    log_sums = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    return float((logits[np.arange(len(labels)), labels] - log_sums).mean())


def check_every_class(labels: Rows, classes: tuple[str, ...], labelled: int) -> None:
    """Check that each class has a labelled row.

    Raises:
        UsageError: One has none; the message names it.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
        more = f" and {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise UsageError(
            f"none of the {labelled} labelled rows is of class '{missing[0]}'{more}: a larger --labelled, or another"
            " --seed"
        )
