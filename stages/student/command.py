"""`softcache student`: stage two. Train a student from a cache; no teacher is needed, or looked for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from softcache.base.files import publish_json, remove_stale_files
from softcache.data.transfer_set import short_name
from softcache.pipeline.metrics.classification import mean_and_spread
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import format_command, program_name
from softcache.stages.distributed.ranks import broadcast_from_first, is_first, process_group
from softcache.stages.runs.cost import compute_cost, format_cost
from softcache.stages.runs.environment import describe_machine, library_versions, measure_peak_memory
from softcache.stages.runs.folder import check_same_config, find_unfinished_runs, open_run, start_run
from softcache.stages.runs.logits import TEACHER_LOGITS, save_logits
from softcache.stages.runs.results_table import print_table
from softcache.stages.training.data_parallel import check_batches_shareable, note_batch_norm

from .defaults import fill_defaults
from .phases import StudentTraining, train_phases
from .recipes import apply_recipe
from .setup import DistillationSetup
from .teachers import check_same_shards, describe_teachers, save_targets_record

_NOT_ALONE = {
    "soft_f1": "soft_f1 alone forgets rare classes: put kd or hard beside it, see --recipe f1",
    "balanced_kd": "balanced_kd alone has no labels to hold it: it goes beside hard",
    "dive": "dive alone has no labels to hold it: it goes beside balanced_softmax",
}


def run(config: StudentConfig, said: set[str]) -> None:
    """Cache and data, checked against each other; then seed after seed; then the result. By all ranks."""
    with process_group(config.device):
        _run(config, said, Console(config.json))


def _run(config: StudentConfig, said: set[str], console: Console) -> None:
    if not config.resume:
        config = fill_defaults(apply_recipe(config, said))
    config, folder = open_run(config, said, f"{short_name(config.data)}-{config.arch.replace(':', '-')}")
    if "out" not in said:
        for stopped in find_unfinished_runs(config, folder):
            console.print(
                f"'{stopped}' was stopped; it goes on with  {program_name()} student --resume --out {stopped}"
            )
    setup = DistillationSetup.open(config)
    # An arch that cannot be built is found before a folder is made.
    network = setup.build_student(config, setup.losses)
    note_batch_norm(network, setup.device, console)
    # And that no row is left, or too few of a batch.
    stream = setup.make_stream(config, setup.transfer_set.splits["train"].labels, False, False)
    check_batches_shareable(network, stream, setup.device, config)
    print_notes(config, setup, console)
    unread = not any(loss.needs_logits or loss.needs_head for loss in setup.losses)
    if unread and (setup.teachers.combine or setup.teachers.maps):
        console.print("no loss here reads what the teacher says: a blend and a map change the figures alone")
    result = train_student(config, setup, folder, console)
    if config.json:
        return console.print_json(json.dumps(result))
    print_table(result, console)
    split = "test" if "test" in setup.held_out else "val"
    if result["student"][split]["accuracy"] < 1.5 / setup.cache.classes:
        console.print(
            "The student knows hardly more than chance: --clip-norm 1 or a lower --learning-rate often helps;"
        )
        console.print("terms of hidden layers alone do not train its last layer: add kd or hard, or --finetune-epochs")
    console.print(f"bill:  {format_cost(result['bill'])}")
    console.print(f"run:   {folder}")
    console.print(f"cache: {', '.join(config.cache)}, reused by every other student: no teacher is needed any more")
    other = "cnn" if config.arch != "cnn" else "mlp:64"
    data = config.data if setup.cache.data == "folder" else ""
    same = {name: getattr(config, name) for name in ("cache", "data_root", "combine", "map", "missing")}
    again = StudentConfig(**same, data=data, arch=other, baseline=True)
    console.print(f"next:  {format_command('student', again)}")


def print_notes(config: StudentConfig, setup: DistillationSetup, console: Console) -> None:
    """What to know before a training begins: who teaches, rows that nobody answers, a loss that goes wrong."""
    if not setup.teachers.is_single_cache:
        for line in describe_teachers(setup.teachers, setup.member_metrics, setup.teacher_metrics):
            console.print(line)
    if config.missing:
        gone, rows = int(setup.missing_rows.sum()), len(setup.missing_rows)
        how = "left out" if config.missing == "skip" else "learned from their labels in draws without an answer"
        console.print(f"--missing {config.missing}: {gone:,} of {rows:,} rows have no answer in some draw: {how}")
    if config.epochs % (k := config.draws_per_decode):
        some = "some images are shown in fewer draws than others"
        console.print(f"--epochs {config.epochs} is no multiple of --draws-per-decode {k}: {some}")
    if len(setup.losses) == 1 and (why := _NOT_ALONE.get(setup.losses[0].name)):
        console.print(why)


def train_or_resume(config: StudentConfig, setup: DistillationSetup, console: Console) -> dict[str, Any]:
    """Train in settings.out, where it may have been begun or finished; its result.json. Raises as to_go_on."""
    return train_student(resume_if_started(config), setup, Path(config.out), console)


def resume_if_started(config: StudentConfig) -> StudentConfig:
    """The settings with --resume where settings.out was begun. Raises CacheError for other settings there."""
    folder = Path(config.out)
    if not (folder / "settings.json").exists():
        return config
    check_same_config(folder, config)
    return replace(config, resume=True)


def train_student(config: StudentConfig, setup: DistillationSetup, folder: Path, console: Console) -> dict[str, Any]:
    """Seed after seed in a run's folder; its result.json."""
    with started_run(config, setup, folder):
        results = []
        for seed in range(config.seed, config.seed + config.seeds):
            seed_folder = folder if config.seeds == 1 else folder / f"seed-{seed}"
            student = StudentTraining(replace(config, seed=seed), setup, seed_folder)
            train_phases([student], console)
            if student.stopped:
                raise student.stopped
            results.append(student.results)
            if config.seeds > 1 and is_first():  # so that each seed's folder is a run: a teacher of the next student
                remove_stale_files(seed_folder, ("result.json",))
                publish_json(seed_folder / "result.json", student.results)
        result = assemble_result(config, setup, results)
        if is_first():
            publish_json(folder / "result.json", result)
        return result


