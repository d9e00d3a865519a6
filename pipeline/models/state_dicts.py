"""Weights on disk: read without running code, named when they do not fit, and told apart by a digest."""

import re
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.base.errors import CacheError, UsageError

StateDict = dict[str, torch.Tensor]

_OLD_NAMES = (
    (r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
    (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.3."),
)


def read_state_dict(path: Path) -> StateDict:
    """The state dict in a file, bare or nested under `state_dict` or `model`, with or without `module.` in front.

    Raises UsageError when there is no such file, CacheError when it is no state dict or would need to run code.
    """
    try:
        verify_zip(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there are no weights at '{path}'") from None
    except IsADirectoryError:
        raise UsageError(f"'{path}' is a folder without teacher.pt or student.pt") from None
    except Exception as error:  # pickle, zip, struct, index …: whatever bytes that are no weights can raise
        if isinstance(error, OSError) and error.filename:
            raise
        why = "it would run code when loaded" if "GLOBAL" in str(error) else "it is damaged"
        raise CacheError(
            f"'{path}' is refused: {why} or is no file of weights; save model.state_dict() alone"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(map(_is_weight, found.items())):
        raise CacheError(f"'{path}' holds a {type(found).__name__} and no state dict: save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in found.items()}


def verify_zip(path: Path) -> None:
    """Raises zipfile.BadZipFile when a part of a file that torch.save wrote is not what its CRC-32 says.

    torch.load does not look: a flipped bit of a weight would pass. A file of before 2020, which is no zip, has none.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as whole:
            if name := whole.testzip():
                raise zipfile.BadZipFile(f"bad CRC-32 of {name}")


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def load_weights(network: nn.Module, state: StateDict, source: str) -> None:
    """Put a state dict into a network. Raises UsageError that names the first keys that do not fit.

    Batch counters (`num_batches_tracked`) may be missing: checkpoints from before PyTorch 0.4.1 have none.
    """
    own = network.state_dict()
    state = {_match_name(key, own): value for key, value in state.items()}
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in own]
    shapes = [
        f"{k} is {_format_shape(state[k])} in the file, {_format_shape(own[k])} in the arch"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = [f"{k} is missing" for k in missing] + [f"{k} is not in the arch" for k in extra] + shapes
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UsageError(f"the weights of {source} do not fit the arch: {'; '.join(problems[:3])}{more}")
    own.update(state)  # into the network's own record: it knows the version that some of torchvision's archs ask for
    network.load_state_dict(own)


def _match_name(key: str, own: Mapping[str, torch.Tensor]) -> str:
    """The arch's name of a weight, where the file has a prefix less or one of torchvision's older names."""
    if key in own:
        return key
    if f"module.{key}" in own:  # read_state took off what is the arch's own
        return f"module.{key}"
    for old, new in _OLD_NAMES:
        key = re.sub(old, new, key)
    return key


def _format_shape(x: torch.Tensor) -> str:
    return "x".join(map(str, x.shape)) or "a single number"


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of every weight's name, dtype, shape and bytes: equal for equal weights, however they were saved."""
    whole = sha256()
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        whole.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def find_weights_file(path: Path) -> Path:
    """The file of weights that `--weights` names: the file itself, or the one in a run's folder."""
    for name in ("teacher.pt", "student.pt"):
        if (path / name).is_file():
            return path / name
    return path
