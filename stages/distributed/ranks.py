"""Several processes as one command, as torchrun starts them: who is who, what rank 0 does alone, ending together.

Outside torchrun there is one rank, 0 of 1: no process group is made and nothing here takes time. PyTorch is loaded
by `joined` alone, because `--help` must be quick.

Ranks wait for each other at torchrun's key-value store, not in a collective: such a wait has no limit (rank 0 may
train a teacher for hours), Ctrl-C ends it, and so does a rank that failed or has not been heard of for 3 minutes.
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
COMMANDS = ("teacher-cache", "student")  # those that know of ranks
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LIMIT = timedelta(minutes=10)  # of one collective, which only a rank that is gone or stuck makes long
_BEAT, _SILENT = 10.0, 180.0  # seconds between two signs of life; without one a rank is given up
_SEEN = 60.0  # seconds in which another host's file must show: NFS keeps a folder's names for up to 60


@dataclass(frozen=True)
class Ranks:
    """rank: which process of world this is; local: which of those on this host, which are here."""

    rank: int = 0
    world: int = 1
    local: int = 0
    here: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints, locks and writes."""
        return self.rank == 0


def read_ranks(environment: Mapping[str, str]) -> Ranks:
    """The ranks that torchrun's variables tell of; one alone where some are not set."""
    if not all(environment.get(name) for name in _NAMES):
        return Ranks()
    rank, world, local = (int(environment[name]) for name in _NAMES[:3])
    return Ranks(rank, world, local, int(environment.get("LOCAL_WORLD_SIZE", world)))


LAUNCHED = read_ranks(os.environ)
_single: list[bool] = []  # one for each `alone` that is under way
_rendezvous: list["_Rendezvous"] = []


def current_ranks() -> Ranks:
    """Who this process is now: rank 0 of 1 inside `alone`."""
    return replace(LAUNCHED, rank=0, world=1) if _single else LAUNCHED


def is_first() -> bool:
    """Whether this process prints, locks and writes."""
    return current_ranks().is_first


def check_command(command: str | None) -> None:
    """Raise UsageError under torchrun for a command that is for one process."""
    if LAUNCHED.world > 1 and command not in COMMANDS:
        raise UsageError(f"torchrun is for {' and '.join(COMMANDS)}: run `{command}` without it, in one process")


@contextmanager
def as_single_process() -> Iterator[None]:
    """What is done inside is done as if there were no other ranks."""
    _single.append(True)
    try:
        yield
    finally:
        _single.pop()


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The ranks as one process group. An error of one ends all: it is printed once, by the first that met one.

    device: as in --device. A GPU that is named (cuda:0) is shared by all ranks, which NCCL refuses: then it is gloo.
    """
    if LAUNCHED.world == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and LAUNCHED.here > torch.cuda.device_count():  # so that all ranks of the host say the same
        raise UsageError(
            f"{LAUNCHED.here} ranks on a host with {torch.cuda.device_count()} GPUs: lower --nproc-per-node,"
            " or --device cpu"
        )
    with _reach_store():
        store, *_ = next(rendezvous("env://", timeout=_LIMIT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep the store of the last one
    store = PrefixStore(f"softcache/{attempt}", store)
    if on_gpu:
        torch.cuda.set_device(LAUNCHED.local)
    with _reach_store():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore("group", store),
            rank=LAUNCHED.rank,
            world_size=LAUNCHED.world,
            timeout=_LIMIT,
        )
    meeting = _Rendezvous(store, LAUNCHED)
    _rendezvous.append(meeting)
    try:
        yield
        meeting.barrier()
    except BaseException as error:
        meeting.fail()
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise _lost_rank(error) from None
        raise
    dist.destroy_process_group()


def reports_errors() -> bool:
    """Whether this process is the one that prints why the command ended."""
    return _rendezvous[-1].first_to_fail if _rendezvous else LAUNCHED.is_first


def barrier() -> None:
    """Wait until every rank is here."""
    if current_ranks().world > 1:
        _rendezvous[-1].barrier()


def broadcast_from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, alone, while the others wait: plain JSON values, which all get."""
    if current_ranks().world == 1:
        return make()
    meeting = _rendezvous[-1]
    if current_ranks().is_first:
        with as_single_process():
            made = make()
        meeting.tell(made)
        return made
    told: T = meeting.told()
    return told


