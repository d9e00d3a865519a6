"""--tensorboard: the numbers of metrics.jsonl as event files, also after a stop."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.commands import Stages
from tests.helpers.stopping import stop_at

COMMON = ("--epochs", 3, "--batch-size", 60, "--learning-rate", 0.05)
KD = ("--loss", "kd:weight=0.9", "--loss", "hard:weight=0.1")
TAGS = {
    "loss": "loss",
    "loss_kd": "loss/kd",
    "loss_hard": "loss/hard",
    "gradient_kd": "gradient/kd",
    "gradient_hard": "gradient/hard",
    "learning_rate": "learning_rate",
    "val_accuracy": "val/accuracy",
    "val_f1_macro": "val/f1_macro",
    "val_nll": "val/nll",
    "seconds": "seconds",
}


def lines_of(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def events_of(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Read {tag: (step, value) of each event} from all event files of a folder."""
    read = EventAccumulator(str(Path(folder, "tensorboard"))).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def same(folder: str, epochs: int = 3) -> None:
    """Assert that the events are the numbers of metrics.jsonl, each once, with the epoch as the step."""
    lines, events = lines_of(folder), events_of(folder)
    names = {name for line in lines for name in line} - {"epoch"}
    assert len(lines) == epochs
    assert set(events) == {TAGS[name] for name in names}
    for name in names:
        kept = [(line["epoch"], float(np.float32(line[name]))) for line in lines]
        assert events[TAGS[name]] == kept, name


def test_every_number_of_a_record_is_an_event_in_the_folder_of_its_training(tiny: Path, stages: Stages) -> None:
    more = ("--seeds", 2, "--baseline", "--finetune-epochs", 2, "--tensorboard")
    stages("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", *KD, *more, "--out", "r")
    for seed in (0, 1):
        same(f"r/seed-{seed}/distilled")
        same(f"r/seed-{seed}", 2)
        same(f"r/seed-{seed}/baseline", 5)
    assert {"loss/kd", "gradient/kd", "val/accuracy", "learning_rate"} <= set(events_of("r/seed-0/distilled"))


def test_a_teacher_writes_event_files(stages: Stages) -> None:
    stages("teacher", "--train-size", 200, "--arch", "mlp:8", "--epochs", 3, "--tensorboard", "--out", "t")
    same("t")


@pytest.mark.parametrize("how", [(), ("--vectorize",)])
def test_each_of_several_students_has_an_event_file(tiny: Path, stages: Stages, how: tuple[str, ...]) -> None:
    seeds = ("--seed", 0, "--seed", 1, *how)
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", *KD, *seeds)
    stages(*command, "--tensorboard", "--out", "all")
    for seed in (0, 1):
        same(f"all/seed-{seed}")


def test_after_a_stop_no_step_is_missing_or_written_twice(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second and in the third epoch, with the event file of a killed process in between."""
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", *KD)
    stop_at(monkeypatch, 7, 14)
    assert stages.call(*command, "--tensorboard", "--out", "r")[0] == 130
    same("r", 1)
    (file,) = Path("r/tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert stages.call("student", "--resume", "--out", "r")[0] == 130
    same("r", 2)
    stages("student", "--resume", "--out", "r")
    same("r")


def test_a_resumed_run_can_add_event_files(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped run, a finished one and several students of one command; the weights stay the same."""
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", *KD)
    stages(*command, "--out", "whole")
    stop_at(monkeypatch, 7)
    assert stages.call(*command, "--out", "r")[0] == 130
    stages("student", "--resume", "--tensorboard", "--out", "r")
    stages("student", "--resume", "--tensorboard", "--out", "whole")
    assert Path("r/student.pt").read_bytes() == Path("whole/student.pt").read_bytes()
    stages(*command, "--seed", 0, "--seed", 1, "--out", "all")
    stages(*command, "--seed", 0, "--seed", 1, "--tensorboard", "--out", "all")
    for folder in ("r", "whole", "all/seed-0", "all/seed-1"):
        same(folder)


def test_a_resumed_search_can_add_event_files(tiny: Path, stages: Stages) -> None:
    command = ("tune", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", *KD, "--search", "momentum=0.8|0.9")
    stages(*command, "--trials", 1, "--no-prune", "--out", "s")
    stages(*command, "--trials", 2, "--no-prune", "--tensorboard", "--out", "s")
    assert not Path("s/trial-0000/tensorboard").exists()  # that one is over
    same("s/trial-0001")


def test_tensorboard_is_not_imported_without_the_option(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "softcache.stages.training.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    stages("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", "--out", "r")
    assert not Path("r/tensorboard").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("student", "--cache", "CACHE"),
        ("student", "--cache", "CACHE", "--seed", 0, "--seed", 1),
        ("teacher", "--train-size", 200),
        ("tune", "--cache", "CACHE", "--search", "ema=0|0.9"),
        ("methods", "--cache", "CACHE", "--only", "kd"),
        ("born-again", "--cache", "CACHE"),
    ],
)
def test_without_the_package_an_error_of_one_line_names_the_installation(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, command: tuple[Any, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    arguments = [tiny / "cache" if word == "CACHE" else word for word in command]
    line = stages.fails(2, *arguments, "--arch", "mlp:8", "--tensorboard", "--out", "r")
    want = "Error: --tensorboard wants TensorBoard, which is not installed: pip install -e '.[tensorboard]'"
    assert line == want
    assert not Path("r").exists()


def test_resuming_without_the_package_raises_an_error(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 7)
    command = ("student", *COMMON, "--cache", tiny / "cache", "--arch", "mlp:8", "--tensorboard", "--out", "r")
    assert stages.call(*command)[0] == 130
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install -e '.[tensorboard]'" in stages.fails(2, "student", "--resume", "--out", "r")
