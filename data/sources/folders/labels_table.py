"""Tables of labels: labels.csv or labels.tsv with a row for each image, its file, its label and perhaps its split.

In place of one label there may be the names of several, a column for each label with 0 and 1, or columns of numbers.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from softcache.base.errors import CacheError, make_printable
from softcache.base.progress import Progress
from softcache.base.text import SHOWN_NAMES, shorten_names
from softcache.data.tasks import LABELS, NUMBERS

from .folder_layout import SPLIT_OF_NAME
from .table_cells import MAX_NAME, parse_names, parse_value
from .table_images import ImageFinder

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
RowLabel = str | tuple[str, ...] | tuple[float, ...]


class TableRow(NamedTuple):
    """What a table has of one image.

    Attributes:
        label: The name of its class; the names of its labels; or the value of each column of labels or numbers, NaN
            where it is unknown. Empty where nothing is known.
        split: Its split, "" where the table names none.
    """

    label: RowLabel
    split: str


class LabelsTable(NamedTuple):
    """A table of labels.

    Attributes:
        rows: {image: its row}, the images as they were passed.
        columns: Which columns are read, and which are not, for a line that is printed.
        names: The names of the columns of labels or numbers, where the rows have their values.
    """

    rows: dict[str, TableRow]
    columns: str
    names: tuple[str, ...]


def read_labels(table: Path, images: Sequence[str], root: Path, progress: Progress, task: str = "") -> LabelsTable:
    """Read a table, row by row, and find the image of each row.

    Args:
        table: The file, in UTF-8. Its columns are named by its first row, or are file, label and split.
        images: The images in its folder and below, relative to `root`.
        root: The folder of the table, or one above it.
        progress: Shows how many rows are read.
        task: What the labels are, see data/tasks.py; "" for classes. Several rows of one image are merged where they
            have names of several labels.

    Raises:
        CacheError: The table is too large or no table, a column is missing, a row names a path outside the folder, no
            image or one that another row names, or a split that does not exist; or a cell is no label or number.
    """
    reader = _TableReader(table, task)
    finder = ImageFinder(table.parent, images, root)
    rows: dict[str, TableRow] = {}
    missing, ambiguous, repeated = _Names(), _Names(), _Names()
    for line, name, row in progress(reader.read_rows(), len(images), f"reading {table.name}"):
        try:
            image = finder.find(name)
        except ValueError as error:
            raise CacheError(f"{make_printable(table)}, line {line}: '{make_printable(name)}' {error}") from None
        if image is None:
            (ambiguous if finder.is_ambiguous(name) else missing).add(name)
        elif image in rows and reader.has_names:
            rows[image] = _merge(rows[image], row, f"{make_printable(table)}, line {line}: '{make_printable(name)}'")
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
    return LabelsTable(rows, reader.columns, reader.names)


def _merge(first: TableRow, second: TableRow, place: str) -> TableRow:
    """Merge two rows of one image, with the names of its labels."""
    splits = sorted({first.split, second.split} - {""})
    if len(splits) > 1:
        raise CacheError(f"{place} is in the split {second.split}, and in {first.split} by another row: leave one")
    names = {str(name) for row in (first, second) for name in row.label}
    return TableRow(tuple(sorted(names)), splits[0] if splits else "")


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
        names: The names of the columns with a value each, of several labels or numbers.
    """

    def __init__(self, table: Path, task: str):
        self.table, self.columns = table, ""
        self.names: tuple[str, ...] = ()
        self._task = task
        self._file, self._label, self._split = 0, 1, -1
        self._values: list[int] = [1] if task == NUMBERS else []  # the columns with a value each
        self._width = 0

    @property
    def has_names(self) -> bool:
        """Whether a cell has the names of several labels."""
        return self._task == LABELS and not self._values

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
            self.names = tuple(str(number) for number in range(len(self._values)))
            return False
        others = [column for column in range(len(cells)) if column not in (file, label, split)]
        if label < 0 and len(others) == 1:
            label = others.pop()
        if self._task in (LABELS, NUMBERS):
            self._values = others if label < 0 else [label] if self._task == NUMBERS else []
            self.names = tuple(cells[column] for column in self._values)
            others = [column for column in others if column not in self._values]
            self._check_column_names()
        if file < 0 or (label < 0 and not self._values):
            kind, known = ("files", FILE_COLUMNS) if file < 0 else ("labels", LABEL_COLUMNS)
            raise CacheError(
                f"{path} has no column of {kind} ({shorten_names(cells)}): expected one of {', '.join(known)}"
            )
        self._file, self._label, self._split = file, label, split
        used = [cells[column] for column in dict.fromkeys((file, label, *self._values, split)) if column >= 0]
        shown = shorten_names(used) if len(self._values) > 1 else ", ".join(make_printable(cell, 40) for cell in used)
        self.columns = f"columns {shown}"
        if others:
            self.columns += f"; not read: {shorten_names([cells[column] for column in others])}"
        return True

    def _check_column_names(self) -> None:
        path = make_printable(self.table)
        for number, name in enumerate(self.names):
            if not name:
                raise CacheError(f"{path} has a column of {self._task} without a name in its first row: name it")
            if name in self.names[:number]:
                raise CacheError(f"{path} has two columns '{make_printable(name, 40)}': leave one, or rename it")

    def _make_row(self, line: int, cells: list[str]) -> TableRow:
        path = make_printable(self.table)
        try:
            label = self._read_label(cells)
        except ValueError as error:
            raise CacheError(f"{path}, line {line}: {error}") from None
        name = cells[self._split].strip().lower() if self._split >= 0 else ""
        if name and name not in SPLIT_OF_NAME:
            raise CacheError(
                f"{path}, line {line}: there is no split '{make_printable(name, 40)}': expected one of"
                f" {', '.join(SPLIT_OF_NAME)}"
            )
        return TableRow(label, SPLIT_OF_NAME[name] if name else "")

    def _read_label(self, cells: list[str]) -> RowLabel:
        """Return the label of a row; raise ValueError where a cell is none."""
        if self._values:
            columns = zip(self._values, self.names, strict=True)
            values = tuple(parse_value(cells[column].strip(), name, self._task) for column, name in columns)
            return () if all(value != value for value in values) else values
        label = cells[self._label].strip()
        if self.has_names:
            return parse_names(label)
        if len(label) > MAX_NAME:
            raise ValueError(f"a label of {len(label):,} characters, at most {MAX_NAME} are read")
        return label
