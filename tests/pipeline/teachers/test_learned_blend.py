"""The learned blend reaches the minimum of its objective, wherever an independent multi-start search finds it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from softcache.pipeline.teachers import combine
from softcache.pipeline.teachers.combine import Combination, fit_combination

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def make_teachers(seed: int) -> tuple[NDArray[np.float32], Rows]:
    """Logits [N, M, K] of 2 to 5 teachers and labels: some share their mistakes, and their scales differ widely."""
    random = np.random.default_rng(9000 + seed)
    M, N, K = 2 + seed % 4, int(random.integers(60, 900)), int(random.integers(2, 12))
    labels = random.integers(0, K, N)
    common = random.normal(size=(N, K)) * random.uniform(0, 1)
    teachers = []
    for _ in range(M):
        logits = common + random.normal(size=(N, K)) * random.uniform(0.5, 2)
        logits[np.arange(N), labels] += random.uniform(0.3, 3.5)
        teachers.append(logits * np.exp(random.normal() * random.choice([0.3, 0.8, 1.5])))
    return np.stack(teachers, 1).astype(np.float32), labels


def objective(x: Floats, z: Floats, labels: Rows) -> tuple[float, Floats]:
    """Value and gradient: the mean NLL of the blend and the prior of log temperatures, from the formula in NumPy.

    Args:
        x: logarithms of unnormalised weights [M], then of temperatures [M].
        z: float64 [N, M, K].
        labels: [N].
    """
    N, M, _ = z.shape
    log_w, log_t = log_softmax(x[:M]), x[M:]
    scaled = z * np.exp(-log_t)[None, :, None]
    log_p = log_softmax(scaled, 2)
    terms = log_p[np.arange(N), :, labels] + log_w
    row_nll = -np.logaddexp.reduce(terms, 1)
    share = np.exp(terms + row_nll[:, None])
    slope = (np.exp(log_p) * scaled).sum(2) - scaled[np.arange(N), :, labels]
    value = row_nll.mean() + (log_t**2).sum() / (2 * N)
    return value, np.concatenate([np.exp(log_w) - share.mean(0), log_t / N - (share * slope).mean(0)])


def search(z: Floats, labels: Rows, starts: int) -> float:
    """The least value from random starts, the first with equal weights at T = 1."""
    M, random = z.shape[1], np.random.default_rng(77)
    points = [np.zeros(2 * M), *(2 * random.normal(size=(starts - 1, 2 * M)))]
    options = {"maxiter": 3000, "maxfun": 9000, "ftol": 1e-12, "gtol": 1e-8}
    return min(
        float(minimize(objective, x, (z, labels), "L-BFGS-B", True, bounds=[(-20, 20)] * 2 * M, options=options).fun)
        for x in points
    )


def measure(blend: Combination, z: Floats, labels: Rows) -> float:
    log_w = np.log(np.maximum(blend.weights, 1e-300))
    return objective(np.concatenate([log_w, np.log(blend.temperatures)]), z, labels)[0]


def test_the_gradient_of_the_reference_is_that_of_its_value() -> None:
    logits, labels = make_teachers(1)
    z, x = logits.astype(np.float64), np.random.default_rng(3).normal(size=6)
    gradient = objective(x, z, labels)[1]
    for k, step in enumerate(1e-6 * np.eye(6)):
        slope = (objective(x + step, z, labels)[0] - objective(x - step, z, labels)[0]) / 2e-6
        assert gradient[k] == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_the_blend_is_the_best_of_many_searches(dose: Callable[[int, int], int]) -> None:
    """60 of 60 within 1e-5 nats under torture; the cases are from 2 to 5 teachers in turn."""
    for seed in range(dose(4, 60)):
        logits, labels = make_teachers(seed if dose(0, 1) else seed + 12)
        z = logits.astype(np.float64)
        gap = measure(fit_combination(logits, labels), z, labels) - search(z, labels, dose(6, 24))
        assert gap < 1e-5, f"case {seed}: {gap:.2g} nats above the best of the searches"


@pytest.mark.parametrize("teachers", [2, 3, 4])
def test_a_blend_from_equal_weights_is_never_better(teachers: int) -> None:
    """Several good teachers, whose minimum is inside the simplex: none may be lost on the way."""
    random = np.random.default_rng(100 * teachers)
    labels = random.integers(0, 10, 300)
    z = random.normal(size=(300, teachers, 10)) * 1.5
    for k in range(teachers):
        z[np.arange(300), k, labels] += random.uniform(1.2, 2.8)
    z = (z * np.exp(0.6 * random.normal(size=(teachers, 1)))).astype(np.float32).astype(np.float64)
    assert measure(fit_combination(z, labels), z, labels) < search(z, labels, 1) + 1e-5


def test_teachers_that_are_right_on_every_row_keep_their_soft_targets() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 126)
    z = random.normal(size=(126, 2, 10)) * 1.5
    z[np.arange(126), :, labels] += 12
    assert (z.argmax(2) == labels[:, None]).all()
    blend = fit_combination(z, labels)
    assert min(blend.temperatures) > 0.3
    log_p = torch.log_softmax(blend(torch.from_numpy(z)) / 4, 1)
    assert float(-(log_p.exp() * log_p).sum(1).mean()) > 0.05, "the entropy of the soft targets at T = 4"


def test_a_useless_teacher_has_no_weight_and_no_temperature_and_the_record_is_read_back() -> None:
    logits, labels = make_teachers(4)
    random_teacher = np.random.default_rng(1).normal(size=logits[:, :1].shape) * 5
    blend = fit_combination(np.concatenate([logits, random_teacher], 1), labels)
    assert (blend.weights[2], blend.temperatures[2]) == (0, 1)
    assert sum(blend.weights) == pytest.approx(1, abs=1e-12)
    assert Combination.from_json(blend.to_json()) == blend


def test_many_rows_are_compared_on_a_part_of_them_and_fitted_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = make_teachers(13)
    z = logits.astype(np.float64)
    small = fit_combination(z, labels)
    monkeypatch.setattr(combine, "_ROUGH_SIZE", z.size // 3)
    blend = fit_combination(z, labels)
    assert measure(blend, z, labels) == pytest.approx(measure(small, z, labels), abs=1e-7)
