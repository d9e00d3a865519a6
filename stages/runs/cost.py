"""What a student cost, and what the cache saved: the teacher's time in each epoch, had it been in the loop."""

from softcache.pipeline.cache.manifest import Manifest
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import format_duration

Cost = dict[str, float | None]


def compute_cost(manifests: list[Manifest], config: StudentConfig, seconds: float) -> Cost:
    """In seconds. manifests: of the caches; seconds: of the training of one student, its fine-tuning included.

    stage_one: paid once. epoch: of this student; teacher_epoch: what the teacher takes for as many views, by its rate
    in stage one and on that machine; live_epoch: both. saved: the teacher's time in the epochs of this student, which
    stage one has replaced. paid_after_epochs, paid_after_students: when stage one has cost no more than a teacher in
    the loop would have. None where a cache does not say how long it took.
    """
    stage_one = sum(manifest.seconds for manifest in manifests)
    teacher = sum(manifest.seconds / _count_views(manifest) * manifest.splits["train"] for manifest in manifests)
    epoch = seconds / (config.epochs + config.finetune_epochs)
    known = teacher > 0
    return {
        "stage_one": stage_one,
        "epoch": epoch,
        "teacher_epoch": teacher if known else None,
        "live_epoch": epoch + teacher if known else None,
        "saved": teacher * config.epochs if known else None,
        "paid_after_epochs": stage_one / teacher if known else None,
        "paid_after_students": stage_one / teacher / config.epochs if known else None,
    }


def _count_views(manifest: Manifest) -> int:
    """All views that stage one has asked about."""
    return sum(n * (manifest.draws if split == "train" else 1) for split, n in manifest.splits.items())


def format_cost(bill: Cost) -> str:
    """The bill as a run ends with it."""
    line = f"stage one {format_duration(bill['stage_one'] or 0)}, once; an epoch {format_duration(bill['epoch'] or 0)}"
    teacher, live, saved = bill["teacher_epoch"], bill["live_epoch"], bill["saved"]
    epochs, students = bill["paid_after_epochs"], bill["paid_after_students"]
    if teacher is None or live is None or saved is None or epochs is None or students is None:
        return line
    return (
        f"{line}, with the teacher in the loop {format_duration(live)}:"
        f" the cache is paid for after {epochs:.3g} epochs ({students:.2g} of such a student);"
        f" this student was spared {format_duration(saved)} of teacher"
    )
