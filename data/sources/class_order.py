"""The order of the classes, which is the order of the labels."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.text import shorten_names

SORTED_ORDERS = ("number", "natural")  # values of --classes that need no file
_WHOLE_NUMBER = re.compile("[0-9]{1,18}")


def order_classes(names: tuple[str, ...], order: str | Sequence[str]) -> tuple[str, ...]:
    """Put the names of classes in order.

    Args:
        names: The names, sorted by their text.
        order: See ReadingOptions.

    Raises:
        UsageError: `number`, and a name is no whole number or two are the same one; or the names in the file are not
            those of the classes.
        CacheError: The file cannot be read.
    """
    if not isinstance(order, str):
        return tuple(order) if sorted(order) == sorted(names) else names
    if order == "":
        return names
    if not names:
        raise UsageError(f"--classes {order}: these images have no labels")
    if order == "natural":
        return tuple(sorted(names, key=_natural_key))
    if order == "number":
        return _order_by_number(names)
    return _read_order(Path(order), names)


def sort_classes(names: tuple[str, ...], order: str) -> tuple[str, ...] | None:
    """Put names in an order of SORTED_ORDERS; None where they cannot be sorted so."""
    try:
        return order_classes(tuple(sorted(names)), order)
    except UsageError:
        return None


def describe_number_order(names: tuple[str, ...]) -> str:
    """Describe where whole numbers are in the order of their text: 0, 1, 10, 11, 2; empty where they are not."""
    if not all(_WHOLE_NUMBER.fullmatch(name) for name in names) or list(names) == sorted(names, key=int):
        return ""
    return (
        f"the classes are in the order of their text ({shorten_names(names)}), not of their numbers:"
        " --classes number changes it"
    )


def _natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Digits are compared as numbers, and stand before text; names that are then equal are compared as text."""
    parts = re.split("([0-9]+)", name)
    return [(0, int(part[:4000]), "") if part[0] in "0123456789" else (1, 0, part) for part in parts if part], name


def _order_by_number(names: tuple[str, ...]) -> tuple[str, ...]:
    wrong = [name for name in names if not _WHOLE_NUMBER.fullmatch(name)]
    if wrong:
        raise UsageError(
            f"--classes number: {len(wrong)} of {len(names)} classes are no whole numbers:"
            f" {shorten_names(wrong)}; --classes natural, or a file with the names, orders them"
        )
    by_number: dict[int, str] = {}
    for name in names:
        if int(name) in by_number:
            raise UsageError(f"--classes number: the classes '{by_number[int(name)]}' and '{name}' are one number")
        by_number[int(name)] = name
    return tuple(by_number[number] for number in sorted(by_number))


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes. Raises UsageError for one that is empty or cannot be printed."""
    for name in names:
        if not (name and name.isprintable()):
            raise UsageError(f"the class name {name!a} is empty or has a character that cannot be printed: rename it")
    return tuple(names)


def read_name_lines(path: Path, problem: str = "is no file") -> list[str]:
    """Read the file of --classes: one name a line; empty lines are passed over.

    Args:
        path: The file.
        problem: What is wrong with a path at which there is no file.

    Raises:
        UsageError: There is no such file.
        CacheError: It cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"--classes: '{make_printable(path)}' {problem}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise CacheError(f"--classes: '{make_printable(path)}' cannot be read: {make_printable(error)}") from None
    return [line for line in lines if line.strip()]


def _read_order(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Read an order of the names from a file that has each of them."""
    order = read_name_lines(path, "is no file, and neither natural nor number")
    for problem, wrong in (
        ("names twice", [name for name, count in Counter(order).items() if count > 1]),
        ("names classes that the images do not have", [name for name in order if name not in set(names)]),
        ("does not name the classes", [name for name in names if name not in set(order)]),
    ):
        if wrong:
            raise UsageError(f"--classes: '{make_printable(path)}' {problem} {len(wrong)}: {shorten_names(wrong)}")
    return tuple(order)
