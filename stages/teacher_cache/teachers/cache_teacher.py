"""Loading the teacher of a cache that exists: to check its outputs again, and to compute damaged shards again."""

from pathlib import Path
from typing import Any

from torch import nn

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build, is_custom_arch
from softcache.pipeline.models.checkpoint_files import StateDict, choose_state_dict, read_checkpoint
from softcache.pipeline.models.configurations import (
    DEFAULT,
    has_published_weights,
    load_published_state,
)
from softcache.pipeline.models.custom_networks import is_live_arch
from softcache.pipeline.models.other_frameworks.callable_networks import load_callable, prepare_callable
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.pipeline.models.state_dicts import count_outputs, find_weights_file, hash_weights, load_weights
from softcache.stages.cli.configs import CheckConfig
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.runs.named_code import require_named_code


def load_cache_teacher(cache: CacheReader, config: CheckConfig) -> PreparedModel:
    """Load the teacher of a cache.

    Args:
        cache: The cache; its manifest has the arch, the preparation of the input and the digest of the weights.
        config: Options of check-cache. `weights` is a file of weights, the folder of a run, or DEFAULT for
            the published ones; `teacher` names a user's own code, which is not imported because a manifest names it.

    Returns:
        The teacher in eval mode, on the CPU.

    Raises:
        UsageError: arch is not that of the cache, or is a user's code and not named; or the weights do not fit it.
        CacheError: The weights are not those of the cache.
    """
    weights, recorded = config.weights, cache.teacher
    if is_live_arch(recorded):
        raise UsageError(
            f"the teacher of '{cache.folder}' is {make_printable(recorded)}, a network that was passed to softcache in"
            " Python: pass it to softcache.build_cache, which runs it again where the cache grows"
        )
    require_named_code(
        recorded,
        config.teacher,
        owner=f"the cache '{cache.folder}'",
        option="--teacher",
        command=format_command("check-cache", config, cache.folder, teacher=recorded),
    )
    input_spec = cache.input_spec
    known = cache.manifest.identity["teacher"]
    if weights == DEFAULT and is_custom_arch(recorded):
        value = load_callable(recorded, cache.classes, input_spec.input_shape)
        if not isinstance(value, nn.Module):
            return _prepare_recorded_callable(value, cache)
        classes = count_outputs(value.state_dict(), weights) if "class_map" in known else cache.classes
        network = _build_recorded(cache, classes, value)
    else:
        state = _read_state(cache, config)
        classes = count_outputs(state, weights) if "class_map" in known else cache.classes
        network = _build_recorded(cache, classes)
        load_weights(network, state, weights)
    digest, cache_digest = hash_weights(network), cache.manifest.identity["teacher"]["weights"]
    if digest != cache_digest:
        raise CacheError(
            f"the weights of '{weights}' are not those of the cache: teacher.weights {digest[:16]}…,"
            f" in the cache {cache_digest[:16]}…"
        )
    return PreparedModel(network, input_spec).eval()


def _read_state(cache: CacheReader, config: CheckConfig) -> StateDict:
    """Read the state dict that --weights names: published weights, or those of a file or run."""
    if config.weights == DEFAULT and has_published_weights(cache.teacher):
        return load_published_state(cache.teacher, cache.input_spec.channels, cache.input_spec.size)
    path = Path(config.weights)
    return choose_state_dict(read_checkpoint(find_weights_file(path)), config.weights_key, path)[1]


def _build_recorded(cache: CacheReader, classes: int, network: nn.Module | None = None) -> nn.Module:
    """Build the network that a cache records: with fresh weights, or a copy of what its factory returned."""
    spec, output = cache.input_spec, str(cache.manifest.identity["teacher"].get("output", ""))
    return build(cache.teacher, classes, spec.channels, spec.size, output, network, shape=spec.shape)


def _prepare_recorded_callable(value: Any, cache: CacheReader) -> PreparedModel:
    """Prepare the function or estimator of a cache, with the input that the digest in its manifest names.

    Raises:
        CacheError: The cache is of another kind of teacher.
    """
    names = tuple(cache.manifest.identity["transfer_set"]["classes"])
    for is_normalized in (False, True):
        teacher = prepare_callable(value, cache.teacher, names, cache.input_spec, is_normalized, cache.task)
        if hash_weights(teacher.network) == cache.manifest.identity["teacher"]["weights"]:
            return teacher
    raise CacheError(f"the cache '{cache.folder}' is of a network with weights: '{cache.teacher}' is a function now")
