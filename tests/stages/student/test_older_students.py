"""A cache that grows changes no student of its older draws and taps; a run records the shards that it read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache.stages.training.loop as training
from softcache.pipeline.cache import reader as cache_module
from softcache.pipeline.cache.reader import CacheReader
from softcache.stages.training.step import ActiveTraining
from tests.helpers.caches import (
    CACHE_COMMAND,
    PETS_CACHE_COMMAND,
    make_folder_with_cache,
    parse_printed_command,
    read_payloads,
    save_pets,
    save_pets_teacher,
)
from tests.helpers.commands import Stages
from tests.helpers.damage import edit_shard
from tests.helpers.stopping import stop_at

STUDENT = (
    "student",
    "--cache",
    "c",
    "--arch",
    "mlp:8",
    "--epochs",
    "4",
    "--batch-size",
    "60",
    "--learning-rate",
    "0.001",
)
HINT = "hint:teacher=flatten,student=relu1"


@pytest.fixture(scope="module")
def folder_with_cache(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and, as `c`, a cache of 2 draws and the tap linear."""
    return make_folder_with_cache(tiny, tmp_path_factory.mktemp("home"), "--draws", "2", "--taps", "linear")


@pytest.fixture
def small(folder_with_cache: Path, tmp_path: Path, stages: Stages) -> Path:
    """The cache `c` in the folder of the test; the command CACHE_COMMAND adds to it."""
    shutil.copytree(folder_with_cache, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def read_weights(run: str) -> bytes:
    return Path(run, "student.pt").read_bytes()


def test_a_student_of_the_first_draws_has_the_same_weights_after_draws_were_added(small: Path, stages: Stages) -> None:
    stages(*STUDENT, "--out", "before")
    stages(*CACHE_COMMAND, "--draws", "4", "--out", "c")
    stages(*STUDENT, "--draws", "2", "--out", "after")
    stages(*STUDENT, "--out", "of-all")
    assert read_weights("after") == read_weights("before")
    assert read_weights("of-all") != read_weights("before")


@pytest.mark.parametrize(
    ("loss", "resident"),
    [("kd", False), ("hint:teacher=linear,student=relu1", True), ("hint:teacher=linear,student=relu1", False)],
)
def test_a_student_has_the_same_weights_after_taps_were_added(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, loss: str, resident: bool
) -> None:
    """From memory, and when what it reads of a draw is too large for that; an added tap is larger still."""
    row_bytes = 2 * 10 + 4 * 3 + (2 * 10 if "hint" in loss else 0)  # logits, keys, linear
    monkeypatch.setattr(cache_module, "RESIDENT_BYTES", 200 * row_bytes if resident else 200 * row_bytes - 1)
    stages(*STUDENT, "--loss", loss, "--out", "before")
    stages(*CACHE_COMMAND, "--taps", "flatten,pool2", "--out", "c")
    stages(*STUDENT, "--loss", loss, "--out", "after")
    assert read_weights("after") == read_weights("before")
    assert CacheReader(small).fits_in_memory("train", 0, ("linear",) if "hint" in loss else ()) == resident


def test_the_order_of_rows_does_not_depend_on_taps_that_a_student_does_not_use(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a size at which the logits fit into memory and the logits with the tap do not, the order is the same."""
    rows: dict[str, list[int]] = {"kd": [], "hint": []}
    train_step = training.train_step

    def record_rows(active: ActiveTraining, batch: Any, *rest: Any) -> Any:
        rows[active.run.criterion.losses[0].name].extend(batch.index.tolist())
        return train_step(active, batch, *rest)

    monkeypatch.setattr(training, "train_step", record_rows)
    monkeypatch.setattr(cache_module, "RESIDENT_BYTES", 200 * (2 * 10 + 4 * 3) + 1)
    for loss in ("kd", "hint:teacher=linear,student=relu1"):
        stages(*STUDENT, "--loss", loss, "--draws", "1")
    assert rows["kd"] == rows["hint"]
    assert sorted(rows["kd"][:200]) == list(range(200))


def test_too_many_draws_are_refused_with_the_command_that_adds_them(small: Path, stages: Stages) -> None:
    error = stages.fails(1, *STUDENT, "--draws", "4", "--out", "r")
    assert "--draws 4, but the cache 'c' has 2. Add them with  " in error
    assert not Path("r").exists()
    digests = read_payloads(small)
    stages(*parse_printed_command(error))
    assert digests.items() <= read_payloads(small).items()
    assert stages(*STUDENT, "--draws", "4", "--out", "r")["cache"]["draws"] == 4


def test_a_loss_that_reads_a_missing_tap_is_refused_with_the_command_that_adds_it(small: Path, stages: Stages) -> None:
    error = stages.fails(1, *STUDENT, "--loss", HINT, "--out", "r")
    assert "the cache 'c' does not contain flatten (it has: linear). Add them with  " in error
    assert not Path("r").exists()
    stages(*parse_printed_command(error))
    assert set(CacheReader(small).manifest.taps) == {"linear", "flatten"}
    stages(*STUDENT, "--loss", HINT, "--out", "r")


def test_the_command_that_adds_names_the_images_as_the_student_did(
    stages: Stages, tmp_path: Path, save_image: Any
) -> None:
    """Where the images are is not in the manifest, but in the options of the student."""
    save_pets(tmp_path / "pets", save_image)
    save_pets_teacher(tmp_path / "pets.pt")
    stages(*PETS_CACHE_COMMAND, "--out", "p")
    command = ("student", "--data", "folder:pets", "--cache", "p", "--arch", "mlp:4", "--epochs", "1")
    for options in (("--draws", "3"), ("--loss", "hint:teacher=linear,student=relu1")):
        stages(*parse_printed_command(stages.fails(1, *command, *options)))
        stages(*command, *options)


def test_a_run_records_the_draws_and_shards_that_it_was_trained_from(small: Path, stages: Stages) -> None:
    stages(*CACHE_COMMAND, "--draws", "3", "--taps", "flatten,pool2", "--out", "c")
    result = stages(*STUDENT, "--loss", HINT, "--draws", "2", "--out", "r")
    assert result["cache"]["draws"] == 2
    used = json.loads(Path("r/cache.json").read_text())
    assert (used["fingerprint"], used["draws"], used["taps"]) == (
        CacheReader(small).manifest.fingerprint,
        2,
        ["flatten"],
    )
    digests = read_payloads(small)
    # of draws 0 and 1 the logits, with linear, and the file that holds flatten, with pool2
    training_shards = {f"draw-00{d}/shard-0000{i}{part}.h5" for d in (0, 1) for i in (0, 1) for part in ("", "-1")}
    held_out = {path for path in digests if path.startswith(("val/", "test/"))}
    assert used["shards"] == {path: digests[path] for path in training_shards | held_out}
    assert stages(*STUDENT, "--out", "s")["cache"]["draws"] == 3
    all_draws = json.loads(Path("s/cache.json").read_text())
    assert (all_draws["draws"], all_draws["taps"]) == (3, [])
    assert all_draws["shards"] == {path: digests[path] for path in digests if not path.endswith("-1.h5")}


def test_a_run_that_is_stopped_before_the_cache_grows_ends_with_the_same_weights(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages(*STUDENT, "--out", "uninterrupted")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        stages.fails(130, *STUDENT, "--out", "stopped")
    record = Path("stopped/cache.json").read_bytes()
    stages(*CACHE_COMMAND, "--draws", "4", "--taps", "flatten", "--out", "c")
    stages("student", "--resume", "--out", "stopped")
    assert read_weights("stopped") == read_weights("uninterrupted")
    assert Path("stopped/cache.json").read_bytes() == record


def change_a_logit(arrays: dict[str, np.ndarray]) -> None:
    arrays["logits"][0, 0] *= 1.001


def test_a_run_is_not_continued_with_other_shards_which_the_error_names(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is rewritten with every checksum corrected: only the record of the run differs."""
    stages(*CACHE_COMMAND, "--draws", "3", "--out", "c")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        stages.fails(130, *STUDENT, "--draws", "2", "--out", "r")
    checkpoint = Path("r/checkpoint.pt").read_bytes()
    edit_shard(small, change_a_logit, "draw-002/shard-00000.h5")  # not read by a student of two draws
    shutil.copytree(small, "other")
    shard = "draw-001/shard-00000.h5"
    edit_shard(Path("other"), change_a_logit, shard)

    error = stages.fails(1, "student", "--resume", "--out", "r", "--cache", "other")
    assert "'r' was trained from other shards than 'other' now has" in error
    rows = [line.split() for line in error.splitlines()[1:]]
    assert rows[0] == ["now", "before"]
    now, before = read_payloads(Path("other"))[shard], read_payloads(small)[shard]
    assert [name for name, *_ in rows[1:]] == [f"shards.{shard}"]
    assert now[:30] in rows[1][1]
    assert before[:30] in rows[1][2]
    assert Path("r/checkpoint.pt").read_bytes() == checkpoint
    assert not Path("r/student.pt").exists()
    stages("student", "--resume", "--out", "r")


def test_a_run_is_not_continued_with_another_cache_whose_fingerprint_the_error_names(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        stages.fails(130, *STUDENT, "--out", "r")
    stages(*CACHE_COMMAND, "--draws", "2", "--codec", "float32", "--out", "other")
    error = stages.fails(1, "student", "--resume", "--out", "r", "--cache", "other")
    assert "fingerprint" in [line.split()[0] for line in error.splitlines()[1:]]


def test_a_run_of_before_an_option_existed_has_its_default(small: Path, stages: Stages) -> None:
    code, _, _ = stages.call(*STUDENT, "--out", "r")
    assert code == 0
    Path("r/result.json").unlink()
    settings = json.loads(Path("r/settings.json").read_text())
    del settings["log_every"], settings["vectorize" if "vectorize" in settings else "keep_every"]
    Path("r/settings.json").write_text(json.dumps(settings))
    assert "r' exists, started with the same settings" in stages.fails(2, *STUDENT, "--out", "r")
    weights = read_weights("r")
    stages("student", "--resume", "--out", "r")
    assert read_weights("r") == weights
    assert stages.call("evaluate", "r")[0] == 0

    settings["an_option_of_tomorrow"] = 1
    Path("r/settings.json").write_text(json.dumps(settings))
    assert "options that this version does not know: an_option_of_tomorrow" in stages.fails(1, "evaluate", "r")
