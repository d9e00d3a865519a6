"""The run of one student: its folder, its training with each seed, and its result.json."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from softcache.base.files import publish_json, remove_stale_files
from softcache.data.tasks import CLASSES
from softcache.pipeline.metrics.classification import mean_and_spread
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.distributed.ranks import broadcast_from_first, is_first
from softcache.stages.runs.cost import compute_cost
from softcache.stages.runs.environment import describe_machine, library_versions, measure_peak_memory
from softcache.stages.runs.folder import check_same_config, start_run, to_settings
from softcache.stages.runs.initial import record_initial_weights
from softcache.stages.runs.logits import TEACHER_LOGITS, save_logits

from .phases import StudentTraining, train_phases
from .setup import DistillationSetup
from .teachers import save_shards_record, save_targets_record


def train_or_resume(config: StudentConfig, setup: DistillationSetup, console: Console) -> dict[str, Any]:
    """Train a student in the folder `config.out`, or continue the training that was started there.

    Args:
        config: the options of the student.
        setup: what it is trained from.
        console: for progress.

    Returns:
        The content of its result.json.

    Raises:
        CacheError: when the folder holds a run with other options.
    """
    return train_student(resume_if_started(config), setup, Path(config.out), console)


def resume_if_started(config: StudentConfig, may_differ: Collection[str] = ()) -> StudentConfig:
    """Return the options with `resume` on when the run in `config.out` was started before.

    Args:
        config: the options of the student.
        may_differ: as of `check_same_config`.

    Raises:
        CacheError: when it was started with other options.
    """
    folder = Path(config.out)
    if not (folder / "settings.json").exists():
        return config
    check_same_config(folder, config, may_differ)
    return replace(config, resume=True)


def train_student(config: StudentConfig, setup: DistillationSetup, folder: Path, console: Console) -> dict[str, Any]:
    """Train a student with each of its seeds in the folder of a run.

    Args:
        config: the options of the student; `seeds` trainings, from `seed` on.
        setup: what it is trained from.
        folder: the folder of the run; with several seeds each has a folder `seed-N` in it.
        console: for progress.

    Returns:
        The content of its result.json.

    Raises:
        LockedError: when another process trains in the folder.
        TrainingStopped: when a training diverges.
        Interrupted: on Ctrl-C, with the command that continues the training.
    """
    with open_student_run(config, setup, folder):
        results = []
        for seed in range(config.seed, config.seed + config.seeds):
            seed_folder = folder if config.seeds == 1 else folder / f"seed-{seed}"
            student = StudentTraining(replace(config, seed=seed), setup, seed_folder)
            train_phases([student], console)
            if student.stop_reason:
                raise student.stop_reason
            results.append(student.results)
            if config.seeds > 1 and is_first():  # the folder of a seed is a run too: it can be another one's teacher
                remove_stale_files(seed_folder, ("result.json",))
                publish_json(seed_folder / "result.json", {**student.results, **_name_classes(setup)})
        result = assemble_result(config, setup, results)
        if is_first():
            publish_json(folder / "result.json", result)
        return result


@contextmanager
def open_student_run(config: StudentConfig, setup: DistillationSetup, folder: Path) -> Iterator[None]:
    """Lock the folder of a run, with the record of what it is trained from written into it.

    Raises:
        CacheError: when a run to continue was trained from other shards.
        LockedError: when another process trains in the folder.
    """
    with start_run(config, folder):
        record_initial_weights(setup.initial, folder)
        broadcast_from_first(lambda: _save_teacher_records(config, setup, folder))
        yield


def _save_teacher_records(config: StudentConfig, setup: DistillationSetup, folder: Path) -> None:
    """Write which shards are read, how caches are combined and mapped, and the teacher's held-out logits."""
    save_shards_record(setup.teachers, config, setup.taps, folder)
    save_targets_record(setup.teachers, folder)
    if not (folder / TEACHER_LOGITS).is_file():
        logits = {split: logits.numpy() for split, logits in setup.teacher_logits.items()}
        save_logits(folder / TEACHER_LOGITS, logits, setup.transfer_set)


def assemble_result(config: StudentConfig, setup: DistillationSetup, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Assemble result.json: means over the seeds, their standard deviations, and the result of each seed.

    Args:
        config: the options of the student.
        setup: what it was trained from.
        results: {student or baseline: figures} of each seed.
    """
    manifests = [cache.manifest for cache in setup.teachers.members]
    manifest = manifests[0]
    members = {} if setup.teachers.is_single_cache else {"members": setup.member_metrics}
    mean, spread = mean_and_spread(results if len(results) == 1 else list(map(_remove_thresholds, results)))
    for name in mean:
        mean[name] |= {key: results[0][name][key] for key in ("arch", "preparation", "parameters", "multiply_adds")}
    return {
        "settings": to_settings(config),
        "cache": {
            "fingerprint": manifest.fingerprint,
            "manifest": manifest.digest,
            "draws": config.draws,
            "rows": manifest.splits["train"],
            "missing_rows": int(setup.missing_rows.sum()) if config.missing else 0,
            "bytes": sum(m.bytes for m in manifests),
            "seconds": sum(m.seconds for m in manifests),
        },
        **({} if setup.cache.task == CLASSES else {"task": setup.cache.task}),
        "teacher": setup.teacher_metrics,
        **members,
        **mean,
        "bill": compute_cost(manifests, config, mean["student"]["seconds"]),
        "spread": spread,
        "seeds": [{"seed": config.seed + i, **result} for i, result in enumerate(results)],
        "seconds": {name: sum(result[name]["seconds"] for result in results) for name in mean},
        "images_per_second": mean["student"]["images_per_second"],
        "peak_memory": measure_peak_memory(setup.device),
        **_name_classes(setup),
        "versions": library_versions(),
        "machine": describe_machine(setup.device),
    }


def _remove_thresholds(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a seed without thresholds of labels: a mean of them would be those of no student."""
    return {
        model: {name: value for name, value in figures.items() if name != "thresholds"}
        for model, figures in result.items()
    }


def _name_classes(setup: DistillationSetup) -> dict[str, Any]:
    """Return the entry of result.json for the names of the classes, in their order; empty where they have none."""
    return {"classes": list(setup.transfer_set.classes)} if setup.transfer_set.classes else {}
