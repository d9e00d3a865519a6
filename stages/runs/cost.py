"""The cost of a student, and the teacher's time that the cache saved, compared with a teacher in the training loop."""

from softcache.pipeline.cache.manifest import Manifest
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import format_duration

Cost = dict[str, float | None]


def compute_cost(manifests: list[Manifest], config: StudentConfig, seconds: float) -> Cost:
    """Compute the cost of a student, in seconds.

    Args:
        manifests: of its caches.
        config: of the student.
        seconds: of the training of one student, its fine-tuning included.

    Returns:
        stage_one: the teacher's inference for the cache, needed once.
        epoch: an epoch of this student.
        teacher_epoch: the teacher's inference for the views of an epoch, at its rate in stage one on that machine.
        live_epoch: the sum of both.
        saved: the teacher's time in the epochs of this student, which stage one has replaced.
        paid_after_epochs, paid_after_students: after how many epochs, or students, stage one takes no longer than a
        teacher in the loop.
        None for values that need a time that a cache does not have.
    """
    stage_one = sum(manifest.seconds for manifest in manifests)
    teacher = sum(manifest.seconds / manifest.count_views() * manifest.splits["train"] for manifest in manifests)
    epoch = seconds / (config.epochs + config.finetune_epochs)
    is_known = teacher > 0
    return {
        "stage_one": stage_one,
        "epoch": epoch,
        "teacher_epoch": teacher if is_known else None,
        "live_epoch": epoch + teacher if is_known else None,
        "saved": teacher * config.epochs if is_known else None,
        "paid_after_epochs": stage_one / teacher if is_known else None,
        "paid_after_students": stage_one / teacher / config.epochs if is_known else None,
    }


def format_cost(cost: Cost) -> str:
    """Format the cost of a student as one line of text."""
    line = f"stage one {format_duration(cost['stage_one'] or 0)}, once; an epoch {format_duration(cost['epoch'] or 0)}"
    teacher, live, saved = cost["teacher_epoch"], cost["live_epoch"], cost["saved"]
    epochs, students = cost["paid_after_epochs"], cost["paid_after_students"]
    if teacher is None or live is None or saved is None or epochs is None or students is None:
        return line
    return (
        f"{line}, with the teacher in the loop {format_duration(live)}:"
        f" the cache is paid for after {epochs:.3g} epochs ({students:.2g} of such a student);"
        f" it saved this student {format_duration(saved)} of teacher inference"
    )
