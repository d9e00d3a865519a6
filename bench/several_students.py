"""Rows about several students at once, against the same students one after another."""

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from softcache.stages.cli.configs import StudentConfig
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.training import vectorized
from softcache.stages.training.checkpoint import TrainState
from softcache.stages.training.loop import _begin_epoch, step_each

from . import fixtures
from .measurement import BenchOptions, Measurement
from .student import TrainingLoop, make_run, write_mnist_cache
from .timing import Contender, divide, format_medians, time_in_turns

FOUR = ("resnet8", "cnn", "mlp:64", "mlp:128")
LIGHT = ("resnet8", "mlp:512", "mlp:64", "mlp:128")  # decoding counts: a step of cnn at 64 px takes four times as long


class OneLoaderLoop:
    """A contender: several students of one loader, each of which takes a step on every batch.

    A turn returns the seconds per image, which all students share.

    Args:
        loops: the students; batches come from the loader of the first.
    """

    def __init__(self, loops: Sequence[TrainingLoop]):
        self.first, self.trainings = loops[0], [loop.training for loop in loops]

    def __call__(self) -> float:
        first, images, start = self.first, 0, time.perf_counter()
        for training in self.trainings:
            _begin_epoch(training, 0)
        for batch in first.run.stream.batches(first.next_step, first.next_step + first.steps):
            step_each(self.trainings, batch.to(first.run.device))
            images += len(batch.views)
        for training in self.trainings:
            training.term_sums.tolist()  # waits for a GPU
        first.next_step += first.steps
        return (time.perf_counter() - start) / images


class VectorizedLoop:
    """A contender: students of one arch as one vectorised model. A turn returns the seconds per image.

    Args:
        loops: the students, equal but for their seeds; batches come from the loader of the first.
    """

    def __init__(self, loops: Sequence[TrainingLoop]):
        self.runs = [loop.run for loop in loops]
        vectorized.check_vectorizable(self.runs)
        first = self.runs[0]
        self.model = vectorized.VectorizedModel([run.model for run in self.runs]).to(first.device)
        self.state = TrainState.create(self.model, nn.ModuleDict(), first.config, first.schedule)
        self.weights, self.steps, self.next_step = vectorized._begin_epoch(self.runs, 0), loops[0].steps, 0

    def __call__(self) -> float:
        run, images, start = self.runs[0], 0, time.perf_counter()
        self.model.train()
        for batch in run.stream.batches(self.next_step, self.next_step + self.steps):
            with run.rng_state:
                terms = vectorized._step(run, self.model, self.state, batch.to(run.device), self.weights)
            images += len(batch.views)
        terms.tolist()  # waits for a GPU
        self.next_step += self.steps
        return (time.perf_counter() - start) / images


def compare_one_loader(options: BenchOptions, from_files: bool, archs: Sequence[str] = FOUR) -> Measurement:
    """Time of four students of one loader / of four runs.

    Args:
        options: of the benchmark.
        from_files: views of 64 px from 224 px JPEGs, else images in memory as CIFAR-10's.
        archs: of the students.
    """
    if from_files:
        data = fixtures.write_jpegs(options.folder / "jpegs-224", options.scale(384, 40), 224)
        folder = options.folder / "jpegs-224-cache"
        cache = fixtures.write_random_cache(folder, data, "resized-crop-flip:size=64", draws=4)
        steps, batch_size = options.scale(8, 1), 32
    else:
        data = fixtures.add_data_set(options.scale(6400, 300))
        cache = fixtures.write_random_cache(options.folder / "cifar", data, draws=2)
        steps, batch_size = options.scale(20, 2), 128
    config, setup = fixtures.open_setup(cache, data, archs[0], batch_size=batch_size, precision="bfloat16")
    configs = [replace(config, arch=arch) for arch in archs]
    runs = _make_loops(options, configs, setup, steps)
    one_loader = OneLoaderLoop(_make_loops(options, configs, setup, steps))
    contenders: dict[str, Contender] = {"one stream": one_loader, "four runs": lambda: sum(run() for run in runs)}
    seconds = time_in_turns(contenders, options.scale(5, 1))
    return Measurement(
        divide(seconds["one stream"], seconds["four runs"]), f"{', '.join(archs)}: {format_medians(seconds)}"
    )


def compare_vectorized(options: BenchOptions, arch: str, students: int, on_digits: bool) -> Measurement:
    """Time of students of one arch with different seeds as one model / of as many runs.

    Args:
        options: of the benchmark.
        arch: of all students.
        students: how many.
        on_digits: images of the digits, else images as MNIST's.
    """
    if on_digits:
        data = "digits"
        cache = fixtures.write_random_cache(options.folder / "digits", data)
    else:
        data, cache = write_mnist_cache(options)
    config, setup = fixtures.open_setup(cache, data, arch, loss=("kd:temperature=4",))
    steps = options.scale(44 if on_digits else 12, 2)
    configs = [replace(config, seed=seed) for seed in range(options.scale(students, 2))]
    runs = _make_loops(options, configs, setup, steps)
    contenders: dict[str, Contender] = {"as one": VectorizedLoop(runs), "runs": lambda: sum(run() for run in runs)}
    seconds = time_in_turns(contenders, options.scale(5, 1))
    return Measurement(divide(seconds["as one"], seconds["runs"]), format_medians(seconds))


def _make_loops(
    options: BenchOptions, configs: Sequence[StudentConfig], setup: DistillationSetup, steps: int
) -> list[TrainingLoop]:
    """Return a contender for each config."""
    return [
        TrainingLoop(make_run(options, config, setup, f"s{number}"), steps) for number, config in enumerate(configs)
    ]
