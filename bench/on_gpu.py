"""Rows of `make gpu-check`: what training and stage one reach on a device, for a small and a large pair of networks.

On a CPU everything is small: that shows that the rows run, and its numbers mean nothing.
"""

import gc
import os
from collections.abc import Callable
from contextlib import closing, redirect_stderr
from dataclasses import dataclass, replace
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from softcache.data.views.on_device import copy_to_device
from softcache.pipeline.batch import Batch
from softcache.pipeline.models.bn_folding import fold_batch_norm
from softcache.pipeline.models.precision import autocast
from softcache.stages.runs.environment import wait_for_device
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.training.loop import _begin_epoch, step_each
from softcache.stages.training.run import TrainingRun

from . import fixtures
from .measurement import BenchOptions, Measurement, NotMeasurable
from .student import TrainingLoop, make_run
from .teacher import StageOne
from .timing import Contender, divide, format_medians, make_contender, time_in_turns

WARM_UP = 2  # rounds: the first compiles and allocates, in the second views are compared for the last time
_MIB = 1 << 20


@dataclass(frozen=True)
class Pair:
    """A teacher and its student, and the sizes of their comparison.

    Attributes:
        teacher, student: archs.
        size: of the images in pixels.
        batch_size: of the training.
        rows: images of the training split before 2 % are cut off. A turn is one epoch.
        teacher_rows: images of stage one.
        jpegs: images in files, of twice the size; 0 for none.
    """

    teacher: str
    student: str
    size: int
    batch_size: int
    rows: int
    teacher_rows: int
    jpegs: int = 0


def find_pair(options: BenchOptions, name: str) -> Pair:
    """Return the pair `small` or `large`, scaled down under --quick."""
    if name == "small":
        pair = Pair("resnet56", "resnet20", 32, 128, 6400, 50_000)
        return replace(pair, batch_size=8, rows=16, teacher_rows=64) if options.quick else pair
    pair = Pair("torchvision:resnet50", "torchvision:resnet18", 224, 128, 2560, 4096, 1024)
    if options.quick:
        pair = replace(pair, size=64, batch_size=8, rows=16, teacher_rows=32, jpegs=16)
    return pair


