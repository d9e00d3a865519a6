"""Stage two in one call: train a student from a cache by the trainer of the command line."""

from pathlib import Path
from typing import Any

from torch import nn

from softcache.base.arguments import check_path
from softcache.base.errors import UsageError
from softcache.base.progress import ProgressCallback
from softcache.base.user_modules import name_type
from softcache.pipeline.loading.cache import Cache
from softcache.pipeline.losses import format_loss
from softcache.pipeline.losses.distillation_loss import Losses, list_losses, resolve_losses
from softcache.pipeline.models.custom_networks import name_live_arch
from softcache.pipeline.models.state_dicts import read_state_dict
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.runs.folder import RESUME_OPTIONS, open_run
from softcache.stages.student.defaults import fill_cache_defaults
from softcache.stages.student.own_losses import check_own_losses
from softcache.stages.student.setup import DistillationSetup
from softcache.stages.student.student_run import resume_if_started
from softcache.stages.student.student_run import train_student as train_in_folder

from .library_call import library_call, make_config
from .passed_objects import check_passed, describe_passed, record_passed


def train_student(
    cache: Cache | str | Path,
    student: nn.Module | str,
    losses: Losses = (),
    *,
    data: Any = None,
    out: str | Path,
    epochs: int = 0,
    batch_size: int = 0,
    learning_rate: float = 0.0,
    device: str = "auto",
    workers: int = 0,
    seed: int = 0,
    progress: bool | ProgressCallback = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a student from a cache, by the trainer of `softcache student`: the same rows, steps and figures.

    A call that was stopped goes on where it was when it is made again, and ends with the same weights; one that has
    ended returns its result. The same call has the same options, but for device, workers and paths of data, a student
    of the same code and initial weights, and losses of the same code.

    Args:
        cache: An open cache, or the folder of one.
        student: A network: images float32 [B, C, H, W] -> logits [B, K]. It ends with the trained weights; with
            several seeds a copy is trained for each, and the network stays as it is. Or the name of an arch.
        losses: The terms of the loss: as of `DistillationLoss`; a module of your own is copied. The defaults of
            the data if there are none.
        data: With the folder of a cache, its data, as in `Cache`.
        out: The folder of the run.
        epochs, batch_size, learning_rate: 0 for the defaults of the data.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: Processes that decode and render; 0 for a thread of this process.
        seed: Of the order of rows, and of the initial weights of an arch that is named.
        progress: True to show progress on standard error, or a function of (text, done, total).
        options: Further options of `softcache student`, such as `optimizer="adamw"`, `baseline=True` or `seeds=5`.

    Returns:
        The content of the run's result.json: `result["student"]["test"]["accuracy"]`.

    Raises:
        CacheError: A view or a file is not the one that it was, the folder holds the run of another call, or the
            training diverged.
        UsageError: An argument does not exist or does not fit the cache.
        KeyboardInterrupt: On Ctrl-C. What was finished is kept.
    """
    if not isinstance(student, nn.Module | str):
        raise UsageError(f"a student is a torch.nn.Module or the name of an arch, not {name_type(student)}")
    if isinstance(cache, str | Path):
        cache = Cache(cache, data=data, progress=progress)
    elif data is not None:
        raise UsageError("data are for the path of a cache: this cache is open, with its data")
    losses = list_losses(losses)
    terms = resolve_losses(losses) if losses else ()
    config = make_config(
        StudentConfig,
        options,
        cache=tuple(str(member.folder) for member in cache.teachers.members),
        data=cache.data,
        combine=cache.combine,
        map=cache.map,
        arch=name_live_arch(student) if isinstance(student, nn.Module) else student,
        loss=tuple(
            loss if isinstance(loss, str) else format_loss(term) for loss, term in zip(losses, terms, strict=True)
        ),
        epochs=epochs or None,
        batch_size=batch_size or None,
        learning_rate=learning_rate or None,
        device=device,
        workers=workers,
        seed=seed,
        out=str(check_path("out", out)),
    )
    with library_call(progress):
        config = resume_if_started(fill_cache_defaults(config, cache.reader), RESUME_OPTIONS)
        if not config.resume:
            config, _ = open_run(config, set(), "")
        network = student if isinstance(student, nn.Module) else None
        terms = terms or resolve_losses(config.loss)
        passed = describe_passed(network, terms)
        if config.resume:
            check_passed(Path(config.out), passed)
        setup = DistillationSetup.of_cache(config, cache, terms, network)
        console = Console.for_library()
        for note in setup.check_student(setup.build_student(config, setup.losses), config):
            console.print(note)
        check_own_losses(config, setup)
        record_passed(Path(config.out), passed)
        result = train_in_folder(config, setup, Path(config.out), console)
        if network is not None and config.seeds == 1:
            network.load_state_dict(read_state_dict(Path(config.out) / "student.pt"))
    return result
