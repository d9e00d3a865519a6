"""A user's own arrays: numbers of any shape, or images, in a .npz file, a folder of .npy files, or one .npy file.

x, y                                  and `split` (train, val, test), or cut by --val-fraction and --test-fraction
x_train, y_train, x_val, …, x_test, …  each split by itself
classes                               names of the classes, where y has their numbers; of the columns of y
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.base.errors import UsageError, make_printable
from softcache.base.progress import Progress, no_progress
from softcache.base.text import shorten_names
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.images.row_arrays import RowArrays, make_rows
from softcache.data.tasks import EMBEDDING

from .array_files import StoredArray, check_unpacked_size, open_arrays
from .array_labels import to_text
from .array_targets import hold_classes, make_unknown, read_targets
from .source_data import DEFAULT_READING, LabelledImages, ReadingOptions, SourceData
from .split_names import SPLIT_NAMES, map_to_splits

_SPLITS = map_to_splits(SPLIT_NAMES | {"test": ("test",)})
_SPLIT_NUMBERS = ("train", "val", "test")  # 0, 1, 2
_MAX_ENTRIES = 1 << 24
_EXPECTED = "x and y, or x_train, y_train, x_test and y_test (and x_val, y_val)"
Field = tuple[str, str]  # ("x", "train"); the split is "" for an array of all rows


def load_arrays(path: str, options: ReadingOptions = DEFAULT_READING, progress: Progress = no_progress) -> SourceData:
    """Load arrays. Those of .npy files stay in the files and are read row by row.

    Args:
        path: A .npz file; a folder of .npy files; or one .npy file, the rows `x` without labels.
        options: The task; others are unused.
        progress: Unused: values are read when they are hashed.

    Returns:
        Images where x is uint8 [N, S, S], [N, S, S, 1 or 3] or [N, 1 or 3, S, S]; else rows of numbers, in the order
        of the array. Labels are -1 where y is -1, NaN or "", or where there is no y. For several labels or numbers
        see array_targets.read_targets.

    Raises:
        UsageError: There is no such file, or the arrays do not fit together or have another form.
        CacheError: A file is damaged.
    """
    root = Path(path)
    arrays, other_files = open_arrays(root)
    fields, unused = _match_names(arrays)
    if not any(kind == "x" for kind, _ in fields):
        raise UsageError(
            f"'{make_printable(root, None)}' has no array x: it has {shorten_names(list(arrays)) or 'none'}; expected"
            f" {_EXPECTED}"
        )
    _check_fields(fields)
    check_unpacked_size(list(fields.values()))
    notes: list[str] = []
    inputs = {split: _read_input(array, notes) for (kind, split), array in fields.items() if kind == "x"}
    _check_same_form(fields, inputs)
    arrays_of_targets = {split: array for (kind, split), array in fields.items() if kind == "y"}
    if options.task == EMBEDDING and not hold_classes(arrays_of_targets):
        notes.append("y has no class of each row, and is left out: an embedding is evaluated by classes")
        arrays_of_targets = {}
    classes, targets = read_targets(arrays_of_targets, fields.get(("classes", "")), options.task)
    splits = {}
    for split, images in inputs.items():
        of_split = targets.get(split, make_unknown(len(images), targets))
        if len(of_split) != len(images):
            raise UsageError(
                f"'{fields['x', split].name}' has {len(images):,} rows, and '{fields['y', split].name}' has"
                f" {len(of_split):,} labels: one for each row"
            )
        splits[split or "train"] = LabelledImages(images, of_split)
    if ("split", "") in fields:
        splits = _divide(splits["train"], fields["split", ""])
    if unused or other_files:
        names = shorten_names([*unused, *other_files])
        count = len(unused) + len(other_files)
        left_out = f"of '{make_printable(root)}', {count} array{'s are' if count > 1 else ' is'} left out: {names}"
        return SourceData(splits, classes, left_out=left_out, notes=tuple(notes))
    return SourceData(splits, classes, notes=tuple(notes))


def _match_names(arrays: dict[str, StoredArray]) -> tuple[dict[Field, StoredArray], list[str]]:
    """Return the arrays by what they are, whatever the case of their names, and the names of those that are unused."""
    fields: dict[Field, StoredArray] = {}
    unused = []
    for name, array in arrays.items():
        kind, _, split = name.lower().partition("_")
        if not (kind in ("x", "y") and (not split or split in _SPLITS)) and name.lower() not in ("split", "classes"):
            unused.append(name)
            continue
        field = (kind, _SPLITS.get(split, ""))
        if field in fields:
            raise UsageError(
                f"the arrays '{fields[field].name}' and '{make_printable(name)}' are the same: leave out one"
            )
        fields[field] = array
    return fields, unused


def _check_fields(fields: dict[Field, StoredArray]) -> None:
    """Check that it is clear which rows each split has."""
    if ("x", "") in fields and ("x", "train") in fields:
        raise UsageError("there are both 'x' and 'x_train': leave out one")
    if not {("x", ""), ("x", "train")} & set(fields):
        raise UsageError(f"there are no training rows: expected {_EXPECTED}")
    held_out = [array.name for (kind, split), array in fields.items() if kind == "x" and split]
    if ("split", "") in fields and held_out:
        raise UsageError(f"there are both 'split' and '{held_out[0]}': leave out one")
    for kind, split in fields:
        if kind == "y" and ("x", split) not in fields:
            name = fields[kind, split].name
            raise UsageError(f"there is '{name}', but no rows for it: name them 'x{name[1:]}'")


def _read_input(array: StoredArray, notes: list[str]) -> ImageArrays | RowArrays:
    """Read or memory-map images or rows of numbers."""
    name, dtype, shape = array.name, array.dtype, array.shape
    if dtype.kind not in "biuf":
        way_out = "convert text to numbers first, one for each category" if dtype.kind in "SU" else "convert it first"
        raise UsageError(f"'{name}' is {dtype} {list(shape)}: expected integers or floats; {way_out}")
    if not shape or not shape[0]:
        raise UsageError(f"'{name}' has the shape {list(shape)}: it has no rows")
    entries = int(np.prod(shape[1:], dtype=object))
    if not 1 <= entries <= _MAX_ENTRIES:
        raise UsageError(
            f"'{name}' has the shape {list(shape)}: a row has {entries:,} numbers, not 1 to {_MAX_ENTRIES:,}"
        )
    layout = find_image_layout(dtype, shape)
    values = array.open()
    if layout:
        pixels = torch.from_numpy(values)
        if layout == "grey":
            pixels = pixels[:, None]
        elif layout == "last":
            pixels = pixels.permute(0, 3, 1, 2).contiguous()
        return ImageArrays(pixels)
    if dtype == np.uint8 and len(shape) > 2:
        notes.append(
            f"'{name}' is uint8 {list(shape)}: no square images of 1 or 3 channels, so its rows are used as numbers"
        )
    if dtype.kind == "f" and dtype.itemsize > 4:
        notes.append(f"'{name}' is {dtype}: its values are rounded to float32, for teacher and students alike")
    return make_rows(values, name)


def find_image_layout(dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> str:
    """Return "grey", "first" or "last", which axis has the channels of square uint8 images; "" for other arrays."""
    if dtype != np.uint8:
        return ""
    if len(shape) == 3 and shape[1] == shape[2] > 1:
        return "grey"
    if len(shape) == 4 and shape[1] in (1, 3) and shape[2] == shape[3]:
        return "first"
    return "last" if len(shape) == 4 and shape[3] in (1, 3) and shape[1] == shape[2] else ""


def _check_same_form(fields: dict[Field, StoredArray], inputs: dict[str, ImageArrays | RowArrays]) -> None:
    """Check that the rows of all splits have one shape."""
    forms = {}
    for split, images in inputs.items():
        is_row = isinstance(images, RowArrays)
        shape = images.shape if isinstance(images, RowArrays) else (images.channels, images.size, images.size)
        forms[split] = ("rows of numbers" if is_row else "images", list(shape))
    first = next(iter(forms))
    for split, (kind, row_shape) in forms.items():
        if (kind, row_shape) != forms[first]:
            names = fields["x", first].name, fields["x", split].name
            raise UsageError(
                f"'{names[0]}' has {forms[first][0]} {forms[first][1]}, and '{names[1]}' has {kind} {row_shape}: all"
                " splits have one form"
            )


def _divide(rows: LabelledImages, array: StoredArray) -> dict[str, LabelledImages]:
    """Divide rows as `split` says."""
    values = array.read()
    if values.shape != (len(rows.labels),):
        raise UsageError(
            f"'split' has the shape {list(values.shape)}: expected one for each of {len(rows.labels):,} rows"
        )
    numbers: dict[Any, int]
    if values.dtype.kind in "SU":
        of_row = np.char.lower(np.char.strip(to_text(values, "split")))
        numbers = {text: _SPLIT_NUMBERS.index(split) for text, split in _SPLITS.items()}
        kinds = np.unique(of_row).tolist()
    elif values.dtype.kind in "iu":
        of_row, kinds = values, np.unique(values).tolist()
        numbers = {number: number for number in range(len(_SPLIT_NUMBERS))}
    else:
        raise UsageError(f"'split' is {values.dtype}: expected train, val or test; or 0, 1 or 2")
    if unknown := [kind for kind in kinds if kind not in numbers]:
        raise UsageError(f"'split' has {make_printable(repr(unknown[0]))}: expected train, val or test; or 0, 1 or 2")
    divided = {}
    for number, split in enumerate(_SPLIT_NUMBERS):
        index = np.flatnonzero(np.isin(of_row, [kind for kind in kinds if numbers[kind] == number]))
        if len(index):
            divided[split] = rows.take(index)
    if "train" not in divided:
        raise UsageError("'split' has no row of train")
    return divided
