"""The boxes of resized crops: torchvision's distribution, as a pure function of (policy, seed, index, draw)."""

import decimal
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import ks_2samp, kstest

from softcache.base import rng
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.boxes import BoxRecorder, draw_boxes
from tests.helpers.commands import Stages
from tests.helpers.damage import edit_manifest

Boxes = NDArray[np.float64]
SHAPES = [(224, 224), (500, 375), (640, 240), (120, 400)]
AREA, RATIO, TOP, LEFT = 9, 10, 11, 12  # purposes: changing one makes the views of every cache on disk wrong


def measure(boxes: Boxes, width: int, height: int) -> dict[str, Boxes]:
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    return {"area": w * h / (width * height), "ratio": w / h, "left": left / width, "top": top / height}


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_boxes_have_the_distribution_of_torchvision(width: int, height: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    n, image = 4000, torch.zeros(1, height, width)
    torch.manual_seed(0)
    theirs = []
    for _ in range(n):
        top, left, h, w = transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs.append((left, top, left + w, top + h))
    expected = measure(np.array(theirs, float), width, height)
    ours = measure(draw_boxes("resized-crop-flip:size=4", [(width, height)] * n), width, height)
    for name, values in expected.items():
        # The equal steps of whole pixels are ties, which make the test a little stricter than its p-value says.
        assert ks_2samp(ours[name], values).pvalue > 1e-4, name
        assert ours[name].mean() == pytest.approx(values.mean(), abs=5 * values.std() / math.sqrt(n / 2)), name
    old = measure(draw_boxes("resized-crop-flip:size=4,revision=1", [(width, height)] * n), width, height)
    assert ks_2samp(old["area"], expected["area"]).pvalue < 1e-20, "revision 1 has another distribution"


def find_box(seed: int, draw: int, i: int, width: int, height: int, min_scale: float) -> tuple[int, int, int, int]:
    """The box of one view, with the ratio from its formula in decimal arithmetic."""
    index = np.array([i])
    for attempt in range(10):
        share = min_scale + (1 - min_scale) * float(rng.uniform((seed, draw, AREA, attempt), index)[0])
        step = int(rng.integers((seed, draw, RATIO, attempt), index, 4096)[0])
        exponent = (decimal.Decimal(step) + decimal.Decimal("0.5")) / 4096
        ratio = float(decimal.Decimal("0.75") * (decimal.Decimal(16) / 9) ** exponent)
        w, h = round(math.sqrt(share * (width * height) * ratio)), round(math.sqrt(share * (width * height) / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = (float(rng.uniform((seed, draw, purpose), index)[0]) for purpose in (TOP, LEFT))
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


@settings(deadline=None, max_examples=60)
@given(
    min_scale=st.sampled_from([0.08, 0.5, 0.95, 1.0]),
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    seed=st.integers(0, 2**63),
    draw=st.integers(0, 999),
)
def test_a_box_is_what_one_view_after_the_other_gives(
    min_scale: float, width: int, height: int, seed: int, draw: int
) -> None:
    boxes = draw_boxes(f"resized-crop-flip:size=4,min_scale={min_scale}", [(width, height)] * 3, seed, draw=draw)
    assert [tuple(box) for box in boxes] == [find_box(seed, draw, i, width, height, min_scale) for i in range(3)]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()


def test_an_image_in_which_no_box_fits_is_cut_to_its_centre() -> None:
    boxes = draw_boxes("resized-crop-flip:size=4,min_scale=1", [(900, 100), (100, 900), (301, 300)])
    assert [tuple(box) for box in boxes[:2]] == [(383, 0, 516, 100), (0, 383, 100, 516)]
    assert find_box(0, 0, 2, 301, 300, 1.0) == tuple(boxes[2])


def test_a_box_depends_on_neither_the_batch_nor_the_other_draws() -> None:
    spec, sizes = "resized-crop-flip:size=4", [(300 + 7 * i, 500 - 9 * i) for i in range(40)]
    alone = [draw_boxes(spec, sizes, 5, np.array([i]), draw)[0] for i in range(40) for draw in (2, 3)]
    together = draw_boxes(spec, sizes, 5, np.repeat(np.arange(40), 2), np.tile([2, 3], 40))
    assert np.array_equal(together, alone)


def test_boxes_of_different_draws_seeds_and_attempts_are_independent() -> None:
    sizes, n = [(500, 500)] * 3000, 3000
    first = measure(draw_boxes("resized-crop-flip:size=4", sizes), 500, 500)
    for seed, draw in ((0, 1), (1, 0), (1, 1)):
        second = measure(draw_boxes("resized-crop-flip:size=4", sizes, seed, draw=draw), 500, 500)
        assert all(abs(np.corrcoef(first[name], second[name])[0, 1]) < 4 / n**0.5 for name in first)
    index = np.arange(n)
    numbers = [rng.uniform((0, 0, AREA, attempt), index) for attempt in range(10)]
    numbers += [rng.uniform((0, 0, purpose), index) for purpose in range(13)]
    for i, a in enumerate(numbers):
        assert kstest(a, "uniform").pvalue > 1e-4
        assert all(abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5 for b in numbers[:i])


# Caches without a revision, which have boxes of revision 1


def make_cache(stages: Stages, tiny: Path, views: str, *options: object, out: str = "c") -> dict[str, object]:
    command = ("teacher-cache", "--train-size", 150, "--weights", tiny / "runs/teacher", "--views", views)
    return stages(*command, *options, "--out", out)


def test_a_cache_records_the_revision_unless_it_is_the_first(tiny: Path, stages: Stages) -> None:
    make_cache(stages, tiny, "resized-crop-flip", "--draws", 1, out="new")
    make_cache(stages, tiny, "resized-crop-flip:revision=1", "--draws", 1, out="old")
    new, old = (json.loads(Path(name, "manifest.json").read_text())["identity"]["views"] for name in ("new", "old"))
    assert new["revision"] == 2
    assert new == {**old, "revision": 2}
    assert [CacheReader(Path(name)).views.revision for name in ("new", "old")] == [2, 1]


def test_an_older_cache_trains_students_grows_and_is_not_mistaken_for_a_new_one(tiny: Path, stages: Stages) -> None:
    make_cache(stages, tiny, "resized-crop-flip:revision=1", "--draws", 1)
    forget_revision(Path("c"))
    stages("student", "--cache", "c", "--arch", "mlp:8", "--epochs", 1, "--out", "r")
    stages("check-cache", "c", "--deep")
    command = ("teacher-cache", "--train-size", 150, "--weights", tiny / "runs/teacher", "--out", "c")
    error = stages.fails(1, *command, "--views", "resized-crop-flip")
    assert "views.revision" in error
    shutil.copytree("c", "copy")
    error = stages.fails(1, "student", "--cache", "c", "--arch", "mlp:8", "--epochs", 1, "--draws", 2)
    growth = error[error.index("teacher-cache --") :].split()
    assert "resized-crop-flip:revision=1" in growth
    stages(*growth, "--weights", tiny / "runs/teacher")
    assert CacheReader(Path("c")).manifest.draws == 2
    assert CacheReader(Path("c")).manifest.fingerprint == CacheReader(Path("copy")).manifest.fingerprint


def forget_revision(folder: Path) -> None:
    """Write the option of the views as before there was a revision, and seal the manifest again."""

    def change(record: dict[str, Any]) -> None:
        assert record["settings"]["views"] == "resized-crop-flip:revision=1"
        record["settings"]["views"] = "resized-crop-flip"

    edit_manifest(folder, change)


@settings(deadline=None, max_examples=300)
@given(
    min_scale=st.floats(0.08, 1),
    width=st.integers(8, 600),
    height=st.integers(8, 600),
    seed=st.integers(0, 2**63),
    draw=st.integers(0, 999),
)
def test_a_box_of_revision_1_has_the_documented_area_and_ratio_for_images_of_any_shape(
    min_scale: float, width: int, height: int, seed: int, draw: int
) -> None:
    recorder = BoxRecorder(*[(width, height)] * 8)
    render(
        recorder, parse_views(f"resized-crop-flip:size=4,min_scale={min_scale},revision=1"), seed, np.arange(8), draw
    )
    assert len(recorder.boxes) == 8
    for left, top, right, bottom in recorder.boxes:
        assert all(edge == int(edge) for edge in (left, top, right, bottom))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        # Sides are rounded to whole pixels, so each may be off by half a pixel.
        w, h = right - left, bottom - top
        assert (w + 0.5) / (h - 0.5) >= 3 / 4
        assert (w - 0.5) / (h + 0.5) <= 4 / 3
        # An image more elongated than 4/3 has no such box of its whole area: then the largest possible one.
        max_area = min(width * height, 4 / 3 * min(width, height) ** 2)
        assert (w + 0.5) * (h + 0.5) >= min(min_scale * width * height, max_area)


def test_boxes_of_revision_1_spread_over_area_ratio_and_position() -> None:
    n, side = 4096, 1000
    recorder = BoxRecorder(*[(side, side)] * n)
    render(recorder, parse_views("resized-crop-flip:size=4,revision=1"), 0, np.arange(n), 0)
    left, top, right, bottom = np.array(recorder.boxes).T
    width, height = right - left, bottom - top
    # Four standard errors: areas are uniform on 0.08 … 1, ratios symmetric, positions uniform where the box fits.
    assert abs((width * height / side**2).mean() - 0.54) < 4 * 0.92 / (12 * n) ** 0.5
    assert abs((width > height).mean() - 0.5) < 4 * (0.25 / n) ** 0.5
    assert (width / height).min() < 0.76
    assert (width / height).max() > 1.32
    small = (width < side / 2) & (height < side / 2)
    down, across = (top / np.maximum(side - height, 1))[small], (left / np.maximum(side - width, 1))[small]
    n = small.sum()
    for position in (down, across):
        assert abs(position.mean() - 0.5) < 4 / (12 * n) ** 0.5
        assert np.histogram(position, 4, (0, 1))[0].min() > 0.2 * n
    assert abs(np.corrcoef(down, across)[0, 1]) < 4 / n**0.5
