"""Files of weights as people save them: which state dicts a file holds, read without running code, and which is used.

A file is one of
    a state dict, or a dict with one or several under any names, at most five levels deep: {"model": …, "args": …};
    a safetensors file.
Other entries of a dict, such as the state of an optimizer, are left out. Whole pickled networks and TorchScript
archives are refused, because loading them runs code; the message has the Python that converts them.
"""

import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import open_input_file

StateDict = dict[str, torch.Tensor]

# The names under which state dicts are saved. Of several state dicts in a file the first of these is used, unless a
# key is named; averaged weights come after the weights that were trained.
_USUAL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "net_state_dict",
    "network",
    "weights",
    "params",
    "module",
    "teacher",
    "student",
    "backbone",
    "encoder",
)
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|average|averaged)([._]|$)")
_NO_NETWORK = re.compile(r"(^|[._])(optim|optimizer|criterion|loss|losses|scaler|scheduler|lr_scheduler)([._]|$)")
_MAX_DEPTH = 5  # levels of dicts that are searched for state dicts
_MAX_LISTED = 6  # keys that a message lists

# Training scripts save their settings and figures beside the weights, as objects of these packages. An object of them
# is not made: in its place comes an empty dict, or an object without content, so that no code of theirs runs.
_SETTINGS_PACKAGES = (
    "argparse",
    "collections",
    "datetime",
    "decimal",
    "easydict",
    "fractions",
    "lightning",
    "lightning_fabric",
    "ml_collections",
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "types",
    "typing",
    "uuid",
    "yacs",
)
_SETTINGS_BUILTINS = ("builtins.dict", "builtins.float", "builtins.int", "builtins.list", "builtins.str")
_MAX_NAMES = 100  # of foreign objects in a file
_FOREIGN_NAME = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")


class _Settings:
    """Stands for an object of settings in a file; nothing of the object is kept but items of a dict."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Return a dict, because the unpickler adds items to a plain dict alone."""
        return OrderedDict()


class _Number:
    """Stands for a number or array of NumPy in a file; its content is not kept."""

    def __new__(cls, *_: Any, **__: Any) -> "_Number":
        """Take any arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Take any state."""


def read_checkpoint(path: Path) -> dict[str, StateDict]:
    """Read all state dicts in a file, without running code that the file may contain.

    Args:
        path: A file that torch.save wrote, or a safetensors file.

    Returns:
        {key: state dict} on the CPU, in the order of the file. A key is the path to the state dict in the file, its
        parts joined by dots: "model", "state_dict.ema"; "" where the file itself is one.

    Raises:
        UsageError: There is no such file.
        CacheError: The file is damaged, holds no state dict, or would run code when loaded.
    """
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder without teacher.pt or student.pt")
    try:
        open_input_file(path).close()  # refuses a pipe, from which zipfile and torch.load would wait for bytes
        content = _load_safetensors(path) if _is_safetensors(path) else _load_pickle(path)
    except FileNotFoundError:
        raise UsageError(f"there are no weights at '{path}'") from None
    states = dict(_find_state_dicts(content, "", _MAX_DEPTH, set()))
    if not states:
        if isinstance(content, Mapping):
            content = next((content[key] for key in _USUAL_KEYS if isinstance(content.get(key), Mapping)), content)
        keys = ""
        if isinstance(content, Mapping) and content:
            keys = f" (its keys: {_list_names(list(map(str, content)))})"
        raise CacheError(f"'{path}' holds a {type(content).__name__} and no state dict: save model.state_dict(){keys}")
    return states


def choose_state_dict(
    states: Mapping[str, StateDict], key: str, path: Path, advice: str = "name one with --weights-key"
) -> tuple[str, StateDict]:
    """Choose one of the state dicts in a file.

    Args:
        states: See `read_checkpoint`.
        key: Of one of them, or of one and a prefix of its names, such as "state_dict.ema_model"; "" for the usual one.
        path: Of the file, for the message.
        advice: What to do where there are several without a usual name, for the message.

    Returns:
        The key and the state dict, without the prefix.

    Raises:
        UsageError: There is no such key, or none is named and there are several without a usual name.
    """
    if not key:
        ranks = {name: _rank(name) for name in states}
        best = min(ranks.values())
        first, *others = [name for name in states if ranks[name] == best]
        if others:
            raise UsageError(f"'{path}' holds several state dicts, {_list_names([first, *others])}: {advice}")
        return first, states[first]
    if key in states:
        return key, states[key]
    for name, state in sorted(states.items(), key=lambda item: -len(item[0])):
        prefix = key if not name else key.removeprefix(f"{name}.") if key.startswith(f"{name}.") else ""
        inner = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
        if prefix and inner:
            return key, inner
    names = [name for name in states if name]
    prefixes = dict.fromkeys(k.partition(".")[0] for k in states.get("", {}))
    raise UsageError(
        f"--weights-key {key}: '{path}' has no weights under that key; it has"
        f" {_list_names(names) if names else 'names that begin with ' + _list_names(list(prefixes))}"
    )


