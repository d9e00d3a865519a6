"""A cache whose rows went to other pictures, or that was damaged, is refused: never trained on.

Each test changes the files and then mends every checksum that a thorough vandal could mend, so that the
check under test is the one that has to find it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xxhash
from commands import Stages

import data.views
from pipeline.identity import fingerprint
from pipeline.shards import payload_digest

MORE = ("--arch", "mlp:8", "--epochs", 1, "--out", "r")
SHARD = "draw-001/shard-00001.h5"


def rewrite(cache: Path, change: Callable[[dict[str, np.ndarray]], None], name: str = SHARD) -> None:
    """Change a shard's arrays, and mend payload, checksum and size in shard and manifest."""
    path = cache / name
    with h5py.File(path, "r+") as file:
        arrays = {key: file[key][:] for key in ("logits", "label", "index", "view_crc32")}
        arrays |= {f"features/{key}": file[f"features/{key}"][:] for key in file["features"]}
        change(arrays)
        for key, rows in arrays.items():
            file[key][:] = rows
        file.attrs["payload"] = np.bytes_(payload_digest(arrays))
    manifest = json.loads((cache / "manifest.json").read_text())
    record = next(shard for shard in manifest["shards"] if shard["path"] == name)
    record["payload"] = payload_digest(arrays)
    mend(cache, manifest, name)


def mend(cache: Path, manifest: dict, name: str) -> None:  # type: ignore[type-arg]
    whole = (cache / name).read_bytes()
    record = next(shard for shard in manifest["shards"] if shard["path"] == name)
    record["bytes"], record["checksum"] = len(whole), xxhash.xxh3_128_hexdigest(whole)
    (cache / "manifest.json").write_text(json.dumps(manifest))


def test_a_mended_but_unchanged_cache_is_accepted(cache: Path, stages: Stages) -> None:
    """The tool of the tests below does no harm itself."""
    rewrite(cache, lambda arrays: None)
    stages("check-cache", cache, "--deep")
    stages("student", "--cache", cache, *MORE)


def test_permuted_rows_are_refused(cache: Path, stages: Stages) -> None:
    """Every dataset permuted alike, as if rows had been written in another order."""

    def permute(arrays: dict[str, np.ndarray]) -> None:
        for key in arrays:
            arrays[key] = arrays[key][::-1]

    rewrite(cache, permute)
    assert "not in the order of this cache" in stages.fails(1, "student", "--cache", cache, *MORE)
    assert not Path("r/student.pt").exists()


def test_permuted_logits_are_refused(cache: Path, stages: Stages) -> None:
    """The logits alone permuted: row i now belongs to another picture."""

    def permute(arrays: dict[str, np.ndarray]) -> None:
        arrays["logits"] = np.roll(arrays["logits"], 1, axis=0)

    rewrite(cache, permute)
    line = stages.fails(1, "student", "--cache", cache, *MORE, "--epochs", 3)
    assert "rows and logits do not belong together" in line


def test_labels_that_differ_are_refused(cache: Path, stages: Stages) -> None:
    def relabel(arrays: dict[str, np.ndarray]) -> None:
        arrays["label"][5] = (arrays["label"][5] + 1) % 10

    rewrite(cache, relabel)
    line = stages.fails(1, "student", "--cache", cache, *MORE, "--epochs", 3)
    assert "1 labels are not those of the data" in line


def test_logits_that_are_not_finite_are_refused(cache: Path, stages: Stages) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["logits"][3, 3] = np.nan

    rewrite(cache, spoil)
    assert f"{SHARD}: logits that are not finite" in stages.call("check-cache", cache)[1]


def test_a_renderer_that_moves_one_pixel_is_found_without_the_teacher(
    cache: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a new decoder or library would: one pixel of every view is one level brighter."""
    render_one = data.views._render_one

    def drifted(*arguments):  # type: ignore[no-untyped-def]
        views = render_one(*arguments).clone()
        views[:, 0, 3, 4] ^= 1
        return views

    monkeypatch.setattr(data.views, "_render_one", drifted)
    line = stages.fails(1, "student", "--cache", cache, *MORE)
    assert "come out differently here" in line
    assert "pillow" in line
    assert not Path("r").exists()
    assert "files are bad" in stages.fails(1, "check-cache", cache, "--deep")


def test_other_data_are_refused_and_the_field_named(
    cache: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One level of one pixel of one picture."""
    import data.transfer_set as module

    row = module.TRANSFER_SETS["digits"]

    def one_pixel_off(root: Path) -> object:
        splits, classes = row.read(root)
        splits["test"][0].images[7, 0, 4, 4] ^= 1
        return splits, classes

    monkeypatch.setitem(module.TRANSFER_SETS, "digits", module.DataRow(one_pixel_off, row.recipe))
    line = stages.fails(1, "student", "--cache", cache, *MORE)
    assert "was made from other data: content.test: " in line


def damage_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append_junk(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"junk")


def remove(path: Path) -> None:
    path.unlink()


def put_another_shard(path: Path) -> None:
    path.write_bytes((path.parent.parent / "draw-002/shard-00001.h5").read_bytes())


def make_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_bit, "damaged, its checksum is"),
        (cut_short, "the file was cut or appended to"),
        (append_junk, "the file was cut or appended to"),
        (remove, "cannot be opened as a plain file"),
        (put_another_shard, "instead of"),
        (make_a_link, "cannot be opened as a plain file"),
        (make_a_pipe, "not a plain file"),
    ],
)
def test_damage_is_found_before_a_row_is_used(
    cache: Path, stages: Stages, damage: Callable[[Path], None], reason: str
) -> None:
    damage(cache / SHARD)
    line = stages.fails(1, "student", "--cache", cache, *MORE, "--epochs", 3)
    assert reason in line
    assert SHARD in line
    code, out, err = stages.call("check-cache", cache)
    assert code == 1
    assert f"{SHARD}: " in out
    assert out.count(": good") == 14
    assert "1 of 15 files are bad" in err


