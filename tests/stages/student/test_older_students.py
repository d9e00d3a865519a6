"""Growth changes no older student; a run says which shards it was trained from; a refusal says what to add."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softcache.stages.training.loop as training
from softcache.pipeline.cache import reader as cache_module
from softcache.pipeline.cache.reader import Cache
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
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and, as `c`, a cache of 2 draws and the tap linear."""
    return make_folder_with_cache(tiny, tmp_path_factory.mktemp("made"), "--draws", "2", "--taps", "linear")


@pytest.fixture
def small(made: Path, tmp_path: Path, stages: Stages) -> Path:
    """The cache `c` in the folder where a test is, which ASKED adds to."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def weights(run: str) -> bytes:
    return Path(run, "student.pt").read_bytes()


def stop_at_step(number: int, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when that step is about to be taken."""
    step, taken = training.train_step, []

    def stopping(*arguments: Any) -> torch.Tensor:
        taken.append(1)
        if len(taken) == number:
            raise KeyboardInterrupt
        return step(*arguments)

    patch.setattr(training, "train_step", stopping)


def test_a_student_of_the_first_draws_comes_out_again_after_more_were_added(small: Path, stages: Stages) -> None:
    stages(*STUDENT, "--out", "before")
    stages(*CACHE_COMMAND, "--draws", "4", "--out", "c")
    stages(*STUDENT, "--draws", "2", "--out", "after")
    stages(*STUDENT, "--out", "of-all")
    assert weights("after") == weights("before")
    assert weights("of-all") != weights("before")


@pytest.mark.parametrize(
    ("loss", "resident"),
    [("kd", False), ("hint:teacher=linear,student=relu1", True), ("hint:teacher=linear,student=relu1", False)],
)
def test_a_student_comes_out_again_after_taps_were_added(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, loss: str, resident: bool
) -> None:
    """From memory, and where what it reads of a draw is too large for that; a tap that was added is larger still."""
    used = 2 * 10 + 4 * 3 + (2 * 10 if "hint" in loss else 0)  # bytes of a row: logits, keys, linear
    monkeypatch.setattr(cache_module, "RESIDENT_BYTES", 200 * used if resident else 200 * used - 1)
    stages(*STUDENT, "--loss", loss, "--out", "before")
    stages(*CACHE_COMMAND, "--taps", "flatten,pool2", "--out", "c")
    stages(*STUDENT, "--loss", loss, "--out", "after")
    assert weights("after") == weights("before")
    assert Cache(small).fits_in_memory("train", 0, ("linear",) if "hint" in loss else ()) == resident


