"""An interrupt may come between any two steps of Python: nothing hangs, and it is not turned into another error."""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softcache.base.threads import map_in_threads
from softcache.pipeline.loading.prefetch import prefetch
from softcache.stages.teacher_cache.background import BackgroundWriter
from tests.helpers.commands import Stages, tiny_cache_command

INTERRUPTS = 1000


def consume_prefetch() -> None:
    for _ in prefetch(iter(range(1 << 40))):
        pass


def submit_writes() -> None:
    with BackgroundWriter() as writing:
        while True:
            writing.submit(int)
            writing.raise_failure()


def consume_thread_map() -> None:
    for _ in map_in_threads(str, range(1 << 40), 2):
        pass


def run_until_interrupt(seconds: float, work: Callable[[], None]) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    work()


def run_many_interrupts(work: Callable[[], None]) -> None:
    """Run work many times, each time interrupted: every interrupt must be raised as one, and no thread may be left."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    rng, before = random.Random(0), len(os.listdir("/proc/self/task"))
    for _ in range(INTERRUPTS):
        with pytest.raises(KeyboardInterrupt):
            run_until_interrupt(rng.uniform(0.0005, 0.003), work)
    end = time.monotonic() + 10
    while len(os.listdir("/proc/self/task")) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("work", [consume_prefetch, submit_writes, consume_thread_map])
def test_a_thread_ends_whenever_an_interrupt_comes(work: Callable[[], None]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=run_many_interrupts, args=(work,))
    process.start()
    process.join(90)
    is_hung = process.is_alive()
    process.kill()
    process.join()
    assert not is_hung
    assert process.exitcode == 0


def test_answers_of_threads_come_in_order_and_errors_where_they_belong() -> None:
    barrier = threading.Barrier(4)

    def work(number: int) -> int:
        if number < 8:
            barrier.wait(5)  # four at a time, or it breaks
        if number == 70:
            raise OSError("unreadable")
        return number * number

    found: list[int] = []
    with pytest.raises(OSError, match="unreadable"):
        found.extend(map_in_threads(work, range(100), 4))
    assert found == [number * number for number in range(70)]


def test_no_more_is_asked_of_threads_than_they_can_soon_do() -> None:
    taken: list[int] = []
    results = map_in_threads(str, (taken.append(i) or i for i in range(1000)), 2)  # type: ignore[func-returns-value]
    assert [next(results) for _ in range(3)] == ["0", "1", "2"]
    assert len(taken) < 20
    results.close()
    assert len(taken) < 20


def test_what_a_library_makes_of_an_interrupt_is_one(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights whose reading is interrupted are not reported as damaged."""

    def load_interrupted(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("PytorchStreamReader failed reading zip archive")

    monkeypatch.setattr(torch, "load", load_interrupted)
    code, out, err = stages.call(*tiny_cache_command(tiny)[:-1], "c")
    assert code == 130, (out, err)
    assert "stopped" in err
    assert "damaged" not in err
