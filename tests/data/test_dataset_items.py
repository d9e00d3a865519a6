"""The items of a user's own dataset: every form of an image gives the same pixels, and every other item is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.transforms import functional, v2

from softcache.base.errors import CacheError, UsageError
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.transfer_set import TransferSet, load_transfer_set

Pixels = NDArray[np.uint8]


def load(data: Any, **options: Any) -> TransferSet:
    return load_transfer_set(data, Path(), **{"val_fraction": 0.25, **options})


def make_pixels(n: int = 8, channels: int = 3, size: int = 6) -> Pixels:
    """Return uint8 [n, size, size, channels], each value from 0 to 255 about as often."""
    return (np.arange(n * size * size * channels) * 37 % 256).astype(np.uint8).reshape(n, size, size, channels)


def make_dataset(convert: Callable[[Pixels], Any], channels: int = 3) -> list[Any]:
    return [(convert(image), row % 2) for row, image in enumerate(make_pixels(channels=channels))]


def get_pixels(transfer_set: TransferSet, split: str = "train") -> torch.Tensor:
    images = transfer_set.splits[split].images
    assert isinstance(images, ImageArrays)
    return images.pixels


def to_tensor(image: Pixels) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


COLOUR_FORMS: dict[str, Callable[[Pixels], Any]] = {
    "array": lambda image: image,
    "array in Fortran order": np.asfortranarray,
    "tensor": to_tensor,
    "ToTensor": functional.to_tensor,
    "ToTensor, float64": lambda image: to_tensor(image).double() / 255,
    "ToDtype(scale=True)": lambda image: v2.functional.to_dtype(to_tensor(image), torch.float32, scale=True),
    "tv_tensors.Image": lambda image: v2.functional.to_image(Image.fromarray(image)),
    "PIL, RGBA": lambda image: Image.fromarray(np.dstack([image, image[..., :1]])),
    "PIL, palette": lambda image: Image.fromarray(image).quantize(256, method=Image.Quantize.FASTOCTREE),
}
GREY_FORMS: dict[str, Callable[[Pixels], Any]] = {
    "array [H, W]": lambda image: image[..., 0],
    "array [H, W, 1]": lambda image: image,
    "tensor [H, W]": lambda image: torch.from_numpy(image[..., 0]),
    "tensor [1, H, W]": to_tensor,
    "ToTensor": functional.to_tensor,
    "PIL": lambda image: Image.fromarray(image[..., 0]),
}


@pytest.mark.parametrize("form", [name for name in COLOUR_FORMS if name != "PIL, palette"])
def test_every_form_of_a_colour_image_gives_the_same_content(form: str) -> None:
    expected = load(make_dataset(Image.fromarray))
    loaded = load(make_dataset(COLOUR_FORMS[form]))
    assert loaded.identity() == expected.identity()
    assert (loaded.channels, loaded.size) == (3, 6)
    assert torch.equal(get_pixels(loaded), get_pixels(expected))


@pytest.mark.parametrize("form", GREY_FORMS)
def test_every_form_of_a_grey_image_gives_the_same_content(form: str) -> None:
    loaded = load(make_dataset(GREY_FORMS[form], channels=1))
    assert loaded.identity() == load(make_dataset(GREY_FORMS["PIL"], channels=1)).identity()
    assert loaded.channels == 1
    rows = loaded.splits["train"].source_rows
    assert torch.equal(get_pixels(loaded).permute(0, 2, 3, 1), torch.from_numpy(make_pixels(channels=1)[rows]))


def test_modes_of_pillow_are_converted_as_those_of_files() -> None:
    bilevel = [(Image.fromarray(image[..., 0]).convert("1"), 0) for image in make_pixels()]
    assert load([*bilevel, *((image, 1) for image, _ in bilevel)]).channels == 1
    palette = load(make_dataset(COLOUR_FORMS["PIL, palette"]))
    assert palette.channels == 3
    converted = make_dataset(lambda image: COLOUR_FORMS["PIL, palette"](image).convert("RGB"))
    assert palette.identity() == load(converted).identity()


def test_grey_images_among_colour_images_become_rgb() -> None:
    grey, colour = make_pixels(channels=1), make_pixels()
    mixed = load([*((image, 0) for image in grey), *((image, 1) for image in colour)])
    assert mixed.channels == 3
    first = get_pixels(mixed)[0]
    row = int(mixed.splits["train"].source_rows[0])  # type: ignore[index]
    assert torch.equal(first, torch.from_numpy(grey[row]).permute(2, 0, 1).expand(3, 6, 6))


@pytest.mark.parametrize(
    "labels",
    [
        [np.int64(row % 3) for row in range(8)],
        [np.uint8(row % 3) for row in range(8)],
        list(torch.arange(8) % 3),
        [np.array(row % 3) for row in range(8)],
    ],
    ids=["int64", "uint8", "tensor", "array"],
)
def test_labels_are_numbers_in_any_form(labels: list[Any]) -> None:
    images = make_pixels()
    plain = load([(image, row % 3) for row, image in enumerate(images)])
    assert load(list(zip(images, labels, strict=True))).identity() == plain.identity()


def test_none_and_negative_numbers_are_unknown_labels() -> None:
    images = make_pixels()
    loaded = load([(images[0], None), (images[1], -100), *((image, row % 2) for row, image in enumerate(images[2:]))])
    labels = np.full(8, 9)
    for split in loaded.splits.values():
        labels[split.source_rows] = split.labels
    assert labels.tolist() == [-1, -1, 0, 1, 0, 1, 0, 1]
    alone = load(list(images))
    assert alone.classes == ()
    assert (alone.splits["train"].labels == -1).all()


def test_a_dataset_of_tensors_is_loaded() -> None:
    images = torch.from_numpy(make_pixels()).permute(0, 3, 1, 2)
    labels = torch.arange(8) % 2
    assert load(TensorDataset(images, labels)).identity() == load(make_dataset(Image.fromarray)).identity()
    assert load(images).identity() == load(list(make_pixels())).identity()


# --- refused ------------------------------------------------------------------------------------------------------

IMAGE = make_pixels(1)[0]
FLOAT = torch.from_numpy(IMAGE).permute(2, 0, 1) / 255
ITEMS: dict[str, tuple[Any, str]] = {
    "normalised": (FLOAT * 2 - 1, "tensor float32 [3, 6, 6] with values from -1 to 1"),
    "between levels": (FLOAT * 0.99, "normalises or augments"),
    "not a number": (FLOAT * float("nan"), "normalises or augments"),
    "half": (FLOAT.half(), "tensor float16 [3, 6, 6]"),
    "float array": (IMAGE / 255, "array float64 [6, 6, 3]"),
    "levels as int64": (IMAGE.astype(np.int64), "array int64 [6, 6, 3]"),
    "channels first": (IMAGE.transpose(2, 0, 1), "array uint8 [3, 6, 6]"),
    "channels last": (torch.from_numpy(IMAGE), "tensor uint8 [6, 6, 3]"),
    "four channels": (np.dstack([IMAGE, IMAGE[..., :1]]), "array uint8 [6, 6, 4]"),
    "a batch": (IMAGE[None], "array uint8 [1, 6, 6, 3]"),
    "no pixels": (IMAGE[:0], "array uint8 [0, 6, 3]"),
    "one dimension": (IMAGE.ravel(), "array uint8 [108]"),
    "16 bits": (Image.new("I;16", (6, 6)), "16 bits, mode I;16"),
    "32 bits": (Image.new("F", (6, 6)), "32 bits, mode F"),
    "a dictionary": ({"image": IMAGE, "label": 0}, "a value of type dict"),
    "a path": ("image.png", "a value of type str"),
    "nothing": (None, "a value of type NoneType"),
    "three": ((IMAGE, 0, 0), "a tuple of 3"),
    "one": ((IMAGE,), "a tuple of 1"),
    "a float label": ((IMAGE, 1.0), "a value of type float as its label"),
    "a truth value": ((IMAGE, True), "a value of type bool as its label"),
    "a text label": ((IMAGE, "cat"), "a value of type str as its label"),
    "one-hot": ((IMAGE, torch.eye(2)[0]), "a tensor float32 [2] as its label"),
    "a huge label": ((IMAGE, 1 << 40), "the label 1099511627776"),
}


@pytest.mark.parametrize("case", ITEMS)
def test_another_item_is_refused_with_its_row_and_split(case: str) -> None:
    item, text = ITEMS[case]
    good = make_dataset(Image.fromarray)
    with pytest.raises(UsageError) as error:
        load({"train": good, "test": [*good, item]})
    message = str(error.value)
    assert message.startswith("test row 8 of the dataset")
    assert text in message
    assert "\n" not in message


def test_an_image_file_that_is_damaged_is_named_by_its_row(tmp_path: Path) -> None:
    Image.fromarray(np.tile(IMAGE, (8, 8, 1))).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-60])
    with Image.open(tmp_path / "b.png") as damaged, pytest.raises(CacheError, match=r"train row 8 .* cannot be decod"):
        load([*make_dataset(Image.fromarray), (damaged, 0)])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from make_dataset(Image.fromarray)

    def __len__(self) -> int:
        return 8


GOOD = make_dataset(Image.fromarray)
DATA: dict[str, tuple[Any, str]] = {
    "IterableDataset": (Stream(), "of type Stream: expected a map-style dataset"),
    "DataLoader": (DataLoader(GOOD), "DataLoader: give its dataset"),  # type: ignore[arg-type]
    "generator": ((item for item in GOOD), "of type generator: expected a map-style dataset"),
    "path": (Path("pets"), "'folder:PATH'"),
    "number": (3, "of type int"),
    "empty": ([], "the train dataset is empty"),
    "empty test": ({"train": GOOD, "test": []}, "the test dataset is empty"),
    "unknown split": ({"train": GOOD, "validation": GOOD}, "'validation': expected"),
    "no train": ({"test": GOOD}, "without the key 'train'"),
    "a text in a mapping": ({"train": "digits"}, "the split train is of type str"),
    "one class": ([(image, 0) for image, _ in GOOD], "one class"),
    "another label in test": ({"train": GOOD, "test": [*GOOD, (IMAGE, 2)]}, "test row 8 of the dataset has the label"),
}


@pytest.mark.parametrize("case", DATA)
def test_other_data_are_refused_in_one_line(case: str) -> None:
    data, text = DATA[case]
    with pytest.raises(UsageError) as error:
        load(data)
    assert text in str(error.value)
    assert "\n" not in str(error.value)
