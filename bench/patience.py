"""Rows about patience: how soon a student from a cache is as accurate as one from hard targets is at its end.

Both train on the same rows of Fashion-MNIST with the same views, batches and schedule, each for a number of epochs
that is known from the start, since the learning rate falls to the end of a training. The student from the cache is
trained for shares of the epochs of the other; the smallest share whose mean test accuracy over the seeds is not below
that of hard targets counts.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softcache.stages.cli.configs import CacheConfig, StudentConfig, TeacherConfig
from softcache.stages.cli.console import Console
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.teacher import command as teacher_stage
from softcache.stages.teacher_cache.command import make_cache
from softcache.stages.training.checkpoint import read_epoch_lines
from softcache.stages.training.loop import train

from . import fixtures
from .measurement import BenchOptions, Measurement, NotMeasurable
from .student import make_run
from .timing import divide

TEACHER, TEACHER_EPOCHS, DRAWS, ROWS = "resnet20", 10, 10, 20_000
SHARES = (0.1, 0.2, 0.3, 0.4, 1.0)  # of the epochs of hard targets
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Outcome:
    """What came out of one training.

    Attributes:
        accuracy: on the test split.
        seconds: of its epochs, with their validation.
    """

    accuracy: float
    seconds: float


def compare_time_to_accuracy(options: BenchOptions, arch: str, epochs: int) -> Measurement:
    """Seconds of a student from the cache, until it is as accurate / of the student from hard targets.

    Args:
        options: of the benchmark.
        arch: of the students.
        epochs: of the student from hard targets.

    Raises:
        NotMeasurable: without the files of Fashion-MNIST.
        RuntimeError: where the student from the cache never gets there.
    """
    cache, stage_one_seconds = _make_cache(options)
    epochs = options.scale(epochs, 2)
    common: dict[str, Any] = {"data_root": str(_find_data(options)), "loss": ("kd:temperature=4",)}
    hard: list[Outcome] = []
    cached: dict[float, list[Outcome]] = {share: [] for share in SHARES}
    for seed in SEEDS[: options.scale(len(SEEDS), 1)]:
        config, setup = fixtures.open_setup(cache, "fashion-mnist", arch, seed=seed, **common)
        hard.append(_train(options, replace(config, epochs=epochs), setup, is_baseline=True))
        for share in SHARES:
            shorter = replace(config, epochs=max(1, round(share * epochs)))
            cached[share].append(_train(options, shorter, setup, is_baseline=False))
    goal = statistics.mean(outcome.accuracy for outcome in hard)
    accuracies = {
        share: statistics.mean(outcome.accuracy for outcome in outcomes) for share, outcomes in cached.items()
    }
    reached = next((share for share in SHARES if accuracies[share] >= goal), None)
    table = ", ".join(f"{accuracy:.4f} in {round(share * epochs)}" for share, accuracy in accuracies.items())
    facts = f"test accuracy {goal:.4f} in {epochs} epochs of hard targets; from the cache {table} epochs"
    if reached is None:
        raise RuntimeError(f"{facts}: never as accurate")
    ours, theirs = [outcome.seconds for outcome in cached[reached]], [outcome.seconds for outcome in hard]
    with_stage_one = statistics.median(divide([stage_one_seconds + seconds for seconds in ours], theirs))
    return Measurement(
        divide(ours, theirs),
        f"{facts}; hard targets {statistics.median(theirs):.0f} s, cache {statistics.median(ours):.0f} s,"
        f" stage one of {DRAWS} draws {stage_one_seconds:.0f} s: with it {with_stage_one:.2g}",
    )


def _rows(options: BenchOptions) -> int:
    return options.scale(ROWS, 500)


def _find_data(options: BenchOptions) -> Path:
    for folder in (Path(options.data_root), Path(options.data_root, "fashion-mnist")):
        if options.data_root and (folder / "FashionMNIST/raw").is_dir():
            return folder
    raise NotMeasurable("needs Fashion-MNIST: DATA_ROOT= its folder, as torchvision lays it out")


def _make_cache(options: BenchOptions) -> tuple[Path, float]:
    """Train the teacher and run stage one, once for all rows; return the cache and the seconds of stage one."""
    run, cache, note = (options.folder / f"patience-{name}" for name in ("teacher", "cache", "seconds"))
    common: dict[str, Any] = {
        "data": "fashion-mnist",
        "data_root": str(_find_data(options)),
        "train_size": _rows(options),
        "device": str(options.device),
        "json": True,
    }
    console = Console(True, epoch_lines=False)
    if not note.exists():
        config = TeacherConfig(**common, arch=TEACHER, epochs=options.scale(TEACHER_EPOCHS, 1), out=str(run))
        teacher_stage.train_teacher(teacher_stage.fill_defaults(config), run, console)
        start = time.perf_counter()
        make_cache(
            CacheConfig(**common, teacher=TEACHER, weights=str(run), draws=options.scale(DRAWS, 1), out=str(cache)),
            console,
        )
        note.write_text(str(time.perf_counter() - start))
    return cache, float(note.read_text())


def _train(options: BenchOptions, config: StudentConfig, setup: DistillationSetup, *, is_baseline: bool) -> Outcome:
    """Train a student with new weights; return its accuracy and its seconds."""
    run = make_run(options, config, setup, "patience", is_baseline=is_baseline)
    train(run, setup.held_out["val"], Console(True, epoch_lines=False))
    metrics = setup.compute_metrics(setup.compute_logits(run.model), None)
    return Outcome(metrics["test"]["accuracy"], sum(line["seconds"] for line in read_epoch_lines(run.folder)))
