"""The same images as folder, tar shards, parquet files and objects: the same rows, pixels and shards of a cache."""

import io
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import softcache
from softcache.base.errors import CacheError, UsageError
from softcache.data.sources.files.data_files import expand_braces
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages
from tests.helpers.data_files import (
    CLASSES,
    Encoded,
    list_sample,
    load,
    make_images,
    make_splits,
    write_folder,
    write_parquet,
    write_shards,
    write_tar,
)

FORMS = ("folder", "webdataset", "parquet", "stored parquet", "dictionary parquet")


def write(form: str, root: Path, splits: dict[str, list[Encoded]]) -> str:
    """Write images in a form, and return the argument of --data."""
    if form == "folder":
        return write_folder(root / "folder", splits)
    if form == "webdataset":
        return write_shards(root / "tars", splits)
    pytest.importorskip("pyarrow")
    options: dict[str, Any] = {
        "parquet": {"compression": "snappy"},
        "stored parquet": {"compression": "none", "use_dictionary": False, "data_page_size": 2000},
        "dictionary parquet": {"compression": "none"},
    }[form]
    return write_parquet(root / form.replace(" ", "-"), splits, **options)


class InMemory:
    """The images as a map-style dataset."""

    classes = CLASSES

    def __init__(self, images: list[Encoded]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.images[row].content)), self.images[row].label


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TransferSet]:
    """The same images in every form."""
    root, splits = tmp_path_factory.mktemp("same"), make_splits()
    loaded = {form: load(write(form, root, splits)) for form in FORMS}
    return loaded | {"dataset": load({split: InMemory(images) for split, images in splits.items()})}


@pytest.mark.parametrize("policy", ["none", "crop-flip:pad=1", "resized-crop-flip:size=6"])
def test_every_form_gives_the_same_rows_and_views(same: dict[str, TransferSet], policy: str) -> None:
    first = same["folder"]
    for transfer_set in same.values():
        assert transfer_set.size == 8
        for split, rows in transfer_set.splits.items():
            index = np.arange(len(rows))
            assert (rows.labels == first.splits[split].labels).all()
            views = [
                render(images, parse_views(policy), 3, index, 1)
                for images in (rows.images, first.splits[split].images)
            ]
            assert (views[0] == views[1]).all()


def test_names_of_the_classes_come_from_the_schema(same: dict[str, TransferSet]) -> None:
    assert same["parquet"].classes == CLASSES
    assert same["webdataset"].classes == ("0", "1", "2")


def test_content_does_not_depend_on_how_rows_are_stored(same: dict[str, TransferSet]) -> None:
    content = same["webdataset"].identity()["content"]
    assert content == same["parquet"].identity()["content"] == same["stored parquet"].identity()["content"]


def test_stored_images_are_read_from_the_parquet_file_itself(same: dict[str, TransferSet]) -> None:
    for form, is_copied in (("parquet", True), ("stored parquet", False), ("dictionary parquet", False)):
        files = same[form].splits["train"].images.files.files  # type: ignore[union-attr]
        assert all((file.path != file.origin) == is_copied for file in files)
    assert "2 parquet files" not in str(same["stored parquet"].notes)
    assert "3 parquet files are compressed: their images were copied once" in str(same["parquet"].notes)


def test_caches_of_every_form_have_the_same_payloads(stages: Stages, tmp_path: Path) -> None:
    splits = make_splits()
    payloads = {}
    for form in ("folder", "webdataset", "parquet"):
        data = write(form, tmp_path, splits)
        weights = ("--weights", "folder-cache-teacher") if payloads else ()
        common = ("--teacher", "mlp:8", "--views", "crop-flip:pad=1", "--draws", "2", "--shard-rows", "10")
        if form == "webdataset":
            (tmp_path / "names").write_text("\n".join(CLASSES))
            common = (*common, "--classes", "names")
        stages("teacher-cache", "--data", data, *common, *weights, "--out", f"{form}-cache")
        manifest = CacheReader(Path(f"{form}-cache")).manifest
        payloads[form] = {record.path: record.payload for record in manifest.shards}
    assert payloads["folder"] == payloads["webdataset"] == payloads["parquet"]
    dataset = {split: InMemory(images) for split, images in splits.items()}
    teacher = softcache.Cache("folder-cache", data=f"folder:{tmp_path}/folder").reader
    assert teacher.manifest.identity["transfer_set"]["name"] == "folder"
    reader = CacheReader(Path("parquet-cache"))
    parquet = reader.load_transfer_set(f"parquet:{tmp_path}/parquet", Path(), lambda items, *_: items)
    assert parquet.identity()["content"] != load(dataset).identity()["content"]


