"""Tables beside the images with several labels an image or with numbers: which targets they give, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from softcache.base.errors import CacheError, UsageError
from softcache.data.images.image_folder import ImageFolder
from softcache.data.sources.folders import folder_targets
from softcache.data.transfer_set import TransferSet, load_transfer_set
from tests.helpers.commands import Stages

Save = Callable[..., Image.Image]
N = 6


@pytest.fixture
def images(tmp_path: Path, save_image: Save) -> Path:
    """0.png to 5.png."""
    for k in range(N):
        save_image(tmp_path / f"images/{k}.png", k=k)
    return tmp_path / "images"


def load(root: Path, task: str, text: str = "", name: str = "labels.csv", **options: Any) -> TransferSet:
    if text:
        (root / name).write_text(text, encoding="utf-8")
    return load_transfer_set(f"folder:{root}", Path(), val_fraction=0.25, task=task, **options)


def get_targets(transfer_set: TransferSet) -> dict[str, list[float]]:
    """Return {name of an image: its hard targets}."""
    targets = {}
    for part in transfer_set.splits.values():
        assert isinstance(part.images, ImageFolder)
        targets |= dict(zip(part.images.names, part.labels.tolist(), strict=True))
    return targets


NAMES = {"0.png": [1, 0, 1], "1.png": [0, 1, 0], "2.png": [1, 1, 0], "3.png": [-1, -1, -1], "5.png": [1, 0, 0]}
NAMES_TABLES = {
    "pipes": ("labels.csv", "file,label\n0.png,cat|hat\n1.png,dog\n2.png, dog | cat|\n3.png,\n5.png,cat\n"),
    "semicolons": ("labels.csv", "file,labels\n0.png,cat;hat\n1.png,dog\n2.png,cat; dog\n5.png,cat;cat\n"),
    "commas": ("labels.csv", 'id,breeds\n0,"cat,hat"\n1,dog\n2,"dog,cat"\n5,cat\n'),
    "tabs": ("labels.tsv", "file\tlabel\n0.png\tcat,hat\n1.png\tdog\n2.png\tdog|cat\n5.png\tcat\n"),
    "rows": ("labels.csv", "0.png,cat\n1.png,dog\n0.png,hat\n2.png,dog\n2.png,cat\n2.png,\n5.png,cat\n3.png,\n"),
}


@pytest.mark.parametrize("form", NAMES_TABLES)
def test_cells_have_the_names_of_labels(images: Path, form: str) -> None:
    name, text = NAMES_TABLES[form]
    transfer_set = load(images, "labels", text, name)
    assert (transfer_set.task, transfer_set.classes) == ("labels", ("cat", "dog", "hat"))
    assert get_targets(transfer_set) == {**NAMES, "4.png": [-1, -1, -1]}
    assert transfer_set.notes[0].startswith(
        "folder 'images': train 6 images; 3 labels (cat, dog, hat); 2 unlabelled; labels of labels."
    )
    assert transfer_set.splits["train"].labels.dtype == np.int8


def test_all_forms_of_names_have_one_identity(images: Path) -> None:
    contents = [
        load(images, "labels", text).identity() for name, text in NAMES_TABLES.values() if name == "labels.csv"
    ]
    assert all(content == contents[0] for content in contents)


def test_a_label_may_have_a_column_of_its_own(images: Path) -> None:
    text = "split,file,hat,cat,dog\n,0.png,1,1,0\n,1.png,0,0,1\n,2.png,0.0,1.0,\n,3.png,-1,-1,\n,5.png,0,1,-1\n"
    transfer_set = load(images, "labels", text)
    assert transfer_set.classes == ("hat", "cat", "dog")
    unknown = [-1, -1, -1]
    expected = {"0.png": [1, 1, 0], "1.png": [0, 0, 1], "2.png": [0, 1, -1], "5.png": [0, 1, -1]}
    assert get_targets(transfer_set) == {**expected, "3.png": unknown, "4.png": unknown}
    assert "3 labels (hat, cat, dog); 2 unlabelled; labels of labels.csv (columns file, hat, cat, dog" in str(
        transfer_set.notes
    )
    other = load(images, "labels", text, classes="natural")
    assert other.classes == ("cat", "dog", "hat")
    assert get_targets(other)["0.png"] == [1, 0, 1]
    again = load(images, "labels", text, classes=("dog", "hat", "cat"))  # the order of a cache
    assert (again.classes, get_targets(again)["0.png"]) == (("dog", "hat", "cat"), [0, 1, 1])


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("file,angle\n0.png,1.5\n1.png,-2e1\n2.png,\n3.png,7\n", ("angle",), [[1.5], [-20], [np.nan], [7]]),
        ("0.png,1.5\n1.png,-2e1\n3.png,+7.\n", ("0",), [[1.5], [-20], [np.nan], [7]]),
        ("file,x,label\n0.png,a,1.5\n1.png,b,-20\n3.png,,7\n", ("label",), [[1.5], [-20], [np.nan], [7]]),
        (
            "file;y;x\n0.png;1;.5\n1.png;;2\n2.png;;\n3.png;4;5\n",
            ("y", "x"),
            [[1, 0.5], [np.nan, 2], [np.nan] * 2, [4, 5]],
        ),
    ],
)
def test_columns_have_numbers(images: Path, text: str, names: tuple[str, ...], expected: list[list[float]]) -> None:
    transfer_set = load(images, "numbers", text)
    assert (transfer_set.task, transfer_set.classes) == ("numbers", names)
    targets = get_targets(transfer_set)
    np.testing.assert_array_equal([targets[f"{k}.png"] for k in range(4)], np.float32(expected))
    assert transfer_set.splits["train"].labels.dtype == np.float32
    assert f"{len(names)} numbers ({', '.join(names)}); 3 unlabelled" in transfer_set.notes[0]


def test_images_are_in_the_order_of_their_names_and_held_out_ones_without_numbers_are_left_out(images: Path) -> None:
    text = "file,y,split\n5.png,1,test\n4.png,,test\n3.png,0.5,train\n0.png,9,train\n2.png,,train\n1.png,1,train\n"
    transfer_set = load(images, "numbers", text)
    parts = [transfer_set.splits[split] for split in ("train", "val")]
    rows = [(int(row), name) for p in parts for row, name in zip(p.source_rows, p.images.names, strict=True)]  # type: ignore[arg-type,union-attr]
    assert [name for _, name in sorted(rows)] == [f"{k}.png" for k in range(4)]
    assert transfer_set.splits["test"].labels.tolist() == [[1]]
    assert "1 without a label in a held-out split: 4.png" in transfer_set.left_out


def test_splits_may_have_tables_with_their_columns_in_another_order(images: Path) -> None:
    for split, text in (("train", "file,x,y\n0,1,2\n1,3,4\n"), ("test", "file,y,x\n2,6,5\n3,8,7\n")):
        (images / split).mkdir()
        for k in range(2):
            number = k + 2 * (split == "test")
            (images / f"{number}.png").rename(images / split / f"{number}.png")
        (images / split / "labels.csv").write_text(text)
    (images / "train/4.png").write_bytes((images / "4.png").read_bytes())
    targets = get_targets(load(images, "numbers"))
    assert [targets[f"test/{k}.png"] for k in (2, 3)] == [[5, 6], [7, 8]]
    (images / "test/labels.csv").write_text("file,y,z\n2,6,5\n3,8,7\n")
    with pytest.raises(CacheError, match=r"the split test has the columns y, z by .*: all splits have the same"):
        load(images, "numbers")


WRONG: dict[str, tuple[str, str, str]] = {
    "decimal comma": (
        "numbers",
        'file,y\n0.png,"1,5"\n',
        "line 2: '1,5' in the column 'y' is no number: write it with a",
    ),
    "NaN": (
        "numbers",
        "file,y\n0.png,1\n1.png,NaN\n",
        "line 3: 'NaN' in the column 'y' is no number: leave the cell e",
    ),
    "infinite": ("numbers", "file,y\n0.png,inf\n", "line 2: 'inf' in the column 'y' is no number"),
    "too large": ("numbers", "file,y\n0.png,1e39\n", "line 2: '1e39' in the column 'y' is no finite float32"),
    "text": ("numbers", "0.png,cat\n", "line 1: 'cat' in the column '0' is no number"),
    "hexadecimal": ("numbers", "0.png,0x10\n", "line 1: '0x10' in the column '0' is no number"),
    "a number twice": ("numbers", "0.png,1\n0.png,2\n", "names 1 file more than once: 0.png: leave one row of each"),
    "no numbers": ("numbers", "0.png,\n1.png,\n", "--task numbers needs numbers, and no image has any by labels.csv"),
    "no label": ("labels", "0.png,\n", "--task labels needs labels, and no image has any by labels.csv"),
    "two columns": ("numbers", "file,y,y\n0.png,1,2\n", "has two columns 'y': leave one, or rename it"),
    "no name": ("labels", "file,a,\n0.png,1,0\n", "has a column of labels without a name in its first row: name it"),
    "not 0 or 1": (
        "labels",
        "file,a,b\n0.png,1,2\n",
        "line 2: '2' in the column 'b': expected 0, 1, or -1 or an empty",
    ),
    "a name for 0 or 1": ("labels", "file,a,b\n0.png,yes,no\n", "line 2: 'yes' in the column 'a': expected 0, 1, or"),
    "a label twice": ("labels", "file,a,b\n0.png,0,1\n0.png,0,1\n", "names 1 file more than once"),
    "two splits": (
        "labels",
        "0.png,a,train\n0.png,b,test\n",
        "line 2: '0.png' is in the split test, and in train by ano",
    ),
    "0 and 1 as names": (
        "labels",
        "file,a\n0.png,0\n1.png,1\n",
        "all labels in labels.csv .* are 0 or 1: expected their",
    ),
    "long name": ("labels", f"0.png,a|{'x' * 201}\n", "line 1: a label of 201 characters, at most 200 are read"),
    "control character": ("labels", "0.png,a\x1b|b\n", "has the label 'a.x1b', which cannot be printed: rename it"),
    "captions": (
        "labels",
        f"0.png,{'|'.join(f'w{k}' for k in range(25))}\n",
        "each label in labels.csv .* is that of one",
    ),
    "held-out label": (
        "labels",
        "0.png,a,train\n1.png,b,test\n",
        "has labels of the split test that the training split",
    ),
    "no columns": ("numbers", "file,split\n0.png,train\n", r"has no column of labels \(file, split\)"),
    "no files": ("numbers", "label,x\n1,2\n", "has no column of files"),
    "fractions": (
        "",
        "0.png,1\n1.png,1.5\n",
        "all labels in labels.csv .* are numbers, such as 1.5: say --task numbers",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_with_the_way_out(images: Path, case: str) -> None:
    task, text, words = WRONG[case]
    with pytest.raises((CacheError, UsageError), match=words) as error:
        load(images, task, text)
    assert str(error.value).isprintable()


def test_numbers_with_a_fraction_are_classes_where_it_is_said(images: Path) -> None:
    text = "0.png,1\n1.png,1.5\n2.png,1\n3.png,1.5\n"
    assert load(images, "classes", text).classes == ("1", "1.5")
    assert load(images, "", "0.png,v1.5\n1.png,2\n").classes == ("2", "v1.5")
    for k in range(N, 20):
        (images / f"{k}.png").write_bytes((images / "0.png").read_bytes())
    with pytest.raises(CacheError, match="it is no column of classes; numbers to predict are --task numbers"):
        load(images, "", "".join(f"{k}.png,0.{k}1\n" for k in range(20)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--task numbers is read from labels.csv or labels.tsv, and '.*images' has none"),
        (
            {"layout": "basic"},
            "--task numbers is read from labels.csv, which --layout basic leaves out: use --layout any",
        ),
        ({"layout": "unlabelled"}, "which --layout unlabelled leaves out"),
    ],
)
def test_a_folder_without_a_table_has_no_other_task(images: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(images, "numbers", **options)


def test_targets_that_do_not_fit_in_memory_are_refused(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_targets, "_MAX_BYTES", 10)
    with pytest.raises(CacheError, match=r"2 labels of 6 images take 0\.0 GB: leave out rare ones"):
        load(images, "labels", "0.png,a|b\n1.png,a\n2.png,b\n")


def test_a_cache_of_numbers_in_a_table_goes_through_every_command(stages: Stages, images: Path) -> None:
    (images / "labels.csv").write_text("file,x,y\n" + "".join(f"{k}.png,{k / 2},{1000 * k}\n" for k in range(N)))
    data = ("--data", f"folder:{images}", "--task", "numbers", "--views", "none", "--test-fraction", 0.34)
    stages("teacher", *data, "--arch", "mlp:2", "--epochs", 1, "--out", "t")
    stages("teacher-cache", *data, "--weights", "t", "--draws", 1, "--out", "c")
    student = ("student", *data[:2], "--cache", "c", "--arch", "mlp:2", "--epochs", 1, "--out")
    assert len(stages(*student, "s")["student"]["test"]["per_output"]["rmse"]) == 2
    (images / "labels.csv").write_text("file,x,y\n" + "".join(f"{k}.png,{k / 2},{999 * k}\n" for k in range(N)))
    assert "made from other data" in stages.fails(1, *student, "again")
