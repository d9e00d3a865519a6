"""A paired bootstrap of rows and seeds for the tasks beside classes: mAP, F1, RMSE, MAE and cosine.

mAP and F1 are no means over rows, so each resample computes them anew, from how often it draws each row.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from softcache.data.tasks import EMBEDDING, LABELS, NUMBERS, HardTargets, find_known_entries

from .significance import RESAMPLES, Difference, Floats, compute_interval, resample_seeds

if TYPE_CHECKING:
    from scipy.sparse import csr_array

LABEL_RESAMPLES = 2_000  # of mAP, each of which takes a millisecond for 10,000 rows of 10 labels
_BLOCK = 1_000_000  # counts of resamples that are in memory at once: 8 MB
_BOUNDS = {LABELS: 1.0, NUMBERS: float("inf"), EMBEDDING: 2.0}  # of a difference

Metric = Callable[[Floats], dict[str, Floats]]  # counts [N, R] -> {name: [R]}, NaN where a resample has no such figure


def bootstrap_task(
    task: str,
    labels: HardTargets,
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    level: float = 0.95,
    resamples: int = 0,
    seed: int = 0,
    on_progress: Callable[[int], object] = lambda resamples: None,
) -> dict[str, Difference]:
    """Compute the difference of two models on the same rows, with percentile intervals.

    Rows and seeds are resampled as by `significance.paired_bootstrap`. A resample in which a figure is not defined,
    because it draws no known hard target of it, is left out of that figure's interval.

    Args:
        task: "labels", "numbers" or "embedding".
        labels: Hard targets of N rows, see data/tasks.py; those of an embedding are not read.
        first, second: float [n, N, K] and [m, N, K], the outputs of n and m seeds, whose figures are averaged; of an
            embedding [n, N] and [m, N], the cosine of each row to the teacher's embedding.
        level: Confidence level of the intervals, 0 … 1.
        resamples: Number of resamples; 0 for LABEL_RESAMPLES of labels, else RESAMPLES.
        seed: Of the resamples. The same call returns the same numbers; with first and second exchanged, the same
            with the opposite sign.
        on_progress: Called whenever resamples are done, with their number, as if there were RESAMPLES of them.

    Returns:
        {name: second minus first}, the task's main figure first: map and f1_macro in -1 … 1, rmse and mae in the units
        of the data, or cosine. A figure that the rows do not define is absent.

    Source:
        See `significance.paired_bootstrap`.
    """
    if first.tobytes() > second.tobytes():  # one order, so that exchanging them cannot move an interval across 0
        exchanged = bootstrap_task(task, labels, second, first, level, resamples, seed, on_progress)
        return {name: Difference(-d.value, -d.high, -d.low) for name, d in exchanged.items()}
    make_metric = {LABELS: _make_label_metric, NUMBERS: _make_number_metric, EMBEDDING: _make_cosine_metric}[task]
    metrics = [make_metric(outputs.astype(np.float64), labels) for outputs in (*first, *second)]
    n, N, rng = len(first), first.shape[1], np.random.default_rng(seed)
    measured = _compute_all(metrics, np.ones((N, 1)))
    resampled: dict[str, list[Floats]] = {name: [] for name in measured}
    resamples = resamples or (LABEL_RESAMPLES if task == LABELS else RESAMPLES)
    block = max(1, _BLOCK // N)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        counts = _draw_counts(N, size, rng)
        weights = np.hstack([-resample_seeds(n, size, rng), resample_seeds(len(second), size, rng)])
        for name, values in _compute_all(metrics, counts).items():
            resampled[name].append((weights * values.T).sum(1))
        on_progress((start + size) * RESAMPLES // resamples - start * RESAMPLES // resamples)
    differences = {}
    for name, values in measured.items():
        figures = values[:, 0]
        drawn = np.concatenate(resampled[name])
        drawn = drawn[np.isfinite(drawn)]
        if np.isfinite(figures).all() and len(drawn):
            differences[name] = compute_interval(figures[:n], figures[n:], drawn, level, _BOUNDS[task])
    return differences


def measure_main(task: str, labels: HardTargets, outputs: NDArray[np.floating]) -> float | None:
    """Compute the main figure of one model, as `bootstrap_task` does; None where it is not defined.

    Args:
        task, labels: As of `bootstrap_task`.
        outputs: float [N, K], or [N] of an embedding.
    """
    make_metric = {LABELS: _make_label_metric, NUMBERS: _make_number_metric, EMBEDDING: _make_cosine_metric}[task]
    figures = make_metric(outputs.astype(np.float64), labels)(np.ones((len(outputs), 1)))
    value = float(next(iter(figures.values()))[0])
    return value if np.isfinite(value) else None


def _compute_all(metrics: list[Metric], counts: Floats) -> dict[str, Floats]:
    """Return {name: [seeds, R]}."""
    figures = [metric(counts) for metric in metrics]
    return {name: np.stack([each[name] for each in figures]) for name in figures[0]}


def _draw_counts(N: int, resamples: int, rng: np.random.Generator) -> Floats:
    """Draw N of N rows with replacement in each resample. Returns how often each is drawn, float64 [N, R]."""
    rows = rng.integers(0, N, (N, resamples)) * resamples + np.arange(resamples)
    counts: Floats = np.bincount(rows.ravel(), minlength=N * resamples).astype(np.float64)
    return counts.reshape(N, resamples)


def _divide(values: Floats, counts: Floats) -> Floats:
    """Divide; NaN where the count is 0."""
    shares: Floats = np.divide(values, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    return shares


def _mean_of_defined(values: Floats) -> Floats:
    """Return the mean of the values [K, R] that are no NaN, [R]; NaN where all are."""
    is_defined = ~np.isnan(values)
    return _divide(np.where(is_defined, values, 0.0).sum(0), is_defined.sum(0).astype(np.float64))


def _make_label_metric(logits: Floats, labels: HardTargets) -> Metric:
    """Prepare map and f1_macro as of `labels.evaluate_labels`: the ranks are sorted once. logits: [N, K]."""
    rankings = [_rank_label(logits[:, k], labels[:, k]) for k in range(labels.shape[1])]
    positive, predicted = labels == 1, (logits > 0) & (labels >= 0)
    columns = [np.asarray(each.T, np.float64) for each in (positive, predicted, positive & predicted)]

    def metric(counts: Floats) -> dict[str, Floats]:
        precisions = np.stack([_average_precision(*ranking, counts) for ranking in rankings])
        support, claims, hits = (column @ counts for column in columns)
        f1 = np.where(support > 0, 2 * hits / np.maximum(support + claims, 1), np.nan)
        return {"map": _mean_of_defined(precisions), "f1_macro": _mean_of_defined(f1)}

    return metric


def _rank_label(scores: Floats, labels: NDArray[Any]) -> "tuple[csr_array, csr_array]":
    """Group the known rows of a label by falling score; groups end at a score that a positive row has.

    Returns:
        Two matrices [G, N] that sum, over the rows of each of the G groups, all rows and the positive ones. Rows below
        the last positive one are in no group.
    """
    from scipy.sparse import csr_array

    rows = np.flatnonzero(labels >= 0)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    thresholds = np.unique(scores[rows[labels[rows] == 1]])  # rising
    # Of the highest threshold that is not above the score, counted from the top; G where there is none.
    groups = len(thresholds) - np.searchsorted(thresholds, scores[rows], side="right")
    shape = (len(thresholds), len(labels))
    matrices = []
    for is_member in (groups < len(thresholds), labels[rows] == 1):
        members = rows[is_member]
        ones = np.ones(len(members))
        matrices.append(csr_array((ones, (groups[is_member], members)), shape=shape))
    return matrices[0], matrices[1]


def _average_precision(all_rows: "csr_array", positive_rows: "csr_array", counts: Floats) -> Floats:
    """Compute the average precision of one label in each resample, [R], NaN without a positive row.

    Source:
        scikit-learn's average_precision_score: the sum over thresholds of the gain in recall times the precision.
    """
    positives: Floats = positive_rows @ counts
    rows: Floats = all_rows @ counts
    hits, claims = positives.cumsum(0), rows.cumsum(0)
    if not len(hits):
        return np.full(counts.shape[1], np.nan)
    return _divide((positives * hits / np.maximum(claims, 1)).sum(0), hits[-1])


def _make_number_metric(outputs: Floats, labels: HardTargets) -> Metric:
    """Prepare rmse and mae as of `numbers.evaluate_numbers`. outputs: [N, D]."""
    is_known = find_known_entries(labels)
    errors = np.where(is_known, outputs - np.where(is_known, labels, 0.0), 0.0)
    known, squares, sizes = is_known.T.astype(np.float64), np.square(errors).T, np.abs(errors).T

    def metric(counts: Floats) -> dict[str, Floats]:
        rows = known @ counts
        rmse = np.sqrt(_divide(squares @ counts, rows))
        return {"rmse": _mean_of_defined(rmse), "mae": _mean_of_defined(_divide(sizes @ counts, rows))}

    return metric


def _make_cosine_metric(cosines: Floats, labels: HardTargets) -> Metric:
    """Prepare the mean cosine. cosines: [N]."""
    return lambda counts: {"cosine": cosines @ counts / counts.sum(0)}
