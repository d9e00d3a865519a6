"""tune: every trial is trained once, however many processes train and die; its command trains the best again."""

import json
import re
import shlex
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

import softcache.stages.training.loop as training
import softcache.stages.tune.study as tune_study
from tests.helpers import processes
from tests.helpers.commands import Stages
from tests.helpers.processes import KILLED, Forks, list_temporary_files

forks = processes.forks
Dose = Callable[[int, int], int]
Command = tuple[object, ...]

STUDENT = ("--arch", "mlp:8", "--epochs", 4, "--batch-size", 100)
LOSSES = ("--loss", "kd:temperature=4,weight=0.9", "--loss", "hard:weight=0.1")
SPACE = (
    "--search",
    "kd.temperature=1..20:log",
    "--search",
    "hard.weight=0.1..10:log",
    "--search",
    "learning_rate=0.001..0.3:log",
)
TRIALS = 12  # the first ten are sampled at random, the others from the results of earlier ones


def tune_command(tiny: Path, out: object, *options: object) -> Command:
    return ("tune", "--cache", tiny / "cache", *STUDENT, *LOSSES, "--out", out, *options)


def read_record(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "tune.json").read_text())
    return record


def drop_seconds(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials without their seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in record["trials"]]


def read_states(storage: Path) -> list[tuple[int, int, str]]:
    """(number, slot, state) of every trial in a database, read with SQLite alone."""
    query = """select number, value_json, state from trials join trial_user_attributes
               using (trial_id) where key = 'slot' order by number"""
    with sqlite3.connect(storage) as database:
        rows = [(number, json.loads(slot), state) for number, slot, state in database.execute(query)]
    database.close()
    return rows


def assert_each_trained_once(storage: Path, trials: int) -> None:
    """Every slot has exactly one finished trial; a failed trial was replaced by another one."""
    rows = read_states(storage)
    assert [number for number, _, _ in rows] == list(range(len(rows)))
    finished = sorted(slot for _, slot, state in rows if state in ("COMPLETE", "PRUNED"))
    assert finished == list(range(trials))
    assert {state for _, _, state in rows} <= {"COMPLETE", "PRUNED", "FAIL"}


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that was never stopped; the file `seconds` beside it holds the time that it took."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    start = time.monotonic()
    forks.succeeds(*tune_command(tiny, out, *SPACE, "--trials", TRIALS))
    out.with_name("seconds").write_text(str(time.monotonic() - start))
    return out


def assert_equal_searches(out: Path, uninterrupted: Path) -> None:
    """The same trials with the same parameters, figures and weights, the same best, and no other files."""
    record, expected = read_record(out), read_record(uninterrupted)
    assert drop_seconds(record) == drop_seconds(expected)
    assert record["best"]["command"] == expected["best"]["command"]
    names = sorted(str(path.relative_to(uninterrupted)) for path in uninterrupted.glob("trial-*/*"))
    assert sorted(str(path.relative_to(out)) for path in out.glob("trial-*/*")) == names
    for path in uninterrupted.glob("trial-*/student.pt"):
        assert (out / path.relative_to(uninterrupted)).read_bytes() == path.read_bytes()
    assert list_temporary_files(out) == []
    assert list(out.rglob("*.lock")) == []


# Results


