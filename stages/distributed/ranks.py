"""Several processes that run one command, as torchrun starts them: ranks, work of rank 0 alone, barriers, failures.

Outside torchrun there is one rank, 0 of 1: no process group is made and these functions cost no time. PyTorch is
imported in `process_group` alone, because `--help` must be quick.

Ranks wait for each other at torchrun's key-value store, not in a collective: such a wait has no time limit (rank 0
may train a teacher for hours). Ctrl-C ends it, and so does a rank that failed or sent no heartbeat for 3 minutes.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from softcache.base.errors import CacheError, UsageError

T = TypeVar("T")
COMMANDS = ("teacher-cache", "student")  # commands that can run in several ranks
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # reached only when a rank has ended or hangs
_HEARTBEAT, _HEARTBEAT_TIMEOUT = 10.0, 180.0  # seconds between two heartbeats, and until a rank counts as lost
_FILE_TIMEOUT = 60.0  # seconds until another host's file must be visible: NFS caches the names of a folder up to 60


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that run the command.

    Attributes:
        rank: number of this process, 0 to world - 1.
        world: number of processes.
        local_rank: number of this process among those of its host.
        local_world: number of processes on its host.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints, locks and writes."""
        return self.rank == 0


def read_ranks(environment: Mapping[str, str]) -> Ranks:
    """Read torchrun's environment variables; rank 0 of 1 where some are not set."""
    if not all(environment.get(name) for name in _VARIABLES):
        return Ranks()
    rank, world, local_rank = (int(environment[name]) for name in _VARIABLES[:3])
    return Ranks(rank, world, local_rank, int(environment.get("LOCAL_WORLD_SIZE", world)))


LAUNCHED = read_ranks(os.environ)
_single_process: list[bool] = []  # one entry for each open `as_single_process`
_rendezvous: list["_Rendezvous"] = []


def current_ranks() -> Ranks:
    """Return the ranks of this process; rank 0 of 1 inside `as_single_process`."""
    return replace(LAUNCHED, rank=0, world=1) if _single_process else LAUNCHED


def is_first() -> bool:
    """Return whether this process prints, locks and writes."""
    return current_ranks().is_first


def check_command(command: str | None) -> None:
    """Raise UsageError under torchrun for a command that runs in one process only."""
    if LAUNCHED.world > 1 and command not in COMMANDS:
        raise UsageError(f"torchrun is for {' and '.join(COMMANDS)}: run `{command}` without it, in one process")


