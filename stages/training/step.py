"""One training as a record, and its one step: views in, terms of the loss, gradients, new weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.batch import Batch, LinearHead, LossContext, ModelOutputs
from softcache.pipeline.loading.loader import CacheLoader
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.base import list_teacher_taps, resolved
from softcache.pipeline.losses.multi_teacher import Term, by_one
from softcache.pipeline.models import find_head
from softcache.pipeline.models.precision import autocast
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.taps.hooks import capture_features
from softcache.pipeline.taps.statistics import derive_features
from softcache.stages.cli.configs import StudentConfig, TeacherConfig
from softcache.stages.distributed.ranks import broadcast_from_first
from softcache.stages.runs.folder import parse_milestones

from .checkpoint import RngState, TrainState
from .data_parallel import DataParallelStep, flatten_gradients

Features = dict[str, torch.Tensor]
AfterEpoch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainingRun:
    """What is trained. name: teacher, baseline or student; epochs of steps steps each; folder: where it is kept;
    known: of the teacher, for losses that ask; after_epoch: told each epoch's line once it is kept, may raise;
    term: how a loss is led by the teacher; chance: of what is random in it, from here on;
    abreast: this rank's side of it, where there are several ranks."""

    name: str
    model: PreparedModel
    losses: tuple[Loss, ...]
    stream: CacheLoader
    epochs: int
    steps: int
    config: TeacherConfig | StudentConfig
    device: torch.device
    folder: Path
    multiply_adds: int
    interrupt_advice: str = ""
    context: LossContext = LossContext()  # noqa: RUF009 (frozen)
    after_epoch: AfterEpoch | None = None
    multi_teacher: Term = by_one
    rng_state: RngState = field(default_factory=RngState)
    data_parallel: DataParallelStep | None = None

    @cached_property
    def training_model(self) -> nn.Module:
        """The model as it is run in training. Batches have two sizes at most, each compiled for itself."""
        if not self.config.compile:
            return self.model
        torch._dynamo.config.recompile_limit = 256  # of one code, which all archs share: by default the fifth is not
        compiled: nn.Module = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        return compiled

    def learning_rate_factor(self, train_step: int) -> float:
        """The learning rate of a step as a share of its highest: warm-up, then the schedule."""
        total = self.epochs * self.steps
        warm = int(self.config.warmup * total)
        if train_step < warm:
            return (train_step + 1) / (warm + 1)
        progress = (train_step - warm) / max(total - warm, 1)
        if self.config.schedule == "cosine":
            return 0.5 * (1 + float(np.cos(np.pi * progress)))
        if self.config.schedule == "step":
            return float(0.1 ** sum(progress >= share for share in parse_milestones(self.config)))
        return 1.0


