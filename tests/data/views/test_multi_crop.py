"""Multi-crop: draws cycle through crops of most of the image and crops of small parts."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from softcache.data.views.boxes import draw_boxes
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from tests.helpers.views import make_images, render_views

N = 100_000
SIDE = 96


def draw_areas(spec: str, draw: int, n: int) -> NDArray[np.float64]:
    """float64 [n, 5]: share of the area, width, height, left and top of n boxes of a draw."""
    box = draw_boxes(parse_views(spec), 0, np.arange(n), draw)
    left, top, right, bottom = np.array([box(row, SIDE, SIDE) for row in range(n)]).T
    return np.stack([(right - left) * (bottom - top) / SIDE**2, right - left, bottom - top, left, top], axis=1)


def draw_like_torchvision(scale: list[float], n: int) -> NDArray[np.float64]:
    image, found = torch.zeros(1, SIDE, SIDE), []
    for _ in range(n):
        top, left, height, width = RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3])
        found.append((height * width / SIDE**2, width, height, left, top))
    return np.array(found)


@pytest.mark.parametrize("count", [N // 10, pytest.param(N, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("draw", "scale"), [(1, [0.4, 1.0]), (2, [0.05, 0.4])], ids=["global", "local"])
def test_boxes_have_the_distribution_of_torchvision(draw: int, scale: list[float], count: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        theirs = draw_like_torchvision(scale, count)
    ours = draw_areas("multi-crop", draw, N)
    for column in range(5):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.01
        error = theirs[:, column].std() * np.sqrt(1 / N + 1 / count)
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 4 * error


@pytest.mark.parametrize(("spec", "cycle"), [("multi-crop", "GGLLLLLL"), ("multi-crop:global=1,local=3", "GLLL")])
def test_draws_cycle_through_global_and_local_crops(spec: str, cycle: str) -> None:
    for draw, kind in enumerate(3 * cycle):
        area = draw_areas(spec, draw, 300)[:, 0]
        if kind == "G":
            assert area.min() > 0.38
            assert area.max() > 0.9
        else:
            assert area.min() < 0.07
            assert area.max() < 0.42


def test_a_batch_of_several_draws_has_the_views_of_each() -> None:
    images, policy = make_images(12, size=16), parse_views("multi-crop:size=8")
    index, draws = np.repeat(np.arange(3), 8), np.tile(np.arange(8), 3)
    together = render(images, policy, 4, index, draws)
    for row, (i, draw) in enumerate(zip(index, draws, strict=True)):
        assert torch.equal(together[row], render(images, policy, 4, np.array([i]), int(draw))[0])


def test_crops_of_both_kinds_have_one_size_and_half_of_them_are_flipped() -> None:
    assert render_views(make_images(5, size=16), "multi-crop:size=8", draw=0).shape == (5, 3, 8, 8)
    assert render_views(make_images(5, size=16), "multi-crop:size=8", draw=7).shape == (5, 3, 8, 8)
    images = make_images(2000, size=8)
    images.pixels[:] = torch.arange(8, dtype=torch.uint8) * 30
    for draw in (0, 2):
        views = render_views(images, "multi-crop", draw=draw)
        is_flipped = views[:, 0, 0, 0] > views[:, 0, 0, -1]
        assert 900 < is_flipped.sum() < 1100


def test_one_kind_of_crop_alone_is_a_resized_crop() -> None:
    images = make_images(16, size=12)
    local = render_views(images, "multi-crop:global=0,local=1,min_scale=0.08,global_scale=1", draw=3)
    assert np.array_equal(local, render_views(images, "resized-crop-flip", draw=3))
    whole = render_views(images, "multi-crop:global=1,local=0,min_scale=0.05,global_scale=0.5", draw=3)
    assert np.array_equal(whole, render_views(images, "resized-crop-flip:min_scale=0.5", draw=3))
