"""`softcache born-again`: each student becomes the next one's teacher; at the end all of them answer together.

Born-again networks: Furlanello et al. 2018 (arXiv 1805.04770). With an arch for each generation it is a chain of
teacher assistants: Mirzadeh et al. 2020 (arXiv 1902.03393).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.base.errors import Interrupted, UsageError
from softcache.base.files import make_folder, publish_json
from softcache.pipeline.losses.base import list_teacher_taps
from softcache.pipeline.losses.classifier import SimKD
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.pipeline.taps.hooks import list_layers
from softcache.pipeline.taps.statistics import parse_tap
from softcache.stages.cli.configs import BornAgainConfig, StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import program_name, read_cache_config
from softcache.stages.runs.folder import find_free_folder
from softcache.stages.teacher_cache import command as cache_stage

from . import command as student_stage
from .defaults import fill_defaults, to_student_config
from .recipes import apply_recipe
from .setup import DistillationSetup


def run(config: BornAgainConfig, said: set[str]) -> None:
    """Student, cache, student, cache …; then the ensemble. The same command with --out goes on with what is there."""
    console = Console(config.json)
    if config.resume or config.seeds > 1 or config.labelled:
        raise UsageError("born-again takes no --resume (the same command with --out goes on), --seeds or --labelled")
    folder = Path(config.out) if config.out else find_free_folder("born-again")
    archs = _archs(config)
    first = fill_defaults(apply_recipe(to_student_config(config), said))
    setup = DistillationSetup.open(first)
    _check(archs, first, setup)
    student_stage.print_notes(first, setup, console)
    make_folder(folder)
    caches, results = first.cache, []
    try:
        for generation, arch in enumerate(archs, 1):
            own = replace(
                first,
                arch=arch or first.arch,
                cache=caches,
                seed=first.seed + generation - 1,
                out=str(folder / f"generation-{generation}"),
                baseline=first.baseline and generation == 1,
            )
            console.print(f"generation {generation} of {len(archs)}: {own.arch}, taught by {' and '.join(caches)}")
            results.append(
                student_stage.train_or_resume(own, DistillationSetup.open(own), console) | {"cache_folder": caches[0]}
            )
            if generation < len(archs):
                caches = (_next_cache(own, setup, folder / f"cache-{generation}", console),)
                # The students learned from the blend, and what the map has mended is mended in them.
                first = replace(first, combine="", map="", missing="")
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped; the same command with --out {folder} goes on") from None
    result = _result(config, setup, folder, results)
    publish_json(folder / "result.json", result)
    if config.json:
        return console.print_json(json.dumps(result))
    _report(result, folder, console)


def _archs(config: BornAgainConfig) -> list[str]:
    """One arch per generation; "" where --arch, or the recipe, says which."""
    if not config.archs:
        return [""] * config.generations
    archs = config.archs.replace(" ", "+").split("+")
    if config.arch or not all(archs):
        raise UsageError(f"--archs {config.archs} names an arch for each generation; leave out --arch")
    return archs


def _check(archs: list[str], first: StudentConfig, setup: DistillationSetup) -> None:
    """Find what would stop the chain later before anything is made. Raises UsageError."""
    if any(isinstance(loss, SimKD) for loss in setup.losses):
        raise UsageError("born-again cannot go on from 'simkd': its students answer through their teacher's layer")
    layers = {parse_tap(tap)[0] for tap in list_teacher_taps(setup.losses)}
    for arch in dict.fromkeys(archs):
        network = setup.build_student(replace(first, arch=arch or first.arch), setup.losses)
        missing = sorted(layers - set(list_layers(network)))
        if missing and arch in archs[:-1]:
            raise UsageError(
                f"{arch or first.arch} is to teach and has no '{missing[0]}', which the losses ask of a teacher"
            )


def _next_cache(config: StudentConfig, setup: DistillationSetup, out: Path, console: Console) -> str:
    """The cache of a student, of the same views as the first one, with the taps that the losses want."""
    like = read_cache_config(setup.cache)
    asked = replace(
        like,
        data=config.data or like.data,
        data_root=config.data_root,
        teacher="",
        weights=config.out,
        normalize="",
        taps=",".join(list_teacher_taps(setup.losses)),
        device=config.device,
        workers=config.workers,
        out=str(out),
        json=False,
        license="",
    )
    cache_stage.make_cache(asked, console)
    return str(out)


def _result(
    config: BornAgainConfig, setup: DistillationSetup, folder: Path, results: list[dict[str, Any]]
) -> dict[str, Any]:
    said = list(_probabilities(setup, folder, results))
    together = {split: np.mean([one[split] for one in said], axis=0) for split in said[0]}
    return {
        "settings": asdict(config),
        "teacher": results[0]["teacher"],
        "generations": [
            {"run": str(folder / f"generation-{g}"), "cache": r["cache_folder"], "student": r["student"]}
            for g, r in enumerate(results, 1)
        ],
        "baseline": results[0].get("baseline"),
        "ensemble": {
            split: evaluate(
                np.log(np.maximum(p, 1e-30)).astype(np.float32),
                setup.held_out[split].labels,
                setup.teacher_logits[split].numpy(),
                setup.class_counts,
            )
            for split, p in together.items()
        },
    }


def _probabilities(setup: DistillationSetup, folder: Path, results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """{split: softmax [N, K]} of each generation: probabilities are averaged: logits have no common scale."""
    for generation, result in enumerate(results, 1):
        path = folder / f"generation-{generation}" / "student.pt"
        network = setup.build_network(result["student"]["arch"])
        load_weights(network, read_state_dict(path), str(path))
        model = PreparedModel(network, setup.input_spec).to(setup.device)
        yield {
            split: torch.from_numpy(rows.logits(model)).double().softmax(1).numpy()
            for split, rows in setup.held_out.items()
        }


def _report(result: dict[str, Any], folder: Path, console: Console) -> None:
    split = "test" if "test" in result["ensemble"] else "val"

    def line(name: str, figures: dict[str, Any]) -> None:
        agreement = f", agreement with the first teacher {figures['agreement']:.4f}" if "agreement" in figures else ""
        console.print(f"{name}: {split} accuracy {figures['accuracy']:.4f}, NLL {figures['nll']:.4f}{agreement}")

    line("teacher", result["teacher"][split])
    for number, generation in enumerate(result["generations"], 1):
        student = generation["student"]
        console.print(
            f"generation {number} ({student['arch']}): {split} accuracy {student[split]['accuracy']:.4f},"
            f" agreement with its teacher {student[split]['agreement']:.4f}"
        )
    line(f"all {len(result['generations'])} together", result["ensemble"][split])
    console.print(f"run:   {folder}")
    console.print(f"next:  {program_name()} evaluate {folder / 'generation-1'}")
