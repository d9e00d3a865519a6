"""The search: every trial once, whoever trains it and whatever kills it; the best comes out again from its command."""

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
import softcache.stages.tune.study as shared_study
from tests.helpers import processes
from tests.helpers.commands import Stages
from tests.helpers.processes import KILLED, Forks, list_temporary_files

forks = processes.forks
Dose = Callable[[int, int], int]
Words = tuple[object, ...]

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
TRIALS = 12  # the first ten are drawn blindly, the others from what is known


def search(tiny: Path, out: object, *more: object) -> Words:
    return ("tune", "--cache", tiny / "cache", *STUDENT, *LOSSES, "--out", out, *more)


def record_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "tune.json").read_text())
    return found


def found_by(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials without their seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in record["trials"]]


def states_of(storage: Path) -> list[tuple[int, int, str]]:
    """(number, slot, state) of every trial in a database, read with SQLite alone."""
    asked = """select number, value_json, state from trials join trial_user_attributes
               using (trial_id) where key = 'slot' order by number"""
    with sqlite3.connect(storage) as database:
        rows = [(number, json.loads(slot), state) for number, slot, state in database.execute(asked)]
    database.close()
    return rows


def assert_once_each(storage: Path, trials: int) -> None:
    """Every slot is held by one trial that is over; what failed gave way to another."""
    rows = states_of(storage)
    assert [number for number, _, _ in rows] == list(range(len(rows)))
    over = sorted(slot for _, slot, state in rows if state in ("COMPLETE", "PRUNED"))
    assert over == list(range(trials))
    assert {state for _, _, state in rows} <= {"COMPLETE", "PRUNED", "FAIL"}


