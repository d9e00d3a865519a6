"""`softcache methods`: train one arch with every loss on one cache, and compare what each gains and costs."""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from softcache.base.errors import DivergedError, Interrupted, UsageError, unknown_name_error
from softcache.base.files import make_folder, publish_json, publish_text
from softcache.base.text import escape_markdown
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.losses import HARD_LOSSES, LOSSES
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER
from softcache.pipeline.models import build
from softcache.stages.cli.configs import MethodsConfig, StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.new_folders import make_new_folder
from softcache.stages.cli.typed_command import format_typed_command
from softcache.stages.runs.data import has_labels
from softcache.stages.runs.environment import describe_machine, library_versions
from softcache.stages.runs.figures import TITLES, Figures, choose_split, get_task

from .command import print_notes
from .defaults import fill_defaults, to_student_config
from .early_checks import check_before_images, check_layer_names, check_names
from .embedding_width import choose_width
from .method_costs import ROUNDS, MethodCost, StepProbe, measure_costs
from .recipes import apply_recipe
from .requirements import check_task_options
from .setup import DistillationSetup
from .student_input import make_student_spec
from .student_run import train_or_resume
from .teachers import open_caches

# {method: its losses}. {all} stands for the teacher's layers from shallow to deep, {last} for the deepest of them,
# {s_all} and {s_last} for those of the student. Methods of logits come first. Weights are those of the papers' CIFAR
# experiments where these give them, see the documentation of the losses.
METHODS: dict[str, tuple[str, ...]] = {
    "hard": ("hard",),
    "smoothing": ("hard:smoothing=0.1",),
    "tf_kd": ("hard:weight=0.9", "tf_kd:weight=0.1"),
    "kd": ("hard:weight=0.1", "kd:weight=0.9"),
    "kd z-scored": ("hard:weight=0.1", "kd:standardize=true,temperature=2,weight=9"),
    "logit_mse": ("hard:weight=0.9", "logit_mse:weight=0.1"),
    "dkd": ("hard", "dkd:nontarget=2"),
    "nkd": ("hard", "nkd"),
    "dist": ("hard", "dist"),
    "wsld": ("hard", "wsld"),
    "ctkd": ("hard:weight=0.1", "ctkd:weight=0.9"),
    "multi_temperature": ("hard:weight=0.1", "multi_temperature"),
    "logit_adjusted": ("logit_adjusted",),
    "balanced_softmax": ("balanced_softmax",),
    "balanced_kd": ("hard", "balanced_kd"),
    "dive": ("balanced_softmax:weight=0.5", "dive:weight=0.5"),
    "soft_f1": ("hard", "soft_f1"),
    "output + hint": ("output", "hint:teacher={last},student={s_last}"),
    "hint": ("hard", "hint:teacher={last},student={s_last}"),
    "concat_hint": ("hard", "concat_hint:teacher={all},student={s_all}"),
    "vid": ("hard", "vid:teacher={all},student={s_all}"),
    "attention": ("hard", "attention:teacher={all},student={s_all}"),
    "nst": ("hard", "nst:teacher={last},student={s_last}"),
    "similarity": ("hard", "similarity:teacher={last},student={s_last}"),
    "rkd": ("hard", "rkd:teacher={last},student={s_last}"),
    "pkt": ("hard", "pkt:teacher={last},student={s_last}"),
    "cc": ("hard", "cc:teacher={last},student={s_last}"),
    "srrl": ("hard", "kd", "srrl:teacher={last},student={s_last}"),
    "cat_kd": ("hard", "cat_kd:weight=0.7,teacher={last},student={s_last}"),
    "simkd": ("simkd:teacher={last},student={s_last}",),
    "crd": ("hard", "crd:teacher={last},student={s_last}"),
    "review_kd": ("hard", "review_kd:teacher={all},student={s_all}"),
}
# The figures of the table: the main one of each task, and how near the student is to its teacher.
_FIGURES = {CLASSES: ("accuracy", "agreement"), LABELS: ("map", "agreement"), NUMBERS: ("rmse", "r2_to_teacher")}


