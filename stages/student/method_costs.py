"""What a training step of a distillation method costs: its time beside that of other methods, and its memory."""

import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from softcache.pipeline.batch import Batch
from softcache.pipeline.cache.manifest import count_row_bytes
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import progress_bar
from softcache.stages.runs.environment import wait_for_device
from softcache.stages.training.checkpoint import TrainState
from softcache.stages.training.run import TrainingRun
from softcache.stages.training.step import attach_criterion, start_training, train_step

from .phases import make_training_run
from .setup import DistillationSetup

ROUNDS = 7  # in each of them every method is timed once


@dataclass
class MethodCost:
    """The cost of a training step of one method. The names of the attributes are keys of methods.json.

    Attributes:
        bytes_a_view: what the cache stores of a view for the losses.
        own_bytes: parameters and buffers of the losses' own parts.
        saved_bytes: activations kept for the backward pass.
        ratio: time of a step over that of `hard` in the same round, the median of the rounds.
        least, most: the range of that ratio.
        to_kd: median of the time over that of `kd`, None where `kd` is not timed.
    """

    bytes_a_view: int
    own_bytes: int
    saved_bytes: int
    ratio: float = 1.0
    least: float = 1.0
    most: float = 1.0
    to_kd: float | None = None


def measure_costs(probes: dict[str, "StepProbe"]) -> dict[str, MethodCost]:
    """Measure memory and time of methods.

    Args:
        probes: {method: its steps}, with `hard` among them. They are timed in turns, so that other load of the
            machine falls on all of them.

    Returns:
        {method: cost}.
    """
    costs = {name: probe.measure_memory() for name, probe in probes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in probes}
    with progress_bar(ROUNDS * len(probes), "timing", "method") as bar:
        for _ in range(ROUNDS):
            for name, probe in probes.items():
                seconds[name].append(probe.time_steps())
                bar.update()
    for name, cost in costs.items():
        ratios = _divide(seconds[name], seconds["hard"])
        cost.ratio, cost.least, cost.most = statistics.median(ratios), min(ratios), max(ratios)
        if "kd" in probes:
            cost.to_kd = statistics.median(_divide(seconds[name], seconds["kd"]))
    return costs


def _divide(seconds: list[float], reference: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(seconds, reference, strict=True)]


class StepProbe:
    """A method ready to take training steps on batches that are in memory; their result is not used.

    Args:
        config: the options of a student, with the losses of the method.
        setup: what it is trained from.
        steps: batches to take a step on each time.

    Raises:
        UsageError: when the losses do not fit this teacher and this student.
    """

    def __init__(self, config: StudentConfig, setup: DistillationSetup, steps: int):
        labels = setup.transfer_set.splits["train"].labels
        network = setup.build_student(config, setup.losses)
        self.run = run = make_training_run("student", config, setup, network, setup.losses, labels, Path())
        attach_criterion(run)
        run.criterion.set_progress(0, 2)
        state = TrainState.create(run.model, run.criterion.parts, config, lambda _: 1e-6)
        self.training = start_training(run, state)
        with closing(run.stream.batches(0, steps)) as batches:
            self.batches = [batch.to(run.device) for batch in batches]
        self.bytes_per_view = _count_bytes_per_view(run, setup)
        self._take_steps(self.batches[:2])

    def time_steps(self) -> float:
        """Return the seconds of a step on each of the batches."""
        start = time.perf_counter()
        self._take_steps(self.batches)
        wait_for_device(self.run.device)
        return time.perf_counter() - start

    def measure_memory(self) -> MethodCost:
        """Return the bytes of the method: in the cache, of its own parts, and saved for the backward pass."""
        saved: dict[int, int] = {}

        def record_size(x: torch.Tensor) -> torch.Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(record_size, lambda x: x):
            self._take_steps(self.batches[:1])
        parts = self.run.criterion.parts
        own_bytes = sum(x.numel() * x.element_size() for x in (*parts.parameters(), *parts.buffers()))
        return MethodCost(self.bytes_per_view, own_bytes, sum(saved.values()))

    def _take_steps(self, batches: list[Batch]) -> None:
        self.run.model.train()
        for batch in batches:
            train_step(self.training, batch)


def _count_bytes_per_view(run: TrainingRun, setup: DistillationSetup) -> int:
    """Count the bytes that the caches store of a view for the losses of a run."""
    datasets = setup.cache.manifest.datasets
    size = count_row_bytes({name: datasets[name] for name in (f"features/{tap}" for tap in setup.taps)})
    if any(loss.needs_logits for loss in run.criterion.losses):
        for cache in setup.teachers.members:
            names = cache.codec.datasets(cache.classes)
            size += count_row_bytes({name: cache.manifest.datasets[name] for name in names})
    return size