def describe_choice(key: str, states: Mapping[str, StateDict]) -> str:
    """Describe which state dict of a file is used, and how to use another; "" where there is no other."""
    others = [name for name in states if name and name != key and not _NO_NETWORK.search(name)]
    if not key or not others:
        return ""
    return (
        f"'{make_printable(key)}' of the file (also there: {_list_names(others)};"
        f" --weights-key {make_printable(others[0])} takes those)"
    )


def is_averaged(name: str) -> bool:
    """Whether a name is one of averaged weights, such as "model_ema"."""
    return bool(_AVERAGED.search(name))


def verify_zip(path: Path) -> None:
    """Compare the parts of a file that torch.save wrote with their CRC-32.

    torch.load does not: a flipped bit of a weight would go unnoticed. Files of before PyTorch 1.6 are no zip files and
    have no checksums; they pass.

    Raises:
        zipfile.BadZipFile: A part has another checksum, or the parts are together larger than the file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # A small file must not fill the memory: torch.save does not compress, and no two parts overlap.
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise zipfile.BadZipFile("its parts are larger than the file")
            if name := archive.testzip():
                raise zipfile.BadZipFile(f"bad CRC-32 of {name}")


def _rank(name: str) -> int:
    """Order keys: usual names first, then other names, then averaged weights, then what is no network."""
    last = name.rpartition(".")[2]
    if _NO_NETWORK.search(name):
        return len(_USUAL_KEYS) + 3
    if is_averaged(name):
        return len(_USUAL_KEYS) + 2
    return _USUAL_KEYS.index(last) if last in _USUAL_KEYS else len(_USUAL_KEYS) + 1


def _find_state_dicts(content: Any, key: str, depth: int, seen: set[int]) -> Iterator[tuple[str, StateDict]]:
    """Yield (key, state dict) of a dict and of those in it. seen: dicts that were searched, as one can hold itself."""
    if not isinstance(content, Mapping) or not content or depth < 0:
        return
    if all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        yield key, dict(content)
        return
    if id(content) in seen:
        return
    seen.add(id(content))
    for name, value in content.items():
        if isinstance(name, str):
            yield from _find_state_dicts(value, f"{key}.{name}" if key else name, depth - 1, seen)


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, ValueError, KeyError) as error:
        raise CacheError(f"'{path}' is not loaded: it is damaged: {make_printable(error, 120)}") from None


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins like a safetensors file: 8 bytes with the length of a JSON object, and the object."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def _load_pickle(path: Path) -> Any:
    """Load what torch.save wrote with PyTorch's restricted unpickler, which makes tensors and plain containers."""
    try:
        _refuse_archive(path)
        verify_zip(path)
        stand_ins: list[Any] = []
        while True:
            try:
                with torch.serialization.safe_globals(stand_ins):
                    return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                match = _FOREIGN_NAME.search(str(error))
                name = match[1] if match else ""
                name = f"builtins.{name}" if name and "." not in name else name
                is_settings = name in _SETTINGS_BUILTINS or name.partition(".")[0] in _SETTINGS_PACKAGES
                if not is_settings or len(stand_ins) >= _MAX_NAMES:
                    raise
                stand_ins.append((_Number if name.startswith("numpy.") else _Settings, name))
    except CacheError:
        raise
    except Exception as error:  # arbitrary bytes can raise anything: of pickle, zip, struct, an IndexError …
        if isinstance(error, OSError) and error.filename:
            raise
        if "GLOBAL" not in str(error):
            raise CacheError(
                f"'{path}' is not loaded: it is damaged or is not a file of weights; save model.state_dict() alone"
            ) from None
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = f" ({make_printable(match[1], 80)})" if match else ""
        raise CacheError(
            f"'{path}' is not loaded: it would run code when loaded{name} or is not a file of weights; save"
            f" model.state_dict() alone. Where you trust the file:  {_format_conversion(path)}  (of a dict,"
            " first take its entry: model = model['model'])"
        ) from None


def _format_conversion(path: Path, load: str = "torch.load({}, weights_only=False)") -> str:
    """Format the two statements that make a file of weights from one that holds a network."""
    new_path = str(path.with_name(f"{path.stem}-weights.pt"))
    return f"model = {load.format(repr(str(path)))}; torch.save(model.state_dict(), {new_path!r})"


def _refuse_archive(path: Path) -> None:
    """Raise CacheError for a TorchScript archive or an exported program, which hold code beside their weights."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    kind, load = "", ""
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        kind, load = "a TorchScript archive", "torch.jit.load({}, map_location='cpu')"
    elif "archive_format" in names or any(name.startswith("models/") for name in names):
        kind, load = "an exported program", "torch.export.load({}).module()"
    if kind:
        raise CacheError(
            f"'{path}' is {kind}, which holds code: it is not loaded. Where you trust the file, save its weights"
            f" alone:  {_format_conversion(path, load)}"
        )


def _list_names(names: list[str]) -> str:
    """List the first names in quotes, and how many more there are."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(f"'{make_printable(name, 80)}'" for name in names[:_MAX_LISTED]) + more