def train_step(
    job: TrainingRun,
    state: TrainState,
    batch: Batch,
    losses: list[Loss],
    kept: Features,
    norms: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of the optimiser; the weighted terms, detached.

    norms: float32 [terms], where given, gets the L2 norm of the gradient of each weighted term alone, before clipping.
    Taken on the step's own graph, it changes no bit of a weight. The largest term's is what the others leave of the
    step's, which is right but for rounding and spares a pass through the network; one term alone costs none.
    """
    if job.data_parallel:
        outputs, batch = job.data_parallel.gather_outputs(batch, state.schedule.last_epoch)
    else:
        with autocast(job.device, job.config.precision):
            logits = job.training_model(batch.views)
        features = {tap: x.float() for tap, x in kept.items()}
        outputs = ModelOutputs(logits, features, student_head(job, logits.shape[1]))
    batch = _with_taps(job, batch)
    each = [
        resolved(loss.weight) * job.multi_teacher(loss, outputs, batch, state.modules.get(name))
        for name, loss in zip(term_names(losses), losses, strict=True)
    ]
    terms = torch.stack(each)
    if norms is not None and job.config.compile and len(each) > 1:
        # A compiled backward pass gives its buffers away, and cannot be taken for each term alone first. Told to keep
        # them, it was wrong by a tenth of the gradient in some processes, in the step itself as well.
        norms.fill_(torch.nan)
        norms = None
    if norms is not None:
        sizes = broadcast_from_first(terms.detach().abs().tolist) if len(each) > 1 else [1.0]
        largest = sizes.index(max(sizes))
        others = sum(_measure_gradient(job, state, each[i], norms[i]) for i in range(len(each)) if i != largest)
    for weight in state.weights:
        weight.grad = None
    if job.data_parallel:
        job.data_parallel.backward(terms.sum())
    else:
        terms.sum().backward()  # type: ignore[no-untyped-call]
    if norms is not None:
        norms[largest] = (flatten_gradients([weight.grad for weight in state.weights], state.weights) - others).norm()
    if job.config.clip_norm:
        nn.utils.clip_grad_norm_(state.weights, job.config.clip_norm)
    state.optimizer.step()
    state.schedule.step()
    if state.averaged_model is not None:
        state.averaged_model.update_parameters(job.model)
    return terms.detach()


def _measure_gradient(job: TrainingRun, state: TrainState, term: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """The gradient of one term alone as one vector; its norm is noted, and the graph stays for the step."""
    weights = state.weights
    if not term.requires_grad:  # of a layer that is not trained
        found = flatten_gradients([None] * len(weights), weights)
    elif job.data_parallel:
        found = job.data_parallel.measure_gradient(term, weights)
    else:
        found = flatten_gradients(_term_gradient(term, weights), weights)
    norm.copy_(found.norm())
    return found


def _term_gradient(term: torch.Tensor, weights: list[nn.Parameter]) -> Sequence[torch.Tensor | None]:
    """The gradient of a term; NaN where the network's own code refuses this pass alone."""
    try:
        return torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint is incompatible with .grad()" not in str(error):  # a reentrant one of torch.utils.checkpoint
            raise
        return [torch.full_like(weight, torch.nan) for weight in weights]


def student_head(job: TrainingRun, classes: int) -> LinearHead | None:
    """The student's own last layer, live, where a loss asks for it."""
    if not any(loss.needs_head for loss in job.losses):
        return None
    layer = find_head(job.model.network, classes)
    if layer is None:
        return None
    return LinearHead(layer.weight, layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias)


def _with_taps(job: TrainingRun, batch: Batch) -> Batch:
    """The batch with the teacher's features that the losses ask for, float32, made from what is cached."""
    asked = list_teacher_taps(job.losses)
    return replace(batch, features=derive_features(batch.features, asked)) if asked else batch


def term_names(losses: Sequence[Loss]) -> list[str]:
    """A name for each term: `kd`, and `hint-0`, `hint-1` where there are several of a kind."""
    kinds = [loss.name for loss in losses]
    return [kind if kinds.count(kind) == 1 else f"{kind}-{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def build_loss_modules(job: TrainingRun, taps: tuple[str, ...]) -> dict[str, nn.Module]:
    """The losses' own trainable parts, made from the shapes of one batch."""
    batch = next(job.stream.batches(0, 1)).slice(0, 2).to(job.device)
    job.model.eval()
    with torch.no_grad(), capture_features(job.model.network, taps) as kept:
        logits = job.model(batch.views)
        outputs = ModelOutputs(logits, dict(kept), student_head(job, logits.shape[1]))
    if batch.logits is not None and batch.logits.shape[-1] != outputs.logits.shape[1]:
        raise UsageError(f"the student has {outputs.logits.shape[1]} classes, the cache {batch.logits.shape[-1]}")
    batch = _with_taps(job, batch)
    named = zip(term_names(job.losses), job.losses, strict=True)
    made = {name: loss.build_module(outputs, batch, job.context) for name, loss in named}
    return {name: module.to(job.device) for name, module in made.items() if module is not None}
