"""`softcache methods`: one arch trained by every loss on one cache: what each gains and what it costs."""

import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from softcache.base.errors import DivergedError, Interrupted, UsageError, unknown_name_error
from softcache.base.files import make_folder, publish_json, publish_text
from softcache.pipeline.batch import Batch
from softcache.pipeline.cache.manifest import count_row_bytes
from softcache.pipeline.taps.hooks import capture_features
from softcache.stages.cli.configs import MethodsConfig, StudentConfig
from softcache.stages.cli.console import Console, progress_bar
from softcache.stages.runs.environment import describe_machine, library_versions
from softcache.stages.runs.folder import find_free_folder
from softcache.stages.training.checkpoint import TrainState
from softcache.stages.training.run import TrainingRun
from softcache.stages.training.step import build_loss_parts, start_training, train_step

from . import command as student_stage
from .defaults import fill_defaults, to_student_config
from .phases import make_training_run
from .recipes import apply_recipe
from .setup import DistillationSetup

_ROUNDS = 7

# Each row: the losses of a method, {all} the layers from shallow to deep, {last} the last of them. Logit methods
# first; weights are those of the papers' own CIFAR experiments where these were read, see the losses.
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


@dataclass
class Cost:
    """What a step of a method takes. ratio: its time over that of `hard` in the same round, median and range; to_kd:
    over that of `kd`, where that is among the methods."""

    bytes_a_view: int
    own_bytes: int
    saved_bytes: int
    ratio: float = 1.0
    least: float = 1.0
    most: float = 1.0
    to_kd: float | None = None


def run(config: MethodsConfig, said: set[str]) -> None:
    """Time all methods in turns, then train each; methods.json and methods.md. --out goes on with what is there."""
    console = Console(config.json, epoch_lines=False)
    if config.resume or config.seeds > 1 or config.baseline or config.loss:
        raise UsageError("methods takes no --resume (run it again with the same --out), --seeds, --baseline or --loss")
    folder = Path(config.out) if config.out else find_free_folder("methods")
    first = fill_defaults(replace(apply_recipe(to_student_config(config), said), loss=("hard",)))
    shared = DistillationSetup.open(first)
    student_stage.print_notes(first, shared, console)
    layers = config.layers or _cached_layers(shared, first)
    chosen = _select_methods(config, layers, console)
    asked = {name: replace(first, loss=specs, out=str(folder / _file(name))) for name, specs in chosen.items()}
    runners, materials, impossible = _runners(asked, shared, config.time_steps)
    make_folder(folder)
    costs = _measure_costs(runners)
    possible = list(runners)
    del runners  # with their networks, batches and banks, before the first training
    try:
        rows = [_row(name, asked[name], materials[name], costs[name], console) for name in possible]
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped; the same command with --out {folder} goes on") from None
    rows += [{"method": name, "losses": list(asked[name].loss), "failed": why} for name, why in impossible.items()]
    record = {
        "arch": first.arch,
        "epochs": first.epochs,
        "cache": list(first.cache),
        "fingerprint": shared.cache.manifest.fingerprint,
        "teacher": shared.teacher_metrics,
        "methods": rows,
        "versions": library_versions(),
        "machine": describe_machine(shared.device),
        "rounds": _ROUNDS,
        "time_steps": config.time_steps,
    }
    publish_json(folder / "methods.json", record)
    text = _markdown(record)
    publish_text(folder / "methods.md", text)
    if config.json:
        return console.print_json(json.dumps(record))
    console.print(text)
    console.print(f"run:   {folder}/methods.json, methods.md")


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _cached_layers(setup: DistillationSetup, config: StudentConfig) -> str:
    """The cached layers from shallow to deep, which is their order in a student that has them by the same names."""
    cached = dict.fromkeys(tap.partition(":")[0] for tap in setup.cache.manifest.taps)
    names = [name for name, _ in setup.build_student(config, setup.losses).named_modules() if name in cached]
    if len(names) != len(cached):
        raise UsageError(
            f"{config.arch} has not all of the cached layers {', '.join(cached)}: name them from shallow to deep"
            " with --layers, and the student's with --student-layers"
        )
    return "+".join(names)


def _select_methods(config: MethodsConfig, layers: str, console: Console) -> dict[str, tuple[str, ...]]:
    """{method: losses}, with the layers put in."""
    chosen = [name.strip() for name in config.only.split(",") if name.strip()]
    for name in chosen:
        if name not in METHODS:
            raise unknown_name_error("method", name, METHODS)
    layered = [name for name in chosen or METHODS if any("{" in spec for spec in METHODS[name])]
    if layered and not layers:
        if chosen:
            raise UsageError(f"'{layered[0]}' is of layers, and the cache has no taps: name them with --layers")
        console.print(f"the cache has no taps: without {', '.join(layered)} (--layers … would say which)")
    names = [name for name in chosen or METHODS if layers or name not in layered]
    student = config.student_layers or layers
    words = {"all": layers, "last": layers.split("+")[-1], "s_all": student, "s_last": student.split("+")[-1]}
    return {name: tuple(spec.format(**words) for spec in METHODS[name]) for name in ["hard", *names]}


def _runners(
    asked: dict[str, StudentConfig], shared: DistillationSetup, steps: int
) -> tuple[dict[str, "_Runner"], dict[str, DistillationSetup], dict[str, str]]:
    """Every method that this teacher and this student allow, its material, and why not for the others.

    Raises CacheError for what the cache has not kept.
    """
    runners, materials, impossible = {}, {}, {}
    for name in asked:
        try:
            materials[name] = shared.with_options(asked[name])
            runners[name] = _Runner(asked[name], materials[name], steps)
        except UsageError as error:
            impossible[name] = str(error)
    return runners, materials, impossible


