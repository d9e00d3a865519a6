"""Rows about a busy machine: the time with what the commands choose for waiting threads, against fixed choices.

Each choice is a process of its own, since OpenMP reads it once. All do the same work in turns, while other processes
that only count keep processors busy.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache

from softcache.stages.cli.malloc import keep_large_blocks
from softcache.stages.cli.openmp import VARIABLES, choose_waiting

from . import fixtures
from .measurement import BenchOptions, Measurement
from .other_process import start_in_other_process
from .student import TrainingLoop, make_run
from .teacher import StageOne
from .timing import Contender, divide, format_medians, time_in_turns

# What a user may set: as it is in PyTorch, never spinning, one thread.
FIXED: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = (0, 1, 2)  # processes that count beside the work
WORKS = (  # name, work, arch
    ("cnn", "train", "cnn"),
    ("mlp64", "train", "mlp:64"),
    ("resnet8", "train", "resnet8"),
    ("stage-one-resnet56", "stage one", "resnet56"),
    ("stage-one-cnn", "stage one", "cnn"),
)
STEPS = {"mlp:64": 300, "cnn": 3, "resnet8": 3}  # of a turn: a third of a second on an idle machine
IMAGES = {"cnn": 1024, "resnet56": 256}


def compare_with_fixed_choices(options: BenchOptions, work: str, arch: str, busy: int) -> Measurement:
    """Time with the choice of the commands / with the fixed choice of the least median.

    Args:
        options: of the benchmark.
        work: `train`, or `stage one`.
        arch: of the student or teacher.
        busy: how many processes count beside it, one of BUSY.
    """
    seconds = _time_choices(options, work, arch)[busy]
    best = min((seconds[name] for name in FIXED), key=statistics.median)
    return Measurement(divide(seconds["chosen"], best), format_medians(seconds))


@lru_cache(maxsize=1)
def _time_choices(options: BenchOptions, work: str, arch: str) -> dict[int, dict[str, list[float]]]:
    """Time every choice beside each number of busy processes."""
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name, variables in {**FIXED, "chosen": choose_waiting({})}.items():
            with _set_openmp(variables):
                factories = {name: (make_work, (options, work, arch))}
                contenders |= stack.enter_context(start_in_other_process(factories))
        times = {}
        for busy in BUSY:
            with keep_busy(busy):
                times[busy] = time_in_turns(contenders, options.scale(5, 1))
    return times


def make_work(options: BenchOptions, work: str, arch: str) -> Contender:
    """Return the contender of a kind of work, in the process that does it."""
    keep_large_blocks()
    if work == "stage one":
        data = fixtures.add_data_set(options.scale(IMAGES[arch], 150))
        return StageOne(options, data, teacher=arch, normalize="imagenet", precision="float32")
    data = fixtures.add_data_set(options.scale(4096, 400), *((1, 28) if arch.startswith("mlp") else (3, 32)))
    cache = fixtures.write_random_cache(options.folder / f"busy-{os.getpid()}", data)
    config, setup = fixtures.open_setup(cache, data, arch)
    return TrainingLoop(make_run(options, config, setup, "student"), options.scale(STEPS[arch], 2))


@contextmanager
def keep_busy(processes: int) -> Iterator[None]:
    """Run processes that only count while the context is open."""
    counting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in counting:
            process.kill()
            process.wait()


@contextmanager
def _set_openmp(variables: Mapping[str, str]) -> Iterator[None]:
    """Set the variables of OpenMP for the processes that are started inside; those not named are not set."""
    before = dict(os.environ)
    for name in (*VARIABLES, "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
