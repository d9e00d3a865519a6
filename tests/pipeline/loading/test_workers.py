"""Worker processes decode images; what the teacher said about each comes with it, whoever decoded it."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.data.transfer_set import load_transfer_set
from softcache.pipeline.cache.checksums import compute_crc32
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.loading.stream import BatchStream
from tests.helpers.caches import PETS_CACHE_COMMAND, save_pets, save_pets_teacher
from tests.helpers.commands import Stages

# Python warns of a fork where threads run; workers are forked all the same when a user asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
METHODS = [method for method in ("fork", "spawn") if method in multiprocessing.get_all_start_methods()]
MANY = {"fork": 2, "spawn": 1}  # workers: each that is spawned takes seconds to load PyTorch


@pytest.mark.parametrize("method", [None, *METHODS])
def test_pixels_that_workers_decode_come_with_their_own_targets(
    stages: Stages, tmp_path: Path, save_image: Any, method: str | None
) -> None:
    """A folder of images: the checksum of each view is the one that is stored with its logits."""
    save_pets(tmp_path / "pets", save_image)
    save_pets_teacher(tmp_path / "pets.pt")
    stages(*PETS_CACHE_COMMAND, "--out", "p")
    found, cache = load_transfer_set("folder:pets", Path(), val_fraction=0.1), CacheReader(Path("p"))
    cache.check_transfer_set(found)
    rows, n = found.splits["train"], len(found.splits["train"])
    position_of = np.argsort(cache.row_order("train"))
    stream = BatchStream(
        rows,
        cache.views,
        cache.seed,
        3,
        5,
        rows.labels,
        np.arange(n),
        draws=2,
        cache=cache,
        taps=("hidden1",),
        workers=MANY[method] if method else 0,
        start_method=method,
    )
    seen: dict[int, list[int]] = {0: [], 1: []}
    before = torch.get_rng_state()
    for batch in stream.batches(0, 2 * stream.steps_per_epoch):
        at = position_of[batch.index.numpy()]
        np.testing.assert_array_equal(
            compute_crc32(batch.views), cache.read_column("train", batch.draw, "view_crc32")[at]
        )
        np.testing.assert_array_equal(
            batch.logits, cache.read_column("train", batch.draw, "logits")[at].astype(np.float32)
        )
        np.testing.assert_array_equal(
            batch.features["hidden1"], cache.read_column("train", batch.draw, "features/hidden1")[at]
        )
        np.testing.assert_array_equal(batch.labels, rows.labels[batch.index])
        seen[batch.draw] += batch.index.tolist()
    assert [sorted(index) for index in seen.values()] == [list(range(n))] * 2
    assert torch.equal(torch.get_rng_state(), before)  # training draws from it, and resumes with it
