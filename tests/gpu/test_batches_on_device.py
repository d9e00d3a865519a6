"""Views and batches that are made on a device, or copied to it, are those of the CPU to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softcache
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.transfer_set import Split
from softcache.data.views.on_device import render_on_device
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.batch import Batch
from softcache.pipeline.loading.stream import BatchStream
from softcache.pipeline.models import build

pytestmark = pytest.mark.gpu
POLICIES = (
    "none",
    "crop:pad=2",
    "crop-flip",
    "crop-flip:pad=0",
    "crop-flip:mixup=0.3",
    "crop:mixup=1,cutmix=1,erasing=0.5",
)
TAPS = ("pool1", "flatten")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_views_are_those_of_the_cpu(device: torch.device, policy: str, channels: int) -> None:
    pixels = torch.randint(256, (300, channels, 32, 32), dtype=torch.uint8)
    images, views = ImageArrays(pixels), parse_views(policy)
    index = np.random.default_rng(0).integers(0, 300, 257)
    for draw in (3, np.arange(257) % 5):
        made = render_on_device(pixels.to(device), views, 11, index, draw)
        assert made.device == device
        assert torch.equal(made.cpu(), render(images, views, 11, index, draw))


def read_batches(stream: BatchStream, device: torch.device) -> list[Batch]:
    """Read the batches of two epochs, which must be on the device, and copy them to the CPU."""
    found = []
    for batch in stream.batches(0, 2 * stream.steps_per_epoch):
        tensors = (batch.index, batch.views, batch.labels, batch.logits, *batch.features.values())
        assert {x.device for x in tensors if x is not None} == {device}
        found.append(batch.to("cpu"))
    return found


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    for a, b in zip(first, second, strict=True):
        for name in ("index", "views", "labels", "logits"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert all(torch.equal(a.features[tap], b.features[tap]) for tap in TAPS)


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[Batch]:
    return read_batches(make_stream(tiny, torch.device("cpu")), torch.device("cpu"))


def make_stream(tiny: Path, device: torch.device, **options: Any) -> BatchStream:
    return softcache.Cache(tiny / "cache").loader(batch_size=32, taps=TAPS, device=device, **options).stream


def test_a_cache_that_lies_on_the_device_gives_the_batches_of_the_cpu(
    tiny: Path, device: torch.device, expected: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":  # where nothing is kept on a device by itself
        monkeypatch.setattr("softcache.pipeline.loading.stream.fits_on_device", lambda *_, **__: True)
    stream = make_stream(tiny, device)
    assert stream._device_cache is not None
    assert_same(read_batches(stream, device), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_does_not_fit_gives_the_batches_of_the_cpu(
    tiny: Path, device: torch.device, expected: list[Batch], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """They are rendered in pinned memory by a thread, or by worker processes, and copied."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 10, 1 << 40))
    stream = make_stream(tiny, device, workers=workers)
    assert stream._device_cache is None
    assert_same(read_batches(stream, device), expected)


def test_batches_are_right_in_a_stream_of_the_users_own(
    tiny: Path, gpu: torch.device, expected: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is started in another stream than that of its use may come too late."""
    for free in (1 << 10, 1 << 38):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
        with torch.cuda.stream(torch.cuda.Stream(gpu)):  # type: ignore[no-untyped-call]
            assert_same(read_batches(make_stream(tiny, gpu), gpu), expected)


def test_a_batch_is_put_into_pinned_memory(gpu: torch.device, expected: list[Batch]) -> None:
    pinned = expected[0].pin_memory()
    assert all(x.is_pinned() for x in (pinned.index, pinned.views, pinned.logits, *pinned.features.values()))  # type: ignore[union-attr]
    assert_same([pinned.to(gpu).to("cpu")], expected[:1])


def test_a_wrong_view_is_found_on_the_device(tiny: Path, device: torch.device) -> None:
    stream = make_stream(tiny, device)
    assert isinstance(stream.split.images, ImageArrays)
    pixels = stream.split.images.pixels.clone()
    pixels[17, 0, 4, 4] ^= 1
    changed = replace(stream, split=Split(ImageArrays(pixels), stream.split.labels, ""))
    with pytest.raises(softcache.CacheError, match=r"differently here, .* train index 17, draw"):
        read_batches(changed, device)


def test_a_student_is_evaluated_on_the_device_as_on_the_cpu(tiny: Path, device: torch.device) -> None:
    cache, student = softcache.Cache(tiny / "cache"), build("resnet8", 10, 1, 8)
    on_cpu = cache.evaluate(student, "test")
    on_device = cache.evaluate(student.to(device), "test", device=device)
    assert on_device.keys() == on_cpu.keys()
    assert on_device["nll"] == pytest.approx(on_cpu["nll"], rel=1e-3)
    assert on_device["accuracy"] == pytest.approx(on_cpu["accuracy"], abs=0.01)
