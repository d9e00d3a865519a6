"""Several students from one stream: each batch is read, decoded and rendered once, and all take their step on it."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from shlex import quote
from typing import Any

from softcache.base.errors import Interrupted, TrainingStopped, UsageError
from softcache.base.files import publish_json
from softcache.data.transfer_set import short_name
from softcache.stages.cli.configs import ListConfig, StudentConfig, StudentsConfig
from softcache.stages.cli.console import Console
from softcache.stages.compare import command as compare
from softcache.stages.distributed.ranks import current_ranks
from softcache.stages.runs.folder import find_free_folder, parse_milestones

from . import command as student_stage
from .defaults import fill_defaults
from .phases import StudentTraining, check_together, train_phases
from .recipes import apply_recipe
from .setup import DistillationSetup

_REPEATED = ("arch", "seed", "losses")


def run(config: StudentsConfig, said: set[str]) -> None:
    """One student, or one for each arch, seed and loss that is named. The same command with --out goes on."""
    asked = _list_students(config, said)
    said = (said - {"losses"}) | ({"loss"} if config.losses else set())
    if len(asked) == 1:
        if config.vectorize:
            raise UsageError("--vectorize is for several students: name more than one --seed, or --losses")
        return student_stage.run(next(iter(asked.values())), said)
    console = Console(config.json)
    if current_ranks().world > 1:
        raise UsageError(f"torchrun trains one student, here are {len(asked)}: one command for each, or no torchrun")
    if config.resume or config.seeds > 1 or config.missing:
        raise UsageError(
            f"{len(asked)} students of one stream take no --resume (the same command with --out goes on), --seeds"
            " (say --seed for each) or --missing"
        )
    filled = {name: fill_defaults(apply_recipe(own, said)) for name, own in asked.items()}
    first = next(iter(filled.values()))
    parse_milestones(first)
    folder = Path(config.out) if config.out else find_free_folder(f"{short_name(first.data)}-students")
    if (folder / "settings.json").exists():
        raise UsageError(f"'{folder}' is the run of one student: choose another --out")
    students = _open_students(filled, folder)
    check_together(students, config.vectorize)
    student_stage.print_notes(first, students[0].setup, console)
    try:
        results = train_students(students, config.vectorize, console)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped; the same command with --out {quote(str(folder))} goes on") from None
    ended = {
        name: result for name, result in zip(filled, results, strict=True) if not isinstance(result, TrainingStopped)
    }
    if config.json:
        console.print_json(json.dumps({"out": str(folder), "students": ended}))
    elif ended:
        compare.run(tuple(str(folder / name) for name in ended), ListConfig())
        console.print(f"runs:  {folder}, each of them as any student's")
    for name, result in zip(filled, results, strict=True):
        if isinstance(result, TrainingStopped):
            raise TrainingStopped(
                f"{len(results) - len(ended)} of {len(results)} students, '{name}' the first: {result}"
            )


def _list_students(config: StudentsConfig, said: set[str]) -> dict[str, StudentConfig]:
    """The settings of each student, by a name that says in what it differs from the others."""
    if config.losses and config.loss:
        raise UsageError("--loss is a term and --losses a whole loss: say one of the two")
    common = {f.name: getattr(config, f.name) for f in fields(StudentConfig) if f.name not in _REPEATED}
    losses = [tuple(text.split()) for text in config.losses] or [config.loss]
    if config.losses and (not all(losses) or len(set(losses)) < len(losses)):
        raise UsageError("--losses is a loss, such as 'kd hard:weight=0.1', and each is said once")
    found = {}
    archs, seeds = config.arch or ("",), config.seed or (0,)
    for (a, arch), seed, (k, terms) in product(enumerate(archs), seeds, enumerate(losses)):
        differs = [_file(arch, a)] * (len(archs) > 1) + [f"seed-{seed}"] * (len(seeds) > 1)
        name = "-".join(differs + [f"loss-{k}"] * (len(losses) > 1))
        own = StudentConfig(**common | {"arch": arch, "seed": seed, "loss": terms})
        if len(seeds) > 1 and "order_seed" not in said:
            own = replace(own, order_seed=seeds[0])
        if name in found:
            raise UsageError(f"two students are both '{name}': each arch, seed and loss once")
        found[name] = own
    return found


def _file(arch: str, number: int) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "-" for c in arch) or f"arch-{number}"


def _open_students(filled: dict[str, StudentConfig], folder: Path) -> list[StudentTraining]:
    """Each with what it is trained from, of one reading of caches and data; begun or finished ones go on."""
    students: list[StudentTraining] = []
    for name, own in filled.items():
        own = student_stage.resume_if_started(replace(own, out=str(folder / name), json=False))
        setup = students[0].setup.with_options(own) if students else DistillationSetup.open(own)
        setup.build_student(own, setup.losses)  # an arch that cannot be built is found before a folder is made
        students.append(StudentTraining(own, setup, folder / name))
    return students


def train_students(
    students: Sequence[StudentTraining], vectorize: bool, console: Console
) -> list[dict[str, Any] | TrainingStopped]:
    """Train students from one stream.

    Args:
        students: each with a setup of the same caches and data.
        vectorize: train those of one arch as one model.
        console: for progress.

    Returns:
        Of each student its result.json, as if it had been trained alone, or how it ended early.
    """
    with ExitStack() as locks:
        for student in students:
            locks.enter_context(student_stage.started_run(student.config, student.setup, student.folder))
        train_phases(students, console, vectorize)
        outcomes: list[dict[str, Any] | TrainingStopped] = []
        for student in students:
            if student.stopped:
                outcomes.append(student.stopped)
                continue
            result = student_stage.assemble_result(student.config, student.setup, [student.results])
            publish_json(student.folder / "result.json", result)
            outcomes.append(result)
        return outcomes
