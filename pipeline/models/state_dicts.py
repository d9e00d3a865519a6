"""The weights of a network: from a file, matched with the network's names, checked, and identified by a digest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.pipeline.models.other_frameworks.file_network import FileNetwork

from .checkpoint_files import StateDict, choose_state_dict, is_averaged, read_checkpoint

_OLD_NAMES = (  # (pattern, replacement): parameter names in older files of torchvision, and what they are today
    (r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
    (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.3."),
)
# Parts of a name that wrappers add anywhere in it: torch.compile, FSDP, activation checkpointing, DataParallel.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_COUNTER = "num_batches_tracked"  # may be missing: checkpoints from before PyTorch 0.4.1 have none
# Entries that are no weights of the network: of torch.optim.swa_utils.AveragedModel, and of counters of operations.
_NO_WEIGHTS = ("n_averaged", "total_ops", "total_params")
_LISTED = 3  # names of a kind in a message
_LAST_LAYER = "the last layer of the file"


def read_state_dict(path: Path) -> StateDict:
    """Read the state dict in a file, see `read_checkpoint`; of several the usual one, see `choose_state_dict`.

    Args:
        path: A file that torch.save wrote, or a safetensors file.

    Returns:
        The state dict on the CPU, its keys without a leading "module." (of nn.DataParallel).

    Raises:
        UsageError: There is no such file, or it holds several state dicts without a usual name.
        CacheError: The file is damaged, holds something else, or would run code when loaded.
    """
    _, state = choose_state_dict(read_checkpoint(path), "", path)
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_weights(network: nn.Module, state: StateDict, source: str, class_advice: str = "") -> str:
    """Load a state dict into a network, which keeps its weights where that fails.

    The names in the file may have a prefix, such as `model.` of Lightning or `_orig_mod.` of torch.compile, or
    several. A prefix is taken off where the rest are the names of the network. Names without that prefix, such as
    `criterion.weight`, are left out. Batch counters (`num_batches_tracked`) may be missing.

    Args:
        network: The network, changed in place.
        state: As read_state_dict returns it. Names of older files of torchvision are translated.
        source: What the weights are called in a message.
        class_advice: What to do where the last layer is for another number of classes, for a message.

    Returns:
        Which prefix was taken off and what was left out, for a person; "" where nothing was left out.

    Raises:
        CacheError: A weight has NaN.
        UsageError: Some keys are missing, unknown or of another shape; the first three of each kind are named.
    """
    expected = network.state_dict()
    match = match_names(state, expected)
    matched = {name: state[key] for name, key in match.keys.items()}
    if problems := _describe_problems(state, expected, match):
        has_other_classes = class_advice and _LAST_LAYER in problems
        advice = f": {class_advice}" if has_other_classes else ""
        raise UsageError(f"the weights of {source} do not fit the arch: {problems}{advice}")
    trained = {name for name, _ in network.named_parameters()}
    if invalid := [name for name, value in matched.items() if name in trained and bool(value.isnan().any())]:
        raise CacheError(f"the weights of {source} have values that are no numbers (NaN): {_list_names(invalid)}")
    expected.update(matched)  # not a plain dict: it also has the version numbers that some archs of torchvision read
    network.load_state_dict(expected)
    return _describe_prefix(match)


@dataclass(frozen=True)
class Match:
    """Which names of a file are which of a network.

    Attributes:
        prefix: That the names in the file have, with its dot; "" for none.
        keys: {name in the network: key in the file}.
        unknown: Keys with the prefix that are no names of the network.
        others: Keys without the prefix, which are left out.
        alternatives: Other prefixes under which there are weights of the whole network.
    """

    prefix: str
    keys: dict[str, str]
    unknown: list[str]
    others: list[str]
    alternatives: list[str]


def match_names(state: StateDict, expected: Mapping[str, torch.Tensor]) -> Match:
    """Find the prefix under which most names of the network are in the file; of equal ones the shortest.

    Where no prefix has them all, names with different prefixes are put together (`backbone.conv.weight` and
    `head.fc.weight`), if every name of the network then has one key.
    """
    required = {name for name in expected if not name.endswith(_COUNTER)}
    common = _list_common_prefixes(expected)
    prefixes = {""}
    for key in state:
        parts = key.split(".")
        for i in range(1, len(parts)):
            if _find_name(".".join(parts[i:]), expected, common):
                prefixes.add(".".join(parts[:i]) + ".")
    matches = [_match_prefix(prefix, state, expected, common) for prefix in prefixes]
    matches.sort(key=lambda m: (-len(required & m.keys.keys()), is_averaged(m.prefix), len(m.prefix), m.prefix))
    best = matches[0]
    complete = [match for match in matches if required <= match.keys.keys()]
    if not complete:
        return _match_mixture(prefixes, state, expected, common) or best
    alternatives = [m.prefix for m in complete[1:] if set(m.keys.values()).isdisjoint(best.keys.values())]
    return Match(best.prefix, best.keys, best.unknown, best.others, alternatives)


def _match_prefix(prefix: str, state: StateDict, expected: Mapping[str, torch.Tensor], common: list[str]) -> Match:
    """Match the keys with a prefix."""
    keys: dict[str, str] = {}
    unknown = []
    for key in state:
        if not key.startswith(prefix):
            continue
        name = _find_name(key.removeprefix(prefix), expected, common)
        if name and (name not in keys or key == prefix + name):
            if name in keys:
                unknown.append(keys[name])
            keys[name] = key
        elif not key.endswith(_NO_WEIGHTS):
            unknown.append(key)
    others = [key for key in state if not key.startswith(prefix) and not key.endswith(_NO_WEIGHTS)]
    return Match(prefix, keys, unknown, others, [])


def _match_mixture(
    prefixes: set[str], state: StateDict, expected: Mapping[str, torch.Tensor], common: list[str]
) -> Match | None:
    """Match keys with different prefixes; None where a name has no key, or several, or a key has no name."""
    keys: dict[str, str] = {}
    used, others = set(), []
    for key in state:
        names = {
            name: prefix
            for prefix in prefixes
            if key.startswith(prefix) and (name := _find_name(key.removeprefix(prefix), expected, common))
        }
        if not names:
            others.append(key)
            continue
        if len(names) > 1 or next(iter(names)) in keys:
            return None
        (name, prefix) = next(iter(names.items()))
        keys[name] = key
        used.add(prefix)
    is_complete = all(name in keys for name in expected if not name.endswith(_COUNTER))
    has_unknown = any(key.startswith(tuple(used)) and not key.endswith(_NO_WEIGHTS) for key in others)
    return Match("", keys, [], others, []) if is_complete and not has_unknown else None


def _find_name(key: str, expected: Mapping[str, torch.Tensor], common: list[str]) -> str:
    """The network's name of a key, which may lack a prefix, have wrappers, or an older name of torchvision; or ""."""
    variants = [key, *(prefix + key for prefix in common)]
    translated = key
    for old, new in _OLD_NAMES:
        translated = re.sub(old, new, translated)
    variants.append(translated)
    variants.append(f"module.{key}")  # read_state_dict took it for a prefix of nn.DataParallel
    parts = key.split(".")
    if any(part in _WRAPPERS for part in parts):
        variants.append(".".join(part for part in parts if part not in _WRAPPERS[:-1]))
        variants.append(".".join(part for part in parts if part not in _WRAPPERS))
    return next((name for name in variants if name in expected), "")


