"""`stages student`: stage two. Train a student from a cache; no teacher is needed, or looked for."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import nn

from data.errors import Refused, WrongCommand
from data.transfer_set import TRANSFER_SETS, Labels, TransferSet, row_of, stratified
from pipeline.cache import Cache
from pipeline.files import publish_json, remove_leftovers
from pipeline.identity import describe
from pipeline.losses import Loss, parse_losses
from pipeline.losses.hard import Hard
from pipeline.metrics import evaluate, mean_and_spread
from pipeline.models import build, multiply_adds, parameters
from pipeline.models.prepared import Preparation, Prepared
from pipeline.proof import probe
from pipeline.stream import Stream

from .check_cache import data_of
from .command_line import remake, this_program
from .console import Console
from .held_out import HeldOut
from .runs import begin_run, device_of, machine, open_run, peak_memory, read_json, unfinished, versions
from .settings import StudentSettings
from .table import print_table
from .teacher import row_name
from .training import Job, fit


def run(settings: StudentSettings, said: set[str]) -> None:
    """Cache and data, checked against each other; then seed after seed; then the result."""
    console = Console(settings.json)
    if not settings.resume:
        settings = with_recipe(settings)
    settings, folder = open_run(settings, said, f"{row_name(settings.data)}-{settings.arch.replace(':', '-')}")
    if "out" not in said:
        for stopped in unfinished(settings, folder):
            console.say(f"'{stopped}' was stopped; it goes on with  {this_program()} student --resume --out {stopped}")
    material = Material.open(settings)
    material.network(settings)  # an arch that cannot be built is found before a folder is made
    with begin_run(settings, folder):
        result = _trained(settings, material, folder, console)
    if settings.json:
        return console.result(json.dumps(result))
    print_table(result, console)
    console.say(f"run:   {folder}")
    console.say(f"cache: {settings.cache}, reused by every other student: no teacher is needed any more")
    other = "cnn" if settings.arch != "cnn" else "mlp:64"
    data = f" --data {quote(settings.data)}" if material.cache.data == "folder" else ""
    console.say(f"next:  {this_program()} student{data} --cache {quote(settings.cache)} --arch {other} --baseline")


def _trained(settings: StudentSettings, material: "Material", folder: Path, console: Console) -> dict[str, Any]:
    """Seed after seed in a run's folder; its result.json."""
    _same_shards(settings, material, folder)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    results = []
    for seed in seeds:
        own = folder if settings.seeds == 1 else folder / f"seed-{seed}"
        results.append(_one_seed(replace(settings, seed=seed), material, own, console))
        if settings.seeds > 1:  # so that each seed's folder is a run: a teacher for the next generation
            remove_leftovers(own, ("result.json",))
            publish_json(own / "result.json", results[-1])
    result = _whole(settings, material, results)
    publish_json(folder / "result.json", result)
    return result


def _same_shards(settings: StudentSettings, material: "Material", folder: Path) -> None:
    """Write down which shards the run is trained from; a run that goes on must find the same ones."""
    manifest = material.cache.manifest
    used = {
        "fingerprint": manifest.fingerprint,
        "draws": settings.draws,
        "taps": list(material.taps),
        "shards": material.cache.used(settings.draws, material.taps),
    }
    if not (folder / "cache.json").is_file():
        return publish_json(folder / "cache.json", used)
    begun = read_json(folder / "cache.json")
    if begun != used:
        fields = describe(used, begun, ("here", "begun with"))
        raise Refused(f"'{folder}' was begun with other shards than '{material.cache.folder}' now has:{fields}")


def with_recipe(settings: StudentSettings) -> StudentSettings:
    """Every setting that was left open, from the recipe of the cache's data set."""
    if settings.data:
        row_of(settings.data)
    cache = Path(settings.cache or f"caches/{row_name(settings.data or 'digits')}")
    if not cache.exists():
        data = f" --data {quote(settings.data)}" if settings.data else ""
        make = f"{this_program()} teacher-cache{data} --out {quote(str(cache))}"
        raise Refused(f"there is no cache at '{cache}': make one with  {make}")
    opened = Cache(cache)
    name = opened.data
    if name not in TRANSFER_SETS:
        raise Refused(f"the cache '{cache}' is of '{name}', a data set that this program does not know")
    recipe = TRANSFER_SETS[name].recipe
    return replace(
        settings,
        cache=str(cache),
        data=settings.data or ("" if name == "folder" else name),
        draws=settings.draws or opened.manifest.draws,
        arch=settings.arch or recipe.student,
        loss=settings.loss or recipe.losses,
        epochs=settings.epochs or recipe.student_epochs,
        batch_size=settings.batch_size or recipe.batch_size,
        learning_rate=settings.learning_rate or recipe.learning_rate,
        weight_decay=settings.weight_decay if settings.weight_decay >= 0 else recipe.weight_decay,
    )


