"""Rows of stage two: epochs from a cache, against hard targets alone, bare loops and the live teacher.

Ours is the loop of `softcache student` itself, without what it does once an epoch: validation, checkpoint.
A turn begins a stream of its own and takes every batch of it, so that nothing is rendered ahead at the cost of others.
"""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from softcache.pipeline.batch import Batch
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.hard import Hard
from softcache.pipeline.models.precision import autocast
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.student.phases import make_training_run
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.training.checkpoint import TrainState
from softcache.stages.training.loop import WORTH_THREADS, _begin_epoch, _start, step_each
from softcache.stages.training.run import TrainingRun

from . import fixtures
from .interleaved import Found, Given, Side, interleaved, over, parts

FEATURE = {"layer3": [64, 8, 8]}  # of ResNet-56: 4,096 numbers, 8 kB a row


def job(given: Given, config: StudentConfig, opened: DistillationSetup, hard: bool, name: str) -> TrainingRun:
    """The training from the cache, or its baseline from hard targets alone, as `softcache student` makes them."""
    losses: tuple[Loss, ...] = (Hard(),) if hard else opened.losses
    labels = opened.transfer_set.splits["train"].labels
    where = given.folder / "runs" / f"{name}-{time.monotonic_ns()}"
    kind = "baseline" if hard else "student"
    return make_training_run(kind, config, opened, opened.build_student(config, losses), losses, labels, where)


class Ours:
    """A training that takes so many steps in a turn; the seconds of a image."""

    def __init__(self, job: TrainingRun, steps: int, teacher: PreparedModel | None = None):
        """teacher: asked about every batch in place of the cache."""
        self.job, self.count, self.teacher, self.at = job, steps, teacher, 0
        self.opened = ExitStack()  # of the hooks on the tapped layers: gone with it
        training = _start(job, self.opened)
        assert training is not None
        self.training = training

    def __call__(self) -> float:
        images, begun = 0, time.perf_counter()
        _begin_epoch(self.training, 0)
        for batch in self.job.stream.batches(self.at, self.at + self.count):
            here = batch.to(self.job.device)
            step_each([self.training], here if self.teacher is None else self._asked(here))
            images += len(batch.views)
        self.training.term_sums.tolist()  # waits for a GPU
        self.at += self.count
        return (time.perf_counter() - begun) / images

    def _asked(self, batch: Batch) -> Batch:
        assert self.teacher is not None
        with torch.no_grad(), autocast(self.job.device, self.job.config.precision):
            return replace(batch, logits=self.teacher(batch.views))


class Bare:
    """A loop that its author wrote for this model alone, over views that were augmented beforehand."""

    def __init__(self, job: TrainingRun, steps: int):
        batches = list(job.stream.batches(0, steps))
        self.views = [b.views.to(job.device) for b in batches]
        self.labels = [b.labels.to(job.device) for b in batches]
        self.job, self.state = job, TrainState.create(job.model, nn.ModuleDict(), job.config, job.schedule)
        # As many threads as ours takes: with two, a step of mlp:64 is no faster on an idle machine, and slower on a
        # busy one.
        self.threads = 1 if job.multiply_adds * job.stream.batch_size < WORTH_THREADS else torch.get_num_threads()

    def __call__(self) -> float:
        torch.set_num_threads(self.threads)
        job, state = self.job, self.state
        images, begun = 0, time.perf_counter()
        job.model.train()
        for views, labels in zip(self.views, self.labels, strict=True):
            with autocast(job.device, job.config.precision):
                loss = F.cross_entropy(job.model(views), labels)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            state.optimizer.step()
            state.schedule.step()
            images += len(views)
        loss.item()
        return (time.perf_counter() - begun) / images


def asking(job: TrainingRun, teacher: PreparedModel, steps: int) -> Side:
    """The teacher alone, over views that are there."""
    views = [b.views.to(job.device) for b in job.stream.batches(0, steps)]

    def turn() -> float:
        begun = time.perf_counter()
        with torch.no_grad(), autocast(job.device, job.config.precision):
            for batch in views:
                said = teacher(batch)
        said.sum().item()
        return (time.perf_counter() - begun) / sum(map(len, views))

    return turn


