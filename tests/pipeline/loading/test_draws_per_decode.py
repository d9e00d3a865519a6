"""Several draws of a image from one decoding: the same views, the same targets, each once before one comes again."""

import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softcache.stages.training.loop as training
from softcache.data.images.image_folder import ImageFolder
from softcache.data.transfer_set import load_transfer_set
from softcache.data.views.policy import VIEW_POLICIES, parse_views
from softcache.data.views.render import render
from softcache.pipeline.batch import Batch
from softcache.pipeline.cache import reader as cache_module
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.loading.stream import BatchStream
from softcache.stages.training.step import ActiveTraining
from tests.helpers.caches import PETS_CACHE_COMMAND, save_pets, save_pets_teacher
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.stopping import stop_at


def stream_of(folder: Path, data: str = "digits", train_size: int = 300, **more: Any) -> BatchStream:
    found = load_transfer_set(
        data, Path("none"), val_fraction=0.125 if data == "digits" else 0.1, train_size=train_size
    )
    cache = CacheReader(folder)
    cache.check_transfer_set(found)
    rows = found.splits["train"]
    settings: dict[str, Any] = {"order_seed": 5, "batch_size": 32, "labels": rows.labels, "rows": np.arange(len(rows))}
    settings |= {"draws": 3, "cache": cache, "split": rows, "views": cache.views, "view_seed": cache.seed}
    return BatchStream(**(settings | more))


@pytest.fixture(scope="module")
def twelve(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 12 draws and the tap flatten."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("twelve") / "c"
    asked = tiny_cache_command(tiny)[:-1]
    asked[asked.index("--draws") + 1], asked[asked.index("--taps") + 1] = "12", "flatten"
    main([*asked, str(folder)])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, save_image: Any) -> ImageFolder:
    """Twenty files of several forms."""
    root = tmp_path_factory.mktemp("pictures")
    names = tuple(f"{k}.png" for k in range(20))
    for k, name in enumerate(names):
        save_image(root / name, width=9 + k % 7, height=8 + k % 5, k=k)
    return ImageFolder(root, names, "RGB", 8)


def of_draws(batch: Batch) -> list[tuple[int, int]]:
    """(index, draw) of each row."""
    draws = [batch.draw] * len(batch.index) if isinstance(batch.draw, int) else batch.draw.tolist()
    return list(zip(batch.index.tolist(), draws, strict=True))


@pytest.mark.parametrize("mixup", ["", ",mixup=0.4"])
@pytest.mark.parametrize("policy", sorted(VIEW_POLICIES))
def test_draws_of_one_decoding_are_those_of_a_decoding_each(
    images: ImageFolder, monkeypatch: pytest.MonkeyPatch, policy: str, mixup: str
) -> None:
    views = parse_views(f"{policy}:size=8{mixup}")
    index, draws = np.array([3, 0, 17, 4, 4]), np.array([7, 0, 2])
    each = [render(images, views, 9, index, int(draw)) for draw in draws]
    decoded: list[int] = []
    decode = ImageFolder.decode
    monkeypatch.setattr(ImageFolder, "decode", lambda self, i: decoded.append(i) or decode(self, i))
    together = render(images, views, 9, np.repeat(index, 3), np.tile(draws, 5))
    for place, expected in enumerate(each):
        assert torch.equal(together[place::3], expected)
    if not mixup:
        assert decoded == [3, 0, 17, 4]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("k", [2, 3, 4, 12])
