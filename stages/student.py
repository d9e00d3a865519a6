"""`stages student`: stage two. Train a student from a cache; no teacher is needed, or looked for."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

from torch import nn

from data.errors import Refused
from data.transfer_set import TRANSFER_SETS, Labels, row_of
from pipeline.cache import Cache
from pipeline.files import publish_json, remove_leftovers
from pipeline.losses import Loss
from pipeline.losses.hard import Hard
from pipeline.metrics import mean_and_spread
from pipeline.models import multiply_adds, parameters
from pipeline.models.prepared import Prepared
from pipeline.models.weights import load_state, read_state

from .command_line import command, this_program
from .console import Console
from .data_parallel import say_apart
from .material import Material
from .ranks import from_first, is_first, joined, wait_for
from .recipes import fill_in
from .runs import begin_run, machine, open_run, peak_memory, same_settings, unfinished, versions
from .serving import visible
from .settings import StudentSettings
from .table import print_table
from .taught import in_words, keep, same_shards
from .teacher import row_name
from .training import AfterEpoch, Job, fit

_NOT_ALONE = {
    "soft_f1": "soft_f1 alone forgets rare classes: put kd or hard beside it, see --recipe f1",
    "balanced_kd": "balanced_kd alone has no labels to hold it: it goes beside hard",
    "dive": "dive alone has no labels to hold it: it goes beside balanced_softmax",
}


def run(settings: StudentSettings, said: set[str]) -> None:
    """Cache and data, checked against each other; then seed after seed; then the result. By all ranks."""
    with joined(settings.device):
        _run(settings, said, Console(settings.json))


def _run(settings: StudentSettings, said: set[str], console: Console) -> None:
    if not settings.resume:
        settings = with_recipe(fill_in(settings, said))
    settings, folder = open_run(settings, said, f"{row_name(settings.data)}-{settings.arch.replace(':', '-')}")
    if "out" not in said:
        for stopped in unfinished(settings, folder):
            console.say(f"'{stopped}' was stopped; it goes on with  {this_program()} student --resume --out {stopped}")
    material = Material.open(settings)
    # an arch that cannot be built is found before a folder is made
    say_apart(material.network(settings, material.losses), material.device, console)
    material.stream(settings, material.transfer_set.splits["train"].labels, False, False)  # and that no row is left
    say_notes(settings, material, console)
    unread = not any(loss.needs_logits or loss.needs_head for loss in material.losses)
    if unread and (material.teachers.combine or material.teachers.maps):
        console.say("no loss here reads what the teacher says: a blend and a map change the figures alone")
    result = train(settings, material, folder, console)
    if settings.json:
        return console.result(json.dumps(result))
    print_table(result, console)
    split = "test" if "test" in material.held_out else "val"
    if result["student"][split]["accuracy"] < 1.5 / material.cache.classes:
        console.say("The student knows hardly more than chance: --clip-norm 1 or a lower --learning-rate often helps;")
        console.say("terms of hidden layers alone do not train its last layer: add kd or hard, or --finetune-epochs")
    console.say(f"run:   {folder}")
    console.say(f"cache: {', '.join(settings.cache)}, reused by every other student: no teacher is needed any more")
    other = "cnn" if settings.arch != "cnn" else "mlp:64"
    data = settings.data if material.cache.data == "folder" else ""
    same = {name: getattr(settings, name) for name in ("cache", "data_root", "combine", "map", "missing")}
    again = StudentSettings(**same, data=data, arch=other, baseline=True)
    console.say(f"next:  {command('student', again)}")


def say_notes(settings: StudentSettings, material: Material, console: Console) -> None:
    """What to know before a training begins: who teaches, rows that nobody answers, a loss that goes wrong."""
    if not material.teachers.as_cached:
        for line in in_words(material.teachers, material.figures_of_members, material.figures):
            console.say(line)
    if settings.missing:
        gone, rows = int(material.without_answer.sum()), len(material.without_answer)
        how = "left out" if settings.missing == "skip" else "learned from their labels in draws without an answer"
        console.say(f"--missing {settings.missing}: {gone:,} of {rows:,} rows have no answer in some draw: {how}")
    if len(material.losses) == 1 and (why := _NOT_ALONE.get(material.losses[0].name)):
        console.say(why)


def train_or_go_on(
    settings: StudentSettings, material: Material, console: Console, after_epoch: AfterEpoch | None = None
) -> dict[str, Any]:
    """The same in settings.out, where it may have been begun or finished. Raises Refused for other settings there."""
    folder = Path(settings.out)
    if (folder / "settings.json").exists():
        same_settings(folder, settings)
        settings = replace(settings, resume=True)
    return train(settings, material, folder, console, after_epoch)


def train(
    settings: StudentSettings, material: Material, folder: Path, console: Console,
    after_epoch: AfterEpoch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Seed after seed in a run's folder; its result.json. after_epoch: of the student's training from the cache."""
    with begin_run(settings, folder):
        return _seeds(settings, material, folder, console, after_epoch)


