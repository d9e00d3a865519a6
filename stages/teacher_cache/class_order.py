"""The orders in which a teacher's classes may be, other than that of the data."""

import re
from collections.abc import Callable

SORT_KEYS: dict[str, Callable[[str], object]] = {  # {value of --classes: sort key of a class name}
    "number": int,
    "natural": lambda name: [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in split_digits(name)],
}


def split_digits(name: str) -> list[str]:
    """Split a name into runs of digits and runs of other characters: `img12b` -> `img`, `12`, `b`."""
    return re.findall(r"[0-9]+|[^0-9]+", name)


def order_classes(names: tuple[str, ...], order: str) -> tuple[str, ...] | None:
    """Return class names in an order of SORT_KEYS; None where they cannot be sorted so."""
    if order == "number" and not all(re.fullmatch("[0-9]{1,18}", name) for name in names):
        return None
    return tuple(sorted(names, key=SORT_KEYS[order]))  # type: ignore[arg-type]