def test_every_view_comes_once_before_any_repeats_with_its_own_targets(
    twelve: Path, monkeypatch: pytest.MonkeyPatch, k: int, resident: bool
) -> None:
    """Two cycles of 12 draws. A lap shows every row once, in k draws; a batch holds all k of each of its images."""
    if not resident:
        monkeypatch.setattr(cache_module, "RESIDENT_BYTES", 0)
    stream = stream_of(twelve, draws=12, draws_per_decode=k, batch_size=24, taps=("flatten",))
    per_round, position_of = stream.steps_per_epoch, np.argsort(stream.cache.row_order("train"))
    assert per_round == 13  # as with one draw: an epoch takes no more steps
    cycles: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    for step, batch in enumerate(stream.batches(0, 2 * 12 * per_round)):
        rows = of_draws(batch)
        cycles[step // (12 * per_round)].update(rows)
        assert len(rows) <= 24
        assert len(rows) == k * len({index for index, _ in rows})
        if step % 29 == 0:
            for draw in {draw for _, draw in rows}:
                of = torch.tensor([d == draw for _, d in rows])
                index = batch.index[of].numpy()
                logits, features = stream.cache.read_stored("train", draw, position_of[index], ("flatten",))
                views = render(stream.split.images, stream.views, stream.view_seed, index, draw)
                assert torch.equal(batch.logits[of], logits)
                assert torch.equal(batch.features["flatten"][of], features["flatten"])
                assert torch.equal(batch.views[of], views)
                assert torch.equal(batch.labels[of], torch.from_numpy(stream.labels[index]))
    for cycle in cycles:
        assert cycle == dict.fromkeys(product(range(300), range(12)), 1)


def assert_same(one: Batch, other: Batch) -> None:
    assert of_draws(one) == of_draws(other)
    for name in ("views", "labels", "logits", "partner", "share"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.parametrize("resident", [True, False])
def test_batches_are_the_same_from_any_step(twelve: Path, monkeypatch: pytest.MonkeyPatch, resident: bool) -> None:
    if not resident:
        monkeypatch.setattr(cache_module, "RESIDENT_BYTES", 0)
    whole = list(stream_of(twelve, draws=12, draws_per_decode=4).batches(0, 100))
    for start in (1, 39, 40, 57):
        again = stream_of(twelve, draws=12, draws_per_decode=4).batches(start, 100)
        for one, other in zip(whole[start:], again, strict=True):
            assert_same(one, other)


def test_a_draw_that_is_used_with_others_is_read_once(twelve: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 draws side by side none is put out of memory for another, in its lap."""
    read: list[tuple[int, str]] = []
    column = CacheReader.read_column

    def noted(self: CacheReader, split: str, draw: int, name: str) -> Any:
        read.append((draw, name))
        return column(self, split, draw, name)

    monkeypatch.setattr(CacheReader, "read_column", noted)
    stream = stream_of(twelve, draws=12, draws_per_decode=6, batch_size=6)
    for _ in stream.batches(0, 3 * 6 * stream.steps_per_epoch):
        pass
    assert sorted(read) == [(draw, name) for draw in range(12) for name in ("logits", "view_crc32")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_by_processes_gives_the_same_batches_as_by_a_thread(
    stages: Stages, tmp_path: Path, save_image: Any, workers: int
) -> None:
    save_pets(tmp_path / "pets", save_image)
    save_pets_teacher(tmp_path / "pets.pt")
    asked = [*PETS_CACHE_COMMAND]
    asked[asked.index("--views") + 1], asked[asked.index("--draws") + 1] = "resized-crop-flip:mixup=1", "4"
    stages(*asked, "--out", "p")
    more: dict[str, Any] = {"data": "folder:pets", "train_size": 0, "draws": 4, "batch_size": 8, "draws_per_decode": 2}
    stream = stream_of(Path("p"), workers=workers, start_method="fork" if workers else None, **more)
    expected = stream_of(Path("p"), **more)
    seen: Counter[tuple[int, int]] = Counter()
    for one, other in zip(stream.batches(3, 15), expected.batches(3, 15), strict=True):
        assert_same(one, other)
    for batch in stream.batches(0, 4 * stream.steps_per_epoch):
        seen.update(of_draws(batch))
        for row, (index, draw) in enumerate(of_draws(batch)):
            at = int(np.flatnonzero(stream.cache.row_order("train") == index)[0])
            assert torch.equal(batch.logits[row : row + 1], stream.cache.read_stored("train", draw, np.array([at]))[0])
            view = render(stream.split.images, stream.views, stream.view_seed, np.array([index]), draw)
            assert torch.equal(batch.views[row : row + 1], view)
    assert set(seen.values()) == {1}
    assert len(seen) == 4 * len(stream.rows)


STUDENT = ("--arch", "mlp:8", "--epochs", 4, "--batch-size", 32, "--draws-per-decode", 4)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Batch]]:
    """{job: its batches} of trainings from now on."""
    seen: dict[str, list[Batch]] = {}
    step = training.train_step

    def noting(active: ActiveTraining, batch: Batch, *rest: Any) -> torch.Tensor:
        seen.setdefault(active.run.name, []).append(batch)
        return step(active, batch, *rest)

    monkeypatch.setattr(training, "train_step", noting)
    return seen


def test_student_and_baseline_take_the_same_steps_on_the_same_views(
    twelve: Path, stages: Stages, noted: dict[str, list[Batch]]
) -> None:
    result = stages("student", "--cache", twelve, *STUDENT, "--baseline", "--out", "r")
    assert json.loads(Path("r/settings.json").read_text())["draws_per_decode"] == 4
    assert len(noted["student"]) == len(noted["baseline"]) == 4 * 10
    for one, other in zip(noted["student"], noted["baseline"], strict=True):
        assert of_draws(one) == of_draws(other)
        assert torch.equal(one.views, other.views)
    assert result["student"]["test"]["accuracy"] > 0.3


def test_several_caches_labels_that_are_hidden_rows_that_are_missing_and_a_sampler_go_with_it(
    tiny: Path, twelve: Path, stages: Stages, noted: dict[str, list[Batch]], tmp_path: Path
) -> None:
    stages(*tiny_cache_command(tiny)[:-1], tmp_path / "c", "--codec", "float32", "--draws", 12)
    both = ("--cache", twelve, "--cache", tmp_path / "c", "--combine", "mean_logit")
    place = np.argsort(CacheReader(twelve).row_order("train"))
    stages("student", *both, *STUDENT, "--out", "both")
    for batch in noted.pop("student")[::7]:
        for row, (index, draw) in enumerate(of_draws(batch)):
            said = [CacheReader(c).read_stored("train", draw, place[[index]])[0] for c in (twelve, tmp_path / "c")]
            torch.testing.assert_close(batch.logits[row], torch.stack(said).mean(0)[0])

    kd_and_hard = ("--loss", "kd", "--loss", "hard")
    stages("student", "--cache", twelve, *STUDENT, *kd_and_hard, "--labelled", 20, "--baseline", "--out", "few")
    index, labels = (torch.cat([getattr(b, k) for b in noted["student"]]) for k in ("index", "labels"))
    known = {i for i, y in zip(index.tolist(), labels.tolist(), strict=True) if y >= 0}
    assert len(known) == 20
    assert {i for batch in noted["baseline"] for i in batch.index.tolist()} == known
    assert len(noted["baseline"]) == len(noted.pop("student"))

    (tmp_path / "c/draw-001/shard-00001.h5").unlink()
    gone = set(CacheReader(tmp_path / "c").row_order("train")[100:200].tolist())
    for how in ("skip", "hard"):
        stages("student", "--cache", tmp_path / "c", *STUDENT, "--missing", how, "--out", how)
        seen = noted.pop("student")
        assert {i for b in seen for i in b.index.tolist()} == (
            set(range(300)) - gone if how == "skip" else set(range(300))
        )
        for batch in seen:
            lost = [index in gone and draw == 1 for index, draw in of_draws(batch)]
            assert batch.logits.isnan().any(1).tolist() == lost

    stages("student", "--cache", twelve, *STUDENT, "--sampler", "balanced", "--out", "balanced")
    counts = Counter(y for batch in noted["student"] for y in batch.labels.tolist())
    assert sum(counts.values()) == 4 * 300
    assert max(counts.values()) == min(counts.values())


def test_a_stopped_run_goes_on_to_the_same_weights(
    twelve: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("student", "--cache", twelve, *STUDENT)
    stages(*asked, "--out", "whole")

    with monkeypatch.context() as patch:
        stop_at(patch, 17)
        stages.fails(130, *asked, "--out", "stopped")
    stages("student", "--resume", "--out", "stopped")
    one, other = (torch.load(f"{run}/student.pt", weights_only=True) for run in ("whole", "stopped"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_what_does_not_divide_is_refused_with_both_numbers_and_the_way_out(twelve: Path, stages: Stages) -> None:
    asked = ("student", "--cache", twelve, "--arch", "mlp:8", "--batch-size", 32, "--out", "r", "--draws-per-decode")
    line = stages.fails(2, *asked, 5)
    assert "--draws-per-decode 5 does not divide the 12 draws that are used: 4 or 6 does, or --draws 10" in line
    assert "does not divide the 2 draws that are used: 2 does" in stages.fails(2, *asked, 4, "--draws", 2)
    code, out, _ = stages.call(*asked[:-3], "--draws-per-decode", 4, "--epochs", 3, "--out", "three")
    assert code == 0
    assert "--epochs 3 is not a multiple of --draws-per-decode 4: some images are seen in fewer draws" in out
    line = stages.fails(2, *asked, 12)
    assert "--batch-size 32 is not a multiple of --draws-per-decode 12: --batch-size 24 or --batch-size 36" in line
    few = ("--loss", "hard", "--labelled", 13, "--batch-size", 12)
    line = stages.fails(2, *asked, 12, *few)
    assert "--draws-per-decode 12 leaves a batch of 12 without an image: there are 13 rows; lower it" in line
