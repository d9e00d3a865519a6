"""Rows about training: an epoch from a cache, against hard targets alone, a bare loop and a live teacher.

Softcache's contenders run the loop of `softcache student` itself, without what it does once an epoch (validation,
checkpoint). Each turn starts the loader anew and takes every batch of it, so that no batch is rendered ahead while
another contender is timed.
"""

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from softcache.data.images.image_arrays import ImageArrays
from softcache.pipeline.batch import Batch
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.hard import Hard
from softcache.pipeline.models.precision import autocast
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.option_groups import TrainingOptions
from softcache.stages.student.phases import make_training_run
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.training.loop import WORTH_THREADS, _begin_epoch, _start, step_each
from softcache.stages.training.run import TrainingRun

from . import fixtures
from .measurement import BenchOptions, Measurement
from .timing import Contender, divide, format_medians, time_in_turns

FEATURE = {"layer3": [64, 8, 8]}  # a layer of ResNet-56: 4,096 numbers, 8 kB a row


def make_run(
    options: BenchOptions, config: StudentConfig, setup: DistillationSetup, name: str, *, is_baseline: bool = False
) -> TrainingRun:
    """Return a training as `softcache student` makes it.

    Args:
        options: of the benchmark.
        config: of the student, defaults filled in.
        setup: what it is trained from.
        name: of its folder.
        is_baseline: train from hard targets alone, in place of the losses of the setup.
    """
    losses: tuple[Loss, ...] = (Hard(),) if is_baseline else setup.losses
    labels = setup.transfer_set.splits["train"].labels
    folder = options.folder / "runs" / f"{name}-{time.monotonic_ns()}"
    kind = "baseline" if is_baseline else "student"
    return make_training_run(kind, config, setup, setup.build_student(config, losses), losses, labels, folder)


class TrainingLoop:
    """A contender: softcache's training loop. A turn returns the seconds per image of some steps.

    Args:
        run: the training.
        steps: steps of a turn. A turn goes on where the one before it ended.
        teacher: computes the logits of every batch, in place of those of the cache.
    """

    def __init__(self, run: TrainingRun, steps: int, teacher: PreparedModel | None = None):
        self.run, self.steps, self.teacher, self.next_step = run, steps, teacher, 0
        self._hooks = ExitStack()  # keeps the hooks on tapped layers as long as this object is there
        training = _start(run, self._hooks)
        assert training is not None
        self.training = training

    def __call__(self) -> float:
        torch.set_num_threads(self.training.threads)  # as the command does for all of its epochs
        images, start = 0, time.perf_counter()
        _begin_epoch(self.training, 0)
        for cpu_batch in self.run.stream.batches(self.next_step, self.next_step + self.steps):
            batch = cpu_batch.to(self.run.device)
            step_each([self.training], batch if self.teacher is None else self._replace_logits(batch, self.teacher))
            images += len(batch.views)
        self.training.term_sums.tolist()  # waits for a GPU
        self.next_step += self.steps
        return (time.perf_counter() - start) / images

    def _replace_logits(self, batch: Batch, teacher: PreparedModel) -> Batch:
        with torch.no_grad(), autocast(self.run.device, self.run.config.precision):
            return replace(batch, logits=teacher(batch.views))


