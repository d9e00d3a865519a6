"""Several labels, numbers and embeddings from Python: loops of one's own, the trainer, and `softcache.evaluate`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import nn

import softcache
from tests.helpers.task_data import EMBEDDER, LABELS, NUMBERS, make_labels, make_numbers, save_arrays

LOSSES = {
    "labels": ("kd_sigmoid", "bce:weight=0.5"),
    "numbers": ("kd_mse", "mse:weight=0.5"),
    "embedding": ("embed:kind=mse,standardize=std",),
}
MAIN = {"labels": "map", "numbers": "r2", "embedding": "cosine"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of each task: c_labels, c_numbers, c_embedding."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        (folder / "embedder_of_python.py").write_text(EMBEDDER)
        save_arrays(folder / "labels.npz", make_labels(), LABELS)
        save_arrays(folder / "numbers.npz", make_numbers(), NUMBERS)
        views = ("--views", "none", "--draws", "1")
        for task in ("labels", "numbers"):
            teacher = ("--data", f"arrays:{task}.npz", "--teacher", "mlp:16")
            main(["teacher-cache", *teacher, *views, "--out", f"c_{task}"])
        own = ("--teacher", "embedder_of_python:make", "--weights", "DEFAULT", "--task", "embedding")
        main(["teacher-cache", "--data", "digits", "--train-size", "200", *own, *views, "--out", "c_embedding"])
    return folder


def open_cache(folder: Path, task: str) -> softcache.Cache:
    return softcache.Cache(
        folder / f"c_{task}", data="digits" if task == "embedding" else f"arrays:{folder / task}.npz"
    )


def make_student(outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs))


class InUnits(nn.Module):
    """A student of numbers: the network learns standardised ones, of which it returns those of the data."""

    def __init__(self, network: nn.Module, cache: softcache.Cache):
        super().__init__()
        targets = cache.labels("train")
        self.network, self.mean = network, targets.nanmean(0)
        self.std = torch.tensor(np.nanstd(targets.numpy(), 0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.network(images) * self.std + self.mean
        return outputs


@pytest.mark.parametrize("task", LOSSES)
def test_a_loop_of_ones_own_learns_every_task(task: str, folder: Path) -> None:
    cache = open_cache(folder, task)
    outputs = {"labels": 3, "numbers": 2, "embedding": 12}[task]
    names = {"labels": LABELS, "numbers": NUMBERS, "embedding": tuple(map(str, range(12)))}[task]
    assert (cache.task, cache.num_classes, cache.classes) == (task, outputs, names)
    assert f"{outputs} {'dimensions' if task == 'embedding' else task}" in repr(cache)
    loader, criterion = cache.loader("train", batch_size=64), softcache.DistillationLoss(*LOSSES[task])
    batch = next(iter(loader))
    form = {"labels": (torch.int8, 2), "numbers": (torch.float32, 2), "embedding": (torch.int64, 1)}[task]
    assert (batch.labels.dtype, batch.labels.ndim) == form
    assert batch.logits is not None
    assert batch.logits.shape[1] == outputs
    student: nn.Module = make_student(outputs)
    if task == "numbers":
        student = InUnits(student, cache)
    criterion.attach(student, example=batch)
    optimizer = torch.optim.Adam([*student.parameters(), *criterion.parameters()], lr=3e-3)
    for _ in range(15):
        for batch in loader:
            optimizer.zero_grad()
            criterion(student(batch.images), batch).backward()
            optimizer.step()
    figures = cache.evaluate(student, "test")
    assert figures[MAIN[task]] > 0.8
    assert "accuracy" not in figures
    if task == "embedding":
        return
    (test,) = cache.loader("test", batch_size=1000)
    with torch.no_grad():
        own = softcache.evaluate(student(test.images), test.labels, test.logits)
    assert own.keys() == figures.keys()
    assert own[MAIN[task]] == pytest.approx(figures[MAIN[task]], rel=1e-6)


@pytest.mark.parametrize("task", LOSSES)
def test_the_trainer_trains_a_network_that_is_passed(task: str, folder: Path, tmp_path: Path) -> None:
    """The weights that it ends with give the figures of the result, of numbers after the scale of its output."""
    cache = open_cache(folder, task)
    student = make_student(cache.num_classes)
    result = softcache.train_student(cache, student, LOSSES[task], out=tmp_path / "run", epochs=2)
    assert result["task"] == task
    assert "accuracy" not in result["student"]["test"]
    model: Any = student
    if task == "numbers":
        spec = result["student"]["preparation"]
        model = InUnits(student, cache)
        model.mean, model.std = torch.tensor(spec["output_mean"]), torch.tensor(spec["output_std"])
    figure = MAIN[task]
    assert cache.evaluate(model, "test")[figure] == pytest.approx(result["student"]["test"][figure], rel=1e-5)


def test_a_loss_of_another_task_is_refused_in_one_line(folder: Path) -> None:
    wrong = {
        "labels": ("kd", "loss 'kd' is for classes, and the task here is labels: bce, kd_sigmoid"),
        "numbers": ("kd", "loss 'kd' is for classes, and the task here is numbers: mse, kd_mse"),
        "embedding": ("mse", "loss 'mse' is for numbers, and the task here is embedding: "),
    }
    for task, (loss, message) in wrong.items():
        batch = next(iter(open_cache(folder, task).loader("train")))
        student, criterion = make_student(batch.logits.shape[1]), softcache.DistillationLoss(loss)
        for call in (
            lambda s=student, c=criterion, b=batch: c(s(b.images), b),
            lambda s=student, c=criterion, b=batch: c.attach(s, example=b),
        ):
            with pytest.raises(softcache.UsageError) as error:
                call()
            # The names of further losses may come in between.
            start, _, names = message.partition(": ")
            assert str(error.value).startswith(start)
            assert {name for name in names.split(", ") if name} <= set(str(error.value).partition(": ")[2].split(", "))
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "loss", "words"),
    [
        (torch.zeros(4, 3, dtype=torch.int8), "hard", "loss 'hard' is for classes, and the task here is labels"),
        (torch.zeros(4, 3), "bce", "loss 'bce' is for labels, and the task here is numbers"),
        (torch.zeros(4, dtype=torch.int64), "mse", "loss 'mse' is for numbers, and the task here is classes"),
    ],
)
def test_a_batch_of_ones_own_has_the_task_of_its_labels(labels: torch.Tensor, loss: str, words: str) -> None:
    batch = softcache.Batch(torch.arange(4), 0, torch.zeros(4, 1, 8, 8), labels, torch.zeros(4, 3))
    with pytest.raises(softcache.UsageError, match=words):
        softcache.DistillationLoss(loss)(torch.zeros(4, 3), batch)


@pytest.mark.parametrize("loss", ["embed:standardize=std", "embed:projection=mlp", "embed"])
def test_a_loss_without_the_parts_that_it_names_asks_for_attach(loss: str, folder: Path) -> None:
    batch = next(iter(open_cache(folder, "embedding").loader("train")))
    width = 12 if loss != "embed" else 5
    criterion = softcache.DistillationLoss(loss)
    with pytest.raises(softcache.UsageError, match=r"call criterion.attach\(student, example=batch\)"):
        criterion(torch.zeros(len(batch), width), batch)


def test_a_balance_needs_the_counts_of_a_loader(folder: Path) -> None:
    criterion = softcache.DistillationLoss("bce:balance=1")
    batch = next(iter(open_cache(folder, "labels").loader("train")))
    student = make_student(3)
    with pytest.raises(softcache.UsageError, match="loss 'bce': balance=1"):
        criterion(student(batch.images), batch)
    criterion.attach(student, example=batch)
    assert float(criterion(student(batch.images), batch).detach()) > 0


def test_evaluate_takes_the_form_of_the_labels_or_the_task_by_name() -> None:
    random = np.random.default_rng(0)
    outputs = random.normal(size=(60, 3))
    several = (random.random((60, 3)) < 0.5).astype(np.int64)
    numbers = outputs + random.normal(size=(60, 3))
    assert softcache.evaluate(outputs, np.arange(60) % 3)["accuracy"] >= 0
    figures = softcache.evaluate(outputs, several)
    assert figures["map"] == pytest.approx(sk.average_precision_score(several, outputs), abs=1e-9)
    assert softcache.evaluate(outputs, several.astype(np.float32), task="labels") == figures
    figures = softcache.evaluate(outputs, numbers)
    assert figures["mae"] == pytest.approx(sk.mean_absolute_error(numbers, outputs), abs=1e-9)
    figures = softcache.evaluate(outputs[:, :1], numbers[:, 0], task="numbers")
    assert figures["r2"] == pytest.approx(sk.r2_score(numbers[:, 0], outputs[:, 0]), abs=1e-9)
    cosines = (outputs * numbers).sum(1) / np.linalg.norm(outputs, axis=1) / np.linalg.norm(numbers, axis=1)
    figures = softcache.evaluate(outputs, np.full(60, -1), numbers, task="embedding")
    assert figures["cosine"] == pytest.approx(cosines.mean(), abs=1e-9)
    for arguments, words in (
        ({"task": "label"}, "no task 'label'. Did you mean 'labels'"),
        ({"counts": np.ones(3, np.int64)}, "counts are of classes, and the task here is labels: leave them out"),
    ):
        with pytest.raises(softcache.UsageError, match=words):
            softcache.evaluate(outputs, several, **arguments)  # type: ignore[arg-type]
