"""--finetune-epochs: distillation first, then the same weights from hard targets alone; both can be stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import softcache.stages.training.loop as training
from softcache.data.transfer_set import load_transfer_set
from softcache.stages.training.step import ActiveTraining
from tests.helpers.commands import Stages

FIRST, SECOND = 3, 2
STUDENT = ("--arch", "mlp:16", "--epochs", FIRST, "--batch-size", 50, "--learning-rate", 0.1, "--loss", "kd")
FINETUNE = ("--finetune-epochs", SECOND)


def lines_of(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def weights(path: str) -> bytes:
    return Path(path).read_bytes()


def steps_noted(patch: pytest.MonkeyPatch, stop_at: int = 0) -> list[tuple[str, tuple[str, ...], float]]:
    """(job, its losses, learning rate) of each step from now on; Ctrl-C when step stop_at is about to be taken."""
    step = training.train_step
    noted: list[tuple[str, tuple[str, ...], float]] = []

    def noting(active: ActiveTraining, *rest: Any) -> torch.Tensor:
        if len(noted) + 1 == stop_at:
            raise KeyboardInterrupt
        rate = active.state.optimizer.param_groups[0]["lr"]
        noted.append((active.run.name, tuple(loss.name for loss in active.run.criterion.losses), rate))
        return step(active, *rest)

    patch.setattr(training, "train_step", noting)
    return noted


def test_the_losses_are_followed_by_hard_targets_at_a_lower_rate_and_the_baseline_gets_as_many_epochs(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = steps_noted(monkeypatch)
    result = stages("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE, "--baseline", "--out", "r")
    per_epoch = 6  # of 300 rows
    kinds = [name for name, _, _ in noted]
    assert kinds == ["distilled"] * FIRST * per_epoch + ["student"] * SECOND * per_epoch + ["baseline"] * 5 * per_epoch
    assert {(name, losses) for name, losses, _ in noted} == {
        ("distilled", ("kd",)),
        ("student", ("hard",)),
        ("baseline", ("hard",)),
    }
    highest = {name: max(rate for kind, _, rate in noted if kind == name) for name in set(kinds)}
    assert highest["distilled"] == pytest.approx(0.1, rel=0.05)
    assert highest["student"] == pytest.approx(0.01, rel=0.05)
    assert highest["baseline"] == pytest.approx(0.1, rel=0.05)
    assert [line["epoch"] for line in lines_of("r/distilled")] == [1, 2, 3]
    assert [line["epoch"] for line in lines_of("r")] == [1, 2]
    assert [line["epoch"] for line in lines_of("r/baseline")] == [1, 2, 3, 4, 5]
    assert {"loss_kd"} == {k for k in lines_of("r/distilled")[0] if k.startswith("loss_")}
    assert {"loss_hard"} == {k for k in lines_of("r")[0] if k.startswith("loss_")}
    seconds = [sum(line["seconds"] for line in lines_of(run)) for run in ("r", "r/distilled")]
    assert result["student"]["seconds"] == pytest.approx(sum(seconds), rel=0.05)
    assert "distilled" not in result


def test_what_is_distilled_is_the_student_without_fine_tuning_and_the_figures_are_of_what_follows(
    tiny: Path, stages: Stages
) -> None:
    plain = stages("student", "--cache", tiny / "cache", *STUDENT, "--out", "plain")
    tuned = stages("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE, "--out", "tuned")
    assert weights("tuned/distilled/distilled.pt") == weights("plain/student.pt")
    assert weights("tuned/student.pt") != weights("plain/student.pt")
    assert tuned["student"]["test"]["nll"] != plain["student"]["test"]["nll"]
    again = stages("evaluate", "tuned")["0"]["test"]
    assert again["nll"] == pytest.approx(tuned["student"]["test"]["nll"], abs=1e-9)
    last = lines_of("tuned")[-1]
    assert last["val_accuracy"] == pytest.approx(tuned["student"]["val"]["accuracy"], abs=1e-9)


def test_a_learning_rate_of_its_own(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = steps_noted(monkeypatch)
    more = (*FINETUNE, "--finetune-learning-rate", 0.003, "--schedule", "constant", "--warmup", 0)
    stages("student", "--cache", tiny / "cache", *STUDENT, *more)
    assert {(name, round(rate, 9)) for name, _, rate in noted} == {("distilled", 0.1), ("student", 0.003)}


@pytest.mark.parametrize("stop_at", [8, 20, 27])
def test_a_run_that_is_stopped_in_either_part_goes_on_to_the_same_weights(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Stopped in the second epoch of distillation, in the first and the second of fine-tuning."""
    asked = ("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE)
    stages(*asked, "--out", "whole")
    with monkeypatch.context() as patch:
        steps_noted(patch, stop_at)
        line = stages.fails(130, *asked, "--out", "stopped")
    assert "student --resume --out stopped" in line
    assert not Path("stopped/result.json").exists()
    with monkeypatch.context() as patch:
        noted = steps_noted(patch)
        stages("student", "--resume", "--out", "stopped")
    finished = (stop_at - 1) // 6 * 6  # steps of whole epochs are not taken again
    assert len(noted) == 6 * (FIRST + SECOND) - finished
    assert ("distilled" in {name for name, _, _ in noted}) == (stop_at < 6 * FIRST)
    for name in ("student.pt", "distilled/distilled.pt"):
        assert weights(f"stopped/{name}") == weights(f"whole/{name}")
    for folder in ("", "distilled"):
        plain = [
            [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(f"{run}/{folder}")]
            for run in ("stopped", "whole")
        ]
        assert plain[0] == plain[1]


def test_a_simkd_student_is_fine_tuned_through_the_teachers_layer(stages: Stages) -> None:
    stages("teacher", "--train-size", 100, "--arch", "resnet8", "--epochs", 1, "--out", "t")
    stages("teacher-cache", "--train-size", 100, "--weights", "t", "--draws", 1, "--taps", "layer3", "--out", "c")
    more = ("--loss", "simkd:teacher=layer3", "--learning-rate", 0.01, *FINETUNE)
    result = stages("student", "--cache", "c", "--arch", "resnet8", "--epochs", 1, *more, "--out", "r")
    assert result["student"]["arch"] == "simkd(resnet8;layer3;64)"
    teacher, student = (torch.load(f, weights_only=True) for f in ("t/teacher.pt", "r/student.pt"))
    distilled = torch.load("r/distilled/distilled.pt", weights_only=True)
    assert torch.equal(student["linear.weight"], teacher["linear.weight"])
    assert not torch.equal(student["projector.0.weight"], distilled["projector.0.weight"])


def test_every_seed_has_both_parts(tiny: Path, stages: Stages) -> None:
    stages("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE, "--seeds", 2, "--out", "two")
    for seed in (0, 1):
        assert len(lines_of(f"two/seed-{seed}/distilled")) == FIRST
        assert len(lines_of(f"two/seed-{seed}")) == SECOND


def test_it_needs_labels(stages: Stages, tmp_path: Path) -> None:
    digits = load_transfer_set("digits", Path("none"), val_fraction=0.125, train_size=30).splits["train"]
    (tmp_path / "images").mkdir()
    for i in range(30):
        Image.fromarray(digits.images.pixels[i, 0].numpy()).save(tmp_path / f"images/{i:02d}.png")
    stages("teacher", "--train-size", 100, "--arch", "mlp:8", "--epochs", 1, "--out", "t")
    data = ("--data", f"folder:{tmp_path / 'images'}")
    stages("teacher-cache", *data, "--weights", "t", "--draws", 1, "--out", "c")
    line = stages.fails(2, "student", *data, "--cache", "c", *STUDENT, *FINETUNE, "--out", "r")
    assert "--finetune-epochs needs labels, and these images have none: leave it out" in line
    assert not Path("r").exists()


def test_only_labelled_rows_are_tuned_on(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    step, seen = training.train_step, {"distilled": set(), "student": set()}  # type: ignore[var-annotated]

    def noting(active: ActiveTraining, batch: Any, *rest: Any) -> torch.Tensor:
        seen[active.run.name] |= set(batch.index.tolist())
        return step(active, batch, *rest)

    monkeypatch.setattr(training, "train_step", noting)
    stages("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE, "--labelled", 40)
    assert len(seen["distilled"]) == 300
    assert len(seen["student"]) == 40