def find_precision(device: torch.device) -> str:
    """Return bfloat16 where the device computes in it; on a CPU float32: some are thirty times slower in bfloat16."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


# Training


def measure_rate(options: BenchOptions, name: str, contender: str) -> Measurement:
    """Images a second of the training loop: `live` runs the teacher on each batch, `cached`, `hard`."""
    seconds = _time_epochs(options, name)
    return Measurement([1 / x for x in seconds[contender]])


def measure_gain(options: BenchOptions, name: str) -> Measurement:
    """Time of an epoch with the live teacher / from the cache."""
    seconds = _time_epochs(options, name)
    return Measurement(divide(seconds["live"], seconds["cached"]), format_medians(seconds))


def measure_waiting(options: BenchOptions, name: str, contender: str = "cached") -> Measurement:
    """Share of an epoch that waits for its batches: what it takes longer than steps on batches that are there.

    Args:
        options: of the benchmark.
        name: of the pair.
        contender: `cached`, whose images and targets lie on a GPU; `copied`, whose batches a thread makes; `files`,
            whose images worker processes decode.
    """
    seconds = _time_files(options, name) if contender == "files" else _time_epochs(options, name)
    shares = [1 - x for x in divide(seconds["kept"], seconds[contender])]
    return Measurement(shares, format_medians(seconds))


@lru_cache(maxsize=2)
def _time_epochs(options: BenchOptions, name: str) -> dict[str, list[float]]:
    """Time epochs over images in memory: live teacher, cache, hard targets, and steps without a loader."""
    pair = find_pair(options, name)
    data = fixtures.add_data_set(pair.rows, size=pair.size)
    cache = fixtures.write_random_cache(options.folder / f"gpu-{name}", data, "crop-flip")
    setup, make = _open(options, pair, cache, data)
    teacher = fixtures.make_teacher(pair.teacher, pair.size, pair.batch_size, setup.device)
    steps = make("steps").steps
    contenders: dict[str, Contender] = {
        "live": TrainingLoop(_without_targets(make("live")), steps, teacher),
        "cached": TrainingLoop(make("cached"), steps),
        "copied": TrainingLoop(_without_resident_data(make("copied")), steps),
        "hard": TrainingLoop(make("hard", is_baseline=True), steps),
        "kept": KeptBatches(make("kept"), steps),
    }
    return _time(options, contenders, f"training, {name} pair")


@lru_cache(maxsize=2)
def _time_files(options: BenchOptions, name: str) -> dict[str, list[float]]:
    """Time training from a cache on JPEGs that worker processes decode, and without a loader."""
    pair = find_pair(options, name)
    data = fixtures.write_jpegs(options.folder / f"gpu-jpegs-{name}", pair.jpegs, 2 * pair.size)
    views = f"resized-crop-flip:size={pair.size}"
    cache = fixtures.write_random_cache(options.folder / f"gpu-files-{name}", data, views)
    workers = options.scale(min(16, len(os.sched_getaffinity(0))), 2)
    _, make = _open(options, pair, cache, data, workers=workers)
    steps = options.scale(60, 2)
    contenders: dict[str, Contender] = {
        # The loader makes batches ahead as soon as it is there: they are taken before the clock starts.
        "files": SteadyLoop(make("files"), steps, skipped=options.scale(2 * workers + 4, 1)),
        "kept": KeptBatches(make("kept"), min(steps, 20)),
    }
    return _time(options, contenders, f"training from files, {name} pair")


def _open(
    options: BenchOptions, pair: Pair, cache: Path, data: str, **more: Any
) -> tuple[DistillationSetup, Callable[..., TrainingRun]]:
    """Open a cache; return what students are trained from, and a function that makes a training of a name."""
    config, setup = fixtures.open_setup(
        cache,
        data,
        pair.student,
        batch_size=pair.batch_size,
        precision=find_precision(options.device),
        device=str(options.device),
        **more,
    )
    return setup, lambda name, **is_baseline: make_run(options, config, setup, name, **is_baseline)


def _without_targets(run: TrainingRun) -> TrainingRun:
    return replace(run, stream=replace(run.stream, read_targets=False))


def _without_resident_data(run: TrainingRun) -> TrainingRun:
    vars(run.stream)["_device_cache"] = None  # a cached property
    return run


def _time(options: BenchOptions, contenders: dict[str, Contender], title: str) -> dict[str, list[float]]:
    """Time contenders in turns, with a progress bar."""
    rounds, warm_up = options.scale(5, 1), options.scale(WARM_UP, 1)
    with tqdm(total=len(contenders) * (warm_up + rounds), desc=title, unit="turn", leave=False) as bar:
        return time_in_turns(contenders, rounds, warm_up, bar.update)


class KeptBatches(TrainingLoop):
    """A contender: the steps of the training loop alone, on batches that were put on the device beforehand."""

    def __init__(self, run: TrainingRun, steps: int):
        super().__init__(run, steps)
        self.batches: list[Batch] = [batch.to(run.device) for batch in run.stream.batches(0, steps)]
        self.take_turn = make_contender(self._take_steps, run.device)

    def __call__(self) -> float:
        """Take a turn; return the seconds per image."""
        return self.take_turn()

    def _take_steps(self) -> int:
        _begin_epoch(self.training, 0)
        for batch in self.batches:
            step_each([self.training], batch)
        return sum(map(len, self.batches))


class SteadyLoop(TrainingLoop):
    """A contender: the training loop, timed once its loader makes batches as fast as they are taken."""

    def __init__(self, run: TrainingRun, steps: int, skipped: int):
        super().__init__(run, steps)
        self.skipped = skipped

    def __call__(self) -> float:
        """Take a turn; return the seconds per image."""
        start = self.next_step
        self.next_step += self.skipped + self.steps
        _begin_epoch(self.training, 0)
        with closing(self.run.stream.batches(start, self.next_step)) as batches:
            for _ in range(self.skipped):
                step_each([self.training], next(batches).to(self.run.device))
            wait_for_device(self.run.device)

            def take_steps() -> int:
                images = 0
                for batch in batches:
                    step_each([self.training], batch.to(self.run.device))
                    images += len(batch)
                return images

            return make_contender(take_steps, self.run.device)()


# Memory


def measure_memory(options: BenchOptions, name: str) -> Measurement:
    """Peak memory of the device in MiB, of training from the cache: weights, gradients, activations, images, targets.

    Raises:
        NotMeasurable: on a CPU.
    """
    if options.device.type != "cuda":
        raise NotMeasurable("the memory of a GPU is counted by PyTorch, that of a CPU is not")
    pair = find_pair(options, name)
    data = fixtures.add_data_set(pair.rows, size=pair.size)
    cache = fixtures.write_random_cache(options.folder / f"gpu-{name}", data, "crop-flip")
    setup, make = _open(options, pair, cache, data)

    def make_live() -> TrainingLoop:
        teacher = fixtures.make_teacher(pair.teacher, pair.size, pair.batch_size, setup.device)
        return TrainingLoop(_without_targets(make("live")), 5, teacher)

    makers: dict[str, Callable[[], TrainingLoop]] = {
        "cached": lambda: TrainingLoop(make("cached"), 5),
        "copied": lambda: TrainingLoop(_without_resident_data(make("copied")), 5),
        "live": make_live,
    }
    peaks = {kind: _measure_peak(options.device, maker) for kind, maker in makers.items()}
    return Measurement([peaks["cached"]], ", ".join(f"{kind} {peak:.0f}" for kind, peak in peaks.items()) + " MiB")


def _measure_peak(device: torch.device, make: Callable[[], TrainingLoop]) -> float:
    """Return the peak memory in MiB above what was allocated before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    loop = make()
    loop()
    return (torch.cuda.max_memory_allocated(device) - before) / _MIB


