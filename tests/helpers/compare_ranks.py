"""`torchrun … compare_ranks.py CACHE ARCH BATCH METHOD …` trains a student by all ranks together and by each alone.

Prints a JSON object: {method: [largest difference of a weight between both, largest change of a weight by training]}.
Raises when the ranks end with different weights.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.distributed import ranks
from softcache.stages.student.methods import METHODS
from softcache.stages.student.phases import make_training_run
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.training.loop import train
from softcache.stages.training.run import TrainingRun

LAYERS = {"all": "relu1+relu2", "last": "relu2", "s_all": "relu1+relu2", "s_last": "relu2"}


def train_weights(run: TrainingRun, setup: DistillationSetup, console: Console) -> dict[str, torch.Tensor]:
    """Train, and return the weights."""
    train(run, setup.held_out["val"], console)
    return {name: value.detach().clone() for name, value in run.model.named_parameters()}


def max_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of a weight."""
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def main(cache: str, arch: str, batch: str, names: list[str]) -> None:
    """Train by every method, and print the differences."""
    console, differences = Console(True), {}
    config = StudentConfig(
        cache=(cache,),
        arch=arch,
        loss=("hard",),
        draws=2,
        epochs=2,
        batch_size=int(batch),
        learning_rate=0.02,
        weight_decay=5e-4,
        clip_norm=1.0,
        warmup=0.0,
        schedule="constant",
        device="cpu",
    )
    shared = DistillationSetup.open(config)
    for name in names or METHODS:
        method_config = replace(config, loss=tuple(spec.format(**LAYERS) for spec in METHODS.get(name, (name,))))
        setup = shared.with_options(method_config)

        def make_run(
            folder: str, config: StudentConfig = method_config, setup: DistillationSetup = setup
        ) -> TrainingRun:
            network: nn.Module = setup.build_student(config, setup.losses)
            labels = setup.transfer_set.splits["train"].labels
            return make_training_run("student", config, setup, network, setup.losses, labels, Path(folder))

        initial = {name: value.detach().clone() for name, value in make_run("x").model.named_parameters()}
        by_all = train_weights(make_run(f"{name}-together"), setup, console)
        with ranks.as_single_process():
            alone = train_weights(make_run(f"{name}-alone-{ranks.LAUNCHED.rank}"), setup, console)
        differences[name] = [max_difference(by_all, alone), max_difference(initial, alone)]
        ranks.check_equal(f"student of {name}", str([value.tolist() for value in by_all.values()]))
    console.print_json(json.dumps(differences))


if __name__ == "__main__":
    with ranks.process_group("test", {"device": "cpu"}):
        main(*sys.argv[1:4], sys.argv[4:])