def test_the_order_of_rows_does_not_depend_on_taps_that_a_student_does_not_use(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the size at which logits alone fit into memory and logits with the tap do not: the order is that of both."""
    seen: dict[str, list[int]] = {"kd": [], "hint": []}
    step = training.train_step

    def noted(active: ActiveTraining, batch: Any, *rest: Any) -> Any:
        seen[active.run.criterion.losses[0].name].extend(batch.index.tolist())
        return step(active, batch, *rest)

    monkeypatch.setattr(training, "train_step", noted)
    monkeypatch.setattr(cache_module, "RESIDENT_BYTES", 200 * (2 * 10 + 4 * 3) + 1)
    for loss in ("kd", "hint:teacher=linear,student=relu1"):
        stages(*STUDENT, "--loss", loss, "--draws", "1")
    assert seen["kd"] == seen["hint"]
    assert sorted(seen["kd"][:200]) == list(range(200))


def test_more_draws_than_there_are_are_refused_with_the_command_that_adds_them(small: Path, stages: Stages) -> None:
    error = stages.fails(1, *STUDENT, "--draws", "4", "--out", "r")
    assert "--draws 4, but the cache 'c' has 2. Add them with  " in error
    assert not Path("r").exists()
    old = read_payloads(small)
    stages(*parse_printed_command(error))
    assert old.items() <= read_payloads(small).items()
    assert stages(*STUDENT, "--draws", "4", "--out", "r")["cache"]["draws"] == 4


def test_a_loss_that_wants_a_missing_tap_is_refused_with_the_command_that_adds_it(small: Path, stages: Stages) -> None:
    error = stages.fails(1, *STUDENT, "--loss", HINT, "--out", "r")
    assert "the cache 'c' has not kept flatten (it has: linear). Add them with  " in error
    assert not Path("r").exists()
    stages(*parse_printed_command(error))
    assert set(Cache(small).manifest.taps) == {"linear", "flatten"}
    stages(*STUDENT, "--loss", HINT, "--out", "r")


def test_the_command_that_adds_says_where_the_pictures_are_as_the_student_did(
    stages: Stages, tmp_path: Path, save_image: Any
) -> None:
    """A manifest does not know; who trains has just said it."""
    save_pets(tmp_path / "pets", save_image)
    save_pets_teacher(tmp_path / "pets.pt")
    stages(*PETS_CACHE_COMMAND, "--out", "p")
    asked = ("student", "--data", "folder:pets", "--cache", "p", "--arch", "mlp:4", "--epochs", "1")
    for more in (("--draws", "3"), ("--loss", "hint:teacher=linear,student=relu1")):
        stages(*parse_printed_command(stages.fails(1, *asked, *more)))
        stages(*asked, *more)


def test_a_run_says_which_draws_and_shards_it_was_trained_from(small: Path, stages: Stages) -> None:
    stages(*CACHE_COMMAND, "--draws", "3", "--taps", "flatten,pool2", "--out", "c")
    result = stages(*STUDENT, "--loss", HINT, "--draws", "2", "--out", "r")
    assert result["cache"]["draws"] == 2
    used = json.loads(Path("r/cache.json").read_text())
    assert (used["fingerprint"], used["draws"], used["taps"]) == (Cache(small).manifest.fingerprint, 2, ["flatten"])
    there = read_payloads(small)
    # of draws 0 and 1 the logits, with linear, and the file that holds flatten, with pool2
    trained = {f"draw-00{d}/shard-0000{part}{more}.h5" for d in (0, 1) for part in (0, 1) for more in ("", "-1")}
    held_out = {path for path in there if path.startswith(("val/", "test/"))}
    assert used["shards"] == {path: there[path] for path in trained | held_out}
    assert stages(*STUDENT, "--out", "s")["cache"]["draws"] == 3
    of_all = json.loads(Path("s/cache.json").read_text())
    assert (of_all["draws"], of_all["taps"]) == (3, [])
    assert of_all["shards"] == {path: there[path] for path in there if not path.endswith("-1.h5")}


def test_a_run_that_was_begun_before_the_growth_ends_after_it_with_the_same_weights(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages(*STUDENT, "--out", "whole")
    with monkeypatch.context() as patch:
        stop_at_step(7, patch)
        stages.fails(130, *STUDENT, "--out", "stopped")
    begun_with = Path("stopped/cache.json").read_bytes()
    stages(*CACHE_COMMAND, "--draws", "4", "--taps", "flatten", "--out", "c")
    stages("student", "--resume", "--out", "stopped")
    assert weights("stopped") == weights("whole")
    assert Path("stopped/cache.json").read_bytes() == begun_with


def nudge(arrays: dict[str, np.ndarray]) -> None:
    arrays["logits"][0, 0] *= 1.001


def test_going_on_with_other_shards_than_the_run_was_begun_with_is_refused_naming_them(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewritten with every checksum mended: only the run knows that they were others."""
    stages(*CACHE_COMMAND, "--draws", "3", "--out", "c")
    with monkeypatch.context() as patch:
        stop_at_step(7, patch)
        stages.fails(130, *STUDENT, "--draws", "2", "--out", "r")
    kept = Path("r/checkpoint.pt").read_bytes()
    edit_shard(small, nudge, "draw-002/shard-00000.h5")  # of no concern to a student of two draws
    shutil.copytree(small, "other")
    shard = "draw-001/shard-00000.h5"
    edit_shard(Path("other"), nudge, shard)

    error = stages.fails(1, "student", "--resume", "--out", "r", "--cache", "other")
    assert "'r' was begun with other shards than 'other' now has" in error
    rows = [line.split() for line in error.splitlines()[1:]]
    assert rows[0] == ["here", "begun", "with"]
    here, begun = read_payloads(Path("other"))[shard], read_payloads(small)[shard]
    assert [name for name, *_ in rows[1:]] == [f"shards.{shard}"]
    assert here[:30] in rows[1][1]
    assert begun[:30] in rows[1][2]
    assert Path("r/checkpoint.pt").read_bytes() == kept
    assert not Path("r/student.pt").exists()
    stages("student", "--resume", "--out", "r")


def test_going_on_with_another_cache_is_refused_naming_the_fingerprint(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at_step(7, patch)
        stages.fails(130, *STUDENT, "--out", "r")
    stages(*CACHE_COMMAND, "--draws", "2", "--codec", "float32", "--out", "other")
    error = stages.fails(1, "student", "--resume", "--out", "r", "--cache", "other")
    assert "fingerprint" in [line.split()[0] for line in error.splitlines()[1:]]
