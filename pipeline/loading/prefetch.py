"""Items that are made before they are needed: by a thread, or by worker processes."""

import errno
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from softcache.base.errors import CacheError, UsageError, describe_worker_failure, find_disk_error, is_worker_failure
from softcache.base.threads import ThreadPool

T = TypeVar("T")


def prefetch(items: Generator[T, None, None], depth: int = 3) -> Generator[T, None, None]:
    """Yield the same items, made by a thread that is at most depth items ahead. Its exceptions are raised here.

    The caller closes the generator, see contextlib.closing; that ends the thread and closes `items`.

    Handing them over is cheap: an epoch of 469 batches of 28 x 28 images and cached logits takes 27 ms to consume
    with a thread and 26 without; with the steps of `mlp:64` between them 436 and 434 ms (crop-flip), on 2 cores. So
    everything that is rendered in this process is prefetched, by the one rule; files and draws on disk gain by it.

    Raises:
        CacheError: This process was forked from the one that began; the thread is not in it.
    """
    process = os.getpid()
    with _close_in_process(items, process), ThreadPool(1) as thread:
        pending = deque(thread.submit(next, items) for _ in range(depth))
        while True:
            if os.getpid() != process:
                raise CacheError(
                    "this process was forked while a loader was being read, and the thread that reads it is in the"
                    " other process: begin a new pass over the loader in this one"
                )
            try:
                item = pending.popleft().result()
            except StopIteration:
                return
            pending.append(thread.submit(next, items))
            yield item


@contextmanager
def _close_in_process(items: Generator[T, None, None], process: int) -> Iterator[None]:
    """Close a generator at the end, unless this is a fork of the process, where another thread may have been in it."""
    try:
        yield
    finally:
        if os.getpid() == process:
            items.close()


def map_in_workers(
    dataset: Dataset[Any], keys: Iterator[Any], workers: int, start_method: str | None = None
) -> Generator[Any, None, None]:
    """Yield dataset[key] for each key, in order, computed by processes that live until the last one.

    The caller closes the generator, see contextlib.closing; that ends the processes.

    Args:
        dataset: Computes an item in a worker process, or returns a CacheError or a UsageError. (An exception that is
            raised there would arrive with the worker's traceback in its message.)
        keys: Read in this process, some keys ahead of the items.
        workers: Number of processes, at least 1.
        start_method: "fork", "spawn" or "forkserver"; None for the platform's default.

    Raises:
        UsageError: A worker returned it.
        CacheError: A worker returned it or was killed, or there is too little shared memory for the workers.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        sampler=_IteratorSampler(keys),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=start_method,
        generator=torch.Generator(),  # else it draws from the global one, with whose state a training resumes
        worker_init_fn=_ignore_interrupts,
    )
    iterator: Any = None
    try:
        with _describe_failures():
            _check_semaphores(workers, start_method)
            with _hold_interrupts():
                iterator = iter(loader)
        while True:
            with _describe_failures():
                item = next(iterator, None)
            if item is None:
                return
            if isinstance(item, (CacheError, UsageError)):
                raise item
            yield item
    finally:
        if iterator is not None:  # else a traceback that is kept somewhere would keep the processes
            iterator._shutdown_workers()


def _check_semaphores(workers: int, start_method: str | None) -> None:
    """Raise OSError where shared memory has no room for the semaphores of the workers' queues.

    A DataLoader that fails to make them half way prints a traceback of its own.
    """
    context = multiprocessing.get_context(start_method)
    semaphores = [context.Lock() for _ in range(3 * workers + 12)]
    del semaphores


@contextmanager
def _describe_failures() -> Iterator[None]:
    """Turn the errors of worker processes that cannot be started, or were killed, into a CacheError."""
    try:
        yield
    except RuntimeError as error:
        if not is_worker_failure(error) and "shared memory" not in str(error):
            raise
        raise CacheError(describe_worker_failure(str(error))) from None
    except (ConnectionError, EOFError) as error:  # a worker was killed while it handed over a batch
        raise CacheError(describe_worker_failure(f"a worker was killed ({type(error).__name__})")) from None
    except OSError as error:  # semaphores lie in shared memory too; a process needs memory
        if error.filename is not None or not (find_disk_error(error) or error.errno in (errno.ENOMEM, errno.EAGAIN)):
            raise
        raise CacheError(describe_worker_failure(str(error.strerror))) from None


@contextmanager
def _hold_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; processes that start in it never get it.

    In a worker that has just started, Ctrl-C would come before `_ignore_interrupts`, and end it: the loop would report
    a lost worker. In this process it could come in Python's own code around a fork, which drops it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_interrupts(_worker: int) -> None:
    """Let this process, not a worker, act on Ctrl-C, which a terminal sends to both: it closes the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def share_memory(x: torch.Tensor) -> torch.Tensor:
    """Move a tensor into shared memory, from which this worker's parent reads it.

    The queue of the workers would do so in a thread of its own, and only print the error of a /dev/shm that is too
    small: the parent would wait for the tensor for ever.

    Raises:
        CacheError: There is too little shared memory.
    """
    try:
        x.share_memory_()  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError) as error:
        if not isinstance(error, OSError) and "shared memory" not in str(error):
            raise
        raise CacheError(describe_worker_failure(f"no shared memory for a batch of {x.nbytes:,} bytes")) from None
    return x


class _IteratorSampler(Sampler[T], Generic[T]):
    """The keys of an iterator, read as the loader needs them; to be iterated once."""

    def __init__(self, keys: Iterator[T]):
        self.keys = keys

    def __iter__(self) -> Iterator[T]:
        return self.keys