def first_rank_first(load: Callable[[], T]) -> T:
    """What every rank loads, rank 0 before the others: it may have to download it."""
    if is_first():
        found = load()
        barrier()
        return found
    barrier()
    return load()


def check_equal(what: str, mine: str) -> None:
    """Raise CacheError where a rank has something else than rank 0."""
    if (theirs := broadcast_from_first(lambda: mine)) != mine:
        raise CacheError(
            f"rank {LAUNCHED.rank} has another {what} than rank 0: {mine[:16]} and {theirs[:16]}."
            " Every host must see the same files, and have the same versions"
        )


def sum_over_ranks(count: int) -> int:
    """The sum over the ranks."""
    return _rendezvous[-1].total(count) if current_ranks().world > 1 else count


def own_share(items: Sequence[T]) -> list[T]:
    """Those of the items that are this rank's: item i is of rank i mod world."""
    return list(items[current_ranks().rank :: current_ranks().world])


def wait_for_file(path: Path) -> None:
    """Until a file that another rank has published shows here: between hosts a file system may be a minute late."""
    begun = time.monotonic()
    while current_ranks().world > LAUNCHED.here and not path.exists() and time.monotonic() - begun < _SEEN:
        with suppress(OSError):
            os.listdir(path.parent)  # opening a folder asks the server for it again
        time.sleep(0.2)


class _Rendezvous:
    """Where the ranks of a command meet: a store that all can reach. All call the same methods in the same order."""

    def __init__(self, store: Any, current_ranks: Ranks):
        self.store, self.who, self.number = store, current_ranks, 0
        self.first_to_fail = False
        self._beats: dict[int, tuple[int, float]] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="softcache-beat", daemon=True).start()

    def barrier(self) -> None:
        self.total(0)

    def total(self, count: int) -> int:
        """The sum of what every rank gives, once all have given it."""
        self.number += 1
        here, sum_ = f"here-{self.number}", f"sum-{self.number}"
        with _reach_store():
            self.store.add(sum_, count)
            self.store.add(here, 1)
        self._until(lambda: bool(self.store.add(here, 0) == self.who.world))
        with _reach_store():
            return int(self.store.add(sum_, 0))

    def tell(self, value: Any) -> None:
        self.number += 1
        with _reach_store():
            self.store.set(f"said-{self.number}", json.dumps(value))

    def told(self) -> Any:
        self.number += 1
        self._until(lambda: bool(self.store.check([f"said-{self.number}"])))
        with _reach_store():
            return json.loads(self.store.get(f"said-{self.number}"))

    def fail(self) -> None:
        """This rank ends with an error: from now on a second Ctrl-C changes nothing, and the others end too."""
        self._ended.set()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        with suppress(RuntimeError):
            self.first_to_fail = self.store.add("failed", 1) == 1

    def _until(self, seen: Callable[[], bool]) -> None:
        pause, looked = 0.001, time.monotonic()
        while True:
            with _reach_store():
                if seen():
                    return
                if self.store.check(["failed"]):
                    raise CacheError("another rank has ended with an error")
                if time.monotonic() - looked > _BEAT:
                    looked = time.monotonic()
                    self._listen()
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)

    def _beat(self) -> None:
        with suppress(RuntimeError):
            while not self._ended.wait(_BEAT):
                self.store.add(f"beat-{self.who.rank}", 1)

    def _listen(self) -> None:
        """Raise CacheError when a rank has given no sign of life for too long, by this one's clock."""
        now = time.monotonic()
        for rank in range(self.who.world):
            beat = self.store.add(f"beat-{rank}", 0)
            if self._beats.get(rank, (-1, now))[0] != beat:
                self._beats[rank] = beat, now
            elif now - self._beats[rank][1] > _SILENT:
                raise CacheError(
                    f"rank {rank} has not been heard of for {_SILENT:.0f} s: start the same command again"
                )


@contextmanager
def _reach_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _lost_rank(error) from None


def _lost_rank(error: RuntimeError) -> CacheError:
    why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return CacheError(f"another rank has ended, or cannot be reached ({why}): start the same command again")
