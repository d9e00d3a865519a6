"""Images without labels: every command reports what can be measured, and refuses early what needs labels."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softcache.pipeline.models import build
from softcache.stages.runs.figures import Figures, choose_labelled_split, choose_split
from tests.helpers.commands import Stages

# train without labels and no test; train without labels and a labelled test; a labelled train and test without labels
KINDS = ("bare", "test-labelled", "train-labelled")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_image: Callable[..., object]) -> Path:
    """A folder with images of each kind and two caches of each (KIND-0, KIND-1)."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("unlabelled")
    for k in range(24):
        for kind in ("bare", "test-labelled"):
            save_image(folder / f"{kind}/train/{k}.png", k=k)
        save_image(folder / f"train-labelled/train/{'ab'[k % 2]}/{k}.png", k=k)
    for k in range(6):
        save_image(folder / f"test-labelled/test/{'ab'[k % 2]}/{k}.png", k=50 + k)
        save_image(folder / f"train-labelled/test/{k}.png", k=50 + k)
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(build("mlp:4", 2, 3, 8).state_dict(), folder / f"w{seed}.pt")
    stage_one = ["--teacher", "mlp:4", "--normalize", "none", "--views", "none", "--draws", "1", "--taps", "hidden1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind in KINDS:
            for seed in (0, 1):
                weights, out = f"w{seed}.pt", f"{kind}-{seed}"
                main(["teacher-cache", "--data", f"folder:{kind}", *stage_one, "--weights", weights, "--out", out])
    return folder


@pytest.fixture
def here(made: Path, stages: Stages) -> Path:
    for path in made.iterdir():
        (Path.cwd() / path.name).symlink_to(path)
    return Path.cwd()


def call(stages: Stages, *command: object) -> str:
    code, out, err = stages.call(*command)
    assert code == 0, (command, out, err)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_students_are_trained_and_measured(kind: str, here: Path, stages: Stages) -> None:
    data = ("--data", f"folder:{kind}")
    student = ("student", *data, "--cache", f"{kind}-0", "--epochs", 1, "--batch-size", 8, "--arch", "mlp:4")
    out = call(stages, *student, "--out", "r")
    assert "agreement" in out
    assert ("KL to teacher" in out) == (kind != "test-labelled")
    assert ("have no labels: the student is compared with its teacher alone" in out) == (kind != "test-labelled")
    result = json.loads(Path("r/result.json").read_text())
    losses = ["kd:temperature=4"] if kind != "train-labelled" else ["kd:temperature=4,weight=0.9", "hard:weight=0.1"]
    assert result["settings"]["loss"] == losses
    assert ("accuracy" in result["student"]["val"]) == (kind == "train-labelled")
    assert "agreement" in call(stages, *student, "--seeds", 2, "--cache", f"{kind}-1", "--out", "seeds")
    if kind == "bare":
        assert "runs:" in call(stages, *student, "--arch", "mlp:8", "--out", "archs")
        assert "runs:" in call(stages, *student, "--seed", 0, "--seed", 1, "--vectorize", "--out", "vectorized")
    assert "kl_to_teacher" in call(stages, "evaluate", "r", *data)
    compared = call(stages, "compare", "r", "seeds")
    assert ("have no labels" in compared) == (kind != "test-labelled")
    chain = call(stages, "born-again", *student[1:], "--generations", 2, "--out", "chain")
    assert "agreement with the first teacher" in chain


@pytest.mark.parametrize("kind", KINDS[:2])
def test_what_needs_labels_is_refused_with_the_way_out(kind: str, here: Path, stages: Stages) -> None:
    data = ("--data", f"folder:{kind}")
    common = (*data, "--cache", f"{kind}-0", "--epochs", 1, "--arch", "mlp:4")
    for options, message in (
        (("--baseline",), "--baseline needs labels"),
        (("--labelled", 4), "--labelled needs labels"),
        (("--finetune-epochs", 1), "--finetune-epochs needs labels"),
        (("--sampler", "balanced"), "--sampler needs labels"),
        (("--loss", "hard"), "loss 'hard' needs labels"),
        (("--select", "accuracy"), "leave it out, and the weights of the last epoch are kept"),
        (("--map", "temperature"), "--map temperature is fitted to validation labels"),
        (("--cache", f"{kind}-1", "--combine", "learned"), "--combine learned is fitted to validation labels"),
    ):
        assert message in stages.fails(2, "student", *common, "--loss", "kd", *options, "--out", "none")
    search = ("--search", "kd.temperature=1|2", "--loss", "kd")
    assert "compare their agreement" in stages.fails(2, "tune", *common, *search, "--out", "none")
    assert "compare their agreement" in stages.fails(2, "methods", *common, "--out", "none")
    assert "by their agreement" in stages.fails(1, "blend", "--cache", f"{kind}-0", "--cache", f"{kind}-1")
    assert "a teacher needs labels" in stages.fails(2, "teacher", *data, "--arch", "mlp:4", "--out", "none")
    assert not Path("none").exists()


def test_a_split_without_labels_is_left_out_where_the_other_has_them(here: Path, stages: Stages) -> None:
    data = ("--data", "folder:train-labelled")
    assert "accuracy 0." in call(stages, "teacher", *data, "--arch", "mlp:4", "--epochs", 1, "--out", "t")
    blended = stages("blend", "--cache", "train-labelled-0", "--cache", "train-labelled-1")
    assert all("test" not in row for row in blended["rows"])
    methods = ("methods", *data, "--cache", "train-labelled-0", "--epochs", 1, "--arch", "mlp:4", "--batch-size", 8)
    assert "| kd | - | " in call(stages, *methods, "--only", "kd", "--time-steps", 1, "--out", "m")


def test_a_model_of_images_without_classes_predicts_class_numbers(here: Path, stages: Stages) -> None:
    pytest.importorskip("onnxruntime")
    data = ("--data", "folder:bare")
    command = ("student", *data, "--cache", "bare-0", "--epochs", 1, "--arch", "mlp:4", "--out", "r")
    call(stages, *command)
    record = stages("export", "r", *data, "--int8", "--most-drop", 1)
    assert record["classes"] == ["0", "1"]
    assert record["int8"]["accuracy_before"] is None
    (prediction,) = stages("predict", "r/student.onnx", "bare/train/0.png")["pictures"]
    assert {top["class"] for top in prediction["top"]} == {"0", "1"}


def test_a_figure_that_is_absent_is_none_or_a_dash() -> None:
    figures = Figures({"agreement": 0.5, "accuracy": None, "arch": "cnn", "flag": True})
    assert (figures.get("agreement"), figures.get("accuracy"), figures.get("nll")) == (0.5, None, None)
    assert (figures.get("arch"), figures.get("flag")) == (None, None)
    assert (figures.format("agreement"), figures.format("nll")) == ("0.5000", "-")
    assert figures.describe(("accuracy", "agreement")) == "agreement 0.5000"
    assert figures.describe(("accuracy",)) == "no labels to compare with"
    assert choose_split({"val": {}, "test": None}) == "val"
    assert choose_labelled_split({"val": {"accuracy": 1.0}, "test": {"rows": 3}}) == "val"
    assert choose_labelled_split({"val": {"accuracy": 1.0}, "test": {"accuracy": 0.0}}) == "test"
