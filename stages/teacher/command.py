"""`softcache teacher`: train a teacher from hard targets."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.base.errors import UsageError, make_printable
from softcache.base.files import publish_json
from softcache.data.long_tail import parse_imbalance
from softcache.data.sources import short_name
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS, find_known, measure_targets, require_classes
from softcache.data.transfer_set import count_classes
from softcache.data.views.policy import parse_views
from softcache.pipeline.batch import LossContext
from softcache.pipeline.loading.stream import BatchStream
from softcache.pipeline.losses import HARD_LOSSES
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.metrics.tasks import evaluate_task
from softcache.pipeline.metrics.thresholds import add_thresholds
from softcache.pipeline.models import build, check_arch, count_parameters, is_external_arch
from softcache.pipeline.models.configurations import has_published_weights
from softcache.pipeline.models.initial_weights import check_init, read_initial_weights
from softcache.pipeline.models.multiply_adds import count_multiply_adds
from softcache.pipeline.models.network_checks import TrainingCheck, check_trainable
from softcache.pipeline.models.prepared_model import PUBLISHED, PreparedModel
from softcache.stages.cli.configs import CacheConfig, TeacherConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import find_free_name, format_command
from softcache.stages.cli.defaults import find_defaults
from softcache.stages.runs.environment import describe_machine, library_versions, measure_peak_memory, select_device
from softcache.stages.runs.figures import TITLES, Figures, choose_labelled_split, get_task
from softcache.stages.runs.folder import open_run, start_run
from softcache.stages.runs.initial import record_initial_weights
from softcache.stages.runs.output_folder import check_output_folder
from softcache.stages.training.data_parallel import count_least_rows
from softcache.stages.training.loop import train
from softcache.stages.training.run import TrainingRun
from softcache.stages.training.validation import HeldOutSplit, check_select

from .data import (
    FOLDER_OPTIONS,
    SPLIT_OPTIONS,
    can_be_rows,
    check_normalize,
    fill_size,
    find_view_configuration,
    load_data,
    make_input_spec,
    name_all_unreadable,
    print_notes,
)


def run(config: TeacherConfig, explicit_options: set[str]) -> None:
    """Train a teacher, and print its accuracy and the command that runs it over the data.

    Args:
        config: Options of the command.
        explicit_options: Names of the options that were given on the command line.

    Raises:
        UsageError: An option is out of range or does not fit the data.
        CacheError: A file is damaged, or the folder is in use.
    """
    console = Console(config.json)
    config = fill_defaults(config)
    config, folder = open_run(config, explicit_options, f"{short_name(config.data)}-teacher")
    check_names(config)
    result = train_teacher(config, folder, console)
    if config.json:
        return console.print_json(json.dumps(result))
    console.print(f"teacher {config.arch}: {describe_accuracy(result)} in {result['seconds']['train']:.1f} s")
    console.print(f"run:  {folder}")
    console.print(f"next: {_format_cache_command(config, folder)}")


def describe_accuracy(result: dict[str, Any]) -> str:
    """Format the main figures of a teacher on the test split, or on validation where test has no labels.

    Those are the accuracy of classes, mAP and macro F1 of labels, RMSE and R² of numbers.
    """
    figures = Figures(result["teacher"][choose_labelled_split(result["teacher"])])
    names = {LABELS: ("map", "f1_macro"), NUMBERS: ("rmse", "r2")}.get(get_task(result), ("accuracy",))
    return figures.describe(names, f"{TITLES[names[0]]} unknown")


def _format_cache_command(config: TeacherConfig, folder: Path) -> str:
    """Format the command of stage one with these weights and this split.

    With another split the validation rows could be rows that the teacher was trained on.
    """
    default_out = f"caches/{short_name(config.data)}"
    split_options = {name: getattr(config, name) for name in SPLIT_OPTIONS}
    if config.val_fraction == find_defaults(config.data).val_fraction:
        split_options["val_fraction"] = 0.0
    cache_config = CacheConfig(
        data=config.data,
        data_root=config.data_root,
        index=config.index,
        teacher=config.arch if is_external_arch(config.arch) else "",  # code of a run is used where it is named again
        weights=str(folder),
        out=find_free_name(default_out) if Path(default_out).exists() else "",
        **{name: getattr(config, name) for name in FOLDER_OPTIONS},
        **split_options,
    )
    return format_command("teacher-cache", cache_config)


def fill_defaults(config: TeacherConfig) -> TeacherConfig:
    """Fill in the options that were not given, from the defaults of the data set."""
    data = config.data or "digits"
    defaults = find_defaults(data)
    arch = config.arch or defaults.teacher
    return replace(
        config,
        data=data,
        arch=arch,
        normalize=config.normalize or (PUBLISHED if config.init and has_published_weights(arch) else "data"),
        views=config.views or defaults.teacher_views,
        epochs=config.epochs or defaults.teacher_epochs,
        batch_size=config.batch_size or defaults.batch_size,
        learning_rate=config.learning_rate or defaults.teacher_learning_rate,
        weight_decay=config.weight_decay if config.weight_decay >= 0 else defaults.teacher_weight_decay,
        val_fraction=config.val_fraction or defaults.val_fraction,
    )


def check_names(config: TeacherConfig) -> None:
    """Check, before an image is read, every name among the options of a teacher.

    Args:
        config: Options of the command, with defaults filled in.

    Raises:
        UsageError: There is no such arch, view policy, long tail or device, or --out is a file.
        CacheError: --out cannot be written into.
    """
    parse_views(config.views)
    if config.imbalance:
        parse_imbalance(config.imbalance)
    check_arch(config.arch)
    check_normalize(config.normalize, config.arch, can_be_rows(config.data))
    check_init(config.init, config.arch)
    select_device(config.device)
    check_output_folder(Path(config.out))


def train_teacher(config: TeacherConfig, folder: Path, console: Console, advice: str = "") -> dict[str, Any]:
    """Train a teacher on hard targets with a fresh view of each image in each epoch, and measure it.

    Args:
        config: Options of the command, with defaults filled in.
        folder: Of the run; settings.json, metrics.jsonl, teacher.pt and result.json are written there.
        console: Prints the progress.
        advice: Appended to the line that a long training prints.

    Returns:
        The content of result.json.

    Raises:
        UsageError: The images have no labels, or an option does not fit the data.
        CacheError: Another process holds the folder, or a file is damaged.
    """
    check_normalize(config.normalize, config.arch, can_be_rows(config.data))
    device = select_device(config.device)
    transfer_set = load_data(config)
    print_notes(transfer_set, console)
    train_rows = transfer_set.splits["train"]
    task, labelled_rows = transfer_set.task, np.flatnonzero(find_known(train_rows.labels))
    if task == EMBEDDING:
        raise UsageError(
            f"a teacher of the task {EMBEDDING} is not trained here: name one that is, with --teacher and --weights"
        )
    if not transfer_set.classes or not len(labelled_rows):
        raise UsageError(f"a teacher needs labels: '{config.data}' has images without classes")
    if task == NUMBERS and (lacks_numbers := np.isnan(train_rows.labels).all(0)).any():
        name = make_printable(transfer_set.classes[int(lacks_numbers.argmax())])
        raise UsageError(
            f"a teacher needs numbers of each output, and no training row of '{config.data}' has '{name}'"
        )
    if config.sampler:
        require_classes(task, f"--sampler {config.sampler}")
    if unlabelled := len(train_rows) - len(labelled_rows):
        console.print(
            f"the teacher is trained on the {len(labelled_rows):,} images with labels; the {unlabelled:,} without are"
            " left out"
        )
    check_select(config, transfer_set)
    views = fill_size(parse_views(config.views), transfer_set, console, find_view_configuration(config.arch))
    with name_all_unreadable(transfer_set):
        input_spec = make_input_spec(config.normalize, transfer_set, views, config.arch)
    if config.normalize == PUBLISHED:
        console.print(f"input of {config.arch}: {input_spec.describe()}, as published with it")
    torch.manual_seed(config.seed)
    classes = len(transfer_set.classes)
    network = build(config.arch, classes, input_spec.channels, views.size, config.output, shape=input_spec.shape)
    initial = None
    if config.init:
        initial = read_initial_weights(config.init, config.arch, input_spec.channels, views.size)
        initial.load_into(network, classes)
        console.print(initial.describe(network, classes))
    stream = BatchStream(
        split=train_rows,
        views=views,
        view_seed=config.seed,
        order_seed=config.seed,
        batch_size=config.batch_size,
        labels=train_rows.labels,
        rows=labelled_rows,
        workers=config.workers,
        sampler=config.sampler,
        device=device,
    )
    check = TrainingCheck(
        arch=config.arch,
        classes=classes,
        input_spec=input_spec,
        device=device,
        precision=config.precision,
        least_rows=count_least_rows(stream),
        batch_size=config.batch_size,
    )
    for note in check_trainable(network, check):
        console.print(note)
    with start_run(config, folder), name_all_unreadable(transfer_set):
        record_initial_weights(initial, folder)
        counts = count_classes(train_rows.labels, classes)
        context = LossContext(counts=torch.from_numpy(counts))
        if task == NUMBERS:
            mean, std = (torch.from_numpy(x).float() for x in measure_targets(train_rows.labels))
            context = replace(context, mean=mean, std=std)
            input_spec = input_spec.with_output(tuple(mean.tolist()), tuple(std.tolist()))
        model = PreparedModel(network, input_spec).to(device)
        held_out: dict[str, HeldOutSplit] = {
            split: HeldOutSplit(transfer_set.splits[split], views, device, config, task=task)
            for split in ("val", "test")
            if split in transfer_set.splits
        }
        run = TrainingRun(
            name="teacher",
            model=model,
            criterion=DistillationLoss(HARD_LOSSES[task]),
            stream=stream,
            epochs=config.epochs,
            steps=stream.steps_per_epoch,
            config=config,
            device=device,
            folder=folder,
            multiply_adds=count_multiply_adds(network, input_spec.channels, views.size, input_spec.shape),
            interrupt_advice=advice,
            context=context,
        )
        finished = train(run, held_out["val"], console)
        logits = {split: rows.logits(model) for split, rows in held_out.items()}
        labels = {split: rows.labels for split, rows in held_out.items()}
        figures = {split: evaluate_task(task, z, labels[split], counts=counts) for split, z in logits.items()}
        figures = add_thresholds(task, figures, logits, labels)
        result = {
            "settings": asdict(config),
            **({} if task == CLASSES else {"task": task}),
            "teacher": {
                "arch": config.arch,
                **({"output": config.output} if config.output else {}),
                **({"init": initial.to_json(network, classes)} if initial else {}),
                "preparation": input_spec.to_json(),
                "parameters": count_parameters(network),
                "multiply_adds": run.multiply_adds,
                "epoch": finished.epoch,
                "val": figures["val"],
                "test": figures.get("test"),
                **({"thresholds": figures["thresholds"]} if "thresholds" in figures else {}),
            },
            "classes": list(transfer_set.classes),
            "seconds": {"train": finished.seconds},
            "peak_memory": measure_peak_memory(device),
            "versions": library_versions(),
            "machine": describe_machine(device),
        }
        publish_json(folder / "result.json", result)
        return result
