"""Weights on disk: read without running code, checked against the network, and identified by a digest."""

import re
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.base.errors import CacheError, UsageError
from softcache.base.files import open_input_file

StateDict = dict[str, torch.Tensor]

_OLD_NAMES = (  # (pattern, replacement): parameter names in older files of torchvision, and what they are today
    (r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
    (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.3."),
)


def read_state_dict(path: Path) -> StateDict:
    """Read the state dict in a file, without running code that the file may contain.

    Args:
        path: Written by torch.save: a state dict, or a dict with one under "state_dict" or "model".

    Returns:
        The state dict on the CPU, its keys without a leading "module." (of nn.DataParallel).

    Raises:
        UsageError: There is no such file.
        CacheError: The file is damaged, holds something else, or would run code when loaded.
    """
    try:
        open_input_file(path).close()  # refuses a pipe, from which zipfile and torch.load would wait for bytes
        verify_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there are no weights at '{path}'") from None
    except CacheError:
        if path.is_dir():
            raise UsageError(f"'{path}' is a folder without teacher.pt or student.pt") from None
        raise
    except Exception as error:  # arbitrary bytes can raise anything: of pickle, zip, struct, an IndexError …
        if isinstance(error, OSError) and error.filename:
            raise
        why = "it would run code when loaded" if "GLOBAL" in str(error) else "it is damaged"
        raise CacheError(
            f"'{path}' is not loaded: {why} or is not a file of weights; save model.state_dict() alone"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(map(_is_weight, state.items())):
        raise CacheError(f"'{path}' holds a {type(state).__name__} and no state dict: save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}


def verify_zip(path: Path) -> None:
    """Compare the parts of a file that torch.save wrote with their CRC-32.

    torch.load does not: a flipped bit of a weight would go unnoticed. Files of before PyTorch 1.6 are no zip files and
    have no checksums; they pass.

    Raises:
        zipfile.BadZipFile: A part has another checksum.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if name := archive.testzip():
                raise zipfile.BadZipFile(f"bad CRC-32 of {name}")


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def load_weights(network: nn.Module, state: StateDict, source: str) -> None:
    """Load a state dict into a network, which keeps its weights where that fails.

    Batch counters (`num_batches_tracked`) may be missing: checkpoints from before PyTorch 0.4.1 have none.

    Args:
        network: The network, changed in place.
        state: As read_state_dict returns it. Names of older files of torchvision are translated.
        source: What the weights are called in a message.

    Raises:
        UsageError: Some keys are missing, unknown or of another shape; the first three are named.
    """
    expected = network.state_dict()
    state = {_translate_key(key, expected): value for key, value in state.items()}
    problems = [
        f"{key} is missing" for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    problems += [f"{key} is not in the arch" for key in state if key not in expected]
    problems += [
        f"{key} is {_format_shape(state[key])} in the file, {_format_shape(expected[key])} in the arch"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UsageError(f"the weights of {source} do not fit the arch: {'; '.join(problems[:3])}{more}")
    expected.update(state)  # not a plain dict: it also has the version numbers that some archs of torchvision read
    network.load_state_dict(expected)


def _translate_key(key: str, expected: Mapping[str, torch.Tensor]) -> str:
    """The network's name of a weight in a file, which may lack a prefix or have an older name of torchvision."""
    if key in expected:
        return key
    if f"module.{key}" in expected:  # read_state_dict took it for a prefix of nn.DataParallel
        return f"module.{key}"
    for old, new in _OLD_NAMES:
        key = re.sub(old, new, key)
    return key


def _format_shape(x: torch.Tensor) -> str:
    return "x".join(map(str, x.shape)) or "a single number"


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all weights, independent of how they were saved."""
    digest = sha256()
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_weights_file(path: Path) -> Path:
    """The file of weights that `--weights` names: that in a run's folder, or the path itself."""
    for name in ("teacher.pt", "student.pt"):
        if (path / name).is_file():
            return path / name
    return path