@contextmanager
def as_single_process() -> Iterator[None]:
    """Run the code inside as if there were no other ranks."""
    _single_process.append(True)
    try:
        yield
    finally:
        _single_process.pop()


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the ranks to one process group. An error in one rank ends all; the first rank that failed prints it.

    Args:
        device: as in --device. All ranks share a GPU with a number (cuda:0), which NCCL refuses: the backend is gloo
            then.

    Raises:
        UsageError: for more ranks than GPUs on a host.
        CacheError: where another rank has ended or cannot be reached.
    """
    if LAUNCHED.world == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and LAUNCHED.local_world > torch.cuda.device_count():  # the same message in all ranks of the host
        raise UsageError(
            f"{LAUNCHED.local_world} ranks on a host with {torch.cuda.device_count()} GPUs: lower --nproc-per-node,"
            " or --device cpu"
        )
    with _reach_store():
        store, *_ = next(rendezvous("env://", timeout=_COLLECTIVE_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep the store over a restart
    store = PrefixStore(f"softcache/{attempt}", store)
    if on_gpu:
        torch.cuda.set_device(LAUNCHED.local_rank)
    with _reach_store():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore("group", store),
            rank=LAUNCHED.rank,
            world_size=LAUNCHED.world,
            timeout=_COLLECTIVE_TIMEOUT,
        )
    rendezvous_point = _Rendezvous(store, LAUNCHED)
    _rendezvous.append(rendezvous_point)
    try:
        yield
        rendezvous_point.barrier()
    except BaseException as error:
        rendezvous_point.fail()
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise _lost_rank_error(error) from None
        raise
    dist.destroy_process_group()


def reports_errors() -> bool:
    """Return whether this process is the one that prints why the command ended."""
    return _rendezvous[-1].is_first_to_fail if _rendezvous else LAUNCHED.is_first


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if current_ranks().world > 1:
        _rendezvous[-1].barrier()


def broadcast_from_first(make: Callable[[], T]) -> T:
    """Call a function on rank 0 alone, while the others wait, and return its result on every rank.

    Args:
        make: returns plain JSON values.
    """
    if current_ranks().world == 1:
        return make()
    rendezvous_point = _rendezvous[-1]
    if current_ranks().is_first:
        with as_single_process():
            value = make()
        rendezvous_point.send(value)
        return value
    received: T = rendezvous_point.receive()
    return received


def first_rank_first(load: Callable[[], T]) -> T:
    """Call a function on every rank, on rank 0 before the others: it may have to download a file for all of them."""
    if is_first():
        value = load()
        barrier()
        return value
    barrier()
    return load()


def check_equal(what: str, value: str) -> None:
    """Raise CacheError on a rank whose value is not that of rank 0.

    Args:
        what: the name of the value, for the message.
        value: this rank's value.
    """
    if (expected := broadcast_from_first(lambda: value)) != value:
        raise CacheError(
            f"rank {LAUNCHED.rank} has another {what} than rank 0: {value[:16]} and {expected[:16]}."
            " Every host must see the same files, and have the same versions"
        )


def sum_over_ranks(count: int) -> int:
    """Return the sum of a number over the ranks."""
    return _rendezvous[-1].sum(count) if current_ranks().world > 1 else count


def take_rank_items(items: Sequence[T]) -> list[T]:
    """Return the items of this rank: item i belongs to rank i mod world."""
    return list(items[current_ranks().rank :: current_ranks().world])


def wait_for_file(path: Path) -> None:
    """Wait until a file of another rank is visible: between hosts, a file system may show it a minute late."""
    start = time.monotonic()
    while (
        current_ranks().world > LAUNCHED.local_world and not path.exists() and time.monotonic() - start < _FILE_TIMEOUT
    ):
        with suppress(OSError):
            os.listdir(path.parent)  # opening a folder makes an NFS client read it from the server again
        time.sleep(0.2)


class _Rendezvous:
    """Barriers, sums and messages over a key-value store. All ranks call the same methods in the same order.

    Args:
        store: torchrun's store.
        ranks: the place of this process.

    Attributes:
        is_first_to_fail: whether this rank was the first to fail.
    """

    def __init__(self, store: Any, ranks: Ranks):
        self.store, self.ranks, self.number = store, ranks, 0
        self.is_first_to_fail = False
        self._heartbeats: dict[int, tuple[int, float]] = {}  # of each rank: the last count, and when it changed
        self._ended = threading.Event()
        threading.Thread(target=self._send_heartbeats, name="softcache-beat", daemon=True).start()

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        self.sum(0)

    def sum(self, count: int) -> int:
        """Wait for the numbers of all ranks and return their sum."""
        self.number += 1
        arrived, sum_ = f"arrived-{self.number}", f"sum-{self.number}"
        with _reach_store():
            self.store.add(sum_, count)
            self.store.add(arrived, 1)
        self._wait_until(lambda: bool(self.store.add(arrived, 0) == self.ranks.world))
        with _reach_store():
            return int(self.store.add(sum_, 0))

    def send(self, value: Any) -> None:
        """Send plain JSON values to the other ranks."""
        self.number += 1
        with _reach_store():
            self.store.set(f"value-{self.number}", json.dumps(value))

    def receive(self) -> Any:
        """Wait for what rank 0 sends."""
        self.number += 1
        self._wait_until(lambda: bool(self.store.check([f"value-{self.number}"])))
        with _reach_store():
            return json.loads(self.store.get(f"value-{self.number}"))

    def fail(self) -> None:
        """Signal the other ranks that this one ends with an error, so that they end too; ignore further Ctrl-C."""
        self._ended.set()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        with suppress(RuntimeError):
            self.is_first_to_fail = self.store.add("failed", 1) == 1

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll the store. Raises CacheError when another rank has failed or sends no heartbeat."""
        pause, last_check = 0.001, time.monotonic()
        while True:
            with _reach_store():
                if condition():
                    return
                if self.store.check(["failed"]):
                    raise CacheError("another rank has ended with an error")
                if time.monotonic() - last_check > _HEARTBEAT:
                    last_check = time.monotonic()
                    self._check_heartbeats()
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)

    def _send_heartbeats(self) -> None:
        with suppress(RuntimeError):
            while not self._ended.wait(_HEARTBEAT):
                self.store.add(f"beat-{self.ranks.rank}", 1)

    def _check_heartbeats(self) -> None:
        """Raise CacheError when a rank's heartbeat has not changed for too long, by the clock of this rank."""
        now = time.monotonic()
        for rank in range(self.ranks.world):
            count = self.store.add(f"beat-{rank}", 0)
            if self._heartbeats.get(rank, (-1, now))[0] != count:
                self._heartbeats[rank] = count, now
            elif now - self._heartbeats[rank][1] > _HEARTBEAT_TIMEOUT:
                raise CacheError(
                    f"rank {rank} has sent no heartbeat for {_HEARTBEAT_TIMEOUT:.0f} s: start the same command again"
                )


@contextmanager
def _reach_store() -> Iterator[None]:
    """Turn an error of the store into a CacheError."""
    try:
        yield
    except RuntimeError as error:
        raise _lost_rank_error(error) from None


def _lost_rank_error(error: RuntimeError) -> CacheError:
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return CacheError(f"another rank has ended, or cannot be reached ({reason}): start the same command again")
