"""Files that someone made on purpose: refused by name, quickly, and nothing outside the cache is read.

Every checksum is mended: only the structure gives these files away.
"""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from commands import Stages
from damage import SHARD, Record, edit_manifest, mend

MORE = ("--arch", "mlp:8", "--epochs", 1, "--out", "r")


def with_soft_link(file: h5py.File) -> None:
    del file["label"]
    file["label"] = h5py.SoftLink("/index")


def with_external_link(file: h5py.File) -> None:
    del file["label"]
    file["label"] = h5py.ExternalLink("other.h5", "/label")


def with_external_storage(file: h5py.File) -> None:
    del file["label"]
    file.create_dataset("label", (100,), "<i4", external=[("/etc/passwd", 0, 400)])


def with_virtual_dataset(file: h5py.File) -> None:
    del file["label"]
    layout = h5py.VirtualLayout((100,), "<i4")
    layout[:] = h5py.VirtualSource("other.h5", "label", (100,))
    file.create_virtual_dataset("label", layout)


def with_many_rows(file: h5py.File) -> None:
    del file["label"]
    file.create_dataset("label", (10**12,), "<i4", chunks=(1000,))


def with_compression(file: h5py.File) -> None:
    rows = file["label"][:]
    del file["label"]
    file.create_dataset("label", data=rows, compression="gzip")


def with_one_dataset_more(file: h5py.File) -> None:
    file["more"] = np.zeros(3)


def with_an_object_attribute(file: h5py.File) -> None:
    file.attrs["note"] = "a string of any length"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_soft_link, "SoftLink"),
        (with_external_link, "ExternalLink"),
        (with_external_storage, "other files"),
        (with_virtual_dataset, "other files"),
        (with_many_rows, "instead of int32 (100,)"),
        (with_compression, "not stored whole in one piece"),
        (with_one_dataset_more, "not those of the manifest: more"),
        (with_an_object_attribute, "attribute note"),
    ],
)
def test_a_hostile_shard_is_refused_by_name(
    cache: Path, stages: Stages, change: Callable[[h5py.File], None], reason: str
) -> None:
    """Checksums are mended: only the structure gives these files away."""
    with h5py.File(cache / SHARD, "r+") as file:
        change(file)
    mend(cache)
    line = stages.fails(1, "student", "--cache", cache, *MORE, "--epochs", 3)
    assert reason in line
    assert SHARD in line


@pytest.mark.parametrize("name", ["../outside.h5", "/etc/passwd", "a/../../b", "a/b/c.h5", "", "draw-000\\x.h5"])
def test_a_manifests_paths_stay_inside_the_cache(cache: Path, stages: Stages, name: str) -> None:
    edit_manifest(cache, lambda record: record["shards"][3].update(path=name))
    assert "is not the file of a shard" in stages.fails(1, "check-cache", cache)


def test_an_edited_identity_is_refused(cache: Path, stages: Stages) -> None:
    edit_manifest(cache, lambda record: record["identity"]["views"].update(pad=2))
    assert "its identity was edited" in stages.fails(1, "student", "--cache", cache, *MORE)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 2}', "\x00", '{"format": "1"}'])
def test_a_broken_manifest_is_one_line(cache: Path, stages: Stages, text: str) -> None:
    (cache / "manifest.json").write_text(text)
    assert "manifest.json: " in stages.fails(1, "check-cache", cache)


def test_a_manifest_that_claims_a_trillion_rows_is_refused_before_memory_is_taken(cache: Path, stages: Stages) -> None:

    def claim(record: Record) -> None:
        tests = [shard for shard in record["shards"] if shard["split"] == "test"]
        record["shards"] = [shard for shard in record["shards"] if shard not in tests[1:]]
        tests[0]["rows"] = record["splits"]["test"] = 10**12

    edit_manifest(cache, claim)
    assert "splits.test: 1000000000000 is not between 1 and" in stages.fails(1, "student", "--cache", cache, *MORE)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("transfer_set", "cut", {}),
        ("transfer_set", "cut", {"val_fraction": "x", "seed": 0, "train_size": 0}),
        ("views", "policy", "crops"),
        ("views", "pad", -1),
        ("views", "seed", None),
        ("teacher", "mean", 3),
    ],
)
def test_an_identity_that_does_not_hold_together_is_one_line(
    cache: Path, stages: Stages, section: str, key: str, value: object
) -> None:
    """With the fingerprint mended, as a hostile author would."""
    edit_manifest(cache, lambda record: record["identity"][section].update({key: value}), mend_fingerprint=True)
    assert "does not hold together" in stages.fails(1, "check-cache", cache)


def test_a_missing_shard_record_is_named(cache: Path, stages: Stages) -> None:
    edit_manifest(cache, lambda record: record["shards"].pop(4))
    (cache / "draw-001/shard-00001.h5").unlink()
    assert "draw 1" in stages.fails(1, "check-cache", cache)


def test_a_file_that_is_cut_while_a_student_reads_it_is_an_error_and_no_crash(cache: Path) -> None:
    from pipeline.cache import Cache

    opened = Cache(cache)
    shard = opened._shard(next(r for r in opened.manifest.shards if r.path == SHARD))
    os.truncate(cache / SHARD, 500)
    with pytest.raises(Exception, match="it was cut after it was opened"):
        shard.read_all()
