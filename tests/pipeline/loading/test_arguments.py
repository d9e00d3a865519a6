"""The arguments of a cache's methods: numbers of NumPy, masks, copies, and one line for another type."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache import Cache, UsageError

Call = Callable[[Cache], object]


@pytest.fixture(scope="module")
def opened(tiny: Path) -> Cache:
    return Cache(tiny / "cache")


def test_what_a_cache_returns_is_a_copy(opened: Cache) -> None:
    for read in (opened.labels, opened.rows):
        for split in ("train", "val", "test"):
            before = read(split).clone()
            read(split)[:] = -1
            assert torch.equal(read(split), before)
    opened.splits["train"] = 1
    opened.taps.clear()
    assert (opened.splits["train"], len(opened.taps)) == (300, 2)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor])
def test_integers_of_numpy_and_pytorch_are_integers(opened: Cache, kind: Callable[[int], Any]) -> None:
    numbers = {"batch_size": 100, "seed": 3, "draws": 3, "draws_per_decode": 1, "workers": 0}
    expected = opened.loader("train", **numbers)  # type: ignore[arg-type]
    loader = opened.loader("train", **{name: kind(number) for name, number in numbers.items()})
    for batch, same in zip(loader, expected, strict=True):
        assert torch.equal(batch.index, same.index)
        assert torch.equal(batch.views, same.views)
    assert loader.state_dict() == expected.state_dict()
    assert torch.equal(opened.targets("train", [1], draw=kind(2)), opened.targets("train", [1], draw=2))
    assert torch.equal(opened.render("train", [1], draw=kind(2)), opened.render("train", [1], draw=2))
    features = [opened.features("train", [1], ["flatten"], draw=draw)["flatten"] for draw in (kind(2), 2)]
    assert torch.equal(*features)


@pytest.mark.parametrize("convert", [np.asarray, list, torch.tensor])
def test_a_mask_stands_for_its_positions(opened: Cache, convert: Callable[[Any], Any]) -> None:
    mask = (np.arange(300) % 7 == 2).tolist()
    index = np.flatnonzero(mask)
    assert torch.equal(opened.targets("train", convert(mask)), opened.targets("train", index))
    rows = [int(i) for batch in opened.loader("train", 16, subset=convert(mask)) for i in batch.index]
    assert sorted(rows) == index.tolist()


REFUSED: list[tuple[Call, str]] = [
    (lambda cache: cache.loader(batch_size="8"), "batch_size='8' is a str, not a whole number"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(batch_size=8.0), "batch_size=8.0 is a float"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(batch_size=None), "batch_size is None, not a whole number"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(seed=True), "seed=True is a bool, not a whole number"),
    (lambda cache: cache.loader(seed=[1]), r"seed=\[1\] is a list"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(draws="1"), "draws='1' is a str"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(draws=-1), "draws -1 is below 0"),
    (lambda cache: cache.loader(draws_per_decode=1.0), "draws_per_decode=1.0 is a float"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(workers=-1), "workers -1 is not between 0 and 256"),
    (lambda cache: cache.loader(workers=257), "workers 257 is not between 0 and 256"),
    (lambda cache: cache.loader(workers=None), "workers is None"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(["train"]), r"split=\['train'\] is a list, not a str"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(device=0), "device=0 is an int, not a device such as"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(taps=7), "taps=7 is an int, not a list of names"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(taps=[7]), r"taps\[0\]=7 is an int, not a name"),  # type: ignore[list-item]
    (lambda cache: cache.loader(targets=1), "targets=1 is an int, not True or False"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(sampler=None), "sampler is None, not a str"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(subset=[True] * 5), r"the mask subset is bool \[5\], and train has 300 rows"),
    (lambda cache: cache.loader(subset=np.zeros(300, bool)), "the subset has no row"),
    (lambda cache: cache.loader(subset={1, 2}), r"subset=\{1, 2\} is a set, not .*: give list\(subset\)"),  # type: ignore[arg-type]
    (lambda cache: cache.loader(subset="train"), "subset='train' is a str, not a list of whole numbers"),
    (lambda cache: cache.loader(labels={1}), r"labels=\{1\} is a set, not whole numbers \[300\]"),  # type: ignore[arg-type]
    (lambda cache: cache.targets("train", None), "index is None, not a list of whole numbers"),  # type: ignore[arg-type]
    (lambda cache: cache.targets("train", [[1], [2, 3]]), r"index=\[\[1\], \[2, 3\]\] is a list, not"),  # type: ignore[list-item]
    (lambda cache: cache.targets("train", 0.5), r"whole numbers, not float64 \[1\]"),
    (lambda cache: cache.targets("train", [0], draw="1"), "draw='1' is a str"),  # type: ignore[arg-type]
    (lambda cache: cache.targets("train", [0], draw=-1), "draw -1 is below 0"),
    (lambda cache: cache.features("train", [0], "flatten"), r"taps is a list of names, such as \['flatten'\]"),
    (lambda cache: cache.verify(progress=None), "progress is None, not True, False or a function"),  # type: ignore[arg-type]
    (lambda cache: cache.verify(progress=1), "progress=1 is an int"),  # type: ignore[arg-type]
    (lambda cache: Cache(7), "path=7 is an int, not a path"),  # type: ignore[arg-type]
    (lambda cache: Cache([cache.path, None]), "path is None, not a path"),  # type: ignore[list-item]
    (lambda cache: Cache(cache.path, combine=1), "combine=1 is an int, not a str"),  # type: ignore[arg-type]
    (lambda cache: Cache(cache.path, map=None), "map is None, not a str"),  # type: ignore[arg-type]
    (lambda cache: Cache(cache.path, data_root=None), "data_root is None, not a path"),  # type: ignore[arg-type]
    (lambda cache: Cache(cache.path, progress=1), "progress=1 is an int"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_an_argument_of_another_type_is_named_in_one_line(opened: Cache, call: Call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call(opened)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (torch.zeros(2, 1, 8, 8), r"uint8 \[n, 1, 8, 8\], not float32: .* already normalised: pass batch.views"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "not int64: pass batch.views"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"not \[2, 3, 8, 8\]"),
        (torch.zeros(2, 1, 9, 9, dtype=torch.uint8), r"not \[2, 1, 9, 9\]"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"not \[1, 8, 8\]"),
        (np.zeros((2, 1, 8, 8), np.uint8), r"views is uint8 \[2, 1, 8, 8\], not a tensor"),
    ],
)
def test_what_is_no_view_of_the_cache_is_not_prepared(opened: Cache, views: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        opened.prepare_input(views)


def test_a_student_that_is_evaluated_is_a_module(opened: Cache) -> None:
    with pytest.raises(UsageError, match=r"a torch\.nn\.Module"):
        opened.evaluate(lambda images: images)  # type: ignore[arg-type]


def test_a_student_on_another_device_than_its_batches_is_one_line(opened: Cache) -> None:
    student = torch.nn.Linear(4, 10, device="meta")
    with pytest.raises(UsageError, match="is on meta, and its batches are to be on cpu: give device='meta'"):
        opened.evaluate(student)
