"""What the run of a teacher or student records of its network, compared with the options and the data of a cache."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.schema import validate
from softcache.data.sources.class_order import SORTED_ORDERS, sort_classes
from softcache.data.tasks import CLASSES
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.models.class_map import MAP_ADVICE
from softcache.pipeline.models.prepared_model import InputSpec, format_normalize
from softcache.pipeline.models.state_dicts import find_weights_file
from softcache.stages.cli.configs import CacheConfig, TeacherConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.runs.folder import read_json
from softcache.stages.runs.named_code import require_named_code
from softcache.stages.teacher.data import SPLIT_OPTIONS


@dataclass(frozen=True)
class RecordedRun:
    """What the folder of a run records of its network.

    Attributes:
        arch: Its arch.
        output: Key or index of the logits in what it returns; "" where that is clear.
        input_spec: How its input is prepared.
        classes: Names of the classes it was trained on; None for a run of an earlier version.
        task: What it outputs, see data/tasks.py.
    """

    arch: str
    output: str
    input_spec: InputSpec
    classes: list[str] | None
    task: str = CLASSES


def read_run(path: Path, config: CacheConfig) -> RecordedRun:
    """Read what a run records of its teacher or student, and check the options against it.

    Args:
        path: Folder of the run.
        config: Options of the command.

    Raises:
        UsageError: An option is not that of the run, or its arch is a user's code and not named.
        CacheError: The record is damaged.
    """
    result = read_json(path / "result.json")
    try:
        record = result["student"] if (path / "student.pt").is_file() else result["teacher"]
        arch, input_spec = str(record["arch"]), InputSpec.from_json(record["preparation"])
    except (KeyError, TypeError, ValueError):
        raise CacheError(f"'{path / 'result.json'}' does not have the arch and preparation of its weights") from None
    require_named_code(
        arch,
        config.teacher,
        owner=f"the run '{path}'",
        option="--teacher",
        command=format_command("teacher-cache", config, teacher=arch),
    )
    if config.normalize:
        raise UsageError(
            f"--normalize {config.normalize}, but the run '{path}' records how its input is normalised: leave it out"
        )
    classes = result.get("classes") or None
    if classes is not None:
        validate(classes, [str], f"{path / 'result.json'}: classes")
    return RecordedRun(arch, str(record.get("output", "")), input_spec, classes, str(result.get("task", CLASSES)))


def check_same_classes(path: Path, run: RecordedRun, transfer_set: TransferSet) -> None:
    """Check that a run was trained on the classes of the data, in their order.

    Args:
        path: Folder of the run.
        run: What it records.
        transfer_set: The data; without classes nothing is compared.

    Raises:
        CacheError: The names differ or are in another order.
    """
    if run.task != transfer_set.task:
        raise CacheError(
            f"the run '{path}' is of the task {run.task}, the data are of the task {transfer_set.task}: name a teacher"
            " that was trained on these data"
        )
    if run.classes is None or not transfer_set.classes:
        return
    trained, classes = tuple(run.classes), transfer_set.classes
    if trained == classes:
        return
    if len(trained) != len(classes):
        advice = MAP_ADVICE if run.task == CLASSES else "one output for each, in their order"
        raise CacheError(
            f"the run '{path}' was trained on {len(trained)} {run.task}, the data have {len(classes)}: {advice}"
        )
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(trained, classes, strict=True)) if a != b]
    examples = ", ".join(
        f"{i} is '{make_printable(a, 40)}' in the run and '{make_printable(b, 40)}' in the data"
        for i, a, b in pairs[:3]
    )
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    if run.task != CLASSES:
        raise CacheError(
            f"the {run.task} of the run '{path}' are not those of the data, or in another order: {examples}{more}."
            " Save the data with the names and the order of the run"
        )
    if set(trained) == set(classes):
        order = next((order for order in SORTED_ORDERS if sort_classes(classes, order) == trained), "FILE")
        names = " with the run's order, one name a line" if order == "FILE" else ""
        raise CacheError(
            f"the classes of the run '{path}' are in another order than those of the data: class {examples}{more}. Say"
            f" --classes {order}{names}, or --class-map names to have the teacher's put in theirs"
        )
    spec = format_normalize(run.input_spec.mean, run.input_spec.std)
    raise CacheError(
        f"the run '{path}' was trained on other classes than those of the data: class {examples}{more}. Where they"
        f" mean the same, name the weights alone: --weights {find_weights_file(path)}"
        f" --teacher {make_printable(run.arch)} --normalize {spec}"
    )


def note_different_split(path: Path, config: CacheConfig, console: Console) -> None:
    """Print a line where the run of a teacher split the same data differently from this cache."""
    if not (path / "settings.json").is_file():
        return
    recorded = read_json(path / "settings.json")
    if "val_fraction" not in recorded or recorded.get("data") != config.data:
        return
    differences = list_differences(recorded, config, [name for name in SPLIT_OPTIONS if name in recorded])
    if differences:
        console.print(
            f"the teacher in '{path}' was trained on another split ({'; '.join(differences)}): validation may hold"
            " rows that it was trained on, and then fits, --select and tune rate it too highly"
        )


def list_differences(recorded: dict[str, Any], config: CacheConfig | TeacherConfig, names: Iterable[str]) -> list[str]:
    """List the options of these names that differ from those of a run's settings.json."""
    return [
        f"{name} {recorded.get(name)} there, {getattr(config, name)} here"
        for name in names
        if recorded.get(name) != getattr(config, name)
    ]
