"""Whether two classifiers differ beyond chance: a bootstrap of the rows, and of the seeds; McNemar's exact test."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
RESAMPLES = 10_000
_BLOCK = 4_000_000  # counts of resamples that are in memory at once: 32 MB


@dataclass(frozen=True)
class Difference:
    """Second less first, as shares (-1 … 1): as measured, and the interval from low to high around it."""

    value: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval is on one side of 0; what rounding leaves of a 0 is one."""
        return self.low > 1e-12 or self.high < -1e-12


def mcnemar(first_alone: int, second_alone: int) -> float:
    """The two-sided p of McNemar's test in its exact form: rows that one of the two alone has right are a fair coin.

    Sum over the outcomes that are no likelier than this one, of Binomial(first_alone + second_alone, 1/2); 1 where the
    two are right on the same rows. Dietterich 1998, section 3.1, recommends the test for one training of each.
    """
    rows = first_alone + second_alone
    from scipy import stats  # here, as below: importing it takes 0.7 s of a CPU, and few commands need it

    return float(stats.binomtest(first_alone, rows).pvalue) if rows else 1.0


def count_right_alone(labels: Ints, first: Ints, second: Ints) -> tuple[int, int]:
    """Rows that the first alone has right, and the second alone. All [N]."""
    one, other = first == labels, second == labels
    return int((one & ~other).sum()), int((other & ~one).sum())


def paired_bootstrap(
    labels: Ints,
    first: Ints,
    second: Ints,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    done: Callable[[int], object] = lambda resamples: None,
) -> dict[str, Difference]:
    """{accuracy, f1_macro}: the difference of two classifiers that were measured on the same rows, with percentile
    intervals (Efron & Tibshirani 1993, section 13.3).

    labels [N], all known; first [n, N] and second [m, N]: the guesses of n and m seeds, whose figures are averaged;
    level: of the intervals; done: told of every so many resamples. The same call gives the same numbers, and with
    first and second exchanged the same with the other sign.

    A resample draws N rows with replacement, the same for all seeds. Rows with equal label and guesses are
    interchangeable, so it is a multinomial count of such groups: 10,000 rows of ten classes have some hundred. Where
    there are several seeds it also draws n - 1 of the n with replacement, of each classifier by itself: n of n would
    give (n - 1) / n of the variance of a mean (Rao & Wu 1988, section 2). Percentiles of so few seeds do not reach as
    far as other seeds lie, so the interval is stretched around the difference, see `_stretch`. Noise that is of one
    seed and one row is counted with the rows and with the seeds: a little too wide (Owen 2007).
    """
    if first.tobytes() > second.tobytes():  # one order, so that exchanging them cannot move an interval across 0
        turned = paired_bootstrap(labels, second, first, level, resamples, seed, done)
        return {name: Difference(-one.value, -one.high, -one.low) for name, one in turned.items()}
    groups, counts = np.unique(np.stack([labels, *first, *second]), axis=1, return_counts=True)
    n, rng = len(first), np.random.default_rng(seed)
    measured = {name: values[0] for name, values in _compute_figures(groups, counts[None].astype(float)).items()}
    drawn: dict[str, list[Floats]] = {name: [] for name in measured}
    for rows in _resample_rows(counts, resamples, rng):
        weights = np.hstack([-_resample_seeds(n, len(rows), rng), _resample_seeds(len(second), len(rows), rng)])
        for name, values in _compute_figures(groups, rows).items():
            drawn[name].append((weights * values).sum(1))
        done(len(rows))
    return {
        name: _interval(values[:n], values[n:], np.concatenate(drawn[name]), level)
        for name, values in measured.items()
    }


def _resample_rows(counts: Ints, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Blocks [R, G] of how often each group of rows is drawn."""
    block = max(1, _BLOCK // len(counts))
    for begin in range(0, resamples, block):
        size = min(block, resamples - begin)
        yield rng.multinomial(counts.sum(), counts / counts.sum(), size).astype(np.float64)


def _resample_seeds(n: int, resamples: int, rng: np.random.Generator) -> Floats:
    """[R, n]: what each seed weighs in each resample; one seed weighs 1."""
    return rng.multinomial(n - 1, [1 / n] * n, resamples) / (n - 1) if n > 1 else np.ones((resamples, 1))


def _compute_figures(groups: Ints, counts: Floats) -> dict[str, Floats]:
    """Each figure [R, seeds]. groups [1 + seeds, G]: label and guesses; counts [R, G]: rows of each group.

    As `metrics.summary` has them: macro F1 is over the classes that occur among the labels.
    """
    labels, guesses = groups[0], groups[1:]
    K = int(groups.max()) + 1
    rows = counts @ _one_hot(labels, np.ones(len(labels)), K)
    there = rows > 0
    f1 = []
    for guess in guesses:
        right = counts @ _one_hot(labels, guess == labels, K)
        guessed = counts @ _one_hot(guess, np.ones(len(guess)), K)
        of_class = 2 * right / np.maximum(rows + guessed, 1)
        f1.append((of_class * there).sum(1) / there.sum(1))
    accuracy = counts @ (guesses == labels).T.astype(np.float64) / counts.sum(1, keepdims=True)
    return {"accuracy": accuracy, "f1_macro": np.stack(f1, 1)}


def _one_hot(classes: Ints, weights: NDArray[Any], K: int) -> Any:
    """[G, K], sparse: the weight of each group in the column of its class."""
    return csr_array((weights.astype(np.float64), (np.arange(len(classes)), classes)), shape=(len(classes), K))


def _interval(first: Floats, second: Floats, drawn: Floats, level: float) -> Difference:
    """first [n], second [m]: a figure of each seed on all rows; drawn [R]: the difference in each resample."""
    value = float(second.mean() - first.mean())
    tail = (1 - level) / 2
    low, high = float(np.quantile(drawn, tail, method="lower")), float(np.quantile(drawn, 1 - tail, method="higher"))
    stretch = _stretch((first, second), float(drawn.var()), tail)
    return Difference(value, max(-1.0, value - stretch * (value - low)), min(1.0, value + stretch * (high - value)))


def _stretch(seeds: Sequence[Floats], variance: float, tail: float) -> float:
    """By how much wider an interval is when part of its variance is known from few seeds; 1 for one seed each.

    The quantile of Student's t to that of the normal distribution, with Welch's degrees of freedom (Welch 1947): the
    variance squared over the sum of each estimated part squared over its degrees. Rows have so many that they add
    nothing.
    """
    parts = [(len(one), one.var(ddof=1) / len(one)) for one in seeds if len(one) > 1]
    spread = sum(part**2 / (n - 1) for n, part in parts)
    if not spread:
        return 1.0
    degrees = max(1.0, variance**2 / spread)
    from scipy import stats

    return float(stats.t.ppf(tail, degrees) / stats.norm.ppf(tail))
