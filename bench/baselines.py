"""The loops that others write, against the cached epoch: ImageFolder or images in memory, DataLoader, torchvision's
transforms, a live teacher, float32, contiguous layout, batches of 128. The faster of 0 and 2 workers counts."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from softcache.pipeline.models import build

from . import fixtures
from .interleaved import Found, Given, Missing, Side, fastest, interleaved, over, parts
from .student import Ours, cifar, job
from .subprocess_side import Make, apart

BATCH, TEMPERATURE = 128, 4.0
_AHEAD = 5  # batches before the clock starts: workers are started and their queues full
Step = Callable[..., object]


def transforms(
    mean: Sequence[float] = (0.49, 0.48, 0.45), std: Sequence[float] = (0.25, 0.24, 0.26), crop: bool = True
) -> v2.Compose:
    """PIL -> float32 [C, H, W], normalised; cropped and flipped as CIFAR's images usually are."""
    first = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if crop else []
    return v2.Compose([*first, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class InMemory(Dataset[tuple[torch.Tensor, int]]):
    """Images as PIL images in memory, as torchvision's CIFAR10 gives them."""

    def __init__(self, n: int) -> None:
        self.pixels = [to_pil_image(image) for image in fixtures.smooth(n, 3, 32)]
        self.transform = transforms()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pixels[i]), i % 10


def files(given: Given) -> Dataset[Any]:
    """The same images as JPEGs, read by ImageFolder."""
    data = fixtures.jpegs(given.folder / "jpegs-32", given.few(2560, 300), 32)
    found: Dataset[Any] = ImageFolder(f"{data.partition(':')[2]}/train", transforms())
    return found


def loop(given: Given, data: Dataset[Any], workers: int, step: Step, steps: int) -> Side:
    """A side of so many steps over a DataLoader, epoch after epoch."""
    return over_loader(given, DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True), step, steps)


def over_loader(given: Given, loader: "DataLoader[Any]", step: Step, steps: int) -> Side:
    """The clock starts when _AHEAD batches are done, so that starting worker processes costs the loop nothing."""

    def turn() -> float:
        batches: Iterator[Any] = chain.from_iterable(repeat(loader))
        for _ in range(given.few(_AHEAD, 1) if loader.num_workers else 1):
            step(*next(batches))
        begun, images = time.perf_counter(), 0
        for _ in range(steps):
            views, labels, *more = next(batches)
            step(views, labels, *more)
            images += len(views)
        if given.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / images

    return turn


def kd_step(given: Given, student: nn.Module, teacher: nn.Module | None) -> Step:
    """A step of the student by Hinton's loss from a live teacher, or by labels alone."""
    student = student.to(given.device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step(views: torch.Tensor, labels: torch.Tensor) -> None:
        views, labels = views.to(given.device, non_blocking=True), labels.to(given.device, non_blocking=True)
        said = student(views)
        loss = F.cross_entropy(said, labels)
        if teacher is not None:
            with torch.no_grad():
                heard = teacher(views)
            T = TEMPERATURE
            soft = F.kl_div(F.log_softmax(said / T, 1), F.softmax(heard / T, 1), reduction="batchmean")
            loss = 0.9 * T * T * soft + 0.1 * loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def torchdistill_side(given: Given, data: Dataset[Any], workers: int, steps: int) -> Side:
    """torchdistill's DistillationBox with its KDLoss, driven as its own examples drive it."""
    try:
        from torchdistill.core.distillation import get_distillation_box
    except ImportError as error:
        raise Missing(f"torchdistill is not there ({error}): make bench installs it") from None
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    teacher = fixtures.usual_teacher(given.device)
    student = build("resnet8", 10, 3, 32).to(given.device).train()
    hooked: dict[str, Any] = {
        "forward_hook": {"input": [], "output": ["linear"]},
        "forward_proc": "forward_batch_only",
    }
    kd = {
        "student_module_path": "linear",
        "student_module_io": "output",
        "teacher_module_path": "linear",
        "teacher_module_io": "output",
        "temperature": TEMPERATURE,
        "alpha": 0.1,
        "reduction": "batchmean",
    }
    config: dict[str, Any] = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": BATCH, "num_workers": workers, "drop_last": True},
        },
        "teacher": {**hooked, "requires_grad": False},
        "student": {**hooked, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}},
        },
    }
    box = get_distillation_box(teacher, student, {"train": data}, config, given.device, None, False, 1)

    def step(views: torch.Tensor, labels: torch.Tensor, more: Any) -> None:
        loss = box.forward_process(views.to(given.device), labels.to(given.device), more)
        box.post_forward_process(loss)
        loss.item()  # its examples log it, step by step

    return over_loader(given, box.train_data_loader, step, steps)


