"""Metrics of numbers: equal to those of scikit-learn and SciPy, with and without unknown numbers."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from softcache.base.errors import UsageError
from softcache.pipeline.metrics.numbers import evaluate_numbers, summarize_numbers
from softcache.pipeline.metrics.tasks import TASK_FIGURES, evaluate_task

Floats = NDArray[np.float64]
UNITS = np.array([1.0, 1e-3, 1e6])


def make_numbers(rows: int = 60, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Return outputs, hard numbers and a teacher's numbers of three outputs, with ties in the first."""
    random = np.random.default_rng(seed)
    y = random.normal(size=(rows, 3)) + np.array([0, 5, -2])
    z, teacher = (y + scale * random.normal(size=y.shape) for scale in (0.5, 0.2))
    y[:, 0] = y[:, 0].round(1)
    return z * UNITS, y * UNITS, teacher * UNITS


def hide_some(y: Floats) -> Floats:
    hidden = y.copy()
    hidden[::3, 0] = hidden[1::4, 2] = hidden[7] = np.nan
    return hidden


@pytest.mark.parametrize("unknown", [False, True])
def test_metrics_are_those_of_scikit_learn_and_scipy(unknown: bool) -> None:
    z, y, teacher = make_numbers()
    y = hide_some(y) if unknown else y
    result = evaluate_numbers(z, y, teacher)
    expected: dict[str, list[float]] = {"mae": [], "rmse": [], "r2": [], "spearman": []}
    for column in range(3):
        known = ~np.isnan(y[:, column])
        of_column = y[known, column], z[known, column]
        expected["mae"].append(mean_absolute_error(*of_column))
        expected["rmse"].append(mean_squared_error(*of_column) ** 0.5)
        expected["r2"].append(r2_score(*of_column))
        expected["spearman"].append(float(spearmanr(*of_column).statistic))
    for name, values in expected.items():
        np.testing.assert_allclose(result["per_output"][name], values, rtol=1e-9)
        assert result[name] == pytest.approx(np.mean(values), rel=1e-9)
    assert (result["rows"], result["labelled"]) == (60, 59 if unknown else 60)
    rmse = mean_squared_error(teacher, z, multioutput="raw_values") ** 0.5
    assert result["rmse_to_teacher"] == pytest.approx(rmse.mean(), rel=1e-9)
    assert result["r2_to_teacher"] == pytest.approx(r2_score(teacher, z), rel=1e-9)
    if not unknown:
        assert result["r2"] == pytest.approx(r2_score(y, z), rel=1e-9)
        assert result["mae"] == pytest.approx(mean_absolute_error(y, z), rel=1e-9)


def test_metrics_are_their_formulas() -> None:
    """Independent of both libraries: ranks are averages of ties."""
    z, y, _ = make_numbers(25)
    result = evaluate_numbers(z, y)

    def rank(x: Floats) -> Floats:
        return np.array([((x < value).sum() + (x <= value).sum() + 1) / 2 for value in x])

    for d in range(3):
        error, deviation = z[:, d] - y[:, d], y[:, d] - y[:, d].mean()
        first, second = (ranks - ranks.mean() for ranks in (rank(z[:, d]), rank(y[:, d])))
        per_output = {name: values[d] for name, values in result["per_output"].items()}
        assert per_output["mae"] == pytest.approx(np.abs(error).sum() / 25, rel=1e-9)
        assert per_output["rmse"] == pytest.approx((error @ error / 25) ** 0.5, rel=1e-9)
        assert per_output["r2"] == pytest.approx(1 - error @ error / (deviation @ deviation), rel=1e-9)
        expected = first @ second / (first @ first * (second @ second)) ** 0.5
        assert per_output["spearman"] == pytest.approx(expected, rel=1e-9)


def test_what_is_not_defined_is_none_and_what_is_not_known_is_absent() -> None:
    z, y, teacher = make_numbers(8)
    y[:, 0], y[1:, 1], y[:, 2] = np.nan, np.nan, 4.0
    result = evaluate_numbers(z, y)
    assert result["per_output"]["mae"][0] is None
    assert result["per_output"]["r2"] == [None, None, None]
    assert result["r2"] is None
    assert result["mae"] == pytest.approx(np.mean([abs(z[0, 1] - y[0, 1]), np.abs(z[:, 2] - 4).mean()]), rel=1e-9)
    assert summarize_numbers(z, y).keys() == {"rmse", "mae"}
    nothing = evaluate_numbers(z, np.full_like(y, np.nan), teacher)
    assert nothing.keys() == {"rows", "labelled", "rmse_to_teacher", "r2_to_teacher"}
    assert summarize_numbers(z, np.full_like(y, np.nan)) == {}
    assert TASK_FIGURES["numbers"].main == "rmse"


def test_an_output_that_is_always_the_same_has_no_rank_correlation() -> None:
    z, y, _ = make_numbers(9)
    z[:, 1] = 3.0
    result = evaluate_numbers(z, y)
    assert result["per_output"]["spearman"][1] is None
    assert result["per_output"]["r2"][1] < 0
    assert result["spearman"] == pytest.approx(np.mean([result["per_output"]["spearman"][d] for d in (0, 2)]))


WRONG: dict[str, tuple[Any, Any, Any]] = {
    "infinite-labels": (np.zeros((3, 2)), np.full((3, 2), np.inf), None),
    "one axis": (np.zeros(4), np.zeros(4), None),
    "another width": (np.zeros((4, 2)), np.zeros((4, 3)), None),
    "other rows": (np.zeros((4, 2)), np.zeros((5, 2)), None),
    "a teacher of another width": (np.zeros((4, 2)), np.zeros((4, 2)), np.zeros((4, 3))),
    "infinite": (np.full((4, 2), np.inf), np.zeros((4, 2)), None),
    "NaN": (np.full((4, 2), np.nan), np.zeros((4, 2)), None),
    "NaN of a teacher": (np.zeros((4, 2)), np.zeros((4, 2)), np.full((4, 2), np.nan)),
    "text": (np.full((4, 2), "a"), np.zeros((4, 2)), None),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_in_one_line(case: str) -> None:
    outputs, labels, teacher = WRONG[case]
    with pytest.raises(UsageError) as error:
        evaluate_task("numbers", outputs, labels, teacher)
    assert "\n" not in str(error.value)
