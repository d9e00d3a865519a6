"""README.md inside a cache: in words what it is, for those who find it without knowing this program."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError
from softcache.base.files import publish_text, read_regular_file
from softcache.pipeline.cache.folder import README_FILE
from softcache.pipeline.cache.manifest import Manifest

_TEXT = """\
# A cache of what a teacher said

Made by softcache, format {format}. It holds the logits{and_features} of a teacher network for every view of a transfer
set, so that any number of students can be trained without the teacher. It holds no images.

| | |
|---|---|
| teacher | `{arch}`, weights SHA-256 `{weights}`, {precision} arithmetic{faster} |
| input | {input} |
| data | {data}: {rows}; {classes} classes |
| views | {views}; {draws} of each training image, one plain view of each held-out one |
| teacher's accuracy | {accuracy} |
| kept | {kept} |
| codec | {codec}: KL {kl} nats at temperature 4, {flips:.4%} of rows change their first class |
| size | {size:.1f} MB in {files} files |
| fingerprint | `{fingerprint}` |
| made with | {versions} |
| licence | {license} |

Check it, then train a student from it:

```sh
python -m softcache check-cache {name} --deep{where}
python -m softcache student --cache {name}{where} --arch resnet8
```

Pixels come from your own copy of the data; a copy that differs in one pixel is refused. `manifest.json` says the
same for programs, with a checksum of every file.
"""


def write_readme(folder: Path, before: Manifest | None, manifest: Manifest) -> None:
    """Publish the card, unless someone has edited the one that is there: then it is theirs."""
    path = folder / README_FILE
    if os.path.lexists(path) and not (before and _unedited(folder, before)):
        return
    publish_text(path, format_readme(folder.resolve().name, manifest))


def _unedited(folder: Path, manifest: Manifest) -> bool:
    """Whether there is the card of that manifest, under whatever name the folder had."""
    try:
        text = read_regular_file(folder, README_FILE, 1 << 20)
    except CacheError:
        return False
    found = re.search(r"^python -m softcache check-cache (.+) --deep", text.decode(errors="replace"), re.MULTILINE)
    try:
        return found is not None and text == format_readme(shlex.split(found[1])[0], manifest).encode()
    except (ValueError, IndexError):
        return False


def format_readme(name: str, manifest: Manifest) -> str:
    """The text. name: of the folder."""
    identity, fidelity = manifest.identity, manifest.fidelity
    teacher, data, views = identity["teacher"], identity["transfer_set"], identity["views"]
    knobs = ", ".join(f"{k} {v}" for k, v in views.items() if k != "policy")
    features = ", ".join(f"`{tap}` {shape}" for tap, shape in manifest.taps.items())
    return _TEXT.format(
        format=identity["format"],
        and_features=" and some layers' features" if features else "",
        arch=teacher["arch"],
        weights=teacher["weights"],
        precision=identity["precision"],
        faster=f", {manifest.arithmetic.describe()}" if manifest.arithmetic else "",
        input=f"{teacher['channels']} × {teacher['size']} × {teacher['size']},"
        f" mean {_format_numbers(teacher['mean'])},"
        f" standard deviation {_format_numbers(teacher['std'])} of values 0 … 1",
        data=data["name"],
        rows=", ".join(f"{split} {rows:,}" for split, rows in manifest.splits.items()),
        classes=manifest.classes,
        views=f"`{views['policy']}` ({knobs})",
        draws=manifest.draws,
        accuracy=", ".join(f"{s} {_format_accuracy(found['accuracy'])}" for s, found in manifest.teacher.items()),
        kept="logits" + (f"; features {features}" if features else ""),
        codec=identity["codec"],
        kl=f"{fidelity['kl_4']:.1e}",
        flips=fidelity["flips"],
        size=manifest.bytes / 1e6,
        files=len(manifest.shards),
        fingerprint=manifest.fingerprint,
        versions=", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
        license=manifest.settings.get("license") or "not stated: ask whoever gave it to you",
        name=shlex.quote(name),
        where=" --data folder:PATH" if data["name"] == "folder" else "",
    )


def _format_accuracy(accuracy: float | None) -> str:
    return "unknown" if accuracy is None else f"{accuracy:.4f}"


def _format_numbers(values: Any) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
