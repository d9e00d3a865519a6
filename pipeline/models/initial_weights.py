"""Weights that a training starts from: published ones or those of a file; a last layer for other classes is fresh."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from softcache.base.errors import UsageError, make_printable

from .archs.torchvision_models import has_other_stem
from .checkpoint_files import StateDict, choose_state_dict, read_checkpoint
from .configurations import DEFAULT, has_published_weights, load_published_state
from .custom_networks import is_live_arch
from .state_dicts import find_weights_file, hash_state_dict, load_weights, match_names

_STEM_HINT = (
    ": for views under 64 px, torchvision: networks get another first convolution; timm: networks keep theirs, or make"
    " the cache with --views …:size=64"
)


@dataclass(frozen=True)
class InitialWeights:
    """Weights that every seed of a training starts from.

    Attributes:
        source: What --init names: "DEFAULT" or a path.
        arch: The network's arch.
        state: The state dict.
        digest: SHA-256 of its names, dtypes, shapes and bytes.
    """

    source: str
    arch: str
    state: StateDict
    digest: str

    def load_into(self, network: nn.Module, classes: int) -> None:
        """Load the weights into a network that has fresh ones; its last layer keeps these where classes differ.

        Args:
            network: Of the arch, changed in place.
            classes: K, the number of classes of the network.

        Raises:
            UsageError: Other weights than those of the last layer are missing, unknown or of another shape.
            CacheError: A weight has NaN.
        """
        expected = network.state_dict()
        state = self.state | {key: expected[name] for name, key in self._find_fresh(network, classes).items()}
        try:
            load_weights(network, state, f"--init {self.source}")
        except UsageError as error:
            raise UsageError(f"{error}{_STEM_HINT if has_other_stem(self.arch, error) else ''}") from None

    def _find_fresh(self, network: nn.Module, classes: int) -> dict[str, str]:
        """Find the parameters of the last layer that do not come from the file: {name: its key in the file}."""
        expected = network.state_dict()
        match = match_names(self.state, expected)
        heads = _list_heads(network, classes)
        fresh = {
            name: match.keys[name]
            for name in (name for head in heads for name in head)
            if name in match.keys and _has_other_rows(self.state[match.keys[name]], expected[name])
        }
        if heads and not fresh:
            fresh = {name: match.prefix + name for name in heads[-1] if name not in match.keys}
        return fresh

    def describe(self, network: nn.Module, classes: int) -> str:
        """Describe in one line what a network of these classes starts from."""
        text = f"{self.arch} starts from --init {make_printable(self.source)}"
        fresh = self._find_fresh(network, classes)
        if not fresh:
            return f"{text}: all weights, those of the last layer too"
        weight = self.state.get(next(iter(fresh.values())))
        known = "none" if weight is None else f"{len(weight):,}"
        return f"{text}; last layer: {known} → {classes:,} classes, fresh: {', '.join(fresh)}"

    def to_json(self, network: nn.Module, classes: int) -> dict[str, str]:
        """Return the record of result.json; of a path its last part."""
        fresh = ", ".join(self._find_fresh(network, classes))
        return {"weights": Path(self.source).name, "digest": self.digest, "fresh": fresh}


def check_init(init: str, arch: str) -> None:
    """Check --init before an image is read.

    Args:
        init: "DEFAULT" or the path of a file or run; "" for fresh weights.
        arch: Of the network; "" where it is not known yet.

    Raises:
        UsageError: There is nothing at the path, or nothing is published of the arch.
    """
    if not init:
        return
    if arch and is_live_arch(arch):
        raise UsageError(f"--init {init} is for the name of an arch: load the weights into the network that you pass")
    if init == DEFAULT:
        if arch and not has_published_weights(arch):
            raise UsageError(
                f"--init DEFAULT is for torchvision:NAME, timm:NAME and hf:NAME, and the network is '{arch}': name a"
                " file of weights"
            )
        return
    if not Path(init).exists():
        raise UsageError(f"there are no weights at '{init}', which --init names")


def read_initial_weights(init: str, arch: str, channels: int, size: int) -> InitialWeights:
    """Read the weights that --init names.

    Args:
        init: "DEFAULT", or the path of a file of weights or of the folder of a run.
        arch: Of the network.
        channels, size: Of the network's input.

    Raises:
        UsageError: There is nothing at the path, or it holds several state dicts.
        CacheError: The file is damaged, or published weights cannot be downloaded.
    """
    check_init(init, arch)
    if init == DEFAULT:
        state = load_published_state(arch, channels, size)
    else:
        path = Path(init)
        states = read_checkpoint(find_weights_file(path))
        _, state = choose_state_dict(states, "", path, "save the one to start from in a file of its own")
    return InitialWeights(init, arch, state, hash_state_dict(state))


def _list_heads(network: nn.Module, classes: int) -> list[list[str]]:
    """List the parameters of each layer that may be the last one: linear or a convolution, one output per class."""
    return [
        [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == classes
    ]


def _has_other_rows(weight: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a parameter of a last layer is for another number of classes, and else of the same shape."""
    return len(weight.shape) > 0 and weight.shape[0] != expected.shape[0] and weight.shape[1:] == expected.shape[1:]
