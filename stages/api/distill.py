"""Both stages in one call."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from softcache.base.arguments import check_path
from softcache.base.progress import ProgressCallback
from softcache.pipeline.losses.base import list_teacher_taps
from softcache.pipeline.losses.distillation_loss import Losses, list_losses, resolve_losses
from softcache.stages.cli.configs import CacheConfig, StudentConfig

from .build_cache import Normalize, build_cache
from .library_call import make_config
from .train_student import train_student

_STUDENT_OPTIONS = {field.name for field in fields(StudentConfig)}
_CACHE_OPTIONS = {"class_names", "codec", "taps", "repair"} | (
    {f.name for f in fields(CacheConfig)} - _STUDENT_OPTIONS
)


def distill(
    teacher: nn.Module | str,
    student: nn.Module | str,
    data: Any,
    *,
    out: str | Path,
    losses: Losses = (),
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
        options: Further arguments of `build_cache`, such as `val_fraction=0.2`, `codec="sqrt8"` or `class_names=[…]`;
            else options of `softcache student`, such as `learning_rate=0.05`.

    Returns:
        The content of the student's result.json.

    Raises:
        CacheError, UsageError, KeyboardInterrupt: As `build_cache` and `train_student`.
    """
    losses = list_losses(losses)
    terms = resolve_losses(losses) if losses else ()
    out = check_path("out", out)
    of_cache = {name: options.pop(name) for name in list(options) if name in _CACHE_OPTIONS}
    make_config(StudentConfig, options)  # before a teacher is run
    if "data_root" in options:  # of both stages
        of_cache["data_root"] = options["data_root"]
    taps = dict.fromkeys((*of_cache.pop("taps", ()), *list_teacher_taps(terms)))
    cache = build_cache(
        Path(out) / "cache",
        teacher,
        data,
        views=views,
        draws=draws,
        taps=list(taps),
        normalize=normalize,
        weights=weights,
        device=device,
        workers=workers,
        seed=seed,
        progress=progress,
        **of_cache,
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