def usual_side(given: Given, teacher: bool, workers: int, steps: int) -> Side:
    """A usual loop: files and a live teacher, or images in memory and hard targets alone."""
    step = kd_step(given, build("resnet8", 10, 3, 32), fixtures.usual_teacher(given.device) if teacher else None)
    return loop(given, files(given) if teacher else InMemory(given.few(2560, 300)), workers, step, steps)


def boxed_side(given: Given, workers: int, steps: int) -> Side:
    """torchdistill's, over images in memory."""
    return torchdistill_side(given, InMemory(given.few(2560, 300)), workers, steps)


def usual_over_ours(given: Given, ours: str) -> Found:
    """Files, DataLoader, transforms and a live teacher, against our cached epoch."""
    return _of(_files_session(given), ours)


def torchdistill_over_ours(given: Given, ours: str) -> Found:
    """torchdistill's loop over images in memory, against our cached epoch."""
    return _of(_boxed_session(given), ours)


def hard_over_ours(given: Given, ours: str) -> Found:
    """Images in memory, DataLoader, transforms and hard targets alone, against our cached epoch."""
    return _of(_hard_session(given), ours)


@lru_cache(maxsize=1)
def _hard_session(given: Given) -> dict[str, list[float]]:
    sides = {f"{n} workers": (usual_side, (given, False, n, given.few(12, 1))) for n in (0, 2)}
    return _session(given, sides, ("bfloat16", "compiled"))


@lru_cache(maxsize=1)
def _files_session(given: Given) -> dict[str, list[float]]:
    files(given)  # made before two processes want to
    sides = {f"{n} workers": (usual_side, (given, True, n, given.few(6, 1))) for n in (0, 2)}
    return _session(given, sides, ("bfloat16", "compiled", "float32"))


@lru_cache(maxsize=1)
def _boxed_session(given: Given) -> dict[str, list[float]]:
    sides = {f"{n} workers": (boxed_side, (given, n, given.few(6, 1))) for n in (0, 2)}
    return _session(given, sides, ("bfloat16", "compiled"))


def _session(
    given: Given, theirs: Mapping[str, tuple[Make, tuple[Any, ...]]], kinds: Sequence[str]
) -> dict[str, list[float]]:
    """Their loops and ours of each kind (bfloat16, compiled, float32) in turns: {side: seconds of a image}."""
    data, cache = cifar(given)
    ours: dict[str, Side] = {}
    for kind in kinds:
        how: dict[str, Any] = {"precision": "float32"} if kind == "float32" else {"precision": "bfloat16"}
        config, opened = fixtures.opened(cache, data, "resnet8", compile=kind == "compiled", **how)
        ours[kind] = Ours(job(given, config, opened, False, "cached"), given.few(15, 2))
    with apart(theirs) as sides:
        return interleaved({**sides, **ours}, given.few(4, 1))


def _of(found: dict[str, list[float]], kind: str) -> Found:
    """The faster of their sides over ours of a kind."""
    theirs = {name: seconds for name, seconds in found.items() if name.endswith("workers")}
    return Found(over(fastest(*theirs.values()), found[kind]), parts({**theirs, "ours": found[kind]}))
