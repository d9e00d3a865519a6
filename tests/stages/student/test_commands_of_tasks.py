"""Commands that train several students, of labels, numbers and embeddings; what a task does not have is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from softcache.base.errors import UsageError
from softcache.data.tasks import TASKS
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.losses import LOSSES, check_task
from softcache.pipeline.metrics.tasks import evaluate_task
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.runs.logits import read_logits
from softcache.stages.student.methods import METHODS, list_methods
from softcache.stages.student.requirements import parse_student_losses
from tests.helpers.commands import Stages
from tests.helpers.task_runs import RUN

FOREIGN = [(task, name) for task in TASKS for name, loss in LOSSES.items() if task not in loss.tasks]
MAIN = {"labels": "map", "numbers": "rmse"}


@pytest.mark.parametrize(("task", "name"), FOREIGN)
def test_a_loss_that_a_task_does_not_know_is_refused_in_one_line(task: str, name: str) -> None:
    with pytest.raises(UsageError) as error:
        check_task((LOSSES[name],), task)
    text = str(error.value)
    assert text.startswith(f"loss '{name}' is for ")
    assert f"and the task here is {task}: " in text
    assert "\n" not in text
    assert all(task in LOSSES[other].tasks for other in text.rpartition(": ")[2].split(", "))


@pytest.mark.parametrize(("task", "name"), [("labels", "kd"), ("numbers", "kd_sigmoid"), ("embedding", "mse")])
def test_a_student_checks_its_losses_against_the_task_of_its_cache(task_folder: Path, task: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"loss '{name}' is for .*, and the task here is {task}"):
        parse_student_losses(StudentConfig(loss=(name,), epochs=1), CacheReader(task_folder / task))


@pytest.mark.parametrize("task", ["labels", "numbers", "embedding"])
@pytest.mark.parametrize(
    "option", [("--recipe", "f1"), ("--map", "temperature"), ("--combine", "vote"), ("--sampler", "sqrt")]
)
def test_an_option_for_classes_is_refused_in_one_line(
    task_folder: Path, stages: Stages, task: str, option: tuple[str, str]
) -> None:
    error = stages.fails(
        2, "student", "--data", f"arrays:{task_folder}/{task}.npz", "--cache", task_folder / task, *option
    )
    assert f" is for one class an image, and the task here is {task}: leave it out" in error
    assert option[0] in error
    assert len(error.splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize("task", ["labels", "numbers", "embedding"])
def test_commands_of_classes_are_refused_before_anything_is_written(
    task_folder: Path, stages: Stages, task: str
) -> None:
    cache, data = task_folder / task, ("--data", f"arrays:{task_folder}/{task}.npz")
    commands: list[tuple[object, ...]] = [("inspect", cache)]
    if task == "embedding":
        commands += [("methods", *data, "--cache", cache), ("born-again", *data, "--cache", cache)]
    for command in commands:
        error = stages.fails(2, *command, "--out", "out")
        assert task in error
        assert len(error.splitlines()) == 1
        assert not Path("out").exists()


@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_methods_runs_the_losses_of_the_task(task_folder: Path, stages: Stages, task: str) -> None:
    cache, data = task_folder / task, f"arrays:{task_folder}/{task}.npz"
    soft = {"labels": "kd_sigmoid", "numbers": "kd_mse"}[task]
    command = ("methods", "--data", data, "--cache", cache, *RUN, "--only", soft, "--time-steps", 1, "--out", "m")
    code, out, err = stages.call(*command)
    assert code == 0, err
    record = json.loads(Path("m/methods.json").read_text())
    hard, other = record["methods"]
    assert (record["task"], hard["method"], other["method"]) == (task, "hard", soft)
    result = json.loads(Path(f"m/{soft}/result.json").read_text())
    value = result["student"]["test"][MAIN[task]]
    assert other[MAIN[task]]["test"] == value
    assert f"| {soft} | {value:.4f} |" in out
    assert ("(lower is better)" in out) is (task == "numbers")
    assert "accuracy" not in out
    assert "no method 'kd'" in stages.fails(2, *command[:-6], "--only", "kd", "--out", "n")


def test_every_method_of_a_task_is_of_its_losses() -> None:
    assert list_methods("classes") is METHODS
    for task in ("labels", "numbers"):
        methods = list_methods(task)
        assert next(iter(methods)) == "hard"
        assert {"hint", {"labels": "kd_sigmoid", "numbers": "kd_mse"}[task]} <= methods.keys()
        for specs in methods.values():
            assert all(task in LOSSES[spec.partition(":")[0]].tasks for spec in specs)


@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_a_chain_of_students_ends_in_an_ensemble_of_the_task(task_folder: Path, stages: Stages, task: str) -> None:
    data = ("--data", f"arrays:{task_folder}/{task}.npz", "--cache", task_folder / task)
    result = stages("born-again", *data, *RUN, "--generations", 2, "--out", "b")
    logits = [read_logits(Path(f"b/generation-{g}/logits.safetensors"))["test"] for g in (1, 2)]
    outputs = np.stack([each.logits.astype(np.float64) for each in logits])
    if task == "labels":
        p = (1 / (1 + np.exp(-outputs))).mean(0)
        expected = np.log(p / (1 - p))
    else:
        expected = outputs.mean(0)
    figures = evaluate_task(task, expected.astype(np.float32), logits[0].labels)
    assert result["ensemble"]["test"][MAIN[task]] == pytest.approx(figures[MAIN[task]], rel=1e-5)
    assert result["task"] == task
    code, out, _ = stages.call("born-again", *data, *RUN, "--generations", 2, "--out", "b")
    assert code == 0
    assert re.search(r"ensemble of all 2: test (mAP|RMSE) \d", out)
    assert "accuracy" not in out


def test_several_students_of_numbers_end_in_a_table_of_their_figures(task_folder: Path, stages: Stages) -> None:
    data = ("--data", f"arrays:{task_folder}/numbers.npz", "--cache", task_folder / "numbers")
    code, out, err = stages.call("student", *data, *RUN, "--seed", 1, "--seed", 2, "--out", "s")
    assert code == 0, err
    assert re.search(r"test split +RMSE +MAE", out)
    assert "They differ only in seeds" in out
    lines = [json.loads(Path(f"s/seed-{seed}/metrics.jsonl").read_text().splitlines()[-1]) for seed in (1, 2)]
    best = min(lines, key=lambda line: float(line["val_rmse"]))
    assert re.search(rf"best seed-[12], epoch 3/3: .*val RMSE {best['val_rmse']:.4g}", err)


def test_a_trained_teacher_prints_the_figures_of_its_task(task_folder: Path, stages: Stages) -> None:
    for task, figure in (("labels", "mAP 0"), ("numbers", "RMSE ")):
        data = ("--data", f"arrays:{task_folder}/{task}.npz")
        code, out, err = stages.call("teacher", *data, "--arch", "mlp:4", "--epochs", 1, "--out", task)
        assert code == 0, err
        assert f"teacher mlp:4: {figure}" in out
        assert json.loads(Path(task, "result.json").read_text())["task"] == task
