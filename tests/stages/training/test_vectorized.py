"""--vectorize: students of one arch as one model equal each student alone up to rounding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softcache.stages.training.vectorized as stacked
from softcache.pipeline.metrics.classification import summarize
from softcache.pipeline.models.state_dicts import read_state_dict
from tests.helpers.commands import Stages

COMMON = ("--epochs", 2, "--batch-size", 50, "--learning-rate", 0.02)
ODD = """
from torch import nn
def frozen(*, classes, channels, size):
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 12), nn.ReLU(), nn.Linear(12, classes))
    net[1].requires_grad_(False)
    return net
class Tied(nn.Module):
    def __init__(self, i, classes):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(i, 12), nn.Linear(12, 12), nn.Linear(12, classes)
        self.d = nn.Linear(12, 12)
        self.d.weight = self.b.weight
    def forward(self, x):
        return self.c(self.d(self.b(self.a(x.flatten(1)))))
class Branching(nn.Module):
    def __init__(self, i, classes):
        super().__init__()
        self.a = nn.Linear(i, classes)
    def forward(self, x):
        y = self.a(x.flatten(1))
        return y if y.sum() > 0 else 2 * y
def tied(*, classes, channels, size):
    return Tied(channels * size * size, classes)
def branching(*, classes, channels, size):
    return Branching(channels * size * size, classes)
"""
LOSSES = ("--losses", "kd:temperature=4 hard:weight=0.1", "--losses", "kd:temperature=4,weight=1->0 hard:weight=0.7")


def same_run(one: str, other: str) -> None:
    ours, theirs = (read_state_dict(Path(run, "student.pt")) for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    lines = [[json.loads(line) for line in Path(r, "metrics.jsonl").read_text().splitlines()] for r in (one, other)]
    for mine, his in zip(*lines, strict=True):
        assert mine.keys() == his.keys()
        for name in mine.keys() - {"seconds", "val_accuracy", "val_f1_macro"}:
            assert mine[name] == pytest.approx(his[name], rel=1e-3)


def stop_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Raise KeyboardInterrupt before that step, once."""
    step, taken = stacked._step, [0]

    def stopping(*of: Any) -> torch.Tensor:
        taken[0] += 1
        if taken[0] == number:
            raise KeyboardInterrupt
        return step(*of)

    patch.setattr(stacked, "_step", stopping)


@pytest.mark.parametrize("arch", ["mlp:16", "cnn"])
@pytest.mark.parametrize(
    "more", [(), ("--clip-norm", 0.5), ("--optimizer", "adamw", "--learning-rate", 1e-3, "--finetune-epochs", 1)]
)
def test_vectorised_seeds_and_weights_equal_each_student_alone(
    tiny: Path, stages: Stages, arch: str, more: tuple[Any, ...]
) -> None:
    command = ("student", *COMMON, *more, "--cache", tiny / "cache", "--arch", arch)
    stages(*command, "--seed", 0, "--seed", 1, *LOSSES, "--vectorize", "--baseline", "--out", "all")
    assert not list(Path("all").rglob("stack"))
    alone = ("--loss", "kd:temperature=4,weight=1->0", "--loss", "hard:weight=0.7")
    stages(*command, "--seed", 1, "--order-seed", 0, *alone, "--out", "alone")
    same_run("all/seed-1-loss-1", "alone")
    result = json.loads(Path("all/seed-1-loss-1/result.json").read_text())
    assert {"student", "baseline"} <= set(result)


def test_a_diverging_student_does_not_change_the_others(tiny: Path, stages: Stages) -> None:
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16")
    losses = ("--losses", "logit_mse:weight=1e12", "--losses", "logit_mse:weight=0.1")
    line = stages.fails(1, *command, *losses, "--vectorize", "--out", "all")
    assert "1 of 2 students ended early, first 'loss-0': training the student diverged" in line
    stages(*command, "--loss", "logit_mse:weight=0.1", "--out", "alone")
    same_run("all/loss-1", "alone")