def _seeds(
    settings: StudentSettings, material: Material, folder: Path, console: Console, after_epoch: AfterEpoch | None
) -> dict[str, Any]:
    from_first(lambda: _note_targets(settings, material, folder))
    seeds = range(settings.seed, settings.seed + settings.seeds)
    results = []
    for seed in seeds:
        own = folder if settings.seeds == 1 else folder / f"seed-{seed}"
        results.append(_one_seed(replace(settings, seed=seed), material, own, console, after_epoch))
        if settings.seeds > 1 and is_first():  # so that each seed's folder is a run: a teacher for the next generation
            remove_leftovers(own, ("result.json",))
            publish_json(own / "result.json", results[-1])
    result = _whole(settings, material, results)
    if is_first():
        publish_json(folder / "result.json", result)
    return result


def _note_targets(settings: StudentSettings, material: Material, folder: Path) -> None:
    """Which shards the run is trained from, and what becomes of several caches or through a map."""
    same_shards(material.teachers, settings, material.taps, folder)
    keep(material.teachers, folder)


def without_more(settings: StudentSettings) -> StudentSettings:
    """The settings of one student, of a command that has more; what it prints is not one JSON object."""
    own = {f.name: getattr(settings, f.name) for f in fields(StudentSettings)}
    return StudentSettings(**own | {"json": False})


def with_recipe(settings: StudentSettings) -> StudentSettings:
    """Every setting that was left open, from the recipe of the cache's data set."""
    if settings.data:
        row_of(settings.data)
    caches = settings.cache or (f"caches/{row_name(settings.data or 'digits')}",)
    for cache in caches:
        if not Path(cache).exists():
            data = f" --data {quote(settings.data)}" if settings.data else ""
            make = f"{this_program()} teacher-cache{data} --out {quote(cache)}"
            raise Refused(f"there is no cache at '{cache}': make one with  {make}")
    opened = Cache(Path(caches[0]))
    name = opened.data
    if name not in TRANSFER_SETS:
        raise Refused(f"the cache '{caches[0]}' is of '{name}', a data set that this program does not know")
    recipe = TRANSFER_SETS[name].recipe
    return replace(
        settings,
        cache=caches,
        data=settings.data or ("" if name == "folder" else name),
        draws=settings.draws or opened.manifest.draws,
        arch=settings.arch or recipe.student,
        loss=settings.loss or recipe.losses,
        epochs=settings.epochs or recipe.student_epochs,
        batch_size=settings.batch_size or recipe.batch_size,
        learning_rate=settings.learning_rate or recipe.learning_rate,
        weight_decay=settings.weight_decay if settings.weight_decay >= 0 else recipe.weight_decay,
    )


