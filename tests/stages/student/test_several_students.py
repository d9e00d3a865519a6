"""Several students from one stream: each as if it had been trained alone, each view rendered once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import softcache.pipeline.loading.stream as stream
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
    (tmp_path / "dropping.py").write_text(DROPOUT)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "dropping:make"


def lines_of(folder: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def same_run(one: str, other: str) -> None:
    assert Path(one, "student.pt").read_bytes() == Path(other, "student.pt").read_bytes()
    assert lines_of(one) == lines_of(other)
    for model in ("student", "baseline"):
        figures = [json.loads(Path(run, "result.json").read_text()).get(model, {}).get("test") for run in (one, other)]
        assert figures[0] == figures[1]


def test_archs_of_one_stream_end_with_the_weights_that_each_has_alone(tiny: Path, stages: Stages) -> None:
    more = (
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
    stages("student", *more, *(word for arch in archs for word in ("--arch", arch)), "--out", "all")
    for arch in archs:
        stages("student", *more, "--arch", arch, "--out", f"alone-{arch}")
        same_run(f"all/{arch.replace(':', '-')}", f"alone-{arch}")


def test_what_is_random_in_one_does_not_change_another(tiny: Path, stages: Stages, dropout: str) -> None:
    more = (*COMMON, "--cache", tiny / "cache", "--loss", "kd")
    stages("student", *more, "--arch", dropout, "--arch", "mlp:16", "--arch", "cnn", "--out", "all")
    stages("student", *more, "--arch", dropout, "--out", "alone")
    same_run("all/dropping-make", "alone")


def test_seeds_and_losses_share_the_first_seeds_order(tiny: Path, stages: Stages) -> None:
    more = (*COMMON, "--cache", tiny / "cache", "--arch", "mlp:16")
    losses = ("kd:temperature=2 hard:weight=0.1", "kd:temperature=8")
    said = [word for loss in losses for word in ("--losses", loss)]
    stages("student", *more, "--seed", 3, "--seed", 4, *said, "--out", "all")
    assert sorted(p.name for p in Path("all").iterdir()) == [f"seed-{s}-loss-{k}" for s in (3, 4) for k in (0, 1)]
    alone = ("--loss", "kd:temperature=2", "--loss", "hard:weight=0.1")
    stages("student", *more, "--seed", 4, "--order-seed", 3, *alone, "--out", "four")
    same_run("all/seed-4-loss-0", "four")
    assert Path("all/seed-3-loss-0/student.pt").read_bytes() != Path("four/student.pt").read_bytes()


def test_each_view_is_rendered_once_for_all(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered, render = [0], stream.render

    def counted(images: Any, policy: Any, seed: Any, index: Any, draw: Any) -> torch.Tensor:
        rendered[0] += len(index)
        return render(images, policy, seed, index, draw)

    more = (*COMMON, "--cache", tiny / "cache", "--loss", "kd")
    monkeypatch.setattr(stream, "render", counted)
    stages("student", *more, "--arch", "mlp:16", "--out", "one")
    of_one = rendered[0]
    stages("student", *more, "--arch", "mlp:16", "--arch", "mlp:8", "--arch", "cnn", "--out", "three")
    assert of_one >= 3 * 300
    assert rendered[0] - of_one < of_one + 2 * 300  # views that show each student's losses their shapes come beside


def test_stopped_at_any_step_the_same_command_goes_on(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, dropout: str
) -> None:
    more = ("student", *COMMON, "--cache", tiny / "cache", "--loss", "kd", "--arch", dropout, "--arch", "mlp:16")
    stages(*more, "--out", "whole")
    stop_at(monkeypatch, 7, 20)
    for _ in range(2):
        code, _, err = stages.call(*more, "--out", "stopped")
        assert code == 130
        assert "the same command with --out stopped goes on" in err
    stages(*more, "--out", "stopped")
    for name in ("dropping-make", "mlp-16"):
        same_run(f"stopped/{name}", f"whole/{name}")


def test_one_that_diverges_does_not_stop_the_others(tiny: Path, stages: Stages) -> None:
    more = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16")
    line = stages.fails(1, *more, "--losses", "logit_mse:weight=1e12", "--losses", "kd", "--out", "all")
    assert "1 of 2 students, 'loss-0' the first: training the student diverged" in line
    assert not Path("all/loss-0/student.pt").exists()
    stages(*more, "--loss", "kd", "--out", "alone")
    same_run("all/loss-1", "alone")


def test_what_does_not_share_a_stream_is_refused(tiny: Path, stages: Stages) -> None:
    more = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:16")
    line = stages.fails(2, *more, "--seed", 0, "--seed", 1, "--labelled", 50, "--out", "a")
    assert "do not see the same batches" in line
    assert "--loss is a term" in stages.fails(2, *more, "--loss", "kd", "--losses", "hard", "--out", "b")
    assert "--seeds" in stages.fails(2, *more, "--seed", 0, "--seed", 1, "--seeds", 2, "--out", "c")
    assert "each is said once" in stages.fails(2, *more, "--losses", "kd", "--losses", "kd", "--out", "e")
    assert "each is said once" in stages.fails(2, *more, "--losses", " ", "--out", "f")
    assert not any(Path(out).exists() for out in "abcef")
    assert "two students are both" in stages.fails(2, *more, "--seed", 1, "--seed", 1, "--out", "d")
    code, _, err = stages.call(*more, "--seed", 1, "--seed", -1)
    assert (code, "--seed -1 is below 0" in err) == (2, True)
