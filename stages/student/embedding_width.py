"""The width of a student's output: the number of classes of its cache, or of an embedding what --width says."""

from collections.abc import Sequence

import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.data.tasks import EMBEDDING
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.losses import Loss
from softcache.pipeline.losses.embedding import Embed
from softcache.pipeline.models import is_custom_arch
from softcache.pipeline.models.custom_networks import is_live_arch
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.stages.cli.configs import StudentConfig


def choose_width(config: StudentConfig, caches: Sequence[CacheReader]) -> int:
    """Return the number of outputs that a student is built with.

    Args:
        config: `width`, 0 for that of the teachers.
        caches: of the same rows and views.

    Raises:
        UsageError: the teachers' embeddings differ in width, and none is given for the student.
    """
    if config.width:
        return config.width
    widths = [cache.classes for cache in caches]
    if len(set(widths)) > 1 and not is_live_arch(config.arch):  # which is there already, of any width
        raise UsageError(
            f"the teachers' embeddings have {' and '.join(map(str, widths))} numbers: name the student's own width,"
            f" such as --width {min(widths)}"
        )
    return widths[0]


def has_free_width(config: StudentConfig, task: str) -> bool:
    """Return whether a network may have any width: one of the user's own for embeddings, without --width."""
    return task == EMBEDDING and not config.width and (is_live_arch(config.arch) or is_custom_arch(config.arch))


def measure_width(network: nn.Module, input_spec: InputSpec) -> int:
    """Return the width of a network's output, which is run on two random views. Its state is not changed."""
    was_training = network.training
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        model = PreparedModel(network, input_spec).eval()
        width = int(model(input_spec.make_views(2)).shape[-1])
    network.train(was_training)
    return width


def check_select_width(config: StudentConfig, width: int, caches: Sequence[CacheReader]) -> None:
    """Check that --select compares embeddings of one width.

    Args:
        config: `select`.
        width: of the student's embedding.
        caches: of the teachers.

    Raises:
        UsageError: --select cosine, and there are several teachers, or one of another width.
    """
    if config.select != "cosine" or [width] == [cache.classes for cache in caches]:
        return
    widths = " and ".join(str(cache.classes) for cache in caches)
    raise UsageError(
        f"--select cosine compares embeddings of one width: the student's has {width} numbers, the teachers' {widths}:"
        " leave it out"
    )


def describe_projections(losses: Sequence[Loss], width: int, caches: Sequence[CacheReader]) -> list[str]:
    """Describe the projections of a student's embedding to those of its teachers, one line each.

    Args:
        losses: the terms of the loss.
        width: of the student's embedding.
        caches: of the teachers.
    """
    lines = []
    for loss in losses:
        if not isinstance(loss, Embed):
            continue
        for cache in caches:
            if loss.has_projection(width, cache.classes):
                kind = "mlp" if loss.projection == "mlp" else "linear"
                of_cache = f" of '{cache.folder}'" if len(caches) > 1 else ""
                lines.append(
                    f"loss 'embed': the projection {width} -> {cache.classes}{of_cache} ({kind}) is trained with the"
                    " student and not part of it"
                )
    return lines
