"""Maps of a teacher's distribution: calibration fitted to validation, and prior correction; the same for all terms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from softcache.base.errors import UsageError
from softcache.pipeline.batch import LinearHead
from softcache.pipeline.teachers.distribution_map import DistributionMap, fit_map
from tests.helpers.commands import Stages

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
STUDENT = ("--arch", "mlp:8", "--epochs", 2)
BALANCED = np.full(10, 30)


def make_calibrated_logits(rows: int, classes: int = 10, seed: int = 0) -> tuple[Floats, Labels]:
    """Logits [N, K], and labels [N] drawn from their softmax: those of a calibrated teacher."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=2.0, size=(rows, classes))
    gumbel = -np.log(-np.log(random.random((rows, classes))))
    return logits, (logits + gumbel).argmax(1)


def nll(logits: torch.Tensor | Floats, labels: Labels) -> float:
    return float(F.cross_entropy(torch.as_tensor(logits).double(), torch.from_numpy(labels)))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5, 8.0])
def test_the_fitted_temperature_is_that_of_the_teacher_within_two_percent(scale: float) -> None:
    logits, labels = make_calibrated_logits(20_000)
    mapping = fit_map("temperature", scale * logits, labels, BALANCED)
    assert 1 / mapping.weight[0].item() == pytest.approx(scale, rel=0.02)
    assert (mapping.weight == mapping.weight[0]).all()
    assert (mapping.bias == 0).all()


def test_a_teacher_that_is_right_on_every_row_gets_a_finite_temperature() -> None:
    logits, labels = np.eye(4)[np.arange(40) % 4] * 2, np.arange(40) % 4
    mapping = fit_map("temperature", logits, labels, BALANCED)
    assert 0.1 < 1 / mapping.weight[0].item() < 1


def test_the_fitted_temperature_has_the_least_nll_of_a_fine_grid() -> None:
    logits, labels = make_calibrated_logits(5000, 4)
    fitted = 1 / fit_map("temperature", 3 * logits, labels, BALANCED).weight[0].item()
    grid = np.linspace(0.8 * fitted, 1.25 * fitted, 2001)
    best = grid[np.argmin([nll(3 * logits / t, labels) for t in grid])]
    assert fitted == pytest.approx(best, rel=1e-3)


def test_vector_scaling_undoes_scales_and_biases() -> None:
    logits, labels = make_calibrated_logits(40_000, 3)
    scale, bias = np.array([2.0, 1.0, 4.0]), np.array([1.0, -2.0, 0.5])
    mapping = fit_map("vector", logits * scale + bias, labels, BALANCED)
    mapped = mapping(torch.from_numpy(logits * scale + bias)).numpy()
    assert F.softmax(torch.from_numpy(mapped), 1).numpy() == pytest.approx(
        F.softmax(torch.from_numpy(logits), 1).numpy(), abs=0.03
    )


def test_matrix_scaling_undoes_a_mixture_of_logits() -> None:
    logits, labels = make_calibrated_logits(10_000, 3)
    mixed = logits @ np.array([[1.0, 0.8, 0], [0, 1, 0.8], [0.8, 0, 1]])
    maps = {name: fit_map(name, mixed, labels, BALANCED) for name in ("vector", "matrix")}
    excess = {name: nll(m(torch.from_numpy(mixed)), labels) - nll(logits, labels) for name, m in maps.items()}
    assert excess["matrix"] == pytest.approx(0, abs=1e-3)
    assert excess["vector"] > 0.05
    reference = LogisticRegression(C=1e6, max_iter=5000, tol=1e-8).fit(mixed, labels)
    assert nll(maps["matrix"](torch.from_numpy(mixed)), labels) == pytest.approx(
        nll(np.log(reference.predict_proba(mixed)), labels), abs=1e-4
    )


def test_a_matrix_fitted_to_few_rows_stays_near_the_identity() -> None:
    logits, labels = make_calibrated_logits(60)
    new_logits, new_labels = make_calibrated_logits(20_000, seed=1)
    mapping = fit_map("matrix", logits, labels, BALANCED)
    free = LogisticRegression(C=1e6, max_iter=5000).fit(logits, labels)
    held_out = nll(mapping(torch.from_numpy(new_logits)), new_labels)
    assert held_out < nll(np.log(free.predict_proba(new_logits).clip(1e-12)), new_labels) / 2
    assert (mapping.weight - torch.eye(10)).abs().max() < np.abs(free.coef_ - np.eye(10)).max() / 3


def test_prior_subtracts_tau_times_the_log_of_the_class_shares() -> None:
    counts = np.array([600, 300, 100])
    for spec, tau in (("prior", 1.0), ("prior:tau=0.5", 0.5), ("prior:tau=0", 0.0)):
        mapping = fit_map(spec, np.zeros((0, 3)), np.zeros(0, np.int64), counts)
        expected = [5 - tau * np.log(0.6), 1 - tau * np.log(0.3), 2 - tau * np.log(0.1)]
        assert mapping(torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64)).tolist() == pytest.approx(
            expected, rel=1e-12
        )