def _measure_costs(runners: dict[str, "_Runner"]) -> dict[str, Cost]:
    """Of every method. Timed in turns, so that a busy moment of the machine falls on all."""
    costs = {name: runner.measure_memory() for name, runner in runners.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    with progress_bar(_ROUNDS * len(runners), "timing", "method") as shown:
        for _ in range(_ROUNDS):
            for name, runner in runners.items():
                times[name].append(runner.time_steps())
                shown.update()

    def over(name: str, other: str) -> list[float]:
        return [mine / theirs for mine, theirs in zip(times[name], times[other], strict=True)]

    for name, cost in costs.items():
        found = over(name, "hard")
        cost.ratio, cost.least, cost.most = statistics.median(found), min(found), max(found)
        cost.to_kd = statistics.median(over(name, "kd")) if "kd" in runners else None
    return costs


class _Runner:
    """A method with batches in memory, ready to take steps whose result nobody uses."""

    def __init__(self, config: StudentConfig, setup: DistillationSetup, steps: int):
        labels = setup.transfer_set.splits["train"].labels
        network = setup.build_student(config, setup.losses)
        self.run = run = make_training_run("student", config, setup, network, setup.losses, labels, Path())
        head = build_loss_parts(run)
        run.criterion.set_progress(0, 2)
        state = TrainState.create(run.model, run.criterion.parts, config, lambda _: 1e-6)
        self._hooks = ExitStack()
        features = self._hooks.enter_context(capture_features(run.model.network, run.criterion.student_taps))
        self.training = start_training(run, state, features, head)
        self.batches = [batch.to(run.device) for batch in run.stream.batches(0, steps)]
        self.bytes_per_view = _count_bytes_per_view(run, setup)
        self._steps(self.batches[:2])

    def time_steps(self) -> float:
        """Return the seconds of a step on each batch."""
        started = time.perf_counter()
        self._steps(self.batches)
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        return time.perf_counter() - started

    def measure_memory(self) -> Cost:
        """Return the bytes of the method: of the cache, of its own parts, and of what is saved for the gradient."""
        saved: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            self._steps(self.batches[:1])
        parts = self.run.criterion.parts
        own_bytes = sum(x.numel() * x.element_size() for x in (*parts.parameters(), *parts.buffers()))
        return Cost(self.bytes_per_view, own_bytes, sum(saved.values()))

    def _steps(self, batches: list[Batch]) -> None:
        self.run.model.train()
        for batch in batches:
            train_step(self.training, batch)


def _count_bytes_per_view(run: TrainingRun, setup: DistillationSetup) -> int:
    """Return what the cache holds of a view for these losses."""
    manifest = setup.cache.manifest
    read = [f"features/{tap}" for tap in setup.taps]
    size = count_row_bytes({name: manifest.datasets[name] for name in read})
    if any(loss.needs_logits for loss in run.criterion.losses):
        for cache in setup.teachers.members:
            size += count_row_bytes(
                {name: cache.manifest.datasets[name] for name in cache.codec.datasets(cache.classes)}
            )
    return size


def _row(name: str, config: StudentConfig, setup: DistillationSetup, cost: Cost, console: Console) -> dict[str, Any]:
    """Train one method; its row of the table. One that diverges is reported, not hidden."""
    console.print(f"{name}: {' '.join(config.loss)}")
    row: dict[str, Any] = {"method": name, "losses": list(config.loss), **cost.__dict__}
    try:
        student = student_stage.train_or_resume(config, setup, console)["student"]
    except DivergedError as diverged:
        return row | {"failed": str(diverged)}
    figures = {split: student[split]["accuracy"] for split in setup.held_out}
    return row | {
        "accuracy": figures,
        "agreement": {split: student[split]["agreement"] for split in setup.held_out},
        "seconds_an_epoch": student["seconds"] / (config.epochs + config.finetune_epochs),
        "parameters": student["parameters"],
    }


def _markdown(record: dict[str, Any]) -> str:
    """The table in words."""
    hard = record["methods"][0]
    split = "test" if "test" in record["teacher"] else "val"
    lines = [
        f"{record['arch']}, {record['epochs']} epochs, from the cache of {record['teacher']['arch']}"
        f" ({split} accuracy {record['teacher'][split]['accuracy']:.4f})",
        "",
        f"| method | {split} accuracy | agreement | s/epoch | step time / hard (least to most of {record['rounds']})"
        " | / kd | kept for the gradient, MB over hard | own MB | bytes/view |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["methods"]:
        if "ratio" not in row:
            lines.append(f"| {row['method']} | not for this pair: {row['failed']} | | | | | | | |")
            continue
        ratio = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f}) | "
        ratio += f"{row['to_kd']:.2f}" if row["to_kd"] else ""
        memory = f"{(row['saved_bytes'] - hard['saved_bytes']) / 1e6:.1f} | {row['own_bytes'] / 1e6:.1f}"
        found = "diverged | | "
        if "failed" not in row:
            found = f"{row['accuracy'][split]:.4f} | {row['agreement'][split]:.4f} | {row['seconds_an_epoch']:.1f}"
        lines.append(f"| {row['method']} | {found} | {ratio} | {memory} | {row['bytes_a_view']:,} |")
    return "\n".join(lines) + "\n"