def test_a_trial_is_the_run_of_a_student_with_its_figure_on_the_validation_split(uninterrupted: Path) -> None:
    record = read_record(uninterrupted)
    complete = [row for row in record["trials"] if row["state"] == "complete"]
    for row in complete:
        result = json.loads((uninterrupted / f"trial-{row['trial']:04d}/result.json").read_text())
        assert row["value"] == result["student"]["val"]["accuracy"]
        assert row["seconds"] == result["student"]["seconds"]
        assert result["settings"]["learning_rate"] == row["parameters"]["learning_rate"]
        temperature, weight = row["parameters"]["kd.temperature"], row["parameters"]["hard.weight"]
        assert result["settings"]["loss"] == [f"kd:temperature={temperature},weight=0.9", f"hard:weight={weight}"]
    best = max(complete, key=lambda row: row["value"])
    assert record["best"]["trial"] == best["trial"]
    limits = {"kd.temperature": (1, 20), "hard.weight": (0.1, 10), "learning_rate": (0.001, 0.3)}
    for row in complete:
        assert all(limits[name][0] <= value <= limits[name][1] for name, value in row["parameters"].items())
    with Image.open(uninterrupted / "tune.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


@pytest.mark.parametrize(
    "options",
    [
        (*STUDENT[:4], "--select", "f1_macro", "--search", "batch_size=20|50", "--search", "warmup=0..0.4:step=0.1"),
        (*STUDENT, "--select", "nll", "--no-nesterov", "--finetune-epochs", 1, "--labelled", 100),
        (*STUDENT, "--recipe", "hinton-mnist", "--search", "schedule=cosine|constant"),
        (*STUDENT[2:], "--recipe", "cifar100-kd", "--schedule", "cosine", "--search", "arch=mlp:8|mlp:12,8"),
    ],
)
def test_the_command_of_the_best_trains_the_same_weights_byte_for_byte(
    tiny: Path, stages: Stages, tmp_path: Path, options: Command
) -> None:
    search = ("--search", "kd.temperature=1..8", "--trials", 4, "--out", "s")
    code, out, err = stages.call("tune", "--cache", tiny / "cache", *options, *search)
    assert code == 0, err
    command = next(line for line in out.splitlines() if line.startswith("again: "))
    again = stages(*shlex.split(command.split("-m softcache ")[1]), "--out", "again")
    best = tmp_path / f"s/trial-{read_record(tmp_path / 's')['best']['trial']:04d}"
    assert (tmp_path / "again/student.pt").read_bytes() == (best / "student.pt").read_bytes()
    student = json.loads((best / "result.json").read_text())["student"]
    for split in ("val", "test"):
        assert again["student"][split] == student[split]


def test_nll_is_minimised(tiny: Path, stages: Stages) -> None:
    record = stages(*tune_command(tiny, "s", "--search", "learning_rate=0.001|0.1", "--grid", "--select", "nll"))
    values = {row["parameters"]["learning_rate"]: row["value"] for row in record["trials"]}
    assert record["best"]["value"] == min(values.values()) < max(values.values())


def test_a_pruned_trial_is_marked_and_its_training_can_be_resumed(
    uninterrupted: Path, stages: Stages, tmp_path: Path
) -> None:
    pruned = [row for row in read_record(uninterrupted)["trials"] if row["state"] == "pruned"]
    assert pruned
    for row in pruned:
        lines = (uninterrupted / f"trial-{row['trial']:04d}/metrics.jsonl").read_text().splitlines()
        assert len(lines) == row["epochs"] < 4
        assert row["last"] == json.loads(lines[-1])["val_accuracy"]
        assert row["value"] is None
        assert not (uninterrupted / f"trial-{row['trial']:04d}/student.pt").exists()
    name = f"trial-{pruned[0]['trial']:04d}"
    shutil.copytree(uninterrupted / name, tmp_path / name)
    assert stages("student", "--resume", "--out", tmp_path / name)["student"]["epoch"] == 4


def test_without_pruning_every_trial_is_complete(tiny: Path, stages: Stages) -> None:
    rates = "learning_rate=" + "|".join(f"{10**-k:.6f}" for k in range(1, 7))
    for options, states in (((), {"complete", "pruned"}), (("--no-prune",), {"complete"})):
        command = tune_command(tiny, f"s{len(options)}", "--search", rates, "--grid", "--select", "nll", *options)
        rows = stages(*command)["trials"]
        assert {row["state"] for row in rows} == states


def test_a_trial_that_diverges_is_one_row_and_is_not_repeated(tiny: Path, stages: Stages) -> None:
    command = (
        "tune",
        "--cache",
        tiny / "cache",
        *STUDENT,
        "--loss",
        "logit_mse",
        "--search",
        "learning_rate=0.01|1e9|0.02",
        "--grid",
        "--out",
        "s",
    )
    rows = stages(*command)["trials"]
    assert [row["state"] for row in rows] == ["complete", "failed", "complete"]
    assert "diverged" in rows[1]["failed"]
    code, out, err = stages.call(*command)
    assert code == 0, err
    assert "trial 1 failed: training the student diverged" in out
    assert "2 complete, 0 pruned, 1 failed" in out
    assert "continues" not in out
    assert drop_seconds(read_record(Path("s"))) == [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# Every trial is trained once


def list_combinations(record: dict[str, Any]) -> list[tuple[float, float]]:
    return sorted((row["parameters"]["kd.weight"], row["parameters"]["hard.weight"]) for row in record["trials"])


GRID = ("--search", "kd.weight=0.1..0.7:step=0.2", "--search", "hard.weight=0|1", "--grid")
POINTS = sorted(product([0.1, 0.3, 0.5, 0.7], [0.0, 1.0]))


def test_a_grid_has_every_combination_once(tiny: Path, stages: Stages) -> None:
    assert list_combinations(stages(*tune_command(tiny, "s", *GRID))) == POINTS
    assert_each_trained_once(Path("s/study.db"), 8)


@pytest.mark.parametrize(("one_folder", "grid"), [(True, False), (False, True)])
def test_concurrent_processes_share_the_trials(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose, one_folder: bool, grid: bool
) -> None:
    for repetition in range(dose(1, 10)):
        outs = [tmp_path / f"{repetition}-{0 if one_folder else i}" for i in range(dose(2, 4))]
        database = outs[0] / "study.db" if one_folder else tmp_path / f"study-{repetition}.db"
        storage = () if one_folder else ("--storage", f"sqlite:///{database}")
        space = GRID if grid else (*SPACE, "--trials", 8)
        children = [forks.start(*tune_command(tiny, out, *space, *storage)) for out in outs]
        for child in children:
            assert child.wait() == 0, child.output
        assert_each_trained_once(database, 8)
        records = [read_record(out) for out in outs]
        assert all(record["trials"] == records[0]["trials"] for record in records)
        assert [row["trial"] for row in records[0]["trials"]] == list(range(8))
        if grid:
            assert list_combinations(records[0]) == POINTS
        trial_folders = [path for out in set(outs) for path in out.glob("trial-*")]
        assert len(trial_folders) == 8
        lines = [line for child in children for line in child.output.splitlines() if re.match(r"trial \d", line)]
        assert len(lines) == 8


def test_a_search_can_be_continued_with_more_trials(tiny: Path, stages: Stages) -> None:
    first = stages(*tune_command(tiny, "s", *SPACE, "--trials", 2))
    for lock in (".trial-0001.lock", "trial-0001/.lock"):  # as of a process that was killed at the end of its trial
        Path("s", lock).touch()
    second = stages(*tune_command(tiny, "s", *SPACE, "--trials", 4))
    assert second["trials"][:2] == first["trials"]
    assert list(Path("s").rglob("*.lock")) == []
    assert_each_trained_once(Path("s/study.db"), 4)


# Stopped and killed


def test_a_search_killed_at_random_moments_continues_to_the_same_result(
    tiny: Path, forks: Forks, uninterrupted: Path, tmp_path: Path, dose: Dose
) -> None:
    """Parameters, figures, weights and the command of the best are those of a search that was never stopped."""
    random, kills = Random(3), 0
    seconds = float(uninterrupted.with_name("seconds").read_text())
    for search_number in range(dose(1, 20)):
        out = tmp_path / str(search_number)
        command = tune_command(tiny, out, *SPACE, "--trials", TRIALS)
        for _ in range(2):
            child = forks.start(*command)
            time.sleep(random.uniform(0, seconds))
            kills += child.kill() == KILLED
        forks.succeeds(*command)
        assert_each_trained_once(out / "study.db", TRIALS)
        assert len(read_states(out / "study.db")) == TRIALS
        assert_equal_searches(out, uninterrupted)
    print(f"\na search killed {kills} times: the same trials, weights and best")
    assert kills


@pytest.mark.parametrize("moment", ["after_checkpoint", "after_report"])
def test_a_search_stopped_at_any_epoch_continues_to_the_same_result(
    tiny: Path,
    stages: Stages,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    dose: Dose,
) -> None:
    """Between the checkpoint of an epoch and its report to the study, or after it, also before a trial is pruned."""
    command, stops = tune_command(tiny, tmp_path / "s", *SPACE, "--trials", TRIALS), 0
    save, report_epochs = training.TrainState.save, tune_study.report_epochs

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    def report_and_stop(trial: Any, lines: Any, **options: Any) -> None:
        known = len(trial.storage.get_trial(trial._trial_id).intermediate_values)
        report_epochs(trial, lines, **options)
        if len(lines) > known:
            raise KeyboardInterrupt

    code = 130
    while code == 130 and stops < dose(5, 100):
        with monkeypatch.context() as patch:
            if moment == "after_checkpoint":
                patch.setattr(training.TrainState, "save", save_and_stop)
            else:
                patch.setattr("softcache.stages.tune.trials.report_epochs", report_and_stop)
            code, _, err = stages.call(*command)
        stops += code == 130
        assert code == 0 or "Error: stopped; continue with" in err
        assert code == 0 or f"--out {tmp_path / 's'}" in err
    assert stops > 4
    stages(*command)
    assert_equal_searches(tmp_path / "s", uninterrupted)


def test_the_trial_of_a_dead_process_of_another_folder_is_taken_over(
    tiny: Path, forks: Forks, tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is in the other folder: the process is dead when its heartbeats stop."""
    storage = ("--storage", f"sqlite:///{tmp_path}/study.db", "--search", "learning_rate=0.01..0.1", "--trials", 2)
    child = forks.start(*tune_command(tiny, tmp_path / "far", *storage, "--epochs", 400))
    processes.wait_until(lambda: (tmp_path / "far/trial-0000/metrics.jsonl").exists())
    assert child.kill() == KILLED
    [(_, slot, state)] = read_states(tmp_path / "study.db")
    assert (slot, state) == (0, "RUNNING")
    with sqlite3.connect(tmp_path / "study.db") as database:
        (learning_rate,) = database.execute("select param_value from trial_params").fetchone()
    database.close()
    # A search with other epochs is another search, so the record is edited to continue this one with fewer.
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("update study_user_attributes set value_json = replace(value_json, '400', '4')")
    database.close()
    monkeypatch.setattr(tune_study, "DEAD_SECONDS", 1.0)
    record = stages(*tune_command(tiny, tmp_path / "near", *storage))
    assert record["trials"][0]["parameters"]["learning_rate"] == learning_rate
    assert_each_trained_once(tmp_path / "study.db", 2)
    assert [state for _, _, state in read_states(tmp_path / "study.db")].count("FAIL") == 1


def test_a_process_that_was_taken_for_dead_stops_its_trial(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a long sleep of its machine, in which another process has started the slot again."""
    save, epochs = training.TrainState.save, [0]

    def save_and_fail_trial(*arguments: Any) -> None:
        save(*arguments)
        epochs[0] += 1
        if epochs[0] == 2:
            with sqlite3.connect("s/study.db") as database:
                database.execute("update trials set state = 'FAIL'")
            database.close()

    monkeypatch.setattr(training.TrainState, "save", save_and_fail_trial)
    code, out, err = stages.call(*tune_command(tiny, "s", "--search", "learning_rate=0.01..0.1", "--trials", 2))
    assert code == 0, err
    assert "trial 0: another process has taken it over" in out
    assert_each_trained_once(Path("s/study.db"), 2)


def test_of_two_processes_that_add_a_trial_of_one_slot_the_first_trains_it(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival adds its trial after this process has read the study and before it adds its own; then the rival dies."""
    monkeypatch.setattr(tune_study, "DEAD_SECONDS", 0.5)
    choose_parameters, rival_parameters = tune_study.SharedStudy._choose_parameters, []

    def add_rival(self: Any, slot: int) -> Any:
        parameters = choose_parameters(self, slot)
        if not rival_parameters:
            rival_parameters.append({"learning_rate": 0.0123})
            attributes = {"slot": slot, "folder": "elsewhere", "beat": 0, "claim": "rival"}
            self.study.add_trial(
                tune_study.create_trial(
                    state=tune_study.TrialState.RUNNING,
                    params=rival_parameters[0],
                    distributions=self._make_distributions(),
                    user_attrs=attributes,
                )
            )
        return parameters

    monkeypatch.setattr(tune_study.SharedStudy, "_choose_parameters", add_rival)
    record = stages(*tune_command(tiny, "s", "--search", "learning_rate=0.01..0.1", "--trials", 2))
    assert record["trials"][0]["parameters"] == rival_parameters[0]
    assert_each_trained_once(Path("s/study.db"), 2)
    assert [state for _, slot, state in read_states(Path("s/study.db")) if slot == 0] == ["FAIL", "FAIL", "COMPLETE"]


def test_a_search_that_was_stopped_is_mentioned_when_the_same_is_started_again(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    command = ("tune", "--cache", tiny / "cache", *STUDENT, *LOSSES, "--search", "learning_rate=0.01|0.1", "--grid")
    with monkeypatch.context() as patch:
        patch.setattr(training.TrainState, "save", stop)
        assert stages.call(*command)[0] == 130
    _, out, _ = stages.call(*command)
    folder = "runs/tune-digits-mlp-8-1"
    assert f"'{folder}' was stopped; continue it with" in out
    assert f" tune --out {folder} " in out
    _, out, _ = stages.call(*command, "--select", "nll")
    assert "was stopped" not in out


def test_a_search_waits_for_a_process_of_another_folder(
    tiny: Path, forks: Forks, tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_study, "HEARTBEAT_SECONDS", 0.1)
    storage = ("--storage", f"sqlite:///{tmp_path}/study.db", "--search", "learning_rate=0.01..0.1", "--trials", 1)
    child = forks.start(*tune_command(tiny, tmp_path / "far", *storage, "--epochs", 100))
    processes.wait_until(lambda: (tmp_path / "far/trial-0000/metrics.jsonl").exists())
    code, out, err = stages.call(*tune_command(tiny, tmp_path / "near", *storage, "--epochs", 100))
    assert code == 0, err
    assert child.wait() == 0, child.output
    assert "waiting for other processes, which train: 0" in out
    assert [state for _, _, state in read_states(tmp_path / "study.db")] == ["COMPLETE"]


def test_a_search_that_a_scheduler_ends_prints_one_line(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    command = tune_command(tiny, tmp_path / "s", "--search", "learning_rate=0.01..0.1", "--epochs", 2000)
    child = forks.start(*command)
    processes.wait_until(lambda: (tmp_path / "s/trial-0000/metrics.jsonl").exists())
    assert child.terminate() == 130
    assert child.error.startswith("Error: stopped; continue with")
    assert f"--out {tmp_path / 's'}" in child.error
    assert list((tmp_path / "s").rglob("*.lock")) == []


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to search"),
        (("--search", "kd"), "no setting to search 'kd'"),
        (("--search", "learningrate=1..2"), "Did you mean 'learning_rate'?"),
        (("--search", "seed=1|2"), "There are: arch, batch_size, clip_norm, ema, epochs, hard.smoothing, hard.weight"),
        (("--search", "kdd.weight=1..2"), "no loss to search 'kdd'. Did you mean 'kd'? There are: hard, kd"),
        (("--search", "kd.temprature=1..2"), "There are: standardize, temperature, weight"),
        (("--search", "kd.temperature=4"), "is not NAME=LOW..HIGH"),
        (("--search", "kd.temperature=5..5"), "5.0 is not below 5.0"),
        (("--search", "kd.temperature=5..1"), "5.0 is not below 1.0"),
        (("--search", "kd.temperature=0..5:log"), "a logarithmic range begins above 0"),
        (("--search", "kd.temperature=0..5"), "temperature=0.0 is below 0.001"),
        (("--search", "kd.temperature=a..5"), "kd.temperature=a is not a number"),
        (("--search", "kd.temperature=1..inf"), "is not finite"),
        (("--search", "kd.temperature=1..5:step=9"), "a step of 9.0 does not fit"),
        (("--search", "kd.temperature=1..5:step=0"), "a step of 0.0 does not fit"),
        (("--search", "kd.temperature=1..5:log:step=1"), "comes :log, or :step=S"),
        (("--search", "kd.temperature=1..5:lin"), "comes :log, or :step=S"),
        (("--search", "kd.temperature=1|1.0"), "a choice is given twice"),
        (("--search", "kd.standardize=1..2"), "is not a number: give choices"),
        (("--search", "kd.standardize=yes|no"), "neither true nor false"),
        (("--search", "hard.smoothing=0..2"), "smoothing=2.0 is above 1"),
        (("--search", "momentum=0..1"), "momentum 1.0 is above 0.9999"),
        (("--search", "weight_decay=-1..1"), "weight_decay -1.0 is below 0"),
        (("--search", "epochs=1..2.5"), "epochs=2.5 is not an integer"),
        (("--search", "optimizer=sgd|adam"), "no optimizer 'adam'. Did you mean 'adamw'?"),
        (("--search", "learning_rate=0.1..1", "--search", "learning-rate=1..2"), "'learning_rate' is searched twice"),
        (("--search", "learning_rate=0.1..1", "--learning-rate", 0.1), "leave out --learning-rate"),
        (("--loss", "dkd:weight=0->1", "--search", "dkd.weight=0..1"), "is a ramp in --loss 'dkd:weight=0->1'"),
        (("--search", "kd.temperature=1..5", "--grid"), "has no steps"),
        (("--search", "kd.temperature=1|5", "--grid", "--trials", 2), "leave out --trials"),
        (("--search", "kd.weight=0..1:step=0.00001", "--search", "hard.weight=0|1", "--grid"), "more than 100,000"),
        (("--search", "kd.weight=0..1", "--seeds", 2), "tune takes no --resume"),
        (("--search", "kd.weight=0..1", "--baseline"), "tune takes no --resume"),
        (("--search", "kd.weight=0..1", "--resume"), "tune takes no --resume"),
        (("--search", "kd.weight=0..1", "--storage", "nowhere"), "--storage: "),
        (("--search", "kd.weight=0..1", "--storage", "sqlite://"), "in memory is lost when its process ends"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_trained(
    tiny: Path, stages: Stages, options: Command, message: str
) -> None:
    assert message in stages.fails(2, *tune_command(tiny, "s", *options))
    assert not Path("s").exists()


def test_an_arch_or_layer_that_does_not_exist_is_refused_before_the_first_trial(tiny: Path, stages: Stages) -> None:
    command = ("tune", "--cache", tiny / "cache", "--loss", "hard", "--loss", "hint:teacher=pool1", "--out", "s")
    assert "no arch 'cmn'" in stages.fails(2, *command, "--search", "arch=cnn|cmn")
    assert "pool9" in stages.fails(1, *command, "--arch", "cnn", "--search", "hint.teacher=pool1|pool9")
    assert not Path("s").exists()


def test_another_search_in_the_same_folder_or_study_is_refused(tiny: Path, stages: Stages) -> None:
    shared = ("--storage", "sqlite:///study.db", "--search", "kd.weight=0.1|1", "--trials", 1)
    stages(*tune_command(tiny, "s", *shared))
    for options, difference in (
        (("--epochs", 5), "epochs 4 there, 5 here"),
        (("--search", "hard.weight=1|2"), "search ['kd.weight=0.1|1'] there"),
        (("--select", "nll"), "select last there, nll here"),
    ):
        error = stages.fails(1, *tune_command(tiny, "s", *shared, *options))
        assert "'s' holds a search with other settings" in error
        assert difference in error
        error = stages.fails(1, *tune_command(tiny, "other", *shared, *options))
        assert "the study 'digits-mlp-8' holds a search with other settings" in error
        assert difference in error
    stages(*tune_command(tiny, "third", *shared, "--epochs", 5, "--study", "own"))
    assert "is not the folder of a search" in stages.fails(2, *tune_command(tiny, "s/trial-0000", *shared))


# Optional packages


def test_without_optuna_the_error_names_the_package_to_install(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*sys.modules]:
        if name in (
            "softcache.stages.tune.command",
            "softcache.stages.tune.study",
            "softcache.stages.tune.summary",
            "softcache.stages.tune.trials",
        ) or name.startswith("optuna"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delattr("softcache.stages.tune.command", raising=False)
    error = stages.fails(2, *tune_command(tiny, "s", "--search", "kd.weight=0|1"))
    assert error.startswith("Error: tune needs Optuna 4.3 or later (")
    assert error.endswith("): pip install -e '.[tune]'")


def test_without_matplotlib_only_the_image_is_missing(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "softcache.stages.tune.plots", raising=False)
    monkeypatch.delattr("softcache.stages.tune.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    code, out, err = stages.call(*tune_command(tiny, "s", "--search", "kd.weight=0.1|1", "--grid"))
    assert code == 0, err
    assert "no image without matplotlib: pip install -e '.[report]'" in out
    assert not Path("s/tune.png").exists()
    assert len(read_record(Path("s"))["trials"]) == 2
