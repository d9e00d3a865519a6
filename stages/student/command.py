"""`softcache student`: stage two. Train a student from a cache; the teacher is not needed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softcache.data.sources import has_argument, short_name
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, find_known
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.cli.typed_command import format_resume_command
from softcache.stages.distributed.ranks import is_first, process_group
from softcache.stages.runs.cost import format_cost
from softcache.stages.runs.data import has_labels
from softcache.stages.runs.figures import Figures, choose_split
from softcache.stages.runs.folder import find_unfinished_runs, open_run
from softcache.stages.runs.results_table import print_table
from softcache.stages.training.data_parallel import check_batches_shareable, note_batch_norm

from .defaults import fill_defaults
from .early_checks import check_names
from .gain import explain_gain
from .own_losses import check_own_losses
from .recipes import apply_recipe
from .setup import DistillationSetup
from .student_run import train_student
from .teachers import describe_teachers

# Losses that do not train a student well by themselves, and what to add to each.
_SINGLE_LOSS_ADVICE = {
    "soft_f1": "soft_f1 alone forgets rare classes: add kd or hard, see --recipe f1",
    "balanced_kd": "balanced_kd alone does not use the labels: add hard",
    "dive": "dive alone does not use the labels: add balanced_softmax",
}

_LABELS_ADVICE = {"soft_f1": "soft_f1 alone gives no probabilities: add kd_sigmoid or bce"}  # with several labels

_SMALLEST_CNN_SIZE = 4  # pixels


def run(config: StudentConfig, explicit: set[str]) -> None:
    """Train a student with one seed or several, and print its figures. Under torchrun every rank calls this.

    Args:
        config: the options of the command.
        explicit: the names of the options that were typed on the command line.
    """
    with process_group("student", asdict(config)):
        console = Console(config.json)
        config, setup, folder = _prepare(config, explicit, console)
        result = train_student(config, setup, folder, console)
        if config.json:
            console.print_json(json.dumps(result))
        else:
            _report(result, config, setup, folder, console)


def _prepare(
    config: StudentConfig, explicit: set[str], console: Console
) -> tuple[StudentConfig, DistillationSetup, Path]:
    """Complete the options, open caches and data, and check everything before the folder of the run is made."""
    if not config.resume:
        config = apply_recipe(config, explicit)
        check_names(config)
        config = fill_defaults(config)
    config, folder = open_run(config, explicit, f"{short_name(config.data)}-{config.arch.replace(':', '-')}")
    if "out" not in explicit:
        for unfinished in find_unfinished_runs(config, folder):
            command = format_resume_command("student", unfinished, config.arch, config.loss, config.data)
            console.print(f"'{unfinished}' was stopped; continue it with  {command}")
    setup = DistillationSetup.open(config)
    network = setup.build_student(config, setup.losses)
    note_batch_norm(network, setup.device, console)
    labels = setup.transfer_set.splits["train"].labels
    stream = setup.make_stream(config, labels, only_labelled=False, read_targets=False)
    check_batches_shareable(network, stream, setup.device, config)
    for note in setup.check_student(network, config):
        console.print(note)
    check_own_losses(config, setup)
    print_notes(config, setup, console)
    reads_teacher = any(loss.needs_logits or loss.needs_head for loss in setup.losses)
    if not reads_teacher and (setup.teachers.combine or setup.teachers.maps):
        console.print("no loss reads the teacher's logits: --combine and --map change the reported figures only")
    return config, setup, folder


def print_notes(config: StudentConfig, setup: DistillationSetup, console: Console) -> None:
    """Print what to know before a training starts.

    That is: the figures of several teachers and of their combination, how many rows lack targets, draws that come
    less often than others, and a loss that is known to need another one beside it.
    """
    if not setup.teachers.is_single_cache:
        for line in describe_teachers(setup.teachers, setup.member_metrics, setup.teacher_metrics):
            console.print(line)
    if config.missing:
        missing, rows = int(setup.missing_rows.sum()), len(setup.missing_rows)
        treatment = "left out" if config.missing == "skip" else "learned from their labels in these draws"
        console.print(
            f"--missing {config.missing}: {missing:,} of {rows:,} rows have no targets in some draw: {treatment}"
        )
    labels = setup.transfer_set.splits["train"].labels
    if setup.cache.task == EMBEDDING and setup.cache.views.mixes_images and find_known(labels).any():
        console.print(
            "the cache's views are mixtures of two images, which have no one class: no kNN, probe or centroid accuracy"
        )
    if config.epochs % config.draws_per_decode:
        console.print(
            f"--epochs {config.epochs} is not a multiple of --draws-per-decode {config.draws_per_decode}:"
            " some images are seen in fewer draws than others"
        )
    single_loss_advice = _LABELS_ADVICE if setup.cache.task == LABELS else _SINGLE_LOSS_ADVICE
    if len(setup.losses) == 1 and (advice := single_loss_advice.get(setup.losses[0].name)):
        console.print(advice)


def _report(
    result: dict[str, Any], config: StudentConfig, setup: DistillationSetup, folder: Path, console: Console
) -> None:
    """Print the figures, advice for a student that learned next to nothing, the cost, and a command to run next."""
    print_table(result, console)
    if is_first():
        labels = setup.transfer_set.splits["train"].labels
        is_known = find_known(labels)
        labelled_rows = 0 if is_known.all() else int(is_known.sum())
        for line in explain_gain(result, folder, labelled_rows):
            console.print(line)
    student = Figures(result["student"][choose_split(result["student"])])
    share_right = student.get("accuracy" if student.has_labels() else "agreement")
    if setup.cache.task == CLASSES and share_right is not None and share_right < 1.5 / setup.cache.classes:
        console.print(
            "The student is hardly better than chance: --clip-norm 1 or a lower --learning-rate often helps."
        )
        if not any(loss.needs_logits or loss.needs_labels for loss in setup.losses):
            console.print("Losses of layers alone do not train its last layer: add kd or hard, or --finetune-epochs.")
    console.print(f"cost:  {format_cost(result['bill'])}")
    console.print(f"run:   {folder}")
    console.print(f"cache: {', '.join(config.cache)}: trains any number of other students, without the teacher")
    common = {name: getattr(config, name) for name in ("cache", "data_root", "index", "combine", "map", "missing")}
    next_config = StudentConfig(
        **common,
        data=config.data if has_argument(setup.cache.data) else "",
        arch="cnn" if config.arch != "cnn" and setup.input_spec.size >= _SMALLEST_CNN_SIZE else "mlp:64",
        baseline=has_labels(setup.cache.manifest, "train") and setup.cache.task != EMBEDDING,
    )
    console.print(f"next:  {format_command('student', next_config)}")
