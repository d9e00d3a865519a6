"""Colour functions, jitter and grey views, compared with torchvision's, pixel by pixel and by their distributions."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from softcache.base import rng
from softcache.data.views import color
from softcache.data.views.draws import JITTER_ORDER
from softcache.data.views.jitter import _ORDERS, draw_factors, jitter, make_some_gray
from tests.helpers.views import make_images, render_views

N = 100_000


def make_pixels(channels: int, n: int = 24, size: int = 32) -> np.ndarray[Any, Any]:
    """Noise, smooth images, flat ones, ones of two levels and dark ones."""
    generator = np.random.default_rng(channels)
    pixels = generator.integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    ramp = np.linspace(0, 255, size)[:, None] + np.linspace(0, 60, size)
    for i in range(0, n, 4):
        pixels[i] = np.clip(ramp + generator.normal(0, 9, (channels, size, size)) * (i > 0), 0, 255)
    pixels[1], pixels[2], pixels[3] = 77, np.where(pixels[2] > 99, 200, 10), pixels[3] // 16
    return pixels


FACTORS = np.array([0.0, 0.1, 0.2718, 0.73, 0.9153, 1.0, 1.09, 1.2718, 1.5, 1.9])
TURNS = np.array([-0.5, -0.3141, -0.1, -0.0123, 0.0, 0.0234, 0.1, 0.25, 0.4142, 0.5])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (color.adjust_brightness, F.adjust_brightness, FACTORS),
        (color.adjust_contrast, F.adjust_contrast, FACTORS),
        (color.adjust_saturation, F.adjust_saturation, FACTORS),
        (color.adjust_sharpness, F.adjust_sharpness, FACTORS),
        (color.adjust_hue, F.adjust_hue, TURNS),
    ],
)
def test_a_colour_function_is_within_one_level_of_torchvision(
    ours: Callable[..., Any], theirs: Callable[..., Any], factors: np.ndarray[Any, Any], channels: int
) -> None:
    pixels = make_pixels(channels)
    for factor in factors:
        made = ours(pixels, np.full(len(pixels), factor)).astype(int)
        expected = theirs(torch.from_numpy(pixels), float(factor)).numpy()
        difference = np.abs(made - expected)
        assert difference.max() <= 1, factor
        # Round factors give whole numbers often, where a last bit of float32 decides.
        assert (difference > 0).mean() < (2e-3 if factor * 100 % 1 > 1e-6 else 0.1), factor


@pytest.mark.parametrize("channels", [1, 3])
def test_functions_without_a_factor_are_equal_to_torchvision(channels: int) -> None:
    pixels = make_pixels(channels)
    as_tensor = torch.from_numpy(pixels)
    assert np.array_equal(color.stretch_contrast(pixels), F.autocontrast(as_tensor).numpy())
    assert np.array_equal(color.equalize(pixels), F.equalize(as_tensor).numpy())
    for bits in range(9):
        assert np.array_equal(color.posterize(pixels, bits), F.posterize(as_tensor, bits).numpy())
    for threshold in (0, 1, 99, 178.5, 255):
        made = color.solarize(pixels, int(np.ceil(threshold)))
        assert np.array_equal(made, F.solarize(as_tensor, threshold).numpy())
    small = pixels[:, :, :2]
    assert np.array_equal(color.adjust_sharpness(small, np.full(24, 1.9)), small)


def test_the_luma_of_all_colours_is_within_one_level_of_torchvision() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    wrong = 0
    for red in range(0, 256, 5):
        pixels = torch.cartesian_prod(levels[red : red + 1], levels, levels).T.reshape(1, 3, 256, 256).contiguous()
        difference = color.convert_to_gray(pixels.numpy()).astype(int) - F.rgb_to_grayscale(pixels).numpy()
        assert np.abs(difference).max() <= 1
        wrong += int((difference != 0).sum())
    assert wrong < 52 * 65_536 * 2e-4


@pytest.mark.parametrize("count", [N // 5, pytest.param(N, marks=pytest.mark.slow)])
def test_factors_have_the_distribution_of_torchvision(count: int) -> None:
    transform = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        drawn = [transform.make_params([]) for _ in range(count)]
    ours = draw_factors(0.4, 0.1, 0, np.arange(N), 0)
    for values, name in zip(ours, ("brightness", "contrast", "saturation", "hue"), strict=True):
        low, width = (-0.1, 0.2) if name == "hue" else (0.6, 0.8)
        assert kstest(values, "uniform", (low, width)).pvalue > 0.01
        assert ks_2samp(values, [parameters[f"{name}_factor"] for parameters in drawn]).pvalue > 0.01
    assert np.abs(np.corrcoef(ours) - np.eye(4)).max() < 4 / np.sqrt(N)


def test_all_orders_are_equally_likely() -> None:
    counts = Counter(rng.integers((0, 0, JITTER_ORDER), np.arange(N), len(_ORDERS)).tolist())
    assert len({tuple(order) for order in _ORDERS}) == 24
    assert chisquare([counts[k] for k in range(24)]).pvalue > 0.01


@pytest.mark.parametrize(("strength", "hue"), [(0.4, 0.0), (0.0, 0.3), (0.8, 0.2)])
def test_a_jittered_view_is_what_torchvision_makes_of_it_with_the_same_factors(strength: float, hue: float) -> None:
    pixels = make_pixels(3, n=48, size=16)
    index = np.arange(48)
    made = pixels.copy()
    jitter(made, strength, hue, seed=7, index=index, draw=2)
    factors = draw_factors(strength, hue, 7, index, 2)
    orders = _ORDERS[rng.integers((7, 2, JITTER_ORDER), index, 24)]
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    for i in range(48):
        expected = torch.from_numpy(pixels[i])
        for step in orders[i]:
            if (hue if step == 3 else strength) > 0:
                expected = getattr(F, names[step])(expected, float(factors[step, i]))
        difference = np.abs(made[i].astype(int) - expected.numpy())
        assert np.quantile(difference, 0.99) <= 1  # a level that is one apart early may be more apart in the end
        assert difference.max() <= 6


@pytest.mark.parametrize("count", [2000, pytest.param(N, marks=pytest.mark.slow)])
def test_view_means_have_the_distribution_of_torchvision(count: int) -> None:
    pixels = make_pixels(3, n=5, size=8)[np.full(2 * count, 4)]
    made = pixels.copy()
    jitter(made, 0.5, 0.2, seed=1, index=np.arange(2 * count), draw=0)
    transform = v2.ColorJitter(0.5, 0.5, 0.5, 0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        theirs = np.stack([transform(torch.from_numpy(image)).numpy() for image in pixels[:count]])
    for channel in range(3):
        assert ks_2samp(made[:, channel].mean((1, 2)), theirs[:, channel].mean((1, 2))).pvalue > 0.01
        assert ks_2samp(made[:, channel].std((1, 2)), theirs[:, channel].std((1, 2))).pvalue > 0.01


@pytest.mark.parametrize("probability", [0.2, 0.8])
def test_views_are_grey_with_the_probability(probability: float) -> None:
    pixels = np.zeros((N, 3, 1, 1), np.uint8)
    pixels[:, 0] = 100
    made = pixels.copy()
    make_some_gray(made, probability, 0, np.arange(N), 1)
    is_gray = (made == made[:, :1]).all((1, 2, 3))
    assert set(made[is_gray].ravel().tolist()) == {29}
    assert np.array_equal(made[~is_gray], pixels[~is_gray])
    assert binomtest(int(is_gray.sum()), N, probability).pvalue > 0.01


def test_grey_images_have_no_saturation_hue_or_other_grey() -> None:
    images = make_images(16, channels=1)
    assert np.array_equal(render_views(images, "none:hue=0.5"), images.pixels.numpy())
    assert np.array_equal(render_views(images, "none:gray=1"), images.pixels.numpy())
    assert not np.array_equal(render_views(images, "none:jitter=0.5"), images.pixels.numpy())
