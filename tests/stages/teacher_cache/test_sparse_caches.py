"""Caches with a sparse codec: both stages, what is refused, and what is checked of their files."""

import json
from pathlib import Path

import h5py
import pytest

import softcache
from softcache.pipeline.losses import LOSSES
from tests.helpers.commands import Stages, tiny_cache_command

# Losses that read the teacher's logits, and can be trained from a sparse codec.
READ_TOP, READ_SAMPLE = {"kd", "ctkd"}, {"kd"}


def make_cache(tiny: Path, stages: Stages, codec: str, out: Path, *options: object) -> Path:
    """Make a cache of the tiny teacher."""
    stages(*tiny_cache_command(tiny)[:-1], out, "--codec", codec, *options)
    return out


def find_shard(cache: Path) -> Path:
    """Find the first shard of a cache."""
    return cache / str(json.loads((cache / "manifest.json").read_text())["shards"][0]["path"])


@pytest.mark.parametrize(("codec", "loss"), [("top:2", "kd:temperature=4"), ("sample:8", "kd:temperature=1")])
def test_a_student_trains_from_a_sparse_cache_that_grows_and_is_checked(
    tiny: Path, stages: Stages, tmp_path: Path, codec: str, loss: str
) -> None:
    cache = make_cache(tiny, stages, codec, tmp_path / "c")
    draws = json.loads((cache / "manifest.json").read_text())["draws"]
    stages("check-cache", cache, "--deep", "--weights", tiny / "runs/teacher")
    make_cache(tiny, stages, codec, cache, "--draws", draws + 1)
    student = ("student", "--cache", cache, "--arch", "mlp:16", "--epochs", 2, "--loss", loss)
    result = stages(*student, "--out", tmp_path / "r")
    assert result["settings"]["loss"] == [loss]
    stages("inspect", cache, "--out", tmp_path / "i")


@pytest.mark.parametrize("codec", ["top:2", "sample:8"])
def test_the_bytes_do_not_depend_on_the_size_of_batches(
    tiny: Path, stages: Stages, tmp_path: Path, codec: str
) -> None:
    digests = []
    for size in (7, 64):
        cache = make_cache(tiny, stages, codec, tmp_path / str(size), "--batch-size", size)
        with h5py.File(find_shard(cache)) as shard:
            digests.append(b"".join(shard[name][:].tobytes() for name in sorted(shard) if name.startswith("logits")))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(("kind", "accepted"), [("top", READ_TOP), ("sample", READ_SAMPLE)])
def test_every_loss_says_whether_it_reads_a_sparse_target(kind: str, accepted: set[str]) -> None:
    """Of those that read the teacher's logits; those of pairs of rows read the outputs of embeddings alone."""
    losses = [softcache.losses.KD(temperature=1.0), *(loss for name, loss in LOSSES.items() if name != "kd")]
    readers = [loss for loss in losses if "classes" in loss.tasks and loss.needs_logits]
    assert len(readers) > 12
    assert {loss.name for loss in readers if not loss.refuse_codec(kind)} == accepted
    assert not any(loss.refuse_codec(kind) for loss in losses if not loss.needs_logits)


@pytest.mark.parametrize(
    ("codec", "options", "message"),
    [
        ("top:2", ("--loss", "dist"), "loss 'dist' needs the teacher's logits of all classes"),
        (
            "top:2",
            ("--loss", "kd:standardize=true"),
            "standardize=true needs the teacher's logits of all classes",
        ),
        ("sample:8", ("--loss", "kd:temperature=2"), "temperature 1 with temperature=1 alone"),
        ("sample:8", ("--loss", "kd:temperature=2->1"), "temperature 1 with temperature=1 alone"),
        ("top:2", ("--loss", "kd", "--map", "matrix"), "--map matrix needs the teacher's logits of all classes"),
    ],
)
def test_what_needs_the_other_classes_is_refused(
    tiny: Path, stages: Stages, tmp_path: Path, codec: str, options: tuple[str, ...], message: str
) -> None:
    cache = make_cache(tiny, stages, codec, tmp_path / "c")
    line = stages.fails(2, "student", "--cache", cache, "--arch", "mlp:8", "--epochs", 1, *options)
    assert message in line
    assert f"the codec {codec}" in line
    assert "float16 or sqrt8" in line


def test_several_teachers_need_the_logits_of_all_classes(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    caches = [make_cache(tiny, stages, codec, tmp_path / codec) for codec in ("top:2", "float16")]
    line = stages.fails(2, "student", "--cache", caches[0], "--cache", caches[1], "--arch", "mlp:8", "--loss", "kd")
    assert "top:2: several teachers need the logits of all classes" in line


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("top:0", "codec 'top:0' is not top with a number of 1 to 65,535, such as top:20"),
        ("top:many", "codec 'top:many' is not top with a number"),
        ("sample:99999", "codec 'sample:99999' is not sample with a number of 1 to 65,535, such as sample:50"),
        ("top:10", "--codec top:10 is for 11 classes or more, and there are 10"),
        ("best", "no codec 'best'"),
    ],
)
def test_other_codecs_are_refused(tiny: Path, stages: Stages, tmp_path: Path, codec: str, message: str) -> None:
    command = tiny_cache_command(tiny)[:-1]
    assert message in stages.fails(2, *command, tmp_path / "c", "--codec", codec)


def test_a_class_that_does_not_exist_is_found_in_a_file_from_elsewhere(
    tiny: Path, stages: Stages, tmp_path: Path
) -> None:
    cache = make_cache(tiny, stages, "top:2", tmp_path / "c")
    with h5py.File(find_shard(cache), "r+") as shard:
        shard["logits_class"][0, 0] = 60_000
    assert "damaged" in stages.fails(1, "check-cache", cache)
