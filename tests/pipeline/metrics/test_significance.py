"""Intervals and p of two classifiers: against fractions, closed forms, plain loops, scipy, and simulated truth."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from softcache.pipeline.metrics import significance
from softcache.pipeline.metrics.classification import evaluate, summarize
from softcache.pipeline.metrics.significance import Difference, count_right_alone, mcnemar, paired_bootstrap

Ints = NDArray[np.int64]


def accuracy(labels: Ints, first: Ints, second: Ints, resamples: int = 1000) -> Difference:
    return paired_bootstrap(labels, first, second, resamples=resamples)["accuracy"]


def at_most(share: float, trials: int) -> int:
    """So many hits that a share has no more of them in 999 of 1,000 cases."""
    return int(stats.binom.ppf(0.999, trials, share))


# McNemar


def test_mcnemar_is_the_sum_of_all_outcomes_that_are_no_likelier() -> None:
    for first in range(15):
        for second in range(15):
            n = first + second
            p = sum((Fraction(comb(n, k), 2**n) for k in range(n + 1) if comb(n, k) <= comb(n, first)), Fraction(0))
            assert mcnemar(first, second) == pytest.approx(float(p), rel=1e-12)
            assert mcnemar(first, second) == mcnemar(second, first)
    assert mcnemar(0, 5) == 0.0625  # five rows of one kind alone are not yet below 0.05, six are
    assert mcnemar(0, 6) == 0.03125
    assert mcnemar(0, 0) == 1


def test_rows_count_that_one_alone_has_right() -> None:
    labels, first, second = np.array([[0, 1, 2, 0, 1], [0, 1, 0, 1, 1], [0, 2, 2, 0, 0]])
    assert count_right_alone(labels, first, second) == (2, 2)
    assert count_right_alone(labels, first, first) == (0, 0)


# The difference


def test_the_difference_is_that_of_the_figures_of_a_run() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    labels[labels == 4] = 3  # a class that is guessed and never true
    logits = rng.normal(size=(5, 300, 5))
    logits[:2, np.arange(300), labels] += 1.5
    logits[2:, np.arange(300), labels] += 2
    found = paired_bootstrap(labels, logits[:2].argmax(-1), logits[2:].argmax(-1), resamples=20)
    for name, difference in found.items():
        figures = [evaluate(one, labels)[name] for one in logits]
        assert difference.value == pytest.approx(np.mean(figures[2:]) - np.mean(figures[:2]), abs=1e-12)


def test_one_seed_each_has_the_interval_of_a_plain_loop_over_rows() -> None:
    """Resampled by index, and with the figures of a training, in place of groups and counts."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 400)
    first, second = (np.where(rng.random(400) < p, labels, rng.integers(0, 4, 400)) for p in (0.7, 0.8))
    logits = np.eye(4)
    loop: dict[str, list[float]] = {"accuracy": [], "f1_macro": []}
    for _ in range(2000):
        rows = rng.integers(0, 400, 400)
        a, b = (summarize(logits[guess[rows]], labels[rows]) for guess in (first, second))
        for name, values in loop.items():
            values.append(b[name] - a[name])
    for name, found in paired_bootstrap(labels, first[None], second[None]).items():
        spread = float(np.std(loop[name]))
        assert found.low == pytest.approx(np.quantile(loop[name], 0.025), abs=0.25 * spread)  # 4 standard errors
        assert found.high == pytest.approx(np.quantile(loop[name], 0.975), abs=0.25 * spread)
        assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_one_seed_each_has_the_width_of_the_formula() -> None:
    """Of a mean of values in -1, 0, 1: 40 rows of 1,000 that the first alone has right, 70 the second."""
    labels = np.zeros(1000, np.int64)
    first, second = np.zeros((2, 1, 1000), np.int64)
    first[0, :70] = 1
    second[0, 70:110] = 1
    found = accuracy(labels, first, second, 10_000)
    wide = 2 * stats.norm.ppf(0.975) * np.sqrt((0.11 - 0.03**2) / 1000)
    assert found.value == pytest.approx(0.03)
    assert found.high - found.low == pytest.approx(wide, rel=0.04)
    narrow = paired_bootstrap(labels, first, second, level=0.5)["accuracy"]
    assert narrow.high - narrow.low == pytest.approx(wide * stats.norm.ppf(0.75) / stats.norm.ppf(0.975), rel=0.06)


@pytest.mark.parametrize("n", [4, 10])
def test_many_rows_leave_the_interval_of_welch_over_the_seeds(n: int) -> None:
    rng = np.random.default_rng(n)
    right = np.round(200_000 * np.stack([rng.normal(0.9, 0.01, n), rng.normal(0.91, 0.03, n)])).astype(int)
    guesses = np.arange(200_000) >= right[..., None]  # each wrong in its last rows: label 0, guess 1
    found = accuracy(np.zeros(200_000, np.int64), *guesses.astype(np.int64), resamples=4000)
    welch = stats.ttest_ind(right[1] / 2e5, right[0] / 2e5, equal_var=False).confidence_interval(0.95)
    assert found.high - found.low == pytest.approx(welch.high - welch.low, rel=0.12)
    assert found.value == pytest.approx((welch.high + welch.low) / 2, abs=1e-9)


