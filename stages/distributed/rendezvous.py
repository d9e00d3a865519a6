"""How the ranks of a command wait for each other, send each other values, and end.

Barriers and messages use torchrun's key-value store, not a collective: such a wait has no time limit (rank 0 may train
a teacher for hours), and Ctrl-C ends it.
"""

import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from softcache.base.errors import CacheError

from .connections import Listener, Watch, connect

START_TIMEOUT = timedelta(minutes=10)  # until all ranks are connected, and of a collective in which a rank hangs
_GRACE = 10.0  # seconds in which the main thread may end by itself once another rank is lost
_ANSWER_TIMEOUT = 5.0  # seconds in which the store must answer a rank that fails
_REMEDY = "start the same command again on every host"


class Rendezvous:
    """Barriers, sums and messages over a key-value store. All ranks call the same methods in the same order.

    Args:
        store: torchrun's store.
        rank: number of this process, 0 to world - 1.
        world: number of processes.
        local_rank: number of this process among those of its host.

    Attributes:
        is_first_to_fail: whether this rank was the first to fail.
    """

    def __init__(self, store: Any, rank: int, world: int, local_rank: int):
        self.store, self.number = store, 0
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.is_first_to_fail = False
        self._lost = ""  # which rank has ended or cannot be reached
        self._failed = threading.Lock()  # held for ever by the thread that ends this process
        self._watch: Watch | None = None

    def connect(self, limit: int) -> None:
        """Connect the ranks, so that each notices when another one ends or has not answered for `limit` seconds."""
        seconds = START_TIMEOUT.total_seconds()
        late = threading.Timer(
            seconds, self._end, (f"the ranks were not connected within {seconds:.0f} s: {_REMEDY}",)
        )
        late.daemon = True
        late.start()
        if self.rank == 0:
            listener = Listener()
            self.send(listener.place)
            self._wait_until(lambda: listener.accept() == self.world - 1)
            listener.close()
            connections = listener.connections
        else:
            host, place = os.environ["MASTER_ADDR"], self.receive()
            try:
                connections = {0: connect(host, place, self.rank, limit)}
            except OSError as error:
                raise CacheError(f"rank 0 cannot be reached at {host}, port {place[0]}: {error}") from None
        late.cancel()
        self._watch = Watch(connections, limit, lambda event: self._end(f"{event}: {_REMEDY}"))

    def finish(self) -> None:
        """Tell the other ranks that the command is done."""
        if self._watch:
            self._watch.finish()

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        self.sum(0)

    def sum(self, count: int) -> int:
        """Wait for the numbers of all ranks and return their sum."""
        self.number += 1
        arrived, sum_ = f"arrived-{self.number}", f"sum-{self.number}"
        with reach_store():
            self.store.add(sum_, count)
            self.store.add(arrived, 1)
        self._wait_until(lambda: bool(self.store.add(arrived, 0) == self.world))
        with reach_store():
            return int(self.store.add(sum_, 0))

    def send(self, value: Any) -> None:
        """Send plain JSON values to the other ranks."""
        self.number += 1
        with reach_store():
            self.store.set(f"value-{self.number}", json.dumps(value))

    def receive(self) -> Any:
        """Wait for what rank 0 sends."""
        self.number += 1
        self._wait_until(lambda: bool(self.store.check([f"value-{self.number}"])))
        with reach_store():
            return json.loads(self.store.get(f"value-{self.number}"))

    def fail(self) -> str:
        """Decide whether this rank reports why the command ends, and ignore further Ctrl-C.

        Returns:
            Which other rank has ended or cannot be reached; nothing where that is not the reason.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        if self._failed.acquire(blocking=False):
            self.is_first_to_fail = self._claim_report()
        return self._lost

    def _claim_report(self) -> bool:
        """Return whether this rank is the first that fails; where the store does not answer, the first of its host."""
        answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def ask() -> None:
            with suppress(RuntimeError):
                answers.put(self.store.add("failed", 1) == 1)

        threading.Thread(target=ask, daemon=True).start()  # the store's host may be cut off: the call never returns
        try:
            return answers.get(timeout=_ANSWER_TIMEOUT)
        except queue.Empty:
            return self.local_rank == 0

    def _end(self, lost: str) -> None:
        """End this process, whatever its main thread does. Called by another thread.

        The main thread gets SIGTERM, so that it ends as by Ctrl-C: it finishes the shard that is being written. Python
        handles no signal while it is in a collective of gloo or a call of the store, which do not return while a link
        is cut. Then the process ends here. That loses what no file had yet and damages none: shards, manifests and
        checkpoints are written under another name and renamed.
        """
        self._lost = lost
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(_GRACE)
        if self._failed.acquire(blocking=False) and self._claim_report():
            with suppress(OSError):
                os.write(2, f"Error: {lost}\n".encode())
        os._exit(1)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll the store. Raises CacheError when another rank has failed."""
        pause = 0.001
        while True:
            with reach_store():
                if condition():
                    return
                if self.store.check(["failed"]):
                    raise CacheError("another rank has ended with an error")
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)


@contextmanager
def reach_store() -> Iterator[None]:
    """Turn an error of the store into a CacheError."""
    try:
        yield
    except RuntimeError as error:
        raise make_lost_rank_error(error) from None


def make_lost_rank_error(error: RuntimeError) -> CacheError:
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return CacheError(f"another rank has ended, or cannot be reached ({reason}): {_REMEDY}")
