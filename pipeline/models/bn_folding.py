"""Batch norm folded into the convolution before it: the same function of an image, with fewer passes over memory.

ResNet-56 on 2 cores: 996 instead of 909 images a second in float32, 3,030 instead of 2,289 in bfloat16.
"""

import copy
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .prepared_model import PreparedModel


def fold_batch_norm(teacher: PreparedModel, layers: Collection[str] = ()) -> PreparedModel:
    """Fold the batch norms of a teacher into its convolutions.

    A pair is folded only where a trace of the network shows that the convolution runs once and that its output goes
    to the batch norm alone. An identity takes the place of the batch norm, so all module paths stay valid.

    Args:
        teacher: In eval mode. It is not changed.
        layers: Module paths of the network whose outputs are read, and therefore must not change.

    Returns:
        A copy in eval mode; the teacher itself where nothing can be folded.
    """
    if not any(type(module) is nn.BatchNorm2d for module in teacher.network.modules()):
        return teacher
    try:
        network = copy.deepcopy(teacher.network)
        pairs = list(_find_pairs(network, layers))
    except Exception:  # a network may be a user's code: one that cannot be copied or traced is used as it is
        return teacher
    for conv, norm in pairs:
        fused: nn.Module = fuse_conv_bn_eval(network.get_submodule(conv), network.get_submodule(norm))  # type: ignore[type-var, arg-type]
        network.set_submodule(conv, fused)
        network.set_submodule(norm, nn.Identity())
    return PreparedModel(network, teacher.input_spec).to(teacher.scale.device).eval() if pairs else teacher


def _find_pairs(network: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the paths of each convolution and of the batch norm that can be folded into it."""
    graph = fx.Tracer().trace(network)
    runs = Counter(node.target for node in graph.nodes if node.op == "call_module")
    names = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    attributes = [str(node.target) for node in graph.nodes if node.op == "get_attr"]

    def is_used_once(path: str, kind: type[nn.Module]) -> bool:
        """Whether a module is exactly of a type, has one path, runs once, and is used in no other way."""
        module = network.get_submodule(path)
        has_hooks = module._forward_hooks or module._forward_pre_hooks  # weight_norm and such
        is_read = any(name.startswith(f"{path}.") for name in attributes)
        return type(module) is kind and names[id(module)] == runs[path] == 1 and not has_hooks and not is_read

    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        conv_node, norm_path = node.args[0], str(node.target)
        if not isinstance(conv_node, fx.Node) or conv_node.op != "call_module" or len(conv_node.users) != 1:
            continue
        conv_path = str(conv_node.target)
        if not (is_used_once(conv_path, nn.Conv2d) and is_used_once(norm_path, nn.BatchNorm2d)):
            continue
        conv, norm = network.get_submodule(conv_path), network.get_submodule(norm_path)
        # The output of a layer that ends between the two would change.
        is_read = any(_contains(layer, conv_path) and not _contains(layer, norm_path) for layer in layers)
        has_statistics = isinstance(norm.running_mean, torch.Tensor) and isinstance(norm.running_var, torch.Tensor)
        if not is_read and has_statistics and conv.weight.dtype == torch.float32:
            yield conv_path, norm_path


def _contains(outer: str, path: str) -> bool:
    """Whether a module path is the outer one or inside it."""
    return path == outer or path.startswith(f"{outer}.")
