"""Images and targets on a device give, to the bit, the batches that a stream renders on the CPU.

The device is the CPU here as well; on a GPU only the place of the tensors differs.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.data.images.image_arrays import ImageArrays
from softcache.data.views.on_device import can_render_on_device, render_on_device
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.cache import reader as cache_module
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.loading import device_cache
from softcache.pipeline.loading.stream import BatchStream
from softcache.pipeline.teachers.ensemble import TeacherEnsemble
from tests.helpers.commands import Stages, tiny_cache_command

CPU = torch.device("cpu")
POLICIES = ["none", "crop:pad=2", "crop:pad=0", "crop-flip", "crop-flip:pad=0", "crop-flip:pad=1,size=8,resize=8"]


def images_of(channels: int, n: int = 50, side: int = 8) -> ImageArrays:
    grid = np.arange(n * channels * side * side).reshape(n, channels, side, side)
    return ImageArrays(torch.from_numpy(((grid * grid * 31 + 7 * grid) % 251).astype(np.uint8)))


@pytest.mark.parametrize("knobs", ["", "mixup=0.3", "cutmix=1", "mixup=0.3,cutmix=1,erasing=0.5"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("spec", POLICIES)
def test_views_on_a_device_are_those_of_render(spec: str, channels: int, knobs: str) -> None:
    policy = parse_views(f"{spec}{',' if ':' in spec else ':'}{knobs}")
    images = images_of(channels)
    assert can_render_on_device(images, policy)
    index = np.array([7, 7, 0, 49, 21, 7])
    for draw in (3, np.array([0, 1, 2, 0, 1, 2])):
        views = render_on_device(images.pixels, policy, 11, index, draw)
        assert views.dtype == torch.uint8
        assert torch.equal(views, render(images, policy, 11, index, draw))
    assert torch.equal(images.pixels, images_of(channels).pixels)  # nothing was flipped in place


@pytest.mark.parametrize(
    "spec",
    [
        "resized-crop-flip",
        "none:size=6",
        "crop:resize=9",
        "none:size=8,resize=10",
        "crop:jitter=0.1",
        "crop:randaugment=1x0",
        "crop:hue=0.1",
        "none:gray=1",
    ],
)
def test_views_that_pillow_resizes_or_whose_colours_change_are_not_rendered_on_a_device(spec: str) -> None:
    images, views = images_of(1), parse_views(spec)
    assert not can_render_on_device(images, views)
    stream = BatchStream(Any, views, 0, 0, 8, np.zeros(50, np.int64), np.arange(50), resident_device=CPU)
    object.__setattr__(stream, "split", type("Split", (), {"images": images}))
    with pytest.raises(ValueError, match="at their own size"):
        next(stream.batches(0, 1))


@pytest.fixture(scope="module")
def mixed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 4 draws of views with mixup, with the tap flatten."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("mixed") / "c"
    command = tiny_cache_command(tiny)[:-1]
    for option, value in (("--draws", "4"), ("--taps", "flatten"), ("--views", "crop-flip:pad=1,mixup=0.4")):
        command[command.index(option) + 1] = value
    main([*command, str(folder)])
    return folder


def stream_of(folder: Path, source: Any = None, **options: Any) -> BatchStream:
    cache = CacheReader(folder)
    rows = cache.load_transfer_set("digits", Path("none"), lambda items, total, what: items).splits["train"]
    settings: dict[str, Any] = {"order_seed": 5, "batch_size": 32, "labels": rows.labels, "rows": np.arange(300)}
    settings |= {"draws": cache.manifest.draws, "cache": source or cache, "split": rows, "views": cache.views}
    return BatchStream(**(settings | {"view_seed": cache.seed, "taps": ("flatten",)} | options))


def assert_same_batches(first: BatchStream, second: BatchStream, start: int, stop: int) -> None:
    for a, b in zip(first.batches(start, stop), second.batches(start, stop), strict=True):
        for name in ("index", "views", "labels", "logits", "partner", "share", "draw"):
            x, y = getattr(a, name), getattr(b, name)
            is_equal = torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
            assert is_equal, name
        assert a.features.keys() == b.features.keys()
        assert all(torch.equal(x, b.features[tap]) for tap, x in a.features.items())


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain", "mixed", "disk", "few", "hard", "none"])
def test_batches_are_equal_to_the_bit(
    tiny: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch, kind: str, k: int
) -> None:
    """From a cache in memory or on disk, with or without mixup, of some rows, without targets, without a cache."""
    monkeypatch.setattr(device_cache, "_READ_ROWS", 77)  # a draw is read in parts
    if kind == "disk":
        monkeypatch.setattr(cache_module, "RESIDENT_BYTES", 0)
    options: dict[str, Any] = {"draws_per_decode": k, "draws": 3 if kind == "plain" and k == 1 else 4}
    folder = mixed
    if kind == "plain" and k == 1:
        folder = tiny / "cache"
    if kind == "few":
        options |= {"rows": np.arange(40, 151), "sampler": "balanced"}
    if kind == "hard":
        options |= {"read_targets": False}
    if kind == "none":
        options |= {"cache": None, "draws": 0, "taps": ()}
    on_device, rendered = stream_of(folder, **options, resident_device=CPU), stream_of(folder, **options)
    assert_same_batches(on_device, rendered, 0, 5 * on_device.steps_per_epoch)
    assert_same_batches(on_device, rendered, 17, 23)


def test_targets_of_several_teachers_and_missing_targets_are_gathered(tiny: Path, mixed: Path) -> None:
    from softcache.pipeline.teachers.combine import parse_combination

    missing = {1: np.arange(300) % 7 == 0}
    for source in (
        TeacherEnsemble((CacheReader(mixed),), missing=missing),
        TeacherEnsemble((CacheReader(mixed), CacheReader(mixed)), parse_combination("geometric", 2)),
        TeacherEnsemble(
            (CacheReader(mixed), CacheReader(mixed)), parse_combination("per_teacher", 2), missing=missing
        ),
    ):
        on_device, rendered = (stream_of(mixed, source, draws_per_decode=2, resident_device=d) for d in (CPU, None))
        for a, b in zip(on_device.batches(0, 40), rendered.batches(0, 40), strict=True):
            assert a.logits is not None
            assert b.logits is not None
            assert torch.equal(a.logits.nan_to_num(123), b.logits.nan_to_num(123))
            assert torch.equal(a.features["flatten"], b.features["flatten"])


def test_a_draw_is_sent_to_the_device_once(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_by_draw = np.zeros(4, int)
    read_targets = CacheReader.read_targets

    def count_and_read(self: CacheReader, split: str, draw: int, positions: Any, *arguments: Any) -> Any:
        rows_by_draw[draw] += len(positions)
        return read_targets(self, split, draw, positions, *arguments)

    stream = stream_of(mixed, resident_device=CPU)
    monkeypatch.setattr(CacheReader, "read_targets", count_and_read)
    for _ in range(2):
        for _ in stream.batches(0, 3 * stream.steps_per_epoch):
            pass
    rows_by_draw[0] -= 1  # read for its shape
    assert sorted(rows_by_draw.tolist()) == [0, 300, 300, 300]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_thread_that_uses_batches_sends_them_to_their_device(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """A GPU's copies are in the stream of the thread that starts them: from another one they might come too late."""
    threads: set[int] = set()

    def copy_to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        threads.add(threading.get_ident())
        return x.to(device)

    monkeypatch.setattr("softcache.pipeline.batch.copy_to_device", copy_to_device)
    stream = stream_of(tiny / "cache", device=torch.device("meta"), workers=workers)
    for batch in stream.batches(0, 3):
        assert {x.device.type for x in (batch.index, batch.views, batch.labels, batch.logits)} == {"meta"}
    assert threads == {threading.get_ident()}