def run(config: MethodsConfig, explicit: set[str]) -> None:
    """Time the steps of every method, train a student with each, and write methods.json and methods.md.

    The same command with the same --out continues; students that are finished are not trained again.

    Args:
        config: the options of the command.
        explicit: the names of the options that were typed on the command line.
    """
    console = Console(config.json, epoch_lines=False)
    if config.resume or config.seeds > 1 or config.baseline or config.loss:
        raise UsageError("methods takes no --resume (run it again with the same --out), --seeds, --baseline or --loss")
    folder = Path(config.out) if config.out else make_new_folder("methods")
    _check_method_names(config, [*METHODS, *LOSSES])
    base_config = replace(apply_recipe(to_student_config(config), explicit), loss=("hard",))
    check_names(base_config)
    base_config = fill_defaults(base_config)
    caches = open_caches(base_config.cache)
    task = caches[0].task
    check_task_options(base_config, task)
    if task == EMBEDDING:
        raise UsageError(
            f"methods compares each loss with hard targets, and the task {EMBEDDING} has none: train students with"
            " several --losses"
        )
    table = list_methods(task)
    base_config = replace(base_config, loss=table["hard"])
    if not has_labels(caches[0].manifest, "train"):
        raise UsageError(
            "methods compares each loss with hard targets, which are labels, and these images have none: train"
            " students with several --losses, and compare their agreement with the teacher"
        )
    check_before_images(base_config, caches)
    input_spec = make_student_spec(base_config, caches[0])
    channels, size = input_spec.channels, input_spec.size
    network = build(
        base_config.arch, choose_width(base_config, caches), channels, size, base_config.output, shape=input_spec.shape
    )
    layers = config.layers
    if not layers and _list_methods_of_layers(config, table):
        layers = _list_cached_layers(network, caches[0], base_config)
    if config.student_layers:
        check_layer_names(network, config.student_layers, "--student-layers")
    methods = _select_methods(config, table, layers, console)
    for losses in methods.values():
        with suppress(UsageError):  # a method that does not fit this pair is a row of the table
            check_before_images(replace(base_config, loss=losses), caches)
    base_setup = DistillationSetup.open(base_config)
    print_notes(base_config, base_setup, console)
    for note in base_setup.check_student(base_setup.build_student(base_config, base_setup.losses), base_config):
        console.print(note)
    configs = {
        name: replace(base_config, loss=losses, out=str(folder / _format_file_name(name)))
        for name, losses in methods.items()
    }
    setups, probes, reasons = _make_probes(configs, base_setup, config.time_steps)
    make_folder(folder)
    costs = measure_costs(probes)
    del probes  # frees their networks, batches and memory banks before the first training
    try:
        rows = [_train_method(name, configs[name], setups[name], costs[name], console) for name in costs]
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped; continue with  {format_typed_command(str(folder))}") from None
    rows += [{"method": name, "losses": list(configs[name].loss), "failed": why} for name, why in reasons.items()]
    record = _assemble_record(base_config, base_setup, rows, config.time_steps)
    publish_json(folder / "methods.json", record)
    text = _format_table(record)
    publish_text(folder / "methods.md", text)
    if config.json:
        return console.print_json(json.dumps(record))
    for line in text.splitlines():
        console.print(line)
    console.print(f"run:   {folder}/methods.json, methods.md")


def _make_probes(
    configs: dict[str, StudentConfig], base_setup: DistillationSetup, steps: int
) -> tuple[dict[str, DistillationSetup], dict[str, StepProbe], dict[str, str]]:
    """Prepare the timing of every method that this teacher and this student allow.

    Returns:
        {method: setup} and {method: probe} of those, and {method: why it is not possible} of the others.

    Raises:
        CacheError: for a tap that the cache does not contain.
    """
    setups, probes, reasons = {}, {}, {}
    for name, config in configs.items():
        try:
            setups[name] = base_setup.with_options(config)
            probes[name] = StepProbe(config, setups[name], steps)
        except UsageError as error:
            reasons[name] = str(error)
    return setups, probes, reasons


def _format_file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _list_cached_layers(network: nn.Module, cache: CacheReader, config: StudentConfig) -> str:
    """Join the cached layers by +, shallow to deep: in the order in which the student has layers of these names."""
    cached = dict.fromkeys(tap.partition(":")[0] for tap in cache.manifest.taps)
    names = [name for name, _ in network.named_modules() if name in cached]
    if len(names) != len(cached):
        raise UsageError(
            f"{config.arch} does not have all of the cached layers {', '.join(cached)}: name them from shallow to deep"
            " with --layers, and the student's with --student-layers"
        )
    return "+".join(names)


def list_methods(task: str) -> dict[str, tuple[str, ...]]:
    """List the methods of a task, {name: losses}, with `hard` first.

    Those of labels and numbers are the losses of the task that read no layer, and the methods of METHODS that read
    layers, with the task's loss of hard targets in place of `hard`.
    """
    if task == CLASSES:
        return METHODS
    hard = HARD_LOSSES[task].name
    methods: dict[str, tuple[str, ...]] = {"hard": (hard,)}
    for name, loss in LOSSES.items():
        if task in loss.tasks and name != hard and not hasattr(loss, "teacher"):  # which names a layer
            methods[name] = (hard, name) if loss.needs_logits else (name,)
    for name, specs in METHODS.items():
        others = [LOSSES[spec.partition(":")[0]] for spec in specs if spec != "hard"]
        if others and name not in methods and all(task in loss.tasks for loss in others):
            methods[name] = tuple(hard if spec == "hard" else spec for spec in specs)
    return methods


