"""Intervals of the figures of other tasks than classes: against plain loops of other formulas, and simulated truth."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sk

from softcache.pipeline.metrics.significance import RESAMPLES
from softcache.pipeline.metrics.task_significance import bootstrap_task, measure_main
from softcache.pipeline.metrics.tasks import evaluate_task

Array = NDArray[Any]
N, K = 300, 3
rng = np.random.default_rng(0)
LABELS = (rng.random((N, K)) < (0.5, 0.3, 0.1)).astype(np.int8)
# Ties between scores, and labels that are not known, also all of a row.
LOGITS = np.round(rng.normal(size=(4, N, K)) + np.array([1.0, 1.2, 1.6, 1.7])[:, None, None] * LABELS, 1) - 0.5
LABELS[rng.random((N, K)) < 0.1] = -1
LABELS[:3] = -1
NUMBERS = rng.normal(size=(N, 2)).astype(np.float32)
OUTPUTS = NUMBERS + rng.normal(size=(4, N, 2)) * np.array([1.0, 1.1, 0.7, 0.8])[:, None, None]
NUMBERS[rng.random((N, 2)) < 0.1] = np.nan
COSINES = 1 - rng.random((4, N)) * np.array([0.5, 0.4, 0.3, 0.3])[:, None]


def mean_average_precision(labels: Array, logits: Array) -> float:
    known = [labels[:, k] >= 0 for k in range(K)]
    return float(np.mean([sk.average_precision_score(labels[i, k], logits[i, k]) for k, i in enumerate(known)]))


def macro_f1(labels: Array, logits: Array) -> float:
    hits = ((labels == 1) & (logits > 0)).sum(0)
    errors = ((labels == 1) & (logits <= 0)).sum(0) + ((labels == 0) & (logits > 0)).sum(0)
    return float((2 * hits / (2 * hits + errors)).mean())


def rmse(numbers: Array, outputs: Array) -> float:
    return float(np.sqrt(np.nanmean((outputs - numbers.astype(np.float64)) ** 2, axis=0)).mean())


def mae(numbers: Array, outputs: Array) -> float:
    return float(np.nanmean(np.abs(outputs - numbers.astype(np.float64)), axis=0).mean())


def mean_cosine(labels: Array, cosines: Array) -> float:
    return float(cosines.mean())


Figure = Callable[[Array, Array], float]
CASES: list[tuple[str, Array, Array, dict[str, Figure]]] = [
    ("labels", LABELS, LOGITS, {"map": mean_average_precision, "f1_macro": macro_f1}),
    ("numbers", NUMBERS, OUTPUTS, {"rmse": rmse, "mae": mae}),
    ("embedding", np.full(N, -1), COSINES, {"cosine": mean_cosine}),
]


@pytest.mark.parametrize(("task", "labels", "outputs", "figures"), CASES)
def test_the_difference_is_that_of_independent_formulas(
    task: str, labels: Array, outputs: Array, figures: dict[str, Figure]
) -> None:
    found = bootstrap_task(task, labels, outputs[:2], outputs[2:], resamples=20)
    assert list(found) == list(figures)
    for name, figure in figures.items():
        values = [figure(labels, each) for each in outputs]
        assert found[name].value == pytest.approx(np.mean(values[2:]) - np.mean(values[:2]), abs=1e-12)
    main = next(iter(figures))
    assert measure_main(task, labels, outputs[0]) == pytest.approx(figures[main](labels, outputs[0]), abs=1e-12)
    if task != "embedding":
        assert measure_main(task, labels, outputs[0]) == pytest.approx(evaluate_task(task, outputs[0], labels)[main])


@pytest.mark.parametrize(("task", "labels", "outputs", "figures"), CASES)
def test_one_seed_each_has_the_interval_of_a_plain_loop_over_rows(
    task: str, labels: Array, outputs: Array, figures: dict[str, Figure]
) -> None:
    loop: dict[str, list[float]] = {name: [] for name in figures}
    random = np.random.default_rng(1)
    for _ in range(200):
        rows = random.integers(0, N, N)
        for name, figure in figures.items():
            first, second = (figure(labels[rows], each[rows]) for each in (outputs[0], outputs[2]))
            loop[name].append(second - first)
    for name, found in bootstrap_task(task, labels, outputs[:1], outputs[2:3]).items():
        spread = float(np.std(loop[name]))
        for end, share in ((found.low, 0.025), (found.high, 0.975)):
            assert end == pytest.approx(np.quantile(loop[name], share), abs=0.7 * spread)  # 4 standard errors


@pytest.mark.parametrize(("task", "labels", "outputs", "figures"), CASES)
def test_exchanged_models_have_the_opposite_interval_and_equal_ones_none(
    task: str, labels: Array, outputs: Array, figures: dict[str, Figure]
) -> None:
    done: list[int] = []
    found = bootstrap_task(task, labels, outputs[:2], outputs[2:], resamples=300, on_progress=done.append)
    assert sum(done) == RESAMPLES
    exchanged = bootstrap_task(task, labels, outputs[2:], outputs[:2], resamples=300)
    for name, difference in found.items():
        other = exchanged[name]
        assert (other.value, other.low, other.high) == (-difference.value, -difference.high, -difference.low)
    for difference in bootstrap_task(task, labels, outputs[:1], outputs[:1], resamples=50).values():
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)
        assert not difference.is_significant


def test_ninety_percent_intervals_of_rmse_and_map_hold_the_truth_in_nine_of_ten_samples() -> None:
    """Both models have the same error or separation, so the true difference is 0."""
    random, trials, hits = np.random.default_rng(2), 150, {"rmse": 0, "map": 0}
    for _ in range(trials):
        numbers = random.normal(size=(80, 1)).astype(np.float32)
        outputs = numbers + random.normal(size=(2, 80, 1))
        labels = (random.random((80, 2)) < 0.4).astype(np.int8)
        logits = random.normal(size=(2, 80, 2)) + labels
        for name, task, y, z in (("rmse", "numbers", numbers, outputs), ("map", "labels", labels, logits)):
            found = bootstrap_task(task, y, z[:1], z[1:], 0.9, resamples=300)[name]
            hits[name] += found.low <= 0 <= found.high
    # Four standard errors of a share of 0.9; the percentile interval of so few rows is a little off by itself.
    assert all(abs(count / trials - 0.9) < 0.1 for count in hits.values()), hits


def test_a_figure_without_a_known_hard_target_is_absent_not_zero() -> None:
    labels = np.full((5, 2), -1, np.int8)
    logits = np.random.default_rng(0).normal(size=(2, 5, 2))
    assert bootstrap_task("labels", labels, logits[:1], logits[1:], resamples=10) == {}
    assert measure_main("labels", labels, logits[0]) is None
    numbers = np.full((5, 2), np.nan, np.float32)
    assert bootstrap_task("numbers", numbers, logits[:1], logits[1:], resamples=10) == {}
    # One positive row in five: the resamples without it, a third of them, say nothing about mAP.
    labels[:, 0] = [1, 0, 0, 0, 0]
    first, second = np.array([[[9.0, 0], [1, 0], [2, 0], [3, 0], [4, 0]], [[0.0, 0], [1, 0], [2, 0], [3, 0], [4, 0]]])
    found = bootstrap_task("labels", labels, first[None], second[None], resamples=300)["map"]
    assert found.value == pytest.approx(0.2 - 1)
    assert found.high < 0
