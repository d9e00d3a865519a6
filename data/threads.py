"""Threads that an interrupt, wherever it comes, neither hangs nor leaves behind."""

import queue
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")
_Slot = queue.SimpleQueue[tuple[R | None, BaseException | None]]  # where one answer is put


class Thread:
    """As a daemon threading.Thread, whose start and join are written in Python, with locks that an interrupt leaves
    taken: nothing cuts a call of SimpleQueue or of start_new_thread in two. The work raises nothing and hands over by
    SimpleQueues; when it is told to end it ends, joined or not."""

    def __init__(self, work: Callable[[], None]):
        self._work, self.begun = work, False
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def start(self) -> None:
        start_new_thread(self._run, ())
        self.begun = True

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._ended.put(None)

    def join(self) -> None:
        """Once, and at once where an interrupt came before it was known to have begun."""
        if self.begun:
            self._ended.get()


def by_threads(work: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """work(item) of each item, in order, so many at a time. What the work raises is raised here. To be closed."""
    asked: queue.SimpleQueue[tuple[T, _Slot[R]] | None] = queue.SimpleQueue()
    under_way: deque[_Slot[R]] = deque()
    over = False

    def serve() -> None:
        while (one := asked.get()) is not None and not over:
            item, slot = one
            try:
                slot.put((work(item), None))
            except BaseException as error:  # handed to the thread that asks
                slot.put((None, error))

    def first() -> R:
        result, error = under_way.popleft().get()
        if error is not None:
            raise error
        return cast(R, result)

    serving = [Thread(serve) for _ in range(threads)]
    try:
        for thread in serving:
            thread.start()
        for item in items:
            if len(under_way) == 4 * threads:
                yield first()
            slot: _Slot[R] = queue.SimpleQueue()
            under_way.append(slot)
            asked.put((item, slot))
        while under_way:
            yield first()
    finally:
        over = True
        for _ in serving:
            asked.put(None)
        for thread in serving:
            thread.join()
