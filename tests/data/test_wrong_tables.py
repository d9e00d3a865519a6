"""What is wrong with parquet files is one line, with the way out; what is left out is counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softcache.base.errors import UsageError
from softcache.data.sources.source_data import ReadingOptions
from tests.helpers.commands import Stages
from tests.helpers.data_files import CLASSES, Encoded, load, make_splits, refuse, write_parquet


def make_table(**columns: Callable[[list[Encoded]], Any]) -> Callable[[list[Encoded]], Any]:
    """Return what makes a table of these columns."""

    def make(images: list[Encoded]) -> Any:
        import pyarrow as pa

        return pa.table({name: make_column(images) for name, make_column in columns.items()})

    return make


def contents(images: list[Encoded]) -> list[bytes]:
    return [image.content for image in images]


def numbers(images: list[Encoded]) -> list[int]:
    return [image.label for image in images]


TABLES: dict[str, tuple[int, Any, str, tuple[str, ...]]] = {
    "no image": (2, make_table(text=numbers), "has no column of encoded images", ()),
    "two images": (
        2,
        make_table(image=contents, img=contents, label=numbers),
        "has 2 columns of images, image, img: choose one with --columns image=image",
        (),
    ),
    "two labels": (
        2,
        make_table(image=contents, label=numbers, target=numbers),
        "has 2 columns of labels, label, target: choose one with --columns label=label",
        (),
    ),
    "no such column": (
        2,
        make_table(image=contents, label=numbers),
        "--columns label=kind: that column of",
        ("--columns", "label=kind"),
    ),
    "column of another type": (
        2,
        make_table(image=contents, label=numbers),
        "is not of a type that is read; its columns for labels are: label",
        ("--columns", "label=image"),
    ),
    "no columns": (
        2,
        make_table(image=contents, label=numbers),
        "--columns kind: expected image=COLUMN, label=COLUMN or both",
        ("--columns", "kind"),
    ),
    "paths alone": (
        2,
        make_table(image=lambda images: [{"bytes": None, "path": "/etc/passwd"}] * len(images), label=numbers),
        "has no column of encoded images",
        (),
    ),
    "no image in any row": (
        2,
        make_table(image=lambda images: [b""] * len(images), label=numbers),
        "has no bytes, at most paths of files elsewhere, which are not read",
        (),
    ),
    "broken image": (
        1,
        make_table(image=lambda images: [b"x", *contents(images)[1:]], label=numbers),
        "row 0 cannot be decoded: not an image",
        (),
    ),
    "large label": (1, make_table(image=contents, label=lambda images: [2**40] * len(images)), "the largest is", ()),
    "one class": (
        2,
        make_table(image=contents, label=lambda images: ["bee"] * len(images)),
        "the data have one class, 'bee'",
        (),
    ),
    "negative label": (
        1,
        make_table(image=contents, label=lambda images: [-5] * len(images)),
        "row 0 has the label -5: expected a number from 0, or -1 where it is unknown",
        (),
    ),
    "part of a class": (
        1,
        make_table(image=contents, label=lambda images: [image.label + 0.5 for image in images]),
        "row 0 has the label 0.5: the number of a class or a text is expected",
        (),
    ),
    "yes and no": (
        1,
        make_table(image=contents, label=lambda images: [image.label > 0 for image in images]),
        "row 0 has the label False: the number of a class or a text is expected",
        (),
    ),
    "names of classes": (2, None, "the files record the classes, in the order of their labels", ("--classes", "f")),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_cannot_be_read_is_refused(name: str, stages: Stages, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    code, make, message, options = TABLES[name]
    data = write_parquet(tmp_path / "p", make_splits(), make_table=make, features=make is None)
    refuse(stages, code, data, message, *options)


@pytest.mark.parametrize("damage", ["cut off", "zeros", "text", "empty"])
def test_a_damaged_parquet_file_is_refused(damage: str, stages: Stages, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    data = write_parquet(tmp_path / "p", make_splits())
    path = tmp_path / "p/train-00000-of-00002.parquet"
    content = path.read_bytes()
    middle = len(content) // 4
    changed = {
        "cut off": content[:-100],
        "zeros": content[:middle] + bytes(2000) + content[middle + 2000 :],
        "text": b"text" * 100,
        "empty": b"",
    }
    path.write_bytes(changed[damage])
    refuse(stages, 1, data, "is no parquet file, or is damaged")


def test_plain_tables_with_text_labels_and_gaps_are_read(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    names = make_table(
        img=lambda images: [None, *contents(images)[1:]],
        label=lambda images: [None if row == 2 else CLASSES[image.label] for row, image in enumerate(images)],
    )
    loaded = load(write_parquet(tmp_path / "p", make_splits(), make_table=names, features=False))
    assert loaded.classes == CLASSES
    assert "3 rows without an image" in loaded.left_out
    assert sum(map(len, loaded.splits.values())) == 39
    assert sum(int((rows.labels < 0).sum()) for rows in loaded.splits.values()) == 3


def test_numbers_that_a_missing_one_made_floats_are_labels(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    floats = make_table(
        image=contents,
        label=lambda images: [None if row == 2 else float(image.label) for row, image in enumerate(images)],
    )
    loaded = load(write_parquet(tmp_path / "p", make_splits(), make_table=floats, features=False))
    assert loaded.classes == ("0", "1", "2")
    assert sum(loaded.count_labelled().values()) == 39
    assert loaded.notes[-1] == "'p': train 24, val 6, test 12 rows; 3 classes (0, 1, 2); 3 unlabelled"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("softcache.base.packages.find_spec", lambda _: None)
    for data, package, extra in (("parquet:x.parquet", "pyarrow", "parquet"), ("hf:beans", "datasets", "hf")):
        with pytest.raises(UsageError, match=rf"{package}, which is not installed: pip install -e '\.\[{extra}\]'"):
            load(data)
    assert ReadingOptions().columns == ""
