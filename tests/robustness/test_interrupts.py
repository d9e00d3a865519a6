"""Ctrl-C may come between any two steps of Python: nothing hangs, and it does not become another error."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softcache.base.threads import map_in_threads
from softcache.pipeline.loading.prefetch import prefetch
from softcache.stages.teacher_cache.writing import BackgroundWriter
from tests.helpers.commands import Stages, tiny_cache_command

TIMES = 1000


def prefetch_for_ever() -> None:
    for _ in prefetch(i for i in range(1 << 40)):
        pass


def write_in_the_background_for_ever() -> None:
    with BackgroundWriter() as writer:
        while True:
            writer.submit(int)
            writer.raise_failure()


def map_in_threads_for_ever() -> None:
    for _ in map_in_threads(str, range(1 << 40), 2):
        pass


def run_with_interrupt_after(seconds: float, work: Callable[[], None]) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    work()


def interrupt_many_times(work: Callable[[], None]) -> None:
    """Run in a new process: exit code 0 when every interrupt came out as KeyboardInterrupt and no thread is left."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    generator, threads_before = random.Random(0), len(os.listdir("/proc/self/task"))
    for _ in range(TIMES):
        with pytest.raises(KeyboardInterrupt):
            run_with_interrupt_after(generator.uniform(0.0005, 0.003), work)
    end = time.monotonic() + 10
    while len(os.listdir("/proc/self/task")) > threads_before and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) == threads_before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("work", [prefetch_for_ever, write_in_the_background_for_ever, map_in_threads_for_ever])
def test_an_interrupt_at_any_moment_ends_the_threads(work: Callable[[], None]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=interrupt_many_times, args=(work,))
    process.start()
    process.join(90)
    is_hanging = process.is_alive()
    process.kill()
    process.join()
    assert not is_hanging
    assert process.exitcode == 0


def test_an_error_that_a_library_makes_of_an_interrupt_counts_as_one(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted read of weights is not reported as damaged weights."""

    def read_with_interrupt(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("PytorchStreamReader failed reading zip archive")

    monkeypatch.setattr(torch, "load", read_with_interrupt)
    code, out, err = stages.call(*tiny_cache_command(tiny)[:-1], "c")
    assert code == 130, (out, err)
    assert "stopped" in err
    assert "damaged" not in err
