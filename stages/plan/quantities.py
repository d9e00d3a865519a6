"""Numbers of rows and of bytes, as people write them."""

import re

from softcache.base.errors import UsageError, make_printable
from softcache.pipeline.cache.manifest import MAX_ROWS

_UNITS = {f"{prefix}{'i' * is_binary}B": (1024 if is_binary else 1000) ** power
          for power, prefix in enumerate("kMGTP", 1) for is_binary in (False, True)}  # fmt: skip
_BYTES = re.compile(r"(-?[0-9.]+(?:e[0-9]+)?) ?([a-z]*)", re.IGNORECASE)


def parse_rows(text: str) -> int:
    """Parse a number of rows, such as 14e6.

    Raises:
        UsageError: It is no whole number from 2 to 2**32 - 1.
    """
    try:
        number = float(text)
    except ValueError:
        raise UsageError(f"--rows {make_printable(text, 40)} is not a number, such as 14e6 or 1281167") from None
    if not 2 <= number <= MAX_ROWS or number != int(number):
        raise UsageError(f"--rows {make_printable(text, 40)} is not a whole number from 2 to {MAX_ROWS}")
    return int(number)


def parse_bytes(text: str) -> int:
    """Parse a number of bytes with its unit, such as 500GB or 2TiB.

    Raises:
        UsageError: It has no number, no unit, another unit, or is not above 0.
    """
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    match, shown = _BYTES.fullmatch(text.strip()), make_printable(text, 40)
    try:
        number = float(match[1]) if match else None
    except ValueError:
        number = None
    if match is None or number is None:
        raise UsageError(f"--budget {shown} is no number of bytes: write it as 500GB or 2TiB")
    if match[2].lower() not in units:
        problem = f"has the unit {match[2]}" if match[2] else "has no unit"
        raise UsageError(f"--budget {shown} {problem}: there are {', '.join(_UNITS)}")
    if number <= 0:
        raise UsageError(f"--budget {shown} is not above 0")
    return int(number * units[match[2].lower()])


def format_bytes(count: float) -> str:
    """Format bytes as `12.3 kB`, `1.2 GB` or `55.1 TB`."""
    for unit, size in (("B", 1), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if count < 999.5 * size or unit == "TB":
            return f"{count:,.0f} B" if unit == "B" else f"{count / size:,.1f} {unit}"
    raise AssertionError