def test_a_deep_check_blames_the_damaged_shard_and_not_its_neighbours(cache: Path, stages: Stages) -> None:
    damage_bit(cache / SHARD)
    _, out, err = stages.call("check-cache", cache, "--deep")
    assert out.count(": good") == 14
    assert "1 of 15 files are bad" in err


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
    mend(cache, json.loads((cache / "manifest.json").read_text()), SHARD)
    line = stages.fails(1, "student", "--cache", cache, *MORE, "--epochs", 3)
    assert reason in line
    assert SHARD in line


@pytest.mark.parametrize("name", ["../outside.h5", "/etc/passwd", "a/../../b", "a/b/c.h5", "", "draw-000\\x.h5"])
def test_a_manifests_paths_stay_inside_the_cache(cache: Path, stages: Stages, name: str) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][3]["path"] = name
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert "is not a file of this cache" in stages.fails(1, "check-cache", cache)


def test_an_edited_identity_is_refused(cache: Path, stages: Stages) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["identity"]["views"]["pad"] = 2
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert "its identity was edited" in stages.fails(1, "student", "--cache", cache, *MORE)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 2}', "\x00", '{"format": "1"}'])
def test_a_broken_manifest_is_one_line(cache: Path, stages: Stages, text: str) -> None:
    (cache / "manifest.json").write_text(text)
    assert "manifest.json: " in stages.fails(1, "check-cache", cache)


def test_a_manifest_that_claims_a_trillion_rows_is_refused_before_memory_is_taken(cache: Path, stages: Stages) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    tests = [shard for shard in manifest["shards"] if shard["split"] == "test"]
    manifest["shards"] = [shard for shard in manifest["shards"] if shard not in tests[1:]]
    tests[0]["rows"] = manifest["splits"]["test"] = 10**12
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert "too small for the 1000000000000 rows" in stages.fails(1, "student", "--cache", cache, *MORE)
    assert "instead of float16 (1000000000000, 10)" in stages.call("check-cache", cache)[1]


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
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["identity"][section][key] = value
    manifest["fingerprint"] = fingerprint(manifest["identity"])
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert "does not hold together" in stages.fails(1, "check-cache", cache)


def test_a_missing_shard_record_is_named(cache: Path, stages: Stages) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest["shards"][4]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert "draw 1" in stages.fails(1, "check-cache", cache)


def test_a_file_that_is_cut_while_a_student_reads_it_is_an_error_and_no_crash(cache: Path) -> None:
    from pipeline.cache import Cache

    opened = Cache(cache)
    shard = opened._shard(next(r for r in opened.manifest.shards if r.path == SHARD))
    os.truncate(cache / SHARD, 500)
    with pytest.raises(Exception, match="it was cut after it was opened"):
        shard.read_all()


def test_the_layout_of_a_shard_is_pinned(cache: Path) -> None:
    """Format 1: what another program may rely on, and what must not change unnoticed."""
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["format"] == 1
    record = manifest["shards"][0]
    assert record["datasets"] == {
        "logits": [[10], "<f2"],
        "features/pool1": [[64, 4, 4], "<f2"],
        "features/flatten": [[512], "<f2"],
        "index": [[], "<u4"],
        "label": [[], "<i4"],
        "view_crc32": [[], "<u4"],
    }
    with h5py.File(cache / record["path"]) as file:
        assert set(file.attrs) == {"fingerprint", "split", "draw", "start", "facts", "payload"}
        for name in record["datasets"]:
            dataset = file[name]
            assert dataset.chunks is None
            assert dataset.id.get_offset() is not None
        raw = (cache / record["path"]).read_bytes()
        begin = file["label"].id.get_offset()
        np.testing.assert_array_equal(np.frombuffer(raw[begin : begin + 400], "<i4"), file["label"][:])
    arrays = {"b": np.arange(6, dtype="<f2").reshape(2, 3), "a": np.array([7, 8], "<u4")}
    assert payload_digest(arrays) == "00bb30f72e722e0eed4baf541687279d"


def test_student_weights_are_a_plain_state_dict(cache: Path, stages: Stages) -> None:
    stages("student", "--cache", cache, *MORE)
    state = torch.load("r/student.pt", weights_only=True)
    assert [tuple(x.shape) for x in state.values()] == [(8, 64), (8,), (10, 8), (10,)]