@dataclass(frozen=True)
class Material:
    """What all seeds share: cache and transfer set, known to belong together, and what the teacher said."""

    cache: Cache
    transfer_set: TransferSet
    losses: tuple[Loss, ...]
    taps: tuple[str, ...]
    preparation: Preparation
    device: torch.device
    held_out: dict[str, HeldOut]
    teacher: dict[str, torch.Tensor]  # {split: logits [N, K] in index order}

    @staticmethod
    def open(settings: StudentSettings) -> "Material":
        """Read and check everything before the first step. Raises Refused or WrongCommand."""
        losses = parse_losses(settings.loss)
        cache = Cache(Path(settings.cache))
        taps = tuple(dict.fromkeys(tap for loss in losses for tap in loss.teacher_taps()))
        _check_taps(settings, cache, taps)
        _check_draws(settings, cache)
        transfer_set = data_of(cache, settings.data, Path(settings.data_root))
        _check_labels(settings, losses, transfer_set.splits["train"].labels, len(transfer_set.classes))
        probe(cache, transfer_set, settings.draws)
        device = device_of(settings.device)
        splits = [split for split in ("val", "test") if split in transfer_set.splits]
        return Material(
            cache, transfer_set, losses, taps,
            # The student's input is normalised as the teacher's, at the size of the views themselves.
            replace(cache.preparation, size=cache.views.size), device,
            {s: HeldOut(transfer_set.splits[s], cache.views, device, settings) for s in splits},
            {s: _teacher_logits(cache, s) for s in splits},
        )  # fmt: skip

    def network(self, settings: StudentSettings) -> nn.Module:
        """The student with the initial weights of its seed."""
        torch.manual_seed(settings.seed)
        return build(settings.arch, self.cache.classes, self.preparation.channels, self.preparation.size)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Every figure of a student on each held-out split."""
        return {
            split: evaluate(rows.logits(model), rows.labels, self.teacher[split].numpy())
            for split, rows in self.held_out.items()
        }

    def stream(self, settings: StudentSettings, labels: Labels, only_labelled: bool, targets: bool) -> Stream:
        """The training stream of one seed."""
        order = self.cache.order("train")
        rows = np.flatnonzero(labels[order] >= 0) if only_labelled else np.arange(len(order))
        return Stream(
            self.transfer_set.splits["train"], self.cache.views, self.cache.seed, settings.seed, settings.batch_size,
            labels, rows, settings.draws, self.cache, self.taps, targets, settings.workers,
        )  # fmt: skip


def _teacher_logits(cache: Cache, split: str) -> torch.Tensor:
    order = cache.order(split)
    logits = cache.targets(split, 0, np.arange(len(order)))[0]
    by_index = torch.empty_like(logits)
    by_index[torch.from_numpy(order)] = logits
    return by_index


def _check_taps(settings: StudentSettings, cache: Cache, taps: tuple[str, ...]) -> None:
    missing = [tap for tap in taps if tap not in cache.manifest.taps]
    if missing:
        have = f"has not kept {', '.join(missing)} (it has: {', '.join(cache.manifest.taps) or 'none'})"
        more = _more(settings, cache, taps=",".join([*cache.manifest.taps, *missing]))
        raise Refused(f"the cache '{settings.cache}' {have}. Add them with  {more}")


def _check_draws(settings: StudentSettings, cache: Cache) -> None:
    if settings.draws > cache.manifest.draws:
        have = f"the cache '{settings.cache}' has {cache.manifest.draws}"
        more = _more(settings, cache, draws=settings.draws)
        raise Refused(f"--draws {settings.draws}, but {have}. Add them with  {more}")


def _more(settings: StudentSettings, cache: Cache, **changes: Any) -> str:
    """The command that adds to the cache, for the data as they lie here."""
    here = {"data": settings.data} if settings.data else {}
    return remake(cache, out=settings.cache, data_root=settings.data_root, **here, **changes)


def _check_labels(settings: StudentSettings, losses: tuple[Loss, ...], labels: Labels, classes: int) -> None:
    unlabelled = bool((labels < 0).any())
    wanting = [loss.name for loss in losses if loss.needs_labels]
    if unlabelled and wanting:
        raise WrongCommand(f"loss '{wanting[0]}' needs labels, and these pictures have none: leave it out")
    if unlabelled and (settings.baseline or settings.labelled):
        flag = "--baseline" if settings.baseline else "--labelled"
        raise WrongCommand(f"{flag} needs labels, and these pictures have none: leave it out")
    if settings.labelled and not classes <= settings.labelled <= len(labels):
        raise WrongCommand(f"--labelled {settings.labelled} is not between {classes} classes and {len(labels)} rows")


def _one_seed(settings: StudentSettings, material: Material, folder: Path, console: Console) -> dict[str, Any]:
    """The student, and the same student without a teacher when asked for, from one seed."""
    labels = material.transfer_set.splits["train"].labels
    if settings.labelled:
        kept = stratified(labels, settings.labelled, key=(settings.seed, 50))
        labels = np.where(np.isin(np.arange(len(labels)), kept), labels, -1)
    only_hard = all(loss.needs_labels for loss in material.losses)
    stream = material.stream(settings, labels, only_hard, targets=True)
    steps = material.stream(settings, labels, False, targets=True).steps_per_round
    result = {"student": _train("student", settings, material, material.losses, stream, steps, folder, console)}
    if settings.baseline:
        smoothing = next((loss.smoothing for loss in material.losses if isinstance(loss, Hard)), 0.0)
        hard = (Hard(smoothing=smoothing),)
        stream = material.stream(settings, labels, True, targets=False)
        result["baseline"] = _train("baseline", settings, material, hard, stream, steps, folder / "baseline", console)
    return result


def _train(
    name: str, settings: StudentSettings, material: Material, losses: tuple[Loss, ...], stream: Stream, steps: int,
    folder: Path, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Train one network and measure it on the held-out splits."""
    preparation = material.preparation
    network = material.network(settings)
    model = Prepared(network, preparation).to(material.device)
    cost = multiply_adds(network, preparation.channels, preparation.size)
    job = Job(name, model, losses, stream, settings.epochs, steps, settings, material.device, folder, cost)
    seconds = fit(job, material.held_out["val"], console)
    figures: dict[str, Any] = {
        "arch": settings.arch,
        "preparation": preparation.identity(),
        "parameters": parameters(network),
        "multiply_adds": job.multiply_adds,
        "seconds": seconds,
        "images_per_second": settings.epochs * steps * len(stream.rows) / stream.steps_per_round / seconds,
    }
    return figures | material.measure(model)