def test_a_stopped_vectorised_training_resumes_to_the_same_weights(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = ("--seed", 0, "--seed", 1)
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16", *seeds, "--vectorize")
    stages(*command, "--out", "whole")
    stop_at(monkeypatch, 9)
    assert stages.call(*command, "--out", "stopped")[0] == 130
    stages(*command, "--out", "stopped")
    for seed in (0, 1):
        weights = [Path(run, f"seed-{seed}/student.pt").read_bytes() for run in ("whole", "stopped")]
        assert weights[0] == weights[1]


def test_what_cannot_be_vectorised_raises_an_error(tiny: Path, stages: Stages) -> None:
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16", "--vectorize")
    seeds = ("--seed", 0, "--seed", 1)
    hint = ("--loss", "kd", "--loss", "hint:teacher=flatten,student=linear")
    assert "read logits and labels alone" in stages.fails(2, *command, *seeds, *hint, "--out", "a")
    part = ("--loss", "kd", "--loss", "balanced_softmax")
    assert "no part of their own" in stages.fails(2, *command, *seeds, *part, "--out", "a")
    assert not Path("a").exists()
    assert "--select" in stages.fails(2, *command, *seeds, "--select", "nll", "--out", "b")
    other = ("--losses", "kd:temperature=2", "--losses", "kd:temperature=3")
    assert "differ in their weights alone" in stages.fails(2, *command, *other, "--out", "c")
    assert "several students" in stages.fails(2, *command, "--out", "d")


def test_with_other_students_the_training_starts_over_and_finished_ones_stay(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16")
    stop_at(monkeypatch, 9)
    assert stages.call(*command, "--seed", 0, "--seed", 1, "--vectorize", "--out", "all")[0] == 130
    assert "started with --vectorize" in stages.fails(1, *command, "--seed", 0, "--seed", 1, "--out", "all")
    stages(*command, "--seed", 0, "--seed", 2, "--vectorize", "--out", "all")
    kept = Path("all/seed-0/student.pt").read_bytes()
    stages(*command, "--seed", 0, "--seed", 2, "--seed", 3, "--vectorize", "--out", "all")
    assert Path("all/seed-0/student.pt").read_bytes() == kept
    for seed in (2, 3):
        stages(*command, "--seed", seed, "--order-seed", 0, "--out", f"alone-{seed}")
        same_run(f"all/seed-{seed}", f"alone-{seed}")
    assert not list(Path("all").rglob("stack"))


def test_frozen_weights_stay_and_networks_that_vmap_refuses_raise_an_error(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ("student", *COMMON, "--cache", tiny / "cache", "--seed", 0, "--seed", 1, "--vectorize")
    stages(*command, "--arch", "odd:frozen", "--out", "frozen")
    torch.manual_seed(1)
    namespace = {}
    exec(ODD, namespace)
    torch.testing.assert_close(
        read_state_dict(Path("frozen/seed-1/student.pt"))["1.weight"],
        namespace["frozen"](classes=10, channels=1, size=8)[1].weight,
    )
    assert "tied weights" in stages.fails(2, *command, "--arch", "odd:tied", "--out", "tied")
    assert "cannot take this network" in stages.fails(2, *command, "--arch", "odd:branching", "--out", "branching")


@pytest.mark.parametrize("K", [2, 10])
def test_the_f1_of_an_epoch_is_that_of_scikit_learn(K: int) -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(K)
    for rows in (1, 3, 200):
        labels, logits = rng.integers(-1, K, rows), rng.normal(size=(rows, K))
        known = labels >= 0
        if known.any():
            guess = logits.argmax(1)[known]
            expected = f1_score(
                labels[known], guess, labels=np.unique(labels[known]), average="macro", zero_division=0
            )
            assert summarize(logits, labels)["f1_macro"] == pytest.approx(expected, abs=1e-12)
