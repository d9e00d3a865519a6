"""The form that a record from a file must have, before anything is taken from it."""

import re
from collections.abc import Callable
from typing import Any

from .errors import CacheError

_STRING, _ITEMS, _INT = 65_536, 1 << 20, 2**53


def validate(value: Any, form: Any, where: str) -> None:
    """Raise CacheError, naming the place, when a JSON value is not of a form.

    A form is `int` (0 to 2**53), `float` (finite, or an int), `str` (printable), a compiled pattern that the whole
    string matches, `dict` (any object), None, a list [form] of any length, a dict {str: form} of any keys, a dict
    with exactly those keys, or a tuple of forms of which one must do.
    """
    if isinstance(form, tuple):
        return _any_of(value, form, where)
    if isinstance(form, dict):
        return _object(value, form, where)
    if isinstance(form, list):
        _want(isinstance(value, list) and len(value) <= _ITEMS, value, "a list", where)
        for i, item in enumerate(value):
            validate(item, form[0], f"{where}[{i}]")
        return
    if isinstance(form, re.Pattern):
        fits = isinstance(value, str) and form.fullmatch(value) is not None
        return _want(fits, value, f"like {form.pattern}", where)
    good, what = _PLAIN[form]
    _want(good(value), value, what, where)


_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (lambda v: type(v) is int and 0 <= v <= _INT, "a whole number from 0"),
    float: (lambda v: type(v) in (int, float) and abs(v) < 1e300, "a finite number"),
    bool: (lambda v: isinstance(v, bool), "true or false"),
    str: (lambda v: isinstance(v, str) and len(v) <= _STRING and v.isprintable(), "a printable string"),
    dict: (lambda v: isinstance(v, dict), "an object"),
    None: (lambda v: v is None, "null"),
}


def _object(value: Any, form: dict[Any, Any], where: str) -> None:
    _want(isinstance(value, dict) and len(value) <= _ITEMS, value, "an object", where)
    if str in form:  # any keys
        for key, item in value.items():
            validate(key, str, f"{where}: a name")
            validate(item, form[str], f"{where}.{key[:40]}")
        return
    if differ := sorted(set(form) ^ set(value)):
        raise CacheError(f"{where}: {differ[0][:80]!r} is {'missing' if differ[0] in form else 'unknown'}")
    for key, inner in form.items():
        validate(value[key], inner, f"{where}.{key}")


def _any_of(value: Any, forms: tuple[Any, ...], where: str) -> None:
    for form in forms[:-1]:
        try:
            return validate(value, form, where)
        except CacheError:
            continue
    validate(value, forms[-1], where)


def _want(good: bool, value: Any, what: str, where: str) -> None:
    if not good:
        raise CacheError(f"{where}: {ascii(value)[:60]} is not {what}")
