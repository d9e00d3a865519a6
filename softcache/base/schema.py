"""Validation of JSON from untrusted files, before anything is taken from it."""

import re
from collections.abc import Callable
from typing import Any

from .errors import CacheError

_MAX_STRING_LENGTH, _MAX_ITEMS, _MAX_INT = 65_536, 1 << 20, 2**53


class OptionalKey(str):
    """A key of a schema that an object may lack."""


def validate(value: Any, schema: Any, location: str) -> None:
    """Check that a JSON value has the types and keys of a schema.

    A schema is one of
        int: a whole number from 0 to 2**53;
        float: a finite number, or an int;
        bool, None: that value of JSON;
        str: a printable string of at most 65,536 characters;
        a compiled pattern: a string that the pattern matches as a whole;
        dict: any object;
        [schema]: a list of any length whose items match the schema;
        {str: schema}: an object with any keys whose values match the schema;
        {"key": schema, …}: an object with exactly these keys, of which those that are an OptionalKey may be absent;
        (schema, …): a value that matches one of these schemas.

    Args:
        value: A value as json.loads returns it.
        schema: What it must match.
        location: Where the value is, such as the path of its file; the message begins with it.

    Raises:
        CacheError: The value does not match; the message names the place and the value.
    """
    if isinstance(schema, tuple):
        return _validate_any(value, schema, location)
    if isinstance(schema, dict):
        return _validate_object(value, schema, location)
    if isinstance(schema, list):
        _require(isinstance(value, list) and len(value) <= _MAX_ITEMS, value, "a list", location)
        for i, item in enumerate(value):
            validate(item, schema[0], f"{location}[{i}]")
        return
    if isinstance(schema, re.Pattern):
        is_match = isinstance(value, str) and schema.fullmatch(value) is not None
        return _require(is_match, value, f"like {schema.pattern}", location)
    is_valid, description = _SIMPLE_SCHEMAS[schema]
    _require(is_valid(value), value, description, location)


_SIMPLE_SCHEMAS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (lambda v: type(v) is int and 0 <= v <= _MAX_INT, "a whole number from 0"),
    float: (lambda v: type(v) in (int, float) and abs(v) < 1e300, "a finite number"),
    bool: (lambda v: isinstance(v, bool), "true or false"),
    str: (lambda v: isinstance(v, str) and len(v) <= _MAX_STRING_LENGTH and v.isprintable(), "a printable string"),
    dict: (lambda v: isinstance(v, dict), "an object"),
    None: (lambda v: v is None, "null"),
}


def _validate_object(value: Any, schema: dict[Any, Any], location: str) -> None:
    _require(isinstance(value, dict) and len(value) <= _MAX_ITEMS, value, "an object", location)
    if str in schema:  # any keys
        for key, item in value.items():
            validate(key, str, f"{location}: a name")
            validate(item, schema[str], f"{location}.{key[:40]}")
        return
    required = {key for key in schema if not isinstance(key, OptionalKey)}
    if differences := sorted((required - set(value)) | (set(value) - set(schema))):
        key = differences[0]
        raise CacheError(f"{location}: {key[:80]!r} is {'missing' if key in schema else 'unknown'}")
    for key, inner in schema.items():
        if key in value:
            validate(value[key], inner, f"{location}.{key}")


def _validate_any(value: Any, schemas: tuple[Any, ...], location: str) -> None:
    for schema in schemas[:-1]:
        try:
            return validate(value, schema, location)
        except CacheError:
            continue
    validate(value, schemas[-1], location)


def _require(is_valid: bool, value: Any, description: str, location: str) -> None:
    if not is_valid:
        raise CacheError(f"{location}: {ascii(value)[:60]} is not {description}")
