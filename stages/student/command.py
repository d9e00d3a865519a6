"""`softcache student`: stage two. Train a student from a cache; no teacher is needed, or looked for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

from softcache.base.errors import CacheError, TrainingStopped
from softcache.base.files import publish_json, remove_stale_files
from softcache.data.transfer_set import TRANSFER_SETS, find_source, short_name
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.metrics.classification import mean_and_spread
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import format_command, program_name
from softcache.stages.distributed.ranks import broadcast_from_first, is_first, process_group
from softcache.stages.runs.cost import compute_cost, format_cost
from softcache.stages.runs.environment import describe_machine, library_versions, measure_peak_memory
from softcache.stages.runs.folder import check_installed, check_same_config, find_unfinished_runs, open_run, start_run
from softcache.stages.runs.logits import TEACHER_LOGITS, save_logits
from softcache.stages.runs.results_table import print_table
from softcache.stages.training.data_parallel import check_batches_shareable, note_batch_norm

from .phases import StudentTraining, train_phases
from .recipes import apply_recipe
from .setup import DistillationSetup
from .teachers import check_same_shards, describe_teachers, save_targets_record

_NOT_ALONE = {
    "soft_f1": "soft_f1 alone forgets rare classes: put kd or hard beside it, see --recipe f1",
    "balanced_kd": "balanced_kd alone has no labels to hold it: it goes beside hard",
    "dive": "dive alone has no labels to hold it: it goes beside balanced_softmax",
}


def run(settings: StudentConfig, said: set[str]) -> None:
    """Cache and data, checked against each other; then seed after seed; then the result. By all ranks."""
    with process_group(settings.device):
        _run(settings, said, Console(settings.json))


def _run(settings: StudentConfig, said: set[str], console: Console) -> None:
    if not settings.resume:
        settings = fill_defaults(apply_recipe(settings, said))
    settings, folder = open_run(settings, said, f"{short_name(settings.data)}-{settings.arch.replace(':', '-')}")
    if "out" not in said:
        for stopped in find_unfinished_runs(settings, folder):
            console.say(f"'{stopped}' was stopped; it goes on with  {program_name()} student --resume --out {stopped}")
    material = DistillationSetup.open(settings)
    # An arch that cannot be built is found before a folder is made.
    network = material.network(settings, material.losses)
    note_batch_norm(network, material.device, console)
    # And that no row is left, or too few of a batch.
    stream = material.stream(settings, material.transfer_set.splits["train"].labels, False, False)
    check_batches_shareable(network, stream, material.device, settings)
    print_notes(settings, material, console)
    unread = not any(loss.needs_logits or loss.needs_head for loss in material.losses)
    if unread and (material.teachers.combine or material.teachers.maps):
        console.say("no loss here reads what the teacher says: a blend and a map change the figures alone")
    result = train_student(settings, material, folder, console)
    if settings.json:
        return console.result(json.dumps(result))
    print_table(result, console)
    split = "test" if "test" in material.held_out else "val"
    if result["student"][split]["accuracy"] < 1.5 / material.cache.classes:
        console.say("The student knows hardly more than chance: --clip-norm 1 or a lower --learning-rate often helps;")
        console.say("terms of hidden layers alone do not train its last layer: add kd or hard, or --finetune-epochs")
    console.say(f"bill:  {format_cost(result['bill'])}")
    console.say(f"run:   {folder}")
    console.say(f"cache: {', '.join(settings.cache)}, reused by every other student: no teacher is needed any more")
    other = "cnn" if settings.arch != "cnn" else "mlp:64"
    data = settings.data if material.cache.data == "folder" else ""
    same = {name: getattr(settings, name) for name in ("cache", "data_root", "combine", "map", "missing")}
    again = StudentConfig(**same, data=data, arch=other, baseline=True)
    console.say(f"next:  {format_command('student', again)}")


def print_notes(settings: StudentConfig, material: DistillationSetup, console: Console) -> None:
    """What to know before a training begins: who teaches, rows that nobody answers, a loss that goes wrong."""
    if not material.teachers.is_single_cache:
        for line in describe_teachers(material.teachers, material.figures_of_members, material.figures):
            console.say(line)
    if settings.missing:
        gone, rows = int(material.without_answer.sum()), len(material.without_answer)
        how = "left out" if settings.missing == "skip" else "learned from their labels in draws without an answer"
        console.say(f"--missing {settings.missing}: {gone:,} of {rows:,} rows have no answer in some draw: {how}")
    if settings.epochs % (k := settings.draws_per_decode):
        some = "some images are shown in fewer draws than others"
        console.say(f"--epochs {settings.epochs} is no multiple of --draws-per-decode {k}: {some}")
    if len(material.losses) == 1 and (why := _NOT_ALONE.get(material.losses[0].name)):
        console.say(why)


def train_or_resume(settings: StudentConfig, material: DistillationSetup, console: Console) -> dict[str, Any]:
    """Train in settings.out, where it may have been begun or finished; its result.json. Raises as to_go_on."""
    return train_student(resume_if_started(settings), material, Path(settings.out), console)


def resume_if_started(settings: StudentConfig) -> StudentConfig:
    """The settings with --resume where settings.out was begun. Raises CacheError for other settings there."""
    folder = Path(settings.out)
    if not (folder / "settings.json").exists():
        return settings
    check_same_config(folder, settings)
    return replace(settings, resume=True)


def train_student(
    settings: StudentConfig, material: DistillationSetup, folder: Path, console: Console
) -> dict[str, Any]:
    """Seed after seed in a run's folder; its result.json."""
    with started_run(settings, material, folder):
        seeds = range(settings.seed, settings.seed + settings.seeds)
        results = []
        for seed in seeds:
            own = folder if settings.seeds == 1 else folder / f"seed-{seed}"
            (result,) = train_phases([StudentTraining(replace(settings, seed=seed), material, own)], console)
            if isinstance(result, TrainingStopped):
                raise result
            results.append(result)
            if (
                settings.seeds > 1 and is_first()
            ):  # so that each seed's folder is a run: a teacher for the next generation
                remove_stale_files(own, ("result.json",))
                publish_json(own / "result.json", result)
        result = assemble_result(settings, material, results)
        if is_first():
            publish_json(folder / "result.json", result)
        return result


