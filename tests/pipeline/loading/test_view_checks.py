"""Views are compared with the checksums of the cache while they are used."""

from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.base.errors import CacheError
from softcache.data.images.image_arrays import ImageArrays
from softcache.data.transfer_set import Split, load_transfer_set
from softcache.pipeline.cache.checksums import compute_crc32, compute_joined_crc32, join_crc32
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.loading import view_checks
from softcache.pipeline.loading.stream import BatchStream

CPU = torch.device("cpu")


@pytest.mark.parametrize("views", [1, 2, 3, 31, 100])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 5, 7)])
def test_checksums_are_joined_as_the_bytes_are(views: int, shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, (views, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(views))
    assert join_crc32(compute_crc32(pixels), pixels[0].numel()) == compute_joined_crc32(pixels)


def make_loader(tiny: Path, changed_row: int | None, **options: object) -> BatchStream:
    """Load the data of `tiny`'s cache, of which one pixel of one row differs."""
    rows = load_transfer_set("digits", Path("none"), val_fraction=0.125, train_size=300).splits["train"]
    assert isinstance(rows.images, ImageArrays)
    pixels = rows.images.pixels.clone()
    if changed_row is not None:
        pixels[changed_row, 0, 4, 4] ^= 1
    cache = CacheReader(tiny / "cache")
    settings: dict[str, object] = {"order_seed": 0, "batch_size": 50, "labels": rows.labels, "rows": np.arange(300)}
    settings |= {"split": Split(ImageArrays(pixels), rows.labels, ""), "views": cache.views, "view_seed": cache.seed}
    return BatchStream(**(settings | {"draws": 3, "cache": cache} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{}, {"draws_per_decode": 3, "batch_size": 60}, {"workers": 1}, {"resident_device": CPU}],
)
def test_a_changed_image_is_found_at_its_row(tiny: Path, options: dict[str, object]) -> None:
    loader = make_loader(tiny, 17, **options)
    with pytest.raises(CacheError, match=r"[13] of \d+ views of .* differently here, .* train index 17, draw"):
        list(loader.batches(0, 3 * loader.steps_per_epoch))


def test_a_view_in_memory_is_compared_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def count(views: torch.Tensor) -> int:
        compared.append(len(views))
        return compute_joined_crc32(views)

    monkeypatch.setattr(view_checks, "compute_joined_crc32", count)
    loader = make_loader(tiny, None)
    for _ in range(2):
        list(loader.batches(0, 6 * loader.steps_per_epoch))
    assert sum(compared) == 3 * 300
