"""The README.md of a cache: what the cache is, for people who find it and do not know this program."""

import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, make_printable
from softcache.base.files import publish_text, read_regular_file
from softcache.base.text import escape_markdown, format_code_span
from softcache.data.sources import DATASET, format_placeholder, has_argument
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS
from softcache.pipeline.cache.folder import README_FILE
from softcache.pipeline.cache.manifest import Manifest

_MAX_BYTES = 1 << 20  # of a README.md that is read
_SHOWN_NUMBERS = 8  # of a mean or standard deviation
_TEXT = """\
# A cache of a teacher's outputs

Made by softcache, format {format}. It holds the logits{and_features} of a teacher network for every view of a transfer
set, so that any number of students can be trained without the teacher. It holds no images.

| | |
|---|---|
| teacher | {arch}, weights SHA-256 {weights}, in {precision}{faster} |
| input | {input} |
| data | {data}: {rows}; {outputs} |
| views | {views}; {draws} of each training image, one plain view of each held-out one |
| {measured} | {accuracy} |
| contents | {contents} |
| codec | {codec}: {cost} |
| size | {size:.1f} MB in {files} files |
| fingerprint | {fingerprint} |
| made with | {versions} |
| licence | {license} |

Check it, then train a student from it:

{use}
Images are read from your own copy of the data; a copy that differs in one pixel is refused. `manifest.json` has the
same facts for programs, and a checksum of every file.
"""
_COMMANDS = """\
```sh
softcache check-cache {name} --deep{where}
softcache student --cache {name}{where} --arch resnet8
```
"""
# In their place for a cache of a dataset that was passed in Python.
_CALLS = """\
```sh
softcache check-cache {name}
```

```python
cache = softcache.Cache({path!r}, data=your_dataset)
softcache.train_student(cache, "resnet8", out="runs/resnet8")
```
"""
# The text of the first versions of this program. Unless a user has edited it, the text above replaces it when the
# cache grows.
_FIRST_TEXT = """\
# A cache of what a teacher said

Made by softcache, format {format}. It holds the logits{and_features} of a teacher network for every view of a transfer
set, so that any number of students can be trained without the teacher. It holds no pictures.

| | |
|---|---|
| teacher | {arch}, weights SHA-256 {weights}, {precision} arithmetic{faster} |
| input | {input} |
| data | {data}: {rows}; {classes} classes |
| views | {views}; {draws} of each training picture, one plain view of each held-out one |
| teacher's accuracy | {accuracy} |
| kept | {contents} |
| codec | {codec}: KL {kl} nats at temperature 4, {flips:.4%} of rows change their first class |
| size | {size:.1f} MB in {files} files |
| fingerprint | {fingerprint} |
| made with | {versions} |
| licence | {license} |

Check it, then train a student from it:

```sh
python -m stages check-cache {name} --deep{where}
python -m stages student --cache {name}{where} --arch resnet8
```

Pixels come from your own copy of the data; a copy that differs in one pixel is refused. `manifest.json` says the
same for programs, with a checksum of every file.
"""


def write_readme(folder: Path, previous: Manifest | None, manifest: Manifest) -> None:
    """Publish the README.md of a cache, unless there is one that a user has edited.

    Args:
        folder: Of the cache.
        previous: Its manifest before it grew; None for a new cache.
        manifest: Its manifest now.
    """
    path = folder / README_FILE
    if os.path.lexists(path) and not (previous and _is_unedited(folder, previous)):
        return
    publish_text(path, format_readme(folder.resolve().name, manifest))


def _is_unedited(folder: Path, manifest: Manifest) -> bool:
    """Return whether README.md is the text that this program, or one of its first versions, wrote for a manifest.

    The folder may have had another name then, so the name is read from the command in the text.
    """
    try:
        content = read_regular_file(folder, README_FILE, _MAX_BYTES)
    except CacheError:
        return False
    command = r"^(?:softcache|python -m stages) check-cache (.+?)(?: --deep.*)?$"
    match = re.search(command, content.decode(errors="replace"), re.MULTILINE)
    if match is None:
        return False
    try:
        name = shlex.split(match[1])[0]
        texts = [format_readme(name, manifest), *_format_earlier_readmes(name, manifest)]
        return content in [text.encode() for text in texts]
    except (ValueError, IndexError):  # no name that a shell could read
        return False


def format_readme(name: str, manifest: Manifest) -> str:
    """Format the README.md of a cache.

    Args:
        name: Of the cache's folder, for the commands in the text.
        manifest: Of the cache.
    """
    return _format_text(_format_fields(name, manifest), manifest)


def _format_text(fields: dict[str, Any], manifest: Manifest) -> str:
    use = _CALLS if manifest.identity["transfer_set"]["name"] == DATASET else _COMMANDS
    return _TEXT.format(**fields, use=use.format(**fields))


def _format_earlier_readmes(name: str, manifest: Manifest) -> Iterator[str]:
    """Yield the README.md that earlier versions of this program wrote: with names as they are in the manifest."""
    fields = _format_fields(name, manifest, escape=str, code=lambda text: f"`{text}`")
    yield _format_text(fields, manifest)
    fields["faster"] = fields["faster"].replace("top-1 class", "first class")
    yield _FIRST_TEXT.format(**fields)


def _format_code_cell(text: object) -> str:
    return format_code_span(text, in_table=True)


