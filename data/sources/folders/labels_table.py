"""Tables of labels: labels.csv or labels.tsv with a row for each image, its file, its label and perhaps its split.

No path of a table is opened: each is looked up among the images that are in the folder of the table.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from softcache.base.errors import CacheError, make_printable
from softcache.base.progress import Progress
from softcache.base.text import SHOWN_NAMES, shorten_names

from .folder_layout import SPLIT_OF_NAME

# Headers of the columns, in any case; where a table has several of one row, the first of these is read.
FILE_COLUMNS = (
    *("file", "filename", "file_name", "filepath", "file_path"),
    *("image", "image_name", "image_path", "path", "image_id", "id"),
)
# Beside a column of files, a single column that is not of splits is that of the labels, as in Kaggle's id,breed.
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
_MAX_BYTES = 1 << 30
_MAX_LINE = 1 << 20  # characters
_MAX_LABEL = 200  # characters


class TableRow(NamedTuple):
    """What a table has of one image: its label, "" where it has none, and its split, "" where it names none."""

    label: str
    split: str


class LabelsTable(NamedTuple):
    """A table of labels.

    Attributes:
        rows: {image: its row}, the images as they were passed.
        columns: Which columns are read, and which are not, for a line that is printed.
    """

    rows: dict[str, TableRow]
    columns: str


def read_labels(table: Path, images: Sequence[str], root: Path, progress: Progress) -> LabelsTable:
    """Read a table, row by row, and find the image of each row.

    Args:
        table: The file, in UTF-8. Its columns are named by its first row, or are file, label and split.
        images: The images in its folder and below, relative to `root`.
        root: The folder of the table, or one above it.
        progress: Shows how many rows are read.

    Raises:
        CacheError: The table is too large or no table, a column is missing, a row names a path outside the folder, no
            image or one that another row names, or a split that does not exist.
    """
    reader = _TableReader(table)
    finder = _ImageFinder(table.parent, images, root)
    rows: dict[str, TableRow] = {}
    missing, ambiguous, repeated = _Names(), _Names(), _Names()
    for line, name, row in progress(reader.read_rows(), len(images), f"reading {table.name}"):
        try:
            image = finder.find(name)
        except ValueError as error:
            raise CacheError(f"{make_printable(table)}, line {line}: '{make_printable(name)}' {error}") from None
        if image is None:
            (ambiguous if finder.is_ambiguous(name) else missing).add(name)
        elif image in rows:
            repeated.add(name)
        else:
            rows[image] = row
    for names, problem, advice in (
        (missing, "names {} that are not beside it", "put them there, or take their rows out"),
        (ambiguous, "names {} that are several images each", "write the paths, with the endings"),
        (repeated, "names {} more than once", "leave one row of each image"),
    ):
        if names.count:
            files = f"{names.count:,} {'file' if names.count == 1 else 'files'}"
            text = f"{problem.format(files)}: {shorten_names(names.first)}: {advice}"
            raise CacheError(f"{make_printable(table)} {text}; --layout basic does not read it")
    if not rows:
        raise CacheError(
            f"{make_printable(table)} has no row: expected file,label in its first line and a row an image"
        )
    return LabelsTable(rows, reader.columns)


class _Names:
    """A count of names, and the first of them."""

    def __init__(self) -> None:
        self.count, self.first = 0, list[str]()

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) <= SHOWN_NAMES:
            self.first.append(name)


class _TableReader:
    """Reads the rows of a table.

    Attributes:
        columns: Which columns are read, once the first row is.
    """

    def __init__(self, table: Path):
        self.table, self.columns = table, ""
        self._file, self._label, self._split = 0, 1, -1
        self._width = 0

    def read_rows(self) -> Iterator[tuple[int, str, TableRow]]:
        """Yield line number, name of the image and row."""
        path = make_printable(self.table)
        try:
            if (size := self.table.stat().st_size) > _MAX_BYTES:
                raise CacheError(f"{path} has {size:,} bytes, more than the {_MAX_BYTES:,} of a table of labels")
            with self.table.open(encoding="utf-8-sig", newline="") as file:
                first = file.readline(_MAX_LINE)
                file.seek(0)
                reader = csv.reader(self._read_lines(file), delimiter=self._find_delimiter(first), strict=True)
                for cells in reader:
                    if not any(cell.strip() for cell in cells):
                        continue
                    if not self._width and self._read_header([cell.strip() for cell in cells]):
                        continue
                    if len(cells) != self._width:
                        raise CacheError(
                            f"{path}, line {reader.line_num}: {len(cells)} columns, the first row has {self._width}"
                        )
                    yield reader.line_num, cells[self._file].strip(), self._make_row(reader.line_num, cells)
        except UnicodeDecodeError:
            raise CacheError(f"{path} is no text in UTF-8: save it as UTF-8") from None
        except csv.Error as error:
            raise CacheError(f"{path}, line {reader.line_num}: no row of a table ({error})") from None
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}") from None

    def _read_lines(self, file: TextIO) -> Iterator[str]:
        """Yield the lines of a file; none is read that would not fit in memory."""
        while line := file.readline(_MAX_LINE + 1):
            if len(line) > _MAX_LINE:
                raise CacheError(f"{make_printable(self.table)} has a line of more than {_MAX_LINE:,} characters")
            yield line

    def _find_delimiter(self, first: str) -> str:
        if self.table.suffix.lower() == ".tsv":
            return "\t"
        return ";" if ";" in first and "," not in first else ","

    def _read_header(self, cells: list[str]) -> bool:
        """Find the columns in the first row; return whether it is a header, else it is a row of an image."""
        path, names = make_printable(self.table), [cell.lower() for cell in cells]
        self._width = len(names)
        file, label, split = (
            next((names.index(name) for name in known if name in names), -1)
            for known in (FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
        )
        if file < 0 and label < 0:
            if not 2 <= len(cells) <= 3:
                if len(cells) == 1 and "\t" in cells[0]:
                    raise CacheError(f"{path} is separated by tabs: call it labels.tsv")
                columns = "one column" if len(cells) == 1 else f"{len(cells)} columns"
                raise CacheError(
                    f"{path} has {columns} and no header: expected file,label or file,label,split in its first line"
                )
            self._split = 2 if len(cells) == 3 else -1
            self.columns = f"no header: {'file, label, split' if len(cells) == 3 else 'file, label'}"
            return False
        others = [column for column in range(len(cells)) if column not in (file, label, split)]
        if label < 0 and len(others) == 1:
            label = others.pop()
        if file < 0 or label < 0:
            kind, known = ("files", FILE_COLUMNS) if file < 0 else ("labels", LABEL_COLUMNS)
            raise CacheError(
                f"{path} has no column of {kind} ({shorten_names(cells)}): expected one of {', '.join(known)}"
            )
        self._file, self._label, self._split = file, label, split
        used = [cells[column] for column in (file, label, split) if column >= 0]
        self.columns = f"columns {', '.join(make_printable(cell, 40) for cell in used)}"
        if others:
            self.columns += f"; not read: {shorten_names([cells[column] for column in others])}"
        return True

    def _make_row(self, line: int, cells: list[str]) -> TableRow:
        path, label = make_printable(self.table), cells[self._label].strip()
        if len(label) > _MAX_LABEL:
            raise CacheError(
                f"{path}, line {line}: a label of {len(label):,} characters, at most {_MAX_LABEL} are read"
            )
        name = cells[self._split].strip().lower() if self._split >= 0 else ""
        if name and name not in SPLIT_OF_NAME:
            raise CacheError(
                f"{path}, line {line}: there is no split '{make_printable(name, 40)}': expected one of"
                f" {', '.join(SPLIT_OF_NAME)}"
            )
        return TableRow(label, SPLIT_OF_NAME[name] if name else "")


# What a row may name an image by: its path, its path without the ending, its name, its name without the ending.
_KEYS: tuple[Callable[[str], str], ...] = (
    lambda path: path,
    lambda path: os.path.splitext(path)[0],
    os.path.basename,
    lambda path: os.path.splitext(os.path.basename(path))[0],
)


class _ImageFinder:
    """Finds the image that a row names: by its path, with or without its ending, or by its name where that is unique.

    Args:
        folder: To which the names are relative.
        images: The images in it and below, relative to `root`.
        root: The folder, or one above it.
    """

    def __init__(self, folder: Path, images: Sequence[str], root: Path):
        start = 0 if folder == root else len(f"{folder.relative_to(root).as_posix()}/")
        self._images, self._paths = images, [image[start:] for image in images]  # paths relative to the folder
        self._root = root
        self._real_folder = os.path.realpath(folder)
        self._is_inside: dict[str, bool] = {}  # of the folders of images
        self._indexes: list[dict[str, str | None]] = []  # of _KEYS, each made when the ones before lack a name

    def find(self, text: str) -> str | None:
        """Return the image of a name; None where there is none, or several.

        Raises:
            ValueError: The name leads out of the folder.
        """
        name = _normalize(text)
        index = self._find_index(name)
        image = index[name] if index is not None else None
        if image is not None and self._leads_out(image):
            raise ValueError("is a link that leads out of the folder: copy the file there")
        return image

    def is_ambiguous(self, text: str) -> bool:
        """Return whether several images have a name."""
        return self._find_index(_normalize(text)) is not None and self.find(text) is None

    def _find_index(self, name: str) -> dict[str, str | None] | None:
        """Return the first index that has a name."""
        for k, key in enumerate(_KEYS):
            if k == len(self._indexes):
                index: dict[str, str | None] = {}
                for image, path in zip(self._images, self._paths, strict=True):
                    value = key(path)
                    index[value] = None if value in index else image
                self._indexes.append(index)
            if name in self._indexes[k]:
                return self._indexes[k]
        return None

    def _leads_out(self, image: str) -> bool:
        path = os.path.join(self._root, image)
        parent = os.path.dirname(path)
        if parent not in self._is_inside:
            self._is_inside[parent] = self._contains(parent)
        return not self._is_inside[parent] or (os.path.islink(path) and not self._contains(path))

    def _contains(self, path: str) -> bool:
        return os.path.commonpath([os.path.realpath(path), self._real_folder]) == self._real_folder


def _normalize(name: str) -> str:
    """Write a name with slashes and without `./`.

    Raises:
        ValueError: It is absolute or has `..`.
    """
    path = name.replace("\\", "/")
    if path.startswith("/") or re.match("[A-Za-z]:/", path):
        raise ValueError("is an absolute path: write it relative to the table")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError("leads out of the folder of the table by '..'")
    return "/".join(parts)
