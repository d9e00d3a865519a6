"""A running training, and its step: forward, criterion, backward, clip, optimiser, schedule, average."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from softcache.base.errors import TrainingStopped
from softcache.base.threads import take_first
from softcache.pipeline.batch import Batch
from softcache.pipeline.losses.distillation_loss import sum_terms
from softcache.pipeline.models.precision import autocast
from softcache.stages.distributed.ranks import broadcast_from_first, current_ranks

from .checkpoint import TrainState
from .data_parallel import DataParallelStep, average, average_gradients
from .gradient_norms import GradientNorms
from .run import TrainingRun


@dataclass
class ActiveTraining:
    """A running training: what does not change between its steps, and the sums of the epoch.

    Attributes:
        run: the training.
        state: model, optimiser, schedule and records of epochs, as saved in checkpoints.
        model: the model of the forward pass; with --compile, the compiled one.
        data_parallel: this rank's part of each step, None in one process.
        precision: the autocast context of the forward pass.
        threads: number of CPU threads.
        first_epoch: the epoch, from 0, with which it starts or continues.
        term_sums: the weighted terms, summed over the steps of the epoch, float32 [terms].
        gradient_norms: of each term at the epoch's last step, float32 [terms].
        seconds: time of its steps in the epoch.
        stopped: why it ended before its last epoch, None while it runs.
    """

    run: TrainingRun
    state: TrainState
    model: nn.Module
    data_parallel: DataParallelStep | None
    precision: AbstractContextManager[Any]
    threads: int
    first_epoch: int
    term_sums: torch.Tensor
    gradient_norms: torch.Tensor
    seconds: float = 0.0
    stopped: TrainingStopped | None = None

    def is_active(self, epoch: int) -> bool:
        """Return whether the training takes part in an epoch, counted from 0."""
        return self.first_epoch <= epoch and self.stopped is None


def train_step(training: ActiveTraining, batch: Batch, measure_gradients: bool = False) -> torch.Tensor:
    """Take one step of the optimiser.

    Args:
        training: the training.
        batch: on its device.
        measure_gradients: measure the gradient norm of each term as well.

    Returns:
        The weighted terms, float32 [terms], detached.
    """
    run, state, parallel = training.run, training.state, training.data_parallel
    if parallel is None:
        with training.precision:
            logits = training.model(batch.views)
        outputs = run.criterion.collect_outputs(logits)
    else:
        outputs, batch = parallel.forward(batch, state.steps)

    terms = run.criterion.weighted_terms(outputs, batch)
    norms = _start_gradient_norms(training, terms) if measure_gradients else None

    for weight in state.weights:
        weight.grad = None
    sum_terms(terms).backward()  # type: ignore[no-untyped-call]
    if parallel is not None:
        average_gradients(state.weights)
    if norms is not None:
        training.gradient_norms = norms.complete()
    if run.config.clip_norm:
        nn.utils.clip_grad_norm_(state.weights, run.config.clip_norm)
    state.update_weights()
    if state.averaged_model is not None:
        state.averaged_model.update_parameters(run.model)
    return terms[0].detach().reshape(1) if len(terms) == 1 else torch.stack([term.detach() for term in terms])


def _start_gradient_norms(training: ActiveTraining, terms: list[torch.Tensor]) -> GradientNorms | None:
    """Start to measure the gradient of each term; where that is impossible, set the norms to NaN and return None."""
    if training.run.config.compile and len(terms) > 1:
        # A compiled backward pass frees its buffers, so it cannot run for each term first. With retain_graph the
        # gradients, those of the step included, were wrong by a tenth in some processes.
        training.gradient_norms.fill_(torch.nan)
        return None
    weights = training.state.weights
    if current_ranks().world == 1 and len(terms) == 1:
        return GradientNorms(terms, weights)
    sizes = broadcast_from_first(lambda: [abs(float(term.detach())) for term in terms])
    if training.data_parallel is None:
        return GradientNorms(terms, weights, sizes=sizes)
    return GradientNorms(terms, weights, average, sizes)


def compile_model(run: TrainingRun) -> nn.Module:
    """Return the model of the forward pass, compiled with --compile. Batches have two sizes at most, each compiled."""
    if not run.config.compile:
        return run.model
    # The limit counts the compilations of one code object, which all archs share: with the default limit, the fifth
    # arch of a process would not be compiled.
    torch._dynamo.config.recompile_limit = 256
    compiled: nn.Module = torch.compile(run.model, dynamic=False)  # type: ignore[assignment]
    return compiled


def attach_criterion(run: TrainingRun) -> None:
    """Attach the criterion to the model of a training, with the first batch of its stream as the example.

    Args:
        run: the training, whose criterion gets its parts.

    Raises:
        UsageError: where student and cache differ in the number of classes, or layers do not fit together.
    """
    example = take_first(run.stream.batches(0, 1)).slice(0, 2).to(run.device)
    run.criterion.attach(run.model, example, run.context)


def start_training(run: TrainingRun, state: TrainState) -> ActiveTraining:
    """Create what does not change between the steps of a training.

    Args:
        run: the training, its criterion attached.
        state: its state, from the checkpoint where there is one.
    """
    config = run.config
    parallel = None
    if current_ranks().world > 1:
        parallel = DataParallelStep(
            model=run.model,
            criterion=run.criterion,
            device=run.device,
            precision=config.precision,
            seed=config.seed,
        )
    return ActiveTraining(
        run=run,
        state=state,
        model=compile_model(run),
        data_parallel=parallel,
        precision=autocast(run.device, config.precision),
        threads=torch.get_num_threads(),
        first_epoch=len(state.epoch_lines),
        term_sums=torch.zeros(0),
        gradient_norms=torch.zeros(0),
    )
