"""What is wrong with tar shards is one line, with the way out; what is left out is counted."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softcache.base.errors import UsageError
from tests.helpers.commands import Stages
from tests.helpers.data_files import (
    encode_image,
    list_sample,
    load,
    make_images,
    make_splits,
    refuse,
    write_shards,
    write_tar,
)

IMAGE = encode_image(0)


def write_samples(*files: tuple[str, bytes]) -> Callable[[Path], None]:
    """Return what writes a shard of six good samples and these files."""
    samples = [file for image in make_images(6) for file in list_sample(image)]
    return lambda path: write_tar(path, [*samples, *files])


def write_damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what writes a shard whose bytes are changed."""

    def write(path: Path) -> None:
        write_samples()(path)
        path.write_bytes(change(path.read_bytes()))

    return write


def cut_in_data(content: bytes) -> bytes:
    return content[:1000]


def cut_off_the_end(content: bytes) -> bytes:
    return content[: -(-len(content.rstrip(b"\0")) // 512) * 512]


SHARDS: dict[str, tuple[int, Callable[[Path], None], str]] = {
    "missing": (2, lambda path: None, "--data webdataset: there is no file"),
    "folder": (2, lambda path: path.mkdir(), "there is no file *.tar in the folder"),
    "pipe": (1, os.mkfifo, "is a pipe, not a regular file"),
    "gzip": (2, write_damaged(gzip.compress), "is compressed by gzip, and its images cannot be read one by one"),
    "no tar": (1, lambda path: path.write_text("no tar" * 300), "is no tar file, or is damaged"),  # type: ignore[arg-type, return-value]
    "cut in data": (1, write_damaged(cut_in_data), "is no tar file, or is damaged: unexpected end of data"),
    "cut between members": (1, write_damaged(cut_off_the_end), "is cut off: it has no end mark. Copy it again"),
    "two in one": (1, write_damaged(lambda content: content * 2), "has data behind its end mark"),
    "empty": (2, lambda path: write_tar(path, []), "of the split train: no image"),
    "two images": (1, write_samples(("a.jpg", IMAGE), ("a.png", IMAGE)), "sample 'a' has 2 images (a.jpg, a.png)"),
    "broken image": (1, write_samples(("a.jpg", b"no image"), ("a.cls", b"0")), "row 6 (a.jpg) cannot be decoded"),
    "label of text": (
        1,
        write_samples(("a.jpg", IMAGE), ("a.cls", b"bee")),
        "has the label 'bee', and rows before it",
    ),
    "label of bytes": (1, write_samples(("a.jpg", IMAGE), ("a.cls", b"\xff")), "a.cls is no text"),
    "no JSON": (1, write_samples(("a.jpg", IMAGE), ("a.json", b"{")), "a.json is no JSON"),
    "label of a list": (
        1,
        write_samples(("a.jpg", IMAGE), ("a.json", b'{"label": [1]}')),
        "has the label [1]: the number",
    ),
    "large label": (1, write_samples(("a.jpg", IMAGE), ("a.cls", b"9999999")), "the largest is 1048575"),
    "large file": (
        1,
        write_samples(("a.jpg", IMAGE), ("a.cls", bytes(2**20 + 1))),
        "more than a label's file may have",
    ),
    "one class": (
        2,
        lambda path: write_tar(path, list_sample(make_images(3)[0])),
        "the data have one class, '0': at least two are needed",
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_that_cannot_be_read_is_refused(name: str, stages: Stages, tmp_path: Path) -> None:
    code, write, message = SHARDS[name]
    path = tmp_path / "a.tar"
    write(path)
    refuse(stages, code, f"webdataset:{path}", message)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("s3://bucket/a.tar", "files on this machine are read: download it first"),
        ("pipe:cat a.tar", "files on this machine are read"),
        ("t/train-{000000..000002}.tar", "there is no file 't/train-000002.tar'"),
        ("t/*-{a..c}.tar", "'{a..c}' is no range of numbers"),
        ("t/test-*.tar", "there is no file of training rows, only of test"),
        ("{t/train-000000.tar,loose.tar}", "names its split, and 1 others do not, such as 'loose.tar'"),
        ("inner/*", "names folders alone"),
    ],
)
def test_files_that_are_named_wrongly_are_refused(argument: str, message: str, stages: Stages, tmp_path: Path) -> None:
    Path("inner/folder").mkdir(parents=True)
    write_shards(tmp_path / "t", make_splits())
    write_samples()(tmp_path / "loose.tar")
    refuse(stages, 2, f"webdataset:{argument}", message)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--classes",
            "number",
            "--classes number: the labels are numbers, whose order is fixed; a file can name them",
        ),
        ("--classes", "nowhere", "--classes: 'nowhere' is no file"),
        ("--classes", "two", "a train row has the label 2, but there are 2 classes (ant, bee)"),
        ("--classes", "twice", "names twice 1: ant"),
        ("--columns", "label=x", "--columns is for --data hf:NAME, parquet:GLOB, not for webdataset"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    option: str, value: str, message: str, stages: Stages, tmp_path: Path
) -> None:
    (tmp_path / "two").write_text("ant\nbee\n")
    (tmp_path / "twice").write_text("ant\nbee\nant\n")
    refuse(stages, 2, write_shards(tmp_path / "t", make_splits()), message, option, value)


def test_what_a_shard_holds_besides_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_samples(("b.txt", b"a caption"), ("c.jpg", IMAGE), ("c.txt", b"x"), ("c.seg.png", IMAGE), ("README", b"x"))(
        path
    )
    with tarfile.open(path, "a") as tar:
        link, hard = tarfile.TarInfo("d.jpg"), tarfile.TarInfo("e.jpg")
        link.type, link.linkname, hard.type, hard.linkname = tarfile.SYMTYPE, "/etc/passwd", tarfile.LNKTYPE, "c.jpg"
        tar.addfile(link)
        tar.addfile(hard)
    loaded = load(f"webdataset:{path}")
    assert sum(map(len, loaded.splits.values())) == 7
    for part in ("1 samples without an image", "3 files of other endings", "2 links, sparse files or devices"):
        assert part in loaded.left_out
    assert sum(int((rows.labels < 0).sum()) for rows in loaded.splits.values()) == 1  # c.jpg has no label


def test_labels_of_text_are_classes_in_order(tmp_path: Path) -> None:
    files = [
        (f"{k}.{ending}", content)
        for k, name in enumerate(["10", "9", "9", "10", "2", "2"])
        for ending, content in (("jpg", encode_image(k)), ("json", f'{{"label": "{name}"}}'.encode()))
    ]
    write_tar(tmp_path / "a.tar", files)
    assert load(f"webdataset:{tmp_path}/a.tar").classes == ("10", "2", "9")
    assert load(f"webdataset:{tmp_path}/a.tar", classes="number").classes == ("2", "9", "10")
    write_tar(tmp_path / "train/a.tar", files)
    write_tar(tmp_path / "test/a.tar", [("1.jpg", IMAGE), ("1.json", b'{"label": "7"}')])
    with pytest.raises(UsageError, match="the test rows have classes that no training row has: 7"):
        load(f"webdataset:{tmp_path}/t*/*.tar")


def test_shards_of_the_webdataset_library_are_read(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        for k in range(9):
            pixels = np.asarray(Image.open(io.BytesIO(encode_image(k))))
            writer.write({"__key__": f"folder/{k:03d}", "png": pixels, "cls": k % 3, "json": {"caption": "x"}})
    loaded = load(f"webdataset:{tmp_path}/train-0.tar")
    assert loaded.classes == ("0", "1", "2")
    rows, images = loaded.splits["train"].source_rows, loaded.splits["train"].images
    assert rows is not None
    for i, k in enumerate(rows):
        expected = np.asarray(Image.open(io.BytesIO(encode_image(int(k))))).transpose(2, 0, 1)
        assert (images.load_plain(np.array([i]), 8, 8)[0].numpy() == expected).all()
        assert f"folder/{k:03d}.png" in images.describe(i)
