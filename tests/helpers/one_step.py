"""One training step as softcache takes it, with a teacher's outputs as a cache returns them."""

from collections.abc import Generator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from softcache.pipeline.batch import Batch, LinearHead, LossContext, MemoryBank
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.classifier import SimKD
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.models import build, find_head
from softcache.pipeline.models.archs.simkd import SimKDStudent
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.taps.hooks import capture_features
from softcache.pipeline.taps.statistics import derive_features
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.training.checkpoint import TrainState
from softcache.stages.training.run import TrainingRun
from softcache.stages.training.step import attach_criterion, start_training, train_step
from tests.helpers.tensors import draw_labels, make_class_counts, make_loss

INPUT_SPEC = InputSpec(1, 8, (0.5,), (0.25,))
LAYERS = ("layer1", "layer2", "layer3")
TEACHER = "resnet8x4"


@cache
def run_teacher(B: int, K: int) -> tuple[Batch, LinearHead, dict[str, torch.Tensor]]:
    """Run a teacher on B images of noise.

    Returns:
        The batch with its logits and features, as a cache returns them; its last layer; 40 more rows of each tap.
    """
    torch.manual_seed(0)
    network = build(TEACHER, K, 1, 8)
    teacher = PreparedModel(network, INPUT_SPEC).eval()
    views = torch.randint(256, (B + 40, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad(), capture_features(network, LAYERS) as outputs:
        logits = teacher(views)
    features = {tap: x.half() for tap, x in outputs.items()}
    cached = {tap: x[:B] for tap, x in features.items()}
    layer = find_head(network, K)
    assert layer is not None
    head = LinearHead(layer.weight.detach().clone(), layer.bias.detach().clone())
    target = Batch(torch.arange(B), 0, views[:B], draw_labels(B, K), logits[:B].clone(), cached)
    return target, head, {tap: x[B:] for tap, x in features.items()}


class OneBatch:
    """A stream that repeats one batch."""

    def __init__(self, batch: Batch):
        self.batch, self.batch_size = batch, len(batch.index)

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        yield from [self.batch] * (stop - start)


@dataclass
class Step:
    """The state after a step, with gradients."""

    student: PreparedModel
    state: TrainState
    batch: Batch
    head: LinearHead
    terms: torch.Tensor

    @property
    def loss_parameters(self) -> dict[str, torch.nn.Parameter]:
        """{name: trainable parameter of the losses}."""
        return {f"{m}.{n}": p for m, module in self.state.parts.items() for n, p in module.named_parameters()}


def build_network(loss: Loss, K: int, head: LinearHead, arch: str) -> torch.nn.Module:
    """Build the student, with the teacher's head where the loss is SimKD."""
    torch.manual_seed(1)
    if not isinstance(loss, SimKD):
        return build(arch, K, 1, 8)
    network = build(f"simkd({arch};{loss.projected_layer()};{head.weight.shape[1]})", K, 1, 8)
    assert isinstance(network, SimKDStudent)
    network.use_head(head)
    return network


def take_one_step(
    spec: str,
    B: int = 6,
    K: int = 10,
    batch: Batch | None = None,
    precision: str = "float32",
    arch: str = "resnet8",
    change: Any = lambda network: None,
    device: torch.device | str = "cpu",
) -> Step:
    """Take a step of a student with one loss.

    Args:
        spec: of the loss.
        B: rows of the batch.
        K: classes.
        batch: in place of the batch of `run_teacher`.
        precision: of the step.
        arch: of the student.
        change: called with the student's network before the step.
        device: where the step is taken.
    """
    loss = make_loss(spec, "layer2+layer3", "layer3")
    teacher_batch, head, rows = run_teacher(B, K)
    batch = teacher_batch if batch is None else batch

    def bank(tap: str) -> MemoryBank:
        return MemoryBank(
            derive_features(rows, (tap,))[tap].half(), torch.arange(100, 140), draw_labels(40, K, seed=8)
        )

    network = build_network(loss, K, head, arch)
    change(network)
    student = PreparedModel(network, INPUT_SPEC).to(device)
    batch = batch.to(device)
    settings = StudentConfig(learning_rate=1e-3, weight_decay=0.0, precision=precision)
    stream: Any = OneBatch(batch)
    run = TrainingRun(
        name="student",
        model=student,
        criterion=DistillationLoss(loss),
        stream=stream,
        epochs=1,
        steps=1,
        config=settings,
        device=torch.device(device),
        folder=Path("none"),
        multiply_adds=0,
        context=LossContext(head, bank, make_class_counts(K)),
    )
    attach_criterion(run)
    state = TrainState.create(student, run.criterion.parts, settings, run.schedule)
    student.train()
    terms = train_step(start_training(run, state), batch)
    return Step(student, state, batch, head, terms)
