"""Caches with a false identity, with which shards, fingerprint and checksums all agree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models.prepared_model import PreparedModel
from tests.helpers.commands import Stages
from tests.helpers.damage import Record, edit_manifest, edit_whole_cache, read_manifest, seal_record
from tests.helpers.mutations import update_fingerprint
from tests.helpers.trial import attempt, get_error_line

STUDENT_OPTIONS = ("--arch", "mlp:8", "--epochs", 1, "--out", "r")
CUT = {"val_fraction": 0.125, "seed": 0, "train_size": 300}


def forge_identity(cache: Path, section: str, key: str, value: Any) -> None:
    """Change a field of the identity, and make shards, fingerprint and checksums agree with it."""

    def change(record: Record) -> None:
        identity = record["identity"]
        (identity[section] if section else identity)[key] = value

    edit_whole_cache(cache, change)


def test_the_tool_of_these_tests_does_no_harm_itself(tiny: Path, cache: Path, stages: Stages) -> None:
    edit_whole_cache(cache, lambda record: None)
    stages("check-cache", cache, "--deep", "--weights", tiny / "runs/teacher")
    stages("student", "--cache", cache, *STUDENT_OPTIONS)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("transfer_set", "cut", {}),
        ("transfer_set", "cut", {**CUT, "val_fraction": "x"}),
        ("transfer_set", "cut", {**CUT, "val_fraction": float("inf")}),
        ("transfer_set", "cut", {**CUT, "seed": -1}),
        ("transfer_set", "cut", {**CUT, "seed": 2**80}),
        ("transfer_set", "cut", {**CUT, "train_size": -300}),
        ("transfer_set", "name", ["digits"]),
        ("transfer_set", "name", "digits\x1b[2J"),
        ("transfer_set", "\x1b[2J\nError: there is nothing wrong", 3),
        ("views", "policy", "crops"),
        ("views", "policy", "crop:pad=1"),
        ("views", "pad", -1),
        ("views", "pad", "1\nError: there is nothing wrong"),
        ("views", "mixup", float("nan")),
        ("views", "size", 0),
        ("views", "size", 10**9),
        ("views", "seed", None),
        ("views", "seed", "0"),
        ("views", "seed", 0.5),
        ("views", "seed", -5),
        ("views", "seed", 2**70),
        ("teacher", "arch", None),
        ("teacher", "arch", ["cnn"]),
        ("teacher", "arch", "\x1b[31mcnn\nError: there is nothing wrong"),
        ("teacher", "arch", "\ud800"),
        ("teacher", "weights", 7),
        ("teacher", "mean", 3),
        ("teacher", "mean", []),
        ("teacher", "mean", [0.1, 0.2]),
        ("teacher", "mean", [float("nan")]),
        ("teacher", "mean", [1e39]),
        ("teacher", "std", [0.0]),
        ("teacher", "std", [-1.0]),
        ("teacher", "std", [float("nan")]),
        ("teacher", "std", [1e-300]),
        ("teacher", "channels", 0),
        ("teacher", "channels", -1),
        ("teacher", "channels", 10**9),
        ("teacher", "channels", 10**30),
        ("teacher", "size", 0),
        ("teacher", "size", 10**9),
        ("", "precision", "x"),
        ("", "precision", "float64"),
        ("", "codec", "float8"),
        ("", "format", 2),
        ("", "more", 1),
    ],
)
def test_an_identity_that_does_not_hold_together_is_refused_when_the_cache_is_opened(
    cache: Path, section: str, key: str, value: object
) -> None:
    """The error is one line before the identity is used, not a traceback from inside a training."""

    def change(record: Record) -> None:
        identity = record["identity"]
        (identity[section] if section else identity)[key] = value

    record = read_manifest(cache)
    change(record)
    update_fingerprint(record)
    (cache / "manifest.json").write_bytes(seal_record(record))
    line = get_error_line(lambda: CacheReader(cache))
    assert "identity" in line
    assert "\n" not in line
    assert len(line) < 1000


@pytest.mark.parametrize("depth", [100, 400, 900])
def test_an_identity_that_is_nested_deeply_is_one_line(cache: Path, stages: Stages, depth: int) -> None:
    nested: Any = json.loads("[" * depth + "]" * depth)
    edit_manifest(cache, lambda record: record["identity"]["transfer_set"].update(classes=nested), True)
    for asked in (("student", "--cache", cache, *STUDENT_OPTIONS), ("check-cache", cache, "--deep")):
        stages.fails(1, *asked)


@pytest.mark.parametrize("command", ["student", "check-cache --deep"])
@pytest.mark.parametrize(("key", "value"), [("size", 4096), ("resize", 4096), ("pad", 4096)])
def test_enormous_views_are_found_to_be_others_without_enormous_memory(
    cache: Path, tmp_path: Path, command: str, key: str, value: int
) -> None:
    """A few of them, of 16 to 67 MB each, are rendered before the first difference is reported."""
    forge_identity(cache, "views", key, value)

    def work() -> None:
        from softcache.stages.main import commands

        name, *deep = command.split()
        asked = (
            [name, "--cache", str(cache), *map(str, STUDENT_OPTIONS)]
            if name == "student"
            else [name, str(cache), *deep]
        )
        commands.main(asked, prog_name="softcache", standalone_mode=False)

    outcome = attempt(work, limit=30)
    assert not outcome.failure, outcome.failure
    assert "come out differently here" in outcome.error_line or "files are bad" in outcome.error_line
    assert outcome.extra_memory < 600 << 20, f"{outcome.extra_memory / 1e6:.0f} MB"


def test_a_cache_of_fewer_classes_than_its_data_is_refused(cache: Path, stages: Stages) -> None:
    """The shards are valid, but have logits of five classes for images of ten."""
    from softcache.pipeline.cache.folder import HEAD_FILE
    from softcache.pipeline.cache.shards import Shard, write_shard

    cut = CacheReader(cache)

    def change(record: Record) -> None:
        record["classes"] = 5
        for its, mine in zip(record["shards"], cut.manifest.shards, strict=True):
            shard = Shard(cache, mine.path, cut.manifest.get_layout(mine))
            arrays = shard.read_all()
            arrays["logits"] = np.ascontiguousarray(arrays["logits"][:, :5])
            its["correct"] = int((arrays["logits"].astype(np.float32).argmax(1) == arrays["label"]).sum())
            facts = {key: value for key, value in shard.attributes.items() if key != "payload"}
            its["payload"] = write_shard(cache / mine.path, arrays, facts).payload
        head = Shard(cache, HEAD_FILE, cut.manifest.get_head_layout())
        arrays = {name: rows[:5] for name, rows in head.read_all().items()}
        write_shard(cache / HEAD_FILE, arrays, {"fingerprint": record["fingerprint"]})

    edit_whole_cache(cache, change)
    for losses in (("--loss", "kd"), ("--loss", "hard")):
        line = stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS, *losses)
        assert "classes" in line


@pytest.mark.parametrize("asked", ["--deep", "--repair"])
def test_a_teacher_that_answers_with_no_number_is_not_taken_for_the_right_one(
    tiny: Path, cache: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Every comparison with NaN is false, so a check of the largest difference must handle it explicitly."""
    forward = PreparedModel.forward

    def forward_nan(self: PreparedModel, views: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = forward(self, views)
        return answer * float("nan")

    if asked == "--repair":
        (cache / "val/shard-00000.h5").unlink()
    monkeypatch.setattr(PreparedModel, "forward", forward_nan)
    line = stages.fails(1, "check-cache", cache, asked, "--weights", tiny / "runs/teacher")
    assert "nan" in line
    assert not (cache / "val/shard-00000.h5").exists() or asked == "--deep"


def test_words_of_a_manifest_reach_no_terminal_unchanged(cache: Path, stages: Stages) -> None:
    """Settings (from which copied commands are made), taps and versions are checked when the cache is opened."""
    evil = "\x1b[2J\x1b]0;owned\x07\nError: there is nothing wrong\r\ud800\u202e"

    def change(record: Record) -> None:
        record["settings"] |= {"license": evil, "weights": evil, "data": evil, evil: evil}
        record["versions"] |= {evil: evil}
        record["identity"]["transfer_set"]["content"]["test"] = "0" * 64

    edit_whole_cache(cache, change)
    for asked in (
        ("student", "--cache", cache, *STUDENT_OPTIONS),
        ("student", "--cache", cache, *STUDENT_OPTIONS, "--draws", 9),
        ("student", "--cache", cache, *STUDENT_OPTIONS, "--loss", "hint:teacher=conv1,student=relu1"),
        ("check-cache", cache),
        ("check-cache", cache, "--deep"),
    ):
        code, out, err = stages.call(*asked)
        assert code == 1
        assert all(c.isprintable() or c == "\n" for c in out + err), out + err
        assert err.count("\nError: ") == 0
