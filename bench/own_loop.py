"""Rows about the public loader: a loop of a user's own against the trainer of the commands, and against a
DataLoader."""

import time
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import softcache
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.training.loop import WORTH_THREADS
from softcache.stages.training.schedule import LearningRateSchedule

from . import fixtures
from .measurement import BenchOptions, Measurement
from .student import TrainingLoop, build_sgd, make_run, write_cifar_cache, write_mnist_cache
from .timing import Contender, divide, format_medians, time_in_turns


class OwnLoop:
    """A contender: a training loop as a user writes it, over the public loader. A turn is an epoch.

    Args:
        config: of the student, defaults filled in.
        setup: what it is trained from.
    """

    def __init__(self, config: StudentConfig, setup: DistillationSetup):
        self.loader = setup.source.loader("train", batch_size=config.batch_size, device=setup.device)
        self.criterion = softcache.DistillationLoss(*config.loss)
        self.student = setup.build_student(config, setup.losses).to(setup.device)
        if any(isinstance(module, nn.Conv2d) for module in self.student.modules()):
            self.student = self.student.to(memory_format=torch.channels_last)
        self.optimizer = build_sgd(config, self.student.parameters())
        schedule = LearningRateSchedule(config, 1000 * len(self.loader))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def __call__(self) -> float:
        images, start = 0, time.perf_counter()
        self.student.train()
        for batch in self.loader:
            loss = self.criterion(self.student(batch.images), batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            images += len(batch)
        float(loss.detach())
        return (time.perf_counter() - start) / images


def with_threads(contender: Contender, threads: int) -> Contender:
    """Return a contender that takes its turns with some number of CPU threads."""

    def take_turn() -> float:
        torch.set_num_threads(threads)
        return contender()

    return take_turn


def compare_own_loop_with_trainer(options: BenchOptions, arch: str, rounds: int = 15) -> Measurement:
    """Time of an epoch of a user's own loop / of the trainer of the commands, for one image."""
    is_mnist = arch.startswith("mlp")
    data, cache = write_mnist_cache(options) if is_mnist else write_cifar_cache(options)
    config, setup = fixtures.open_setup(cache, data, arch, loss=("kd:temperature=4,weight=0.9", "hard:weight=0.1"))
    run = make_run(options, config, setup, "trainer")
    # As many threads as the trainer takes.
    threads = 1 if run.multiply_adds * config.batch_size < WORTH_THREADS else torch.get_num_threads()
    contenders: dict[str, Contender] = {
        "own loop": with_threads(OwnLoop(config, setup), threads),
        "trainer": with_threads(TrainingLoop(run, run.stream.steps_per_epoch), threads),
    }
    seconds = time_in_turns(contenders, options.scale(rounds, 1))
    return Measurement(divide(seconds["own loop"], seconds["trainer"]), format_medians(seconds))


def compare_loader_with_data_loader(options: BenchOptions, size: int, rounds: int = 15) -> Measurement:
    """Images a second of the public loader / of a DataLoader over a TensorDataset of the same views and targets.

    Args:
        options: of the benchmark.
        size: 28 for images like MNIST's, 32 for images like CIFAR-10's.
        rounds: of the comparison.
    """
    data, cache = write_mnist_cache(options) if size == 28 else write_cifar_cache(options)
    config, setup = fixtures.open_setup(cache, data, "mlp:64")
    source = setup.source
    loader = source.loader("train", batch_size=config.batch_size)
    index = range(source.splits["train"])
    tensors = source.render("train", index), source.labels("train"), source.targets("train", index)
    data_loader = DataLoader(TensorDataset(*tensors), batch_size=config.batch_size, shuffle=True)

    def take_batches(batches: Iterable[object]) -> float:
        start = time.perf_counter()
        for _ in batches:
            pass
        return (time.perf_counter() - start) / len(index)

    contenders = {"loader": lambda: take_batches(loader), "DataLoader": lambda: take_batches(data_loader)}
    seconds = time_in_turns(contenders, options.scale(rounds, 1))
    return Measurement(divide(seconds["DataLoader"], seconds["loader"]), format_medians(seconds))
