"""Several processes that run one command, as torchrun starts them: ranks, work of rank 0 alone, barriers, failures.

Outside torchrun there is one rank, 0 of 1: no process group is made and these functions cost no time. PyTorch is
imported in `process_group` alone, because `--help` must be quick.

Ranks wait for each other at torchrun's key-value store, not in a collective: such a wait has no time limit (rank 0
may train a teacher for hours). Ctrl-C ends it, and so does a rank that fails, ends or cannot be reached, see
`connections`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from softcache.base.errors import CacheError, Interrupted, LostRankError, UsageError, is_interrupt, make_printable

from .addresses import check_address_of_first, check_address_of_host
from .connections import read_limit
from .rendezvous import START_TIMEOUT, Rendezvous, make_lost_rank_error, reach_store

T = TypeVar("T")
COMMANDS = ("teacher-cache", "student")  # commands that can run in several ranks
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OWN_OPTIONS = ("data_root", "workers")  # a host may have its data elsewhere, and other numbers of processors
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
_rendezvous: list[Rendezvous] = []


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
def process_group(command: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Join the ranks to one process group. An error in one rank ends all; the first rank that failed prints it.

    Args:
        command: its name.
        options: of the command, the same on every rank but for those of OWN_OPTIONS. Of `device`: all ranks share a
            GPU with a number (cuda:0), which NCCL refuses; the backend is gloo then.

    Raises:
        UsageError: for more ranks than GPUs on a host, addresses by which the hosts cannot reach each other, or ranks
            with other commands or options.
        CacheError: where another rank has ended or cannot be reached.
    """
    if LAUNCHED.world == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    device = options["device"]
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and LAUNCHED.local_world > torch.cuda.device_count():  # the same message in all ranks of the host
        raise UsageError(
            f"{LAUNCHED.local_world} ranks on a host with {torch.cuda.device_count()} GPUs: lower --nproc-per-node,"
            " or --device cpu"
        )
    limit = read_limit(os.environ)
    if on_several_hosts := LAUNCHED.world > LAUNCHED.local_world:
        check_address_of_first(os.environ["MASTER_ADDR"])
    with reach_store():
        store, *_ = next(rendezvous("env://", timeout=START_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep the store over a restart
    store = PrefixStore(f"softcache/{attempt}", store)
    rendezvous_point = Rendezvous(store, LAUNCHED.rank, LAUNCHED.world, LAUNCHED.local_rank)
    _rendezvous.append(rendezvous_point)
    try:
        if on_several_hosts and not on_gpu:
            check_address_of_host(os.environ)
        rendezvous_point.connect(limit)
        _check_same_command(rendezvous_point, command, options, limit)
        if on_gpu:
            torch.cuda.set_device(LAUNCHED.local_rank)
        with reach_store():
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=PrefixStore("group", store),
                rank=LAUNCHED.rank,
                world_size=LAUNCHED.world,
                timeout=START_TIMEOUT,
            )
        yield
        rendezvous_point.barrier()
    except BaseException as error:
        lost = rendezvous_point.fail()
        if lost and (is_interrupt(error) or isinstance(error, Interrupted | RuntimeError)):
            raise LostRankError(lost) from None
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise make_lost_rank_error(error) from None
        raise
    rendezvous_point.finish()
    dist.destroy_process_group()


def _check_same_command(point: Rendezvous, command: str, options: Mapping[str, Any], limit: int) -> None:
    """Check that this rank runs what rank 0 runs. Else the options of rank 0 would win, or the ranks would wait.

    Raises:
        UsageError: with the first difference.
    """
    shared = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
    own = json.loads(json.dumps({"the command": command, **shared, "SOFTCACHE_RANK_TIMEOUT": limit}))
    if LAUNCHED.is_first:
        point.send(own)
        point.barrier()  # no rank begins before all are compared
        return
    first = point.receive()
    if different := [name for name in (*own, *first) if name not in own or own.get(name) != first.get(name)]:
        name = different[0]
        title = name if " " in name or name.isupper() else f"--{name.replace('_', '-')}"
        raise UsageError(
            f"rank {LAUNCHED.rank} has {title} {_format_value(own.get(name))}, rank 0 has"
            f" {_format_value(first.get(name))}: start the same command on every host"
        )
    point.barrier()


def _format_value(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return make_printable(text[:200]) if text else "not set"


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
