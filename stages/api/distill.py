"""Both stages in one call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from softcache.base.progress import ProgressCallback
from softcache.pipeline.losses.base import list_teacher_taps
from softcache.pipeline.losses.distillation_loss import LossLike, resolve_losses

from .build_cache import Normalize, build_cache
from .train_student import train_student


def distill(
    teacher: nn.Module | str,
    student: nn.Module | str,
    data: Any,
    *,
    out: str | Path,
    losses: Sequence[LossLike] = (),
    views: str = "",
    draws: int = 0,
    normalize: Normalize | None = None,
    weights: str | Path = "",
    epochs: int = 0,
    device: str = "auto",
    workers: int = 0,
    seed: int = 0,
    progress: bool | ProgressCallback = False,
    **options: Any,
) -> dict[str, Any]:
    """Run a teacher once over a data set, and train a student from its outputs.

    `build_cache` in the folder `out`/cache, with the layers that the losses read, then `train_student` in
    `out`/student. Further students can be trained from that cache.

    Args:
        teacher, data, views, draws, normalize, weights: As of `build_cache`.
        student, losses, epochs: As of `train_student`.
        out: The folder of both stages.
        device, workers, seed, progress: Of both stages.
        options: Further options of `softcache student`, such as `learning_rate=0.05`.

    Returns:
        The content of the student's result.json.

    Raises:
        CacheError, UsageError, KeyboardInterrupt: As `build_cache` and `train_student`.
    """
    terms = resolve_losses(losses) if losses else ()
    cache = build_cache(
        Path(out) / "cache",
        teacher,
        data,
        views=views,
        draws=draws,
        taps=list_teacher_taps(terms),
        normalize=normalize,
        weights=weights,
        device=device,
        workers=workers,
        seed=seed,
        progress=progress,
    )
    return train_student(
        cache,
        student,
        losses,
        out=Path(out) / "student",
        epochs=epochs,
        device=device,
        workers=workers,
        seed=seed,
        progress=progress,
        **options,
    )
