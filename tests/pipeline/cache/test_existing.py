"""The state of a cache's folder: none, unfinished, complete or orphaned; and what its files tell of the teacher."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from softcache.base.errors import CacheError
from softcache.pipeline.cache.existing import (
    Complete,
    InferenceSettings,
    NoCache,
    Orphaned,
    Unfinished,
    read_existing,
    read_inference_settings,
)
from softcache.pipeline.cache.identity import Identity, compute_fingerprint
from softcache.pipeline.cache.manifest import PrecisionRecord
from softcache.pipeline.cache.manifest_reader import read_manifest
from softcache.pipeline.cache.plan import CachePlan
from softcache.pipeline.cache.recovery import recover_specs
from softcache.pipeline.cache.writer import CacheWriter

RECORD = PrecisionRecord(folded=True, compiled=False, rows=300, kl_1=1e-6, kl_4=1e-7, flips=0.0)


def lose_manifest(cache: Path) -> Identity:
    """Remove the manifest; the identity that it had."""
    identity = read_manifest(cache).identity
    (cache / "manifest.json").unlink()
    return identity


def set_attributes(cache: Path, **attributes: object) -> None:
    """Set attributes of every shard's file."""
    for path in cache.glob("*/*.h5"):
        with h5py.File(path, "r+") as file:
            for name, value in attributes.items():
                file.attrs[name] = value


# States


@pytest.mark.parametrize("name", ["missing", "empty", "foreign", "file"])
def test_a_folder_without_a_file_of_a_cache_holds_no_cache(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "c"
    if name == "file":
        folder.write_text("mine")
    elif name != "missing":
        folder.mkdir()
    if name == "foreign":
        (folder / "notes.txt").write_text("mine")
    assert read_existing(folder) == NoCache()


def test_a_folder_with_a_manifest_holds_a_complete_cache(cache: Path) -> None:
    assert read_existing(cache) == Complete(read_manifest(cache), is_growing=False)


def test_a_complete_cache_grows_while_unfinished_json_is_beside_its_manifest(cache: Path) -> None:
    """Whatever is in that file: the manifest says what the cache is."""
    (cache / "unfinished.json").write_text("damaged")
    assert read_existing(cache) == Complete(read_manifest(cache), is_growing=True)


def test_a_damaged_manifest_is_an_error_and_no_other_state(cache: Path) -> None:
    (cache / "manifest.json").write_text("{}")
    with pytest.raises(CacheError, match="not a manifest"):
        read_existing(cache)


def test_a_folder_with_unfinished_json_alone_holds_an_unfinished_cache(cache: Path) -> None:
    lose_manifest(cache)
    (cache / "unfinished.json").write_text('{"draws": 3}')
    assert read_existing(cache) == Unfinished({"draws": 3})


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_unfinished_json_that_is_no_object_is_an_error(cache: Path, text: str) -> None:
    lose_manifest(cache)
    (cache / "unfinished.json").write_text(text)
    with pytest.raises(CacheError, match=r"unfinished\.json' is damaged"):
        read_existing(cache)


def test_shards_without_a_manifest_are_orphaned(cache: Path) -> None:
    paths = sorted(record.path for record in read_manifest(cache).shards)
    identity = lose_manifest(cache)
    existing = read_existing(cache)
    assert isinstance(existing, Orphaned)
    assert [shard.path for shard in existing.shards] == paths
    assert {shard.attributes["fingerprint"] for shard in existing.shards} == {compute_fingerprint(identity)}
    for shard in existing.shards:
        assert shard.spec is not None
        assert (shard.spec.path, shard.part) == (shard.path, 0)


def test_unreadable_files_are_no_orphaned_shards(cache: Path) -> None:
    """Neither are files under names that no shard has."""
    lose_manifest(cache)
    for path in cache.glob("*/*.h5"):
        if path.parent.name == "val":
            path.rename(path.with_name("renamed.h5"))
        else:
            path.write_bytes(b"damaged")
    assert read_existing(cache) == NoCache()


# What the files tell of the teacher


def test_the_manifest_of_a_complete_cache_tells_precision_and_taps(cache: Path) -> None:
    existing = read_existing(cache)
    settings = read_inference_settings(cache, existing, identity={})
    assert settings == InferenceSettings("float32", None, ("pool1", "flatten"))


@pytest.mark.parametrize(
    ("in_progress", "settings"),
    [
        ({"identity": {"precision": "bfloat16"}}, InferenceSettings("bfloat16", None)),
        (
            {"identity": {"precision": "float32"}, "arithmetic": RECORD.to_json()},
            InferenceSettings("float32", RECORD),
        ),
        (
            {"identity": {"precision": "float32"}, "arithmetic": {"folded": 3}},
            InferenceSettings("float32", None),
        ),
        ({"identity": {"precision": "float64"}}, None),
        ({"identity": 3}, None),
        ({}, None),
    ],
)
def test_unfinished_json_tells_the_precision(
    tmp_path: Path, in_progress: dict[str, Any], settings: InferenceSettings | None
) -> None:
    assert read_inference_settings(tmp_path, Unfinished(in_progress), identity={}) == settings


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_fingerprint_of_orphaned_shards_tells_the_precision(cache: Path, precision: str) -> None:
    """The identity that is asked for may have any precision."""
    identity = lose_manifest(cache)
    fingerprint = compute_fingerprint({**identity, "precision": precision})
    facts = json.dumps({"arithmetic": RECORD.to_json()})
    set_attributes(cache, fingerprint=np.bytes_(fingerprint), facts=np.bytes_(facts))
    settings = read_inference_settings(cache, read_existing(cache), {**identity, "precision": "auto"})
    assert settings is not None
    assert (settings.precision, settings.record) == (precision, RECORD)
    assert set(settings.taps) == {"pool1", "flatten"}


def test_shards_of_another_cache_tell_nothing(cache: Path) -> None:
    """One is enough."""
    identity = lose_manifest(cache)
    with h5py.File(cache / "val/shard-00000.h5", "r+") as file:
        file.attrs["fingerprint"] = np.bytes_("0" * 64)
    assert read_inference_settings(cache, read_existing(cache), identity) is None
    assert read_inference_settings(cache, NoCache(), identity) is None


# Shards that are missing between orphaned ones


def test_missing_shards_are_those_that_fill_the_gaps_between_orphaned_ones(cache: Path) -> None:
    """Rows before the first shard, between two, and after the last; and a split of which no shard is left."""
    manifest = read_manifest(cache)
    lost = ["draw-000/shard-00000.h5", "draw-001/shard-00001.h5", "draw-002/shard-00002.h5"]
    lost += [record.path for record in manifest.shards if record.split == "val"]
    for path in ("manifest.json", *lost):
        (cache / path).unlink()
    plan = CachePlan(manifest.identity, manifest.classes, 3, manifest.splits, manifest.taps, shard_rows=120)
    writer = CacheWriter.examine(cache, plan)
    assert sorted((s.path, s.start, s.rows) for s in writer.missing) == sorted(
        (r.path, r.start, r.rows) for r in manifest.shards
    )
    assert {spec.path for spec in writer.missing if not writer.adopt(spec)} == set(lost)


def test_orphaned_shards_of_another_cache_are_refused_by_name(cache: Path) -> None:
    lose_manifest(cache)
    existing = read_existing(cache)
    assert isinstance(existing, Orphaned)
    with pytest.raises(CacheError, match=r"draw-000/shard-00000\.h5 is of another cache"):
        recover_specs(cache, existing.shards, "0" * 64, splits={})