def _list_common_prefixes(expected: Mapping[str, torch.Tensor]) -> list[str]:
    """List the prefixes that all names of a network have: of one that is a wrapper around another."""
    names = [name.split(".")[:-1] for name in expected]
    prefixes, depth = [], 0
    while names and all(len(parts) > depth and parts[: depth + 1] == names[0][: depth + 1] for parts in names):
        depth += 1
        prefixes.append(".".join(names[0][:depth]) + ".")
    return prefixes


def _describe_problems(state: StateDict, expected: Mapping[str, torch.Tensor], match: Match) -> str:
    """Describe in one line why weights do not fit; "" where they do."""
    missing = [name for name in expected if name not in match.keys and not name.endswith(_COUNTER)]
    shapes = {name: (state[key].shape, expected[name].shape) for name, key in match.keys.items()}
    different = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({_list_names(missing)})")
    if match.unknown:
        problems.append(f"{len(match.unknown)} not in the arch ({_list_names(match.unknown)})")
    if different:
        texts = [
            f"{name} is {_format_shape(file)} in the file, {_format_shape(arch)} in the arch"
            for name, (file, arch) in different.items()
        ]
        more = ", …" if len(texts) > _LISTED else ""
        problems.append(f"{len(texts)} of another shape ({'; '.join(texts[:_LISTED])}{more})")
    if not problems:
        return ""
    text = "; ".join(problems)
    if match.prefix:
        text += f"; the prefix '{make_printable(match.prefix)}' of the file is taken off"
    elif missing and not match.keys:
        if prefix := _list_common_prefixes(state)[-1:]:
            text += f"; all names in the file begin with '{make_printable(prefix[0])}'"
        if averaged := next((key for key in state if is_averaged(key)), ""):
            text += f"; --weights-key {make_printable(averaged.partition('.')[0])} takes the averaged weights"
    if different and not missing and not match.unknown:
        has_other_rows = [len(f) == len(a) > 0 and f[1:] == a[1:] for f, a in different.values()]
        rows = {(f[0], a[0]) for f, a in different.values() if len(f) and len(a)}
        if len(rows) == 1 and all(has_other_rows):
            ((file_classes, arch_classes),) = rows
            text += f": {_LAST_LAYER} is for {file_classes} classes, that of the network for {arch_classes}"
    return text


def _describe_prefix(match: Match) -> str:
    """Describe which keys of a file were left out."""
    if not match.others and not match.alternatives:
        return ""
    text = f"the names that begin with '{make_printable(match.prefix)}'" if match.prefix else "the names of the arch"
    if match.alternatives:
        other = make_printable(match.alternatives[0].rstrip("."))
        return f"{text} (also there: '{other}.'; --weights-key {other} takes those)"
    return f"{text}; left out: {len(match.others)} others ({_list_names(match.others)})"


def _list_names(names: list[str]) -> str:
    more = ", …" if len(names) > _LISTED else ""
    return ", ".join(make_printable(name, 80) for name in names[:_LISTED]) + more


def _format_shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a single number"


def count_outputs(state: Mapping[str, torch.Tensor], path: Path | str) -> int:
    """Count the classes of a teacher by the rows of its last matrix, or else of its last convolution of 1 x 1.

    Args:
        state: Its state dict.
        path: Where it comes from, for the message.

    Raises:
        UsageError: It has neither.
    """
    weights = [weight for weight in state.values() if weight.ndim == 4 and weight.shape[2:] == (1, 1)]
    matrices = [weight for weight in state.values() if weight.ndim == 2] or weights
    if not matrices:
        raise UsageError(f"neither the weights of {path} nor the images show how many classes there are")
    return int(matrices[-1].shape[0])


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all weights, independent of how they were saved.

    Of a network that a file defines, it is the digest of that file, see FileNetwork.
    """
    if isinstance(network, FileNetwork):
        return network.digest
    return hash_state_dict(network.state_dict())


def hash_state_dict(state: Mapping[str, torch.Tensor]) -> str:
    """The same of a state dict."""
    digest = sha256()
    for name, value in sorted(state.items()):
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
