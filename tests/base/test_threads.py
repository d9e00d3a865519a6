"""Results of threads in order, errors where they belong. Interrupts: tests/robustness/test_interrupts.py."""

import threading
import time

import pytest

from softcache.base.threads import ThreadPool, map_in_threads


def test_results_come_in_order_and_an_error_in_the_place_of_its_result() -> None:
    barrier = threading.Barrier(4)

    def square(number: int) -> int:
        if number < 8:
            barrier.wait(5)  # four threads at a time, or it breaks
        if number == 70:
            raise OSError("unreadable")
        return number * number

    results: list[int] = []
    with pytest.raises(OSError, match="unreadable"):
        results.extend(map_in_threads(square, range(100), 4))
    assert results == [number * number for number in range(70)]


def test_few_items_are_taken_before_their_results_are() -> None:
    items: list[int] = []
    results = map_in_threads(str, (items.append(i) or i for i in range(1000)), 2)  # type: ignore[func-returns-value]
    assert [next(results) for _ in range(3)] == ["0", "1", "2"]
    assert len(items) < 20
    results.close()
    assert len(items) < 20


def test_at_the_end_a_running_task_is_waited_for_and_a_waiting_one_never_runs() -> None:
    is_running = threading.Event()
    calls: list[str] = []

    with ThreadPool(1) as pool:

        def end_after_the_block() -> None:
            is_running.set()
            while not pool._is_closed:
                time.sleep(0.001)
            calls.append("first")

        pool.submit(end_after_the_block)
        pool.submit(calls.append, "second")
        assert is_running.wait(30)
    assert calls == ["first"]
