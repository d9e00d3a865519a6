"""Several students on one stream: each ends as if it had been trained alone, and each view is rendered once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softcache.pipeline.loading import rendering, stream
from tests.helpers.commands import Stages
from tests.helpers.stopping import stop_at

COMMON = ("--epochs", 3, "--batch-size", 50, "--learning-rate", 0.05)
DROPOUT = """
from torch import nn
def make(*, classes, channels, size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 24), nn.Dropout(0.3), nn.Linear(24, classes))
"""


@pytest.fixture
def dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An arch whose steps draw random numbers."""
    (tmp_path / "dropout_net.py").write_text(DROPOUT)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "dropout_net:make"


def read_epoch_lines(folder: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(folder: str, expected: str) -> None:
    """The same weights, metrics of each epoch, and figures."""
    assert Path(folder, "student.pt").read_bytes() == Path(expected, "student.pt").read_bytes()
    assert read_epoch_lines(folder) == read_epoch_lines(expected)
    results = [json.loads(Path(run, "result.json").read_text()) for run in (folder, expected)]
    for model in ("student", "baseline"):
        assert results[0].get(model, {}).get("test") == results[1].get(model, {}).get("test")


def test_each_arch_ends_with_the_weights_that_it_has_alone(tiny: Path, stages: Stages) -> None:
    options = (
        *COMMON,
        "--cache",
        tiny / "cache",
        "--loss",
        "kd",
        "--loss",
        "hint:teacher=flatten,student=linear,weight=0.01",
        "--finetune-epochs",
        2,
        "--ema",
        0.9,
        "--select",
        "accuracy",
        "--baseline",
    )
    archs = ("mlp:16", "cnn")
    stages("student", *options, *(word for arch in archs for word in ("--arch", arch)), "--out", "all")
    for arch in archs:
        stages("student", *options, "--arch", arch, "--out", f"alone-{arch}")
        assert_same_run(f"all/{arch.replace(':', '-')}", f"alone-{arch}")


def test_random_numbers_of_one_student_do_not_change_another(tiny: Path, stages: Stages, dropout: str) -> None:
    options = (*COMMON, "--cache", tiny / "cache", "--loss", "kd")
    stages("student", *options, "--arch", dropout, "--arch", "mlp:16", "--arch", "cnn", "--out", "all")
    stages("student", *options, "--arch", dropout, "--out", "alone")
    assert_same_run("all/dropout_net-make", "alone")


def test_seeds_and_losses_share_the_order_of_the_first_seed(tiny: Path, stages: Stages) -> None:
    options = (*COMMON, "--cache", tiny / "cache", "--arch", "mlp:16")
    losses = ("--losses", "kd:temperature=2 hard:weight=0.1", "--losses", "kd:temperature=8")
    stages("student", *options, "--seed", 3, "--seed", 4, *losses, "--out", "all")
    assert sorted(p.name for p in Path("all").iterdir()) == [f"seed-{s}-loss-{k}" for s in (3, 4) for k in (0, 1)]
    loss = ("--loss", "kd:temperature=2", "--loss", "hard:weight=0.1")
    stages("student", *options, "--seed", 4, "--order-seed", 3, *loss, "--out", "four")
    assert_same_run("all/seed-4-loss-0", "four")
    assert Path("all/seed-3-loss-0/student.pt").read_bytes() != Path("four/student.pt").read_bytes()


def test_each_view_is_rendered_once_for_all(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    views, render = [0], rendering.render

    def count_views(images: Any, policy: Any, seed: Any, index: Any, draw: Any) -> torch.Tensor:
        views[0] += len(index)
        return render(images, policy, seed, index, draw)

    options = (*COMMON, "--cache", tiny / "cache", "--loss", "kd")
    for module in (stream, rendering):
        monkeypatch.setattr(module, "render", count_views)
    stages("student", *options, "--arch", "mlp:16", "--out", "one")
    views_of_one = views[0]
    stages("student", *options, "--arch", "mlp:16", "--arch", "mlp:8", "--arch", "cnn", "--out", "three")
    assert views_of_one >= 3 * 300
    # Each further student renders a few views more, from which its losses get their shapes.
    assert views[0] - views_of_one < views_of_one + 2 * 300


def test_the_same_command_continues_after_a_stop_at_any_step(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, dropout: str
) -> None:
    command = ("student", *COMMON, "--cache", tiny / "cache", "--loss", "kd", "--arch", dropout, "--arch", "mlp:16")
    stages(*command, "--out", "uninterrupted")
    stop_at(monkeypatch, 7, 20)
    for _ in range(2):
        code, _, err = stages.call(*command, "--out", "stopped")
        assert code == 130
        assert "stopped; continue with" in err
        assert err.rstrip().endswith("--out stopped")
    stages(*command, "--out", "stopped")
    for name in ("dropout_net-make", "mlp-16"):
        assert_same_run(f"stopped/{name}", f"uninterrupted/{name}")


def test_a_student_that_diverges_does_not_stop_the_others(tiny: Path, stages: Stages) -> None:
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16")
    line = stages.fails(1, *command, "--losses", "logit_mse:weight=1e12", "--losses", "kd", "--out", "all")
    assert "1 of 2 students ended early, first 'loss-0': training the student diverged" in line
    assert not Path("all/loss-0/student.pt").exists()
    stages(*command, "--loss", "kd", "--out", "alone")
    assert_same_run("all/loss-1", "alone")


def test_students_that_cannot_share_a_stream_are_refused(tiny: Path, stages: Stages) -> None:
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16")
    line = stages.fails(2, *command, "--seed", 0, "--seed", 1, "--labelled", 50, "--out", "a")
    assert "do not see the same batches" in line
    assert "--loss is one term" in stages.fails(2, *command, "--loss", "kd", "--losses", "hard", "--out", "b")
    assert "--seeds" in stages.fails(2, *command, "--seed", 0, "--seed", 1, "--seeds", 2, "--out", "c")
    assert "each is given once" in stages.fails(2, *command, "--losses", "kd", "--losses", "kd", "--out", "e")
    assert "each is given once" in stages.fails(2, *command, "--losses", " ", "--out", "f")
    assert not any(Path(out).exists() for out in "abcef")
    assert "two students are both" in stages.fails(2, *command, "--seed", 1, "--seed", 1, "--out", "d")
    code, _, err = stages.call(*command, "--seed", 1, "--seed", -1)
    assert (code, "--seed -1 is below 0" in err) == (2, True)
