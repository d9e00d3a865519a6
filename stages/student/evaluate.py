"""`softcache evaluate`: compute the figures of a trained student again, from its weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.losses import remove_custom_losses
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import load_weights, read_state_dict
from softcache.stages.cli.configs import EvaluateConfig, StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.cli.typed_command import format_resume_command
from softcache.stages.runs.folder import read_config, read_fingerprints, read_json
from softcache.stages.runs.named_code import require_named_code, require_named_data

from .requirements import hide_labels
from .setup import DistillationSetup
from .split_figures import compute_student_bank
from .student_input import use_recorded_input
from .teachers import SHARDS_FILE, open_caches


def run(name: str, config: EvaluateConfig, explicit: set[str]) -> None:
    """Evaluate the student of each seed on the held-out splits, against labels and the cached logits of its teacher.

    Args:
        name: the folder of the run.
        config: the options of the command: where caches and images are on this machine.
        explicit: the names of the options that were typed on the command line; the others are those of the run.
    """
    console, folder = Console(config.json), Path(name)
    if "cache" not in read_json(folder / "settings.json"):
        raise UsageError(f"'{folder}' is not the run of a student")
    locations = {name: getattr(config, name) for name in explicit - {"json", "arch"}}
    student_config = replace(read_config(folder, StudentConfig), out=str(folder), **locations)
    require_named_code(
        student_config.arch,
        config.arch,
        owner=f"the run '{folder}'",
        option="--arch",
        command=format_command("evaluate", config, folder, arch=student_config.arch),
    )
    student_config = use_recorded_input(student_config, folder)
    require_named_data(
        student_config.data,
        config.data,
        owner=f"the run '{folder}'",
        command=format_command("evaluate", config, folder, data=student_config.data),
    )
    # The figures of a student do not depend on its losses: code of the user among them is not imported.
    caches = open_caches(student_config.cache)
    student_config = replace(student_config, loss=remove_custom_losses(student_config.loss, caches[0].task))
    check_same_teachers(folder, caches)
    setup = DistillationSetup.open(student_config)
    metrics: dict[str, Any] = {}
    for seed in range(student_config.seed, student_config.seed + student_config.seeds):
        seed_folder = folder if student_config.seeds == 1 else folder / f"seed-{seed}"
        metrics[str(seed)] = _evaluate_student(seed_folder, replace(student_config, seed=seed), setup)
    if config.json:
        return console.print_json(json.dumps(metrics))
    for seed_name, splits in metrics.items():
        thresholds = splits.pop("thresholds", None)
        for split, figures in splits.items():
            console.print(f"seed {seed_name}, {split}: {_format_numbers(figures)}")
            if "at_thresholds" in figures:
                console.print(f"seed {seed_name}, {split}, at thresholds: {_format_numbers(figures['at_thresholds'])}")
        if thresholds:
            names = setup.transfer_set.classes
            console.print(
                f"seed {seed_name}, thresholds: {_format_numbers(dict(zip(names, thresholds, strict=True)))}"
            )


def _format_numbers(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{make_printable(key)} {value:.4f}" for key, value in figures.items() if isinstance(value, float)
    )


def check_same_teachers(folder: Path, caches: tuple[CacheReader, ...]) -> None:
    """Check that caches are those that a run was trained from, in the same order, wherever they lie.

    Args:
        folder: the folder of the run.
        caches: the caches that its figures are to be compared with.

    Raises:
        CacheError: when they are others.
    """
    path = folder / SHARDS_FILE
    saved = read_fingerprints(read_json(path), path)
    current = [cache.manifest.fingerprint for cache in caches]
    if saved != current:
        saved_text, current_text = (", ".join(fingerprint[:12] for fingerprint in names) for names in (saved, current))
        raise CacheError(
            f"'{folder}' was trained from the caches {make_printable(saved_text)}, and these are {current_text}:"
            " name its own, in their order, with --cache"
        )


def _evaluate_student(folder: Path, config: StudentConfig, setup: DistillationSetup) -> dict[str, Any]:
    path = folder / "student.pt"
    if not path.is_file():
        losses = read_config(Path(config.out), StudentConfig).loss
        command = format_resume_command("student", config.out, config.arch, losses, config.data)
        raise CacheError(
            f"'{folder}' has no student.pt, because its training is not finished: continue with  {command}"
        )
    network = setup.build_student(config, setup.losses)
    load_weights(network, read_state_dict(path), str(path))
    labels = hide_labels(config, setup.transfer_set.splits["train"].labels)
    model = PreparedModel(network, setup.scale_output(labels)).to(setup.device)
    logits = setup.compute_logits(model)
    return setup.compute_metrics(logits, compute_student_bank(setup, model, logits, config))