def _format_fields(
    name: str,
    manifest: Manifest,
    escape: Callable[[object], str] = escape_markdown,
    code: Callable[[object], str] = _format_code_cell,
) -> dict[str, Any]:
    """Format the values of the fields in both texts.

    Args:
        name: Of the cache's folder.
        manifest: Of the cache, which may come from anyone.
        escape: Makes text of it safe for a cell of a table.
        code: The same for code.
    """
    identity, fidelity = manifest.identity, manifest.fidelity
    teacher, data, views = identity["teacher"], identity["transfer_set"], identity["views"]
    parameters = ", ".join(escape(f"{key} {value}") for key, value in views.items() if key != "policy")
    features = ", ".join(f"{code(tap)} {shape}" for tap, shape in manifest.taps.items())
    accuracies = {split: figures["accuracy"] for split, figures in manifest.teacher.items()}
    is_classes = manifest.task == CLASSES
    labelled = ", ".join(f"{split} {figures.get('labelled', 0):,}" for split, figures in manifest.teacher.items())
    return {
        "format": identity["format"],
        "and_features": " and some layers' features" if features else "",
        "arch": code(teacher["arch"])
        + (f", the input of its layer {code(teacher['features'])}" if "features" in teacher else "")
        + (_describe_head(teacher["head"]) if "head" in teacher else "")
        + (", its classes mapped to those of the data" if "class_map" in teacher else ""),
        "weights": code(teacher["weights"]),
        "precision": escape(identity["precision"]),
        "faster": f", {manifest.arithmetic.describe()}" if manifest.arithmetic else "",
        "input": _format_input(teacher),
        "data": escape(data["name"]),
        "rows": ", ".join(f"{split} {rows:,}" for split, rows in manifest.splits.items()),
        "classes": manifest.classes,
        "outputs": f"{manifest.classes} {'dimensions' if manifest.task == EMBEDDING else manifest.task}",
        "views": f"{code(views['policy'])} ({parameters})",
        "draws": manifest.draws,
        "measured": "teacher's accuracy" if is_classes else "rows with hard targets",
        "accuracy": ", ".join(f"{split} {_format_accuracy(accuracy)}" for split, accuracy in accuracies.items())
        if is_classes
        else labelled,
        "contents": "logits" + (f"; features {features}" if features else ""),
        "codec": escape(identity["codec"]),
        "cost": _format_cost(manifest),
        "kl": f"{fidelity['kl_4']:.1e}" if "kl_4" in fidelity else "",
        "flips": fidelity.get("flips", 0.0),
        "size": manifest.bytes / 1e6,
        "files": len(manifest.shards),
        "fingerprint": code(manifest.fingerprint),
        "versions": ", ".join(escape(f"{library} {version}") for library, version in manifest.versions.items()),
        "license": escape(manifest.settings.get("license") or "not stated: ask whoever gave it to you"),
        "path": make_printable(name, None),
        "name": shlex.quote(name if escape is str else make_printable(name, None)),
        "where": f" --data {format_placeholder(data['name'])}"
        if has_argument(data["name"]) and data["name"] != DATASET
        else "",
    }


def _describe_head(head: dict[str, Any]) -> str:
    """Describe the head that computed the logits from an embedding."""
    rows = f", fitted to {head['labelled']:,} labelled rows" if "labelled" in head else ""
    return f", its embedding followed by a head ({head['kind']}{rows})"


def _format_cost(manifest: Manifest) -> str:
    if manifest.task != CLASSES:
        return describe_fidelity(manifest)
    fidelity = manifest.fidelity
    if "kl_4" not in fidelity:  # of a sample
        return describe_fidelity(manifest)
    return f"KL {fidelity['kl_4']:.1e} nats at temperature 4, {fidelity['flips']:.4%} of rows change their top-1 class"


def describe_fidelity(manifest: Manifest) -> str:
    """Describe in one line what the codec of a cache costs."""
    fidelity = manifest.fidelity
    if "reverse_kl_1" in fidelity:
        return (
            f"KL(sample || teacher) {fidelity['reverse_kl_1']:.2f} at T=1 in one view;"
            f" {fidelity['flips']:.2%} of rows have another first class"
        )
    if manifest.task == CLASSES:
        kl = ", ".join(f"{fidelity[f'kl_{T}']:.1e} at T={T}" for T in (1, 2, 4, 8))
        return f"KL {kl}; {fidelity['flips']:.4%} of rows change their first class"
    if manifest.task == LABELS:
        return f"KL {fidelity['kl_1']:.1e} of a label; {fidelity['flips']:.4%} of labels change their sign"
    if manifest.task == EMBEDDING:
        return f"1 - cosine {1 - fidelity['cosine']:.1e}"
    return f"{fidelity['relative_error']:.1e} standard deviations of a number"


def _format_accuracy(accuracy: float | None) -> str:
    return "unknown" if accuracy is None else f"{accuracy:.4f}"


def _format_input(teacher: dict[str, Any]) -> str:
    """Describe the input of a teacher: its shape, and how it is normalised."""
    numbers = f"mean {_format_numbers(teacher['mean'])}, standard deviation {_format_numbers(teacher['std'])}"
    if "shape" in teacher:
        return f"rows of {' × '.join(map(str, teacher['shape']))} numbers, {numbers}"
    return f"{teacher['channels']} × {teacher['size']} × {teacher['size']}, {numbers} of values 0 … 1"


def _format_numbers(values: Sequence[float]) -> str:
    shown = [f"{value:.4g}" for value in values[:_SHOWN_NUMBERS]]
    return "[" + ", ".join([*shown, "…"] if len(values) > len(shown) else shown) + "]"
