"""Format 1: what another program may rely on, and what must not change unnoticed."""

import json
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import torch

from softcache.pipeline.cache.manifest import seal
from softcache.pipeline.cache.shards import hash_arrays
from tests.helpers.commands import Stages


def test_the_layout_of_a_shard_is_pinned(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["format"] == 1
    record = manifest["shards"][0]
    layout = {
        "logits": ((100, 10), "<f2"),
        "features/pool1": ((100, 64, 4, 4), "<f2"),
        "features/flatten": ((100, 512), "<f2"),
        "index": ((100,), "<u4"),
        "label": ((100,), "<i4"),
        "view_crc32": ((100,), "<u4"),
    }
    assert record["datasets"] == list(layout)
    with h5py.File(cache / record["path"]) as file:
        assert set(file.attrs) == {"fingerprint", "split", "draw", "start", "facts", "payload"}
        for name, (shape, dtype) in layout.items():
            dataset = file[name]
            assert (dataset.shape, dataset.dtype) == (shape, np.dtype(dtype))
            assert dataset.chunks is None
            assert dataset.id.get_offset() is not None
        raw = (cache / record["path"]).read_bytes()
        start = file["label"].id.get_offset()
        np.testing.assert_array_equal(np.frombuffer(raw[start : start + 400], "<i4"), file["label"][:])


def test_the_digest_of_arrays_is_pinned() -> None:
    arrays = {"b": np.arange(6, dtype="<f2").reshape(2, 3), "a": np.array([7, 8], "<u4")}
    assert hash_arrays(arrays) == "00bb30f72e722e0eed4baf541687279d"


def test_student_weights_are_a_plain_state_dict(cache: Path, stages: Stages) -> None:
    stages("student", "--cache", cache, "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    state = torch.load("r/student.pt", weights_only=True)
    assert [tuple(x.shape) for x in state.values()] == [(8, 64), (8,), (10, 8), (10,)]


def test_a_manifest_ends_with_the_sha_256_of_all_bytes_before_it(cache: Path) -> None:
    """As `head -c -82 manifest.json | sha256sum` computes it: the last 82 bytes are the seal."""
    raw = (cache / "manifest.json").read_bytes()
    assert json.loads(raw)["sha256"] == sha256(raw[:-82]).hexdigest()
    assert raw[-82:] == f',\n "sha256": "{sha256(raw[:-82]).hexdigest()}"\n}}\n'.encode()
    assert seal({"a": 1}) == ('{\n "a": 1,\n "sha256": "' + sha256(b'{\n "a": 1').hexdigest() + '"\n}\n')


def test_a_manifest_has_these_fields(cache: Path) -> None:
    record = json.loads((cache / "manifest.json").read_text())
    assert list(record) == [
        "format",
        "fingerprint",
        "identity",
        "classes",
        "draws",
        "splits",
        "taps",
        "shards",
        "head",
        "teacher",
        "fidelity",
        "seconds",
        "settings",
        "versions",
        "sha256",
    ]
    assert list(record["shards"][0]) == [
        "path",
        "split",
        "draw",
        "start",
        "rows",
        "bytes",
        "checksum",
        "payload",
        "correct",
        "datasets",
    ]
