"""`softcache student` with several archs, seeds or losses: students that share one stream of batches.

Each batch is read, decoded and rendered once, and every student takes its step on it.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from softcache.base.errors import Interrupted, TrainingStopped, UsageError
from softcache.base.files import publish_json
from softcache.data.sources import short_name
from softcache.stages.cli.configs import ListConfig, StudentConfig, StudentsConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.new_folders import make_new_folder
from softcache.stages.cli.typed_command import format_typed_command
from softcache.stages.compare import command as compare
from softcache.stages.distributed.ranks import current_ranks

from . import command as single_student
from .defaults import fill_defaults
from .early_checks import check_before_images, check_names
from .own_losses import check_own_losses
from .phases import StudentTraining, check_shared_stream, train_phases
from .recipes import apply_recipe
from .setup import DistillationSetup
from .student_run import assemble_result, open_student_run, resume_if_started
from .teachers import open_caches

Outcome = dict[str, Any] | TrainingStopped  # the result.json of a student, or why its training ended early
_REPEATABLE = ("arch", "seed", "losses")


def run(config: StudentsConfig, explicit: set[str]) -> None:
    """Train one student, or one for each combination of the given archs, seeds and losses.

    The same command with the same --out continues students that were stopped.

    Args:
        config: the options of the command.
        explicit: the names of the options that were typed on the command line.
    """
    configs, explicit = _list_configs(config, explicit)
    if len(configs) == 1:
        if config.vectorize:
            raise UsageError("--vectorize is for several students: give more than one --seed, or --losses")
        return single_student.run(next(iter(configs.values())), explicit)
    console = Console(config.json)
    _check_options(config, len(configs))
    configs = {name: apply_recipe(student, explicit) for name, student in configs.items()}
    for student in configs.values():
        check_names(student)
    configs = {name: fill_defaults(student) for name, student in configs.items()}
    base_config = next(iter(configs.values()))
    folder = Path(config.out) if config.out else make_new_folder(f"{short_name(base_config.data)}-students")
    if (folder / "settings.json").exists():
        raise UsageError(f"'{folder}' is the run of one student: choose another --out")
    students = _open_students(configs, folder, console)
    check_shared_stream(students, config.vectorize)
    single_student.print_notes(base_config, students[0].setup, console)
    try:
        outcomes = train_students(students, config.vectorize, console)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped; continue with  {format_typed_command(str(folder))}") from None
    _report(dict(zip(configs, outcomes, strict=True)), folder, console)


def check_options(config: StudentsConfig, explicit: set[str]) -> None:
    """Check the options of the command as far as this needs no cache, which may not exist yet.

    Raises:
        UsageError: an option names something that does not exist, or two do not fit together.
        CacheError: --out cannot be written into.
    """
    configs, explicit = _list_configs(config, explicit)
    for student in configs.values():
        if not student.resume:
            check_names(apply_recipe(student, explicit))


def _list_configs(config: StudentsConfig, explicit: set[str]) -> tuple[dict[str, StudentConfig], set[str]]:
    """List the students of the command.

    Returns:
        {folder name: options} of each student, where the name holds what differs between the students; and the names
        of the explicit options of each.
    """
    if config.losses and config.loss:
        raise UsageError("--loss is one term and --losses a whole loss: give one of the two")
    losses = [tuple(text.split()) for text in config.losses] or [config.loss]
    if config.losses and (not all(losses) or len(set(losses)) < len(losses)):
        raise UsageError("--losses is a loss, such as 'kd hard:weight=0.1', and each is given once")
    archs, seeds = config.arch or ("",), config.seed or (0,)
    common = {f.name: getattr(config, f.name) for f in fields(StudentConfig) if f.name not in _REPEATABLE}
    configs: dict[str, StudentConfig] = {}
    for (a, arch), seed, (k, loss) in product(enumerate(archs), seeds, enumerate(losses)):
        parts = []
        if len(archs) > 1:
            parts.append(_format_file_name(arch, a))
        if len(seeds) > 1:
            parts.append(f"seed-{seed}")
        if len(losses) > 1:
            parts.append(f"loss-{k}")
        name = "-".join(parts)
        student_config = StudentConfig(**common | {"arch": arch, "seed": seed, "loss": loss})
        if len(seeds) > 1 and "order_seed" not in explicit:
            student_config = replace(student_config, order_seed=seeds[0])
        if name in configs:
            raise UsageError(f"two students are both '{name}': give each arch, seed and loss once")
        configs[name] = student_config
    if config.losses:  # in the config of a student it is `loss` that was given
        explicit = (explicit - {"losses"}) | {"loss"}
    return configs, explicit


def _format_file_name(arch: str, number: int) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "-" for c in arch) or f"arch-{number}"


def _check_options(config: StudentsConfig, students: int) -> None:
    """Raise UsageError for options that are for one student only."""
    if current_ranks().world > 1:
        raise UsageError(
            f"torchrun trains one student, and these options give {students}: one command for each, or no torchrun"
        )
    if config.resume or config.seeds > 1 or config.missing:
        raise UsageError(
            f"{students} students of one stream take no --resume (the same command with --out continues), --seeds"
            " (give --seed for each) or --missing"
        )


def _open_students(configs: dict[str, StudentConfig], folder: Path, console: Console) -> list[StudentTraining]:
    """Open each student; caches and images are read once. Students that were started before are continued."""
    for config in configs.values():
        check_before_images(config, open_caches(config.cache))
    students: list[StudentTraining] = []
    notes: list[str] = []
    for name, config in configs.items():
        config = resume_if_started(replace(config, out=str(folder / name), json=False))
        setup = students[0].setup.with_options(config) if students else DistillationSetup.open(config)
        # An arch that cannot be built or trained is found before a folder is made.
        notes += setup.check_student(setup.build_student(config, setup.losses), config)
        check_own_losses(config, setup)
        students.append(StudentTraining(config, setup, folder / name))
    for note in dict.fromkeys(notes):
        console.print(note)
    return students


def train_students(students: Sequence[StudentTraining], vectorize: bool, console: Console) -> list[Outcome]:
    """Train students on one stream of batches; each ends with the weights that it would have alone.

    Args:
        students: each with a setup of the same caches and images.
        vectorize: train the students of one arch as one model, equal to each alone except for rounding.
        console: for progress.

    Returns:
        For each student the content of its result.json, or why its training ended early.

    Raises:
        LockedError: when another process trains one of them.
        UsageError: when they do not see the same batches.
    """
    with ExitStack() as runs:
        for student in students:
            runs.enter_context(open_student_run(student.config, student.setup, student.folder))
        train_phases(students, console, vectorize)
        outcomes: list[Outcome] = []
        for student in students:
            if student.stop_reason:
                outcomes.append(student.stop_reason)
                continue
            result = assemble_result(student.config, student.setup, [student.results])
            publish_json(student.folder / "result.json", result)
            outcomes.append(result)
        return outcomes


def _report(outcomes: dict[str, Outcome], folder: Path, console: Console) -> None:
    """Print the finished students side by side.

    Raises:
        TrainingStopped: when a training ended early.
    """
    results = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, TrainingStopped)}
    if console.json_only:
        console.print_json(json.dumps({"out": str(folder), "students": results}))
    elif results:
        compare.run(tuple(str(folder / name) for name in results), ListConfig())
        console.print(f"runs:  {folder}, with a folder for each student")
    for name, outcome in outcomes.items():
        if isinstance(outcome, TrainingStopped):
            stopped = len(outcomes) - len(results)
            raise TrainingStopped(f"{stopped} of {len(outcomes)} students ended early, first '{name}': {outcome}")
