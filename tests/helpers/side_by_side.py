"""torchrun … tests/side_by_side.py CACHE ARCH BATCH METHOD …: the same training by rank 0 alone and by all ranks.

Prints, as one JSON object, {method: [how far the weights are apart at most, how far training moved them at most]}, of
the student. Raises when the ranks end with different weights.
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


def weights_after(job: TrainingRun, material: DistillationSetup, console: Console) -> dict[str, torch.Tensor]:
    train(job, material.held_out["val"], console)
    return {name: value.detach().clone() for name, value in job.model.named_parameters()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main(cache: str, arch: str, batch: str, names: list[str]) -> None:
    console, found = Console(True), {}
    settings = StudentConfig(
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
    shared = DistillationSetup.open(settings)
    for name in names or METHODS:
        asked = replace(settings, loss=tuple(spec.format(**LAYERS) for spec in METHODS.get(name, (name,))))
        material = shared.with_options(asked)

        def job(folder: str, asked: StudentConfig = asked, material: DistillationSetup = material) -> TrainingRun:
            network: nn.Module = material.build_student(asked, material.losses)
            labels = material.transfer_set.splits["train"].labels
            return make_training_run("student", asked, material, network, material.losses, labels, Path(folder))

        begun = {name: value.detach().clone() for name, value in job("x").model.named_parameters()}
        together = weights_after(job(f"{name}-together"), material, console)
        with ranks.as_single_process():
            apart = weights_after(job(f"{name}-alone-{ranks.LAUNCHED.rank}"), material, console)
        found[name] = [furthest(together, apart), furthest(begun, apart)]
        ranks.check_equal(f"student of {name}", str([value.tolist() for value in together.values()]))
    console.print_json(json.dumps(found))


if __name__ == "__main__":
    with ranks.process_group("cpu"):
        main(*sys.argv[1:4], sys.argv[4:])
