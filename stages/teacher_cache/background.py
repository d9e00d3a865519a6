"""One thing at a time is done by a thread, while what comes after it is prepared."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from softcache.base.threads import Future, ThreadPool


class BackgroundWriter:
    """`with Behind() as behind: behind.do(work, …)`. What the work raises is raised by the next call, or at the end.

    At most one work is under way, and none waits: do returns once the one before is done. After one that failed none
    is begun. Left by an exception, Ctrl-C or another, the block ends when the work under way is done: it is the
    writing of a shard, which is then whole, and what it raises besides is not said.
    """

    def __init__(self) -> None:
        self._thread = ThreadPool(1)
        self._last: Future[object] | None = None

    def submit(self, work: Callable[..., object], *arguments: Any) -> None:
        """Begin a work, once the one before is done."""
        self.wait()
        self._last = self._thread.submit(work, *arguments)

    def wait(self) -> None:
        """Until nothing is under way. Raises what the last work raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def raise_failure(self) -> None:
        """Raise what the last work has raised, if it is over: no need to go on for as long as the next one takes."""
        if self._last is not None and self._last.done():
            self.wait()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._thread:
            try:
                self.wait()
            except BaseException:
                if kind is None:
                    raise
