"""The gradients of a loss in a loop of a user's own, against those of the trainer, for every loss of classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import softcache
from softcache import Cache, DistillationLoss, losses
from softcache.pipeline.models import build
from softcache.stages.training import loop
from tests.helpers.class_losses import CLASS_LOSSES
from tests.helpers.tensors import make_loss

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of a network with random weights, with all of its stages."""
    torch.manual_seed(0)
    teacher = build("resnet8x4", 10, 1, 8)
    path = tmp_path_factory.mktemp("gradients") / "cache"
    taps = ["layer1", "layer2", "layer3"]
    return softcache.build_cache(path, teacher, "digits", views="none", draws=1, taps=taps, train_size=200)


class Taken(Exception):
    """The first step has been taken."""


def take_step_of_trainer(
    cache: Cache, loss: losses.Loss, out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, Gradients]:
    """Return the loss and the gradients of the first step of `train_student`."""
    seen: dict[str, Any] = {}
    take_step = loop.train_step

    def record(training: Any, batch: softcache.Batch, measure_gradients: bool = False) -> torch.Tensor:
        terms = take_step(training, batch)
        seen["loss"] = float(terms.sum())
        criterion = training.run.criterion
        named = [*training.run.model.network.named_parameters(), *criterion.named_parameters()]
        seen["gradients"] = {name: p.grad.clone() for name, p in named if p.grad is not None}
        raise Taken

    monkeypatch.setattr(loop, "train_step", record)
    with pytest.raises(Taken):
        softcache.train_student(cache, "resnet8", [loss], out=out, epochs=2, batch_size=32)
    return seen["loss"], seen["gradients"]


def take_own_step(cache: Cache, loss: losses.Loss) -> tuple[float, Gradients]:
    """Return the same of a loop of a user's own."""
    torch.manual_seed(0)
    student: nn.Module = build("resnet8", 10, 1, 8)
    criterion = DistillationLoss(loss)
    batch = next(iter(cache.loader("train", batch_size=32, taps=criterion.teacher_taps)))
    if isinstance(loss, losses.SimKD):
        student = loss.extend(student, batch)
    student = student.to(memory_format=torch.channels_last)  # as in the trainer: other kernels round differently
    criterion.attach(student, example=batch)
    student.train()
    value = criterion(student(batch.images), batch)
    value.backward()
    named = [*student.named_parameters(), *criterion.named_parameters()]
    return float(value.detach()), {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_gradients_of_an_own_loop_are_those_of_the_trainer(
    cache: Cache, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = make_loss(name, "layer2+layer3", "layer3")
    expected_loss, expected = take_step_of_trainer(cache, loss, tmp_path / "run", monkeypatch)
    own_loss, own = take_own_step(cache, loss)
    assert own_loss == pytest.approx(expected_loss, rel=1e-6)
    assert own.keys() == expected.keys()
    assert own
    for key, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert float((own[key] - gradient).abs().max()) <= 1e-6 * scale, key
