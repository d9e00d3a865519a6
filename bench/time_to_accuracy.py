"""Rows about the time to an accuracy on real images. It is computed from measured parts, not from whole trainings.

The live student trains in the usual loop with a live teacher, in float32. The cached students train in softcache's
loop in bfloat16, after one stage one that all of them share. The number of epochs is measured: those in which the
cached student first comes to its final accuracy on the validation split. The live student is assumed to need as many,
because it has the same teacher and sees as many views.
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

from .baselines import make_kd_step, make_loop, make_transforms
from .measurement import BenchOptions, Measurement, NotMeasurable
from .other_process import start_in_other_process
from .student import TrainingLoop, make_run
from .timing import Contender, format_medians, take_fastest, time_in_turns


def compare_on_mnist(options: BenchOptions, students: int) -> Measurement:
    """Time of live students / of cached students: `cnn` from `mlp:1200,1200`, 12,000 rows of MNIST, 4 epochs.

    The teacher is trained before, and its training is not counted.

    Args:
        options: of the benchmark.
        students: how many share one stage one.

    Raises:
        NotMeasurable: without the files of MNIST.
    """
    if not Path(options.data_root, "MNIST/raw").is_dir() or not options.data_root:
        raise NotMeasurable("needs MNIST: DATA_ROOT= its folder, as torchvision lays it out")
    run = options.folder / "mnist-teacher"
    rows = options.scale(12_000, 500)
    common: dict[str, Any] = {"data": "mnist", "data_root": options.data_root, "train_size": rows}
    if not run.exists():
        config = TeacherConfig(**common, arch="mlp:1200,1200", epochs=options.scale(3, 1), out=str(run), json=True)
        teacher_stage.train_teacher(teacher_stage.fill_defaults(config), run, Console(True, epoch_lines=False))
    stage_one = CacheConfig(**common, teacher="mlp:1200,1200", weights=str(run), draws=1, json=True)
    images = MNIST(options.data_root, transform=make_transforms((0.1307,), (0.3081,), crop=False))
    return _compare(
        options, stage_one, Subset(images, range(rows)), "cnn", epochs=options.scale(4, 1), students=students
    )


def compare_on_cifar(options: BenchOptions, students: int) -> Measurement:
    """Time of live students / of cached students: `resnet8` from ResNet-56, 2,500 JPEGs of CIFAR-10, 5 epochs.

    Both decode every image in every epoch.

    Args:
        options: of the benchmark.
        students: how many share one stage one.

    Raises:
        NotMeasurable: without the images, or the weights of a ResNet-56.
    """
    if not Path(options.cifar, "train").is_dir() or not options.cifar:
        raise NotMeasurable("needs JPEGs of CIFAR-10: CIFAR= a folder with train/<class> and test/<class>")
    if not Path(options.weights).is_file():
        raise NotMeasurable("needs a ResNet-56 for CIFAR-10: WEIGHTS= its state dict")
    folder = _copy_part_of_cifar(options)
    stage_one = CacheConfig(
        data=f"folder:{folder}",
        views="crop-flip",
        draws=1,
        teacher="resnet56",
        weights=options.weights,
        normalize="imagenet",
        precision="bfloat16",
        json=True,
    )
    images = ImageFolder(folder / "train", make_transforms())
    return _compare(options, stage_one, images, "resnet8", epochs=options.scale(5, 1), students=students)


def _copy_part_of_cifar(options: BenchOptions) -> Path:
    """Copy 250 training and 20 test images of each class; return the folder."""
    folder = options.folder / "cifar-part"
    for split, count in (("train", options.scale(250, 20)), ("test", 20)):
        for class_folder in sorted(path for path in Path(options.cifar, split).iterdir() if path.is_dir()):
            target_folder = folder / split / class_folder.name
            target_folder.mkdir(parents=True, exist_ok=True)
            for image in sorted(class_folder.glob("*.jpg"))[:count]:
                if not (target_folder / image.name).exists():
                    shutil.copyfile(image, target_folder / image.name)
    return folder


def _compare(
    options: BenchOptions, stage_one: CacheConfig, images: Dataset[Any], arch: str, *, epochs: int, students: int
) -> Measurement:
    """Time of live students / of stage one and as many cached students.

    Args:
        options: of the benchmark.
        stage_one: options of the cache.
        images: the training images of the usual loop.
        arch: of the students.
        epochs: of the training that finds the number of epochs.
        students: how many share one stage one.
    """
    cache = options.folder / f"target-{arch}"
    start = time.perf_counter()
    stage_one = replace(stage_one, out=str(cache), device=str(options.device))
    stage_one, _ = make_cache(stage_one, Console(True, epoch_lines=False))
    stage_one_seconds = time.perf_counter() - start
    config = fill_defaults(
        StudentConfig(
            data=stage_one.data,
            data_root=stage_one.data_root,
            cache=(str(cache),),
            arch=arch,
            epochs=epochs,
            loss=("kd:temperature=4",),
            precision="bfloat16",
            device=str(options.device),
            json=True,
        )
    )
    setup = DistillationSetup.open(config)
    accuracy, epochs_needed = _measure_epochs(options, config, setup)
    cached = make_run(options, config, setup, "cached")
    teacher = _load_teacher(options, stage_one, setup).network.to(memory_format=torch.contiguous_format)
    student = build(arch, setup.cache.classes, setup.input_spec.channels, setup.input_spec.size)
    steps = options.scale(10, 1)
    baselines = {f"{n} workers": (make_live_loop, (options, images, n, student, teacher, steps)) for n in (0, 2)}
    with start_in_other_process(baselines) as contenders:
        cached_loop = TrainingLoop(cached, options.scale(min(cached.steps, 40), 1))
        seconds = time_in_turns({**contenders, "cached": cached_loop}, options.scale(3, 1))
    shutil.rmtree(cache)
    live = take_fastest(*(seconds[name] for name in baselines))
    rows = len(cached.stream.rows)
    views = rows * epochs_needed
    values = [
        students * live_seconds * views / (stage_one_seconds + students * cached_seconds * views)
        for live_seconds, cached_seconds in zip(live, seconds["cached"], strict=True)
    ]
    return Measurement(
        values,
        f"computed: stage one {stage_one_seconds:.1f} s, epochs until {accuracy:.3f} {epochs_needed},"
        f" of {rows:,} images; {format_medians(seconds)}",
    )


def make_live_loop(
    options: BenchOptions, images: Dataset[Any], workers: int, student: nn.Module, teacher: nn.Module, steps: int
) -> Contender:
    """Return the usual loop with a live teacher."""
    return make_loop(options, images, workers, make_kd_step(options, student, teacher), steps)


def _measure_epochs(options: BenchOptions, config: StudentConfig, setup: DistillationSetup) -> tuple[float, int]:
    """Train the student once; return its final validation accuracy and the first epoch that reached it."""
    folder = options.folder / f"target-run-{time.monotonic_ns()}"
    labels = setup.transfer_set.splits["train"].labels
    network = setup.build_student(config, setup.losses)
    run = make_training_run("student", config, setup, network, setup.losses, labels, folder)
    train(run, setup.held_out["val"], Console(True, epoch_lines=False))
    accuracies = [line["val_accuracy"] for line in read_epoch_lines(folder)]
    final = accuracies[-1]
    return final, 1 + next(i for i, accuracy in enumerate(accuracies) if accuracy >= final)


def _load_teacher(options: BenchOptions, stage_one: CacheConfig, setup: DistillationSetup) -> PreparedModel:
    """Return the teacher of the cache, in eval mode."""
    input_spec = setup.cache.input_spec
    network = build(stage_one.teacher, setup.cache.classes, input_spec.channels, input_spec.size)
    load_weights(network, read_state_dict(find_weights_file(Path(stage_one.weights))), stage_one.weights)
    return PreparedModel(network, input_spec).to(options.device).eval()
