"""One thing at a time is done by a thread, while what comes after it is prepared."""

import queue
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from data.threads import Thread

Work = Callable[[], object]


class Behind:
    """`with Behind() as behind: behind.do(work, …)`. What the work raises is raised by the next call, or at the end.

    At most one work is under way, and none waits: do returns once the one before is done. After one that failed none
    is begun. Left by an exception, Ctrl-C or another, the block ends when the work under way is done: it is the
    writing of a shard, which is then whole, and what it raises besides is not said.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._under_way = False
        self._thread = Thread(self._work)

    def _work(self) -> None:
        while (work := self._asked.get()) is not None:
            try:
                work()
                self._done.put(None)
            except BaseException as error:  # handed to the thread that asks
                self._done.put(error)
            del work  # and with it the rows of a shard

    def do(self, work: Callable[..., object], *arguments: Any) -> None:
        """Begin a work, once the one before is done."""
        self.wait()
        if not self._thread.begun:
            self._thread.start()
        self._under_way = True
        self._asked.put(partial(work, *arguments))

    def wait(self) -> None:
        """Until nothing is under way. Raises what the last work raised."""
        if self._under_way:
            error = self._done.get()
            self._under_way = False
            if error is not None:
                raise error

    def look(self) -> None:
        """Raise what the last work has raised, if it is over: no need to go on for as long as the next one takes."""
        if not self._done.empty():
            self.wait()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._asked.put(None)
            self._thread.join()
