"""tune of labels, numbers and embeddings: trials are compared by the figure of the task, in its direction."""

from pathlib import Path

import pytest

from softcache.stages.tune.study import optuna
from tests.helpers.commands import Stages
from tests.helpers.task_runs import RUN


def load_direction(folder: Path) -> str:
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{folder.resolve()}/study.db")
    return str(study.direction.name).lower()


@pytest.mark.parametrize(
    ("task", "options", "figure", "sign"),
    [
        ("labels", (), "map", 1),
        ("labels", ("--select", "f1_macro"), "f1_macro", 1),
        ("numbers", (), "rmse", -1),
        ("numbers", ("--select", "r2"), "r2", 1),
        ("embedding", (), "cosine", 1),
    ],
)
def test_the_best_trial_is_best_in_the_figure_of_the_task(
    task_folder: Path, stages: Stages, task: str, options: tuple[str, ...], figure: str, sign: int
) -> None:
    command = ("tune", "--data", f"arrays:{task_folder}/{task}.npz", "--cache", task_folder / task, *RUN, *options)
    search = ("--search", "learning_rate=1e-06|0.05", "--grid", "--no-prune", "--out", "t")
    record = stages(*command, *search)
    assert record["figure"] == f"val {figure}"
    assert [row["state"] for row in record["trials"]] == ["complete", "complete"]
    values = [row["value"] for row in record["trials"]]
    assert record["best"]["value"] == max(values, key=lambda value: sign * value)
    if figure != "f1_macro":  # which fresh weights can have too
        assert record["best"]["parameters"] == {"learning_rate": 0.05}  # the other rate trains next to nothing
        assert (record["best"]["value"] - values[0]) * sign > 0
    code, out, err = stages.call(*command, *search)  # goes on with the study that is stored
    assert code == 0, err
    assert f"val {figure}" in out
    assert load_direction(Path("t")) == ("maximize" if sign > 0 else "minimize")
    assert Path(record["picture"]).is_file()


def test_a_trial_is_pruned_where_its_error_is_above_that_of_the_others(task_folder: Path, stages: Stages) -> None:
    command = ("tune", "--data", f"arrays:{task_folder}/numbers.npz", "--cache", task_folder / "numbers", *RUN)
    record = stages(*command, "--search", "learning_rate=0.05|0.04|0.03|0.02|0.01|1e-06", "--grid", "--out", "t")
    assert record["trials"][-1]["state"] == "pruned"
    assert record["best"]["state"] == "complete"


def test_a_figure_of_another_task_is_refused_by_name(task_folder: Path, stages: Stages) -> None:
    command = ("tune", "--data", f"arrays:{task_folder}/labels.npz", "--cache", task_folder / "labels", *RUN)
    search = ("--search", "learning_rate=0.01|0.05", "--grid", "--out", "t")
    assert "--select rmse is no figure of the task labels" in stages.fails(2, *command, "--select", "rmse", *search)
    assert "--recipe f1 is for one class an image" in stages.fails(2, *command, "--recipe", "f1", *search)
