"""Work by threads that an interrupt, wherever it comes, neither hangs nor leaves behind."""

import queue
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")


class Future(Generic[R]):
    """What a thread will have found."""

    def __init__(self) -> None:
        self._slot: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()

    def run(self, work: Callable[[], R]) -> None:
        try:
            self._slot.put((work(), None))
        except BaseException as error:  # handed to the thread that asks
            self._slot.put((None, error))

    def done(self) -> bool:
        return not self._slot.empty()

    def result(self) -> R:
        """Wait for it. Raises what the work raised. To be called once."""
        found, error = self._slot.get()
        if error is not None:
            raise error
        return cast(R, found)


class ThreadPool:
    """`with Threads(8) as threads: answer = threads.do(work, …)`, begun in the order in which it is asked. At the end
    what is under way is waited for; what has not begun never does.

    A ThreadPoolExecutor takes locks in Python, and an interrupt that comes as it has one leaves it taken: who wants it
    next waits for ever. Nothing cuts a call of SimpleQueue or of start_new_thread in two.
    """

    def __init__(self, most: int):
        self._most, self._begun, self._over = most, 0, False
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def submit(self, work: Callable[..., R], *arguments: Any) -> Future[R]:
        if self._begun < self._most:
            start_new_thread(self._serve, ())
            self._begun += 1
        answer: Future[R] = Future()
        self._asked.put(partial(answer.run, partial(work, *arguments)))
        return answer

    def _serve(self) -> None:
        while (work := self._asked.get()) is not None and not self._over:
            work()
            del work  # and with it, say, the rows of a shard
        self._ended.put(None)

    def __enter__(self) -> "ThreadPool":
        return self

    def __exit__(self, *reason: object) -> None:
        self._over = True
        for _ in range(self._most):  # also one that an interrupt met before it was counted
            self._asked.put(None)
        for _ in range(self._begun):
            self._ended.get()


def map_in_threads(work: Callable[[T], R], items: Iterable[T], most: int) -> Generator[R, None, None]:
    """work(item) of each item, in order, so many at a time. What the work raises is raised here. To be closed."""
    asked: deque[Future[R]] = deque()
    with ThreadPool(most) as threads:
        for item in items:
            if len(asked) == 4 * most:
                yield asked.popleft().result()
            asked.append(threads.submit(work, item))
        while asked:
            yield asked.popleft().result()