def test_a_student_that_is_trained_from_a_device_has_the_same_weights(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = ("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 4, "--baseline")
    stages(*student, "--out", "rendered")
    devices: list[Any] = []

    def fits_on_device(*_: Any, device: torch.device, **__: Any) -> bool:
        devices.append(device)
        return True

    monkeypatch.setattr("softcache.pipeline.loading.stream.fits_on_device", fits_on_device)
    stages(*student, "--out", "resident")
    assert devices == [CPU, CPU]
    for name in ("student.pt", "baseline/baseline.pt"):
        first, second = (torch.load(f"{run}/{name}", weights_only=True) for run in ("rendered", "resident"))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_only_what_fits_is_moved_to_a_gpu_and_nothing_to_the_cpu(tiny: Path) -> None:
    stream = stream_of(tiny / "cache", taps=())
    contents = (stream.split.images, stream.views, stream.cache, 3, ())
    assert not device_cache.fits_on_device(*contents, CPU)
    gpu = torch.device("cuda")
    size = 300 * 64 + 3 * 300 * 10 * 4
    with pytest.MonkeyPatch.context() as patch:
        for free, expected in ((3 * size, True), (3 * size - 1, False)):
            patch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
            assert device_cache.fits_on_device(*contents, gpu) == expected
        assert not device_cache.fits_on_device(
            stream.split.images, parse_views("resized-crop-flip:size=8"), None, 0, (), gpu
        )