def build_sgd(config: TrainingOptions, weights: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """Build the optimiser of the options as a user's own loop has it."""
    return torch.optim.SGD(
        weights,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


class BareLoop:
    """A contender: a minimal loop written for one model alone, with hard targets, over views rendered beforehand.

    Args:
        run: model, schedule and batches.
        steps: steps of a turn; every turn takes the same batches.
    """

    def __init__(self, run: TrainingRun, steps: int):
        batches = list(run.stream.batches(0, steps))
        self.views = [batch.views.to(run.device) for batch in batches]
        self.labels = [batch.labels.to(run.device) for batch in batches]
        self.run, self.optimizer = run, build_sgd(run.config, run.model.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, run.schedule)
        # As many threads as softcache's loop takes: with two, a step of mlp:64 is no faster on an idle machine, and
        # slower on a busy one.
        self.threads = 1 if run.multiply_adds * run.stream.batch_size < WORTH_THREADS else torch.get_num_threads()

    def __call__(self) -> float:
        torch.set_num_threads(self.threads)
        run = self.run
        images, start = 0, time.perf_counter()
        run.model.train()
        for views, labels in zip(self.views, self.labels, strict=True):
            with autocast(run.device, run.config.precision):
                loss = F.cross_entropy(run.model(views), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.schedule.step()
            images += len(views)
        loss.item()
        return (time.perf_counter() - start) / images


def make_teacher_contender(run: TrainingRun, teacher: PreparedModel, steps: int) -> Contender:
    """Return a contender that runs the teacher alone, over views of the run that are rendered beforehand."""
    batches = [batch.views.to(run.device) for batch in run.stream.batches(0, steps)]

    def take_turn() -> float:
        start = time.perf_counter()
        with torch.no_grad(), autocast(run.device, run.config.precision):
            for views in batches:
                logits = teacher(views)
        logits.sum().item()
        return (time.perf_counter() - start) / sum(map(len, batches))

    return take_turn


def write_cifar_cache(options: BenchOptions, with_features: bool = False, views: str = "") -> tuple[str, Path]:
    """Make images like CIFAR-10's and a cache of two draws; return the data set's name and the cache's folder."""
    data = fixtures.add_data_set(options.scale(6400, 300))
    folder = options.folder / ("cifar-8kB" if with_features else f"cifar-{views}")
    return data, fixtures.write_random_cache(folder, data, views, draws=2, taps=FEATURE if with_features else None)


def write_mnist_cache(options: BenchOptions) -> tuple[str, Path]:
    """Make images like MNIST's and their cache; return the data set's name and the cache's folder."""
    data = fixtures.add_data_set(options.scale(61_225, 400), channels=1, size=28)
    return data, fixtures.write_random_cache(options.folder / "mnist", data)


def compare_cached_with_hard(
    options: BenchOptions, arch: str, features: str = "", views: str = "", steps: int = 8, rounds: int = 15
) -> Measurement:
    """Time of an epoch from the cache / from hard targets alone, both with the same views.

    Args:
        options: of the benchmark.
        arch: of the student; an mlp gets images like MNIST's, others like CIFAR-10's.
        features: `read`: 8 kB of features a row are read, too; `hint`: a loss term uses them, too.
        views: of the images like CIFAR-10's; by default those of CIFAR-10.
        steps: of a turn.
        rounds: of the comparison.
    """
    is_mnist = arch.startswith("mlp")
    data, cache = write_mnist_cache(options) if is_mnist else write_cifar_cache(options, bool(features), views)
    # The losses that are the defaults of MNIST and of CIFAR-10.
    losses = ("kd:temperature=20",) if is_mnist else ("kd:temperature=4,weight=0.9", "hard:weight=0.1")
    if features == "hint":
        losses = (*losses, "hint:teacher=layer3,student=layer3")
    config, setup = fixtures.open_setup(cache, data, arch, loss=losses)
    cached = make_run(options, config, setup, "cached")
    if features == "read":
        cached = replace(cached, stream=replace(cached.stream, taps=tuple(FEATURE)))
    hard = make_run(options, config, setup, "hard", is_baseline=True)
    steps = options.scale(steps, 2)
    contenders = {"cached": TrainingLoop(cached, steps), "hard": TrainingLoop(hard, steps)}
    seconds = time_in_turns(contenders, options.scale(rounds, 1))
    return Measurement(divide(seconds["cached"], seconds["hard"]), format_medians(seconds))


def compare_checked_with_unchecked(options: BenchOptions, arch: str, steps: int = 8, rounds: int = 15) -> Measurement:
    """Time of an epoch whose views are compared with their checksums / of one without; every view is a new one.

    A training compares each view of images in memory once: in later epochs of the same draws the ratio is 1.
    """
    data, cache = write_mnist_cache(options) if arch.startswith("mlp") else write_cifar_cache(options)
    config, setup = fixtures.open_setup(cache, data, arch)
    steps = options.scale(steps, 2)
    checked = TrainingLoop(make_run(options, config, setup, "checked"), steps)
    unchecked = TrainingLoop(make_run(options, config, setup, "unchecked"), steps)
    vars(unchecked.run.stream)["_checks"] = None  # a cached property
    images = setup.transfer_set.splits["train"].images
    assert isinstance(images, ImageArrays)

    def run_checked() -> float:
        images.compared_views.clear()
        return checked()

    seconds = time_in_turns({"checked": run_checked, "unchecked": unchecked}, options.scale(rounds, 1))
    return Measurement(divide(seconds["checked"], seconds["unchecked"]), format_medians(seconds))


def compare_hard_with_bare(options: BenchOptions, arch: str, steps: int = 8, rounds: int = 15) -> Measurement:
    """Time of softcache's loop with its renderer / of a bare loop over views in memory; both from hard targets."""
    data, cache = write_mnist_cache(options) if arch.startswith("mlp") else write_cifar_cache(options)
    config, setup = fixtures.open_setup(cache, data, arch)
    steps = options.scale(steps, 2)
    hard = make_run(options, config, setup, "hard", is_baseline=True)
    bare = make_run(options, config, setup, "bare", is_baseline=True)
    contenders: dict[str, Contender] = {"hard": TrainingLoop(hard, steps), "bare": BareLoop(bare, steps)}
    seconds = time_in_turns(contenders, options.scale(rounds, 1))
    return Measurement(divide(seconds["hard"], seconds["bare"]), format_medians(seconds))


def compare_live_with_cached(options: BenchOptions, precision: str, relative_to_sum: bool = False) -> Measurement:
    """Time of softcache's loop with the teacher run on every batch / with the teacher's cache.

    Args:
        options: of the benchmark.
        precision: of teacher and student.
        relative_to_sum: divide the ratio by (teacher + student) / student, the gain to expect from their times alone.
    """
    data, cache = write_cifar_cache(options)
    config, setup = fixtures.open_setup(cache, data, "resnet8", precision=precision)
    teacher = fixtures.make_teacher("resnet56").to(setup.device)
    steps = options.scale(8, 1)
    live = make_run(options, config, setup, "live")
    live = replace(live, stream=replace(live.stream, read_targets=False))
    contenders: dict[str, Contender] = {
        "live": TrainingLoop(live, steps, teacher),
        "cached": TrainingLoop(make_run(options, config, setup, "cached"), 2 * steps),
    }
    if relative_to_sum:
        bare = make_run(options, config, setup, "student", is_baseline=True)
        contenders |= {"teacher": make_teacher_contender(bare, teacher, steps), "student": BareLoop(bare, 2 * steps)}
    seconds = time_in_turns(contenders, options.scale(5, 1))
    ratios = divide(seconds["live"], seconds["cached"])
    if relative_to_sum:
        sums = np.array(seconds["teacher"]) + seconds["student"]
        ratios = divide(ratios, divide(sums.tolist(), seconds["student"]))
    return Measurement(ratios, format_medians(seconds))


def compare_draws_per_decode(options: BenchOptions) -> Measurement:
    """Time from hard targets with one view per decoded image / from a cache with four, on a folder of 224 px JPEGs."""
    data = fixtures.write_jpegs(options.folder / "jpegs-224", options.scale(384, 40), 224)
    folder = options.folder / "jpegs-224-cache"
    cache = fixtures.write_random_cache(folder, data, "resized-crop-flip:size=64", draws=4)
    config, setup = fixtures.open_setup(cache, data, "resnet8", batch_size=64, precision="bfloat16")
    hard = make_run(options, config, setup, "hard", is_baseline=True)
    cached = make_run(options, replace(config, draws_per_decode=4), setup, "cached")
    contenders = {"hard": TrainingLoop(hard, 4 * hard.steps), "cached": TrainingLoop(cached, 4 * cached.steps)}
    seconds = time_in_turns(contenders, options.scale(4, 1))
    return Measurement(divide(seconds["hard"], seconds["cached"]), format_medians(seconds))