# Stage one


def compare_stage_one_with_bare_inference(options: BenchOptions, name: str) -> Measurement:
    """Images per second of stage one / of the teacher's bare inference, in the same precision, on images in memory.

    Bare inference runs the network that stage one runs, with batch norm folded in bfloat16, over batches in pinned
    memory.
    """
    pair = find_pair(options, name)
    data, precision = fixtures.add_data_set(pair.teacher_rows, size=pair.size), find_precision(options.device)
    teacher = fixtures.make_teacher(pair.teacher, pair.size, pair.batch_size, options.device)
    weights = options.folder / f"gpu-teacher-{name}.pt"
    torch.save({key: x.cpu() for key, x in teacher.network.state_dict().items()}, weights)
    if precision == "bfloat16":
        teacher = fold_batch_norm(teacher)
    batch_size = options.scale(256, 16)
    images = fixtures.keep_images(pair.teacher_rows, 3, pair.size, 0)  # those that stage one reads
    batches = [x.pin_memory() if options.device.type == "cuda" else x for x in torch.split(images, batch_size)]

    def infer() -> int:
        with torch.inference_mode(), autocast(options.device, precision):
            for views in batches:
                logits = teacher(copy_to_device(views, options.device))
        logits.sum().item()
        return len(images)

    stage_one = StageOne(
        options,
        data,
        teacher=pair.teacher,
        weights=str(weights),
        normalize="mean=0.49,0.48,0.45,std=0.25,0.24,0.26",
        batch_size=batch_size,
        precision=precision,
    )

    def run_quietly() -> float:
        with redirect_stderr(StringIO()):  # it warns each time of a teacher that has learned nothing
            return stage_one()

    contenders: dict[str, Contender] = {"bare": make_contender(infer, options.device), "stage one": run_quietly}
    seconds = _time(options, contenders, f"stage one, {name} pair")
    fixed = stage_one.median_fixed_seconds()
    return Measurement(
        divide(seconds["bare"], seconds["stage one"]), f"{format_medians(seconds)}; besides, {fixed:.2g} s once"
    )
