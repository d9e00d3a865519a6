"""Which column of a table holds the images and which the labels, by the conventions of the Hugging Face Hub."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softcache.base.errors import UsageError, make_printable

_IMAGE_NAMES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target")
_MAX_METADATA = 16 << 20  # bytes


class TableColumns(NamedTuple):
    """The columns of a table that are read.

    Attributes:
        image: The column of the encoded images.
        label: The column of the labels; empty where there is none.
        classes: The names of the classes that the table records; empty where it records none.
    """

    image: str
    label: str
    classes: tuple[str, ...]


def parse_columns(text: str) -> dict[str, str]:
    """Parse the option --columns, such as `image=img,label=fine_label`.

    Raises:
        UsageError: It is of another form.
    """
    columns: dict[str, str] = {}
    for part in text.split(",") if text else ():
        kind, equals, name = part.partition("=")
        if kind not in ("image", "label") or not (equals and name) or kind in columns:
            raise UsageError(f"--columns {make_printable(text)}: expected image=COLUMN, label=COLUMN or both")
        columns[kind] = name
    return columns


def choose_columns(
    place: str,
    images: Sequence[str],
    labels: Sequence[str],
    names: Sequence[str],
    features: Mapping[str, Any],
    option: str,
) -> TableColumns:
    """Choose the columns of the images and of the labels.

    Args:
        place: The file or data set, for messages.
        images: Columns whose type is that of encoded images.
        labels: Columns whose type is that of labels, numbers or text.
        names: All columns.
        features: {column: its feature} as the `datasets` library records them; empty where it did not write them.
        option: The option --columns.

    Raises:
        UsageError: There is no column of images, there are several of one kind, or one that is named does not fit.
    """
    explicit = parse_columns(option)
    for kind, candidates in (("image", images), ("label", labels)):
        name = explicit.get(kind, "")
        if name and name not in candidates:
            problem = "is not of a type that is read" if name in names else "does not exist"
            raise UsageError(
                f"--columns {kind}={make_printable(name)}: that column of {place} {problem}; its columns for {kind}s"
                f" are: {_join(candidates)}"
            )
    kinds = {name: str(feature.get("_type", "")) for name, feature in features.items() if isinstance(feature, dict)}
    image = explicit.get("image") or _choose("image", images, [x for x in images if kinds.get(x) == "Image"], place)
    if not image:
        raise UsageError(
            f"{place} has no column of encoded images (struct with bytes, or binary): its columns are {_join(names)}"
        )
    class_labels = [x for x in labels if kinds.get(x) == "ClassLabel"]
    label = explicit.get("label") or _choose("label", labels, class_labels, place)
    return TableColumns(image, label, _read_names(features.get(label)))


def read_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Read the features that the `datasets` library records in the metadata of a schema; none where it did not."""
    text = (metadata or {}).get(b"huggingface", b"")
    if not text or len(text) > _MAX_METADATA:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _choose(kind: str, candidates: Sequence[str], featured: Sequence[str], place: str) -> str:
    """Choose a column: the one that the features mark, else the one of a usual name; "" where there is none."""
    usual = _IMAGE_NAMES if kind == "image" else _LABEL_NAMES
    named = [name for name in usual if name in candidates]
    if len(featured) == 1 or (not named and len(featured) > 1):
        named = list(featured)
    if not named and kind == "image":
        named = list(candidates)
    if len(named) > 1:
        raise UsageError(
            f"{place} has {len(named)} columns of {kind}s, {_join(named)}: choose one with --columns {kind}={named[0]}"
        )
    return named[0] if named else ""


def _read_names(feature: Any) -> tuple[str, ...]:
    """Return the names of the classes that the feature of a column records."""
    names = feature.get("names") if isinstance(feature, dict) else None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list and names else ()


def _join(names: Sequence[str]) -> str:
    return ", ".join(make_printable(name, 60) for name in list(names)[:20]) + (", …" if len(names) > 20 else "")
