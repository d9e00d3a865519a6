"""Seconds to an accuracy, on real images: from measured parts, not from five trainings.

Live is the usual loop with a live teacher, in float32; cached is ours in bfloat16, with stage one once for so many
students. The epochs are those in which our student comes to its final accuracy on validation. The live student, who
sees as many views and the same teacher, is taken to need as many.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision.datasets import MNIST, ImageFolder

from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import find_weights_file, load_weights, read_state_dict
from softcache.stages.cli.configs import CacheConfig, StudentConfig, TeacherConfig
from softcache.stages.cli.console import Console
from softcache.stages.student.defaults import fill_defaults
from softcache.stages.student.phases import make_training_run
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.teacher import command as teacher_stage
from softcache.stages.teacher_cache.command import make_cache
from softcache.stages.training.checkpoint import read_epoch_lines
from softcache.stages.training.loop import train

from .baselines import kd_step, loop, transforms
from .interleaved import Found, Given, Missing, Side, fastest, interleaved, parts
from .student import Ours, job
from .subprocess_side import apart


def mnist(given: Given, students: int) -> Found:
    """`cnn` from `mlp:1200,1200` on 12,000 rows of MNIST, 4 epochs. Its teacher is trained before, and not counted."""
    if not Path(given.data_root, "MNIST/raw").is_dir() or not given.data_root:
        raise Missing("needs MNIST: DATA_ROOT= where torchvision finds it")
    run = given.folder / "mnist-teacher"
    common: dict[str, Any] = {"data": "mnist", "data_root": given.data_root, "train_size": given.few(12_000, 500)}
    if not run.exists():
        asked = TeacherConfig(**common, arch="mlp:1200,1200", epochs=given.few(3, 1), out=str(run), json=True)
        teacher_stage.train_teacher(teacher_stage.fill_defaults(asked), run, Console(True, epoch_lines=False))
    stage_one = CacheConfig(**common, teacher="mlp:1200,1200", weights=str(run), draws=1, json=True)
    usual = Subset(
        MNIST(given.data_root, transform=transforms((0.1307,), (0.3081,), crop=False)), range(given.few(12_000, 500))
    )
    return _to_target(given, stage_one, usual, "cnn", given.few(4, 1), students)


def cifar(given: Given, students: int) -> Found:
    """`resnet8` from ResNet-56 on 2,500 CIFAR-10 JPEGs at a short schedule, decoded in every epoch by both."""
    if not Path(given.cifar, "train").is_dir() or not given.cifar:
        raise Missing("needs JPEGs of CIFAR-10: CIFAR= a folder with train/<class> and test/<class>")
    if not Path(given.weights).is_file():
        raise Missing("needs a ResNet-56 for CIFAR-10: WEIGHTS= its state dict")
    stage_one = CacheConfig(
        data=f"folder:{_part(given)}",
        views="crop-flip",
        draws=1,
        teacher="resnet56",
        weights=given.weights,
        normalize="imagenet",
        precision="bfloat16",
        json=True,
    )
    usual = ImageFolder(_part(given) / "train", transforms())
    return _to_target(given, stage_one, usual, "resnet8", given.few(5, 1), students)


def _part(given: Given) -> Path:
    """250 training images and 20 to test of each class, of links."""
    part = given.folder / "cifar-part"
    for split, count in (("train", given.few(250, 20)), ("test", 20)):
        for own in sorted(path for path in Path(given.cifar, split).iterdir() if path.is_dir()):
            (part / split / own.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(own.glob("*.jpg"))[:count]:
                target = part / split / own.name / image.name
                if not target.exists():
                    shutil.copyfile(image, target)
    return part


def _to_target(given: Given, asked: CacheConfig, usual: Dataset[Any], arch: str, epochs: int, students: int) -> Found:
    cache = given.folder / f"target-{arch}"
    begun = time.perf_counter()
    asked, _ = make_cache(replace(asked, out=str(cache), device=str(given.device)), Console(True, epoch_lines=False))
    one = time.perf_counter() - begun
    learned = StudentConfig(
        data=asked.data,
        data_root=asked.data_root,
        cache=(str(cache),),
        arch=arch,
        epochs=epochs,
        loss=("kd:temperature=4",),
        precision="bfloat16",
        device=str(given.device),
        json=True,
    )
    config = fill_defaults(learned)
    opened = DistillationSetup.open(config)
    final, reached = _epoch_of_final(given, config, opened)
    ours = job(given, config, opened, False, "cached")
    teacher = _teacher(given, asked, opened).network.to(memory_format=torch.contiguous_format)
    student = build(arch, opened.cache.classes, opened.input_spec.channels, opened.input_spec.size)
    theirs = {f"{n} workers": (live_side, (given, usual, n, student, teacher, given.few(10, 1))) for n in (0, 2)}
    with apart(theirs) as sides:
        found = interleaved({**sides, "cached": Ours(ours, given.few(min(ours.steps, 40), 1))}, given.few(3, 1))
    live = fastest(*(found[name] for name in theirs))
    images = len(ours.stream.rows) * reached
    shutil.rmtree(cache)
    values = [
        students * a * images / (one + students * b * images) for a, b in zip(live, found["cached"], strict=True)
    ]
    return Found(
        values,
        f"computed: stage one {one:.1f} s, epochs until {final:.3f} {reached},"
        f" of {len(ours.stream.rows):,} images; {parts(found)}",
    )


def live_side(
    given: Given, usual: Dataset[Any], workers: int, student: nn.Module, teacher: nn.Module, steps: int
) -> Side:
    """The usual loop with this teacher."""
    return loop(given, usual, workers, kd_step(given, student, teacher), steps)


def _epoch_of_final(given: Given, config: StudentConfig, opened: DistillationSetup) -> tuple[float, int]:
    """The student's final accuracy on validation, and the first epoch that reached it: one whole training."""
    folder = given.folder / f"target-run-{time.monotonic_ns()}"
    labels = opened.transfer_set.splits["train"].labels
    network = opened.build_student(config, opened.losses)
    train(
        make_training_run("student", config, opened, network, opened.losses, labels, folder),
        opened.held_out["val"],
        Console(True, epoch_lines=False),
    )
    accuracies = [line["val_accuracy"] for line in read_epoch_lines(folder)]
    return accuracies[-1], 1 + next(i for i, a in enumerate(accuracies) if a >= accuracies[-1])


def _teacher(given: Given, asked: CacheConfig, opened: DistillationSetup) -> PreparedModel:
    """The teacher of the cache, in eval mode."""
    input_spec = opened.cache.input_spec
    network = build(asked.teacher, opened.cache.classes, input_spec.channels, input_spec.size)
    load_weights(network, read_state_dict(find_weights_file(Path(asked.weights))), asked.weights)
    return PreparedModel(network, input_spec).to(given.device).eval()
