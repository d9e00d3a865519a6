"""Erasing: a black rectangle, with the distribution of torchvision's RandomErasing."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, ks_2samp
from torchvision.transforms import RandomErasing

from softcache.data.views.erasing import draw_erased
from softcache.data.views.policy import parse_views
from softcache.data.views.ratios import tabulate_ratios
from softcache.data.views.render import render
from tests.helpers.views import make_images, render_views

N = 100_000


@pytest.mark.parametrize("spec", ["none", "crop-flip", "resized-crop-flip"])
def test_a_rectangle_is_black_and_the_rest_is_as_without_erasing(spec: str) -> None:
    images = make_images(64)
    plain = render_views(images, spec, seed=8, draw=4)
    erased = render_views(images, f"{spec}:erasing=0.7", seed=8, draw=4)
    rectangles = draw_erased(0.7, 8, np.arange(64), 4, 9)
    for view, expected, (top, left, bottom, right) in zip(erased, plain, rectangles, strict=True):
        expected[:, top:bottom, left:right] = 0
        assert np.array_equal(view, expected)
    assert 0 < rectangles.any(1).sum() < 64


def draw_like_torchvision(n: int, side: int) -> NDArray[np.int64]:
    """Top, left, bottom, right of torchvision's RandomErasing."""
    image = torch.zeros(1, side, side)
    found = []
    for _ in range(n):
        top, left, height, width, _ = RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])
        found.append((top, left, top + height, left + width))
    return np.array(found)


@pytest.mark.parametrize("count", [N // 10, pytest.param(N, marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", [32, 8])
def test_rectangles_have_the_distribution_of_torchvision(side: int, count: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        theirs = draw_like_torchvision(count, side)
    ours = draw_erased(1.0, 0, np.arange(N), 0, side)
    for axis in range(4):
        assert ks_2samp(ours[:, axis], theirs[:, axis]).pvalue > 0.01
    (heights, widths), (their_heights, their_widths) = ((b[:, 2:] - b[:, :2]).T for b in (ours, theirs))
    assert ks_2samp(heights, their_heights).pvalue > 0.01
    assert ks_2samp(widths, their_widths).pvalue > 0.01
    assert ks_2samp(heights * widths, their_heights * their_widths).pvalue > 0.01
    area, their_area = heights * widths / side**2, their_heights * their_widths / side**2
    assert abs(area.mean() - their_area.mean()) < 4 * area.std() * math.sqrt(1 / N + 1 / count)


@pytest.mark.parametrize("probability", [0.25, 0.9])
def test_views_are_erased_with_the_probability(probability: float) -> None:
    erased = int(draw_erased(probability, 1, np.arange(N), 2, 32).any(1).sum())
    assert binomtest(erased, N, probability).pvalue > 0.01


def test_ratios_are_log_uniform() -> None:
    table = np.log(tabulate_ratios("3/10", "33/10"))
    assert np.allclose(np.diff(table), math.log(11) / 4096, rtol=1e-9, atol=0)
    assert table[0] - math.log(0.3) == pytest.approx(math.log(3.3) - table[-1], rel=1e-6)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiny_views_stay_whole_or_lose_pixels_inside_of_them(side: int) -> None:
    rectangles = draw_erased(1.0, 0, np.arange(1000), 0, side)
    assert rectangles.min() >= 0
    assert rectangles.max() <= side
    assert (rectangles[:, 2:] - rectangles[:, :2]).max() < side


def test_a_teachers_view_of_another_size_has_the_rectangle_of_the_students_view() -> None:
    images = make_images(16, size=8)
    images.pixels[:] = 200
    policy = parse_views("none:erasing=1,size=8")
    small = render(images, policy, 0, np.arange(16), 0)
    assert torch.equal(render(images, policy.at_size(24), 0, np.arange(16), 0)[..., 1::3, 1::3], small)
    share = (small == 0).float().mean((1, 2, 3))
    uneven = render(images, policy.at_size(20), 0, np.arange(16), 0)
    assert ((uneven == 0).float().mean((1, 2, 3)) - share).abs().max() < 0.08