def _one_seed(
    settings: StudentSettings, material: Material, folder: Path, console: Console, after_epoch: AfterEpoch | None
) -> dict[str, Any]:
    """The student, and the same student without a teacher when asked for, from one seed."""
    labels = visible(settings, material.transfer_set.splits["train"].labels)
    smoothing = next((loss.smoothing for loss in material.losses if isinstance(loss, Hard)), 0.0)
    hard: tuple[Loss, ...] = (Hard(smoothing=smoothing),)

    def trained(
        name: str, own: StudentSettings, losses: tuple[Loss, ...], where: Path, start: Path | None = None
    ) -> Any:
        network = material.network(settings, hard if name == "baseline" else material.losses)
        if start:
            wait_for(start)
            load_state(network, read_state(start), str(start))
        told = after_epoch if name == first_training(settings) else None
        return _train(name, own, material, network, losses, labels, where, console, told)

    if not settings.finetune_epochs:
        result = {"student": trained("student", settings, material.losses, folder)}
    else:
        first = trained("distilled", settings, material.losses, folder / "distilled")
        second = trained("student", _finetuning(settings), hard, folder, folder / "distilled/distilled.pt")
        result = {"student": second | {"seconds": first["seconds"] + second["seconds"]}}
    if settings.baseline:
        longer = replace(settings, epochs=settings.epochs + settings.finetune_epochs)
        result["baseline"] = trained("baseline", longer, hard, folder / "baseline")
    return result


def first_training(settings: StudentSettings) -> str:
    """The name of the training from the cache."""
    return "distilled" if settings.finetune_epochs else "student"


def _finetuning(settings: StudentSettings) -> StudentSettings:
    """The settings of the training from hard targets alone that follows distillation."""
    rate = settings.finetune_learning_rate or settings.learning_rate / 10
    return replace(settings, epochs=settings.finetune_epochs, learning_rate=rate)


def _train(
    name: str, settings: StudentSettings, material: Material, network: nn.Module, losses: tuple[Loss, ...],
    labels: Labels, folder: Path, console: Console, after_epoch: AfterEpoch | None,
) -> dict[str, Any]:  # fmt: skip
    """Train one network and measure it on the held-out splits. labels [N]: -1 where hidden."""
    preparation = material.preparation
    job = replace(job_of(name, settings, material, network, losses, labels, folder), after_epoch=after_epoch)
    done = fit(job, material.held_out["val"], console)
    figures: dict[str, Any] = {
        "arch": material.arch(settings, material.losses if name != "baseline" else losses),
        "preparation": preparation.identity(),
        "parameters": parameters(network),
        "multiply_adds": job.multiply_adds,
        "seconds": done.seconds,
        "epoch": done.epoch,
        "images_per_second": settings.epochs
        * job.steps
        * len(job.stream.rows)
        / job.stream.steps_per_round
        / done.seconds,
    }
    return figures | from_first(lambda: material.measure(job.model))


def job_of(
    name: str, settings: StudentSettings, material: Material, network: nn.Module, losses: tuple[Loss, ...],
    labels: Labels, folder: Path,
) -> Job:  # fmt: skip
    """What is to be trained. A baseline takes as many steps as its student, on the labelled rows alone."""
    preparation = material.preparation
    model = Prepared(network, preparation).to(material.device)
    cost = multiply_adds(network, preparation.channels, preparation.size)
    only_labelled = all(loss.needs_labels for loss in losses)
    targets = any(loss.needs_logits or loss.teacher_taps() for loss in losses)
    stream = material.stream(settings, labels, only_labelled, targets)
    steps = material.stream(settings, labels, False, targets).steps_per_round
    return Job(
        name, model, losses, stream, settings.epochs, steps, settings, material.device, folder, cost,
        known=material.known(labels), term=material.term(settings),
    )  # fmt: skip


def _whole(settings: StudentSettings, material: Material, results: list[dict[str, Any]]) -> dict[str, Any]:
    """result.json: means over the seeds, their standard deviations, and the single results."""
    manifests = [cache.manifest for cache in material.teachers.members]
    manifest = manifests[0]
    members = {} if material.teachers.as_cached else {"members": material.figures_of_members}
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
            "missing_rows": int(material.without_answer.sum()) if settings.missing else 0,
            "bytes": sum(m.bytes for m in manifests),
            "seconds": sum(m.seconds for m in manifests),
        },
        "teacher": material.figures,
        **members,
        **mean,
        "spread": spread,
        "seeds": [{"seed": settings.seed + i, **result} for i, result in enumerate(results)],
        "seconds": {name: sum(r[name]["seconds"] for r in results) for name in mean},
        "images_per_second": mean["student"]["images_per_second"],
        "peak_memory": peak_memory(material.device),
        "versions": versions(),
        "machine": machine(material.device),
    }
