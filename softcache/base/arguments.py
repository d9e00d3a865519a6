"""Checks of the types of the arguments of public functions. Each raises one line with argument, value and type."""

import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UsageError, make_printable

_MAX_SHOWN = 60  # characters of a value in a message


def type_error(name: str, value: object, expected: str) -> UsageError:
    """Make the error for an argument of another type: `batch_size='8' is a str, not a whole number`.

    Args:
        name: Name of the argument.
        value: What was passed; an array or a tensor is described by its dtype and shape.
        expected: What is expected, with its article; and the way out, where it is not plain.
    """
    if value is None:
        return UsageError(f"{name} is None, not {expected}")
    if getattr(value, "shape", ()):
        dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        return UsageError(f"{name} is {dtype} {list(getattr(value, 'shape', ()))}, not {expected}")
    kind = type(value).__name__
    article = "an" if kind[0] in "aeiouAEIOU" else "a"
    return UsageError(f"{name}={make_printable(repr(value), _MAX_SHOWN)} is {article} {kind}, not {expected}")


def check_integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number as an int.

    Args:
        name: Name of the argument, for messages.
        value: An int, or an integer of NumPy or PyTorch.
        least, most: The smallest and the largest number; None for no bound.

    Raises:
        UsageError: It is of another type, such as bool, float or str, or out of range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise type_error(name, value, "a whole number")
    is_below = least is not None and number < least
    if is_below and most is None:
        raise UsageError(f"{name} {number} is below {least}")
    if is_below or (most is not None and number > most):
        raise UsageError(f"{name} {number} is not between {least} and {most}")
    return int(number)


def check_bool(name: str, value: Any) -> bool:
    """Return a bool; raise UsageError for another type."""
    if not isinstance(value, bool):
        raise type_error(name, value, "True or False")
    return value


def check_text(name: str, value: Any) -> str:
    """Return a str; raise UsageError for another type."""
    if not isinstance(value, str):
        raise type_error(name, value, "a str")
    return value


def check_path(name: str, value: Any) -> Path:
    """Return a path; raise UsageError for what is neither a str nor an os.PathLike of one."""
    if not isinstance(value, str | os.PathLike):
        raise type_error(name, value, "a path")
    return Path(value)


def check_names(name: str, value: Any) -> Sequence[str]:
    """Return a list or tuple of str; raise UsageError for another type, such as a single str."""
    if isinstance(value, str):
        raise UsageError(f"{name} is a list of names, such as ['{make_printable(value, _MAX_SHOWN)}']")
    if not isinstance(value, list | tuple):
        raise type_error(name, value, "a list of names")
    for number, item in enumerate(value):
        if not isinstance(item, str):
            raise type_error(f"{name}[{number}]", item, "a name")
    return value


def check_number(name: str, value: Any) -> float:
    """Return a finite number as a float; raise UsageError for another type, or one that is not finite."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__") or getattr(value, "shape", None):
        raise type_error(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:  # of an int with more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise UsageError(f"{name} {number} is not finite")
    return number
