"""Classification networks without their classifier, whose outputs are features: teachers of embeddings."""

from typing import Any

from torch import nn

from softcache.base.errors import UsageError

from . import build, find_head, is_external_arch
from .checkpoint_files import StateDict
from .state_dicts import count_outputs, load_weights


def has_removable_classifier(arch: str) -> bool:
    """Return whether an arch is a classification network of a known form: built-in, of torchvision or of timm.

    What a network of a user's own, or of transformers, outputs is taken as it is.
    """
    return not is_external_arch(arch)


def build_feature_extractor(
    arch: str, state: StateDict, channels: int, size: int, source: str, shape: tuple[int, ...] = ()
) -> tuple[nn.Module, str, str]:
    """Build a classification network with weights, then take its classifier away.

    A network of timm is what `timm.create_model(…, num_classes=0)` builds; weights of timm without a classifier are
    loaded as they are. Of another network the last linear layer becomes the identity: the output is its input.

    Args:
        arch: One that has_removable_classifier.
        state: Its weights, see checkpoint_files.read_checkpoint.
        channels, size, shape: Of the input, as of softcache.pipeline.models.build.
        source: What the weights are called in a message.

    Returns:
        The network: float32 [B, …] -> features [B, D]; the name of the layer; and what `load_weights` returns.

    Raises:
        CacheError: A weight has NaN.
        UsageError: The weights do not fit, or the network has no last linear layer.
    """
    if arch.startswith("timm:"):
        network = build(arch, 0, channels, size, shape=shape)
        name = _get_timm_classifier(network)
        if any(key.endswith(f"{name}.weight") for key in state):
            network = build(arch, count_outputs(state, source), channels, size, shape=shape)
        note = load_weights(network, state, source)
        network.reset_classifier(0)  # type: ignore[operator]
        return network, name, note
    classes = count_outputs(state, source)
    network = build(arch, classes, channels, size, shape=shape)
    note = load_weights(network, state, source)
    head = find_head(network, classes)
    names = [name for name, module in network.named_modules() if module is head and name]
    if not names:
        raise UsageError(
            f"arch '{arch}' has no last linear layer, whose input would be the embedding: take another network, or one"
            " of your own, my_package.module:factory"
        )
    network.set_submodule(names[0], nn.Identity())
    return network, names[0], note


def _get_timm_classifier(network: Any) -> str:
    """Return the name that timm gives the classifier of one of its networks; of several the first."""
    name = network.pretrained_cfg["classifier"]
    return str(name if isinstance(name, str) else name[0])