@pytest.fixture(scope="module")
def whole(tiny: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nobody has disturbed; `seconds` beside it are those that it took."""
    out = tmp_path_factory.mktemp("whole") / "out"
    begun = time.monotonic()
    forks.succeeds(*search(tiny, out, *SPACE, "--trials", TRIALS))
    out.with_name("seconds").write_text(str(time.monotonic() - begun))
    return out


def assert_equal_searches(out: Path, whole: Path) -> None:
    """The same trials with the same parameters, figures and weights, the same best, nothing besides."""
    mine, theirs = record_of(out), record_of(whole)
    assert found_by(mine) == found_by(theirs)
    assert mine["best"]["command"] == theirs["best"]["command"]
    names = sorted(str(path.relative_to(whole)) for path in whole.glob("trial-*/*"))
    assert sorted(str(path.relative_to(out)) for path in out.glob("trial-*/*")) == names
    for path in whole.glob("trial-*/student.pt"):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert list_temporary_files(out) == []
    assert list(out.rglob("*.lock")) == []


# What it finds


def test_a_trial_is_a_students_run_and_its_figure_that_of_the_validation_split(whole: Path) -> None:
    record = record_of(whole)
    done = [row for row in record["trials"] if row["state"] == "complete"]
    for row in done:
        result = json.loads((whole / f"trial-{row['trial']:04d}/result.json").read_text())
        assert row["value"] == result["student"]["val"]["accuracy"]
        assert row["seconds"] == result["student"]["seconds"]
        assert result["settings"]["learning_rate"] == row["parameters"]["learning_rate"]
        temperature, weight = row["parameters"]["kd.temperature"], row["parameters"]["hard.weight"]
        assert result["settings"]["loss"] == [f"kd:temperature={temperature},weight=0.9", f"hard:weight={weight}"]
    best = max(done, key=lambda row: row["value"])
    assert record["best"]["trial"] == best["trial"]
    limits = {"kd.temperature": (1, 20), "hard.weight": (0.1, 10), "learning_rate": (0.001, 0.3)}
    assert all(limits[n][0] <= v <= limits[n][1] for row in done for n, v in row["parameters"].items())
    with Image.open(whole / "tune.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


@pytest.mark.parametrize(
    "more",
    [
        (*STUDENT[:4], "--select", "f1_macro", "--search", "batch_size=20|50", "--search", "warmup=0..0.4:step=0.1"),
        (*STUDENT, "--select", "nll", "--no-nesterov", "--finetune-epochs", 1, "--labelled", 100),
        (*STUDENT, "--recipe", "hinton-mnist", "--search", "schedule=cosine|constant"),
        (*STUDENT[2:], "--recipe", "crd", "--schedule", "cosine", "--search", "arch=mlp:8|mlp:12,8"),
    ],
)
def test_the_command_of_the_best_gives_its_weights_again_byte_for_byte(
    tiny: Path, stages: Stages, tmp_path: Path, more: Words
) -> None:
    searched = ("--search", "kd.temperature=1..8", "--trials", 4, "--out", "s")
    code, out, err = stages.call("tune", "--cache", tiny / "cache", *more, *searched)
    assert code == 0, err
    command = next(line for line in out.splitlines() if line.startswith("again: "))
    again = stages(*shlex.split(command.split("-m softcache ")[1]), "--out", "again")
    best = tmp_path / f"s/trial-{record_of(tmp_path / 's')['best']['trial']:04d}"
    assert (tmp_path / "again/student.pt").read_bytes() == (best / "student.pt").read_bytes()
    kept = json.loads((best / "result.json").read_text())["student"]
    assert {s: again["student"][s] for s in ("val", "test")} == {s: kept[s] for s in ("val", "test")}


def test_nll_is_made_small(tiny: Path, stages: Stages) -> None:
    record = stages(*search(tiny, "s", "--search", "learning_rate=0.001|0.1", "--grid", "--select", "nll"))
    values = {row["parameters"]["learning_rate"]: row["value"] for row in record["trials"]}
    assert record["best"]["value"] == min(values.values()) < max(values.values())


def test_a_pruned_trial_is_marked_and_can_be_trained_to_its_end(whole: Path, stages: Stages, tmp_path: Path) -> None:
    pruned = [row for row in record_of(whole)["trials"] if row["state"] == "pruned"]
    assert pruned
    for row in pruned:
        lines = (whole / f"trial-{row['trial']:04d}/metrics.jsonl").read_text().splitlines()
        assert len(lines) == row["epochs"] < 4
        assert row["last"] == json.loads(lines[-1])["val_accuracy"]
        assert row["value"] is None
        assert not (whole / f"trial-{row['trial']:04d}/student.pt").exists()
    name = f"trial-{pruned[0]['trial']:04d}"
    shutil.copytree(whole / name, tmp_path / name)
    assert stages("student", "--resume", "--out", tmp_path / name)["student"]["epoch"] == 4


def test_without_pruning_every_trial_comes_to_its_end(tiny: Path, stages: Stages) -> None:
    rates = "learning_rate=" + "|".join(f"{10**-k:.6f}" for k in range(1, 7))
    for more, states in (((), {"complete", "pruned"}), (("--no-prune",), {"complete"})):
        rows = stages(*search(tiny, f"s{len(more)}", "--search", rates, "--grid", "--select", "nll", *more))["trials"]
        assert {row["state"] for row in rows} == states


def test_a_trial_that_diverges_is_one_row_and_not_tried_again(tiny: Path, stages: Stages) -> None:
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
    assert "goes on" not in out
    assert found_by(record_of(Path("s"))) == [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# Every trial once


def combinations(record: dict[str, Any]) -> list[tuple[float, float]]:
    return sorted((row["parameters"]["kd.weight"], row["parameters"]["hard.weight"]) for row in record["trials"])


GRID = ("--search", "kd.weight=0.1..0.7:step=0.2", "--search", "hard.weight=0|1", "--grid")
POINTS = sorted(product([0.1, 0.3, 0.5, 0.7], [0.0, 1.0]))


def test_a_grid_is_every_combination_once(tiny: Path, stages: Stages) -> None:
    assert combinations(stages(*search(tiny, "s", *GRID))) == POINTS
    assert_once_each(Path("s/study.db"), 8)


@pytest.mark.parametrize(("one_folder", "grid"), [(True, False), (False, True)])
def test_processes_at_once_share_the_trials(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose, one_folder: bool, grid: bool
) -> None:
    for again in range(dose(1, 10)):
        outs = [tmp_path / f"{again}-{0 if one_folder else i}" for i in range(dose(2, 4))]
        database = outs[0] / "study.db" if one_folder else tmp_path / f"study-{again}.db"
        storage = () if one_folder else ("--storage", f"sqlite:///{database}")
        space = GRID if grid else (*SPACE, "--trials", 8)
        children = [forks.start(*search(tiny, out, *space, *storage)) for out in outs]
        for child in children:
            assert child.wait() == 0, child.output
        assert_once_each(database, 8)
        records = [record_of(out) for out in outs]
        assert all(record["trials"] == records[0]["trials"] for record in records)
        assert [row["trial"] for row in records[0]["trials"]] == list(range(8))
        if grid:
            assert combinations(records[0]) == POINTS
        trained = [path for out in set(outs) for path in out.glob("trial-*")]
        assert len(trained) == 8
        said = [line for child in children for line in child.output.splitlines() if re.match(r"trial \d", line)]
        assert len(said) == 8


def test_more_trials_may_be_asked_for_later(tiny: Path, stages: Stages) -> None:
    first = stages(*search(tiny, "s", *SPACE, "--trials", 2))
    for lock in (".trial-0001.lock", "trial-0001/.lock"):  # as of a process that was killed when its trial was over
        Path("s", lock).touch()
    more = stages(*search(tiny, "s", *SPACE, "--trials", 4))
    assert more["trials"][:2] == first["trials"]
    assert list(Path("s").rglob("*.lock")) == []
    assert_once_each(Path("s/study.db"), 4)


# Killed


def test_killed_at_random_moments_it_goes_on_to_the_same_search(
    tiny: Path, forks: Forks, whole: Path, tmp_path: Path, dose: Dose
) -> None:
    """Parameters, figures, weights and the command of the best are those of the search that nobody disturbed."""
    random, kills = Random(3), 0
    seconds = float(whole.with_name("seconds").read_text())
    for search_number in range(dose(1, 20)):
        out = tmp_path / str(search_number)
        command = search(tiny, out, *SPACE, "--trials", TRIALS)
        for _ in range(2):
            child = forks.start(*command)
            time.sleep(random.uniform(0, seconds))
            kills += child.kill() == KILLED
        forks.succeeds(*command)
        assert_once_each(out / "study.db", TRIALS)
        assert len(states_of(out / "study.db")) == TRIALS
        assert_equal_searches(out, whole)
    print(f"\na search killed {kills} times: the same trials, weights and best")
    assert kills


@pytest.mark.parametrize("moment", ["kept", "told"])
def test_stopped_at_any_epoch_it_goes_on_to_the_same_search(
    tiny: Path, stages: Stages, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, dose: Dose
) -> None:
    """Between an epoch's checkpoint and the word to the study of it, or after: also where a trial is to be pruned."""
    command, stops = search(tiny, tmp_path / "s", *SPACE, "--trials", TRIALS), 0
    keep, follow = training.TrainState.save, shared_study.report_epochs

    def keeping(*arguments: Any) -> None:
        keep(*arguments)
        raise KeyboardInterrupt

    def following(trial: Any, lines: Any, *arguments: Any) -> None:
        known = len(trial.storage.get_trial(trial._trial_id).intermediate_values)
        follow(trial, lines, *arguments)
        if len(lines) > known:
            raise KeyboardInterrupt

    code = 130
    while code == 130 and stops < dose(5, 100):
        with monkeypatch.context() as patch:
            if moment == "kept":
                patch.setattr(training.TrainState, "save", keeping)
            else:
                patch.setattr("softcache.stages.tune.command.report_epochs", following)
            code, _, err = stages.call(*command)
        stops += code == 130
        assert code == 0 or f"Error: stopped; the same command with --out {tmp_path / 's'} goes on" in err
    assert stops > 4
    stages(*command)
    assert_equal_searches(tmp_path / "s", whole)


def test_a_trial_of_a_dead_process_elsewhere_is_taken_over(
    tiny: Path, forks: Forks, tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has another folder, so its lock is not seen: that it counts no more says so."""
    storage = ("--storage", f"sqlite:///{tmp_path}/study.db", "--search", "learning_rate=0.01..0.1", "--trials", 2)
    child = forks.start(*search(tiny, tmp_path / "far", *storage, "--epochs", 400))
    processes.wait_until(lambda: (tmp_path / "far/trial-0000/metrics.jsonl").exists())
    assert child.kill() == KILLED
    [(_, slot, state)] = states_of(tmp_path / "study.db")
    assert (slot, state) == (0, "RUNNING")
    with sqlite3.connect(tmp_path / "study.db") as database:
        (chosen,) = database.execute("select param_value from trial_params").fetchone()
    database.close()
    # The same search with fewer epochs would be another one: only the record of it is made the same.
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("update study_user_attributes set value_json = replace(value_json, '400', '4')")
    database.close()
    monkeypatch.setattr(shared_study, "DEAD_SECONDS", 1.0)
    record = stages(*search(tiny, tmp_path / "near", *storage))
    assert record["trials"][0]["parameters"]["learning_rate"] == chosen
    assert_once_each(tmp_path / "study.db", 2)
    assert [state for _, _, state in states_of(tmp_path / "study.db")].count("FAIL") == 1


def test_a_process_that_was_taken_for_dead_gives_its_trial_up(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a long sleep of its machine: another has begun the slot anew."""
    keep, epochs = training.TrainState.save, []

    def keeping(*arguments: Any) -> None:
        keep(*arguments)
        epochs.append(arguments)
        if len(epochs) == 2:
            with sqlite3.connect("s/study.db") as database:
                database.execute("update trials set state = 'FAIL'")
            database.close()

    monkeypatch.setattr(training.TrainState, "save", keeping)
    code, out, err = stages.call(*search(tiny, "s", "--search", "learning_rate=0.01..0.1", "--trials", 2))
    assert code == 0, err
    assert "trial 0: another process has taken it over" in out
    assert_once_each(Path("s/study.db"), 2)


def test_of_two_that_begin_a_slot_at_once_the_first_has_it(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival adds its trial after this process has looked and before it adds its own; then the rival dies."""
    monkeypatch.setattr(shared_study, "DEAD_SECONDS", 0.5)
    parameters, rival = shared_study.SharedStudy._parameters, []

    def slow(self: Any, slot: int) -> Any:
        found = parameters(self, slot)
        if not rival:
            rival.append({"learning_rate": 0.0123})
            attributes = {"slot": slot, "folder": "elsewhere", "beat": 0, "claim": "rival"}
            self.study.add_trial(
                shared_study.create_trial(
                    state=shared_study.TrialState.RUNNING,
                    params=rival[0],
                    distributions=self._distributions(),
                    user_attrs=attributes,
                )
            )
        return found

    monkeypatch.setattr(shared_study.SharedStudy, "_parameters", slow)
    record = stages(*search(tiny, "s", "--search", "learning_rate=0.01..0.1", "--trials", 2))
    assert record["trials"][0]["parameters"] == rival[0]
    assert_once_each(Path("s/study.db"), 2)
    assert [state for _, slot, state in states_of(Path("s/study.db")) if slot == 0] == ["FAIL", "FAIL", "COMPLETE"]


def test_a_search_that_was_stopped_is_mentioned_when_another_is_begun(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    command = [word for word in search(tiny, "", "--search", "learning_rate=0.01|0.1", "--grid") if word != ""]
    command.remove("--out")
    with monkeypatch.context() as patch:
        patch.setattr(training.TrainState, "save", stopped)
        assert stages.call(*command)[0] == 130
    _, out, _ = stages.call(*command)
    assert (
        "'runs/tune-digits-mlp-8-1' was stopped; the same command with --out runs/tune-digits-mlp-8-1 goes on" in out
    )
    _, out, _ = stages.call(*command, "--select", "nll")
    assert "was stopped" not in out


def test_a_process_that_lives_elsewhere_is_waited_for(
    tiny: Path, forks: Forks, tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_study, "BEAT_SECONDS", 0.1)
    storage = ("--storage", f"sqlite:///{tmp_path}/study.db", "--search", "learning_rate=0.01..0.1", "--trials", 1)
    child = forks.start(*search(tiny, tmp_path / "far", *storage, "--epochs", 100))
    processes.wait_until(lambda: (tmp_path / "far/trial-0000/metrics.jsonl").exists())
    code, out, err = stages.call(*search(tiny, tmp_path / "near", *storage, "--epochs", 100))
    assert code == 0, err
    assert child.wait() == 0, child.output
    assert "waiting for other processes, which train: 0" in out
    assert [state for _, _, state in states_of(tmp_path / "study.db")] == ["COMPLETE"]


def test_a_scheduler_that_ends_it_gets_one_line(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    command = search(tiny, tmp_path / "s", "--search", "learning_rate=0.01..0.1", "--epochs", 2000)
    child = forks.start(*command)
    processes.wait_until(lambda: (tmp_path / "s/trial-0000/metrics.jsonl").exists())
    assert child.terminate() == 130
    assert child.error == f"Error: stopped; the same command with --out {tmp_path / 's'} goes on"
    assert list((tmp_path / "s").rglob("*.lock")) == []


# What is refused


@pytest.mark.parametrize(
    ("more", "says"),
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
        (("--search", "kd.standardize=1..2"), "is no number: give choices"),
        (("--search", "kd.standardize=yes|no"), "neither true nor false"),
        (("--search", "hard.smoothing=0..2"), "smoothing=2.0 is above 1"),
        (("--search", "momentum=0..1"), "momentum 1.0 is above 0.9999"),
        (("--search", "weight_decay=-1..1"), "weight_decay -1.0 is below 0"),
        (("--search", "epochs=1..2.5"), "epochs=2.5 is not a whole number"),
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
        (("--search", "kd.weight=0..1", "--storage", "sqlite://"), "in memory is gone with its process"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_trained(tiny: Path, stages: Stages, more: Words, says: str) -> None:
    assert says in stages.fails(2, *search(tiny, "s", *more))
    assert not Path("s").exists()


def test_an_arch_or_layer_that_does_not_exist_is_found_before_the_first_trial(tiny: Path, stages: Stages) -> None:
    base = ("tune", "--cache", tiny / "cache", "--loss", "hard", "--loss", "hint:teacher=pool1", "--out", "s")
    assert "no arch 'cmn'" in stages.fails(2, *base, "--search", "arch=cnn|cmn")
    assert "pool9" in stages.fails(1, *base, "--arch", "cnn", "--search", "hint.teacher=pool1|pool9")
    assert not Path("s").exists()


def test_another_search_in_the_same_folder_or_study_is_refused(tiny: Path, stages: Stages) -> None:
    shared = ("--storage", "sqlite:///study.db", "--search", "kd.weight=0.1|1", "--trials", 1)
    stages(*search(tiny, "s", *shared))
    for more, differs in (
        (("--epochs", 5), "epochs 4 there, 5 asked"),
        (("--search", "hard.weight=1|2"), "search ['kd.weight=0.1|1'] there"),
        (("--select", "nll"), "select last there, nll asked"),
    ):
        said = stages.fails(1, *search(tiny, "s", *shared, *more))
        assert "'s' was begun otherwise" in said
        assert differs in said
        said = stages.fails(1, *search(tiny, "other", *shared, *more))
        assert "the study 'digits-mlp-8' was begun otherwise" in said
        assert differs in said
    stages(*search(tiny, "third", *shared, "--epochs", 5, "--study", "own"))
    assert "is no search" in stages.fails(2, *search(tiny, "s/trial-0000", *shared))


# What may be missing


def test_without_optuna_one_line_says_how_to_get_it(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*sys.modules]:
        if name in (
            "softcache.stages.tune.command",
            "softcache.stages.tune.study",
            "softcache.stages.tune.summary",
        ) or name.startswith("optuna"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delattr("softcache.stages.tune.command", raising=False)
    said = stages.fails(2, *search(tiny, "s", "--search", "kd.weight=0|1"))
    assert said.startswith("Error: tune needs Optuna 4.3 or later (")
    assert said.endswith("): pip install 'softcache[tune]'")


def test_without_matplotlib_the_picture_alone_is_missing(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "softcache.stages.tune.plots", raising=False)
    monkeypatch.delattr("softcache.stages.tune.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    code, out, err = stages.call(*search(tiny, "s", "--search", "kd.weight=0.1|1", "--grid"))
    assert code == 0, err
    assert "no image without matplotlib: pip install 'softcache[report]'" in out
    assert not Path("s/tune.png").exists()
    assert len(record_of(Path("s"))["trials"]) == 2
