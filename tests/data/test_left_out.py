"""Nothing of a folder is left out in silence: what is no row is counted and named."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softcache.base.errors import UsageError
from softcache.data.images.image_folder import ImageFolder
from softcache.data.transfer_set import TransferSet, load_transfer_set
from tests.helpers.commands import Stages

Save = Callable[..., Image.Image]


def load_folder(root: Path, **options: str) -> TransferSet:
    return load_transfer_set(f"folder:{root}", Path("unused"), val_fraction=0.25, **options)  # type: ignore[arg-type]


def count_rows(transfer_set: TransferSet) -> int:
    return sum(len(rows) for rows in transfer_set.splits.values())


def file_names(transfer_set: TransferSet) -> set[str]:
    folders = [rows.images for rows in transfer_set.splits.values()]
    return {name for images in folders if isinstance(images, ImageFolder) for name in images.names}


@pytest.fixture
def pets(tmp_path: Path, save_image: Save) -> Path:
    """train/ with 4 and test/ with 2 images of each of the classes cat and dog."""
    root = tmp_path / "pets"
    for split, rows in (("train", 4), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            for k in range(rows):
                save_image(root / split / name / f"{k}.png", k=10 * rows + 5 * k + c)
    return root


def test_nothing_is_said_where_every_file_is_a_row(pets: Path) -> None:
    (pets / "train" / ".DS_Store").write_bytes(b"\0")
    (pets / "train" / "cat" / "Thumbs.db").write_bytes(b"\0")
    assert load_folder(pets).left_out == ""


def test_each_kind_of_file_is_counted_and_the_first_five_are_named(pets: Path, save_image: Save) -> None:
    for k in range(7):
        (pets / f"train/dog/{k}.jfif").write_bytes(b"")
    (pets / "train/cat/a.GIF").write_bytes(b"")
    (pets / "train/cat/README").write_text("cats")
    for k in range(2):
        save_image(pets / f"train/loose{k}.png")
    save_image(pets / "train/@eaDir/thumb.png")
    save_image(pets / "train/cat/@eaDir/0.png/thumb.png")
    save_image(pets / "__MACOSX/train/cat/0.png")
    save_image(pets / "test/dog/.thumbnails/0.png")
    save_image(pets / "test/dog/._0.png")
    save_image(pets / "test/dog/.ipynb_checkpoints/0.png")
    save_image(pets / "stray.png")
    (pets / "validation" / "cat").mkdir(parents=True)
    transfer_set = load_folder(pets, layout="basic")
    assert count_rows(transfer_set) == 12
    assert transfer_set.classes == ("cat", "dog")
    line = transfer_set.left_out
    assert line.startswith(f"of '{pets}', 18 files are left out: ")
    assert "9 not named as images (.gif, .jfif, no ending): " in line
    assert "train/dog/0.jfif, train/dog/1.jfif, train/dog/2.jfif, …" in line
    assert "2 beside the class folders: train/loose0.png, train/loose1.png" in line
    assert "1 beside the folders of the splits: stray.png" in line
    assert "4 in folders of thumbnails: " in line
    assert "2 hidden: test/dog/._0.png, test/dog/.ipynb_checkpoints/0.png" in line
    assert line.endswith("; folders that are no split and are not read: validation")
    assert "\n" not in line


def test_names_in_the_line_can_be_printed(pets: Path) -> None:
    (pets / "train/cat/a\x1b[31m.gif").write_bytes(b"")
    (pets / os.fsdecode(b"train/cat/\xff.gif")).write_bytes(b"")
    assert load_folder(pets).left_out.isprintable()


def test_linked_folders_and_files_are_followed(pets: Path, tmp_path: Path, save_image: Save) -> None:
    for k in range(3):
        save_image(tmp_path / "elsewhere" / "deep" / f"{k}.png", k=70 + k)
    (pets / "train/cat/more").symlink_to(tmp_path / "elsewhere")
    (pets / "train/dog/more").symlink_to(tmp_path / "elsewhere")
    (pets / "train/dog/one.png").symlink_to(tmp_path / "elsewhere/deep/0.png")
    transfer_set = load_folder(pets)
    assert count_rows(transfer_set) == 12 + 3 + 3 + 1
    assert {"train/cat/more/deep/2.png", "train/dog/more/deep/0.png"} <= file_names(transfer_set)
    assert transfer_set.left_out == ""


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "{}/train", "{}"])
def test_a_link_that_leads_back_is_left_out_whole(pets: Path, target: str) -> None:
    """Else the images of all classes would be read once more as images of one."""
    names = file_names(load_folder(pets))
    (pets / "train/cat/back").symlink_to(target.format(pets))
    (pets / "train/loop").symlink_to(".")
    transfer_set = load_folder(pets)
    assert file_names(transfer_set) == names
    assert transfer_set.classes == ("cat", "dog")
    assert "2 links to a folder above: train/loop, train/cat/back" in transfer_set.left_out


def test_links_that_lead_to_each_other_end(pets: Path, tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "next").symlink_to(tmp_path / other)
    (pets / "train/cat/more").symlink_to(tmp_path / "a")
    assert "1 links to a folder above: train/cat/more/next/next" in load_folder(pets).left_out


def test_images_in_a_hidden_folder_beside_the_classes_are_counted(pets: Path, save_image: Save) -> None:
    save_image(pets / "train/.git/x.png")
    assert "1 hidden: train/.git/x.png" in load_folder(pets).left_out


def test_the_side_that_lacks_a_class_is_named(pets: Path, save_image: Save) -> None:
    save_image(pets / "train/owl/0.png")
    assert "the split test has no image of 1 of 3 classes: owl" in load_folder(pets).notes
    save_image(pets / "test/fox/0.png")
    with pytest.raises(UsageError, match=r"not those of the training split, which has no fox: move them away"):
        load_folder(pets)


def test_the_commands_print_the_line_once_each(stages: Stages, pets: Path) -> None:
    (pets / "train/cat/a.gif").write_bytes(b"")
    line = f"of '{pets}', 1 file is left out: 1 not named as images (.gif): train/cat/a.gif"
    data = ("--data", f"folder:{pets}")
    teacher = ("teacher", *data, "--arch", "mlp:2", "--views", "none", "--epochs", "1", "--out", "t")
    cache = ("teacher-cache", *data, "--weights", "t", "--views", "none", "--draws", "1", "--out", "c")
    student = ("student", *data, "--cache", "c", "--arch", "mlp:2", "--epochs", "1", "--out", "s")
    for command, stream in ((teacher, 1), (cache, 1), (student, 2)):
        result = stages.call(*command)
        assert result[0] == 0, result
        assert str(result[stream]).count(line) == 1


@pytest.mark.parametrize("name", ["a\x1b[31m", "two\nlines", os.fsdecode(b"caf\xe9"), "a\u202eb"])
def test_a_class_name_that_cannot_be_printed_is_refused(stages: Stages, pets: Path, name: str) -> None:
    for split in ("train", "test"):
        (pets / split / "cat").rename(pets / split / name)
    options = ("--data", f"folder:{pets}", "--arch", "mlp:2", "--views", "none", "--epochs", "1", "--out", "t")
    error = stages.fails(2, "teacher", *options)
    assert "the class folder '" in error
    assert ascii(name) in error
    assert error.isprintable()
    assert not Path("t").exists()


def test_file_names_that_are_no_text_are_read(pets: Path, save_image: Save) -> None:
    (pets / "train/cat/0.png").rename(pets / os.fsdecode(b"train/cat/\xff\xfe.png"))
    transfer_set = load_folder(pets)
    assert count_rows(transfer_set) == 12
    for rows in transfer_set.splits.values():
        assert rows.images.load_plain(np.arange(len(rows)), 8, 8).shape == (len(rows), 3, 8, 8)


# --- the order of the classes -------------------------------------------------------------------------------------


@pytest.fixture
def numbers(tmp_path: Path, save_image: Save) -> Path:
    """Classes 0, 1, 2, 10 and 11."""
    for split in ("train", "test"):
        for name in ("0", "1", "2", "10", "11"):
            for k in range(2):
                save_image(tmp_path / "numbers" / split / name / f"{k}.png", k=7 * int(name) + k)
    return tmp_path / "numbers"


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("", ("0", "1", "10", "11", "2")),
        ("number", ("0", "1", "2", "10", "11")),
        ("natural", ("0", "1", "2", "10", "11")),
        ("names.txt", ("2", "11", "0", "10", "1")),
    ],
)
def test_the_order_of_the_classes(
    numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("2\r\n11\n0\n\n10\n1\n")
    transfer_set = load_folder(numbers, classes=order)
    assert transfer_set.classes == expected
    for rows in transfer_set.splits.values():
        assert isinstance(rows.images, ImageFolder)
        assert [name.split("/")[1] for name in rows.images.names] == [expected[label] for label in rows.labels]
    is_in_text_order = order == ""
    assert any("--classes number" in note for note in transfer_set.notes) == is_in_text_order
    assert (transfer_set.identity() == load_folder(numbers).identity()) == is_in_text_order


def test_natural_order_compares_the_numbers_in_names(tmp_path: Path, save_image: Save) -> None:
    names = ("img2", "img10", "img1b", "Img1", "img02", "x")
    for split in ("train", "test"):
        for k, name in enumerate(names):
            save_image(tmp_path / split / name / "0.png", k=k)
            save_image(tmp_path / split / name / "1.png", k=k + 50)
    expected = ("Img1", "img1b", "img02", "img2", "img10", "x")
    assert load_folder(tmp_path, classes="natural").classes == expected


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ("number", r"--classes number: 1 of 5 classes are no whole numbers: x"),
        ("nowhere.txt", r"'nowhere\.txt' is no file, and neither natural nor number"),
        ("missing.txt", r"'missing\.txt' does not name the classes 1: x"),
        ("more.txt", r"'more\.txt' names classes that the images do not have 1: y"),
        ("twice.txt", r"'twice\.txt' names twice 1: x"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(
    numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (numbers / split / "2").rename(numbers / split / "x")
    names = ["0", "1", "10", "11"]
    for file, more in (("missing.txt", []), ("more.txt", ["x", "y"]), ("twice.txt", ["x", "x"])):
        Path(file).write_text("\n".join(names + more))
    with pytest.raises(UsageError, match=error):
        load_folder(numbers, classes=order)


@pytest.mark.parametrize("option", ["classes=natural", "exif=transpose", "unreadable=skip"])
def test_options_of_folders_are_refused_with_other_data(option: str) -> None:
    name, value = option.split("=")
    with pytest.raises(UsageError, match=f"--{name} is for --data folder:PATH, .*not for digits"):
        load_transfer_set("digits", Path(), val_fraction=0.1, **{name: value})  # type: ignore[arg-type]


def test_a_student_takes_the_order_from_the_cache(stages: Stages, numbers: Path) -> None:
    data = ("--data", f"folder:{numbers}")
    teacher = ("--classes", "number", "--arch", "mlp:2", "--views", "none", "--epochs", "1", "--out", "t")
    code, out, _ = stages.call("teacher", *data, *teacher)
    assert code == 0
    assert "--classes number" in out.splitlines()[-1]
    cache = ("teacher-cache", *data, "--weights", "t", "--views", "none", "--draws", 1, "--out", "c")
    stages(*cache, "--classes", "number")
    stages("student", *data, "--cache", "c", "--arch", "mlp:2", "--epochs", 1, "--out", "s")
    assert "are in another order" in stages.fails(1, *cache)
    weights = ("--weights", "t/teacher.pt", "--teacher", "mlp:2", "--normalize", "data")
    assert "transfer_set.classes" in stages.fails(1, *cache, *weights)
