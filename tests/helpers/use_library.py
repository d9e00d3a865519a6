"""A process that uses everything of `softcache` as a library, and prints what it changed of Python and PyTorch.

Run by tests/test_library.py with the folder to work in. Nothing but the last line may be printed.
"""

import gc
import importlib
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import softcache


class Squares(Dataset[tuple[np.ndarray, int]]):
    """Grey images of noise around the brightness of their class."""

    def __len__(self) -> int:
        return 120

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        noise = np.random.default_rng(row).integers(0, 40, (8, 8))
        return (noise + 80 * (row % 3)).astype(np.uint8), row % 3


def make_network(width: int) -> nn.Sequential:
    """A network; its weights are drawn here, so the state of the generator is put back."""
    with torch.random.fork_rng():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3))


def read_state() -> dict[str, Any]:
    """Everything global that a library may not change."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)
    return {
        "torch random": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy random": repr(np.random.get_state()),
        "python random": repr(random.getstate()),
        "dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "precision": torch.get_float32_matmul_precision(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "system threads": len(os.listdir("/proc/self/task")),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "signals": [repr(signal.getsignal(kind)) for kind in kinds],
        "folder": os.getcwd(),
        "path": list(sys.path),
        "environment": dict(os.environ),
        "streams": [id(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "warnings": repr(__import__("warnings").filters),
        "hooks": [repr(sys.excepthook), repr(threading.excepthook), repr(sys.unraisablehook)],
        "descriptors": sorted(list_descriptors()),
    }


def list_descriptors() -> Iterator[str]:
    """What the open descriptors are, but for the one that lists them."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            yield os.readlink(f"/proc/self/fd/{fd}")


def use_everything(folder: Path) -> None:
    """Both stages, the loader with and without workers, every method of a cache, and the errors."""
    data, teacher, student = Squares(), make_network(32), make_network(8)
    weights = [p.detach().clone() for p in teacher.parameters()]
    cache = softcache.build_cache(
        folder / "cache", teacher, data, views="crop:pad=1", draws=2, taps=["2"], device="cpu", seed=1
    )
    assert all(torch.equal(a, b) for a, b in zip(weights, teacher.parameters(), strict=True))
    assert teacher.training
    cache = softcache.Cache(folder / "cache", data=data)
    cache.verify(deep=True)
    criterion = softcache.DistillationLoss(
        "kd:temperature=4",
        "hint:teacher=2,student=2,weight=1",
        "rkd:teacher=2,student=2",
        lambda o, b: o.logits.mean(),
    )
    for workers in (0, 1):
        loader = cache.loader("train", batch_size=16, taps=criterion.teacher_taps, workers=workers)
        example = next(iter(loader))
        criterion.attach(student, example)
        optimizer = torch.optim.SGD([*student.parameters(), *criterion.parameters()], lr=0.01)
        criterion.set_progress(0, 2)
        for batch in loader:
            optimizer.zero_grad()
            criterion(student(batch.images), batch).backward()
            optimizer.step()
        loader.load_state_dict(loader.state_dict())
    for batch in cache.loader("val"):
        softcache.evaluate(student(batch.images), batch.labels, teacher_logits=batch.logits)
    cache.targets("train", [1, 2], draw=1)
    cache.features("train", [3], ["2"])
    cache.render("val", [0])
    losses = [
        "kd",
        softcache.losses.Hint(teacher="2", student="2"),
        softcache.losses.Custom(lambda o, b: o.logits.std()),
    ]
    softcache.train_student(cache, student, losses, out=folder / "run", epochs=2, device="cpu", ema=0.9, seed=5)
    options = {"seeds": 2, "baseline": True, "finetune_epochs": 1}
    softcache.train_student(cache, make_network(4), ["kd"], out=folder / "runs", epochs=1, device="cpu", **options)
    softcache.distill(teacher, make_network(4), data, out=folder / "both", epochs=1, draws=1, device="cpu")
    for call in (
        lambda: softcache.Cache(folder / "none", data=data),
        lambda: softcache.Cache(folder / "cache"),
        lambda: softcache.DistillationLoss("kdd"),
        lambda: softcache.DistillationLoss("my_module:my_loss"),
        lambda: softcache.build_cache(folder / "cache", make_network(5), data, device="cpu"),
        lambda: softcache.train_student(cache, student, ["kd"], out=folder / "run", epochs=3, device="cpu"),
    ):
        with pytest.raises((softcache.CacheError, softcache.UsageError)):
            call()


def load_other_libraries() -> None:
    """What other libraries change when they are loaded or first used, such as filters of warnings and SIGCHLD."""
    for name in ("sklearn.metrics", "scipy.stats", "torch._dynamo", "torch._inductor.compile_fx", "torchvision"):
        importlib.import_module(name)
    make_network(4)(torch.rand(64, 64)).sum().backward()
    list(DataLoader(Squares(), num_workers=1, collate_fn=list))
    wait_for_threads()


def wait_for_threads() -> None:
    """The threads of a DataLoader's queues end a moment after it, and with them their pipes."""
    gc.collect()
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(timeout=10)
    gc.collect()


def main() -> None:
    load_other_libraries()
    before = read_state()
    use_everything(Path(sys.argv[1]))
    wait_for_threads()
    after = read_state()
    print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))


if __name__ == "__main__":
    main()
