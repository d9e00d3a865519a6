"""Several students at once, against the same ones one after another."""

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from softcache.stages.cli.configs import StudentConfig
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.training.checkpoint import TrainState
from softcache.stages.training.loop import _begin_epoch, step_each

from . import fixtures
from .interleaved import Found, Given, Side, interleaved, over, parts
from .student import Ours, job, mnist

FOUR = ("resnet8", "cnn", "mlp:64", "mlp:128")
LIGHT = ("resnet8", "mlp:512", "mlp:64", "mlp:128")  # decoding counts: a step of cnn at 64 px takes four times as long


class Together:
    """Several trainings on one stream, as fit_together takes their steps; seconds of a image."""

    def __init__(self, alone: Sequence[Ours]):
        self.first, self.trainings = alone[0], [one.training for one in alone]

    def __call__(self) -> float:
        first, images, begun = self.first, 0, time.perf_counter()
        for training in self.trainings:
            _begin_epoch(training, 0)
        for batch in first.job.stream.batches(first.at, first.at + first.count):
            step_each(self.trainings, batch.to(first.job.device))
            images += len(batch.views)
        for training in self.trainings:
            training.term_sums.tolist()
        first.at += first.count
        return (time.perf_counter() - begun) / images


def _trainings(
    given: Given, config: StudentConfig, opened: DistillationSetup, archs: Sequence[str], steps: int
) -> list[Ours]:
    return [
        Ours(job(given, replace(config, arch=arch), opened, False, f"s{i}"), steps) for i, arch in enumerate(archs)
    ]


def one_stream(given: Given, from_files: bool, archs: Sequence[str] = FOUR) -> Found:
    """Four students from one stream, as a share of the time of four runs. from_files: 224 px JPEGs, views of 64 px."""
    if from_files:
        data = fixtures.jpegs(given.folder / "jpegs-224", given.few(384, 40), 224)
        cache = fixtures.fake_cache(given.folder / "jpegs-224-cache", data, "resized-crop-flip:size=64", draws=4)
        steps, batch = given.few(8, 1), 32
    else:
        data = fixtures.in_memory(given.few(6400, 300))
        cache = fixtures.fake_cache(given.folder / "cifar", data, draws=2)
        steps, batch = given.few(20, 2), 128
    config, opened = fixtures.opened(cache, data, archs[0], batch_size=batch, precision="bfloat16")
    alone = _trainings(given, config, opened, archs, steps)
    together = Together(_trainings(given, config, opened, archs, steps))
    found = interleaved({"one stream": together, "four runs": lambda: sum(one() for one in alone)}, given.few(5, 1))
    return Found(over(found["one stream"], found["four runs"]), f"{', '.join(archs)}: {parts(found)}")


class Stacked:
    """Trainings as one vectorised model, as fit_stacked takes its steps; seconds of a image."""

    def __init__(self, alone: Sequence[Ours]):
        from softcache.stages.training.vectorized import VectorizedModel, _begin_epoch, check_vectorizable

        self.jobs = [one.job for one in alone]
        check_vectorizable(self.jobs)
        first = self.jobs[0]
        self.stack = VectorizedModel([job.model for job in self.jobs]).to(first.device)
        self.state = TrainState.create(self.stack, nn.ModuleDict(), first.config, first.schedule)
        self.weights, self.count, self.at = _begin_epoch(self.jobs, 0), alone[0].count, 0

    def __call__(self) -> float:
        from softcache.stages.training.vectorized import _step

        job, images, begun = self.jobs[0], 0, time.perf_counter()
        self.stack.train()
        for batch in job.stream.batches(self.at, self.at + self.count):
            with job.rng_state:
                terms = _step(job, self.stack, self.state, batch.to(job.device), self.weights)
            images += len(batch.views)
        terms.tolist()
        self.at += self.count
        return (time.perf_counter() - begun) / images


def vectorised(given: Given, arch: str, students: int, on_digits: bool) -> Found:
    """Students of one arch and of as many seeds as one model, as a share of the time of as many runs."""
    if on_digits:
        data = "digits"
        cache = fixtures.fake_cache(given.folder / "digits", data)
    else:
        data, cache = mnist(given)
    config, opened = fixtures.opened(cache, data, arch, loss=("kd:temperature=4",))
    steps = given.few(44 if on_digits else 12, 2)
    alone = [
        Ours(job(given, replace(config, seed=i), opened, False, f"s{i}"), steps) for i in range(given.few(students, 2))
    ]
    sides: dict[str, Side] = {"as one": Stacked(alone), "runs": lambda: sum(one() for one in alone)}
    found = interleaved(sides, given.few(5, 1))
    return Found(over(found["as one"], found["runs"]), parts(found))
