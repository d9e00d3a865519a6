"""Recipes, over which typed options take precedence; the lists of recipes and losses; weights kept during training."""

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
def test_a_recipe_has_values_that_the_command_line_takes(name: str) -> None:
    recipe = RECIPES[name]
    defaults = asdict(StudentConfig())
    for key, value in recipe.settings.items():
        assert type(value) is type(defaults[key]), key
        limits = next(f for f in fields(StudentConfig) if f.name == key).metadata
        assert limits.get("least", value) <= value if "least" in limits else True
        assert value in limits.get("choices", (value,))
    parse_losses(recipe.settings["loss"])
    parse_milestones(apply_recipe(StudentConfig(recipe=name), set()))
    assert ("arXiv" in recipe.source) is (name != "f1"), "the recipe with F1 is not from a paper, as its source states"


def test_the_recipe_of_the_benchmark_is_the_published_one() -> None:
    """240 epochs, a tenth of the learning rate after 150, 180 and 210; batches of 64, rate 0.05, no Nesterov."""
    config = apply_recipe(StudentConfig(recipe="cifar100-kd"), set())
    assert [share * config.epochs for share in parse_milestones(config)] == [150, 180, 210]
    optimizer = (config.batch_size, config.learning_rate, config.weight_decay, config.momentum, config.nesterov)
    assert optimizer == (64, 0.05, 5e-4, 0.9, False)
    assert config.loss == ("hard:weight=0.1", "kd:temperature=4,weight=0.9")


def test_typed_options_take_precedence_over_the_recipe_and_the_recipe_over_the_data_set(
    tiny: Path, tmp_path: Path, stages: Stages
) -> None:
    options = ("--recipe", "dkd", "--epochs", 2, "--arch", "mlp:8", "--learning-rate", 0.01)
    stages("student", "--cache", tiny / "cache", *options, "--out", tmp_path / "r")
    saved = json.loads((tmp_path / "r/settings.json").read_text())
    assert (saved["epochs"], saved["arch"], saved["learning_rate"]) == (2, "mlp:8", 0.01)
    assert (saved["batch_size"], saved["schedule"], saved["milestones"]) == (64, "step", "0.625,0.75,0.875")
    assert saved["loss"] == ["hard", "dkd:temperature=4,target=1,nontarget=8,weight=0->1@20"]


def test_the_f1_recipe_removes_the_prior_and_soft_f1_alone_gets_a_warning(tiny: Path, stages: Stages) -> None:
    command = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2)
    result = stages(*command, "--recipe", "f1", "--out", "r")
    assert result["settings"]["map"] == "prior"
    assert result["settings"]["loss"] == ["kd:temperature=4,weight=0.5", "soft_f1:weight=0.5"]
    assert json.loads(Path("r/targets.json").read_text())["maps"][0]["map"] == "prior"
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert all({"loss_kd", "loss_soft_f1", "val_f1_macro"} <= set(line) for line in lines)
    warning = "soft_f1 alone forgets rare classes: add kd or hard, see --recipe f1"
    assert warning not in stages.call(*command, "--recipe", "f1")[1]
    assert warning in stages.call(*command, "--loss", "soft_f1")[1]


def test_hinton_s_recipe_has_the_hard_targets_too() -> None:
    """Section 3 adds the soft targets to the task; the hard targets have the considerably lower weight."""
    config = apply_recipe(StudentConfig(recipe="hinton-mnist"), set())
    weights = {loss.name: loss.weight for loss in parse_losses(config.loss)}
    assert weights == {"hard": 0.1, "kd": 0.9}


def test_a_name_that_promised_more_than_its_losses_is_refused_with_the_new_one(tiny: Path, stages: Stages) -> None:
    error = stages.fails(2, "student", "--cache", tiny / "cache", "--recipe", "crd")
    assert "--recipe cifar100-kd" in error
    assert "--loss crd:teacher=LAYER,student=LAYER" in error


def test_a_recipe_that_is_named_after_a_loss_has_that_loss() -> None:
    for name in set(RECIPES) & set(LOSSES):
        assert name in {loss.name for loss in parse_losses(RECIPES[name].settings["loss"])}


def test_an_unknown_recipe_is_refused(tiny: Path, stages: Stages) -> None:
    assert "Did you mean 'ls-kd'" in stages.fails(2, "student", "--cache", tiny / "cache", "--recipe", "lskd")


@pytest.mark.parametrize("text", ["", "0", "1", "0.5,1.5", "half", "0.5,", "nan"])
def test_milestones_outside_0_to_1_are_refused_before_a_folder_is_made(
    tiny: Path, tmp_path: Path, stages: Stages, text: str
) -> None:
    stages.fails(
        2, "student", "--cache", tiny / "cache", "--arch", "mlp:8", "--milestones", text, "--out", tmp_path / "r"
    )
    assert not (tmp_path / "r").exists()


def test_the_lists_name_every_recipe_and_every_loss_with_its_parameters(stages: Stages) -> None:
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


def test_the_listed_parameters_parse_to_the_same_loss(stages: Stages) -> None:
    """The listed defaults, written as a loss on the command line, are that loss."""
    listed = stages("losses")
    for name, loss in LOSSES.items():
        parameters = ",".join(f"{k}={v}" for k, v in listed[name]["knobs"].items() if v != "")
        assert parse_losses((f"{name}:{parameters}",)) == (loss,)


def test_keep_every_writes_the_weights_of_every_nth_epoch_which_can_be_a_teacher(
    tmp_path: Path, stages: Stages
) -> None:
    """A teacher stopped early: the weights after n epochs are those of a training of n epochs."""
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
    options = ("--train-size", 150, "--teacher", "mlp:8", "--weights", tmp_path / "t/teacher-0002.pt")
    assert stages("teacher-cache", *options, "--out", tmp_path / "c")["draws"] == 1


def test_teachers_have_milestones_too() -> None:
    assert parse_milestones(TeacherConfig()) == [0.5, 0.75]
