"""`softcache born-again`: each student is the teacher of the next one; at the end all of them form an ensemble.

Born-again networks: Furlanello et al. 2018 (arXiv 1805.04770). With an arch for each generation it is a chain of
teacher assistants: Mirzadeh et al. 2020 (arXiv 1902.03393).
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import Interrupted, UsageError
from softcache.base.files import make_folder, publish_json
from softcache.data.tasks import CLASSES, EMBEDDING, NUMBERS
from softcache.pipeline.losses.base import list_teacher_taps
from softcache.pipeline.losses.classifier import SimKD
from softcache.pipeline.metrics.tasks import TASK_FIGURES, evaluate_task
from softcache.pipeline.models import is_external_arch
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.pipeline.taps.hooks import list_layers
from softcache.pipeline.taps.statistics import parse_tap
from softcache.stages.cli.configs import BornAgainConfig, EvaluateConfig, StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import format_command, read_cache_config
from softcache.stages.cli.new_folders import make_new_folder
from softcache.stages.cli.typed_command import format_typed_command
from softcache.stages.runs.figures import Figures, choose_split, get_task
from softcache.stages.runs.folder import to_settings
from softcache.stages.teacher_cache import command as cache_stage

from .command import print_notes
from .defaults import fill_defaults, to_student_config
from .early_checks import check_before_images, check_names
from .own_losses import check_own_losses
from .recipes import apply_recipe
from .setup import DistillationSetup
from .student_run import train_or_resume
from .teachers import open_caches

_AGREEMENT = {"agreement": "agreement with", "r2_to_teacher": "R² to"}


def run(config: BornAgainConfig, explicit: set[str]) -> None:
    """Train a student, make a cache of it, train the next student from that cache, and so on; evaluate the ensemble.

    The same command with the same --out continues a chain that was stopped.

    Args:
        config: the options of the command.
        explicit: the names of the options that were typed on the command line.
    """
    console = Console(config.json)
    if config.resume or config.seeds > 1 or config.labelled:
        raise UsageError("born-again takes no --resume (the same command with --out continues), --seeds or --labelled")
    folder = Path(config.out) if config.out else make_new_folder("born-again")
    archs = _list_archs(config)
    base_config = apply_recipe(to_student_config(config), explicit)
    check_names(base_config)
    base_config = fill_defaults(base_config)
    if (task := open_caches(base_config.cache)[0].task) == EMBEDDING:
        raise UsageError(
            f"born-again makes teachers of its students, and the task {task} has no hard targets for them: train a"
            " student of it instead"
        )
    for arch in dict.fromkeys(archs):
        check_before_images(replace(base_config, arch=arch or base_config.arch), open_caches(base_config.cache))
    _check_folder(folder)
    setup = DistillationSetup.open(base_config)
    _check_chain(archs, base_config, setup, console)
    print_notes(base_config, setup, console)
    make_folder(folder)
    try:
        results = _train_chain(archs, base_config, setup, folder, console)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped; continue with  {format_typed_command(str(folder))}") from None
    result = _assemble_result(config, setup, folder, results)
    publish_json(folder / "result.json", result)
    if config.json:
        console.print_json(json.dumps(result))
    else:
        _report(result, folder, console)


def _list_archs(config: BornAgainConfig) -> list[str]:
    """One arch per generation; "" stands for --arch, or the default of the data set."""
    if not config.archs:
        return [""] * config.generations
    archs = config.archs.replace(" ", "+").split("+")
    if config.arch or not all(archs):
        raise UsageError(f"--archs {config.archs} names an arch for each generation; leave out --arch")
    return archs


def _check_folder(folder: Path) -> None:
    """Raise UsageError for a folder that holds something other than a chain of students."""
    known = ("generation-", "cache-", "result.json", ".")
    if folder.is_dir() and not all(path.name.startswith(known) for path in folder.iterdir()):
        raise UsageError(f"'{folder}' exists and is not the folder of a chain: choose another --out")


def _check_chain(archs: list[str], base_config: StudentConfig, setup: DistillationSetup, console: Console) -> None:
    """Check, before anything is written, that every student can be trained and can teach the next one."""
    if any(isinstance(loss, SimKD) for loss in setup.losses):
        raise UsageError("born-again does not go with 'simkd': its students end in their teacher's last layer")
    layers = {parse_tap(tap)[0] for tap in list_teacher_taps(setup.losses)}
    for arch in dict.fromkeys(archs):
        config = replace(base_config, arch=arch or base_config.arch)
        student_setup = setup.with_options(config)
        network = student_setup.build_student(config, student_setup.losses)
        for note in student_setup.check_student(network, config):
            console.print(note)
        check_own_losses(config, student_setup)
        missing = sorted(layers - set(list_layers(network)))
        if missing and arch in archs[:-1]:
            raise UsageError(
                f"{arch or base_config.arch} would be a teacher and has no '{missing[0]}', which a loss reads of the"
                " teacher"
            )


def _train_chain(
    archs: list[str], base_config: StudentConfig, setup: DistillationSetup, folder: Path, console: Console
) -> list[dict[str, Any]]:
    """Train the students one after the other.

    Args:
        archs: one per generation, "" for that of base_config.
        base_config: the options of the first student; the others differ in seed, arch and cache.
        setup: what the first student is trained from.
        folder: the folder of the chain.
        console: for progress.

    Returns:
        The result.json of each student, with `cache_folder`, the first cache that it was trained from.
    """
    caches, results = base_config.cache, []
    for generation, arch in enumerate(archs, 1):
        student_config = replace(
            base_config,
            arch=arch or base_config.arch,
            cache=caches,
            seed=base_config.seed + generation - 1,
            out=str(folder / f"generation-{generation}"),
            baseline=base_config.baseline and generation == 1,
        )
        console.print(
            f"generation {generation} of {len(archs)}: {student_config.arch}, trained from {' and '.join(caches)}"
        )
        result = train_or_resume(student_config, DistillationSetup.open(student_config), console)
        results.append(result | {"cache_folder": caches[0]})
        if generation < len(archs):
            caches = (_make_cache(student_config, setup, folder / f"cache-{generation}", console),)
            # The student has learned the combination and the map of the first teachers: they are not applied twice.
            base_config = replace(base_config, combine="", map="", missing="")
    return results


def _make_cache(student_config: StudentConfig, setup: DistillationSetup, folder: Path, console: Console) -> str:
    """Make the cache of a student, of the views of the first cache and with the taps that the losses read."""
    base_config = read_cache_config(setup.cache)
    cache_config = replace(
        base_config,
        data=student_config.data or base_config.data,
        data_root=student_config.data_root,
        # What a run names is not imported unless the command line names it, and here it did.
        teacher=student_config.arch if is_external_arch(student_config.arch) else "",
        weights=student_config.out,
        normalize="",
        outputs="logits",
        taps=",".join(list_teacher_taps(setup.losses)),
        device=student_config.device,
        workers=student_config.workers,
        out=str(folder),
        json=False,
        license="",
    )
    cache_stage.make_cache(cache_config, console)
    return str(folder)


def _assemble_result(
    config: BornAgainConfig, setup: DistillationSetup, folder: Path, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """Assemble result.json: the figures of each student and of their ensemble.

    The ensemble is the mean of their probabilities, or of their numbers.
    """
    task = setup.cache.task
    predictions = list(_compute_predictions(setup, folder, results))
    ensemble = {}
    for split, held_out in setup.held_out.items():
        mean = np.mean([of_student[split] for of_student in predictions], axis=0)
        outputs = _to_outputs(mean, task).astype(np.float32)
        teacher_outputs = setup.teacher_logits[split].numpy()
        ensemble[split] = evaluate_task(task, outputs, held_out.labels, teacher_outputs, setup.class_counts)
    return {
        "settings": to_settings(config),
        **({} if task == CLASSES else {"task": task}),
        "teacher": results[0]["teacher"],
        "generations": [
            {"run": str(folder / f"generation-{g}"), "cache": result["cache_folder"], "student": result["student"]}
            for g, result in enumerate(results, 1)
        ],
        "baseline": results[0].get("baseline"),
        "ensemble": ensemble,
    }


def _to_outputs(mean: NDArray[np.float64], task: str) -> NDArray[np.float64]:
    """Turn mean probabilities or numbers [N, K] into outputs of the task."""
    if task == NUMBERS:
        return mean
    log_mean = np.log(np.maximum(mean, 1e-30))
    return log_mean if task == CLASSES else log_mean - np.log(np.maximum(1 - mean, 1e-30))


def _to_predictions(outputs: torch.Tensor, task: str) -> torch.Tensor:
    """Turn outputs [N, K] of a student into the probabilities of classes or labels, or into numbers."""
    if task == NUMBERS:
        return outputs
    return outputs.softmax(1) if task == CLASSES else outputs.sigmoid()


def _compute_predictions(
    setup: DistillationSetup, folder: Path, results: list[dict[str, Any]]
) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Yield {split: predictions [N, K]} of each student: the softmax of classes, the sigmoids of labels, numbers.

    Probabilities are averaged, as logits have no common scale.
    """
    for generation, result in enumerate(results, 1):
        path = folder / f"generation-{generation}" / "student.pt"
        student_setup = replace(setup, input_spec=InputSpec.from_json(result["student"]["preparation"]))
        network = student_setup.build_network(result["student"]["arch"])
        load_weights(network, read_state_dict(path), str(path))
        model = PreparedModel(network, student_setup.input_spec).to(setup.device)
        yield {
            split: _to_predictions(torch.from_numpy(logits).double(), setup.cache.task).numpy()
            for split, logits in setup.compute_logits(model).items()
        }


