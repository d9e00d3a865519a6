"""The checks of a student's options that read no image: they come first, as reading a data set may take minutes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from softcache.base.errors import UsageError, unknown_name_error
from softcache.data.sources import DATASET, parse_data
from softcache.data.tasks import EMBEDDING
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.losses import Loss, parse_losses
from softcache.pipeline.losses.base import find_missing_layer
from softcache.pipeline.losses.classifier import SimKD
from softcache.pipeline.models import build, check_arch
from softcache.pipeline.models.archs.simkd import format_simkd_arch
from softcache.pipeline.models.custom_networks import is_live_arch
from softcache.pipeline.models.initial_weights import check_init
from softcache.pipeline.models.prepared_model import parse_normalize
from softcache.pipeline.taps.hooks import list_layers
from softcache.pipeline.taps.statistics import parse_tap
from softcache.pipeline.teachers.combine import parse_combination
from softcache.pipeline.teachers.distribution_map import check_map
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.runs.data import has_labels
from softcache.stages.runs.environment import select_device
from softcache.stages.runs.folder import check_installed, parse_milestones
from softcache.stages.runs.output_folder import check_output_folder
from softcache.stages.teacher.data import check_normalize

from . import requirements
from .embedding_width import choose_width
from .student_input import make_student_spec


def check_names(config: StudentConfig) -> None:
    """Check every name among a student's options that can be checked without its cache.

    Args:
        config: the options of a student, in which those that are not set are empty.

    Raises:
        UsageError: there is no such data set, arch, loss, combination, map or device, or --out is a file.
        CacheError: --out cannot be written into.
    """
    check_installed(config)
    parse_milestones(config)
    if config.data:
        parse_data(config.data)
    if config.arch:
        check_arch(config.arch)
        check_normalize(config.normalize, config.arch, may_be_rows=True)
    elif config.normalize:
        parse_normalize(config.normalize, may_be_rows=True)
    check_init(config.init, config.arch)
    if config.loss:
        parse_losses(config.loss)
    if config.combine:
        parse_combination(config.combine, config.combine.count(",") + 1)
    if config.map:
        check_map(config.map)
    select_device(config.device)
    if config.out:
        check_output_folder(Path(config.out))


def check_before_images(
    config: StudentConfig,
    caches: Sequence[CacheReader],
    losses: Sequence[Loss] | None = None,
    network: nn.Module | None = None,
) -> tuple[tuple[Loss, ...], tuple[str, ...]]:
    """Check the options of a student against the manifests of its caches, and build the student once.

    Args:
        config: the options of a student, with every default filled in.
        caches: of the same rows and views.
        losses: the terms of the loss where a caller in Python passes them; None for those of the options.
        network: the student where a caller in Python passes it; None where the options name its arch.

    Returns:
        The terms of the loss, and the cached features that they read.

    Raises:
        CacheError: a cache lacks what a loss reads.
        UsageError: an option names something that does not exist, does not fit the caches, or needs labels that the
            images do not have.
    """
    if config.data not in ("", DATASET):
        parse_data(config.data)
    select_device(config.device)
    check_init(config.init, config.arch)
    input_spec = make_student_spec(config, caches[0])
    losses = requirements.parse_student_losses(config, caches[0], losses)
    taps = requirements.check_caches(config, caches, losses)
    requirements.check_options(config, losses, lacks_labels=not has_labels(caches[0].manifest, "train"))
    if config.combine:
        parse_combination(config.combine, len(caches))
    if config.map:
        check_map(config.map)
    if caches[0].task != EMBEDDING and not has_labels(caches[0].manifest, "val"):
        requirements.check_without_validation_labels(config)
    if config.init and any(isinstance(loss, SimKD) for loss in losses):
        raise UsageError("--init does not go with 'simkd', whose student ends in the teacher's last layer")
    with torch.random.fork_rng(devices=()):
        arch = get_student_arch(config, losses, caches[0], taps)
        network = build(
            arch,
            choose_width(config, caches),
            input_spec.channels,
            input_spec.size,
            config.output,
            network,
            shape=input_spec.shape,
        )
    check_student_layers(network, losses)
    return losses, taps


def get_student_arch(
    config: StudentConfig, losses: tuple[Loss, ...], cache: CacheReader, taps: tuple[str, ...]
) -> str:
    """Return the arch of a student: that of `config`, which `simkd` extends by the teacher's last layer.

    Args:
        config: the options of the student.
        losses: the terms of the loss.
        cache: the first cache.
        taps: the cached features that the losses read.
    """
    simkd = next((loss for loss in losses if isinstance(loss, SimKD)), None)
    if simkd is None or is_live_arch(config.arch):  # a caller in Python extends the network by SimKD.extend
        return config.arch
    return format_simkd_arch(config.arch, simkd.projected_layer(), cache.manifest.taps[taps[0]][0])


def check_student_layers(network: nn.Module, losses: Sequence[Loss]) -> None:
    """Check that a student has the layers that its losses read.

    Raises:
        UsageError: it does not have one of them.
    """
    if missing := find_missing_layer(network, losses):
        _, layer, layers = missing
        raise unknown_name_error("tap", layer, layers)


def check_layer_names(network: nn.Module, names: str, option: str) -> None:
    """Check layers that are joined by +.

    Raises:
        UsageError: the network does not have one of them.
    """
    layers = list_layers(network)
    for name in names.split("+"):
        if parse_tap(name)[0] not in layers:
            raise UsageError(f"{option}: {unknown_name_error('layer', name, layers)}")