def _check_method_names(config: MethodsConfig, methods: Collection[str]) -> list[str]:
    """Return the methods that --only names. Raises UsageError for one that is none of `methods`."""
    only = [name.strip() for name in config.only.split(",") if name.strip()]
    for name in only:
        if name not in methods:
            raise unknown_name_error("method", name, methods)
    return only


def _list_methods_of_layers(config: MethodsConfig, methods: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the methods to compare that read layers. methods: those of the task."""
    names = _check_method_names(config, methods) or methods
    return [name for name in names if any("{" in spec for spec in methods[name])]


def _select_methods(
    config: MethodsConfig, methods: Mapping[str, tuple[str, ...]], layers: str, console: Console
) -> dict[str, tuple[str, ...]]:
    """Return {method: losses} of the methods to compare, `hard` first, with the names of layers filled in."""
    only, need_layers = _check_method_names(config, methods), _list_methods_of_layers(config, methods)
    if need_layers and not layers:
        if only:
            raise UsageError(f"'{need_layers[0]}' reads layers, and the cache has no taps: name them with --layers")
        console.print(f"the cache has no taps: left out are {', '.join(need_layers)} (--layers names layers)")
    names = [name for name in only or methods if layers or name not in need_layers]
    student_layers = config.student_layers or layers
    placeholders = {
        "all": layers,
        "last": layers.split("+")[-1],
        "s_all": student_layers,
        "s_last": student_layers.split("+")[-1],
    }
    return {name: tuple(spec.format(**placeholders) for spec in methods[name]) for name in ["hard", *names]}


def _train_method(
    name: str, config: StudentConfig, setup: DistillationSetup, cost: MethodCost, console: Console
) -> dict[str, Any]:
    """Train a student with one method and return its row; a training that diverges is a row with the reason."""
    console.print(f"{name}: {' '.join(config.loss)}")
    row: dict[str, Any] = {"method": name, "losses": list(config.loss), **asdict(cost)}
    task = setup.cache.task
    try:
        student = train_or_resume(config, setup, console)["student"]
    except DivergedError as error:
        return row | {"failed": str(error)}
    return row | {
        **{name: {split: Figures(student[split]).get(name) for split in setup.held_out} for name in _FIGURES[task]},
        "seconds_an_epoch": student["seconds"] / (config.epochs + config.finetune_epochs),
        "parameters": student["parameters"],
    }


def _assemble_record(
    config: StudentConfig, setup: DistillationSetup, rows: list[dict[str, Any]], time_steps: int
) -> dict[str, Any]:
    """Assemble methods.json from the options of all students, what they are trained from, and the row of each."""
    return {
        **({} if setup.cache.task == CLASSES else {"task": setup.cache.task}),
        "arch": config.arch,
        "epochs": config.epochs,
        "cache": list(config.cache),
        "fingerprint": setup.cache.manifest.fingerprint,
        "teacher": setup.teacher_metrics,
        "methods": rows,
        "versions": library_versions(),
        "machine": describe_machine(setup.device),
        "rounds": ROUNDS,
        "time_steps": time_steps,
    }


def _format_table(record: dict[str, Any]) -> str:
    """Format methods.md: a Markdown table with a row for each method."""
    hard = record["methods"][0]
    split = choose_split(record["teacher"])
    teacher = Figures(record["teacher"][split])
    names = _FIGURES[get_task(record)]
    direction = " (lower is better)" if names[0] in LOWER_IS_BETTER else ""
    lines = [
        f"{escape_markdown(record['arch'])}, {record['epochs']} epochs, from the cache of"
        f" {escape_markdown(record['teacher']['arch'])}"
        f" ({split} {teacher.describe(names[:1])})",
        "",
        f"| method | {split} {TITLES[names[0]]}{direction} | {TITLES[names[1]]} | s/epoch"
        f" | step time / hard (range of {record['rounds']} rounds)"
        " | / kd | saved for the backward pass, MB over hard | own parts, MB | bytes/view |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["methods"]:
        if "ratio" not in row:
            lines.append(f"| {row['method']} | not for this pair: {escape_markdown(row['failed'])} | | | | | | | |")
            continue
        gain = "diverged | | "
        if "failed" not in row:
            main, agreement = (Figures(row[name]).format(split) for name in names)
            gain = f"{main} | {agreement} | {row['seconds_an_epoch']:.1f}"
        to_kd = f"{row['to_kd']:.2f}" if row["to_kd"] else ""
        time = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f}) | {to_kd}"
        memory = f"{(row['saved_bytes'] - hard['saved_bytes']) / 1e6:.1f} | {row['own_bytes'] / 1e6:.1f}"
        lines.append(f"| {row['method']} | {gain} | {time} | {memory} | {row['bytes_a_view']:,} |")
    return "\n".join(lines) + "\n"
