"""Cells of a table of labels: names of several labels, a label that is there or not, and numbers."""

import math
import re
from collections.abc import Sequence

import numpy as np

from softcache.base.errors import make_printable
from softcache.data.tasks import LABELS

MAX_NAME = 200  # characters
_SEPARATORS = re.compile("[|;,]")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,9})?")
_LABEL_VALUES = {"": math.nan, "-1": math.nan, "0": 0.0, "1": 1.0, "-1.0": math.nan, "0.0": 0.0, "1.0": 1.0}


def find_fraction(texts: Sequence[str]) -> str:
    """Return the first text that is no whole number where all are numbers, such as -1.5e3; else ""."""
    if not all(map(_NUMBER.fullmatch, texts)):
        return ""
    return next((text for text in texts if not float(text).is_integer()), "")


def parse_names(cell: str) -> tuple[str, ...]:
    """Return the names of the labels in a cell, sorted, each once: they are separated by |, ; or a comma.

    Raises:
        ValueError: A name is too long.
    """
    names = {name.strip() for name in _SEPARATORS.split(cell)} - {""}
    if (longest := max(map(len, names), default=0)) > MAX_NAME:
        raise ValueError(f"a label of {longest:,} characters, at most {MAX_NAME} are read")
    return tuple(sorted(names))


def parse_value(cell: str, column: str, task: str) -> float:
    """Return the value of a cell: of labels 0 or 1, else a number; NaN where it is unknown.

    Args:
        cell: The text, without blanks around it.
        column: The name of its column, for messages.
        task: "labels" or "numbers".

    Raises:
        ValueError: It is no such value.
    """
    place = f"'{make_printable(cell, 40)}' in the column '{make_printable(column, 40)}'"
    if task == LABELS:
        if cell not in _LABEL_VALUES:
            raise ValueError(f"{place}: expected 0, 1, or -1 or an empty cell where the label is unknown")
        return _LABEL_VALUES[cell]
    if not cell:
        return math.nan
    if not _NUMBER.fullmatch(cell):
        if _NUMBER.fullmatch(cell.replace(",", ".", 1)):
            raise ValueError(f"{place} is no number: write it with a decimal point, {cell.replace(',', '.', 1)}")
        raise ValueError(f"{place} is no number: leave the cell empty where it is unknown")
    if abs(value := float(cell)) > float(np.finfo(np.float32).max):
        raise ValueError(f"{place} is no finite float32")
    return value
