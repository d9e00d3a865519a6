"""A training loop of a user's own, through the public names alone, against the command with the same settings."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import softcache
from softcache import Batch, Cache, DistillationLoss
from softcache.pipeline.loading.stream import BatchStream
from softcache.stages.training import loop
from tests.helpers.commands import Stages

EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 20, 64, 0.1, 1e-4
LOSSES = ("kd:temperature=4,weight=0.9", "hard:weight=0.1")
Step = tuple[list[int], object, float]  # index and draw of a batch, and its loss


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the whole digits, of a small teacher."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("digits")
    options = ["--arch", "mlp:128", "--epochs", "30", "--views", "none"]
    main(["teacher", *options, "--out", f"{folder}/teacher"])
    views = ["--views", "crop:pad=1", "--draws", "3"]
    main(["teacher-cache", "--weights", f"{folder}/teacher", *views, "--out", f"{folder}/cache"])
    return folder / "cache"


def train_own(cache: Cache, seed: int) -> tuple[list[Step], float]:
    """Train as the command does; return every step, and the accuracy on the test split."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, cache.num_classes))
    loader = cache.loader("train", batch_size=BATCH_SIZE, seed=seed)
    criterion = DistillationLoss(*LOSSES)
    optimizer = torch.optim.SGD(
        student.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True
    )  # fused as in the command: another order of rounding grows to 8e-5 of the loss within 100 steps
    steps = EPOCHS * len(loader)
    warmup = int(0.02 * steps)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    taken: list[Step] = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = criterion(student(batch.images), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            taken.append((batch.index.tolist(), batch.draw, float(loss.detach())))
    (test,) = cache.loader("test", batch_size=1000)
    figures = softcache.evaluate(student(test.images), test.labels, teacher_logits=test.logits)
    return taken, figures["accuracy"]


def train_by_command(
    stages: Stages, cache: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Step], float]:
    """Run `softcache student`; return every step that it took, and the accuracy on the test split."""
    taken: list[Step] = []
    take_step = loop.train_step

    def record(training: Any, batch: Batch, measure_gradients: bool = False) -> torch.Tensor:
        terms = take_step(training, batch, measure_gradients)
        taken.append((batch.index.tolist(), batch.draw, float(terms.sum())))
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", record)
        options = {"epochs": EPOCHS, "batch-size": BATCH_SIZE, "learning-rate": LEARNING_RATE, "seed": seed}
        options |= {"weight-decay": WEIGHT_DECAY, "arch": "mlp:64", "cache": cache, "out": f"run-{seed}"}
        arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
        result = stages("student", *arguments, *(text for loss in LOSSES for text in ("--loss", loss)))
    return taken, result["student"]["test"]["accuracy"]


def test_an_own_loop_takes_the_steps_of_the_command(
    digits: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(digits)
    accuracies = []
    for seed in range(5):
        own, own_accuracy = train_own(cache, seed)
        expected, accuracy = train_by_command(stages, digits, seed, monkeypatch)
        assert [step[:2] for step in own] == [step[:2] for step in expected]
        assert len(own) == EPOCHS * math.ceil(1257 / BATCH_SIZE)
        np.testing.assert_allclose([s[2] for s in own[:100]], [s[2] for s in expected[:100]], rtol=1e-6)
        accuracies.append((own_accuracy, accuracy))
    own_mean, mean = np.mean(accuracies, axis=0)
    assert own_mean > 0.9
    assert abs(own_mean - mean) <= 0.003, accuracies


def test_the_trainer_reads_its_batches_from_the_public_loader(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make_loader = Cache.loader

    def record(self: Cache, split: str = "train", **options: Any) -> softcache.CacheLoader:
        made.append(split)
        return make_loader(self, split, **options)

    monkeypatch.setattr(Cache, "loader", record)
    calls = count_calls(monkeypatch, BatchStream, "batches")
    attached = count_calls(monkeypatch, DistillationLoss, "attach")
    terms = count_calls(monkeypatch, DistillationLoss, "weighted_terms")
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", "2", "--loss", "kd", "--out", "run")
    assert set(made) == {"train"}
    assert calls
    assert len(attached) == 1
    assert len(terms) == 2 * math.ceil(300 / 64)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[object]:
    calls: list[object] = []
    method = getattr(owner, name)

    def record(self: object, *arguments: object, **options: object) -> Iterator[Batch]:
        calls.append(self)
        result: Iterator[Batch] = method(self, *arguments, **options)
        return result

    monkeypatch.setattr(owner, name, record)
    return calls
