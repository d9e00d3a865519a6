"""Views with all augmentations are the same pixels in every process, batch and number of draws at once."""

import multiprocessing
from functools import cache
from itertools import product
from zlib import crc32

import numpy as np
import pytest
import torch

from softcache.data.transfer_set import Split
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.loading.stream import BatchStream
from tests.helpers.views import make_images

SPECS = [
    "crop-flip:pad=2,randaugment=2x9,jitter=0.4,hue=0.1,gray=0.2,erasing=0.5,mixup=0.4,cutmix=1",
    "multi-crop:global=1,local=2,randaugment=1x14,jitter=0.8,erasing=0.25,cutmix=0.5",
]
N, DRAWS = 48, 4
Checksums = dict[tuple[int, int], tuple[int, float, int]]


def make_split() -> Split:
    return Split(make_images(N, size=10), np.arange(N) % 7, "")


def read_stream(spec: str, batch_size: int, draws_per_decode: int = 1, **options: object) -> Checksums:
    """{(index, draw): (CRC-32 of the view, share, partner)} of all views."""
    split = make_split()
    stream = BatchStream(
        split,
        parse_views(spec),
        view_seed=9,
        order_seed=3,
        batch_size=batch_size,
        labels=split.labels,
        rows=np.arange(N),
        draws=DRAWS,
        draws_per_decode=draws_per_decode,
        **options,  # type: ignore[arg-type]
    )
    found: Checksums = {}
    for batch in stream.batches(0, DRAWS * stream.steps_per_epoch):
        assert batch.share is not None
        assert batch.partner is not None
        draws = torch.as_tensor(batch.draw).expand(len(batch)).tolist()
        for row, (i, draw) in enumerate(zip(batch.index.tolist(), draws, strict=True)):
            crc = crc32(batch.views[row].numpy().tobytes())
            found[i, draw] = crc, float(batch.share[row]), int(batch.partner[row])
    assert sorted(found) == sorted(product(range(N), range(DRAWS)))
    return found


@cache
def read_expected(spec: str) -> Checksums:
    """What is read from batches of 16 views of one draw, whose pixels are those of single views."""
    found = read_stream(spec, 16)
    images, policy = make_split().images, parse_views(spec)
    for (i, draw), (crc, _, _) in found.items():
        if i % 8 == 0:
            assert crc == crc32(render(images, policy, 9, np.array([i]), draw).numpy().tobytes())
    return found


@pytest.mark.parametrize(("batch_size", "draws_per_decode"), [(1, 1), (7, 1), (48, 1), (8, 2), (32, 4)])
@pytest.mark.parametrize("spec", SPECS)
def test_batches_of_any_size_and_number_of_draws(spec: str, batch_size: int, draws_per_decode: int) -> None:
    assert read_stream(spec, batch_size, draws_per_decode) == read_expected(spec)


# Python warns of a fork beside threads, torch of more workers than cores: both are intended here.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning", "ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("spec", "workers", "start_method", "draws_per_decode"),
    [
        *[(spec, workers, "fork", k) for spec in SPECS for workers, k in ((1, 2), (2, 1))],
        (SPECS[0], 1, "spawn", 1),
        pytest.param(SPECS[1], 2, "spawn", 2, marks=pytest.mark.slow),
    ],
)
def test_worker_processes(spec: str, workers: int, start_method: str, draws_per_decode: int) -> None:
    if start_method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start_method}")
    options = {"workers": workers, "start_method": start_method}
    assert read_stream(spec, 12, draws_per_decode, **options) == read_expected(spec)
