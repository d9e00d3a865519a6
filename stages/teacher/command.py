"""`softcache teacher`: train a teacher, for those who have none."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.base.errors import UsageError
from softcache.base.files import publish_json
from softcache.data.sources import short_name
from softcache.data.transfer_set import TransferSet, count_classes, load_transfer_set
from softcache.data.views import ViewPolicy, parse_views, render
from softcache.pipeline.batch import LossContext
from softcache.pipeline.loading.loader import CacheLoader
from softcache.pipeline.losses import parse_losses
from softcache.pipeline.losses.distillation_loss import DistillationLoss
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.models import build, count_multiply_adds, count_parameters
from softcache.pipeline.models.prepared_model import IMAGENET_MEAN, IMAGENET_STD, InputSpec, PreparedModel
from softcache.stages.cli.configs import CacheConfig, TeacherConfig
from softcache.stages.cli.console import Console, progress
from softcache.stages.cli.copied_commands import find_free_name, format_command
from softcache.stages.cli.defaults import find_defaults
from softcache.stages.runs.environment import describe_machine, library_versions, measure_peak_memory, select_device
from softcache.stages.runs.folder import open_run, start_run
from softcache.stages.training.loop import train
from softcache.stages.training.run import TrainingRun
from softcache.stages.training.validation import HeldOutSplit, check_select

CUT_OPTIONS = ("val_fraction", "seed", "train_size", "imbalance", "head_size")  # what `load` cuts a data set by
FOLDER_SIZE = 224  # of views of a folder whose images differ in size


def run(config: TeacherConfig, said: set[str]) -> None:
    """Train, report, and say what to do next."""
    console = Console(config.json)
    config = fill_defaults(config)
    config, folder = open_run(config, said, f"{short_name(config.data)}-teacher")
    result = train_teacher(config, folder, console)
    if config.json:
        return console.print_json(json.dumps(result))
    figures = result["teacher"]["test"] or result["teacher"]["val"]
    console.print(f"teacher {config.arch}: accuracy {figures['accuracy']:.4f} in {result['seconds']['train']:.1f} s")
    console.print(f"run:  {folder}")
    console.print(f"next: {_format_cache_command(config, folder)}")


def _format_cache_command(config: TeacherConfig, folder: Path) -> str:
    """Stage one with these weights and this cut: of another one, validation may hold rows that the teacher learned."""
    usual = f"caches/{short_name(config.data)}"
    fraction = config.val_fraction if config.val_fraction != find_defaults(config.data).val_fraction else 0.0
    asked = CacheConfig(
        data=config.data,
        data_root=config.data_root,
        weights=str(folder),
        out=find_free_name(usual) if Path(usual).exists() else "",
        **{name: getattr(config, name) for name in CUT_OPTIONS} | {"val_fraction": fraction},
    )
    return format_command("teacher-cache", asked)


def fill_defaults(config: TeacherConfig) -> TeacherConfig:
    """Every setting that was left out, from the defaults of the data set."""
    data = config.data or "digits"
    defaults = find_defaults(data)
    return replace(
        config,
        data=data,
        arch=config.arch or defaults.teacher,
        views=config.views or defaults.teacher_views,
        epochs=config.epochs or defaults.teacher_epochs,
        batch_size=config.batch_size or defaults.batch_size,
        learning_rate=config.learning_rate or defaults.teacher_learning_rate,
        weight_decay=config.weight_decay if config.weight_decay >= 0 else defaults.teacher_weight_decay,
        val_fraction=config.val_fraction or defaults.val_fraction,
    )


def train_teacher(config: TeacherConfig, folder: Path, console: Console, advice: str = "") -> dict[str, Any]:
    """Train a teacher on hard targets with a fresh view each epoch; result.json and teacher.pt go to folder."""
    device = select_device(config.device)
    transfer_set = load_data(config)
    if len(transfer_set.classes) < 2 or (transfer_set.splits["train"].labels < 0).any():
        raise UsageError(f"a teacher needs labels: '{config.data}' has images without classes")
    check_select(config, transfer_set)
    views = fill_size(parse_views(config.views), transfer_set, console)
    input_spec = make_input_spec(config.normalize, transfer_set, views)
    torch.manual_seed(config.seed)
    network = build(config.arch, len(transfer_set.classes), input_spec.channels, views.size)
    with start_run(config, folder):
        model = PreparedModel(network, input_spec).to(device)
        rows = transfer_set.splits["train"]
        stream = CacheLoader(
            rows,
            views,
            config.seed,
            config.seed,
            config.batch_size,
            rows.labels,
            np.arange(len(rows)),
            workers=config.workers,
            sampler=config.sampler,
            device=device,
        )
        held_out = {
            split: HeldOutSplit(transfer_set.splits[split], views, device, config)
            for split in ("val", "test")
            if split in transfer_set.splits
        }
        counts = count_classes(rows.labels, len(transfer_set.classes))
        run = TrainingRun(
            name="teacher",
            model=model,
            criterion=DistillationLoss(parse_losses(("hard",))),
            stream=stream,
            epochs=config.epochs,
            steps=stream.steps_per_epoch,
            config=config,
            device=device,
            folder=folder,
            multiply_adds=count_multiply_adds(network, input_spec.channels, views.size),
            interrupt_advice=advice,
            context=LossContext(counts=torch.from_numpy(counts)),
        )
        done = train(run, held_out["val"], console)
        measured = {s: evaluate(held.logits(model), held.labels, counts=counts) for s, held in held_out.items()}
        result = {
            "settings": asdict(config),
            "teacher": {
                "arch": config.arch,
                "preparation": input_spec.to_json(),
                "parameters": count_parameters(network),
                "multiply_adds": run.multiply_adds,
                "epoch": done.epoch,
                "val": measured["val"],
                "test": measured.get("test"),
            },
            "seconds": {"train": done.seconds},
            "peak_memory": measure_peak_memory(device),
            "versions": library_versions(),
            "machine": describe_machine(device),
        }
        publish_json(folder / "result.json", result)
        return result


def load_data(config: TeacherConfig | CacheConfig) -> TransferSet:
    """The data, cut as the settings say."""
    cut = {name: getattr(config, name) for name in CUT_OPTIONS}
    return load_transfer_set(config.data, Path(config.data_root), **cut, progress=progress)


def fill_size(views: ViewPolicy, transfer_set: TransferSet, console: Console) -> ViewPolicy:
    """The policy with its size in pixels: as asked, as the images are, or 224 where they differ."""
    if not views.size and not transfer_set.size:
        console.print(
            f"the images differ in size: views are of {FOLDER_SIZE} px; --views {views.name}:size=N changes it"
        )
    return replace(views, size=views.size or transfer_set.size or FOLDER_SIZE)


def make_input_spec(normalize: str, transfer_set: TransferSet, views: ViewPolicy) -> InputSpec:
    """Mean and standard deviation per channel: ImageNet's, the training views' own, or none."""
    channels, size = transfer_set.channels, views.size
    if normalize == "imagenet":
        return InputSpec(3, size, IMAGENET_MEAN, IMAGENET_STD)
    if normalize == "none":
        return InputSpec(channels, size, (0.0,) * channels, (1.0,) * channels)
    rows = transfer_set.splits["train"]
    sample = np.arange(min(len(rows), 4096)) * len(rows) // min(len(rows), 4096)
    pixels = render(rows.images, views.without_augmentation(), 0, sample, 0).double() / 255
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()
    return InputSpec(channels, size, tuple(round(m, 4) for m in mean), tuple(max(round(s, 4), 1e-4) for s in std))