@pytest.mark.parametrize("spec", ["temperature", "vector", "matrix", "prior"])
def test_a_mapped_head_outputs_the_mapped_logits(spec: str) -> None:
    logits, labels = make_calibrated_logits(300, 4)
    mapping = fit_map(spec, logits, labels, np.array([9, 5, 2, 1]))
    torch.manual_seed(0)
    head, x = LinearHead(torch.randn(4, 6), torch.randn(4)), torch.randn(5, 6)
    mapped = mapping.map_head(head)
    torch.testing.assert_close(x @ mapped.weight.T + mapped.bias, mapping(x @ head.weight.T + head.bias))
    restored = DistributionMap.from_json(json.loads(json.dumps(mapping.to_json())))
    assert torch.equal(restored(to_float32(logits)), mapping(to_float32(logits)))


def to_float32(logits: Floats) -> torch.Tensor:
    return torch.from_numpy(logits).float()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "temperatur",
            "no map 'temperatur'. Did you mean 'temperature'? There are: matrix, prior, temperature, vector",
        ),
        ("prior:t=1", "no parameter 't' of map 'prior'"),
        ("vector:tau=1", "no parameter 'tau' of map 'vector'"),
        ("prior:tau=x", "tau=x is not a number"),
        ("prior:tau=-1", "--map prior:tau=-1: tau=-1 would add the prior once more; tau is 0 or larger"),
        ("prior", "--map prior: class 1 has no training row with a label"),
        ("matrix", "--map matrix is fitted to validation labels, and these images have none"),
    ],
)
def test_an_unknown_or_impossible_map_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        fit_map(spec, np.zeros((2, 3)), np.full(2, -1), np.array([3, 0, 1]))
    assert message in str(error.value)


# With a student


def test_a_student_learns_from_the_mapped_teacher_and_the_run_stores_the_map(tiny: Path, stages: Stages) -> None:
    command = ("student", "--cache", tiny / "cache", *STUDENT, "--loss", "kd")
    result = stages(*command, "--map", "temperature", "--out", "r")
    record = json.loads(Path("r/targets.json").read_text())["maps"][0]
    assert record["map"] == "temperature"
    assert result["teacher"]["val"]["nll"] < result["members"][0]["val"]["nll"]
    assert result["teacher"]["test"]["accuracy"] == result["members"][0]["test"]["accuracy"]
    assert stages("evaluate", "r")["0"]["val"]["kl_to_teacher"] == pytest.approx(
        result["student"]["val"]["kl_to_teacher"], abs=1e-6
    )
    plain = stages(*command, "--out", "p")
    assert "members" not in plain
    assert plain["student"]["val"]["nll"] != result["student"]["val"]["nll"]
    code, out, _ = stages.call(*command, "--map", "vector", "--out", "w")
    assert code == 0
    assert f"teacher cnn as cached: val NLL {result['members'][0]['val']['nll']:.4f}" in out
    assert "targets of the student, map vector, fitted to val: val NLL" in out


def test_a_resumed_run_uses_its_stored_map(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("student", "--cache", tiny / "cache", *STUDENT, "--map", "prior:tau=0.5")
    stages(*command, "--out", "complete")
    stages(*command, "--out", "r")
    Path("r/student.pt").unlink()
    Path("r/result.json").unlink()
    monkeypatch.setattr("softcache.pipeline.teachers.fit.fit_map", None)  # calling it would fail
    stages("student", "--resume", "--out", "r")
    assert Path("r/student.pt").read_bytes() == Path("complete/student.pt").read_bytes()
    record = json.loads(Path("r/targets.json").read_text())
    for text in ("{", json.dumps(record | {"maps": []}), json.dumps(record | {"maps": [{"map": "prior"}]})):
        Path("r/targets.json").write_text(text)
        assert "'r/targets.json' is damaged" in stages.fails(1, "evaluate", "r")


def test_a_loss_that_uses_the_teachers_head_gets_the_mapped_head(tiny: Path, stages: Stages) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "cnn", "--epochs", 2, "--clip-norm", 1)
    simkd = ("--loss", "simkd:teacher=pool1,student=pool1")
    assert "simkd" in stages.fails(2, *command, *simkd)  # the input of this teacher's head is no mean over space
    srrl = stages(*command, "--map", "prior", "--loss", "kd", "--loss", "srrl:teacher=flatten,student=flatten")
    plain = stages(*command, "--loss", "kd", "--loss", "srrl:teacher=flatten,student=flatten")
    assert srrl["student"]["val"]["nll"] != plain["student"]["val"]["nll"]