@contextmanager
def started_run(config: StudentConfig, setup: DistillationSetup, folder: Path) -> Iterator[None]:
    """A run's folder, held, in which is written what it is trained from."""
    with start_run(config, folder):
        broadcast_from_first(lambda: _record_targets(config, setup, folder))
        yield


def _record_targets(config: StudentConfig, setup: DistillationSetup, folder: Path) -> None:
    """Which shards the run is trained from, what becomes of several caches or through a map, and what it then says."""
    check_same_shards(setup.teachers, config, setup.taps, folder)
    save_targets_record(setup.teachers, folder)
    if not (folder / TEACHER_LOGITS).is_file():
        said = {split: logits.numpy() for split, logits in setup.teacher_logits.items()}
        save_logits(folder / TEACHER_LOGITS, said, setup.transfer_set)


def assemble_result(config: StudentConfig, setup: DistillationSetup, results: list[dict[str, Any]]) -> dict[str, Any]:
    """result.json: means over the seeds, their standard deviations, and the single results."""
    manifests = [cache.manifest for cache in setup.teachers.members]
    manifest = manifests[0]
    members = {} if setup.teachers.is_single_cache else {"members": setup.member_metrics}
    mean, spread = mean_and_spread(results)
    for name in mean:
        mean[name] |= {key: results[0][name][key] for key in ("arch", "preparation", "parameters", "multiply_adds")}
    return {
        "settings": asdict(config),
        "cache": {
            "fingerprint": manifest.fingerprint,
            "manifest": manifest.digest,
            "draws": config.draws,
            "rows": manifest.splits["train"],
            "missing_rows": int(setup.missing_rows.sum()) if config.missing else 0,
            "bytes": sum(m.bytes for m in manifests),
            "seconds": sum(m.seconds for m in manifests),
        },
        "teacher": setup.teacher_metrics,
        **members,
        **mean,
        "bill": compute_cost(manifests, config, mean["student"]["seconds"]),
        "spread": spread,
        "seeds": [{"seed": config.seed + i, **result} for i, result in enumerate(results)],
        "seconds": {name: sum(r[name]["seconds"] for r in results) for name in mean},
        "images_per_second": mean["student"]["images_per_second"],
        "peak_memory": measure_peak_memory(setup.device),
        "versions": library_versions(),
        "machine": describe_machine(setup.device),
    }