@contextmanager
def started_run(settings: StudentConfig, material: DistillationSetup, folder: Path) -> Iterator[None]:
    """A run's folder, held, in which is written what it is trained from."""
    with start_run(settings, folder):
        broadcast_from_first(lambda: _record_targets(settings, material, folder))
        yield


def _record_targets(settings: StudentConfig, material: DistillationSetup, folder: Path) -> None:
    """Which shards the run is trained from, what becomes of several caches or through a map, and what it then says."""
    check_same_shards(material.teachers, settings, material.taps, folder)
    save_targets_record(material.teachers, folder)
    if not (folder / TEACHER_LOGITS).is_file():
        said = {split: logits.numpy() for split, logits in material.teacher.items()}
        save_logits(folder / TEACHER_LOGITS, said, material.transfer_set)


def student_config(settings: StudentConfig) -> StudentConfig:
    """The settings of one student, of a command that has more; what it prints is not one JSON object."""
    own = {f.name: getattr(settings, f.name) for f in fields(StudentConfig)}
    return StudentConfig(**own | {"json": False})


def fill_defaults(settings: StudentConfig) -> StudentConfig:
    """Every setting that was left open, from the recipe of the cache's data set. What is asked for can be had."""
    check_installed(settings)
    if settings.data:
        find_source(settings.data)
    caches = settings.cache or (f"caches/{short_name(settings.data or 'digits')}",)
    for cache in caches:
        if not Path(cache).exists():
            data = f" --data {quote(settings.data)}" if settings.data else ""
            make = f"{program_name()} teacher-cache{data} --out {quote(cache)}"
            raise CacheError(f"there is no cache at '{cache}': make one with  {make}")
    opened = Cache(Path(caches[0]))
    name = opened.data
    if name not in TRANSFER_SETS:
        raise CacheError(f"the cache '{caches[0]}' is of '{name}', a data set that this program does not know")
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


def assemble_result(
    settings: StudentConfig, material: DistillationSetup, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """result.json: means over the seeds, their standard deviations, and the single results."""
    manifests = [cache.manifest for cache in material.teachers.members]
    manifest = manifests[0]
    members = {} if material.teachers.is_single_cache else {"members": material.figures_of_members}
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
        "bill": compute_cost(manifests, settings, mean["student"]["seconds"]),
        "spread": spread,
        "seeds": [{"seed": settings.seed + i, **result} for i, result in enumerate(results)],
        "seconds": {name: sum(r[name]["seconds"] for r in results) for name in mean},
        "images_per_second": mean["student"]["images_per_second"],
        "peak_memory": measure_peak_memory(material.device),
        "versions": library_versions(),
        "machine": describe_machine(material.device),
    }
