"""Items of a user's own dataset: one image and its label, in every form in which PyTorch datasets return them."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.user_code import user_code
from softcache.data.tasks import HardTargets, to_hashed_bytes

from .decoding import GREY_MODES, count_bits

_TOLERANCE = 1e-3  # of a grey level: ToTensor divides by 255, ToDtype(scale=True) multiplies by 1 / 255
_MAX_VALUES = 1 << 20  # of a label
_TENSOR_TYPES = (torch.uint8, torch.float32, torch.float64)
_IMAGE_FORMS = (
    "an image is a PIL image, a uint8 array [H, W], [H, W, 1] or [H, W, 3], or a uint8 tensor [H, W], [1, H, W] or"
    " [3, H, W]"
)


class MapDataset(Protocol):
    """A dataset in memory of this process whose rows are read by number, such as one of torchvision's.

    An item is (image, label) or an image alone, see `read_item`. A row is the same item whenever it is read. Where the
    images do not fit in memory, rows are read for every view, by background threads or by worker processes.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


# Of an item: the number of a class, a number to predict, or several of them, [K]; None where it is unknown.
Label = int | float | NDArray[Any] | torch.Tensor | Sequence[float] | None
Data = str | MapDataset | Mapping[str, MapDataset]  # a spec such as `digits`, one dataset, or one of each split


def count_rows(dataset: MapDataset, split: str) -> int:
    """Return the length of the dataset of a split.

    Raises:
        UsageError: It is empty, or raises an exception.
    """
    with user_code(f"the length of the {split} dataset cannot be read"):
        rows = len(dataset)
    if not rows:
        raise UsageError(f"the {split} dataset is empty: there is no row 0")
    return rows


def read_classes(dataset: MapDataset, split: str) -> tuple[str, ...]:
    """Return the names in the attribute `classes` of the dataset of a split; () where it is no list of str.

    Raises:
        UsageError: The attribute raises an exception.
    """
    with user_code(f"the attribute classes of the {split} dataset cannot be read"):
        names = getattr(dataset, "classes", None)
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return tuple(names) if names and is_list else ()


def read_item(dataset: MapDataset, row: int, split: str) -> tuple[Image.Image, Label]:
    """Read one row of a dataset.

    Args:
        dataset: Its item is (image, label), or an image alone. An image is a PIL image of at most 8 bits a channel; a
            uint8 array [H, W], [H, W, 1] or [H, W, 3]; a uint8 tensor [H, W], [1, H, W] or [3, H, W]; or such a
            tensor in float32 or float64 whose values are all k / 255, as of torchvision's ToTensor. A label is an
            int, the number of a class; a float, a number to predict; an array, a tensor or a list of several labels or
            numbers, [K]; or None where it is unknown. A negative int is an unknown class.
        row: Of the dataset, 0 to its length - 1.
        split: Name of the split of which it is the dataset, for messages.

    Returns:
        The image, in mode L where it is grey and RGB otherwise, and its label, None where it is unknown.

    Raises:
        UsageError: The dataset raises an exception, or the item has another form.
        CacheError: A PIL image cannot be decoded.
    """
    place = describe_row(split, row)
    with user_code(f"{place} cannot be read"):
        item = dataset[row]
    if not isinstance(item, (tuple, list)):
        return _read_image(item, place), None
    if len(item) != 2:
        raise UsageError(f"{place} is {describe_value(item)}: expected (image, label), or an image alone")
    return _read_image(item[0], place), _read_label(item[1], place)


def holds_rows(dataset: MapDataset, split: str) -> bool:
    """Return whether the first item of a dataset is a row of numbers: an array or tensor with one axis.

    Raises:
        UsageError: The dataset raises an exception.
    """
    with user_code(f"{describe_row(split, 0)} cannot be read"):
        item = dataset[0]
    value = item[0] if isinstance(item, tuple | list) and len(item) == 2 else item
    return isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 1


def read_row(dataset: MapDataset, row: int, split: str) -> tuple[NDArray[Any], Label]:
    """Read one row of a dataset of rows of numbers.

    Args:
        dataset: Its item is (numbers, label), or numbers alone: an array or tensor [D] of integers or floats. Labels
            are as in `read_item`.
        row, split: As in `read_item`.

    Returns:
        The numbers, [D] in their own dtype, and the label, None where it is unknown.

    Raises:
        UsageError: The dataset raises an exception, or the item has another form.
    """
    place = describe_row(split, row)
    with user_code(f"{place} cannot be read"):
        item = dataset[row]
    value, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    numbers: Any = value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        numbers = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(numbers, np.ndarray) or numbers.ndim != 1 or numbers.dtype.kind not in "biuf":
        raise UsageError(f"{place} is {describe_value(value)}: expected an array or tensor of numbers with one axis")
    return numbers, _read_label(label, place)


def describe_row(split: str, row: int) -> str:
    """Describe a row of a dataset for messages."""
    return f"{split} row {row} of the dataset"


