"""Rows about the loops of others: an epoch as they write it, against an epoch of softcache from a cache.

Their loops use ImageFolder or images in memory, DataLoader, torchvision's transforms, a live teacher, float32,
contiguous layout and batches of 128. They run with 0 and with 2 workers, and the faster of the two counts.
"""

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
from .measurement import BenchOptions, Measurement, NotMeasurable
from .other_process import ContenderFactory, start_in_other_process
from .student import TrainingLoop, make_run, write_cifar_cache
from .timing import Contender, divide, format_medians, take_fastest, time_in_turns

BATCH, TEMPERATURE = 128, 4.0
_WARM_UP = 5  # batches before the clock starts, so that the workers of a DataLoader run and their queues are full
Step = Callable[..., object]  # trains on a batch: views and labels, and what else the loader gives


def compare_usual_loop(options: BenchOptions, variant: str) -> Measurement:
    """Time of a loop over files with DataLoader, transforms and a live teacher / of the cached epoch of a variant."""
    return _divide_by_variant(_time_usual_loop(options), variant)


def compare_torchdistill(options: BenchOptions, variant: str) -> Measurement:
    """Time of torchdistill over images in memory / of the cached epoch of a variant."""
    return _divide_by_variant(_time_torchdistill(options), variant)


def compare_hard_loop(options: BenchOptions, variant: str) -> Measurement:
    """Time of a loop over images in memory from hard targets alone / of the cached epoch of a variant."""
    return _divide_by_variant(_time_hard_loop(options), variant)


# Rows that differ in the variant alone share one session of turns, so each baseline is timed once.


@lru_cache(maxsize=1)
def _time_usual_loop(options: BenchOptions) -> dict[str, list[float]]:
    make_image_folder(options)  # before two processes would make it at once
    steps = options.scale(6, 1)
    baselines = {f"{n} workers": (make_usual_loop, (options, n, steps)) for n in (0, 2)}
    return _time_with_variants(options, baselines, ("bfloat16", "compiled", "float32"))


@lru_cache(maxsize=1)
def _time_torchdistill(options: BenchOptions) -> dict[str, list[float]]:
    steps = options.scale(6, 1)
    baselines = {f"{n} workers": (make_torchdistill_loop, (options, n, steps)) for n in (0, 2)}
    return _time_with_variants(options, baselines, ("bfloat16", "compiled"))


@lru_cache(maxsize=1)
def _time_hard_loop(options: BenchOptions) -> dict[str, list[float]]:
    steps = options.scale(12, 1)
    baselines = {f"{n} workers": (make_hard_loop, (options, n, steps)) for n in (0, 2)}
    return _time_with_variants(options, baselines, ("bfloat16", "compiled"))


def _time_with_variants(
    options: BenchOptions, baselines: Mapping[str, ContenderFactory], variants: Sequence[str]
) -> dict[str, list[float]]:
    """Let baselines and cached epochs take turns.

    Args:
        options: of the benchmark.
        baselines: {name: function that makes the contender, its arguments}.
        variants: of the cached epoch: bfloat16, compiled (bfloat16 with --compile), float32.

    Returns:
        {name of a baseline, or variant: seconds per image in each round}.
    """
    data, cache = write_cifar_cache(options)
    cached: dict[str, Contender] = {}
    for variant in variants:
        config, setup = fixtures.open_setup(
            cache,
            data,
            "resnet8",
            compile=variant == "compiled",
            precision="float32" if variant == "float32" else "bfloat16",
        )
        cached[variant] = TrainingLoop(make_run(options, config, setup, "cached"), options.scale(15, 2))
    with start_in_other_process(baselines) as contenders:
        return time_in_turns({**contenders, **cached}, options.scale(4, 1))


def _divide_by_variant(seconds: dict[str, list[float]], variant: str) -> Measurement:
    """Return the time of the faster baseline / of the cached epoch of a variant."""
    baselines = {name: times for name, times in seconds.items() if name.endswith("workers")}
    return Measurement(
        divide(take_fastest(*baselines.values()), seconds[variant]),
        format_medians({**baselines, "ours": seconds[variant]}),
    )


# The baselines


def make_usual_loop(options: BenchOptions, workers: int, steps: int) -> Contender:
    """Return a loop over a folder of JPEGs with a live ResNet-56."""
    student = build("resnet8", 10, 3, 32)
    step = make_kd_step(options, student, fixtures.make_plain_teacher(options.device))
    return make_loop(options, make_image_folder(options), workers, step, steps)


