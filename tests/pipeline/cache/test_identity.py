"""Identity: which fields make two caches the same, their hash, and the list of those that differ."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from softcache.data.images.image_arrays import ImageArrays
from softcache.data.transfer_set import Split, TransferSet
from softcache.data.views.policy import parse_views
from softcache.pipeline.cache.identity import (
    FORMAT,
    compute_fingerprint,
    find_differences,
    format_differences,
    make_identity,
)

FIXED: dict[str, Any] = {
    "format": 1,
    "transfer_set": {"name": "digits", "classes": ["0", "1"], "content": {"train": "ab", "test": "cd"}},
    "views": {"policy": "crop", "pad": 4, "mixup": 0.0, "seed": 0},
    "teacher": {"arch": "cnn", "weights": "ef", "mean": [0.25, 0.5], "size": 8},
    "codec": "float16",
    "precision": "float32",
}

VALUES = some.sampled_from([None, False, True, 0, 1, 2, 0.0, 1.0, 0.5, "", "1"])
RECORDS = some.recursive(
    VALUES | some.lists(VALUES, max_size=2),
    lambda inner: some.dictionaries(some.sampled_from(["a", "b", "c"]), inner, max_size=3),
    max_leaves=6,
)
IDENTITIES = some.dictionaries(some.sampled_from(["a", "b", "c"]), RECORDS, max_size=3)


def reverse_keys(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: reverse_keys(record[key]) for key in reversed(record)}
    return record


def change(record: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """Copy a record and change the field of this dotted name."""
    copy = json.loads(json.dumps(record))
    inner = copy
    *path, last = field.split(".")
    for key in path:
        inner = inner[key]
    inner[last] = value
    return copy  # type: ignore[no-any-return]


def make_transfer_set(**changes: Any) -> TransferSet:
    images = ImageArrays(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    splits = {name: Split(images, np.zeros(2, np.int64), f"content of {name}") for name in ("train", "val")}
    transfer_set = TransferSet("digits", ("0", "1"), 1, 4, splits, {"val_fraction": 0.1, "seed": 0, "train_size": 0})
    return replace(transfer_set, **changes)


# The fingerprint


def test_the_fingerprint_of_an_identity_is_pinned() -> None:
    """Every cache on disk has one: a change here would refuse them all."""
    assert compute_fingerprint(FIXED) == "d78da4cea1f0b7e875d49c642350aa07888eaddefb980f187d3d096e239cb7d8"


def test_a_fingerprint_depends_on_the_order_of_lists_and_not_on_that_of_keys() -> None:
    reordered = reverse_keys(FIXED)
    assert list(reordered) != list(FIXED)
    assert compute_fingerprint(reordered) == compute_fingerprint(FIXED)
    classes = change(FIXED, "transfer_set.classes", ["1", "0"])
    assert compute_fingerprint(classes) != compute_fingerprint(FIXED)


def test_a_fingerprint_survives_json() -> None:
    assert compute_fingerprint(json.loads(json.dumps(FIXED, indent=2))) == compute_fingerprint(FIXED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("transfer_set.name", "mnist"),
        ("transfer_set.content.test", "ce"),
        ("views.pad", 2),
        ("views.seed", 1),
        ("views.mixup", 0.2),
        ("teacher.weights", "eg"),
        ("teacher.mean", [0.25, 0.5000001]),
        ("codec", "sqrt8"),
        ("precision", "bfloat16"),
    ],
)
def test_every_field_changes_the_fingerprint_and_is_named_where_it_differs(field: str, value: Any) -> None:
    changed = change(FIXED, field, value)
    assert compute_fingerprint(changed) != compute_fingerprint(FIXED)
    ((differing, first, second),) = find_differences(FIXED, changed)
    assert differing == field
    assert second == value
    assert first != second
    _, line = format_differences(FIXED, changed, ("first", "second")).strip("\n").split("\n")
    assert line.split("  ")[1] == field
    assert json.dumps(first)[:30] in line
    assert line.endswith(json.dumps(second))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(IDENTITIES, IDENTITIES)
def test_two_identities_have_the_same_fingerprint_exactly_where_no_field_differs(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert (compute_fingerprint(first) == compute_fingerprint(second)) == (list(find_differences(first, second)) == [])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(IDENTITIES)
def test_an_identity_does_not_differ_from_itself(identity: dict[str, Any]) -> None:
    assert list(find_differences(identity, reverse_keys(json.loads(json.dumps(identity))))) == []


# Differences as text


def test_differences_are_formatted_side_by_side() -> None:
    changed = change(change(FIXED, "views.pad", 2), "codec", "sqrt8")
    assert format_differences(FIXED, changed, ("here", "in the cache")) == (
        """
             here       in the cache
  views.pad  4          2
  codec      "float16"  "sqrt8\""""
    )