def test_a_student_is_trained_from_tar_shards_with_worker_processes(stages: Stages, tmp_path: Path) -> None:
    data = ("--data", write("webdataset", tmp_path, make_splits()))
    stages("teacher-cache", *data, "--teacher", "mlp:8", "--views", "none", "--draws", "1", "--out", "c")
    student = ("student", "--cache", "c", "--arch", "mlp:4", "--epochs", "1", "--batch-size", "8")
    one = stages(*student, *data, "--out", "one")
    two = stages(*student, *data, "--workers", "2", "--out", "two")
    assert one["seeds"][0]["student"]["test"] == two["seeds"][0]["student"]["test"]
    assert "name them with --data webdataset:GLOB" in stages.fails(2, *student, "--out", "three")


def test_pickled_images_open_their_files_again(same: dict[str, TransferSet]) -> None:
    images = same["webdataset"].splits["train"].images
    again = pickle.loads(pickle.dumps(images))
    index = np.arange(4)
    assert (again.load_plain(index, 8, 8) == images.load_plain(index, 8, 8)).all()


def test_an_image_that_changes_meanwhile_is_found(tmp_path: Path) -> None:
    load(write("webdataset", tmp_path, make_splits()))
    rows = load(f"webdataset:{tmp_path}/tars").splits["train"]
    number, offset, _ = rows.images.places[5].tolist()  # type: ignore[union-attr]
    path = rows.images.files.files[number].path  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    content[offset + 20] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    with pytest.raises(CacheError, match=r"train-00000\d\.tar row \d+ \(.*\.jpg\), has other bytes than when"):
        rows.images.load_plain(np.array([5]), 8, 8)


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_images_that_cannot_be_decoded_are_named_or_left_out(form: str, tmp_path: Path) -> None:
    splits = make_splits()
    for row in (3, 11):
        splits["train"][row] = splits["train"][row]._replace(content=splits["train"][row].content[:200])
    data = write(form, tmp_path, splits)
    with pytest.raises(CacheError, match=r"2 of 42 images in .* cannot be used: .* row 3"):
        load(data)
    skipping = load(data, unreadable="skip")
    assert sum(len(split) for split in skipping.splits.values()) == 40
    assert [name.rpartition(" ")[2] for name in skipping.cut["unreadable"]] == ["11", "3"]
    assert "2 images cannot be used and are left out" in skipping.notes[0]
    assert load(data, unreadable=skipping.cut["unreadable"]).identity() == skipping.identity()


def test_grey_images_and_their_orientation(tmp_path: Path) -> None:
    turned = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    images = make_images(12, mode="L", format="PNG")
    images[0] = images[0]._replace(content=file.getvalue())
    write_tar(tmp_path / "a.tar", [pair for image in images for pair in list_sample(image)])
    stored, seen = (load(f"webdataset:{tmp_path}/a.tar", exif=exif) for exif in ("stored", "transpose"))
    assert stored.channels == 1
    assert "1 of 12 images that were looked at have an EXIF orientation" in stored.notes[0]
    parts = [split for split in ("train", "val") if 0 in stored.splits[split].images.rows]  # type: ignore[union-attr]
    row = np.flatnonzero(stored.splits[parts[0]].images.rows == 0)  # type: ignore[union-attr]
    pixels = [x.splits[parts[0]].images.load_plain(row, 8, 8)[0, 0].numpy() for x in (stored, seen)]
    assert (pixels[0] == np.asarray(turned)).all()
    assert (pixels[1] == np.rot90(np.asarray(turned), -1)).all()


def test_braces_are_expanded_as_a_shell_does() -> None:
    pattern = "s-{08..11}-{a,b}.tar"
    shell = subprocess.run(
        ["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert expand_braces(pattern) == shell
    assert expand_braces("a") == ["a"]
    with pytest.raises(UsageError, match="is no range of numbers"):
        expand_braces("{a..b}")
    with pytest.raises(UsageError, match=r"no range|stands for"):
        expand_braces("{0..9999999}")