def _whole(settings: StudentSettings, material: Material, results: list[dict[str, Any]]) -> dict[str, Any]:
    """result.json: means over the seeds, their standard deviations, and the single results."""
    manifest = material.cache.manifest
    teacher = {
        split: evaluate(logits.numpy(), material.transfer_set.splits[split].labels)
        for split, logits in material.teacher.items()
    }
    mean, spread = mean_and_spread(results)
    for name in mean:
        mean[name] |= {key: results[0][name][key] for key in ("arch", "preparation", "parameters", "multiply_adds")}
    return {
        "settings": asdict(settings),
        "cache": {
            "fingerprint": manifest.fingerprint,
            "manifest": manifest.digest,
            "draws": settings.draws,
            "rows": manifest.splits["train"],
            "bytes": manifest.bytes,
            "seconds": manifest.seconds,
        },
        "teacher": {"arch": material.cache.teacher, **teacher},
        **mean,
        "spread": spread,
        "seeds": [{"seed": settings.seed + i, **result} for i, result in enumerate(results)],
        "seconds": {name: sum(r[name]["seconds"] for r in results) for name in mean},
        "images_per_second": mean["student"]["images_per_second"],
        "peak_memory": peak_memory(material.device),
        "versions": versions(),
        "machine": machine(material.device),
    }
