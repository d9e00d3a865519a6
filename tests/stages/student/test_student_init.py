"""Students that start from weights, and their own normalisation: recorded, repeated, used wherever they are run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.student.defaults import fill_defaults
from softcache.stages.student.setup import DistillationSetup
from tests.helpers.commands import Stages
from tests.helpers.hub import publish_timm_weights, save_hf_model, save_timm_weights

pytest.importorskip("timm")
TIMM = "timm:test_resnet"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of 1,000 classes, w.pt, and a cache of 16 px views of digits, c."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("home")
    save_timm_weights("test_resnet", folder / "w.pt", classes=1000)
    save_timm_weights("test_resnet", folder / "ten.pt", classes=10)
    data = ["teacher-cache", "--train-size", "60", "--views", "crop:size=16", "--draws", "2"]
    torch.manual_seed(0)
    torch.save(build("cnn", 10, 1, 16).state_dict(), folder / "cnn.pt")
    teacher = ["--teacher", "cnn", "--weights", f"{folder}/cnn.pt", "--taps", "pool1"]
    main([*data, *teacher, "--out", f"{folder}/c"])
    return folder


def student(home: Path, *more: object) -> tuple[object, ...]:
    return ("student", "--cache", home / "c", "--epochs", 1, "--batch-size", 30, *more)


def open_setup(home: Path, **options: Any) -> tuple[StudentConfig, DistillationSetup]:
    config = fill_defaults(StudentConfig(cache=(str(home / "c"),), arch=TIMM, **options))
    return config, DistillationSetup.open(config)


def compute_accuracy(home: Path, record: dict[str, Any], weights: str) -> float:
    """The test accuracy of a student that is built from what result.json records of it."""
    _, setup = open_setup(home)
    spec = InputSpec.from_json(record["preparation"])
    network = build(record["arch"], 10, spec.channels, spec.size)
    load_weights(network, read_state_dict(Path(weights)), weights)
    logits = setup.compute_logits(PreparedModel(network, spec))
    return float(setup.compute_metrics(logits)["test"]["accuracy"])


def test_a_student_of_timm_starts_from_a_file(home: Path, stages: Stages) -> None:
    code, out, err = stages.call(*student(home, "--arch", TIMM, "--init", home / "w.pt", "--baseline", "--out", "s"))
    assert code == 0, err
    assert f"input of {TIMM}: 16 px, bilinear, mean=0.5,0.5,0.5,std=0.5,0.5,0.5, as published with it" in out
    assert f"{TIMM} starts from --init {home / 'w.pt'}; last layer: 1,000 → 10 classes, fresh: fc.weight" in out
    assert "so does the baseline" in out
    result = json.loads(Path("s/result.json").read_text())
    assert result["student"]["preparation"] == {"channels": 3, "size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert result["student"]["init"] == result["baseline"]["init"]
    assert result["student"]["init"]["weights"] == "w.pt"
    assert json.loads(Path("s/init.json").read_text())["digest"] == result["student"]["init"]["digest"]
    assert compute_accuracy(home, result["student"], "s/student.pt") == result["student"]["test"]["accuracy"]


def test_every_seed_has_the_same_body_and_a_last_layer_of_its_own(home: Path) -> None:
    config, setup = open_setup(home, init=str(home / "w.pt"))
    first, second = (
        setup.build_student(replace(config, seed=seed), setup.losses).state_dict() for seed in (config.seed, 5)
    )
    expected = torch.load(home / "w.pt", weights_only=True)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == ["fc.weight", "fc.bias"]
    assert all(torch.equal(first[name], expected[name]) for name in first if name not in different)


def test_a_trained_student_is_measured_and_made_a_teacher_without_the_weights_that_it_started_from(
    home: Path, stages: Stages
) -> None:
    Path("w.pt").write_bytes((home / "w.pt").read_bytes())
    result = stages(*student(home, "--arch", TIMM, "--init", "w.pt", "--seeds", 2, "--out", "s"))
    Path("w.pt").unlink()
    measured = stages("evaluate", "s")
    assert [measured[str(x["seed"])]["test"]["accuracy"] for x in result["seeds"]] == [
        x["student"]["test"]["accuracy"] for x in result["seeds"]
    ]
    data = ("--train-size", 60, "--views", "crop:size=16", "--draws", 1)
    stages("teacher-cache", *data, "--weights", "s/seed-0", "--out", "c2")
    assert json.loads(Path("c2/manifest.json").read_text())["identity"]["teacher"]["mean"] == [0.5] * 3


def test_a_run_goes_on_only_from_the_same_weights(home: Path, stages: Stages) -> None:
    """Where the file is now may be said with --resume --init; what is in it may not change."""
    weights = Path("w.pt")
    weights.write_bytes((home / "w.pt").read_bytes())
    stages(*student(home, "--arch", TIMM, "--init", "w.pt", "--out", "s"))
    weights.rename("moved.pt")
    assert "there are no weights at 'w.pt', which --init names" in stages.fails(2, "student", "--resume", "--out", "s")
    stages("student", "--resume", "--out", "s", "--init", "moved.pt")
    save_timm_weights("test_resnet", "other.pt", classes=1000, seed=1)
    error = stages.fails(1, "student", "--resume", "--out", "s", "--init", "other.pt")
    assert "'s' was started from other weights than those of --init today" in error
    stages(*student(home, "--arch", TIMM, "--out", "fresh"))
    error = stages.fails(1, "student", "--resume", "--out", "fresh", "--init", "other.pt")
    assert "'fresh' was started without --init" in error


def test_several_students_start_from_their_own_published_weights(
    home: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_timm_weights("test_resnet", tmp_path / "hub", monkeypatch)
    publish_timm_weights("test_efficientnet", tmp_path / "hub", monkeypatch)
    archs = ("--arch", TIMM, "--arch", "timm:test_efficientnet")
    results = stages(*student(home, *archs, "--init", "DEFAULT", "--out", "s"))["students"]
    records = [result["student"]["init"] for result in results.values()]
    assert [record["weights"] for record in records] == ["DEFAULT"] * 2
    assert records[0]["digest"] != records[1]["digest"]
    assert records[1]["fresh"] == "classifier.weight, classifier.bias"


@pytest.mark.slow
def test_several_students_of_one_model_start_from_the_same_weights(home: Path, stages: Stages) -> None:
    """Trained as one vectorised model, equal to each alone but for rounding."""
    torch.manual_seed(3)
    torch.save(build("mlp:16", 100, 1, 16).state_dict(), "mlp.pt")
    command = student(home, "--arch", "mlp:16", "--init", "mlp.pt", "--normalize", "none")
    together = stages(*command, "--seed", 0, "--seed", 1, "--vectorize", "--out", "v")["students"]
    stages(*command, "--seed", 0, "--out", "alone")
    assert len(together) == 2
    alone, vectorised = read_state_dict(Path("alone/student.pt")), read_state_dict(Path("v/seed-0/student.pt"))
    for name, value in alone.items():
        torch.testing.assert_close(vectorised[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_each_student_of_a_chain_starts_from_the_weights(home: Path, stages: Stages) -> None:
    chain = ("born-again", "--cache", home / "c", "--epochs", 1, "--batch-size", 30, "--generations", 2)
    result = stages(*chain, "--arch", TIMM, "--init", home / "w.pt", "--out", "b")
    digests = {g["student"]["init"]["digest"] for g in result["generations"]}
    assert len(digests) == 1
    error = stages.fails(2, *chain[:-2], "--archs", f"{TIMM}+cnn", "--init", home / "w.pt", "--out", "b2")
    assert "do not fit the arch" in error
    assert not Path("b2").exists()


def test_a_teacher_starts_from_a_file_and_its_cache_has_its_input(home: Path, stages: Stages) -> None:
    data = ("--train-size", 60, "--views", "none:size=16")
    start = ("--arch", TIMM, "--init", home / "w.pt", "--epochs", 1)
    code, out, err = stages.call("teacher", *start, *data, "--out", "t")
    assert code == 0, err
    assert "last layer: 1,000 → 10 classes, fresh: fc.weight, fc.bias" in out
    result = json.loads(Path("t/result.json").read_text())
    assert result["settings"]["normalize"] == "model"
    assert result["teacher"]["init"]["fresh"] == "fc.weight, fc.bias"
    stages("teacher-cache", *data, "--draws", 1, "--weights", "t", "--out", "c2")
    save_timm_weights("test_resnet", "other.pt", classes=1000, seed=1)
    error = stages.fails(1, "teacher", "--resume", "--out", "t", "--init", "other.pt")
    assert "was started from other weights" in error


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [
        ("none", [0.0], [1.0]),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("mean=0.5,std=0.1", [0.5], [0.1]),
        ("", None, None),
    ],
)
def test_a_student_has_a_normalisation_of_its_own(
    home: Path, stages: Stages, normalize: str, mean: list[float] | None, std: list[float] | None
) -> None:
    more = ("--normalize", normalize) if normalize else ()
    result = stages(*student(home, "--arch", "mlp:16", *more, "--out", "s"))
    spec = result["student"]["preparation"]
    teacher = json.loads((home / "c/manifest.json").read_text())["identity"]["teacher"]
    assert (spec["mean"], spec["std"]) == (mean or teacher["mean"], std or teacher["std"])
    assert compute_accuracy(home, result["student"], "s/student.pt") == result["student"]["test"]["accuracy"]
    assert stages("evaluate", "s")["0"]["test"]["accuracy"] == result["student"]["test"]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_an_exported_student_has_its_own_input(home: Path, stages: Stages, kind: str) -> None:
    save_hf_model(Path("model"), ("cat", "dog"))
    arch = TIMM if kind == "timm" else "hf:model"
    init = home / "w.pt" if kind == "timm" else "DEFAULT"
    stages(*student(home, "--arch", arch, "--init", init, "--out", "s"))
    named = () if kind == "timm" else ("--arch", arch)
    assert stages("export", "s", *named)["check"]["flips"] == 0


WRONG = [
    ("student", "--arch cnn --init none.pt", "there are no weights at 'none.pt', which --init names"),
    ("student", "--arch cnn --init DEFAULT", "--init DEFAULT is for torchvision:NAME, timm:NAME and hf:NAME"),
    ("student", "--arch mlp:8 --init w.pt", "the weights of --init w.pt do not fit the arch"),
    ("student", "--arch cnn --init w.pt", "the weights of --init w.pt do not fit the arch"),
    ("student", f"--arch {TIMM} --init folder", "'folder' is a folder without teacher.pt or student.pt"),
    ("student", f"--arch {TIMM} --init text.pt", "'text.pt' is not loaded"),
    ("student", f"--arch {TIMM} --init two.pt", "save the one to start from in a file of its own"),
    ("student", f"--arch {TIMM} --init=", "--init is empty"),
    ("student", "--arch cnn --normalize model", "--normalize model is the input published with torchvision:"),
    ("student", "--arch cnn --normalize own", "--normalize own: there are imagenet, data, none, pixels, model"),
    ("student", "--arch cnn --normalize mean=1,2,std=1", "--normalize has 2 means and 1 standard deviations"),
    ("student", "--arch timm:nope_net", "no timm model 'nope_net'"),
    ("student", "--arch hf:nowhere", "no model 'nowhere'"),
    ("student", "--arch cnn --arch mlp:8 --init w.pt", "the weights of --init w.pt do not fit the arch"),
    ("student", "--arch cnn --loss simkd:teacher=pool1,student=pool1 --init cnn.pt", "--init"),
    ("teacher", "--arch cnn --init DEFAULT", "--init DEFAULT is for torchvision:NAME"),
    ("teacher", "--arch cnn --init none.pt", "there are no weights at 'none.pt'"),
    ("teacher", "--arch cnn --init w.pt --views none:size=16", "the weights of --init w.pt do not fit the arch"),
    ("teacher", "--arch mlp:8 --normalize model", "--normalize model is the input published"),
]


@pytest.mark.parametrize(("command", "options", "words"), WRONG)
def test_wrong_inputs_are_refused_in_one_line(
    home: Path, stages: Stages, command: str, options: str, words: str
) -> None:
    Path("w.pt").symlink_to(home / "w.pt")
    Path("cnn.pt").symlink_to(home / "cnn.pt")
    Path("folder").mkdir()
    Path("text.pt").write_text("no weights")
    torch.save({"first": {"a": torch.zeros(1)}, "second": {"a": torch.zeros(1)}}, "two.pt")
    common = student(home) if command == "student" else ("teacher", "--train-size", 60, "--epochs", 1)
    code, _, err = stages.call(*common, *options.split(), "--out", "run")
    assert code in (1, 2)
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in err
    assert not Path("run").exists()
