"""The input of a student: normalised like the teacher's, as --normalize says, or as published with the student."""

from dataclasses import replace
from pathlib import Path

from softcache.base.errors import CacheError
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models.configurations import has_published_weights
from softcache.pipeline.models.prepared_model import BILINEAR, PUBLISHED, InputSpec, format_normalize, parse_normalize
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.runs.folder import read_json
from softcache.stages.teacher.data import check_normalize, make_input_spec, make_published_spec


def choose_normalize(config: StudentConfig) -> str:
    """Return the normalisation of a student's input: "" for that of the teacher.

    Args:
        config: its options, with an arch.
    """
    return config.normalize or (PUBLISHED if config.init and has_published_weights(config.arch) else "")


def make_student_spec(config: StudentConfig, cache: CacheReader, transfer_set: TransferSet | None = None) -> InputSpec:
    """Make the input preparation of a student. Its size is that of the views.

    Args:
        config: the options of the student, with an arch.
        cache: the first of its caches.
        transfer_set: the images; None before they are read: what depends on them is then that of the teacher.

    Raises:
        UsageError: when `normalize` is no normalisation, or one that is not published with the arch.
    """
    size, normalize = cache.views.size, choose_normalize(config)
    of_teacher = replace(cache.input_spec.with_output(), size=size, interpolation=BILINEAR)
    check_normalize(normalize, config.arch, may_be_rows=bool(of_teacher.shape))
    if normalize == PUBLISHED:
        return make_published_spec(config.arch, size)
    if not normalize or transfer_set is None:
        if of_teacher.shape:
            return of_teacher
        numbers = parse_normalize(normalize) if normalize else None
        channels = 3 if normalize == "imagenet" or (numbers and len(numbers[0]) == 3) else of_teacher.channels
        return of_teacher.with_channels(channels)
    return make_input_spec(normalize, transfer_set, cache.views, config.arch)


def use_recorded_input(config: StudentConfig, folder: Path) -> StudentConfig:
    """Return the options of a trained student, to build it again: its weights come from its folder, not from --init.

    Args:
        config: the options of its run.
        folder: the folder with its weights; where its training has ended, result.json there has its input.

    Raises:
        CacheError: when result.json does not have it.
    """
    if not (config.init or config.normalize):
        return config
    path, normalize = folder / "result.json", choose_normalize(config)
    if path.is_file() and normalize:
        try:
            spec = InputSpec.from_json(read_json(path)["student"]["preparation"])
        except (KeyError, TypeError, ValueError):
            raise CacheError(f"'{path}' does not have the input of the student") from None
        normalize = format_normalize(spec.mean, spec.std)
    return replace(config, init="", normalize=normalize)
