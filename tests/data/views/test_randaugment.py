"""RandAugment: operations compared with torchvision's pixel by pixel, and all of it by its distribution."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare, ks_2samp
from torchvision.transforms import InterpolationMode, v2

from softcache.data.views.policy import parse_views
from softcache.data.views.randaugment import OPERATIONS, augment_randomly, draw_operations
from softcache.data.views.render import render
from tests.helpers.views import make_images, render_views

N = 100_000
NAMES = (  # torchvision's, in our order
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
SIGNED = range(1, 10)
MOVES = range(1, 6)


def apply_torchvision(image: torch.Tensor, number: int, magnitude: int, sign: int) -> torch.Tensor:
    transform = v2.RandAugment(magnitude=magnitude)
    magnitudes, is_signed = transform._AUGMENTATION_SPACE[NAMES[number]]
    values = magnitudes(31, *image.shape[-2:])
    value = 0.0 if values is None else float(values[magnitude]) * (sign if is_signed else 1)
    changed: torch.Tensor = transform._apply_image_or_video_transform(
        image, NAMES[number], value, interpolation=InterpolationMode.NEAREST, fill=transform._fill
    )
    return changed


def apply_ours(pixels: np.ndarray[Any, Any], number: int, magnitude: int, sign: int) -> np.ndarray[Any, Any]:
    """The operation on the one of many images that draws it."""
    operations, signs = draw_operations(0, np.arange(1000), 0, 0)
    chosen = (operations == number) & (signs == sign)
    made = np.repeat(pixels[None], 1, 0)
    index = np.flatnonzero(chosen)[:1]
    augment_randomly(made, f"1x{magnitude}", seed=0, index=index, draw=0, drawn_side=pixels.shape[-1])
    return made[0]


def make_image(channels: int, size: int) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[:size, :size] / size
    noise = np.random.default_rng(size).normal(0, 6, (channels, size, size))
    smooth = 120 + 80 * np.sin(5 * x + 3 * y + np.arange(channels)[:, None, None]) + noise
    return np.clip(smooth, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(14), ids=OPERATIONS)
def test_an_operation_is_that_of_torchvision(number: int, channels: int) -> None:
    """Colours within one level; moves but for pixels whose source is half way between two, or nearly."""
    for size in (32, 33, 7):
        image = make_image(channels, size)
        for magnitude in (0, 1, 5, 9, 14, 23, 30):
            for sign in (1, -1) if number in SIGNED else (1,):
                made = apply_ours(image, number, magnitude, sign).astype(int)
                expected = apply_torchvision(torch.from_numpy(image), number, magnitude, sign).numpy()
                difference = np.abs(made - expected)
                if number in MOVES:
                    assert (difference.max(0) > 0).mean() < (0.15 if size == 7 else 0.03), (size, magnitude, sign)
                elif NAMES[number] == "Solarize":  # torch's 255 * linspace(1, 0, 31) misses whole numbers by 1e-5
                    threshold = 255 - 8.5 * magnitude
                    assert set(image[difference > 0].tolist()) <= {math.ceil(threshold)}
                else:
                    assert difference.max() <= 1, (size, magnitude, sign)


def test_moves_are_exactly_those_of_torchvision_where_no_source_is_half_way() -> None:
    image = make_image(3, 32)
    for number, magnitude in ((1, 9), (2, 9), (3, 9), (4, 17), (5, 13), (5, 29)):
        for sign in (1, -1):
            expected = apply_torchvision(torch.from_numpy(image), number, magnitude, sign).numpy()
            assert np.array_equal(apply_ours(image, number, magnitude, sign), expected), (number, magnitude, sign)


def test_rounded_sines_cosines_and_tangents_are_far_from_ties() -> None:
    """So a last bit of a machine's library cannot change a coefficient."""
    for k in range(31):
        for value in (math.sin(math.radians(k)), math.cos(math.radians(k)), 0.01 * k):
            assert abs((65_536 * value) % 1 - 0.5) > 1e-4


def test_all_operations_and_signs_are_equally_likely_and_independent() -> None:
    first, signs = draw_operations(0, np.arange(N), 0, 0)
    second, _ = draw_operations(0, np.arange(N), 0, 1)
    assert chisquare(np.bincount(first, minlength=14)).pvalue > 0.01
    assert chisquare(np.bincount(14 * first + second, minlength=196)).pvalue > 0.01
    assert binomtest(int((signs == 1).sum()), N).pvalue > 0.01
    assert chisquare(np.bincount(2 * first + (signs > 0), minlength=28)).pvalue > 0.01


@pytest.mark.parametrize("count", [N // 25, pytest.param(N, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("operations", "magnitude"), [(2, 9), (1, 25)])
def test_statistics_of_views_have_the_distribution_of_torchvision(operations: int, magnitude: int, count: int) -> None:
    image = make_image(3, 12)
    made = np.repeat(image[None], 5 * count, 0)
    index = np.arange(len(made))
    augment_randomly(made, f"{operations}x{magnitude}", seed=1, index=index, draw=0, drawn_side=12)
    transform = v2.RandAugment(operations, magnitude)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        theirs = np.stack([transform(torch.from_numpy(image)).numpy() for _ in range(count)])
    for statistic in (np.mean, np.std, lambda x, axis: (x == 0).mean(axis)):
        ours, expected = (np.round(statistic(x, (1, 2, 3)), 1) for x in (made, theirs))
        assert ks_2samp(ours, expected).pvalue > 0.01
        assert abs(ours.mean() - expected.mean()) < 4 * expected.std() / math.sqrt(len(theirs)) + 0.05


def test_identity_alone_leaves_a_view_and_magnitude_0_changes_few_operations() -> None:
    images = make_images(64)
    changed = (render_views(images, "none:randaugment=1x0") != images.pixels.numpy()).any((1, 2, 3))
    operations, _ = draw_operations(0, np.arange(64), 0, 0)
    names = {OPERATIONS[number] for number in operations[changed]}
    assert names <= {"stretch_contrast", "equalize", "solarize"}


def test_a_teachers_view_of_another_size_is_moved_alike() -> None:
    """The middle pixels of a view of three times the size are those of the view, within the slope of the image."""
    images = make_images(300, size=16)
    images.pixels[:] = (60 + 8 * torch.arange(16)[:, None] + 3 * torch.arange(16)).to(torch.uint8)
    policy = parse_views("none:randaugment=1x9,size=16")
    operations, _ = draw_operations(0, np.arange(300), 0, 0)
    small = render(images, policy, 0, np.arange(300), 0).numpy().astype(int)
    large = render(images, policy.at_size(48), 0, np.arange(300), 0).numpy()[..., 1::3, 1::3]
    for number in MOVES:
        difference = np.abs(small - large)[operations == number]
        is_border = (difference > 11).mean()
        assert is_border < 0.03, OPERATIONS[number]
        assert np.median(difference) <= (0 if OPERATIONS[number].startswith("translate") else 5), OPERATIONS[number]