def hash_image(image: Image.Image) -> bytes:
    """Compute the SHA-256 of mode, size and pixels of an image in mode L or RGB."""
    return sha256(f"{image.mode} {image.width} {image.height}\0".encode() + image.tobytes()).digest()


def hash_rows(digests: NDArray[np.uint8], labels: HardTargets) -> str:
    """Compute the SHA-256, in hexadecimal, of the digests of N images, uint8 [N, 32], and their labels, int64 [N]."""
    digest = sha256(digests.tobytes())
    digest.update(to_hashed_bytes(labels))
    return digest.hexdigest()


def _read_image(value: Any, place: str) -> Image.Image:
    """Convert an image to mode L or RGB."""
    if isinstance(value, Image.Image):
        return _convert_pillow(value, place)
    pixels = value
    if isinstance(value, torch.Tensor) and value.dtype in _TENSOR_TYPES and value.ndim >= 2:
        pixels = value.detach().cpu().as_subclass(torch.Tensor).movedim((-2, -1), (0, 1)).numpy()
        if value.is_floating_point():
            pixels = _recover_levels(pixels, value, place)
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim >= 2 and pixels.size:
        if pixels.ndim == 2 or pixels.shape[2:] == (1,):
            return Image.fromarray(np.ascontiguousarray(pixels.reshape(pixels.shape[:2])))
        if pixels.shape[2:] == (3,):
            return Image.fromarray(np.ascontiguousarray(pixels))
    _refuse_image(value, place)


def _convert_pillow(image: Image.Image, place: str) -> Image.Image:
    """Convert a PIL image, as images in files are converted, see image_folder.py."""
    if not (image.width and image.height):
        _refuse_image(image, place)
    try:
        # Of a file, the bits are known until its pixels are decoded; the modes I and F always have more than 8.
        bits = count_bits(image) if image.mode[0] in "IF" or getattr(image, "tile", None) else 8
        if bits > 8:
            raise UsageError(
                f"{place} has more than 8 bits a channel ({bits} bits, mode {image.mode}): convert it to 8 bits first"
            )
        return image.convert("L" if image.mode in GREY_MODES else "RGB")
    except (OSError, ValueError, SyntaxError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        raise CacheError(f"the image of {place} cannot be decoded: {make_printable(error)}") from None


def _recover_levels(pixels: NDArray[np.floating], value: torch.Tensor, place: str) -> NDArray[np.uint8]:
    """Return the uint8 levels k of values k / 255. NumPy, not torch, as it runs in a background thread: views.render.

    Raises:
        UsageError: Another value is among them.
    """
    levels = pixels * 255
    rounded: NDArray[np.floating] = np.rint(levels)
    if ((np.abs(levels - rounded) <= _TOLERANCE) & (rounded >= 0) & (rounded <= 255)).all():
        return rounded.astype(np.uint8)
    raise UsageError(
        f"{place} is {describe_value(value)} with values from {pixels.min():.4g} to {pixels.max():.4g}, not all of"
        " them k / 255 for whole k from 0 to 255: the dataset normalises or augments its images. Give it without these"
        " transforms: the views are made and normalised here"
    )


def _refuse_image(value: Any, place: str) -> NoReturn:
    raise UsageError(f"{place} is {describe_value(value)}: expected (image, label), or an image alone; {_IMAGE_FORMS}")


def _read_label(value: Any, place: str) -> Label:
    """Check the form of a label: see `read_item`."""
    is_scalar = isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and not value.ndim
    label = value.item() if is_scalar else value
    if label is None or type(label) in (int, float):
        return label  # type: ignore[no-any-return]
    is_list = isinstance(value, list | tuple) and all(type(x) in (bool, int, float) for x in value)
    if is_list or isinstance(value, torch.Tensor | np.ndarray):
        array = label_to_array(value)
        if array.ndim == 1 and 1 <= array.size <= _MAX_VALUES and array.dtype.kind in "biuf":
            return value  # type: ignore[no-any-return]
    raise UsageError(
        f"{place} has {describe_value(value)} as its label: expected the number of a class, a number to predict, an"
        " array or list [K] of several labels or numbers, or None where it is unknown"
    )


def label_to_array(label: Any) -> NDArray[Any]:
    """Return a label as an array, [] or [K]."""
    if isinstance(label, torch.Tensor):
        label = label.detach().cpu()
        return np.asarray((label.float() if label.dtype == torch.bfloat16 else label).numpy())
    return np.asarray(label)


def are_same_labels(first: Label, second: Label) -> bool:
    """Return whether two labels of one row are equal; NaN equals NaN."""
    if first is None or second is None:
        return first is second
    return np.array_equal(label_to_array(first), label_to_array(second), equal_nan=True)


def describe_value(value: Any) -> str:
    """Describe the type of a value, and its shape where it has one."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Image.Image):
        return f"a PIL image of {value.width} x {value.height} pixels"
    return f"a value of type {make_printable(type(value).__name__)}"
