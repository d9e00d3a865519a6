"""Tables of labels beside the images: which rows they give, and what is refused."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from softcache.base.errors import CacheError, UsageError
from softcache.data.images.image_folder import ImageFolder
from softcache.data.sources.folders import labels_table
from softcache.data.transfer_set import TransferSet, load_transfer_set
from tests.helpers.commands import Stages

Save = Callable[..., Image.Image]


def load_folder(root: Path, **options: float | str) -> TransferSet:
    arguments = {"val_fraction": 0.25, **options}
    return load_transfer_set(f"folder:{root}", Path("unused"), **arguments)  # type: ignore[arg-type]


def list_rows(transfer_set: TransferSet) -> dict[str, tuple[str, str]]:
    """Return {name of an image: (split, name of its class, or "")}; validation rows are those of training."""
    rows = {}
    for split, part in transfer_set.splits.items():
        assert isinstance(part.images, ImageFolder)
        for name, label in zip(part.images.names, part.labels.tolist(), strict=True):
            rows[name] = ("train" if split == "val" else split, transfer_set.classes[label] if label >= 0 else "")
    return rows


@pytest.fixture
def images(tmp_path: Path, save_image: Save) -> Path:
    """0.png to 7.png, and deep/8.png."""
    for k in range(8):
        save_image(tmp_path / f"images/{k}.png", k=k)
    save_image(tmp_path / "images/deep/8.png", k=8)
    return tmp_path / "images"


ROWS = [(f"{k}.png", "cat" if k % 2 else "dog") for k in range(8)]
EXPECTED = {**{name: ("train", label) for name, label in ROWS}, "deep/8.png": ("train", "")}


def format_table(rows: list[tuple[str, ...]], delimiter: str = ",") -> str:
    return "".join(delimiter.join(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", format_table([("file", "label"), *ROWS])),
        ("Labels.CSV", "\ufeff" + format_table([("Filename", "Class"), *ROWS]).replace("\n", "\r\n")),
        ("labels.csv", format_table(ROWS)),
        ("labels.tsv", format_table([("image", "target"), *ROWS], "\t")),
        ("labels.csv", format_table([("path", "label"), *ROWS], ";")),
        ("labels.csv", format_table([("id", "breed"), *[(name.removesuffix(".png"), label) for name, label in ROWS]])),
        ("labels.csv", format_table([("n", "label", "x", "file"), *[("1", b, '"a,b"', f"./{a}") for a, b in ROWS]])),
        ("labels.csv", format_table([("file", "label"), *ROWS, ("8", "")])),
        ("labels.csv", format_table([("file", "label"), *ROWS, ("deep\\8.png", " ")]) + "\n\n"),
    ],
)
def test_a_table_gives_the_labels_of_the_images_beside_it(images: Path, name: str, text: str) -> None:
    (images / name).write_text(text, encoding="utf-8", newline="")
    transfer_set = load_folder(images)
    assert list_rows(transfer_set) == EXPECTED
    assert transfer_set.classes == ("cat", "dog")
    assert transfer_set.notes[0].startswith(
        "folder 'images': train 9 images; 2 classes (cat, dog); 1 unlabelled; label"
    )
    assert transfer_set.left_out == ""
    assert transfer_set.cut["layout"] == "any"


def test_basic_leaves_a_table_out(images: Path) -> None:
    (images / "labels.csv").write_text(format_table(ROWS))
    (images / "deep/8.png").unlink()
    (images / "deep").rmdir()
    transfer_set = load_folder(images, layout="basic")
    assert transfer_set.classes == ()
    assert "1 not named as images (.csv): labels.csv" in transfer_set.left_out
    assert "layout" not in transfer_set.cut


def test_a_column_names_the_split_and_unlabelled_held_out_images_are_left_out(images: Path) -> None:
    splits = ["train", "TRAIN", "Training", "", "val", "validation", "test", "test"]
    rows = [(name, "" if k == 5 else label, splits[k]) for k, (name, label) in enumerate(ROWS)]
    (images / "labels.csv").write_text(format_table([("file", "label", "split"), *rows]))
    transfer_set = load_folder(images)
    assert {split: len(part) for split, part in transfer_set.splits.items()} == {"train": 5, "val": 1, "test": 2}
    assert "1 without a label in a held-out split: 5.png" in transfer_set.left_out
    assert "the split val has no image of 1 of 2 classes: cat" in transfer_set.notes


def test_without_such_a_column_the_folders_name_the_split(images: Path, save_image: Save) -> None:
    (images / "deep").rename(images / "Test")
    (images / "Train").mkdir()
    for k in range(6):
        (images / f"{k}.png").rename(images / f"Train/{k}.png")
    (images / "labels.csv").write_text(
        format_table([("id", "label"), *[(a[0], b) for a, b in ROWS[:6]], ("8", "cat")])
    )
    transfer_set = load_folder(images)
    expected = {f"Train/{name}": ("train", label) for name, label in ROWS[:6]}
    assert list_rows(transfer_set) == {**expected, "Test/8.png": ("test", "cat")}
    assert "2 beside the folders of the splits: 6.png, 7.png" in transfer_set.left_out


def test_each_split_may_have_a_table_of_its_own(images: Path) -> None:
    (images / "deep").rename(images / "test")
    (images / "train").mkdir()
    for k in range(8):
        (images / f"{k}.png").rename(images / f"train/{k}.png")
    (images / "train/labels.csv").write_text(format_table(ROWS))
    (images / "test/labels.csv").write_text("8.png,cat,test\n")
    assert list_rows(load_folder(images)) == {
        **{f"train/{name}": ("train", label) for name, label in ROWS},
        "test/8.png": ("test", "cat"),
    }


def test_the_identity_follows_the_labels_not_the_order_of_the_rows(images: Path) -> None:
    (images / "labels.csv").write_text(format_table(ROWS))
    before = load_folder(images).identity()
    (images / "labels.csv").write_text(format_table([("file", "label"), *reversed(ROWS)]))
    assert load_folder(images).identity() == before
    (images / "labels.csv").write_text(format_table([("file", "label"), *ROWS[1:], ("0.png", "cat")]))
    assert load_folder(images).identity() != before


@pytest.mark.parametrize(
    ("order", "expected"), [("", ("1", "10", "2")), ("number", ("1", "2", "10")), ("order.txt", ("10", "1", "2"))]
)
def test_the_order_of_the_classes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("order.txt").write_text("10\n1\n2\n")
    (images / "labels.csv").write_text(format_table([(f"{k}.png", ("10", "2", "1")[k % 3]) for k in range(8)]))
    transfer_set = load_folder(images, classes=order)
    assert transfer_set.classes == expected
    assert list_rows(transfer_set)["3.png"] == ("train", "10")
    assert any("--classes number" in note for note in transfer_set.notes) == (order == "")


def test_a_cache_of_a_table_goes_through_every_command(stages: Stages, images: Path) -> None:
    (images / "labels.csv").write_text(format_table([("file", "label"), *ROWS]))
    data, views = ("--data", f"folder:{images}", "--test-fraction", 0.25), ("--views", "none")
    stages("teacher", *data, *views, "--arch", "mlp:2", "--epochs", 1, "--out", "t")
    stages("teacher-cache", *data, *views, "--weights", "t", "--draws", 1, "--out", "c")
    student = ("student", "--data", f"folder:{images}", "--cache", "c", "--arch", "mlp:2", "--epochs", 1, "--out", "s")
    assert stages(*student)["student"]["test"]["rows"] == 2
    (images / "labels.csv").write_text(format_table([("file", "label"), *ROWS[1:], ("0.png", "cat")]))
    assert "made from other data" in stages.fails(1, *student[:-1], "again")


def test_the_rows_are_counted_while_a_table_is_read(images: Path) -> None:
    calls: list[tuple[int, str]] = []

    def progress(items, total, text):  # type: ignore[no-untyped-def]
        calls.append((total, text))
        return items

    (images / "labels.csv").write_text(format_table(ROWS))
    load_transfer_set(f"folder:{images}", Path(), val_fraction=0.25, progress=progress)
    assert calls[0] == (9, "reading labels.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no row: expected file,label in its first line"),
        ("file,label\n", "has no row"),
        ("file\n0.png\n", "has no column of labels (file): expected one of label,"),
        ("label,x\ncat,1\n", "has no column of files (label, x): expected one of file,"),
        ("0.png\n1.png\n", "has one column and no header: expected file,label or file,label,split"),
        ("0.png,cat\n1.png\n", "line 2: 1 columns, the first row has 2"),
        ("0.png,cat\n9.png,dog\n10.png,dog\n", "names 2 files that are not beside it: 9.png, 10.png: put them there"),
        ("0.png,cat\n0,dog\n", "names 1 file more than once: 0: leave one row of each image"),
        ("0.png,cat\n../images/1.png,dog\n", "line 2: '../images/1.png' leads out of the folder of the table by '..'"),
        ("0.png,cat\ndeep\\..\\1.png,dog\n", "line 2: 'deep\\..\\1.png' leads out of the folder"),
        ("/etc/passwd,cat\n", "line 1: '/etc/passwd' is an absolute path: write it relative to the table"),
        ("C:\\0.png,cat\n", "line 1: 'C:\\0.png' is an absolute path"),
        ("link/a.png,cat\n1.png,dog\n", "line 1: 'link/a.png' is a link that leads out of the folder"),
        ("link.png,cat\n1.png,dog\n", "line 1: 'link.png' is a link that leads out of the folder"),
        ("0.png,cat,train\n1.png,dog,tset\n", "line 2: there is no split 'tset': expected one of train, training"),
        ("0.png,cat,test\n1.png,dog,test\nlink.png,,test\nlink/a.png,,test\n", "is a link that leads out"),
        ('0.png,"cat\n1.png,dog\n', "no row of a table ("),
        (f"0.png,{'x' * 300}\n1.png,dog\n", "line 1: a label of 300 characters, at most 200 are read"),
        (f"0.png,{'x' * 200_000}\n", "line 1: no row of a table (field larger than field limit"),
        ("0.png,a\x1b[31m\n1.png,dog\n", "the class 'a?[31m' in '"),
        ("0.png,cat\n1.png,cat\n", "images' has one class, 'cat': at least two are needed"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_in_one_line(
    stages: Stages, images: Path, tmp_path: Path, save_image: Save, text: str, message: str
) -> None:
    save_image(tmp_path / "elsewhere/a.png", k=50)
    (images / "link").symlink_to(tmp_path / "elsewhere")
    (images / "link.png").symlink_to(tmp_path / "elsewhere/a.png")
    (images / "labels.csv").write_text(text)
    code, _, error = stages.call("teacher", "--data", f"folder:{images}", "--arch", "mlp:2", "--out", "none")
    assert code in (1, 2)
    assert message in error
    assert error.startswith("Error: ")
    assert error.rstrip("\n").isprintable()
    assert not Path("none").exists()


def test_a_name_of_several_images_is_refused(images: Path, save_image: Save) -> None:
    save_image(images / "0.bmp", k=60)
    save_image(images / "deep/1.png", k=61)
    (images / "labels.csv").write_text("file,label\n0,cat\n1,dog\n1.png,cat\n")
    with pytest.raises(CacheError, match=r"names 1 file that are several images each: 0: write the paths"):
        load_folder(images)


def test_two_tables_are_refused(images: Path) -> None:
    (images / "labels.csv").write_text(format_table(ROWS))
    (images / "labels.tsv").write_text(format_table(ROWS, "\t"))
    with pytest.raises(UsageError, match=r"has labels\.csv and labels\.tsv: only one table of labels is read"):
        load_folder(images)
    (images / "labels.tsv").unlink()
    (images / "train").mkdir()
    (images / "train/labels.csv").write_text("")
    with pytest.raises(UsageError, match="there are two tables of labels"):
        load_folder(images)


def test_a_table_of_one_split_names_no_other(images: Path) -> None:
    (images / "deep").rename(images / "train")
    (images / "train/labels.csv").write_text("8.png,cat,test\n")
    with pytest.raises(UsageError, match=r"puts 8\.png into the split test, and is in the folder of train"):
        load_folder(images)


def test_text_that_is_no_utf_8_and_files_that_are_too_large_are_refused(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "labels.csv").write_bytes("0.png,Wölfe\n".encode("latin-1"))
    with pytest.raises(CacheError, match="is no text in UTF-8: save it as UTF-8"):
        load_folder(images)
    (images / "labels.csv").write_bytes(b"0.png,cat," + b"x" * (2 << 20) + b"\n")
    with pytest.raises(CacheError, match="has a line of more than 1,048,576 characters"):
        load_folder(images)
    monkeypatch.setattr(labels_table, "_MAX_BYTES", 100)
    with pytest.raises(CacheError, match="bytes, more than the 100 of a table of labels"):
        load_folder(images)
    if os.getuid():
        (images / "labels.csv").chmod(0)
        with pytest.raises(CacheError, match="cannot be read"):
            load_folder(images)


def test_a_label_of_its_own_for_each_image_is_no_class(tmp_path: Path, save_image: Save) -> None:
    for k in range(20):
        save_image(tmp_path / f"{k}.png", k=k)
    (tmp_path / "labels.csv").write_text("".join(f"{k}.png,0.{k}1\n" for k in range(20)))
    with pytest.raises(CacheError, match=r"each label in labels\.csv .* is that of one image: it is no column of cl"):
        load_folder(tmp_path)
