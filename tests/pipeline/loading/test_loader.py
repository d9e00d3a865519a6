"""The loader of a cache: what an epoch holds, in which order, on which rank, and how it goes on where it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import softcache
from softcache import Batch, Cache, CacheError, CacheLoader, UsageError
from softcache.pipeline.loading import loader as loader_module
from tests.helpers.trial import attempt


@pytest.fixture(scope="module")
def cache(tiny: Path) -> Cache:
    return Cache(tiny / "cache")


def describe(batches: Iterator[Batch] | CacheLoader) -> list[tuple[list[int], int]]:
    """Indices and draw of each batch."""
    rows = []
    for batch in batches:
        assert isinstance(batch.draw, int)
        rows.append((batch.index.tolist(), batch.draw))
    return rows


def test_an_epoch_has_every_row_once_with_the_targets_of_its_very_pixels(cache: Cache) -> None:
    loader = cache.loader("train", batch_size=64, taps=["pool1:pool", "flatten"])
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(300))
    for batch in batches:
        index = batch.index.tolist()
        assert batch.logits is not None
        assert torch.equal(batch.logits, cache.targets("train", index, draw=batch.draw))
        assert torch.equal(batch.views, cache.render("train", index, draw=batch.draw))
        assert torch.equal(batch.labels, cache.labels("train")[index])
        features = cache.features("train", index, ["pool1:pool", "flatten"], draw=batch.draw)
        for tap, rows in features.items():
            assert rows.dtype == batch.features[tap].dtype == torch.float32
            assert torch.equal(rows, batch.features[tap])
        assert {tap: list(x.shape[1:]) for tap, x in features.items()} == {"pool1:pool": [64], "flatten": [512]}


def test_images_are_the_views_normalised_as_the_teachers_input(cache: Cache) -> None:
    batch = next(iter(cache.loader("train", batch_size=10)))
    spec = cache.input_spec
    expected = (batch.views.double() / 255 - spec.mean[0]) / spec.std[0]
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (10, 1, 8, 8)
    torch.testing.assert_close(batch.images.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_pass_that_reaches_its_end_is_followed_by_the_next_epoch(cache: Cache) -> None:
    loader, chosen = cache.loader(batch_size=64, seed=3), cache.loader(batch_size=64, seed=3)
    passes = [describe(loader) for _ in range(4)]
    assert loader.epoch == 4
    for epoch, rows in enumerate(passes):
        chosen.set_epoch(epoch)
        assert describe(chosen) == rows
    assert {rows[0][1] for rows in passes[:3]} == {0, 1, 2}  # each of the three draws once
    assert passes[0][0] != passes[1][0]


def test_a_pass_that_is_left_early_begins_again(cache: Cache) -> None:
    loader = cache.loader(batch_size=64)
    first = next(iter(loader))
    again = next(iter(loader))
    assert loader.epoch == 0
    assert torch.equal(first.index, again.index)


def test_a_loop_over_the_known_number_of_batches_ends_an_epoch(cache: Cache) -> None:
    """As of a trainer that counts to len(loader) and never asks for one batch more."""
    loader = cache.loader(batch_size=64)
    batches = iter(loader)
    for _ in range(len(loader)):
        next(batches)
    assert loader.epoch == 1


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_held_out_split_is_plain_views_in_the_order_of_the_index(cache: Cache, split: str) -> None:
    loader = cache.loader(split, batch_size=50)
    for _ in range(2):
        batches = list(loader)
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(cache.splits[split]))
        assert {len(batch) for batch in batches} <= {cache.splits[split] // len(loader) + k for k in (0, 1)}
        logits = torch.cat([batch.logits for batch in batches if batch.logits is not None])
        assert torch.equal(logits, cache.targets(split, range(cache.splits[split])))
        views = torch.cat([batch.views for batch in batches])
        assert torch.equal(views, cache.render(split, range(cache.splits[split])))


def test_a_subset_is_said_in_indices(cache: Cache) -> None:
    wanted = [7, 3, 250, 111, 42]
    batches = list(cache.loader("train", batch_size=2, subset=wanted))
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == sorted(wanted)
    assert torch.cat([batch.index for batch in cache.loader("val", subset=[5, 2])]).tolist() == [5, 2]


def test_hidden_labels_are_minus_one(cache: Cache) -> None:
    labels = cache.labels("train").clone()
    labels[:100] = -1
    for batch in cache.loader("train", batch_size=100, labels=labels):
        assert torch.equal(batch.labels < 0, batch.index < 100)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_goes_on_with_the_batch_that_would_have_been_the_next(cache: Cache, workers: int) -> None:
    whole = cache.loader(batch_size=50, seed=1)
    expected = [row for _ in range(3) for row in describe(whole)]
    for stop in (0, 1, 4, 6, 7, 11):
        loader, rows = cache.loader(batch_size=50, seed=1), []
        while len(rows) < stop:
            for batch in loader:
                rows += describe(iter([batch]))
                if len(rows) == stop:
                    break
        state = loader.state_dict()
        resumed = cache.loader(batch_size=50, seed=1, workers=workers)
        resumed.load_state_dict(state)
        resumed.set_epoch(state["epoch"])  # as a loop over epochs does
        while len(rows) < len(expected):
            rows += describe(resumed)
        assert rows == expected


def test_a_state_of_other_settings_is_refused(cache: Cache) -> None:
    state = cache.loader(batch_size=50).state_dict()
    for options, name in (
        ({"batch_size": 60}, "batch_size"),
        ({"batch_size": 50, "seed": 1}, "seed"),
        ({"batch_size": 50, "subset": range(299)}, "rows"),
        ({"batch_size": 50, "split": "val"}, "split"),
    ):
        with pytest.raises(UsageError, match=f"state of a loader with {name} "):
            cache.loader(**options).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="epoch 0, step 6 is no place in a loader of 6 batches"):
        cache.loader(batch_size=50).load_state_dict({**state, "step": 6})


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_parts_of_a_batch_are_the_batch_of_one_process(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    whole = list(cache.loader(batch_size=64, taps=["flatten"]))
    parts = []
    for rank in range(world):
        monkeypatch.setattr(loader_module, "_get_rank", lambda rank=rank: (rank, world))
        parts.append(list(cache.loader(batch_size=64, taps=["flatten"])))
    for batch, *of_ranks in zip(whole, *parts, strict=True):
        for name in ("index", "views", "labels", "logits", "images"):
            joined = torch.cat([getattr(part, name) for part in of_ranks])
            assert torch.equal(joined, getattr(batch, name)), name
        joined = torch.cat([part.features["flatten"] for part in of_ranks])
        assert torch.equal(joined, batch.features["flatten"])


def test_more_ranks_than_rows_of_a_batch_are_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_get_rank", lambda: (0, 4))
    with pytest.raises(UsageError, match="4 ranks share batches of 3 rows"):
        next(iter(cache.loader(batch_size=3)))


def test_a_data_loader_takes_it_as_it_is(cache: Cache) -> None:
    loader = cache.loader(batch_size=64)
    assert isinstance(loader, IterableDataset)
    wrapped: DataLoader[Any] = DataLoader(loader, batch_size=None)
    assert len(wrapped) == len(loader)
    assert describe(iter(wrapped)) == describe(cache.loader(batch_size=64))
    with_workers: DataLoader[Any] = DataLoader(cache.loader(batch_size=64), batch_size=None, num_workers=1)
    with pytest.raises(UsageError, match=r"takes num_workers=0"):
        next(iter(with_workers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "no split 'dev'. There are: train, val, test"),
        ({"batch_size": 0}, "batch_size 0 is below 1"),
        ({"seed": -1}, "seed -1 is below 0"),
        ({"draws": 4}, "draws 4 is not between 1 and the 3 draws"),
        ({"draws_per_decode": 2}, "draws_per_decode 2 does not divide the 3 draws"),
        ({"subset": []}, "the subset has no row"),
        ({"subset": [1, 1]}, "index 1 more than once"),
        ({"subset": [300]}, "index 300 is not between 0 and 299"),
        ({"subset": [0.5]}, "whole numbers, not float64"),
        ({"labels": [1, 2]}, r"labels of train are whole numbers \[300\]"),
        ({"labels": np.full(300, 10)}, "label 10 is not below the 10 classes"),
        ({"sampler": "even"}, "no sampler 'even'"),
        ({"device": "gpu"}, "no device 'gpu': there are cpu, cuda and cuda:N"),
        ({"device": "cuda:77"}, "no device 'cuda:77': there are [0-9]+ GPUs here"),
        ({"taps": "flatten"}, r"taps is a list of names, such as \['flatten'\]"),
    ],
)
def test_what_makes_no_batches_is_refused_in_one_line(cache: Cache, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        cache.loader(**options)
    assert "\n" not in str(caught.value)


def test_a_tap_that_is_not_cached_is_named_with_those_that_are(cache: Cache) -> None:
    with pytest.raises(softcache.CacheError, match=r"does not contain conv1 \(it has: pool1, flatten\)"):
        cache.loader(taps=["flatten", "conv1"])


def test_a_look_at_a_batch_after_resuming_loses_no_place(cache: Cache) -> None:
    loader = cache.loader(batch_size=50)
    batches = iter(loader)
    next(batches), next(batches)
    resumed = cache.loader(batch_size=50)
    resumed.load_state_dict(loader.state_dict())
    next(iter(resumed))  # such as the example of criterion.attach
    assert describe(resumed) == describe(batches)
    assert resumed.epoch == 1
    assert len(describe(resumed)) == len(loader)


def test_a_state_of_other_labels_or_another_cache_is_refused(cache: Cache) -> None:
    labels = cache.labels("train")
    labels[0] = -1
    with pytest.raises(UsageError, match="state of a loader with checksum_of_labels"):
        cache.loader(labels=labels).load_state_dict(cache.loader().state_dict())
    with pytest.raises(UsageError, match="state of a loader with cache other, here it is"):
        cache.loader().load_state_dict({**cache.loader().state_dict(), "cache": "other"})
    with pytest.raises(UsageError, match="a NoneType is no state of a loader"):
        cache.loader().load_state_dict(None)  # type: ignore[arg-type]


def test_a_fork_in_the_middle_of_a_pass_is_an_error_and_no_hang(cache: Cache) -> None:
    batches = iter(cache.loader(batch_size=50))
    next(batches)

    def read_on() -> str:
        with pytest.raises(CacheError, match="this process was forked while a loader was being read"):
            list(batches)
        return str(len(list(cache.loader(batch_size=50))))

    outcome = attempt(read_on)
    assert (outcome.failure, outcome.value) == ("", "6")
    assert len(list(batches)) == 5