# Calibration


@pytest.mark.parametrize(("alone", "other"), [(0.03, 0.03), (0.02, 0.05)])
def test_the_interval_holds_the_truth_as_often_as_it_says(alone: float, other: float) -> None:
    """Each row of 1,000 is one that the first, or the second, alone has right with these probabilities."""
    rng, trials, outside, both = np.random.default_rng(2), 800, 0, 0
    labels = np.zeros(1000, np.int64)
    for _ in range(trials):
        row = rng.random(1000)
        first, second = (row < other)[None].astype(np.int64), ((row >= other) & (row < other + alone))[None] * 1
        found = accuracy(labels, first, second)
        outside += not found.low <= other - alone <= found.high
        both += found.is_significant and mcnemar(*count_right_alone(labels, first[0], second[0])) < 0.05
    assert stats.binom.ppf(0.001, trials, 0.05) <= outside <= at_most(0.05, trials)
    print(outside / trials, both / trials)
    assert both <= at_most(0.05, trials) if alone == other else both > 0.8 * trials


def simulated(rng: np.random.Generator, seeds: int, spread: float, gain: float = 0.0) -> tuple[Ints, Ints]:
    """Two runs of so many seeds on 2,000 rows that are easy or hard for all, where each seed is better or worse."""
    rows, luck = rng.normal(0, 2, 2000), rng.normal(0, spread, (2, seeds, 1))
    luck[1] += gain
    first, second = (3.5 + rows + luck + rng.normal(0, 0.7, (2, seeds, 2000)) < 0).astype(np.int64)
    return first, second


@pytest.mark.parametrize(("seeds", "spread"), [(2, 0.5), (3, 0.5), (3, 0.0), (5, 0.3)])
def test_seeds_alone_are_called_a_difference_in_one_case_of_twenty_at_most(seeds: int, spread: float) -> None:
    rng, trials = np.random.default_rng(3), 300
    labels = np.zeros(2000, np.int64)
    said = sum(accuracy(labels, *simulated(rng, seeds, spread)).is_significant for _ in range(trials))
    assert said <= at_most(0.05, trials)


def test_percentiles_alone_call_them_one_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the interval is stretched: the test above can fail."""
    monkeypatch.setattr(significance, "_compute_stretch", lambda *_: 1.0)
    rng, trials = np.random.default_rng(3), 300
    labels = np.zeros(2000, np.int64)
    said = sum(accuracy(labels, *simulated(rng, 2, 0.5)).is_significant for _ in range(trials))
    assert said > 2 * at_most(0.05, trials)


def test_a_gain_of_three_spreads_is_found_with_five_seeds() -> None:
    rng, labels = np.random.default_rng(4), np.zeros(2000, np.int64)
    said = sum(accuracy(labels, *simulated(rng, 5, 0.2, 0.6)).is_significant for _ in range(100))
    assert said > 70


# Properties

A_FEW = st.integers(1, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), A_FEW, A_FEW, st.integers(1, 4))
def test_exchanging_the_two_changes_the_sign_alone(seed: int, N: int, n: int, m: int, K: int) -> None:
    rng = np.random.default_rng(seed)
    labels, first, second = (rng.integers(0, K, size) for size in (N, (n, N), (m, N)))
    assume(not np.array_equal(first, second))  # that is one call, and seeds are drawn
    one, other = (paired_bootstrap(labels, *pair, resamples=50) for pair in ((first, second), (second, first)))
    for name, found in one.items():
        assert other[name] == Difference(-found.value, -found.high, -found.low)
    assert one == paired_bootstrap(labels, first, second, resamples=50)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_one_classifier_does_not_differ_from_itself(seed: int, N: int) -> None:
    labels, guess = np.random.default_rng(seed).integers(0, 3, (2, N))
    found = paired_bootstrap(labels, guess[None], guess[None], resamples=50)
    assert set(found.values()) == {Difference(0, 0, 0)}
    assert not found["accuracy"].is_significant


def test_the_resamples_are_counted_as_they_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of any size draw the same rows of one classifier each."""
    labels, guess = np.random.default_rng(0).integers(0, 3, (2, 50))
    whole = paired_bootstrap(labels, labels[None], guess[None], resamples=500)
    counted: list[int] = []
    monkeypatch.setattr(significance, "_BLOCK", 1000)
    assert paired_bootstrap(labels, labels[None], guess[None], resamples=500, on_progress=counted.append) == whole
    assert sum(counted) == 500
    assert len(counted) == 5
