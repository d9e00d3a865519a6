"""Bad input is reported in one clear line, and nothing is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from softcache.stages.training import loop as training
from tests.helpers import processes
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.paths import ROOT
from tests.helpers.processes import Forks

forks = processes.forks


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("teacher --data digit", "no data set 'digit'. Did you mean 'digits'?"),
        ("teacher --data folder", "--data folder:PATH"),
        ("teacher-cache --teacher t.onnx", "arch 't.onnx' names a file: a teacher in it is --teacher onnx:t.onnx"),
        ("teacher --data digits:x", "'digits' has nothing after a colon"),
        ("teacher --arch resnet18", "no arch 'resnet18'. Did you mean 'torchvision:resnet18'?"),
        ("teacher --arch mlp:many", "expected widths"),
        ("teacher --arch torchvision:resnet19", "Did you mean 'resnet"),
        ("teacher --arch no_such_module:make", "cannot be imported"),
        ("teacher --views crops", "Did you mean 'crop'?"),
        ("teacher --views crop:padding=2", "Did you mean 'pad'?"),
        ("teacher --views crop:pad=two", "is not a number"),
        ("teacher --views none:pad=2", "no parameter 'pad' of views 'none'"),
        ("teacher --train-size 5000", "not between 0 and the 1257 training rows"),
        ("teacher --device tpu", "--device tpu"),
        ("teacher-cache --codec float61", "no codec 'float61'. Did you mean 'float16'?"),
        ("teacher-cache --weights nowhere.pt --teacher cnn", "there are no weights at 'nowhere.pt'"),
        ("teacher-cache --weights DEFAULT --teacher cnn", "needs --teacher torchvision:NAME"),
        ("student --cache CACHE --loss kdd", "no loss 'kdd'. Did you mean 'kd'?"),
        ("student --cache CACHE --loss kd:temprature=4", "Did you mean 'temperature'?"),
        ("student --cache CACHE --loss kd:temperature=0", "is below 0.001"),
        ("student --cache CACHE --loss kd:temperature", "is not parameter=value"),
        ("student --cache CACHE --loss hint", "needs layers: --loss hint:teacher=layer3"),
        ("student --cache CACHE --loss kd --loss kd", "given twice"),
        ("student --cache CACHE --labelled 4", "not between 10 classes and 300 rows"),
        ("student --cache CACHE --labelled 400", "not between 10 classes and 300 rows"),
        ("student --cache CACHE --resume", "--resume needs the run's folder"),
        ("student --cache CACHE --resume --out nowhere", "there is no folder 'nowhere'"),
        ("evaluate nowhere", "there is no folder 'nowhere'"),
        ("student --data digts", "Did you mean 'digits'?"),
        ("teacher --arch mpl:16", "Did you mean 'mlp:16'?"),
        ("teacher --arch my_nets.py:make", "Name the module without .py: 'my_nets:make'"),
        ("teacher-cache --weights nowhere.pt", "there are no weights at 'nowhere.pt'"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(tiny: Path, stages: Stages, command: str, message: str) -> None:
    line = stages.fails(2, *command.replace("CACHE", str(tiny / "cache")).split())
    assert message in line
    assert not Path("runs").exists()
    assert not Path("caches/digits").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("student --cache nowhere", "there is no cache at 'nowhere'"),
        ("check-cache nowhere", "there is no cache at 'nowhere'"),
        ("student --cache .", "'.' is no cache"),
        ("check-cache .", "'.' is no cache"),
        ("student --data folder:nowhere", "make one with  "),
        ("student --data folder:nowhere", "teacher-cache --data folder:nowhere --out caches/nowhere"),
        ("student --cache CACHE --data mnist", "is of digits, not of mnist"),
        (
            "student --cache CACHE --loss hint:teacher=layer3,student=relu1",
            "does not contain layer3 (it has: pool1, flatten)",
        ),
    ],
)
def test_a_file_or_folder_that_does_not_fit_is_one_line_and_exit_code_1(
    tiny: Path, stages: Stages, command: str, message: str
) -> None:
    assert message in stages.fails(1, *command.replace("CACHE", str(tiny / "cache")).split())


def test_every_value_outside_its_range_is_named_at_once(tiny: Path, stages: Stages) -> None:
    wrong = ("--epochs", "0", "--warmup", "2", "--ema", "1", "--seeds", "-1")
    code, _, err = stages.call("student", "--cache", tiny / "cache", *wrong)
    assert code == 2
    for part in ("--epochs 0 is below 1", "--warmup 2.0 is above 0.9", "--ema 1.0 is above", "--seeds -1 is below 1"):
        assert part in err


def test_an_empty_value_is_an_unset_variable_and_not_the_default(tiny: Path, stages: Stages) -> None:
    code, _, err = stages.call("teacher-cache", "--weights", "", "--out", "")
    assert code == 2
    assert "--weights is empty" in err
    assert "--out is empty" in err


def test_a_file_is_no_cache(tiny: Path, stages: Stages) -> None:
    assert "is a file: a cache is a folder" in stages.fails(1, "check-cache", tiny / "cache/manifest.json")


def test_a_run_that_was_stopped_is_mentioned_by_the_next_with_the_same_settings(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stages.fails(130, *arguments)
    code, out, _ = stages.call(*arguments)
    assert code == 0
    assert "'runs/digits-mlp-8-1' was stopped; continue it with" in out
    assert "run:   runs/digits-mlp-8-2" in out
    code, out, err = stages.call("student", "--resume", "--out", "runs/digits-mlp-8-1")
    assert code == 0, err
    assert "was stopped" not in stages.call(*arguments)[1]


def test_an_unknown_option_or_command_is_named_with_a_similar_one(stages: Stages) -> None:
    code, _, err = stages.call("student", "--temprature", "4")
    assert code == 2
    assert "No such option" in err
    code, _, err = stages.call("studnet")
    assert code == 2
    assert "student" in err


def test_an_unknown_tap_is_reported_with_the_taps_that_there_are(tiny: Path, stages: Stages) -> None:
    line = stages.fails(2, *tiny_cache_command(tiny)[:-1], "x", "--taps", "pool3")
    assert "no tap 'pool3'. Did you mean 'pool" in line
    assert "conv1" in line
    line = stages.fails(
        2, "student", "--cache", tiny / "cache", "--arch", "mlp:8", "--loss", "hint:teacher=pool1,student=pool1"
    )
    assert "no tap 'pool1'" in line
    assert "relu1" in line


def test_a_checkpoint_of_another_shape_names_the_first_keys(tiny: Path, stages: Stages) -> None:
    weights = tiny / "runs/teacher/teacher.pt"
    arguments = ("teacher-cache", "--train-size", 300, "--weights", weights)
    line = stages.fails(2, *arguments, "--teacher", "mlp:8")
    assert "2 missing (hidden1.weight, hidden1.bias)" in line
    assert "not in the arch (conv1.weight, bn1.weight, bn1.bias, …)" in line
    assert "but the run" in stages.fails(2, *arguments[:-1], weights.parent, "--teacher", "mlp:8")
    assert "does not record its arch" in stages.fails(2, *arguments)


def test_class_counts_that_differ_are_refused(stages: Stages, tmp_path: Path) -> None:
    """A teacher of three classes for images of ten."""
    state = {"hidden1.weight": torch.zeros(4, 64), "hidden1.bias": torch.zeros(4)}
    torch.save(state | {"linear.weight": torch.zeros(3, 4), "linear.bias": torch.zeros(3)}, tmp_path / "w.pt")
    line = stages.fails(2, "teacher-cache", "--teacher", "mlp:4", "--weights", tmp_path / "w.pt")
    assert "linear.weight is 3x4 in the file, 10x4 in the arch" in line


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("was_run",)


def test_a_pickle_that_needs_code_is_refused_and_not_run(stages: Stages, tmp_path: Path) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "w.pt")
    line = stages.fails(1, "teacher-cache", "--teacher", "mlp:4", "--weights", tmp_path / "w.pt")
    assert "it would run code when loaded" in line
    assert not Path("was_run").exists()


def test_an_existing_run_with_other_settings_is_not_overwritten(tiny: Path, stages: Stages) -> None:
    arguments = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    stages(*arguments)
    before = Path("r/student.pt").read_bytes()
    line = stages.fails(2, *arguments, "--epochs", 2)
    assert "epochs 1 there, 2 asked" in line
    assert "continue it with" in stages.fails(2, *arguments)
    assert "started with another --epochs" in stages.fails(2, "student", "--resume", "--out", "r", "--epochs", 2)
    assert Path("r/student.pt").read_bytes() == before
    Path("not_a_run").mkdir()
    Path("not_a_run/precious.txt").write_text("mine")
    assert "is no run" in stages.fails(2, *arguments[:-1], "not_a_run")
    assert "holds precious.txt and no cache" in stages.fails(1, *tiny_cache_command(tiny)[:-1], "not_a_run")
    assert sorted(p.name for p in Path("not_a_run").iterdir()) == ["precious.txt"]


def test_a_folder_of_one_class_or_a_broken_image_is_named(stages: Stages, tmp_path: Path) -> None:
    for name in ("p/train/a/1.png", "p/train/b/1.png", "p/test/a/1.png", "p/test/b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / name)
    for name in ("p/train/a", "p/train/b"):
        for i in range(2, 9):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    data = ("--data", f"folder:{tmp_path / 'p'}")
    content = (tmp_path / "p/train/b/5.png").read_bytes()
    stages("teacher", *data, "--arch", "cnn", "--epochs", 1, "--views", "none", "--out", "t")
    (tmp_path / "p/train/b/5.png").write_bytes(content[:40])
    line = stages.fails(1, "teacher-cache", *data, "--weights", "t", "--views", "none", "--draws", 1)
    assert "p/train/b/5.png cannot be decoded" in line
    (tmp_path / "p/train/b/5.png").write_bytes(content)
    os.rename(tmp_path / "p/train/b", tmp_path / "elsewhere")
    assert "has one class, 'a'" in stages.fails(2, "teacher", *data, "--arch", "cnn")


def test_a_file_system_that_cannot_be_written_is_one_line(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system reports it; a real read-only folder does not stop the tests' user where that is root."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    line = stages.fails(1, "student", "--cache", tiny / "cache", "--arch", "mlp:8", "--out", "r/o")
    assert "Read-only file system: r" in line
    assert "Read-only file system: c" in stages.fails(1, *tiny_cache_command(tiny)[:-1], "c")


def test_a_full_disk_is_one_line_and_the_same_command_continues(tiny: Path, tmp_path: Path, stages: Stages) -> None:
    """A limit on the size of a file stands for the disk: the first shard that does not fit is not written."""
    command = [sys.executable, "-m", "softcache", *tiny_cache_command(tiny)[:-1], "c"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    result = subprocess.run(
        command, cwd=tmp_path, env=environment, preexec_fn=limit, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1, result.stderr
    assert "Error: " in result.stderr
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "c").rglob("*.tmp"))
    stages(*tiny_cache_command(tiny)[:-1], "c")
    stages("check-cache", "c")


def test_too_little_space_is_reported_before_the_teacher_runs(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
    line = stages.fails(1, *tiny_cache_command(tiny)[:-1], "c")
    assert "the cache needs 0.0 GB and 0.0 GB are free" in line


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_ctrl_c_prints_how_to_continue(tiny: Path, forks: Forks, tmp_path: Path, stage: str) -> None:
    """With a signal to another process, once it trains."""
    arguments = {
        "teacher": ["teacher", "--arch", "mlp:8", "--epochs", "100000", "--out", "r"],
        "student": ["student", "--cache", f"{tiny}/cache", "--arch", "mlp:8", "--epochs", "100000", "--out", "r"],
    }[stage]
    child = forks.start(*arguments, cwd=tmp_path, errors=str(tmp_path / "errors"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "r/checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130, child.output
    err = (tmp_path / "errors").read_text()
    assert f"{stage} --resume --out r" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "r/settings.json").read_text())["epochs"] == 100000