def _report(result: dict[str, Any], folder: Path, console: Console) -> None:
    """Print a line for the first teacher, each student and the ensemble, and a command to run next."""
    split = choose_split(result["ensemble"])
    teacher, ensemble = Figures(result["teacher"][split]), Figures(result["ensemble"][split])
    task = get_task(result)
    main, agreement = TASK_FIGURES[task].main, "r2_to_teacher" if task == NUMBERS else "agreement"
    figures = (main, "mae") if task == NUMBERS else (main, "nll")
    console.print(f"teacher: {split} {teacher.describe(figures)}")
    for number, generation in enumerate(result["generations"], 1):
        student = Figures(generation["student"][split])
        console.print(
            f"generation {number} ({generation['student']['arch']}): {split}"
            f" {_format_label_figures(student, (main,))}{_AGREEMENT[agreement]} its teacher"
            f" {student.format(agreement)}"
        )
    console.print(
        f"ensemble of all {len(result['generations'])}: {split} {_format_label_figures(ensemble, figures)}"
        f"{_AGREEMENT[agreement]} the first teacher {ensemble.format(agreement)}"
    )
    console.print(f"run:   {folder}")
    arch = str(result["generations"][0]["student"]["arch"])
    config = EvaluateConfig(arch=arch if is_external_arch(arch) else "")
    console.print(f"next:  {format_command('evaluate', config, folder / 'generation-1')}")


def _format_label_figures(figures: Figures, names: tuple[str, ...]) -> str:
    """Format figures that need labels, followed by a comma; nothing where there are no labels."""
    return f"{figures.describe(names)}, " if figures.has_labels() else ""
