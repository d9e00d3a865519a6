"""A stream whose images and targets lie on a device gives, to the bit, the batches of one that renders them here.

The device is the processor: what is different on a GPU is where the tensors are.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.data.device_views import can_render_on_device, render_on_device
from softcache.data.image_arrays import ImageArrays
from softcache.data.views import parse_views, render
from softcache.pipeline.cache import reader as cache_module
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.loading import device_cache as resident
from softcache.pipeline.loading.loader import CacheLoader
from softcache.pipeline.teachers.ensemble import TeacherEnsemble
from tests.helpers.commands import Stages, tiny_cache_command

CPU = torch.device("cpu")
POLICIES = ["none", "crop:pad=2", "crop:pad=0", "crop-flip", "crop-flip:pad=0", "crop-flip:pad=1,size=8,resize=8"]


def images_of(channels: int, n: int = 50, side: int = 8) -> ImageArrays:
    grid = np.arange(n * channels * side * side).reshape(n, channels, side, side)
    return ImageArrays(torch.from_numpy(((grid * grid * 31 + 7 * grid) % 251).astype(np.uint8)))


@pytest.mark.parametrize("mixup", [0.0, 0.3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("spec", POLICIES)
def test_views_on_a_device_are_those_of_render(spec: str, channels: int, mixup: float) -> None:
    policy = parse_views(spec + (f"{',' if ':' in spec else ':'}mixup={mixup}" if mixup else ""))
    images = images_of(channels)
    assert can_render_on_device(images, policy)
    index = np.array([7, 7, 0, 49, 21, 7])
    for draw in (3, np.array([0, 1, 2, 0, 1, 2])):
        there = render_on_device(images.pixels, policy, 11, index, draw)
        assert there.dtype == torch.uint8
        assert torch.equal(there, render(images, policy, 11, index, draw))
    assert torch.equal(images.pixels, images_of(channels).pixels)  # nothing was turned in place


@pytest.mark.parametrize("spec", ["resized-crop-flip", "none:size=6", "crop:resize=9", "none:size=8,resize=10"])
def test_what_pillow_resizes_is_not_rendered_on_a_device(spec: str) -> None:
    images, views = images_of(1), parse_views(spec)
    assert not can_render_on_device(images, views)
    stream = CacheLoader(Any, views, 0, 0, 8, np.zeros(50, np.int64), np.arange(50), resident_device=CPU)
    object.__setattr__(stream, "split", type("Split", (), {"images": images}))
    with pytest.raises(ValueError, match="at their own size"):
        next(stream.batches(0, 1))


@pytest.fixture(scope="module")
def mixed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 4 draws of mixed views, with the tap flatten."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("mixed") / "c"
    asked = tiny_cache_command(tiny)[:-1]
    for option, value in (("--draws", "4"), ("--taps", "flatten"), ("--views", "crop-flip:pad=1,mixup=0.4")):
        asked[asked.index(option) + 1] = value
    main([*asked, str(folder)])
    return folder


def stream_of(folder: Path, source: Any = None, **more: Any) -> CacheLoader:
    cache = Cache(folder)
    rows = cache.load_transfer_set("digits", Path("none"), lambda items, total, what: items).splits["train"]
    settings: dict[str, Any] = {"order_seed": 5, "batch_size": 32, "labels": rows.labels, "rows": np.arange(300)}
    settings |= {"draws": cache.manifest.draws, "cache": source or cache, "split": rows, "views": cache.views}
    return CacheLoader(**(settings | {"view_seed": cache.seed, "taps": ("flatten",)} | more))


def assert_same_batches(one: CacheLoader, other: CacheLoader, start: int, stop: int) -> None:
    for a, b in zip(one.batches(start, stop), other.batches(start, stop), strict=True):
        for name in ("index", "views", "labels", "logits", "partner", "share", "draw"):
            x, y = getattr(a, name), getattr(b, name)
            same = torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
            assert same, name
        assert a.features.keys() == b.features.keys()
        assert all(torch.equal(x, b.features[tap]) for tap, x in a.features.items())


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain", "mixed", "disk", "few", "hard", "none"])
def test_batches_are_equal_to_the_bit(
    tiny: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch, kind: str, k: int
) -> None:
    """From a cache in memory and on disk, of views that are mixed or not, of some rows, without targets or a cache."""
    monkeypatch.setattr(resident, "_READ_ROWS", 77)  # a draw is read in parts
    if kind == "disk":
        monkeypatch.setattr(cache_module, "RESIDENT_BYTES", 0)
    more: dict[str, Any] = {"draws_per_decode": k, "draws": 3 if kind == "plain" and k == 1 else 4}
    folder = mixed
    if kind == "plain" and k == 1:
        folder = tiny / "cache"
    if kind == "few":
        more |= {"rows": np.arange(40, 151), "sampler": "balanced"}
    if kind == "hard":
        more |= {"read_targets": False}
    if kind == "none":
        more |= {"cache": None, "draws": 0, "taps": ()}
    one, other = stream_of(folder, **more, resident_device=CPU), stream_of(folder, **more)
    assert_same_batches(one, other, 0, 5 * one.steps_per_epoch)
    assert_same_batches(one, other, 17, 23)


def test_several_teachers_and_rows_without_an_answer_are_gathered_too(tiny: Path, mixed: Path) -> None:
    from softcache.pipeline.teachers.combine import parse_combination

    gaps = {1: np.arange(300) % 7 == 0}
    for source in (
        TeacherEnsemble((Cache(mixed),), missing=gaps),
        TeacherEnsemble((Cache(mixed), Cache(mixed)), parse_combination("geometric", 2)),
        TeacherEnsemble((Cache(mixed), Cache(mixed)), parse_combination("per_teacher", 2), missing=gaps),
    ):
        one, other = (stream_of(mixed, source, draws_per_decode=2, resident_device=place) for place in (CPU, None))
        for a, b in zip(one.batches(0, 40), other.batches(0, 40), strict=True):
            assert a.logits is not None
            assert b.logits is not None
            assert torch.equal(a.logits.nan_to_num(123), b.logits.nan_to_num(123))
            assert torch.equal(a.features["flatten"], b.features["flatten"])


def test_a_draw_is_sent_to_the_device_once(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    targets = Cache.read_targets

    def noted(self: Cache, split: str, draw: int, positions: Any, *more: Any) -> Any:
        asked.extend([draw] * len(positions))
        return targets(self, split, draw, positions, *more)

    stream = stream_of(mixed, resident_device=CPU)
    monkeypatch.setattr(Cache, "read_targets", noted)
    for _ in range(2):
        for _ in stream.batches(0, 3 * stream.steps_per_epoch):
            pass
    rows = np.bincount(asked, minlength=4) - [1, 0, 0, 0]  # one is read for its shape
    assert sorted(rows.tolist()) == [0, 300, 300, 300]


def test_a_student_trains_from_what_lies_on_a_device_to_the_same_weights(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 4, "--baseline")
    stages(*asked, "--out", "here")
    made: list[Any] = []
    monkeypatch.setattr(
        "softcache.pipeline.loading.loader.fits_on_device", lambda *_, device, **__: made.append(device) or True
    )
    stages(*asked, "--out", "there")
    assert made == [CPU, CPU]
    for name in ("student.pt", "baseline/baseline.pt"):
        one, other = (torch.load(f"{run}/{name}", weights_only=True) for run in ("here", "there"))
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_processor_is_no_device_to_send_anything_to(tiny: Path) -> None:
    """Nothing is chosen by itself but for a GPU; there, what is too large stays here."""
    stream = stream_of(tiny / "cache", taps=())
    of = (stream.split.images, stream.views, stream.cache, 3, ())
    assert not resident.fits_on_device(*of, CPU)
    gpu = torch.device("cuda")
    size = 300 * 64 + 3 * 300 * 10 * 4
    with pytest.MonkeyPatch.context() as patch:
        for free, expected in ((3 * size, True), (3 * size - 1, False)):
            patch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
            assert resident.fits_on_device(*of, gpu) == expected
        assert not resident.fits_on_device(
            stream.split.images, parse_views("resized-crop-flip:size=8"), None, 0, (), gpu
        )
