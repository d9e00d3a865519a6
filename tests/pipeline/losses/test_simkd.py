"""SimKD students, which classify by a projector and the teacher's last layer: training, metrics and saved weights."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.transfer_set import load_transfer_set
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build, count_parameters, find_head
from softcache.pipeline.models.archs.simkd import SimKDStudent, format_simkd_arch, parse_simkd_arch
from softcache.pipeline.models.multiply_adds import count_multiply_adds
from softcache.pipeline.taps.hooks import capture_features
from tests.helpers.commands import Stages
from tests.helpers.stopping import stop_at

STUDENT = ("student", "--cache", "c", "--arch", "resnet8", "--learning-rate", "0.05", "--batch-size", "50")
SIMKD = ("--loss", "simkd:teacher=layer3")
WIDTH = 256  # of the teacher's last map


@pytest.fixture(scope="module")
def simkd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a resnet8x4 as `t`, its cache `c` of 200 rows and 2 draws, and a student and a baseline in `r`."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("simkd")
    with contextlib.chdir(folder):
        main(["teacher", "--train-size", "200", "--arch", "resnet8x4", "--epochs", "8", "--out", "t"])
        cut = ["teacher-cache", "--train-size", "200", "--weights", "t", "--views", "crop:pad=1", "--draws", "2"]
        main([*cut, "--taps", "layer3,layer2,layer3:pool", "--out", "c"])
        main([*STUDENT, *SIMKD, "--epochs", "12", "--baseline", "--out", "r"])
    return folder


@pytest.fixture
def home(simkd_run: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of that folder, as the working directory of a test."""
    shutil.copytree(simkd_run, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_layer_that_the_teachers_last_layer_does_not_read_raises_an_error(tmp_path: Path, stages: Stages) -> None:
    """layer3 of a wide ResNet has the width of its last layer, which reads the mean after another activation."""
    stages("teacher", "--train-size", 150, "--arch", "wrn_16_1", "--epochs", 1, "--out", "t")
    made = (
        "teacher-cache",
        "--train-size",
        150,
        "--weights",
        "t",
        "--draws",
        1,
        "--taps",
        "layer3,last",
        "--out",
        "c",
    )
    stages(*made)
    for loss in ("srrl", "simkd", "cat_kd"):
        command = ("student", "--cache", "c", "--arch", "resnet8", "--epochs", 1, "--learning-rate", 0.01)
        message = stages.fails(2, *command, "--loss", f"{loss}:teacher=layer3,student=layer3")
        assert "it does not read the mean of 'layer3" in message
        stages(*command, "--loss", f"{loss}:teacher=last,student=layer3")


def a_student(folder: Path) -> nn.Module:
    """Load student.pt without the library's SimKD network: a plain resnet8, convolutions and a matrix product."""
    state = torch.load(folder / "student.pt", weights_only=True)
    backbone = build("resnet8", 10, 1, 8)
    weights = {name.removeprefix("backbone."): x for name, x in state.items() if name.startswith("backbone.")}
    missing, extra = backbone.load_state_dict(weights, strict=False)
    assert set(missing) == {"linear.weight", "linear.bias"}
    assert not extra

    class ByHand(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), capture_features(backbone.eval(), ("layer3",)) as features:
                backbone(x)
            x = features["layer3"]
            for conv, norm, pad in ((0, 1, 0), (3, 4, 1), (6, 7, 0)):
                x = F.conv2d(x, state[f"projector.{conv}.weight"], padding=pad)
                of_norm = (state[f"projector.{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
                x = F.batch_norm(x, *of_norm).relu()
            return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]

    return ByHand()


def test_a_student_is_measured_through_its_projector_and_the_teachers_last_layer(simkd_run: Path) -> None:
    result = json.loads((simkd_run / "r/result.json").read_text())["student"]
    teacher = torch.load(simkd_run / "t/teacher.pt", weights_only=True)
    state = torch.load(simkd_run / "r/student.pt", weights_only=True)
    for name in ("linear.weight", "linear.bias"):
        assert torch.equal(state[name], teacher[name]), "the teacher's own, to the last bit"
    input_spec = result["preparation"]
    split = load_transfer_set("digits", Path("none"), val_fraction=0.125, train_size=200).splits["test"]
    x = split.images.pixels.float() / 255
    x = (x - input_spec["mean"][0]) / input_spec["std"][0]
    logits = a_student(simkd_run / "r")(x)
    hits = (logits.argmax(1).numpy() == split.labels).mean()
    nll = -logits.log_softmax(1)[range(len(split.labels)), split.labels].mean()
    assert result["test"]["accuracy"] == pytest.approx(hits, abs=2 / len(split.labels))
    assert result["test"]["nll"] == pytest.approx(float(nll), rel=1e-3)
    assert result["test"]["accuracy"] > 0.3


def test_metrics_and_loss_show_that_the_student_learned(simkd_run: Path) -> None:
    lines = [json.loads(line) for line in (simkd_run / "r/metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]) >= {"loss", "loss_simkd", "val_accuracy"}
    assert lines[-1]["loss_simkd"] < 0.7 * lines[0]["loss_simkd"]
    result = json.loads((simkd_run / "r/result.json").read_text())
    assert result["student"]["test"]["agreement"] > 0.3


def test_arch_parameters_and_multiply_adds_include_the_projector(simkd_run: Path) -> None:
    """The projector and the teacher's layer are included; the student's last layer, which is unused, is not."""
    result = json.loads((simkd_run / "r/result.json").read_text())
    student, baseline = result["student"], result["baseline"]
    assert student["arch"] == f"simkd(resnet8;layer3;{WIDTH})"
    assert baseline["arch"] == "resnet8"
    plain, own_layer = count_parameters(build("resnet8", 10, 1, 8)), 64 * 10 + 10
    half = WIDTH // 2
    projector = 64 * half + 9 * half * half + half * WIDTH + 2 * (half + half + WIDTH)
    assert student["parameters"] == plain - own_layer + projector + WIDTH * 10 + 10
    assert baseline["parameters"] == plain
    places = 2 * 2
    work = places * (64 * half + 9 * half * half + half * WIDTH) + WIDTH * 10
    assert student["multiply_adds"] == baseline["multiply_adds"] - 64 * 10 + work
    assert baseline["multiply_adds"] == count_multiply_adds(build("resnet8", 10, 1, 8), 1, 8)


def test_evaluate_reproduces_the_metrics(home: Path, stages: Stages) -> None:
    result = json.loads(Path("r/result.json").read_text())["student"]
    again = stages("evaluate", "r")["0"]
    for split in ("val", "test"):
        for name in ("accuracy", "nll", "agreement", "kl_to_teacher"):
            assert again[split][name] == pytest.approx(result[split][name], abs=1e-9)


def test_the_run_is_a_teacher_of_the_next_generation(home: Path, stages: Stages) -> None:
    accuracy = json.loads(Path("r/result.json").read_text())["student"]["test"]["accuracy"]
    made = stages(
        "teacher-cache",
        "--train-size",
        200,
        "--weights",
        "r",
        "--taps",
        "projector",
        "--codec",
        "float32",
        "--out",
        "next",
    )
    assert made["teacher"]["test"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    cache = CacheReader(Path("next"))
    assert cache.teacher == f"simkd(resnet8;layer3;{WIDTH})"
    assert list(cache.manifest.taps["projector"]) == [WIDTH, 2, 2]
    stages("check-cache", "next", "--deep", "--weights", "r")
    command = ("student", "--cache", "next", "--arch", "resnet8", "--epochs", 1)
    stages(*command, "--loss", "kd", "--out", "by-kd")
    result = stages(*command, "--loss", "simkd:teacher=projector,student=layer3", "--out", "by-simkd")
    assert result["student"]["arch"] == f"simkd(resnet8;layer3;{WIDTH})"
    state = torch.load("by-simkd/student.pt", weights_only=True)
    assert torch.equal(state["linear.weight"], torch.load("r/student.pt", weights_only=True)["linear.weight"])


@pytest.mark.parametrize("loss", ["simkd:teacher=layer3,student=layer2", "simkd:teacher=layer3:pool"])
def test_the_projector_takes_a_larger_map_or_a_pooled_one(home: Path, stages: Stages, loss: str) -> None:
    layer = "layer2" if "layer2" in loss else "layer3:pool"
    result = stages(*STUDENT, "--loss", loss, "--epochs", 1, "--out", "s")
    assert result["student"]["arch"] == f"simkd(resnet8;{layer};{WIDTH})"
    again = stages("evaluate", "s")["0"]["test"]
    assert again["nll"] == pytest.approx(result["student"]["test"]["nll"], abs=1e-9)


def test_a_batch_of_one_pooled_row_raises_an_error(home: Path, stages: Stages) -> None:
    options = ("--loss", "simkd:teacher=layer3:pool", "--epochs", 1, "--batch-size", 1, "--out", "s")
    assert "a --batch-size of 1 leaves nothing" in stages.fails(2, *STUDENT[:-2], *options)


def test_a_stopped_run_resumes_to_the_same_weights(
    home: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*STUDENT, *SIMKD, "--epochs", 3, "--precision", "bfloat16")
    stages(*command, "--out", "whole")

    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        stages.fails(130, *command, "--out", "stopped")
    stages("student", "--resume", "--out", "stopped")
    assert Path("whole/student.pt").read_bytes() == Path("stopped/student.pt").read_bytes()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--loss", "simkd:teacher=layer3", "--loss", "hard"), 2, "'simkd' takes no other loss"),
        (("--loss", "simkd:teacher=layer2"), 2, "its last linear layer takes 256 values, 'layer2' has 128"),
        (("--loss", "simkd:teacher=layer2+layer3"), 2, "'simkd' takes one layer of the teacher, not 2"),
        (("--loss", "simkd:teacher=layer1"), 1, "does not contain layer1"),
        (("--loss", "simkd:teacher=layer3,student=layer9"), 2, "no tap 'layer9'"),
        (("--loss", "simkd"), 2, "--loss simkd:teacher=layer3,student=layer3"),
        (("--arch", "simkd(resnet8;layer3;x)", "--loss", "kd"), 2, "is not of the form simkd(resnet8;layer3;256)"),
        (("--arch", "simkd(resnet8;layer3;16)", *SIMKD), 2, "is not of the form simkd(resnet8;layer3;256)"),
    ],
)
def test_what_does_not_fit_raises_an_error_before_a_step(
    home: Path, stages: Stages, more: tuple[str, ...], code: int, message: str
) -> None:
    assert message in stages.fails(code, *STUDENT, "--epochs", 1, *more, "--out", "s")
    assert not Path("s").exists()


def test_parse_the_name_of_the_arch() -> None:
    for backbone, layer, width in (("resnet8", "layer3", 256), ("torchvision:resnet18", "layer4.1:pool", 1)):
        assert parse_simkd_arch(format_simkd_arch(backbone, layer, width)) == (backbone, layer, width)
    assert parse_simkd_arch("resnet8") is None
    for wrong in ("simkd(resnet8)", "simkd(resnet8;layer3)", "simkd(a;b;0)", "simkd(a;b;-1)", "simkd(a;b;99999999)"):
        with pytest.raises(UsageError, match=r"is not of the form simkd\(resnet8;layer3;256\)"):
            parse_simkd_arch(wrong)


def test_the_students_last_layer_is_removed_and_the_teachers_is_frozen() -> None:
    network = build("simkd(resnet8;layer3;12)", 5, 1, 8)
    assert isinstance(network, SimKDStudent)
    assert isinstance(network.backbone.get_submodule("linear"), nn.Identity)
    assert find_head(network, 5) is network.linear
    assert not any(p.requires_grad for p in network.linear.parameters())
    assert network.training
    assert np.prod(network(torch.rand(3, 1, 8, 8)).shape) == 15


def test_it_is_exported_with_the_teachers_layer(home: Path, stages: Stages) -> None:
    record = stages("export", "r")
    assert record["arch"] == "simkd(resnet8;layer3;256)"
    assert record["check"]["flips"] == 0
    result = json.loads(Path("r/result.json").read_text())
    for model in ("student", "baseline"):
        assert record["figures"][model]["test"]["accuracy"] == result[model]["test"]["accuracy"]
