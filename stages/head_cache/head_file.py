"""A head in a file: the weight of a linear layer, or embeddings of the names of classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable
from softcache.data.sources.array_files import StoredArray, check_unpacked_size, open_arrays
from softcache.pipeline.metrics.distances import normalize_rows

from .heads import FILE, Head

NAMES = ("weight", "bias", "classes", "scale", "normalize")
COSINE_SCALE = 100.0  # of CLIP


def read_head_file(path: Path, width: int, classes: Sequence[str]) -> Head:
    """Read a head from a .npz file.

    weight     float [K, D]
    bias       float [K]; zeros where it is absent
    classes    text [K], the names of the classes; in the order of the data where it is absent
    scale      a number; where it is absent, 100 with normalize, as of CLIP, else 1
    normalize  true or false: divide embeddings and rows of the weight by their norms; false where it is absent

    Args:
        path: The file.
        width: D of the embedding.
        classes: Names of the classes of the data, in their order; empty for data without.

    Returns:
        The head, its classes in the order of the data.

    Raises:
        UsageError: There is no such file, it has another ending, or holds Python objects.
        CacheError: It is damaged, lacks an array, or an array does not fit the embedding or the classes.
    """
    arrays, _ = open_arrays(path)
    place = f"'{make_printable(path, None)}'"
    check_unpacked_size(list(arrays.values()))
    if "weight" not in arrays:
        raise CacheError(f"{place} has no array 'weight' [K, {width}]: it has {', '.join(arrays) or 'none'}")
    if unknown := [name for name in arrays if name not in NAMES]:
        raise CacheError(f"{place} has the array '{make_printable(unknown[0])}': a head has {', '.join(NAMES)}")
    weight = _read_numbers(arrays["weight"], place)
    if weight.ndim != 2 or weight.shape[1] != width:
        raise CacheError(f"{place}: weight has the shape {list(weight.shape)}, the embedding has {width} numbers")
    count = len(weight)
    if count < 2:
        raise CacheError(f"{place}: weight has {count} rows: a classifier has two classes or more")
    bias = _read_numbers(arrays["bias"], place) if "bias" in arrays else np.zeros(count)
    if bias.shape != (count,):
        raise CacheError(f"{place}: bias has the shape {list(bias.shape)}, weight has {count} rows")
    normalize = _read_flag(arrays["normalize"], place) if "normalize" in arrays else False
    scale = _read_scale(arrays["scale"], place) if "scale" in arrays else (COSINE_SCALE if normalize else 1.0)
    if classes and len(classes) != count:
        raise CacheError(f"{place}: weight has {count} rows, the data have {len(classes)} classes")
    if "classes" in arrays:
        order = _find_order(_read_names(arrays["classes"], place, count), classes, place)
        weight, bias = weight[order], bias[order]
    if normalize:
        if not np.linalg.norm(weight, axis=1).all():
            raise CacheError(f"{place}: a row of weight is 0, which has no direction to compare with")
        weight = normalize_rows(weight)
    return Head(FILE, weight, bias, scale, normalize)


def _read_numbers(array: StoredArray, place: str) -> NDArray[np.float64]:
    if array.dtype.kind not in "fiu":
        raise CacheError(f"{place}: {array.name} is {array.dtype}, not numbers")
    values = array.read().astype(np.float64)
    if not np.isfinite(values).all():
        raise CacheError(f"{place}: {array.name} has values that are not finite")
    return values


def _read_scale(array: StoredArray, place: str) -> float:
    values = _read_numbers(array, place)
    if values.size != 1 or float(values.reshape(-1)[0]) <= 0:
        raise CacheError(f"{place}: scale is {values.reshape(-1)[:3].tolist()}, not one number above 0")
    return float(values.reshape(-1)[0])


def _read_flag(array: StoredArray, place: str) -> bool:
    values: NDArray[Any] = array.read().reshape(-1) if array.dtype.kind in "biu" else np.zeros(0)
    if values.size != 1 or int(values[0]) not in (0, 1):
        raise CacheError(f"{place}: normalize is {array.dtype} {list(array.shape)}, not true or false")
    return bool(values[0])


def _read_names(array: StoredArray, place: str, count: int) -> list[str]:
    if array.dtype.kind != "U" or array.shape != (count,):
        raise CacheError(
            f"{place}: classes is {array.dtype} {list(array.shape)}, not {count} names: array.astype(str)"
        )
    names = array.read().tolist()
    if len(set(names)) != count:
        raise CacheError(f"{place}: classes names a class twice")
    return [str(name) for name in names]


def _find_order(names: list[str], classes: Sequence[str], place: str) -> list[int]:
    """Return the row of the file of each class of the data; the rows as they are where the data have no names."""
    if not classes:
        return list(range(len(names)))
    if missing := [name for name in classes if name not in names]:
        other = next(name for name in names if name not in classes)
        raise CacheError(
            f"{place}: classes does not have '{make_printable(missing[0], 80)}' of the data, it has"
            f" '{make_printable(other, 80)}': name them as the data do, or leave 'classes' out"
        )
    return [names.index(name) for name in classes]
