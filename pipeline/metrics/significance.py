"""Tests whether two classifiers differ: a paired bootstrap of rows and seeds, and McNemar's exact test."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
RESAMPLES = 10_000
_BLOCK = 4_000_000  # counts of resamples that are in memory at once: 32 MB


@dataclass(frozen=True)
class Difference:
    """The second classifier's metric minus the first's.

    Attributes:
        value: As measured, in -1 … 1 for shares.
        low, high: Its confidence interval.
    """

    value: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval does not contain 0, apart from rounding."""
        return self.low > 1e-12 or self.high < -1e-12


def mcnemar(first_alone: int, second_alone: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test.

    Args:
        first_alone: Rows that only the first classifier predicts correctly.
        second_alone: Rows that only the second does.

    Returns:
        The probability, under Binomial(first_alone + second_alone, 1/2), of an outcome that is no likelier than this
        one; 1 where both numbers are 0.

    Source:
        Dietterich 1998, "Approximate statistical tests for comparing supervised classification learning algorithms",
        section 3.1, which recommends it for one training of each.
    """
    from scipy import stats  # here, as below: importing it takes 0.7 s of a CPU, and few commands need it

    rows = first_alone + second_alone
    return float(stats.binomtest(first_alone, rows).pvalue) if rows else 1.0


def count_right_alone(labels: Ints, first: Ints, second: Ints) -> tuple[int, int]:
    """Count the rows that the first classifier alone predicts correctly, and the second alone. All: int64 [N]."""
    first_right, second_right = first == labels, second == labels
    return int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())


def paired_bootstrap(
    labels: Ints,
    first: Ints,
    second: Ints,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    on_progress: Callable[[int], object] = lambda resamples: None,
) -> dict[str, Difference]:
    """Compute the difference of two classifiers on the same rows, with percentile intervals.

    A resample draws N rows with replacement, the same for all seeds. Rows with equal label and predictions are
    interchangeable, so a resample is a multinomial count of such groups: 10,000 rows of ten classes have some hundred.
    With several seeds it also draws n - 1 of the n with replacement, for each classifier separately: n of n would
    give (n - 1) / n of the variance of a mean. Percentiles of so few seeds do not reach as far as other seeds lie, so
    the interval is widened, see `_compute_stretch`. Noise of a single seed and row counts twice, with the rows and
    with the seeds, so the intervals are a little too wide.

    Args:
        labels: int64 [N], none hidden.
        first, second: int64 [n, N] and [m, N], predictions of n and m seeds, whose metrics are averaged.
        level: Confidence level of the intervals, 0 … 1.
        resamples: Number of resamples.
        seed: Of the resamples. The same call returns the same numbers; with first and second exchanged, the same
            with the opposite sign.
        on_progress: Called with a number of resamples whenever they are done.

    Returns:
        {accuracy, f1_macro: second minus first}.

    Source:
        Efron & Tibshirani 1993, "An introduction to the bootstrap", section 13.3 (percentile intervals); Rao & Wu
        1988, section 2 (n - 1 of n); Owen 2007, "The pigeonhole bootstrap" (rows and seeds).
    """
    if first.tobytes() > second.tobytes():  # one order, so that exchanging them cannot move an interval across 0
        exchanged = paired_bootstrap(labels, second, first, level, resamples, seed, on_progress)
        return {name: Difference(-d.value, -d.high, -d.low) for name, d in exchanged.items()}
    groups, counts = _group_rows(np.stack([labels, *first, *second]))
    n, rng = len(first), np.random.default_rng(seed)
    measured = {name: values[0] for name, values in _compute_metrics(groups, counts[None].astype(float)).items()}
    resampled: dict[str, list[Floats]] = {name: [] for name in measured}
    for rows in _resample_rows(counts, resamples, rng):
        weights = np.hstack([-resample_seeds(n, len(rows), rng), resample_seeds(len(second), len(rows), rng)])
        for name, values in _compute_metrics(groups, rows).items():
            resampled[name].append((weights * values).sum(1))
        on_progress(len(rows))
    return {
        name: compute_interval(values[:n], values[n:], np.concatenate(resampled[name]), level)
        for name, values in measured.items()
    }


def _group_rows(columns: Ints) -> tuple[Ints, Ints]:
    """Return the distinct columns in lexicographic order, [C, G], and how many rows each stands for, [G].

    As `np.unique(columns, axis=1, return_counts=True)`, but faster: it sorts numbers in place of records.

    Args:
        columns: int64 [C, N], the label and the predictions of each row, none negative.
    """
    K = int(columns.max()) + 1
    codes = columns[0]
    for values in columns[1:]:
        codes = np.unique(codes, return_inverse=True)[1] * K + values  # below N * K, whatever the number of columns
    _, first_rows, counts = np.unique(codes, return_index=True, return_counts=True)
    return columns[:, first_rows], counts


def _resample_rows(counts: Ints, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield blocks [R, G]: how often each resample draws each group of rows."""
    block = max(1, _BLOCK // len(counts))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        yield rng.multinomial(counts.sum(), counts / counts.sum(), size).astype(np.float64)


def resample_seeds(n: int, resamples: int, rng: np.random.Generator) -> Floats:
    """Return the weight of each seed in each resample, [R, n]; a single seed has weight 1."""
    return rng.multinomial(n - 1, [1 / n] * n, resamples) / (n - 1) if n > 1 else np.ones((resamples, 1))


def _compute_metrics(groups: Ints, counts: Floats) -> dict[str, Floats]:
    """Compute accuracy and macro F1 of each resample and seed, [R, seeds], as `classification.summarize` does.

    Args:
        groups: [1 + seeds, G], the label and the predictions of each group of rows.
        counts: [R, G], the rows of each group in each resample.
    """
    labels, predictions = groups[0], groups[1:]
    K = int(groups.max()) + 1
    columns = np.ascontiguousarray(counts.T)
    rows = _count_classes(columns, labels, K)
    is_present = rows > 0
    f1 = []
    for predicted in predictions:
        outcomes = _count_classes(columns, np.where(predicted == labels, predicted, K + predicted), 2 * K)
        hits, mistakes = outcomes[:, :K], outcomes[:, K:]
        class_f1 = 2 * hits / np.maximum(rows + hits + mistakes, 1)
        f1.append((class_f1 * is_present).sum(1) / is_present.sum(1))
    accuracy = counts @ (predictions == labels).T.astype(np.float64) / counts.sum(1, keepdims=True)
    return {"accuracy": accuracy, "f1_macro": np.stack(f1, 1)}


def _count_classes(columns: Floats, classes: Ints, K: int) -> Floats:
    """Return the rows of each class in each resample, [R, K].

    Args:
        columns: [G, R], the rows of each group in each resample.
        classes: [G], the class 0 … K - 1 of each group.
    """
    G = len(classes)
    from scipy.sparse import csc_array

    one_hot = csc_array((np.ones(G), classes, np.arange(G + 1)), shape=(K, G))
    in_classes: Floats = one_hot @ columns
    return in_classes.T


def compute_interval(first: Floats, second: Floats, resampled: Floats, level: float, bound: float = 1.0) -> Difference:
    """Compute a difference and its interval.

    Args:
        first, second: [n] and [m], a metric of each seed on all rows.
        resampled: [R], the difference in each resample.
        level: Confidence level.
        bound: Largest possible difference, where the interval ends.
    """
    value = float(second.mean() - first.mean())
    tail = (1 - level) / 2
    low, high = (
        float(np.quantile(resampled, tail, method="lower")),
        float(np.quantile(resampled, 1 - tail, method="higher")),
    )
    stretch = _compute_stretch((first, second), float(resampled.var()), tail)
    return Difference(
        value, max(-bound, value - stretch * (value - low)), min(bound, value + stretch * (high - value))
    )


def _compute_stretch(seeds: Sequence[Floats], variance: float, tail: float) -> float:
    """Compute by which factor an interval widens because part of its variance is estimated from few seeds.

    It is the quantile of Student's t over that of the normal distribution, with Welch's degrees of freedom: the
    variance squared over the sum of each estimated part squared over its degrees of freedom. Rows have so many that
    their part adds nothing.

    Args:
        seeds: The metric of each seed, [n] of each classifier.
        variance: Of the difference over the resamples.
        tail: Probability beyond one end of the interval.

    Returns:
        The factor; 1 for one seed each.

    Source:
        Welch 1947, "The generalization of Student's problem when several different population variances are involved".
    """
    parts = [(len(values), values.var(ddof=1) / len(values)) for values in seeds if len(values) > 1]
    spread = sum(part**2 / (n - 1) for n, part in parts)
    if not spread:
        return 1.0
    from scipy import stats

    degrees = max(1.0, variance**2 / spread)
    return float(stats.t.ppf(tail, degrees) / stats.norm.ppf(tail))