def make_hard_loop(options: BenchOptions, workers: int, steps: int) -> Contender:
    """Return a loop over images in memory from hard targets alone."""
    step = make_kd_step(options, build("resnet8", 10, 3, 32), None)
    return make_loop(options, ImagesInMemory(options.scale(2560, 300)), workers, step, steps)


def make_torchdistill_loop(options: BenchOptions, workers: int, steps: int) -> Contender:
    """Return torchdistill's DistillationBox with its KDLoss over images in memory, used as its examples use it.

    Raises:
        NotMeasurable: where torchdistill is not installed.
    """
    try:
        from torchdistill.core.distillation import get_distillation_box
    except ImportError as error:
        raise NotMeasurable(f"torchdistill is not installed ({error}): make bench installs it") from None
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    data = ImagesInMemory(options.scale(2560, 300))
    teacher = fixtures.make_plain_teacher(options.device)
    student = build("resnet8", 10, 3, 32).to(options.device).train()
    outputs: dict[str, Any] = {
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
        "teacher": {**outputs, "requires_grad": False},
        "student": {**outputs, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}},
        },
    }
    box = get_distillation_box(teacher, student, {"train": data}, config, options.device, None, False, 1)

    def step(views: torch.Tensor, labels: torch.Tensor, supplements: Any) -> None:
        loss = box.forward_process(views.to(options.device), labels.to(options.device), supplements)
        box.post_forward_process(loss)
        loss.item()  # its examples log the loss of every step

    return make_loader_contender(options, box.train_data_loader, step, steps)


def make_loop(options: BenchOptions, data: Dataset[Any], workers: int, step: Step, steps: int) -> Contender:
    """Return a contender that takes steps over a shuffled DataLoader, epoch after epoch."""
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True)
    return make_loader_contender(options, loader, step, steps)


def make_loader_contender(options: BenchOptions, loader: "DataLoader[Any]", step: Step, steps: int) -> Contender:
    """Return a contender that takes steps over a loader.

    The clock of a turn starts after some batches, so that the start of worker processes is not timed.
    """

    def take_turn() -> float:
        batches: Iterator[Any] = chain.from_iterable(repeat(loader))
        for _ in range(options.scale(_WARM_UP, 1) if loader.num_workers else 1):
            step(*next(batches))
        start, images = time.perf_counter(), 0
        for _ in range(steps):
            views, labels, *more = next(batches)
            step(views, labels, *more)
            images += len(views)
        if options.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / images

    return take_turn


def make_kd_step(options: BenchOptions, student: nn.Module, teacher: nn.Module | None) -> Step:
    """Return a training step of the student: Hinton's loss from a live teacher, or cross entropy without one."""
    student = student.to(options.device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step(views: torch.Tensor, labels: torch.Tensor) -> None:
        views, labels = views.to(options.device, non_blocking=True), labels.to(options.device, non_blocking=True)
        logits = student(views)
        loss = F.cross_entropy(logits, labels)
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = teacher(views)
            T = TEMPERATURE
            soft = F.kl_div(F.log_softmax(logits / T, 1), F.softmax(teacher_logits / T, 1), reduction="batchmean")
            loss = 0.9 * T * T * soft + 0.1 * loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


# Their data


def make_transforms(
    mean: Sequence[float] = (0.49, 0.48, 0.45), std: Sequence[float] = (0.25, 0.24, 0.26), crop: bool = True
) -> v2.Compose:
    """Return PIL image -> normalised float32 [C, H, W]; with crop, randomly cropped and flipped as usual for CIFAR."""
    augmentation = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if crop else []
    return v2.Compose([*augmentation, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class ImagesInMemory(Dataset[tuple[torch.Tensor, int]]):
    """n made-up images as PIL images in memory, as torchvision's CIFAR10 holds them."""

    def __init__(self, n: int) -> None:
        self.images = [to_pil_image(image) for image in fixtures.make_images(n, 3, 32)]
        self.transform = make_transforms()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[i]), i % 10


def make_image_folder(options: BenchOptions) -> Dataset[Any]:
    """Write made-up images as JPEGs, unless they are there; return them as an ImageFolder."""
    data = fixtures.write_jpegs(options.folder / "jpegs-32", options.scale(2560, 300), 32)
    images: Dataset[Any] = ImageFolder(f"{data.partition(':')[2]}/train", make_transforms())
    return images