def test_no_difference_is_formatted_as_an_empty_text() -> None:
    assert format_differences(FIXED, reverse_keys(FIXED), ("first", "second")) == ""


@pytest.mark.parametrize(
    ("first", "second", "differences"),
    [
        ({"a": 1}, {}, [("a", 1, None)]),
        ({}, {"a": {"b": 1}}, [("a", None, {"b": 1})]),
        ({"a": None}, {}, [("a", None, None)]),
        ({"a": {"b": 1}}, {"a": 2}, [("a", {"b": 1}, 2)]),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3, "d": 4}}, [("a.b", 1, None), ("a.c", 2, 3), ("a.d", None, 4)]),
        ({"a": 1}, {"a": 1.0}, [("a", 1, 1.0)]),
        ({"a": 0}, {"a": False}, [("a", 0, False)]),
        ({"a": [1, 2]}, {"a": (1, 2)}, []),
        ({"a": [1, 2]}, {"a": [2, 1]}, [("a", [1, 2], [2, 1])]),
    ],
)
def test_differences_of_records_whose_fields_differ(first: Any, second: Any, differences: list[Any]) -> None:
    assert repr(list(find_differences(first, second))) == repr(differences)


def test_a_long_value_is_shortened() -> None:
    text = format_differences({"a": "x" * 500}, {"a": "y" * 500}, ("first", "second"))
    assert len(text) < 150
    assert "…" in text


# The fields of an identity


def test_an_identity_has_these_fields() -> None:
    views = replace(parse_views("crop:pad=2,mixup=0.5"), size=4)
    teacher = {"arch": "cnn", "weights": "ef"}
    identity = make_identity(make_transfer_set(), views, 7, teacher, "sqrt8", "bfloat16")
    assert identity == {
        "format": FORMAT,
        "transfer_set": {
            "name": "digits",
            "classes": ["0", "1"],
            "content": {"train": "content of train", "val": "content of val"},
            "cut": {"val_fraction": 0.1, "seed": 0, "train_size": 0},
        },
        "views": {"policy": "crop", "pad": 2, "mixup": 0.5, "size": 4, "resize": 0, "seed": 7},
        "teacher": teacher,
        "codec": "sqrt8",
        "precision": "bfloat16",
    }
    assert json.loads(json.dumps(identity)) == identity


def fingerprint_of(**changes: Any) -> str:
    """The fingerprint of an identity with some arguments of make_identity changed."""
    arguments: dict[str, Any] = {
        "transfer_set": make_transfer_set(),
        "views": parse_views("crop"),
        "seed": 0,
        "teacher": {"arch": "cnn"},
        "codec": "float16",
        "precision": "float32",
    }
    return compute_fingerprint(make_identity(**arguments | changes))


@pytest.mark.parametrize(
    "changes",
    [
        lambda: {"transfer_set": make_transfer_set(name="mnist")},
        lambda: {"transfer_set": make_transfer_set(classes=("1", "0"))},
        lambda: {"transfer_set": make_transfer_set(cut={"val_fraction": 0.2, "seed": 0, "train_size": 0})},
        lambda: {"transfer_set": make_transfer_set(splits={"train": make_transfer_set().splits["train"]})},
        lambda: {"views": parse_views("crop-flip")},
        lambda: {"views": parse_views("crop:pad=3")},
        lambda: {"views": parse_views("crop:mixup=1")},
        lambda: {"views": parse_views("crop:size=8")},
        lambda: {"views": parse_views("crop:resize=8")},
        lambda: {"seed": 1},
        lambda: {"teacher": {"arch": "resnet8"}},
        lambda: {"codec": "float32"},
        lambda: {"precision": "bfloat16"},
    ],
)
def test_each_argument_of_an_identity_changes_the_fingerprint(changes: Callable[[], dict[str, Any]]) -> None:
    assert fingerprint_of(**changes()) != fingerprint_of()
    assert fingerprint_of(**changes()) == fingerprint_of(**changes())