def cifar(given: Given, taps: bool = False) -> tuple[str, Path]:
    """Images as CIFAR-10's, and their cache."""
    data = fixtures.in_memory(given.few(6400, 300))
    name = "cifar-8kB" if taps else "cifar"
    return data, fixtures.fake_cache(given.folder / name, data, draws=2, taps=FEATURE if taps else None)


def mnist(given: Given) -> tuple[str, Path]:
    """Images as MNIST's, and their cache."""
    data = fixtures.in_memory(given.few(61_225, 400), channels=1, size=28)
    return data, fixtures.fake_cache(given.folder / "mnist", data)


def cached_over_hard(given: Given, arch: str, feature: str = "", steps: int = 8, rounds: int = 15) -> Found:
    """Epochs with and without what the teacher said. feature: `read`, or `hint` for a term that uses it, too."""
    data, cache = mnist(given) if arch.startswith("mlp") else cifar(given, bool(feature))
    hint = ("hint:teacher=layer3,student=layer3",) if feature == "hint" else ()
    # As the recipes of MNIST and CIFAR-10 have it.
    usual = ("kd:temperature=20",) if arch.startswith("mlp") else ("kd:temperature=4,weight=0.9", "hard:weight=0.1")
    config, opened = fixtures.opened(cache, data, arch, loss=(*usual, *hint))
    ours = job(given, config, opened, False, "cached")
    if feature == "read":
        ours = replace(ours, stream=replace(ours.stream, taps=tuple(FEATURE)))
    steps = given.few(steps, 2)
    sides = {"cached": Ours(ours, steps), "hard": Ours(job(given, config, opened, True, "hard"), steps)}
    found = interleaved(sides, given.few(rounds, 1))
    return Found(over(found["cached"], found["hard"]), parts(found))


def hard_over_bare(given: Given, arch: str, steps: int = 8, rounds: int = 15) -> Found:
    """What our loop and its renderer cost beside a bare loop over views in memory."""
    data, cache = mnist(given) if arch.startswith("mlp") else cifar(given)
    config, opened = fixtures.opened(cache, data, arch)
    steps = given.few(steps, 2)
    one, other = (job(given, config, opened, True, name) for name in ("hard", "bare"))
    found = interleaved({"hard": Ours(one, steps), "bare": Bare(other, steps)}, given.few(rounds, 1))
    return Found(over(found["hard"], found["bare"]), parts(found))


def live_over_cached(given: Given, precision: str, of_the_sum: bool = False) -> Found:
    """The teacher asked about every batch, against its cache. of_the_sum: by (teacher + student) / student."""
    data, cache = cifar(given)
    config, opened = fixtures.opened(cache, data, "resnet8", precision=precision)
    teacher = fixtures.teacher("resnet56").to(opened.device)
    steps = given.few(8, 1)
    live = replace(job(given, config, opened, False, "live"))
    live = replace(live, stream=replace(live.stream, read_targets=False))
    sides: dict[str, Side] = {
        "live": Ours(live, steps, teacher),
        "cached": Ours(job(given, config, opened, False, "cached"), 2 * steps),
    }
    if of_the_sum:
        bare = job(given, config, opened, True, "student")
        sides |= {"teacher": asking(bare, teacher, steps), "student": Bare(bare, 2 * steps)}
    found = interleaved(sides, given.few(5, 1))
    ratios = over(found["live"], found["cached"])
    if of_the_sum:
        sums = np.array(found["teacher"]) + found["student"]
        ratios = over(ratios, over(sums.tolist(), found["student"]))
    return Found(ratios, parts(found))


def many_views_of_a_decode(given: Given) -> Found:
    """A folder of 224 px: one view of each decode, against four of them for as many cached epochs."""
    data = fixtures.jpegs(given.folder / "jpegs-224", given.few(384, 40), 224)
    cache = fixtures.fake_cache(given.folder / "jpegs-224-cache", data, "resized-crop-flip:size=64", draws=4)
    usual, opened = fixtures.opened(cache, data, "resnet8", batch_size=64, precision="bfloat16")
    several = replace(usual, draws_per_decode=4)
    one, four = job(given, usual, opened, True, "hard"), job(given, several, opened, False, "cached")
    sides = {"hard": Ours(one, 4 * one.steps), "cached": Ours(four, 4 * four.steps)}
    found = interleaved(sides, given.few(4, 1))
    return Found(over(found["hard"], found["cached"]), parts(found))
