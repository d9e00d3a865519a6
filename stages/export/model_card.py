"""MODEL_CARD.md: in words what an exported student is, how good it was, where from, and how to use it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from softcache.base.errors import make_printable
from softcache.pipeline.cache.manifest import Manifest
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.copied_commands import format_command, program_name

from .metadata import INPUT, INT8, ONNX, PT2, WEIGHTS
from .select_student import ExportedRun

_WEAKEST = 20  # classes that are named with their recall
_FIGURES = {
    "accuracy": "accuracy",
    "top5": "among the first 5",
    "precision_macro": "precision, macro",
    "recall_macro": "recall, macro",
    "f1_macro": "F1, macro",
    "auroc_macro": "AUROC, macro",
    "nll": "NLL, nats",
    "ece": "ECE",
    "agreement": "agreement with the teacher",
}
_CONTENTS = {
    ONNX: "float32, any batch size, for ONNX Runtime and whatever else reads ONNX",
    INT8: "the same in 8 bits",
    PT2: "the same graph for `torch.export.load`",
    WEIGHTS: "the weights alone, named as the arch names them",
}
_EXAMPLE = """\
import json, numpy as np, onnxruntime
from PIL import Image

student, image = onnxruntime.InferenceSession("{file}"), Image.open("picture.png").convert("{mode}")
image = image.resize([max(round(side * ({resize} / min(image.size))), {size}) for side in image.size], Image.BILINEAR)
image = image.crop([(side + step) // 2 for step in (-{size}, {size}) for side in image.size])
inputs = {{"{input}": np.array(image, np.float32).reshape(1, {size}, {size}, {channels}).transpose(0, 3, 1, 2) / 255}}
print(json.loads(student.get_modelmeta().custom_metadata_map["classes"])[np.argmax(student.run(None, inputs))])
"""
_TEXT = """\
# {arch}, a student of {teachers}

Made by softcache {version}: a network that was trained from what a teacher had said, and runs without it.

| | |
|---|---|
| arch | `{arch}`, {parameters:,} parameters, {multiply_adds:,} multiply-adds a image |
| says | which of {K} classes: {classes} |
| input | `{input}`, float32 [B, {channels}, {size}, {size}], values 0 … 1. {preprocessing} |
| output | {outputs} |
| weights | seed {seed}, {why} |
| licence of the cache | {licence} |

## Figures

{figures}
## What it learned from

{sources}
## How it was trained

{training}

The run again, where data and cache lie as named:

```sh
{command}
```

## Files

| file | bytes | |
|---|---|---|
{files}

{checks}

## Use

`pip install onnxruntime pillow numpy`, then:

```python
{example}```

Or `python -m softcache predict {file} image.png`, which gives probabilities.

## Limits

- The figures are of one held-out split of {data}. They say nothing of other images: of another camera, place or
  time, or of things that are none of the {K} classes, for which it names one of them all the same.
- It learned from a teacher's soft targets, and with them the teacher's mistakes.
- Probabilities are as well calibrated as ECE says, on that split.
- Images must come as described under input: another filter, size or range of values gives other answers.
"""


def model_card(record: dict[str, Any], chosen: ExportedRun, manifests: list[Manifest]) -> str:
    """The text. record: export.json; manifests: of the caches, the first one's teacher first."""
    how, check = record["preprocessing"], record["check"]
    identity = manifests[0].identity
    data = quoted(identity["transfer_set"]["name"])
    return _TEXT.format(
        arch=quoted(record["arch"]),
        teachers=" and ".join(quoted(m.identity["teacher"]["arch"]) for m in manifests),
        version=record["versions"]["softcache"],
        parameters=record["parameters"],
        multiply_adds=record["multiply_adds"],
        K=len(record["classes"]),
        classes=_some(record["classes"]),
        input=INPUT,
        channels=how["channels"],
        size=how["size"],
        preprocessing=_about_input(how),
        outputs=record["outputs"],
        seed=record["seed"],
        why=record["chosen"],
        licence=_licence(manifests),
        figures="\n".join(_figures(record)),
        sources=_sources(chosen, manifests),
        training=_training(chosen.run_settings),
        command=_command(chosen.run_settings, identity["transfer_set"]["name"]),
        files="\n".join(_files(record)),
        checks=_checks(record, check),
        file=ONNX,
        data=data,
        example=example(ONNX, how),
    )


def example(file: str, how: dict[str, Any]) -> str:
    """Five lines that name the class of a image. how: the preprocessing of the file."""
    shape = {name: how[name] for name in ("mode", "channels", "size", "resize")}
    return _EXAMPLE.format(file=file, input=INPUT, **shape)


def quoted(text: object) -> str:
    """Text from a file nobody vouches for, as it may stand in a table of Markdown."""
    marks = {"|": "\\|", "`": "'", "<": "&lt;", "[": "\\[", "*": "\\*"}
    return "".join(marks.get(c, c) for c in make_printable(text, 80))


def _some(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(quoted(name) for name in names[:most]) + more


def _about_input(how: dict[str, Any]) -> str:
    kind = "grey" if how["channels"] == 1 else "RGB"
    return (
        f"A image as {kind}, its shorter side made {how['resize']} px with Pillow's bilinear filter, the middle"
        f" {how['size']} × {how['size']} cut out, divided by 255; normalisation is inside"
    )


def _figures(record: dict[str, Any]) -> Iterator[str]:
    """A table for each split, then recall by class."""
    figures, eight = record["figures"], record["int8"]
    student = figures["student"]
    for split in sorted(student):  # test first
        columns = {name: figures[name][split] for name in ("teacher", "baseline", "student") if name in figures}
        if eight and eight["split"] == split:
            columns["student in 8 bits"] = eight["figures"]
        titles = {"baseline": "same arch, hard targets only"}
        yield f"{split} split, {student[split]['rows']:,} images, plain views, float32 arithmetic:\n"
        yield f"| | {' | '.join(titles.get(name, name) for name in columns)} |"
        yield "|---|" + "---|" * len(columns)
        for key, title in _FIGURES.items():
            values = [found.get(key) for found in columns.values()]
            if any(value is not None for value in values):
                yield f"| {title} | {' | '.join('-' if v is None else f'{v:.4f}' for v in values)} |"
        yield ""
    split = record["check"]["split"]
    if "per_class" in student[split]:
        yield from _recalls(student[split]["per_class"], record["classes"], split)


def _recalls(found: dict[str, Any], classes: list[str], split: str) -> Iterator[str]:
    rows = [
        (recall, name, support)
        for recall, name, support in zip(found["recall"], classes, found["support"], strict=True)
        if recall is not None
    ]
    if len(rows) > _WEAKEST // 2:
        rows.sort(key=lambda row: row[0])
    left = f" ({len(rows) - _WEAKEST} stronger ones are left out)" if len(rows) > _WEAKEST else ""
    order = ", the weakest first" if len(rows) > _WEAKEST // 2 else ""
    yield f"Recall of the student by class, {split}{order}{left}:\n"
    yield "| class | recall | images |\n|---|---|---|"
    for recall, name, support in rows[:_WEAKEST]:
        yield f"| {quoted(name)} | {recall:.4f} | {int(support):,} |"
    yield ""


def _sources(chosen: ExportedRun, manifests: list[Manifest]) -> str:
    """The transfer set, the views and each teacher's cache."""
    first, config = manifests[0], chosen.run_settings
    views = first.identity["views"]
    knobs = ", ".join(f"{k} {v:g}" for k, v in views.items() if k != "policy")
    rows, draws = first.splits["train"], config.draws or first.draws
    lines = [
        f"- {rows:,} images of {quoted(first.identity['transfer_set']['name'])}, each in"
        f" {draws} view{'s' * (draws > 1)} `{quoted(views['policy'])}` ({knobs})"
    ]
    if config.labelled:
        lines.append(f"- {config.labelled:,} of them with their labels, all with the teacher's logits")
    for manifest in manifests:
        teacher = manifest.identity["teacher"]
        lines.append(
            f"- teacher `{quoted(teacher['arch'])}`, weights SHA-256 `{quoted(teacher['weights'])}`; cache"
            f" `{quoted(manifest.fingerprint)}`"
        )
    how = [f"{n} `{quoted(v)}`" for n, v in (("combined by", config.combine), ("mapped by", config.map)) if v]
    return "\n".join([*lines, *(f"- {text}" for text in how)]) + "\n"


def _training(config: StudentConfig) -> str:
    losses = " + ".join(f"`{quoted(loss)}`" for loss in config.loss)
    more = ""
    if config.finetune_epochs:
        more = f", then {config.finetune_epochs} epochs from hard targets alone"
    return (
        f"Loss {losses}; {config.epochs} epochs{more}, batches of {config.batch_size}, {config.optimizer},"
        f" learning rate {config.learning_rate:g} ({config.schedule}), weight decay {config.weight_decay:g},"
        f" {config.precision} arithmetic."
    )


def _command(config: StudentConfig, data: str) -> str:
    """The command that trains the run again, without a path of this machine."""
    where = "folder:PATH" if data == "folder" else config.data
    caches = tuple(f"caches/{Path(cache).resolve().name}" for cache in config.cache)
    changes = {"out": "", "resume": False, "json": False, "data_root": "datasets", "data": where, "cache": caches}
    text = format_command("student", config, **changes)
    return "python -m softcache" + text.removeprefix(program_name())


def _files(record: dict[str, Any]) -> Iterable[str]:
    for name, file in record["files"].items():
        opset = f", opset {record['opset']}" if name in (ONNX, INT8) else ""
        yield f"| `{name}` | {file['bytes']:,} | {_CONTENTS[name]}{opset} |"


def _checks(record: dict[str, Any], check: dict[str, Any]) -> str:
    """What was measured of the files."""
    lines = [
        f"`{ONNX}` in ONNX Runtime {record['versions']['onnxruntime']} against PyTorch {record['versions']['torch']}"
        f" on {check['rows']:,} images of {check['split']}: logits differ by {check['largest_difference']:.1e} at"
        f" most, {check['flips']} images change their first class. Batches of"
        f" {', '.join(map(str, check['batch_sizes']))} were run."
    ]
    if eight := record["int8"]:
        before, after = eight["accuracy_before"], eight["accuracy_after"]
        accuracy = "" if before is None else f"accuracy {before:.4f} before and {after:.4f} after, "
        times = "; ".join(
            f"batch {batch}: {took[ONNX]:.3f} ms in float32, {took[INT8]:.3f} ms in 8 bits"
            for batch, took in eight["milliseconds"].items()
        )
        lines.append(
            f"`{INT8}`, calibrated on {eight['calibration_rows']:,} cached training views: {accuracy}"
            f"{eight['flips']} of {eight['rows']:,} images change their first class; {eight['size_ratio']:.3f} of"
            f" the size. Medians of one machine's CPU, {eight['threads']} threads: {times}."
        )
    return "\n\n".join(lines)


def _licence(manifests: list[Manifest]) -> str:
    said = [str(m.settings.get("license") or "not stated") for m in manifests]
    return "; ".join(dict.fromkeys(quoted(one) for one in said))
