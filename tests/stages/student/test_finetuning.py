"""--finetune-epochs: distillation, then the same weights trained on hard targets only; both phases can be stopped."""

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

DISTILLATION, FINETUNING = 3, 2  # epochs
STUDENT = ("--arch", "mlp:16", "--epochs", DISTILLATION, "--batch-size", 50, "--learning-rate", 0.1, "--loss", "kd")
FINETUNE = ("--finetune-epochs", FINETUNING)


def read_epoch_lines(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def read_weights(path: str) -> bytes:
    return Path(path).read_bytes()


def record_steps(patch: pytest.MonkeyPatch, stop_at: int = 0) -> list[tuple[str, tuple[str, ...], float]]:
    """List (phase, losses, learning rate) of each step from now on; Ctrl-C in place of step `stop_at`."""
    train_step = training.train_step
    steps: list[tuple[str, tuple[str, ...], float]] = []

    def record_step(active: ActiveTraining, *rest: Any) -> torch.Tensor:
        if len(steps) + 1 == stop_at:
            raise KeyboardInterrupt
        rate = active.state.learning_rate
        steps.append((active.run.name, tuple(loss.name for loss in active.run.criterion.losses), rate))
        return train_step(active, *rest)

    patch.setattr(training, "train_step", record_step)
    return steps


def test_distillation_is_followed_by_hard_targets_at_a_lower_rate_and_the_baseline_has_as_many_epochs(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = record_steps(monkeypatch)
    result = stages("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE, "--baseline", "--out", "r")
    steps_per_epoch = 6  # of 300 rows in batches of 50
    phases = [phase for phase, _, _ in steps]
    epochs = {"distilled": DISTILLATION, "student": FINETUNING, "baseline": DISTILLATION + FINETUNING}
    assert phases == [phase for phase in epochs for _ in range(epochs[phase] * steps_per_epoch)]
    assert {(phase, losses) for phase, losses, _ in steps} == {
        ("distilled", ("kd",)),
        ("student", ("hard",)),
        ("baseline", ("hard",)),
    }
    highest = {phase: max(rate for name, _, rate in steps if name == phase) for phase in set(phases)}
    assert highest["distilled"] == pytest.approx(0.1, rel=0.05)
    assert highest["student"] == pytest.approx(0.01, rel=0.05)
    assert highest["baseline"] == pytest.approx(0.1, rel=0.05)
    assert [line["epoch"] for line in read_epoch_lines("r/distilled")] == [1, 2, 3]
    assert [line["epoch"] for line in read_epoch_lines("r")] == [1, 2]
    assert [line["epoch"] for line in read_epoch_lines("r/baseline")] == [1, 2, 3, 4, 5]
    assert {"loss_kd"} == {k for k in read_epoch_lines("r/distilled")[0] if k.startswith("loss_")}
    assert {"loss_hard"} == {k for k in read_epoch_lines("r")[0] if k.startswith("loss_")}
    seconds = [sum(line["seconds"] for line in read_epoch_lines(run)) for run in ("r", "r/distilled")]
    assert result["student"]["seconds"] == pytest.approx(sum(seconds), rel=0.05)
    assert "distilled" not in result


def test_the_distilled_weights_are_those_without_fine_tuning_and_the_figures_are_those_after_it(
    tiny: Path, stages: Stages
) -> None:
    plain = stages("student", "--cache", tiny / "cache", *STUDENT, "--out", "plain")
    tuned = stages("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE, "--out", "tuned")
    assert read_weights("tuned/distilled/distilled.pt") == read_weights("plain/student.pt")
    assert read_weights("tuned/student.pt") != read_weights("plain/student.pt")
    assert tuned["student"]["test"]["nll"] != plain["student"]["test"]["nll"]
    again = stages("evaluate", "tuned")["0"]["test"]
    assert again["nll"] == pytest.approx(tuned["student"]["test"]["nll"], abs=1e-9)
    last = read_epoch_lines("tuned")[-1]
    assert last["val_accuracy"] == pytest.approx(tuned["student"]["val"]["accuracy"], abs=1e-9)


def test_fine_tuning_can_have_its_own_learning_rate(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = record_steps(monkeypatch)
    options = (*FINETUNE, "--finetune-learning-rate", 0.003, "--schedule", "constant", "--warmup", 0)
    stages("student", "--cache", tiny / "cache", *STUDENT, *options)
    assert {(phase, round(rate, 9)) for phase, _, rate in steps} == {("distilled", 0.1), ("student", 0.003)}


@pytest.mark.parametrize("stop_at", [8, 20, 27])
def test_a_run_that_is_stopped_in_either_phase_continues_to_the_same_weights(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Stopped in the second epoch of distillation, in the first and the second of fine-tuning."""
    command = ("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE)
    stages(*command, "--out", "uninterrupted")
    with monkeypatch.context() as patch:
        record_steps(patch, stop_at)
        line = stages.fails(130, *command, "--out", "stopped")
    assert "student --resume --out stopped" in line
    assert not Path("stopped/result.json").exists()
    with monkeypatch.context() as patch:
        steps = record_steps(patch)
        stages("student", "--resume", "--out", "stopped")
    finished = (stop_at - 1) // 6 * 6  # steps of whole epochs are not taken again
    assert len(steps) == 6 * (DISTILLATION + FINETUNING) - finished
    assert ("distilled" in {phase for phase, _, _ in steps}) == (stop_at < 6 * DISTILLATION)
    for name in ("student.pt", "distilled/distilled.pt"):
        assert read_weights(f"stopped/{name}") == read_weights(f"uninterrupted/{name}")
    for folder in ("", "distilled"):
        metrics = [
            [{k: v for k, v in line.items() if k != "seconds"} for line in read_epoch_lines(f"{run}/{folder}")]
            for run in ("stopped", "uninterrupted")
        ]
        assert metrics[0] == metrics[1]


def test_a_simkd_student_is_fine_tuned_with_the_teachers_last_layer(stages: Stages) -> None:
    stages("teacher", "--train-size", 100, "--arch", "resnet8", "--epochs", 1, "--out", "t")
    stages("teacher-cache", "--train-size", 100, "--weights", "t", "--draws", 1, "--taps", "layer3", "--out", "c")
    options = ("--loss", "simkd:teacher=layer3", "--learning-rate", 0.01, *FINETUNE)
    result = stages("student", "--cache", "c", "--arch", "resnet8", "--epochs", 1, *options, "--out", "r")
    assert result["student"]["arch"] == "simkd(resnet8;layer3;64)"
    teacher, student = (torch.load(f, weights_only=True) for f in ("t/teacher.pt", "r/student.pt"))
    distilled = torch.load("r/distilled/distilled.pt", weights_only=True)
    assert torch.equal(student["linear.weight"], teacher["linear.weight"])
    assert not torch.equal(student["projector.0.weight"], distilled["projector.0.weight"])


def test_every_seed_has_both_phases(tiny: Path, stages: Stages) -> None:
    stages("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE, "--seeds", 2, "--out", "two")
    for seed in (0, 1):
        assert len(read_epoch_lines(f"two/seed-{seed}/distilled")) == DISTILLATION
        assert len(read_epoch_lines(f"two/seed-{seed}")) == FINETUNING


def test_fine_tuning_needs_labels(stages: Stages, tmp_path: Path) -> None:
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


def test_fine_tuning_uses_only_labelled_rows(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step, rows = training.train_step, {"distilled": set(), "student": set()}  # type: ignore[var-annotated]

    def record_rows(active: ActiveTraining, batch: Any, *rest: Any) -> torch.Tensor:
        rows[active.run.name] |= set(batch.index.tolist())
        return train_step(active, batch, *rest)

    monkeypatch.setattr(training, "train_step", record_rows)
    stages("student", "--cache", tiny / "cache", *STUDENT, *FINETUNE, "--labelled", 40)
    assert len(rows["distilled"]) == 300
    assert len(rows["student"]) == 40
