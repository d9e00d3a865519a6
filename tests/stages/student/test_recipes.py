"""Recipes fill in settings; the command line goes before. The lists of recipes and losses; teachers stopped early."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from softcache.pipeline.losses import LOSSES, parse_losses
from softcache.stages.cli.configs import StudentConfig, TeacherConfig
from softcache.stages.runs.folder import parse_milestones
from softcache.stages.student.recipes import RECIPES, apply_recipe
from tests.helpers.commands import Stages


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_made_of_settings_that_a_command_would_take(name: str) -> None:
    recipe = RECIPES[name]
    defaults = asdict(StudentConfig())
    for key, value in recipe.settings.items():
        assert type(value) is type(defaults[key]), key
        knob = next(f for f in fields(StudentConfig) if f.name == key).metadata
        assert knob.get("least", value) <= value if "least" in knob else True
        assert value in knob.get("choices", (value,))
    parse_losses(recipe.settings["loss"])
    parse_milestones(apply_recipe(StudentConfig(recipe=name), set()))
    assert ("arXiv" in recipe.source) is (name != "f1"), "the mixture with F1 is of no paper, and says so"


def test_the_benchmarks_recipe_is_the_published_one() -> None:
    """240 epochs, a tenth of the learning rate after 150, 180 and 210; batches of 64, 0.05, no Nesterov."""
    filled = apply_recipe(StudentConfig(recipe="crd"), set())
    assert [share * filled.epochs for share in parse_milestones(filled)] == [150, 180, 210]
    found = (filled.batch_size, filled.learning_rate, filled.weight_decay, filled.momentum, filled.nesterov)
    assert found == (64, 0.05, 5e-4, 0.9, False)
    assert filled.loss == ("hard:weight=0.1", "kd:temperature=4,weight=0.9")


def test_what_is_said_goes_before_the_recipe_and_the_recipe_before_the_data_set(
    tiny: Path, tmp_path: Path, stages: Stages
) -> None:
    said = ("--recipe", "dkd", "--epochs", 2, "--arch", "mlp:8", "--learning-rate", 0.01)
    stages("student", "--cache", tiny / "cache", *said, "--out", tmp_path / "r")
    kept = json.loads((tmp_path / "r/settings.json").read_text())
    assert (kept["epochs"], kept["arch"], kept["learning_rate"]) == (2, "mlp:8", 0.01)
    assert (kept["batch_size"], kept["schedule"], kept["milestones"]) == (64, "step", "0.625,0.75,0.875")
    assert kept["loss"] == ["hard", "dkd:temperature=4,target=1,nontarget=8,weight=0->1@20"]


def test_f1_goes_beside_a_teacher_without_its_prior_and_not_alone(tiny: Path, stages: Stages) -> None:
    small = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2)
    result = stages(*small, "--recipe", "f1", "--out", "r")
    assert result["settings"]["map"] == "prior"
    assert result["settings"]["loss"] == ["kd:temperature=4,weight=0.5", "soft_f1:weight=0.5"]
    assert json.loads(Path("r/targets.json").read_text())["maps"][0]["map"] == "prior"
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert all({"loss_kd", "loss_soft_f1", "val_f1_macro"} <= set(line) for line in lines)
    warning = "soft_f1 alone forgets rare classes: put kd or hard beside it, see --recipe f1"
    assert warning not in stages.call(*small, "--recipe", "f1")[1]
    assert warning in stages.call(*small, "--loss", "soft_f1")[1]


def test_a_recipe_that_there_is_none_of_is_refused(tiny: Path, stages: Stages) -> None:
    assert "Did you mean 'ls-kd'" in stages.fails(2, "student", "--cache", tiny / "cache", "--recipe", "lskd")


@pytest.mark.parametrize("text", ["", "0", "1", "0.5,1.5", "half", "0.5,", "nan"])
def test_milestones_that_are_no_shares_are_refused_before_a_folder_is_made(
    tiny: Path, tmp_path: Path, stages: Stages, text: str
) -> None:
    stages.fails(
        2, "student", "--cache", tiny / "cache", "--arch", "mlp:8", "--milestones", text, "--out", tmp_path / "r"
    )
    assert not (tmp_path / "r").exists()


def test_the_lists_name_every_recipe_and_every_loss_with_its_knobs(stages: Stages) -> None:
    assert set(stages("recipes")) == set(RECIPES)
    listed = stages("losses")
    assert set(listed) == set(LOSSES)
    assert listed["kd"]["knobs"] == {"weight": 1.0, "temperature": 4.0, "standardize": "false"}
    assert listed["srrl"]["reads"] == ["logits", "taps (pool)", "the teacher's last layer"]
    assert listed["ctkd"]["knobs"]["reversal"] == "0->1@10"
    for command in ("recipes", "losses"):
        code, out, _ = stages.call(command)
        assert code == 0
        assert all(name in out for name in (RECIPES if command == "recipes" else LOSSES))


def test_the_knobs_that_are_listed_can_be_given_back() -> None:
    """The list's defaults, written as a loss on the command line, are that loss."""
    from softcache.stages.student.list_losses import _record

    for name, loss in LOSSES.items():
        knobs = ",".join(f"{k}={v}" for k, v in _record(loss)["knobs"].items() if v != "")
        assert parse_losses((f"{name}:{knobs}",)) == (loss,)


def test_weights_are_kept_every_so_many_epochs_and_can_teach(tmp_path: Path, stages: Stages) -> None:
    """A teacher stopped early: the weights after an epoch are those of a training of so many epochs."""
    common = ("teacher", "--train-size", 150, "--arch", "mlp:8", "--schedule", "constant", "--warmup", 0)
    stages(*common, "--epochs", 5, "--keep-every", 2, "--out", tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t").glob("*.pt")) == [
        "teacher-0002.pt",
        "teacher-0004.pt",
        "teacher.pt",
    ]
    stages(*common, "--epochs", 2, "--out", tmp_path / "short")
    early, short = (
        torch.load(p, weights_only=True) for p in (tmp_path / "t/teacher-0002.pt", tmp_path / "short/teacher.pt")
    )
    assert all(torch.equal(early[name], short[name]) for name in short)
    asked = ("teacher-cache", "--train-size", 150, "--teacher", "mlp:8", "--weights", tmp_path / "t/teacher-0002.pt")
    assert stages(*asked, "--out", tmp_path / "c")["draws"] == 1


def test_teachers_take_milestones_too() -> None:
    assert parse_milestones(TeacherConfig()) == [0.5, 0.75]
